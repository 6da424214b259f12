"""The index of a split: where each sample of each modality lies in the tars, joined by key.

Tar headers are scanned once and the result is kept beside the shards (``{split}/{modality}.index.npz``). A sample is then one
``os.pread``. Everything is NumPy arrays, so an index of nine million samples fits in memory and travels to data workers.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import hashlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from terramind_jax import modalities as registry
from terramind_jax.data.shards import SAMPLE_SUFFIX, TOKEN_SUFFIX, DataError, read_attributes, read_sample

if TYPE_CHECKING:
    from terramind_jax.geo import Place

_BLOCK = 512
_CHECKED, _TAIL = 8, 4096  # samples of a tar, and bytes of each, that enter its fingerprint
_OPEN_FILES = 256  # TerraMesh has about 7,000 shards; more than a process may hold open


# ---- scanning tars ----------------------------------------------------------------------------------------------------------


def scan_tar(path: str | os.PathLike) -> Iterator[tuple[str, int, int]]:
    """(member name, offset, size) of every regular file in a tar, in order, from its headers alone.

    Understands ustar, GNU long names and pax headers. Raises `DataError` for a tar that is truncated or damaged.
    """
    with open(path, "rb", buffering=0) as f:
        end, offset, override = os.fstat(f.fileno()).st_size, 0, {}
        while True:
            header = os.pread(f.fileno(), _BLOCK, offset)
            if len(header) < _BLOCK:
                raise DataError(f"{path} is truncated: it ends at byte {end} without the end mark of a tar; delete it or copy it again.")
            if not any(header):
                return
            name, size, kind = _parse_header(header, path, offset)
            size = _size(override["size"], path) if "size" in override and kind not in b"xgLK" else size
            start = offset + _BLOCK
            if start + size > end:
                raise DataError(
                    f"{path} is truncated: member {override.get('path', name)!r} needs {start + size} bytes and the file has {end}; "
                    "delete it or copy it again."
                )
            if kind in b"xL":
                override |= _extended(os.pread(f.fileno(), size, start), kind)
            elif kind not in b"gK":
                if kind in b"0\0":
                    yield override.get("path", name), start, size
                override = {}
            offset = start + -(-size // _BLOCK) * _BLOCK


def _parse_header(header: bytes, path: str | os.PathLike, offset: int) -> tuple[str, int, bytes]:
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        stored, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        stored, size = -1, 0
    if stored != checksum or size < 0:
        raise DataError(f"{path} is damaged: there is no tar header at byte {offset}; delete it or copy it again.")
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" * bool(prefix) + name).decode("utf-8", "surrogateescape"), size, header[156:157]


def _number(field: bytes) -> int:
    """Octal text, or GNU's base 256 for sizes beyond 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _size(text: str, path: str | os.PathLike) -> int:
    """A size that a pax header gives."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DataError(f"{path} is damaged: it gives a member the size {text[:20]!r}; delete it or copy it again.")
    return int(text)


def _extended(data: bytes, kind: bytes) -> dict[str, str]:
    """What a GNU long name or a pax header says of the next member."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 19 or int(length) <= len(length):
            return records  # what follows is no record; a wrong name or size shows at the next header
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records


# ---- one folder of shards ---------------------------------------------------------------------------------------------------


def _scan_folder(folder: str, suffix: str, cache: str) -> dict[str, np.ndarray]:
    """``{"shards", "keys", "shard", "offset", "size"}`` of a folder, keys sorted; from `cache` if no shard has changed since."""
    shards = sorted(e.name for e in os.scandir(folder) if e.name.endswith(".tar") and e.is_file())
    status = [os.stat(os.path.join(folder, s)) for s in shards]
    stamp = np.array([(s.st_size, s.st_mtime_ns) for s in status], np.int64).reshape(-1, 2)
    names = np.array([s.encode() for s in shards], "S")
    table = _load_cache(cache)
    if table is not None and np.array_equal(table["stamp"], stamp) and np.array_equal(table["shards"], names):
        return table
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda s: _scan_shard(os.path.join(folder, s), suffix), shards))
    table = {"stamp": stamp, "shards": names, **_merge(parts)}
    _save_cache(cache, table)
    return table


def _scan_shard(path: str, suffix: str) -> tuple[list[bytes], np.ndarray]:
    found = [(os.path.basename(n), o, s) for n, o, s in scan_tar(path) if n.endswith(suffix)]
    keys = [n[: -len(suffix)].encode("utf-8", "surrogateescape") for n, _, _ in found]
    return keys, np.array([(o, s) for _, o, s in found], np.int64).reshape(-1, 2)


def _merge(parts: list[tuple[list[bytes], np.ndarray]]) -> dict[str, np.ndarray]:
    keys = np.array([k for ks, _ in parts for k in ks], "S")
    where = np.concatenate([w for _, w in parts]) if parts else np.zeros((0, 2), np.int64)
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(ks) for ks, _ in parts])
    keys, first = np.unique(keys, return_index=True)  # a key that is there twice counts once, the first
    return {"keys": keys, "shard": shard[first], "offset": where[first, 0], "size": where[first, 1]}


_FIELDS = {"stamp", "shards", "keys", "shard", "offset", "size"}


def _load_cache(path: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in _FIELDS}
    except Exception:  # whatever the damage leads to
        return None


def _save_cache(path: str, table: dict[str, np.ndarray]) -> None:
    """Written under a temporary name and renamed, so that processes may race; a folder that cannot be written is no error."""
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as f:
            np.savez(f, **table)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


# ---- the join ---------------------------------------------------------------------------------------------------------------


class Keys(collections.abc.Sequence):
    """A sequence of str over an array of bytes: nine million keys without nine million objects."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [k.decode() for k in self.raw[i].tolist()]
        return bytes(self.raw[i]).decode()

    def __eq__(self, other) -> bool:
        return list(self) == list(other)

    __hash__ = None

    def find(self, key: str) -> int:
        """The position of `key`; a KeyError if there is none."""
        i = int(np.searchsorted(self.raw, key.encode()))
        if i == len(self.raw) or self[i] != key:
            raise KeyError(f"There is no sample {key!r} among {len(self)}.")
        return i


class _Descriptor:
    """An open file that closes itself when the last user lets go, so evicting one never cuts off a read in another thread."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number") and os is not None:  # modules are already gone at interpreter exit
            os.close(self.number)


class _Column:
    """One folder's samples laid along the joined keys; size 0 where the key is missing."""

    def __init__(self, folder: str, table: dict[str, np.ndarray], keys: np.ndarray):
        self.folder, self.shards = folder, [s.decode() for s in table["shards"].tolist()]
        fields = table["shard"], table["offset"], table["size"]
        if len(table["keys"]) < len(keys):
            rows = np.searchsorted(keys, table["keys"])
            fields = tuple(_scatter(f, rows, len(keys)) for f in fields)
        self.shard, self.offset, self.size = fields

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.shards[self.shard[i]])


def _scatter(values: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros(length, values.dtype)
    out[rows] = values
    return out


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All keys of two sorted arrays, sorted. Most modalities hold the same keys or a part of them, which costs no sort."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    if np.array_equal(a, b):
        return a
    new = b[~_among(b, a)]
    return np.sort(np.concatenate([a, new]), kind="stable") if len(new) else a


def _among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which `keys` are in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


class Index:
    """The samples of one split, joined over modalities by key. Build it with `open_index`; it is picklable.

    `keys` are sorted, one a location. ``available[i, m]`` says whether location i has ``modalities[m]``, ``has_tokens[i, m]``
    whether token shards hold it.
    """

    def __init__(self, modalities: Sequence[str], pixels: dict[str, tuple], tokens: dict[str, tuple]):
        self.modalities = tuple(modalities)
        tables = [t["keys"] for _, t in pixels.values()] or [t["keys"] for _, t in tokens.values()]
        raw = functools.reduce(_union, tables) if tables else np.zeros(0, "S1")
        self.keys = Keys(raw)
        self._pixels = {m: _Column(folder, table, raw) for m, (folder, table) in pixels.items()}
        self._tokens = {m: _Column(folder, _only(table, raw), raw) for m, (folder, table) in tokens.items()}
        self.available = self._presence(self._pixels)
        self.has_tokens = self._presence(self._tokens)
        self._open = functools.lru_cache(_OPEN_FILES)(_Descriptor)

    def _presence(self, columns: dict[str, _Column]) -> np.ndarray:
        there = [columns[m].size > 0 if m in columns else np.zeros(len(self), bool) for m in self.modalities]
        return np.stack(there, 1) if there else np.zeros((len(self), 0), bool)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(_OPEN_FILES)(_Descriptor)

    def __len__(self) -> int:
        return len(self.keys)

    def stored_bytes(self) -> int:
        """Bytes of all samples in the shards, tokens included."""
        return sum(int(column.size.sum()) for columns in (self._pixels, self._tokens) for column in columns.values())

    def __repr__(self) -> str:
        return f"Index({len(self)} samples, {', '.join(f'{m}: {n}' for m, n in zip(self.modalities, self.available.sum(0), strict=True))})"

    # -- reading one sample

    def read(self, i: int, modality: str) -> np.ndarray:
        """[H, W, C] in the stored dtype: a read-only view, bands last, the first time step. `DataError` if it cannot be read."""
        bands = self.read_all(i, modality, ("bands",)).get("bands")
        expected = len(registry.get(modality).bands)
        if bands is None:
            raise DataError(f"{self._where(self._pixels, i, modality)} has no array 'bands'.")
        while bands.ndim > 3 and len(bands):
            bands = bands[0]
        if bands.ndim != 3 or len(bands) != expected:
            raise DataError(f"{self._where(self._pixels, i, modality)} has 'bands' of shape {bands.shape}, expected [{expected}, y, x].")
        if bands.dtype.kind not in "biuf":
            raise DataError(f"{self._where(self._pixels, i, modality)} has 'bands' of type {bands.dtype}, expected real numbers.")
        return np.moveaxis(bands, 0, -1)

    def read_all(self, i: int, modality: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Every array of sample `i` as stored ([time, band, y, x]), or those in `names` that it has."""
        return self._parse(read_sample, i, modality, names)

    def attributes(self, i: int, modality: str, name: str = "") -> dict:
        """The attributes of one array of the sample, or of its group."""
        return self._parse(read_attributes, i, modality, name)

    def tokens(self, i: int, modality: str) -> np.ndarray:
        """Stored token ids ``[variants, h, w]`` of sample `i`, one grid a fixed crop."""
        payload = self._payload(self._tokens, i, modality)
        try:
            ids = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
        except Exception as error:  # a damaged header raises SyntaxError, TypeError, MemoryError, ...
            raise DataError(f"{self._where(self._tokens, i, modality)} is no readable .npy file ({error}).") from error
        if ids.dtype.kind not in "iu":
            raise DataError(f"{self._where(self._tokens, i, modality)} holds {ids.dtype} instead of integer token ids.")
        return ids

    def shards(self, modality: str) -> dict[str, np.ndarray]:
        """Name of each tar of `modality` -> the samples in it, in their order there."""
        column = self._pixels[modality]
        rows = np.flatnonzero(column.size)
        rows = rows[np.lexsort((column.offset[rows], column.shard[rows]))]
        ends = np.searchsorted(column.shard[rows], np.arange(len(column.shards) + 1))
        return {name: rows[ends[s] : ends[s + 1]] for s, name in enumerate(column.shards)}

    def fingerprint(self, modality: str, samples: np.ndarray) -> str:
        """Changes when these samples' arrays do; copying the tar or touching it does not change it.

        It covers keys, offsets and sizes, and of a few samples the end, where a zip keeps the checksums of all it holds.
        """
        column = self._pixels[modality]
        digest = hashlib.sha256(b"\n".join(self.keys.raw[samples].tolist()))
        digest.update(column.offset[samples].tobytes() + column.size[samples].tobytes())
        checked = np.unique(np.linspace(0, len(samples) - 1, _CHECKED).astype(int)) if len(samples) else []
        for i in samples[checked]:
            start, size = int(column.offset[i]), int(column.size[i])
            length = min(size, _TAIL)
            digest.update(os.pread(self._open(column.path(i)).number, length, start + size - length))
        return digest.hexdigest()

    def coordinates(self, i: int) -> tuple[float, float] | None:
        """(longitude, latitude) of the centre in degrees, from whichever modality is smallest to read; None if none has it."""
        for modality in self._by_size(i):
            found = self.read_all(i, modality, ("center_lon", "center_lat"))
            if len(found) == 2 and all(v.size and v.dtype.kind in "iuf" and np.isfinite(v.flat[0]) for v in found.values()):
                return float(found["center_lon"].flat[0]), float(found["center_lat"].flat[0])
        return None

    def place(self, i: int) -> Place | None:
        """Where sample `i` lies on Earth (CRS, transform, size), if its shards say so."""
        from terramind_jax import geo  # GDAL takes long to load, and data workers never ask

        for modality in self._by_size(i):
            grid = self.read_all(i, modality, ("bands", "x", "y"))
            size = grid["bands"].shape[-2:] if "bands" in grid else (0, 0)
            place = geo.place_from_attributes(self.attributes(i, modality, "spatial_ref"), size, grid.get("x"), grid.get("y"))
            if place is not None:
                return place
        return None

    def _by_size(self, i: int) -> list[str]:
        return sorted((m for m, c in self._pixels.items() if c.size[i]), key=lambda m: int(self._pixels[m].size[i]))

    def _parse(self, parse, i: int, modality: str, argument):
        payload = self._payload(self._pixels, i, modality)
        try:
            return parse(payload, argument)
        except DataError as error:
            raise DataError(f"{self._where(self._pixels, i, modality)} {error}.") from error

    def _payload(self, columns: dict[str, _Column], i: int, modality: str) -> bytes:
        column = columns.get(modality)
        if column is None or not column.size[i]:
            what = "tokens of " if columns is self._tokens else ""
            raise DataError(f"Sample {self.keys[i]!r} has no {what}{modality}; check Index.available before reading.")
        size, offset = int(column.size[i]), int(column.offset[i])
        try:
            opened = self._open(column.path(i))  # held until the read is over: another thread may evict it meanwhile
            payload = os.pread(opened.number, size, offset)
        except OSError as error:
            raise DataError(f"{self._where(columns, i, modality)} cannot be read ({error.strerror}).") from error
        if len(payload) != size:
            raise DataError(f"{self._where(columns, i, modality)} ends early: {len(payload)} of {size} bytes; index it again.")
        return payload

    def _where(self, columns: dict[str, _Column], i: int, modality: str) -> str:
        return f"{columns[modality].path(i)}: sample {self.keys[i]!r}"


def _only(table: dict[str, np.ndarray], keys: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `table` whose key is among `keys`: tokens of samples that left the shards are ignored."""
    kept = _among(table["keys"], keys)
    return {k: v[kept] if k in ("keys", "shard", "offset", "size") else v for k, v in table.items()}


def open_index(
    root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None, *, tokens_root: str | os.PathLike | None = None
) -> Index:
    """The index of ``{root}/{split}``, joined over `modalities` (default: those that have a folder).

    Tokens are looked for in ``{modality}_tokens`` under `tokens_root`, by default beside the pixels. A modality without a
    folder, or a key that only some shards hold, is False in ``available``; other folders are ignored. Raises FileNotFoundError
    where no sample is found, ValueError for an unknown modality and `DataError` for a truncated or damaged tar.
    """
    known = [m.name for m in registry.MODALITIES.values() if m.is_image]
    wanted = known if modalities is None else [m for m in modalities if registry.get(m).is_image]
    pixels = _folders(os.path.join(root, split), {m: m for m in wanted}, SAMPLE_SUFFIX)
    tokens = _folders(os.path.join(tokens_root or root, split), {m: f"{m}_tokens" for m in wanted}, TOKEN_SUFFIX)
    if not any(len(t["keys"]) for _, t in [*pixels.values(), *tokens.values()]):
        raise FileNotFoundError(
            f"No samples in {os.path.join(root, split)}; expected tars like {{root}}/{{split}}/{{modality}}/NAME_shard_000001.tar of "
            f"KEY.zarr.zip, with a modality among {', '.join(wanted)}."
        )
    return Index([m for m in wanted if m in pixels or m in tokens or modalities is not None], pixels, tokens)


def _folders(parent: str, names: dict[str, str], suffix: str) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    found = {m: os.path.join(parent, name) for m, name in names.items() if os.path.isdir(os.path.join(parent, name))}
    return {m: (folder, _scan_folder(folder, suffix, f"{folder}.index.npz")) for m, folder in found.items()}
