"""Turns shards into token shards: every distinct crop of every sample through its tokenizer, once, before pretraining.

Beside ``{split}/{modality}/SUBSET_shard_000001.tar`` comes ``{split}/{modality}_tokens/SUBSET_shard_000001.tar`` of ``KEY.npy``, ids
``[VARIANTS, 14, 14]``, of K codebooks ``[..., K]``, in the order of `data.crops`. Shards that are there are kept, so a run that stopped
goes on where it was, unless the pixels have changed since. `token_records` writes an ArrayRecord data set instead.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from terramind_jax import files, sources
from terramind_jax import modalities as registry
from terramind_jax.data import records, scan
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.pipeline import variant_images
from terramind_jax.data.shards import TOKEN_SOURCE, TOKEN_SUFFIX, ShardWriter, token_source
from terramind_jax.data.tars import scan_tar
from terramind_jax.modalities import IMAGE_SIZE, PATCH_SIZE
from terramind_jax.tokenizer import Tokenizer, encode_stored
from terramind_jax.weights import tokenizer as load

RECORD = "tokenizer.json"  # which tokenizer made the tokens of a folder

Encode = Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]


def tokenize(
    data: str | os.PathLike,
    weights: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    splits: Sequence[str] | None = None,
    modalities: Sequence[str] | None = None,
    batch_size: int = 16,
    image_size: int = IMAGE_SIZE,
    array_record: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> None:
    """Stores tokens of the shards under `data` for each modality with a tokenizer ``{weights}/{modality}``, or with ``hub`` a released one.

    `out` is where the token shards go, by default beside the pixels; always a local folder. With `array_record` it becomes a TFDS data
    set, see `token_records.write`, and has to be a new one. `splits` are by default those of train and val that exist, `modalities` those
    with a tokenizer; `image_size` is the side of the crops. Batches are spread over the devices of this host, which does every shard, or
    file of records, whose number among the `hosts` is `host`; a run that was killed writes, started again, the same files. Samples that
    cannot be read are left out; a store that cannot be reached ends it. Raises FileNotFoundError for missing tokenizers, shards or index,
    ValueError for prepared data and where tokens of another tokenizer or image size lie already, FileExistsError where such records do.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"host is {host} of {hosts}; hosts are numbered from 0 to one less than there are.")
    if array_record and (out is None or os.path.abspath(out) == os.path.abspath(data)):
        raise ValueError("Records of tokens do not lie beside the pixels; give --out a new folder, for data.tokens of a pretraining.")
    out = data if out is None else out
    if files.is_remote(out):
        raise ValueError(f"Tokens cannot be written to {out}; give a local folder with --out and copy it there.")
    splits = [s for s in ("train", "val") if scan.is_there(data, s)] if splits is None else splits
    if not splits and files.is_remote(data):
        raise FileNotFoundError(f"There is no readable index of train or val in {data}; make it once with: terramind-jax data index {data}")
    if not splits:
        raise FileNotFoundError(f"{data} has no folder train or val; expected shards like {data}/train/S2L2A/NAME_shard_000001.tar.")
    if any(records.is_prepared(data, split) for split in splits):
        raise ValueError(f"{data} is prepared data; tokenize the shards that it was made from, and prepare it again with the tokens.")
    if not array_record and any(records.is_prepared(out, split) for split in splits):
        raise ValueError(f"{out} is a data set of records, beside which token shards would be lost; give --out another folder.")
    scan.declare(data)
    known = _with_tokenizer(weights, modalities)
    found = {m: [split for split in splits if modalities is not None or scan.is_there(data, split, m)] for m in known}
    if not any(found.values()):
        raise FileNotFoundError(
            f"{data} has no shards of {', '.join(known)}, which {weights} has tokenizers of; expected them in folders like "
            f"{data}/{splits[0]}/{known[0]}."
        )
    made = {m: there for m, there in found.items() if there}
    if weights != "hub":
        print(f"Tokenizers: {', '.join(str(_find(weights, m)) for m in made)}", flush=True)  # they may lie beside `weights`
    tokenizers = ((m, Encoding.load(m, weights, batch_size, image_size)) for m in made)
    if array_record:
        from terramind_jax import token_records  # TFDS takes long to load

        token_records.write(data, out, dict(tokenizers), [s for s in splits if any(s in there for there in made.values())], host, hosts)
        return
    for modality, encoding in tokenizers:
        for split in made[modality]:
            index = open_index(data, split, [modality])
            claim(Path(out) / split / f"{modality}_tokens", encoding.record)
            names = list(index.shards(modality))[host::hosts]
            tokenize_split(index, split, modality, Path(out), encoding, names)


def _with_tokenizer(weights: str | os.PathLike, wanted: Sequence[str] | None) -> list[str]:
    there = [m.name for m in registry.MODALITIES.values() if m.levels and _find(weights, m.name)]
    absent = sorted(set(wanted or ()) - set(there))
    if absent or not there:
        raise FileNotFoundError(
            f"{weights} has no tokenizer {', '.join(absent) or 'at all'}; expected a work directory like {weights}/S2L2A."
        )
    return there if wanted is None else list(wanted)


def _find(weights: str | os.PathLike, modality: str) -> str | os.PathLike | None:
    """Where the tokenizer of a modality is, None if there is none."""
    if weights == "hub":
        return weights if modality in registry.RELEASED else None
    if not Path(weights).is_dir():
        return None
    try:
        return sources.find_tokenizer(Path(weights), modality, "v1")
    except FileNotFoundError:
        return None


# ---- which tokenizer --------------------------------------------------------------------------------------------------------


def describe(name: str, module: Tokenizer, variables: Any, image_size: int) -> dict[str, Any]:
    """What tells one folder of tokens from another: the tokenizer's vocabulary, a hash of its weights, the side of the crops."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.asarray(leaf).tobytes())
    config = module.config
    vocabulary = {"codebook_size": config.codebook_size, "num_codebooks": config.num_codebooks, "levels": list(config.levels)}
    return {"name": name, "weights_sha256": digest.hexdigest(), "image_size": image_size, **vocabulary}


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Marks a folder as holding tokens of this tokenizer; a ValueError if it holds another's. A tokenizer may be renamed."""
    path = folder / RECORD
    if path.is_file():
        found = json.loads(path.read_text())
        if {**found, "name": ""} != {**record, "name": ""}:
            raise ValueError(
                f"{folder} holds tokens of another tokenizer, {_title(found)}, not of {_title(record)}; choose another folder or delete it."
            )
        return
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tokens of an unknown tokenizer, for it has no {RECORD}; choose another folder or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)


def _title(record: dict[str, Any]) -> str:
    return f"{record.get('name')} with weights {str(record.get('weights_sha256'))[:12]} at {record.get('image_size')} pixels"


# ---- encoding ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A tokenizer at work on crops of one size: their tokens, the shape and type of one crop's, and the `describe` of whose they are."""

    encode: Encode
    shape: tuple[int, ...]
    dtype: np.dtype
    image_size: int
    record: dict[str, Any]

    @classmethod
    def load(cls, modality: str, weights: str | os.PathLike, batch_size: int, image_size: int) -> Encoding:
        module, variables = load(modality, weights)
        record = describe(f"{Path(weights).name}/{modality}", module, variables, image_size)
        side, several = image_size // PATCH_SIZE, module.config.num_codebooks
        shape = (side, side) if several == 1 else (side, side, several)
        dtype = np.dtype(np.uint16 if module.config.codebook_size <= 1 << 16 else np.int32)
        return cls(encoder(module, variables, batch_size), shape, dtype, image_size, record)

    def of_samples(self, index: Index, modality: str, samples: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(sample, tokens ``[VARIANTS, *shape]``) of those `samples` that can be read, in their order."""
        images = variant_images(index, modality, image_size=self.image_size, samples=samples) if len(samples) else ()
        for i, tokens in encode_variants(images, self.encode):
            yield i, tokens.astype(self.dtype)


def encoder(module: Tokenizer, variables: Any, batch_size: int) -> Encode:
    """A function from a stream of images ``[S, S, C]``, as stored, to the stream of their tokens ``[h, w]``; one compiled shape.

    A batch is spread over the devices of this process, and `batch_size` rounded up to a multiple of them.
    """
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (AxisType.Auto,), devices=jax.local_devices())
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    encoding = {kind: {name: v for name, v in tree.items() if name != "decoder"} for kind, tree in variables.items()}
    variables = jax.device_put(encoding, everywhere)  # the larger part is not needed

    compiled = jax.jit(partial(encode_stored, module), out_shardings=spread)

    def encode(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while some := list(itertools.islice(images, batch_size)):
            batch = np.zeros((batch_size, *some[0].shape), some[0].dtype)
            np.stack(some, out=batch[: len(some)])
            yield from np.asarray(compiled(variables, jax.device_put(batch, spread)))[: len(some)]

    return encode


def encode_variants(samples: Iterable[dict[str, Any]], encode: Encode) -> Iterator[tuple[int, np.ndarray]]:
    """Samples as `variant_images` gives them -> (sample, tokens ``[VARIANTS, h, w]``); batches run across samples, bad ones drop out."""
    waiting: collections.deque[tuple[int, int, np.ndarray]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
        for sample in samples:
            if not sample["bad"]:
                waiting.append((sample["sample"], len(sample["images"]), sample["inverse"]))
                yield from sample["images"]

    tokens = encode(images())
    for first in tokens:
        sample, distinct, inverse = waiting.popleft()
        yield sample, np.stack([first, *itertools.islice(tokens, distinct - 1)])[inverse]


# ---- one split --------------------------------------------------------------------------------------------------------------


def tokenize_split(index: Index, split: str, modality: str, out: Path, encoding: Encoding, names: Collection[str]) -> None:
    """Writes the token shards under `out` that are missing, or were made from other pixels, for the pixel shards `names` of `modality`."""
    stale = {}
    for name, samples in index.shards(modality).items():
        if name not in names:
            continue
        source = index.fingerprint(modality, samples)
        if source != _source_of(out / split / f"{modality}_tokens" / name):
            stale[name] = source, samples.tolist()
    left_out, total = 0, sum(len(samples) for _, samples in stale.values())
    with tqdm(total=total, desc=f"tokenize {split}/{modality}", unit="sample", disable=not stale) as bar:
        for name, (source, wanted) in stale.items():
            subset, number = _shard_name(Path(split, modality, name))
            with ShardWriter(out, split, f"{modality}_tokens", subset, number) as writer:
                writer.add(TOKEN_SOURCE[0], source.encode(), TOKEN_SOURCE[1])
                for i, tokens in encoding.of_samples(index, modality, tuple(wanted)):
                    writer.add(index.keys[i], _npy(tokens), TOKEN_SUFFIX)
                    wanted.remove(i)
                    bar.update()
            for part in Path(writer.path).parent.glob(f"{name}.*.tmp"):
                part.unlink()  # of a run that was killed
            left_out += len(wanted)
            bar.update(len(wanted))
    if left_out:
        print(f"{split}/{modality}: {left_out} samples cannot be read and have no tokens.")


def _source_of(shard: Path) -> str:
    """The fingerprint that a token shard records, empty if there is none."""
    if not shard.is_file():
        return ""
    with open(shard, "rb", buffering=0) as f:
        return token_source(scan_tar(shard), lambda offset, size: os.pread(f.fileno(), size, offset))


def _shard_name(shard: Path) -> tuple[str, int]:
    subset, separator, number = shard.stem.rpartition("_shard_")
    if not separator or not number.isdigit() or len(number) != 6:
        raise ValueError(f"{shard} is not named like a shard, SUBSET_shard_000001.tar; rename it in every modality.")
    return subset, int(number)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
