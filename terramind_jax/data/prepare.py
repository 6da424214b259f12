"""``data prepare``: the TFDS data set `terramesh` made from shards, by this process or by Apache Beam on a cluster.

Records lie in the order of the index, so that training sees the samples of the shards in the same order; `records` reads them back.
A preparation that was killed goes on with the files that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from terramind_jax import files, modalities
from terramind_jax.data import order, scan, storage, terramesh
from terramind_jax.data.index import Index, open_index

BEAM = "Apache Beam is not installed; install it with: pip install 'terramind-jax[beam]'"

_PROBED = 8  # records of a split whose largest tells how many fit into a file


def prepare(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokens: str | os.PathLike | None = None,
    beam_options: Sequence[str] | None = None,
) -> None:
    """Writes all splits under `root` as the TFDS data set ``{out}/terramesh``, with the tokens under `tokens` (default: `root`).

    `beam_options` are options of a Beam pipeline, such as ``--runner=DirectRunner``; None makes the records in this process. Beam's
    machines have to see `root`, `tokens` and `out` under the same names. `out` appears whole or not at all; until then its files wait in
    ``{out}.parts``, with which the same call goes on after it was killed. If `out` was prepared from the same shards already nothing is
    done, and anything else there, or in ``{out}.parts``, is a FileExistsError. Samples that cannot be read are as bad there as in the
    shards. Raises ValueError for tokens of other samples or pixels, ImportError where Beam is missing.
    """
    root, out = os.fspath(root), os.fspath(out)
    if files.is_remote(out):
        raise ValueError(f"{out} is in an object store, where ArrayRecord cannot be written; give --out a folder, and copy it then.")
    options = None if beam_options is None else _pipeline_options(beam_options)
    source, indexes = _find(root, os.fspath(tokens or root))
    made_from = {split: index.version for split, index in indexes.items()}
    if terramesh.is_finished(out, made_from):
        print(f"{out} is prepared from these shards already; nothing to do.")
        return
    form = _form(indexes)
    parts = terramesh.parts_of(out)
    described = made_from | {"form": repr(form)}
    found, ends = terramesh.claimed(parts)
    if found and terramesh.TOKENIZERS in found:
        raise FileExistsError(f"{parts} holds files of an unfinished tokenize; finish it, give --out another folder, or delete them.")
    if found != described:
        ends = {split: _ends(index, form) for split, index in indexes.items()}
        if os.path.isdir(parts):
            terramesh.empty(parts)  # an error if one cannot be deleted: it would be taken for these
        terramesh.claim(parts, described, ends)
    jobs = [(source, split, form, *rest) for split in indexes for rest in terramesh.files_of(parts, split, ends[split])]
    _write_parts(jobs, options)
    terramesh.assemble(out, indexes, form, ends, made_from, {split: _tokenizers(source.tokens, split, form["tokens"]) for split in indexes})


def _pipeline_options(options: Sequence[str]) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(BEAM) from error
    return PipelineOptions(list(options))


def _find(root: str, tokens: str) -> tuple[Source, dict[str, Index]]:
    """The shards of every split, over the modalities that any of them has."""
    splits = _splits(root)
    found = {m for split in splits for m in open_index(root, split, tokens_root=tokens).modalities}
    source = Source(root, tokens, tuple(m for m in modalities.MODALITIES if m in found))
    _open.cache_clear()  # shards may have changed since
    indexes = {split: source.open(split) for split in splits}
    for index in indexes.values():
        index.check_tokens()
    return source, indexes


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards, by names that mean the same on every machine of a cluster."""

    root: str
    tokens: str
    modalities: tuple[str, ...]

    def open(self, split: str) -> Index:
        return _open(self, split)


@functools.lru_cache(maxsize=8)  # a worker makes many records
def _open(source: Source, split: str) -> Index:
    return open_index(source.root, split, source.modalities, tokens_root=source.tokens)


def _splits(root: str) -> list[str]:
    store = storage.store(root)
    names: Iterable[str] = ("train", "val")
    if not files.is_remote(root):
        names = sorted(e.name for e in os.scandir(root) if e.is_dir()) if os.path.isdir(root) else ()
    found = [n for n in names if any(scan.listing(store, root, n).values())]
    if not found:
        raise FileNotFoundError(f"No shards in {root}; expected tars like {root}/train/S2L2A/NAME_shard_000001.tar.")
    return found


def _tokenizers(tokens: str, split: str, names: Iterable[str]) -> dict[str, str]:
    """Which tokenizers made the tokens, as training looks for it."""
    found = {}
    for name in names:
        path = files.folder(tokens) / split / f"{name}_tokens" / "tokenizer.json"
        if path.exists():
            found[name] = path.read_text()
        else:
            logging.warning("%s does not tell which tokenizer made its tokens, for it has no %s.", path.parent, path.name)
    return found


# ---- records and files -------------------------------------------------------------------------------------------------------


def _form(indexes: Mapping[str, Index]) -> dict[str, Any]:
    """Which modalities have pixels, and what one crop's tokens of those that have some look like."""
    pixels: dict[str, None] = {}
    tokens: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for index in indexes.values():
        for column, name in enumerate(index.modalities):
            if index.available[:, column].any():
                pixels[name] = None
            for i in np.flatnonzero(index.has_tokens[:, column]) if name not in tokens else ():
                grid = terramesh.attempt(index.tokens, int(i), name)
                if grid is not None:
                    tokens[name] = grid.shape[1:], grid.dtype
                    break
    return {"pixels": tuple(pixels), "tokens": tokens}


def _ends(index: Index, form: Mapping[str, Any]) -> list[int]:
    """Where the files of a split begin and end among its locations."""
    serialize, probed = terramesh.serializer(form), order.spread(len(index), _PROBED)
    return terramesh.even_ends(len(index), max(len(serialize(terramesh.record(index, form, int(i)))) for i in probed))


def _write_parts(jobs: Sequence[tuple[Any, ...]], options: Any) -> None:
    """`_write_part` with each of these arguments, by Apache Beam with such `options`, else here."""
    if options is None:
        for job in tqdm(jobs, desc="prepare", unit="file"):
            _write_part(*job)
        return
    import apache_beam

    with apache_beam.Pipeline(options=options) as pipeline:
        _ = pipeline | apache_beam.Create(jobs) | apache_beam.Reshuffle() | apache_beam.MapTuple(_write_part)


def _write_part(source: Source, split: str, form: Mapping[str, Any], start: int, stop: int, path: str) -> None:
    """`write_file`, wherever it runs; a file that is there is left alone."""
    if not os.path.exists(path):
        terramesh.write_file(source.open(split), form, start, stop, path)
