"""Scanning the shards of a split into one index file: where each sample of each modality lies, joined by key.

On a disk only tar headers and zip directories are read; a remote store is read through once, many shards at a time, for a request a
header would be millions. What is scanned is kept shard by shard until all of it is, so that a scan which was interrupted goes on, and an
index is built anew from what it knows of the shards that did not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from terramind_jax import declarations
from terramind_jax import modalities as registry
from terramind_jax.data import layout, storage, table, tars, zips
from terramind_jax.data.errors import DataError
from terramind_jax.data.shards import SAMPLE_SUFFIX, TOKEN_SUFFIX
from terramind_jax.data.storage import LocalStore, Object, RemoteStore
from terramind_jax.data.table import Table
from terramind_jax.data.tars import Read
from terramind_jax.files import is_remote

VERSION = 1
NAME = "samples.index"  # beside the modalities of the split
FIELDS = ("shard", "offset", "size", "start", "length", "layout")
_TOKENS = "_tokens"
_PIECE = 16 << 20  # bytes of one request to a remote store
_THREADS = {True: 16, False: 8}  # remote, local


def declare(root: str | os.PathLike) -> dict[str, Any]:
    """Declares the modalities of ``{root}/modalities.json``, if there is one, and returns the declarations."""
    path, text = storage.join(root, declarations.NAME), None
    if not is_remote(root):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(path, encoding="utf-8") as f:
            text = f.read()
    elif (found := (store := storage.store(root)).find(path)) is not None:
        text = store.read(path, 0, found.size)
    own = {} if text is None else declarations.parse(text, path)
    declarations.declare(own, path)
    return own


def columns() -> list[str]:
    """The folders of a split that are indexed, pixels first."""
    images = [m.name for m in registry.MODALITIES.values() if m.is_image]
    return images + [m + _TOKENS for m in images]


# ---- one shard --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    """What one shard holds: keys ``[n]``, ``where [n, 5]`` of offset and size in the tar, start and length of the encoded `bands` in
    the sample (length 0: not in one piece) and number of its layout; longitude and latitude ``[n, 2]``, NaN where not known."""

    keys: np.ndarray
    where: np.ndarray
    places: np.ndarray
    layouts: list[str] = dataclasses.field(default_factory=list)
    fault: str = ""

    def save(self, path: str, stamp: Sequence[Any]) -> None:
        """A disk that is full or read-only only means scanning again."""
        with contextlib.suppress(OSError):
            arrays = {"keys": self.keys, "where": self.where, "places": self.places}
            table.write(path, {"stamp": list(stamp), "layouts": self.layouts}, arrays)

    @classmethod
    def load(cls, path: str, stamp: Sequence[Any]) -> Part | None:
        found = table.read(path)
        if found is None or found.meta.get("stamp") != list(stamp):
            return None
        return cls(**found.arrays, layouts=found.meta["layouts"])


def scan_shard(path: str, read: Read, size: int, suffix: str, *, whole: bool, places: bool) -> Part:
    """Scans one tar. `whole` reads samples in one go, `places` asks for their coordinates. A damaged tar is a part with a fault."""
    layouts = _Layouts()
    keys, where, where_on_earth = [], [], []
    try:
        for name, offset, length in tars.scan(path, read, size):
            if not name.endswith(suffix):
                continue
            if length >= 1 << 32:
                raise DataError(f"{path} is damaged: sample {name!r} of {length} bytes is larger than any; delete it or copy it again.")
            keys.append(os.path.basename(name)[: -len(suffix)].encode("utf-8", "surrogateescape"))
            at, lonlat = (0, 0, 0), (np.nan, np.nan)
            if suffix == SAMPLE_SUFFIX:
                at, lonlat = _scan_sample(_within(read, offset, length, whole), length, layouts, places)
            where.append((offset, length, *at))
            where_on_earth.append(lonlat)
    except DataError as error:
        return Part(np.zeros(0, "S1"), np.zeros((0, 5), np.int64), np.zeros((0, 2)), fault=str(error))
    found = np.array(where, np.int64).reshape(-1, 5)
    return Part(np.array(keys, "S"), found, np.array(where_on_earth, float).reshape(-1, 2), list(layouts.numbers))


def _within(read: Read, offset: int, size: int, whole: bool) -> Read:
    """Reads inside one member."""
    if whole:
        data = read(offset, size)
        return lambda at, count: data[at : at + count]
    return lambda at, count: read(offset + at, min(count, size - at))


class _Layouts:
    """The different metadata of arrays, numbered: almost all samples of a modality share one."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    @functools.lru_cache(maxsize=256)  # noqa: B019 - it lives for one shard
    def of(self, name: str, text: bytes) -> tuple[layout.Layout | None, tuple[str, ...]]:
        found = layout.parse_bytes(name, text)
        return found, () if found is None else tuple(member for member, _ in found.members())

    def number(self, text: bytes) -> int:
        return self.numbers.setdefault(text.decode(), len(self.numbers))


def _scan_sample(read: Read, size: int, layouts: _Layouts, places: bool) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """Start, length and layout of `bands`, and the coordinates; length 0 where a sample has to be read with `read_sample`."""
    members = zips.directory(read, size)
    at, lonlat = (0, 0, 0), (np.nan, np.nan)
    with contextlib.suppress(ValueError, DataError):  # damage is told when the sample is read
        if (text := _metadata(read, members, "bands")) is not None:
            found, names = layouts.of("bands", text)
            if found is not None and names and all(n in members for n in names):
                start, length = zips.span(members, names)
                at = (start, length, layouts.number(text)) if length else at
        if places:
            lonlat = tuple(_scalar(read, members, layouts, name) for name in ("center_lon", "center_lat"))
    return at, lonlat if np.isfinite(lonlat).all() else (np.nan, np.nan)


def _metadata(read: Read, members: Mapping[str, zips.Member], name: str) -> bytes | None:
    file = next((f for f in (f"{name}/.zarray", f"{name}/zarr.json") if f in members), None)
    return None if file is None else _bytes(zips.content(read, members[file]))


def _bytes(data: memoryview | None) -> bytes | None:
    return None if data is None else bytes(data)


def _scalar(read: Read, members: Mapping[str, zips.Member], layouts: _Layouts, name: str) -> float:
    text = _metadata(read, members, name)
    found, names = (None, ()) if text is None else layouts.of(name, text)
    if found is None or len(names) != 1 or names[0] not in members or found.dtype.kind not in "iuf":
        return np.nan
    data = zips.content(read, members[names[0]])
    try:
        return np.nan if data is None else float(found.assemble({names[0]: data}).flat[0])
    except Exception:  # codecs raise many things
        return np.nan


class _Ahead:
    """Reads one object from front to back in large pieces."""

    def __init__(self, read: Read):
        self.read, self.start, self.data = read, 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        at = offset - self.start
        if at < 0 or at + size > len(self.data):
            self.start, self.data, at = offset, self.read(offset, max(size, _PIECE)), 0
        return self.data[at : at + size]


# ---- a split ----------------------------------------------------------------------------------------------------------------

Listing = dict[str, list[Object]]


def listing(store: LocalStore | RemoteStore, root: str, split: str) -> Listing:
    """The shards in each folder that there is."""
    found = {c: store.list(storage.join(root, split, c)) for c in columns()}
    return {c: [o for o in objects if o.name.endswith(".tar")] for c, objects in found.items() if objects is not None}


def is_current(found: Table | None, shards: Listing) -> bool:
    """Whether an index describes exactly these shards."""
    if found is None or found.meta.get("version") != VERSION:
        return False
    return {c: [s[:3] for s in known] for c, known in found.meta["shards"].items()} == {c: [list(o) for o in s] for c, s in shards.items()}


def build(store: LocalStore | RemoteStore, root: str, split: str, shards: Listing, path: str, own: Mapping[str, Any]) -> Table:
    """Scans the shards that `path`, or an interrupted scan, does not know, and writes the index there, with the declarations `own`."""
    parts_folder = f"{path}.parts"
    with contextlib.suppress(OSError):
        os.makedirs(parts_folder, exist_ok=True)
    remote = isinstance(store, RemoteStore)
    with_places = _smallest(shards)
    known = _Known(table.read(path), with_places)

    def part(job: tuple[str, Object]) -> Part:
        column, shard = job
        kept = os.path.join(parts_folder, f"{column}.{shard.name}")
        found = known.part(column, shard) or Part.load(kept, (*shard, column == with_places))
        if found is None:
            found = _scan(store, storage.join(root, split, column, shard.name), shard.size, column, remote, column == with_places)
            if not found.fault:
                found.save(kept, (*shard, column == with_places))
        return found

    jobs = [(c, shard) for c, objects in shards.items() for shard in objects]
    with ThreadPoolExecutor(_THREADS[remote]) as pool:
        progress = tqdm(pool.map(part, jobs), total=len(jobs), desc=f"index {split}", unit="shard", disable=len(jobs) < 100)
        parts = dict(zip(jobs, progress, strict=True))
    meta, arrays = _join({c: [(o, parts[c, o]) for o in objects] for c, objects in shards.items()})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table.write(path, meta | {"coordinates": with_places, "modalities": dict(own)}, arrays)
    shutil.rmtree(parts_folder, ignore_errors=True)
    written = table.read(path)
    if written is None:
        raise OSError(f"{path} was damaged as soon as it was written; is the disk full?")
    return written


def _scan(store: LocalStore | RemoteStore, path: str, size: int, column: str, remote: bool, places: bool) -> Part:
    read = functools.partial(store.read, path)
    return scan_shard(path, _Ahead(read) if remote else read, size, suffix_of(column), whole=remote, places=places)


def suffix_of(column: str) -> str:
    """What a folder's samples are called after their keys."""
    return TOKEN_SUFFIX if column.endswith(_TOKENS) else SAMPLE_SUFFIX


def _smallest(shards: Listing) -> str:
    """Coordinates are the same in all modalities: they are taken from the one whose samples are the least to read."""
    sizes = {c: sum(o.size for o in objects) / len(objects) for c, objects in shards.items() if objects and not c.endswith(_TOKENS)}
    most = max((len(shards[c]) for c in sizes), default=0)
    return min((c for c in sizes if len(shards[c]) == most), key=lambda c: sizes[c], default="")


class _Known:
    """What an older index says of shards that are still the same."""

    def __init__(self, old: Table | None, with_places: str):
        usable = old is not None and old.meta.get("version") == VERSION and old.meta["coordinates"] == with_places
        self.old = old if usable else None
        self.rows = functools.lru_cache(None)(self._rows)

    def part(self, column: str, shard: Object) -> Part | None:
        """None for a shard that changed, and for one that is not whole in the index because others had its keys."""
        shards = self.old.meta["shards"].get(column, []) if self.old else []
        number = next((n for n, s in enumerate(shards) if s[:3] == list(shard)), None)
        if number is None or shard.name in self.old.meta["faults"].get(column, {}):
            return None
        rows = self.rows(column)[number]
        if len(rows) != shards[number][3]:
            return None
        arrays = self.old.arrays
        where = np.stack([arrays[f"{column}/{f}"][rows].astype(np.int64) for f in FIELDS[1:]], 1)
        places = arrays["coordinates"][rows] if self.old.meta["coordinates"] == column else np.full((len(rows), 2), np.nan)
        return Part(arrays["keys"][rows], where, places, self.old.meta["layouts"])

    def _rows(self, column: str) -> list[np.ndarray]:
        """The rows of each shard of a column, as they lie in it."""
        shard, offset, size = (self.old.arrays[f"{column}/{f}"] for f in ("shard", "offset", "size"))
        return rows_by_shard(shard, offset, size, len(self.old.meta["shards"][column]))


def rows_by_shard(shard: np.ndarray, offset: np.ndarray, size: np.ndarray, shards: int) -> list[np.ndarray]:
    """For each of so many shards the rows that lie in it, in their order there."""
    rows = np.flatnonzero(size)
    rows = rows[np.lexsort((offset[rows], shard[rows]))]
    ends = np.searchsorted(shard[rows], np.arange(shards + 1))
    return [rows[ends[s] : ends[s + 1]] for s in range(shards)]


# ---- the join ---------------------------------------------------------------------------------------------------------------


def _join(parts: Mapping[str, Sequence[tuple[Object, Part]]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of the index file: everything laid along the sorted keys of all columns, size 0 where a column lacks one."""
    layouts: dict[str, int] = {}
    merged = {c: _merge([p for _, p in found], layouts) for c, found in parts.items()}
    keys = functools.reduce(_union, (m[0] for m in merged.values()), np.zeros(0, "S1"))
    arrays: dict[str, np.ndarray] = {"keys": keys, "available": np.zeros((len(keys), len(merged)), bool)}
    arrays |= {"coordinates": np.full((len(keys), 2), np.nan), "subset": np.zeros(len(keys), np.uint8)}
    names = sorted({subset_of(o.name) for found in parts.values() for o, _ in found})
    for number, (column, (own, shard, where, places)) in enumerate(merged.items()):
        rows = slice(None) if len(own) == len(keys) else np.searchsorted(keys, own)
        smallest = np.min_scalar_type(max(len(parts[column]), 1))
        for field, values, kind in zip(FIELDS, (shard, *where.T), (smallest, np.int64, *[np.uint32] * 3, np.uint16), strict=True):
            laid = arrays[f"{column}/{field}"] = np.zeros(len(keys), kind)
            laid[rows] = values
        arrays["available"][rows, number] = True
        subsets = np.array([names.index(subset_of(o.name)) for o, _ in parts[column]], np.uint8)
        arrays["subset"][rows] = subsets[shard] if len(own) else 0
        if not np.isnan(places).all():
            arrays["coordinates"][rows] = places
    shards = {c: [[*o, len(p.keys)] for o, p in found] for c, found in parts.items()}
    meta = {
        "version": VERSION,
        "id": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),  # hosts that build it at the same time agree
        "columns": list(merged),
        "shards": shards,
        "faults": {c: {o.name: p.fault for o, p in found if p.fault} for c, found in parts.items()},
        "counts": {c: len(m[0]) for c, m in merged.items()},
        "subsets": names,
        "layouts": list(layouts),
    }
    return meta, arrays


def _merge(parts: Sequence[Part], layouts: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorted keys of one column, each with its shard, place there and coordinates; a key that is there twice counts once, the first."""
    for p in parts:
        numbers = np.array([layouts.setdefault(text, len(layouts)) for text in p.layouts] or [0])
        p.where = np.concatenate([p.where[:, :4], numbers[p.where[:, 4:]]], 1)
    if len(layouts) > np.iinfo(np.uint16).max:
        raise DataError("The samples have more than 65535 different array layouts; that is no data set of one kind.")
    keys, where, places = (np.concatenate([like, *(getattr(p, f) for p in parts)]) for f, like in _EMPTY.items())
    shard = np.repeat(np.arange(len(parts)), [len(p.keys) for p in parts])
    keys, first = np.unique(keys, return_index=True)
    return keys, shard[first], where[first], places[first]


_EMPTY = {"keys": np.zeros(0, "S1"), "where": np.zeros((0, 5), np.int64), "places": np.zeros((0, 2))}


def subset_of(shard: str) -> str:
    """``majortom_shard_000001.tar`` -> ``majortom``."""
    return shard.rpartition("_shard_")[0]


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All keys of two sorted arrays, sorted. Most modalities hold the same keys or a part of them, which costs no sort."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    if np.array_equal(a, b):
        return a
    new = b[places_in(b, a) < 0]
    return np.sort(np.concatenate([a, new]), kind="stable") if len(new) else a


def places_in(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where each of `keys` is in the sorted array `known`, -1 where it is not."""
    if not len(known):
        return np.full(len(keys), -1)
    found = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[found] == keys, found, -1)


# ---- where it lies ----------------------------------------------------------------------------------------------------------


def open_table(root: str | os.PathLike, split: str, *, rebuild: bool = False) -> tuple[str, Table]:
    """The file with the index of ``{root}/{split}`` and its content, built first if it is missing or does not agree with the shards.

    It lies beside the modalities where that folder can be written to, else in the cache. Of a remote store it is only built with
    `rebuild`, as that reads all of it, and is put there too where it can be; a FileNotFoundError says so. Modalities that the root
    declares are declared: of a remote store, those that it had when it was indexed.
    """
    store, root = storage.store(root), os.fspath(root)
    if is_remote(root) and not rebuild:
        return _open_remote(store, root, split)
    own = declare(root)
    folder = os.path.join(root, split)
    beside = not is_remote(root) and (os.access(folder, os.W_OK) or not os.path.isdir(folder))
    path = os.path.join(folder, NAME) if beside else _cached(root, split)
    shards = listing(store, root, split)
    found = table.read(path)
    if not is_current(found, shards) or found.meta.get("modalities", {}) != own:
        if not any(shards.values()):
            return path, Table(*_join({}))
        found = build(store, root, split, shards, path, own)
    if is_remote(root) and not store.put(path, storage.join(root, split, NAME)) and (stored := _stored(store, root, split)):
        partial = f"{path}.{uuid.uuid4().hex}"
        shutil.copyfile(path, partial)
        os.replace(partial, stored[1])  # the one in the store, which cannot be written to, is out of date
    return path, found


def is_there(root: str | os.PathLike, split: str, folder: str = "") -> bool:
    """Whether a split, or a folder of it, is there: on a disk, or according to an index of a remote store that may be read."""
    root = os.fspath(root)
    if not is_remote(root):
        return os.path.isdir(os.path.join(root, split, folder))
    try:
        _, found = _open_remote(storage.store(root), root, split)
    except (FileNotFoundError, PermissionError):
        return False
    return not folder or folder in found.meta["columns"]


def _open_remote(store: RemoteStore, root: str, split: str) -> tuple[str, Table]:
    """From the cache, else from the store; the name in the cache changes when the one in the store does."""
    stored = _stored(store, root, split)
    there, path = stored or ("", _cached(root, split))
    if there and not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}"
        store.get(there, partial)
        os.replace(partial, path)
    found = table.read(path)
    if found is None or found.meta.get("version") != VERSION:
        store.find(storage.join(root, split, NAME), required=True)  # it may be there, but not to be read
        raise FileNotFoundError(f"There is no index of {storage.join(root, split)}; make it once with: terramind-jax data index {root}")
    declarations.declare(found.meta.get("modalities", {}), storage.join(root, declarations.NAME))
    return path, found


def _stored(store: RemoteStore, root: str, split: str) -> tuple[str, str] | None:
    """The index in a store, and its place in the cache; None if there is none."""
    there = storage.join(root, split, NAME)
    found = store.find(there)
    return None if found is None else (there, _cached(root, f"{split}.{found.version:08x}-{found.size}"))


def _cached(root: str, name: str) -> str:
    from terramind_jax.hub import cache_folder  # not loaded where the index lies beside the shards

    where = root.rstrip("/") if is_remote(root) else os.path.abspath(root)
    return str(cache_folder() / "index" / hashlib.sha256(where.encode()).hexdigest()[:16] / f"{name}.index")
