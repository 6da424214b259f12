"""The list of all samples that TerraMesh publishes beside its shards, ``{root}/{split}_metadata.parquet``, and what shards lack of it.

The names of its columns are not relied on: the samples' names are in the column of text that holds most keys of the index. They may be
keys as they stand, paths of samples (``train/S2L2A/KEY.zarr.zip``), or begin with a modality or split besides (``S2L2A_KEY``): the first of
these three readings under which most keys are found counts for the whole column, and no other change is made.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from terramind_jax import modalities as registry
from terramind_jax.data import order, scan, storage
from terramind_jax.data.errors import NAMED, some
from terramind_jax.files import is_remote

_BATCH = 1 << 16  # rows that are in memory at once
_PROBED = 1000  # keys, evenly over the index, that tell the column
_PIECE = 1 << 20  # bytes of the least request to a remote store


class Comparison(NamedTuple):
    """Sentences: what is wrong, and what is only worth knowing. Both are empty where there is no list."""

    problems: list[str]
    notes: list[str]


def compare(root: str | os.PathLike, split: str, keys: np.ndarray) -> Comparison:
    """The list of a split beside the sorted `keys` of its index, as bytes. Samples that no shard has are a problem."""
    name = f"{split}_metadata.parquet"
    try:
        source = _open(root, name)
        if source is None or not len(keys):
            return Comparison([], [])
        from pyarrow import parquet

        with source:
            return _compare(parquet.ParquetFile(source), name, split, keys)
    except ImportError:
        return Comparison([], [f"{name} is not compared, for pyarrow is not installed: pip install 'terramind-jax[geo]'."])
    except (ConnectionError, PermissionError) as error:  # of the storage, which tells nothing of the list
        return Comparison([], [f"{name} is not compared: {str(error).rstrip('.')}."])
    except (ValueError, OSError) as error:  # what pyarrow raises of a damaged file is either, too
        return Comparison([f"{name} cannot be read ({str(error).splitlines()[0]}); copy it again, or delete it."], [])


def _compare(file: Any, name: str, split: str, keys: np.ndarray) -> Comparison:
    columns = [field.name for field in file.schema_arrow if _is_text(field.type)]
    column, affixes = _find(file, columns, split, keys)
    if not column:
        told = ", ".join(columns) or "it has none"
        return Comparison([], [f"{name} is not compared: the names of these samples are in none of its columns of text ({told})."])
    listed, lost = np.zeros(len(keys), bool), [np.zeros(0, "S1")]
    for texts in _batches(file, column):
        found = np.array([text.encode() for text in _without(affixes, texts).to_pylist()], "S")
        places = scan.places_in(found, keys)
        listed[places[places >= 0]] = True
        lost.append(np.unique(found[places < 0]))
    absent, unlisted = np.unique(np.concatenate(lost)), keys[~listed]
    notes = [f"{name} does not list {len(unlisted)} samples of the shards, {_first(unlisted)}."] if len(unlisted) else []
    if not len(absent):
        return Comparison([], [f"All {np.count_nonzero(listed)} samples that {name} lists are here.", *notes])
    remedy = "copy their shards, or delete the list from a part of them"
    return Comparison([f"{name} lists {len(absent)} samples that no shard has, {_first(absent)}; {remedy}."], notes)


def _first(keys: np.ndarray) -> str:
    return some([key.decode() for key in keys[: NAMED + 1].tolist()])


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _find(file: Any, columns: list[str], split: str, keys: np.ndarray) -> tuple[str, str]:
    """The column that holds the samples' names and the `_affixes` to read it without; "" where none holds more than half of the probed
    keys."""
    import pyarrow as pa
    from pyarrow import compute

    probed = pa.array([key.decode() for key in keys[order.spread(len(keys), _PROBED)].tolist()])
    best, most = ("", ""), len(probed) / 2
    for column in columns:
        found: dict[str, set[str]] = {affixes: set() for affixes in _affixes(split)}
        for texts in _batches(file, column):
            for affixes, seen in found.items():
                names = _without(affixes, texts)
                seen.update(names.filter(compute.is_in(names, probed)).to_pylist())
        for affixes, seen in found.items():
            if len(seen) > most:
                best, most = (column, affixes), len(seen)
    return best


def _affixes(split: str) -> list[str]:
    """Regular expressions of what a name may have around the key that it stands for, the least first."""
    prefixes, suffix = "|".join(map(re.escape, (*registry.MODALITIES, split))), r"\.zarr\.zip$|\.zarr$|\.zip$"
    return ["", rf"(?s)^.*/|{suffix}", rf"(?s)^(?:.*/)?(?:(?:{prefixes})_)*|{suffix}"]


def _without(affixes: str, texts: Any) -> Any:
    from pyarrow import compute

    return compute.replace_substring_regex(texts, affixes, "") if affixes else texts


def _batches(file: Any, column: str) -> Iterator[Any]:
    """The texts of one column as arrays of pyarrow; no other column is read."""
    for batch in file.iter_batches(_BATCH, columns=[column]):
        yield batch.column(0).drop_null().cast("string")


class _Object(io.RawIOBase):
    """An object of a store as a file, of which any part can be read, with the store's retries."""

    def __init__(self, store: storage.RemoteStore, path: str, size: int):
        self._store, self._path, self._size, self._at = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        data = self._store.read(self._path, self._at, max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _open(root: str | os.PathLike, name: str) -> BinaryIO | None:
    path = storage.join(root, name)
    if not is_remote(root):
        return open(path, "rb") if os.path.isfile(path) else None
    store = storage.store(root)
    found = store.find(path)
    return None if found is None else io.BufferedReader(_Object(store, path, found.size), _PIECE)
