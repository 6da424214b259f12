"""``tokenize --array_record``: tokens as the TFDS data set `data.terramesh`, whose records hold no pixels; training joins them by key.

A file of records is made by itself, from the pixels of its locations through all tokenizers, and waits in ``{out}.parts`` until all are
there; whichever host finds them so makes the data set of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from terramind_jax import files
from terramind_jax.data import crops, terramesh
from terramind_jax.data.index import Index, open_index
from terramind_jax.tokenize import Encoding

_BESIDE = 1 << 10  # bytes of a record beside its tokens, if there is no cloud mask
_PART = 32 << 20  # bytes of a file at most: what is lost if a host is killed, and what hosts share out


class _Tokenized:
    """An index whose tokens are those at hand, ``tokens[modality][sample]``; all else is the index's own."""

    def __init__(self, index: Index, has_tokens: np.ndarray, tokens: Mapping[str, Mapping[int, np.ndarray]]):
        self._index, self.has_tokens, self._tokens = index, has_tokens, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def __len__(self) -> int:
        return len(self._index)

    def tokens(self, i: int, modality: str) -> np.ndarray | None:
        return self._tokens[modality].get(i)


def write(
    data: str | os.PathLike,
    out: str | os.PathLike,
    tokenizers: Mapping[str, Encoding],
    splits: Sequence[str],
    host: int = 0,
    hosts: int = 1,
) -> None:
    """Writes the tokens of `splits` of the shards under `data` as ``{out}/terramesh``, with this host's share of the files.

    All hosts have to see `data` and `out` under the same names. `out` appears whole; if it was made from the same shards with the same
    tokenizers already nothing is done, and anything else there, or in ``{out}.parts``, is a FileExistsError.
    """
    out = os.fspath(out)
    indexes = {split: open_index(data, split, list(tokenizers)) for split in splits}
    made_by = {m: {**encoding.record, "name": ""} for m, encoding in tokenizers.items()}  # a tokenizer may be renamed
    made_from = {split: index.version for split, index in indexes.items()} | {terramesh.TOKENIZERS: made_by}
    if terramesh.is_finished(out, made_from):
        print(f"{out} holds the tokens of these shards already; nothing to do.")
        return
    form = {"pixels": (), "tokens": {m: (encoding.shape, encoding.dtype) for m, encoding in tokenizers.items()}}
    parts = terramesh.parts_of(out)
    found, ends = terramesh.claimed(parts)
    if found is None:
        largest = _BESIDE + sum(crops.VARIANTS * int(np.prod(e.shape)) * e.dtype.itemsize for e in tokenizers.values())
        ends = {split: terramesh.even_ends(len(index), largest, _PART) for split, index in indexes.items()}
        terramesh.claim(parts, made_from, ends)
    elif found != made_from:
        raise FileExistsError(f"{parts} holds tokens of other shards, or by other tokenizers; give --out another folder, or delete it.")
    jobs = [(split, *job) for split in splits for job in terramesh.files_of(parts, split, ends[split])]
    todo = [job for job in jobs[host::hosts] if not os.path.exists(job[-1])]
    with tqdm(total=sum(stop - start for _, start, stop, _ in todo), desc="tokenize", unit="location", disable=not todo) as bar:
        for split, start, stop, path in todo:
            _write_file(indexes[split], tokenizers, form, start, stop, path)
            bar.update(stop - start)
    if missing := sum(not os.path.exists(path) for *_, path in jobs):
        print(f"{missing} of {len(jobs)} files are still to be made by other hosts; if none of them is at work, start any of them again.")
        return
    try:
        tokenized = {split: _Tokenized(index, _has_tokens(index, parts, split, ends[split]), {}) for split, index in indexes.items()}
        texts = {m: json.dumps(encoding.record, indent=2) + "\n" for m, encoding in tokenizers.items()}
        terramesh.assemble(out, tokenized, form, ends, made_from, dict.fromkeys(splits, texts))
    except OSError:
        if not terramesh.is_finished(out, made_from):  # by another host that found all files there
            raise


def _write_file(index: Index, tokenizers: Mapping[str, Encoding], form: Mapping[str, Any], start: int, stop: int, path: str) -> None:
    tokens: dict[str, dict[int, np.ndarray]] = {}
    left_out: dict[str, list[int]] = {}
    for modality, encoding in tokenizers.items():
        wanted = (start + np.flatnonzero(index.available[start:stop, index.modalities.index(modality)])).tolist()
        tokens[modality] = dict(encoding.of_samples(index, modality, wanted))
        left_out[modality] = [i for i in wanted if i not in tokens[modality]]
    files.write_text(_left_out(path), json.dumps(left_out))
    terramesh.write_file(_Tokenized(index, index.available, tokens), form, start, stop, path)
    for modality, samples in left_out.items():
        if samples:
            print(f"{Path(path).name}: {len(samples)} samples of {modality} cannot be read and have no tokens.")


def _left_out(path: str) -> Path:
    """Beside a file: which samples have no tokens in it, by modality."""
    return Path(f"{path}.left_out.json")


def _has_tokens(index: Index, parts: str, split: str, ends: Sequence[int]) -> np.ndarray:
    """Bool ``[n, modalities]``, as the files of a split have them."""
    found = np.array(index.available)
    for *_, path in terramesh.files_of(parts, split, ends):
        for modality, samples in json.loads(_left_out(path).read_text()).items():
            found[samples, index.modalities.index(modality)] = False
    return found
