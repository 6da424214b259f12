"""Samples in tars, laid along the keys of an index file: a column a folder, and the bytes of one sample in it."""

from __future__ import annotations

import collections.abc
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from terramind_jax.data import scan, storage, tars
from terramind_jax.data.errors import DataError
from terramind_jax.data.table import Table

_NEAR = 1 << 14  # bytes of a sample before what is wanted of it that are read besides, to see that it is this sample


class Keys(collections.abc.Sequence):
    """A sequence of str over a sorted array of bytes, or its given rows: nine million keys without nine million objects."""

    def __init__(self, stored: np.ndarray, rows: np.ndarray | None = None):
        self._stored, self._rows = stored, rows

    def __len__(self) -> int:
        return len(self._stored if self._rows is None else self._rows)

    def raw(self, i) -> np.ndarray:
        """Keys as bytes; `i` is whatever indexes an array."""
        return self._stored[i if self._rows is None else self._rows[i]]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [k.decode() for k in self.raw(i).tolist()]
        return bytes(self.raw(i)).decode()

    def __eq__(self, other) -> bool:
        return list(self) == list(other)

    __hash__ = None

    def find(self, key: str) -> int:
        """The position of `key`; a KeyError if there is none."""
        i = int(np.searchsorted(self._stored, key.encode()))
        i = i if self._rows is None else int(np.searchsorted(self._rows, i))
        if i == len(self) or self[i] != key:
            raise KeyError(f"There is no sample {key!r} among {len(self)}.")
        return i


class Column:
    """One folder's samples laid along the keys of an index file; size 0 where a key is missing."""

    def __init__(self, parent: str, name: str, found: Table, rows: np.ndarray | None):
        self.folder, self.suffix, self.rows = storage.join(parent, name), scan.suffix_of(name), rows
        self.shards = [s[0] for s in found.meta["shards"][name]]
        self.shard, self.offset, self.size, self.start, self.length, self.layout = (found.arrays[f"{name}/{f}"] for f in scan.FIELDS)
        self.block = 0  # bytes that are read at once of a remote store, 0: a sample's own

    def row(self, i: int) -> int:
        """The row of location `i`, -1 if the file does not know it."""
        return i if self.rows is None else int(self.rows[i])

    def path(self, i: int) -> str:
        return storage.join(self.folder, self.shards[self.shard[self.row(i)]])

    def mean_size(self) -> float:
        """Bytes of a sample in its tar."""
        sizes = self.sizes()
        return float(sizes.sum(dtype=np.int64)) / max(int(np.count_nonzero(sizes)), 1)

    def sizes(self) -> np.ndarray:
        """Of each location's sample, 0 where there is none."""
        return self.size if self.rows is None else np.where(self.rows < 0, 0, self.size[self.rows])

    def beside(self, i: int) -> np.ndarray:
        """The locations whose samples are in the tar of that of `i`, in their order there."""
        rows = slice(None) if self.rows is None else self.rows
        there = np.flatnonzero((self.shard[rows] == self.shard[self.row(i)]) & (self.sizes() > 0))
        return there[np.argsort(self.offset[rows][there])]


class Columns(dict[str, Column]):
    """The columns of one root by modality, along the same `keys`. `what` they hold is said before a modality's name: "tokens of "."""

    def __init__(
        self, root: str, split: str, folders: Mapping[str, str], found: Table, rows: np.ndarray | None, keys: Keys, what: str = ""
    ):
        super().__init__({m: Column(storage.join(root, split), folder, found, rows) for m, folder in folders.items()})
        self.store, self._keys, self._what = storage.store(root), keys, what

    def stored_bytes(self) -> int:
        return sum(int(column.sizes().sum(dtype=np.int64)) for column in self.values())

    def of(self, i: int, modality: str) -> Column:
        """The column that holds sample `i` of a modality; a `DataError` if none does."""
        column = self.get(modality)
        if column is None or (row := column.row(i)) < 0 or not column.size[row]:
            raise DataError(f"Sample {self._keys[i]!r} has no {self._what}{modality}; check Index.available before reading.", "missing")
        return column

    def whole(self, i: int, modality: str) -> memoryview:
        """A sample as it lies in its tar."""
        column = self.of(i, modality)
        return self.read(i, modality, 0, int(column.size[column.row(i)]))

    def read(self, i: int, modality: str, start: int, size: int) -> memoryview:
        """`size` bytes of a sample from its byte `start`; a `DataError` if another sample lies there by now."""
        column = self[modality]
        before = start + tars.BLOCK if start <= _NEAR else 0  # of the sample's header in the tar, which comes along where it is near
        try:
            at = int(column.offset[column.row(i)]) + start - before
            payload = memoryview(self.store.read(column.path(i), at, before + size, column.block))
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreachable"
            raise DataError(f"{self.where(i, modality)} cannot be read ({error.strerror or error}).", reason) from error
        if len(payload) != before + size:
            there = max(len(payload) - before, 0)
            raise DataError(f"{self.where(i, modality)} ends early: {there} of {size} bytes; index it again.")
        name = self._keys.raw(i) + column.suffix.encode()
        if before and not tars.is_header_of(payload[: tars.BLOCK], name):
            raise DataError(f"{self.where(i, modality)} is not where it was when the shard was indexed; index it again.")
        return payload[before:]

    def where(self, i: int, modality: str) -> str:
        """Where a sample lies, as errors begin."""
        return f"{self[modality].path(i)}: sample {self._keys[i]!r}"


def wanted_rows(found: Table, columns: Collection[str]) -> np.ndarray | None:
    """The rows that have any of `columns`; None if these are all of them, which takes no memory."""
    n = len(found.arrays["keys"])
    if any(found.meta["counts"][c] == n for c in columns) and n:
        return None
    there = presence(found, list(columns), None).any(1)
    return None if there.all() and n else np.flatnonzero(there)


def presence(found: Table, names: Sequence[str], rows: np.ndarray | None) -> np.ndarray:
    """Bool ``[n, len(names)]``: a view of the file where it can be."""
    places = [found.meta["columns"].index(n) if n in found.meta["columns"] else -1 for n in names]
    available = found.arrays["available"]
    if rows is None and places and places[0] >= 0 and places == list(range(places[0], places[0] + len(places))):
        return available[:, places[0] : places[0] + len(places)]
    there = np.zeros((len(available) if rows is None else len(rows), len(places)), bool)
    for column, place in enumerate(places):
        if place >= 0:
            there[:, column] = available[:, place] if rows is None else available[rows, place] & (rows >= 0)
    return there


def rows_in(tokens: Table, pixels: Table, rows: np.ndarray | None) -> np.ndarray | None:
    """The rows of another file's keys that the kept rows of `pixels` have there, -1 where they have none."""
    keys, known = pixels.arrays["keys"], tokens.arrays["keys"]
    keys = keys if rows is None else keys[rows]
    return None if np.array_equal(keys, known) else scan.places_in(keys, known)
