"""The index of a split: where each sample of each modality lies in the tars, joined by key.

`scan` builds it once, as one file that every process maps into its memory; a sample's pixels are then one read of exactly their bytes.
"""

from __future__ import annotations

import collections.abc
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from terramind_jax import declarations
from terramind_jax import modalities as registry
from terramind_jax.data import clouds, layout, order, scan, storage, table, tars, zips
from terramind_jax.data.errors import DataError
from terramind_jax.data.shards import TOKEN_SOURCE, read_attributes, read_sample
from terramind_jax.data.table import Table
from terramind_jax.files import is_remote, parse_npy

if TYPE_CHECKING:
    from terramind_jax.data.records import Records
    from terramind_jax.geo import Place

_NEAR = 1 << 14  # bytes of a sample before its pixels that are read besides, to see that it is this sample
_CHECKED, _TAIL = 8, 4096  # samples of a tar, and bytes of each, that enter its fingerprint
_COMPARED = 8  # samples whose places are compared with those of their tokens
_LOOKED_AT = 256  # shards of a store at most of which one has to hold a sample where its index says


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


class _Column:
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
        return self.size if self.rows is None else np.where(self.rows < 0, 0, self.size[self.rows])


class Index:
    """The samples of one split, joined over modalities by key. Build it with `open_index`.

    `keys` are sorted, one a location. ``available[i, m]`` says whether location i has ``modalities[m]``, ``has_tokens[i, m]``
    whether token shards hold it. ``subset[i]`` indexes `subsets`, the names before ``_shard_``. Pickled it is a few names: whoever
    unpickles it maps the same files.
    """

    def __init__(
        self,
        root: str,
        split: str,
        modalities: Sequence[str],
        files: tuple[str, str],
        tokens_root: str,
        tables: tuple[Table, Table],
        records: Records | None = None,
    ):
        """`files` hold the `tables` of pixels and of tokens; of tokens that are in `records` it is their table."""
        pixels, tokens = tables
        self.modalities = tuple(modalities)
        self._opened = root, split, self.modalities, files, tokens_root, tuple(t.meta["id"] for t in tables)
        images = {m: m for m in modalities if m in pixels.meta["columns"]}
        ids = {m: f"{m}_tokens" for m in modalities if f"{m}_tokens" in tokens.meta["columns"]}
        joined = pixels if images else tokens  # without pixels the keys are those of the tokens
        rows = _wanted_rows(joined, (images or ids).values())
        token_rows = rows if files[0] == files[1] or not images else _rows_in(tokens, pixels, rows)
        self.keys = Keys(joined.arrays["keys"], rows)
        self._pixels = {m: _Column(storage.join(root, split), c, pixels, rows) for m, c in images.items()}
        self._records, self._record_rows = records, token_rows
        in_tars = {} if records else ids
        self._tokens = {m: _Column(storage.join(tokens_root, split), c, tokens, token_rows) for m, c in in_tars.items()}
        self.available = _presence(joined, [images.get(m, "") for m in modalities], rows)
        self.has_tokens = _presence(tokens, [ids.get(m, "") for m in modalities], token_rows)
        self.subsets, subset = tuple(joined.meta["subsets"]), joined.arrays["subset"]
        self.subset = subset if rows is None else subset[rows]
        self._coordinates, self._rows = joined.arrays["coordinates"], rows
        self._layouts = [layout.parse_bytes("bands", text.encode()) for text in pixels.meta["layouts"]]
        self._stores = {False: storage.store(root), True: storage.store(tokens_root)}
        self._nearby = 0, 1

    def __reduce__(self):
        return _reopen, (*self._opened, self._nearby, declarations.of(self.modalities))

    def __len__(self) -> int:
        return len(self.keys)

    def stored_bytes(self) -> int:
        """Bytes of all samples in the shards, tokens included: of those in records, all that these hold."""
        columns = (*self._pixels.values(), *self._tokens.values())
        return sum(int(column.sizes().sum(dtype=np.int64)) for column in columns) + (self._records.stored_bytes() if self._records else 0)

    @property
    def version(self) -> str:
        """Changes when the tars do, as far as their names, sizes and dates tell."""
        return hashlib.sha256("".join(self._opened[-1]).encode()).hexdigest()

    def check_tokens(self) -> None:
        """A ValueError if the tokens of a modality are those of other samples altogether, or of other pixels under the same keys."""
        stored = {m: (np.count_nonzero(column.size), column.folder) for m, column in self._tokens.items()}
        if self._records:
            stored = {
                m: (int(n), self._records.root) for m, n in zip(self._records.modalities, self._records.has_tokens.sum(0), strict=True)
            }
        for m, (count, folder) in stored.items():
            if count and not self.has_tokens[:, self.modalities.index(m)].any():
                raise ValueError(
                    f"None of the {count} tokens in {folder} has the key of a sample with pixels, such as {self.keys[0]!r}; tokenize these "
                    "shards, or point to the tokens that were made from them."
                )
        if self._records:
            self._check_places()
        for m in self._pixels.keys() & self._tokens.keys():
            self._check_source(m)

    def _check_source(self, modality: str) -> None:
        """A ValueError if a token shard tells that it was made from other pixels; one of each modality is asked, and need not tell."""
        column = self.modalities.index(modality)
        both = np.flatnonzero(self.available[:, column] & self.has_tokens[:, column])
        pixels, tokens = self._pixels[modality], self._tokens[modality]
        if not len(both) or os.path.basename(path := tokens.path(i := int(both[0]))) != os.path.basename(pixels.path(i)):
            return
        try:
            start = bytes(self._stores[True].read(path, 0, 2 * tars.BLOCK))
            told = tars.is_header_of(start[: tars.BLOCK], "".join(TOKEN_SOURCE).encode())
            same = not told or start[tars.BLOCK :].rstrip(b"\0").decode() == self.fingerprint(modality, self._beside(pixels, i))
        except (OSError, DataError):
            return  # a shard that cannot be read is found out where it is
        if not same:
            raise ValueError(
                f"{path} holds tokens of other pixels than those of {pixels.path(i)}, though under the same keys; tokenize these shards "
                "(again, if they have changed since), or point to the tokens that were made from them."
            )

    def _beside(self, column: _Column, i: int) -> np.ndarray:
        """The samples in the tar of sample `i`, in their order there."""
        rows = slice(None) if column.rows is None else column.rows
        there = np.flatnonzero((column.shard[rows] == column.shard[column.row(i)]) & (column.sizes() > 0))
        return there[np.argsort(column.offset[rows][there])]

    def _check_places(self) -> None:
        """A ValueError if records of tokens lie elsewhere on Earth than the pixels, as far as a few of both tell."""
        there = np.flatnonzero(self.has_tokens.any(1))
        for i in there[order.spread(len(there), _COMPARED)].tolist():
            own, other = self.coordinates(i), self._records.coordinates(i if self._record_rows is None else int(self._record_rows[i]))
            if own and other and not np.allclose(own, other, rtol=0, atol=1e-4):
                raise ValueError(
                    f"Sample {self.keys[i]!r} lies at {own[0]:.4f}, {own[1]:.4f}, and its tokens in {self._records.root} were made of one "
                    f"at {other[0]:.4f}, {other[1]:.4f}; tokenize these shards, or point to the tokens that were made from them."
                )

    def read_nearby(self, window: int, readers: int = 1) -> None:
        """Tells that `window` neighbours in the shards are visited together, by so many processes in turns; 0 undoes it.

        What of a remote store is then cheaper to read in blocks is read so, see `storage.block_size`.
        """
        self._nearby = window, readers
        columns, room = (*self._pixels.values(), *self._tokens.values()), storage.KEPT
        # Without a window nothing is asked of millions of sizes: every worker comes by here.
        blocks = [(storage.block_size(column.mean_size(), window, readers) if window else 0, column) for column in columns]
        for block, column in sorted(blocks, key=lambda found: found[0]):
            room -= storage.BLOCKS_IN_USE * block
            column.block = block if room >= 0 else 0

    def in_storage_order(self, samples: np.ndarray) -> np.ndarray:
        """`samples` as they lie in the shards of the first modality, those without it last."""
        column = next(iter((self._pixels or self._tokens).values()))
        rows = samples if column.rows is None else column.rows[samples]
        return samples[np.lexsort((column.offset[rows], column.shard[rows], column.size[rows] == 0))]

    def __repr__(self) -> str:
        return f"Index({len(self)} samples, {', '.join(f'{m}: {n}' for m, n in zip(self.modalities, self.available.sum(0), strict=True))})"

    # -- reading one sample

    def one_a_shard(self) -> Iterator[tuple[int, str]]:
        """A sample of each shard, and its modality, in random order: of the pixels, or, if there are none, of the tokens.

        It begins with the first sample, for which the sizes of millions are not gone through.
        """
        available = self.available if self._pixels else self.has_tokens
        yield 0, self.modalities[int(available[0].argmax())]
        found = []
        for name, column in (self._pixels or self._tokens).items():
            there = np.flatnonzero(column.sizes())
            samples = np.full(len(column.shards), -1)
            samples[column.shard[there if column.rows is None else column.rows[there]]] = there
            found += [(i, name) for i in samples[samples >= 0].tolist()]
        for k in np.random.default_rng(0).permutation(len(found)):
            yield found[k]

    def find(self, i: int, modality: str) -> None:
        """A `DataError` if the pixels of sample `i`, or its tokens if there are no pixels, are not where the index says."""
        self._read(self._pixels or self._tokens, i, modality, 0, 1)

    def read(self, i: int, modality: str, out: np.ndarray | None = None) -> np.ndarray:
        """[H, W, C] in the stored dtype: a view, bands last, the first time step. `DataError` if it cannot be read.

        Where the pixels fit into `out`, a contiguous array of their type and number, they are decoded into it, ``[C, H, W]`` in memory,
        and the result is a view of it: batches of whole tiles need no copy.
        """
        return self._tile(i, modality, self._bands(i, modality, out))

    def patches(self, i: int, modality: str, variant: int, image_size: int, positions: np.ndarray) -> None:
        """Shards hold whole images; only prepared data can hold patches by themselves (`records.Records.patches`)."""

    def describe(self, i: int, modality: str) -> tuple[np.ndarray, dict[str, Any], int]:
        """The pixels as `read` gives them, the sample's attributes, and its time in ns since 1970, 0 if it has none; all in one read."""

        def parse(payload: bytes, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            return read_sample(payload, names), read_attributes(payload)

        arrays, attributes = self._parse(parse, i, modality, ("bands", "time"))
        time = arrays.get("time")
        known = time is not None and time.size and time.dtype.kind in "iu"
        return self._tile(i, modality, arrays.get("bands")), attributes, int(time.flat[0]) if known else 0

    def _tile(self, i: int, modality: str, bands: np.ndarray | None) -> np.ndarray:
        expected = len(registry.get(modality).bands)
        if bands is None:
            raise DataError(f"{self._where(self._pixels, i, modality)} has no array 'bands'.", "missing")
        while bands.ndim > 3 and len(bands):
            bands = bands[0]
        if bands.ndim != 3 or len(bands) != expected:
            where = self._where(self._pixels, i, modality)
            raise DataError(f"{where} has 'bands' of shape {bands.shape}, expected [{expected}, y, x].", "shape")
        if bands.dtype.kind not in "biuf":
            where = self._where(self._pixels, i, modality)
            raise DataError(f"{where} has 'bands' of type {bands.dtype}, expected real numbers.", "value")
        return np.moveaxis(bands, 0, -1)

    def _bands(self, i: int, modality: str, out: np.ndarray | None = None) -> np.ndarray | None:
        """From their own bytes alone where the index knows them, else from the whole zip."""
        column = self._column(self._pixels, i, modality)
        row = column.row(i)
        found = self._layouts[column.layout[row]] if column.length[row] else None
        if found is None:
            return self.read_all(i, modality, ("bands",)).get("bands")
        piece = self._read(self._pixels, i, modality, int(column.start[row]), int(column.length[row]))
        try:
            chunks = zips.split(piece)
            if any(member not in chunks for member, _ in found.members()):
                raise ValueError("its chunks are not where they were when the shard was indexed")
            return found.assemble(chunks, out)
        except DataError as error:
            raise DataError(f"{self._where(self._pixels, i, modality)} {error}.") from error
        except Exception as error:  # codecs raise RuntimeError, zlib.error, ...
            where = self._where(self._pixels, i, modality)
            raise DataError(f"{where} has damaged 'bands' ({error}); index it again or copy it.") from error

    def stored_shape(self, i: int, modality: str) -> tuple[int, ...]:
        """Of ``bands``, as far as the index knows it without reading; else empty."""
        column = self._pixels[modality]
        found = self._layouts[column.layout[row]] if column.length[row := column.row(i)] else None
        return found.shape if found else ()

    def read_all(self, i: int, modality: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Every array of sample `i` as stored ([time, band, y, x]), or those in `names` that it has."""
        return self._parse(read_sample, i, modality, names)

    def attributes(self, i: int, modality: str, name: str = "") -> dict:
        """The attributes of one array of the sample, or of its group."""
        return self._parse(read_attributes, i, modality, name)

    def tokens(self, i: int, modality: str) -> np.ndarray:
        """Stored token ids ``[variants, h, w]`` of sample `i`, one grid a fixed crop; of K codebooks ``[..., K]``."""
        if self._records:
            row = i if self._record_rows is None else int(self._record_rows[i])
            if row < 0:
                raise DataError(f"Sample {self.keys[i]!r} has no tokens of {modality} in {self._records.root}.", "missing")
            return self._records.tokens(row, modality)
        payload = self._payload(self._tokens, i, modality)
        try:
            ids = parse_npy(payload)
        except Exception as error:  # a damaged header raises SyntaxError, TypeError, MemoryError, ...
            raise DataError(f"{self._where(self._tokens, i, modality)} is no readable .npy file ({error}).") from error
        if ids.dtype.kind not in "iu":
            raise DataError(f"{self._where(self._tokens, i, modality)} holds {ids.dtype} instead of integer token ids.", "value")
        return ids

    def shards(self, modality: str) -> dict[str, np.ndarray]:
        """Name of each tar of `modality` -> the samples in it, in their order there."""
        column = self._pixels[modality]
        fields = (column.shard, column.offset, column.sizes())
        if column.rows is not None:
            fields = column.shard[column.rows], column.offset[column.rows], column.sizes()
        return dict(zip(column.shards, scan.rows_by_shard(*fields, len(column.shards)), strict=True))

    def fingerprint(self, modality: str, samples: np.ndarray) -> str:
        """Changes when these samples' arrays do; copying the tar or touching it does not change it.

        It covers keys, offsets and sizes, and of a few samples the end, where a zip keeps the checksums of all it holds.
        """
        column = self._pixels[modality]
        rows = samples if column.rows is None else column.rows[samples]
        digest = hashlib.sha256(b"\n".join(self.keys.raw(samples).tolist()))
        digest.update(column.offset[rows].astype(np.int64).tobytes() + column.size[rows].astype(np.int64).tobytes())
        for i in samples[order.spread(len(samples), _CHECKED)]:
            size = int(column.size[column.row(int(i))])
            length = min(size, _TAIL)
            digest.update(self._read(self._pixels, int(i), modality, size - length, length))
        return digest.hexdigest()

    def coordinates(self, i: int) -> tuple[float, float] | None:
        """(longitude, latitude) of the centre in degrees, from the index or whichever modality is smallest; None if none has it."""
        known = self._coordinates[i if self._rows is None else self._rows[i]]
        if not np.isnan(known[0]):
            return float(known[0]), float(known[1])
        for _, found in self._smallest_first(i, ("center_lon", "center_lat")):
            if len(found) == 2 and all(v.size and v.dtype.kind in "iuf" and np.isfinite(v.flat[0]) for v in found.values()):
                return float(found["center_lon"].flat[0]), float(found["center_lat"].flat[0])
        return None

    def cloud_mask(self, i: int) -> np.ndarray | None:
        """``[H, W]`` uint8, the codes of `clouds`, from the first Sentinel-2 modality that carries one; None if none does."""
        for name in filter(clouds.has_mask, self.modalities):
            if not self.available[i, self.modalities.index(name)]:
                continue
            mask = self.read_all(i, name, (clouds.NAME,)).get(clouds.NAME)
            if mask is None:
                continue
            if mask.ndim < 2 or not mask.size or mask.dtype.kind not in "iub":
                where = self._where(self._pixels, i, name)
                raise DataError(f"{where} has a {clouds.NAME} of {mask.dtype} {mask.shape}, expected integers [y, x].", "shape")
            return mask.reshape(-1, *mask.shape[-2:])[0].astype(np.uint8)
        return None

    def place(self, i: int) -> Place | None:
        """Where sample `i` lies on Earth (CRS, transform, size), if its shards say so."""
        from terramind_jax import geo  # GDAL takes long to load, and data workers never ask

        for modality, grid in self._smallest_first(i, ("bands", "x", "y")):
            size = grid["bands"].shape[-2:] if "bands" in grid else (0, 0)
            place = geo.place_from_attributes(self.attributes(i, modality, "spatial_ref"), size, grid.get("x"), grid.get("y"))
            if place is not None:
                return place
        return None

    def _smallest_first(self, i: int, names: Sequence[str]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Arrays of one modality after the other. What all have can be had of any: a damaged one only matters if all are."""
        faults, modalities = [], self._by_size(i)
        for modality in modalities:
            try:
                found = self.read_all(i, modality, names)
            except DataError as error:
                faults.append(error)
                continue
            yield modality, found
        if modalities and len(faults) == len(modalities):
            raise faults[0]

    def _by_size(self, i: int) -> list[str]:
        sizes = {m: int(c.size[c.row(i)]) for m, c in self._pixels.items()}
        return sorted((m for m, size in sizes.items() if size), key=sizes.get)

    def _parse(self, parse, i: int, modality: str, argument):
        payload = self._payload(self._pixels, i, modality)
        try:
            return parse(payload, argument)
        except DataError as error:
            raise DataError(f"{self._where(self._pixels, i, modality)} {error}.") from error

    def _column(self, columns: dict[str, _Column], i: int, modality: str) -> _Column:
        column = columns.get(modality)
        if column is None or (row := column.row(i)) < 0 or not column.size[row]:
            what = "tokens of " if columns is self._tokens else ""
            raise DataError(f"Sample {self.keys[i]!r} has no {what}{modality}; check Index.available before reading.", "missing")
        return column

    def _payload(self, columns: dict[str, _Column], i: int, modality: str) -> memoryview:
        """The whole sample as it lies in its tar."""
        column = self._column(columns, i, modality)
        return self._read(columns, i, modality, 0, int(column.size[column.row(i)]))

    def _read(self, columns: dict[str, _Column], i: int, modality: str, start: int, size: int) -> memoryview:
        """`size` bytes of a sample from its byte `start`; a `DataError` if another sample lies there by now."""
        column = columns[modality]
        before = start + tars.BLOCK if start <= _NEAR else 0  # of the sample's header in the tar, which comes along where it is near
        try:
            at = int(column.offset[column.row(i)]) + start - before
            payload = memoryview(self._stores[columns is self._tokens].read(column.path(i), at, before + size, column.block))
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreachable"
            raise DataError(f"{self._where(columns, i, modality)} cannot be read ({error.strerror or error}).", reason) from error
        if len(payload) != before + size:
            there = max(len(payload) - before, 0)
            raise DataError(f"{self._where(columns, i, modality)} ends early: {there} of {size} bytes; index it again.")
        name = self.keys.raw(i) + column.suffix.encode()
        if before and not tars.is_header_of(payload[: tars.BLOCK], name):
            raise DataError(f"{self._where(columns, i, modality)} is not where it was when the shard was indexed; index it again.")
        return payload[before:]

    def _where(self, columns: dict[str, _Column], i: int, modality: str) -> str:
        return f"{columns[modality].path(i)}: sample {self.keys[i]!r}"


def _wanted_rows(found: Table, columns: Collection[str]) -> np.ndarray | None:
    """The rows that have any of `columns`; None if these are all of them, which takes no memory."""
    n = len(found.arrays["keys"])
    if any(found.meta["counts"][c] == n for c in columns) and n:
        return None
    there = _presence(found, list(columns), None).any(1)
    return None if there.all() and n else np.flatnonzero(there)


def _presence(found: Table, names: Sequence[str], rows: np.ndarray | None) -> np.ndarray:
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


def _rows_in(tokens: Table, pixels: Table, rows: np.ndarray | None) -> np.ndarray | None:
    """The rows of another file's keys that the kept rows of `pixels` have there, -1 where they have none."""
    keys, known = pixels.arrays["keys"], tokens.arrays["keys"]
    keys = keys if rows is None else keys[rows]
    return None if np.array_equal(keys, known) else scan.places_in(keys, known)


def has_split(root: str | os.PathLike, split: str, modality: str) -> bool:
    """Whether there is a folder of the modality, or prepared data."""
    from terramind_jax.data import records

    return scan.is_there(root, split, modality) or records.is_prepared(root, split)


def open_index(
    root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None, *, tokens_root: str | os.PathLike | None = None
) -> Index:
    """The index of ``{root}/{split}``, joined over `modalities` (default: those that have a folder); built first if need be.

    `root` is a folder, or the URL of one in a store that fsspec knows, whose index has to be there (``data index``).
    Tokens are looked for in ``{modality}_tokens`` under `tokens_root`, by default beside the pixels, or in records there (`tokenize` writes
    both). A modality without a folder, or a key that only some shards hold, is False in ``available``; other folders are ignored. Raises
    FileNotFoundError where no sample or no index is found, PermissionError where a store lets none be read, ValueError for an unknown
    modality or the index of other shards, and `DataError` for a truncated or damaged tar.
    Of a folder that ``data prepare`` wrote it is a `records.Records`, which can be read in the same way.
    """
    from terramind_jax.data import records  # which is made of this module's keys

    if records.is_prepared(root, split):
        return records.open_records(root, split, modalities, tokens_root=tokens_root)
    root, tokens_root = os.fspath(root), os.fspath(tokens_root or root)
    path, pixels = scan.open_table(root, split)
    known = [m.name for m in registry.MODALITIES.values() if m.is_image]
    wanted = known if modalities is None else [m for m in modalities if registry.get(m).is_image]
    found = records.open_records(tokens_root, split, wanted) if tokens_root != root and records.is_prepared(tokens_root, split) else None
    if found:
        tokens_path, tokens = found.path, found.token_table()
    else:
        tokens_path, tokens = (path, pixels) if tokens_root == root else scan.open_table(tokens_root, split)
    _refuse_faults(pixels, wanted)
    _refuse_faults(tokens, [f"{m}_tokens" for m in wanted])
    there = {m: (m in pixels.meta["columns"], f"{m}_tokens" in tokens.meta["columns"]) for m in wanted}
    if not any(pixels.meta["counts"].get(m) or (not found and tokens.meta["counts"].get(f"{m}_tokens")) for m in wanted):
        folder, names = storage.join(root, split), ", ".join(dict.fromkeys(wanted))
        raise FileNotFoundError(
            f"No samples in {folder}; expected tars like "
            f"{storage.join(folder, 'MODALITY', 'NAME_shard_000001.tar')} of KEY.zarr.zip, where MODALITY is one of {names}."
        )
    kept = [m for m in wanted if any(there[m]) or modalities is not None]
    index = Index(root, split, kept, (path, tokens_path), tokens_root, (pixels, tokens), found)
    _check_declared(index)
    if is_remote(root):
        _check_is_of_store(index, root, split)
    return index


def _check_is_of_store(index: Index, root: str, split: str) -> None:
    """A ValueError if none of the samples that are looked at, one a shard in random order, is where the index says.

    A store is not listed to see that its shards are those of the index. The first sample that is found is enough, so this takes one request
    where all is there, and that some shards, or all of a modality, are missing is only seen when they are read. A PermissionError if one
    may not be read and none is found.
    """
    refused = None
    for i, modality in itertools.islice(index.one_a_shard(), _LOOKED_AT):
        try:
            index.find(i, modality)
            return
        except DataError as error:
            if isinstance(error.__cause__, PermissionError):
                refused = error.__cause__
            elif error.reason == "unreachable":
                return  # nothing is known of the shards
    if refused:
        raise refused
    raise ValueError(
        f"The index of {storage.join(root, split)} is that of other shards, or these have changed since: none of the samples that were "
        f"looked at, one a shard, is where it says; make it anew with: terramind-jax data index {root}"
    )


def _check_declared(index: Index) -> None:
    """A ValueError if the first sample of a user's own modality has other bands than declared: all of them would be bad."""
    for name in declarations.of(index.modalities):
        there = np.flatnonzero(index.available[:, index.modalities.index(name)])
        stored, bands = index.stored_shape(int(there[0]), name) if len(there) else (), len(registry.get(name).bands)
        if len(stored) > 2 and stored[-3] != bands:
            raise ValueError(f"{name} is declared with {bands} bands, but its first sample in the shards has {stored[-3]}; correct one.")


def _refuse_faults(found: Table, columns: Sequence[str]) -> None:
    for column in columns:
        for sentence in found.meta["faults"].get(column, {}).values():
            raise DataError(sentence)


def _reopen(
    root: str,
    split: str,
    modalities: Sequence[str],
    files: tuple[str, str],
    tokens_root: str,
    ids: tuple[str, str],
    nearby: tuple[int, int],
    own: Mapping[str, Mapping[str, Any]],
) -> Index:
    """What unpickling does: maps the files that the index was made of, and no others, and declares the user's own modalities."""
    declarations.declare(own, root)
    from terramind_jax.data import records

    found = records.Records(tokens_root, split, modalities) if os.path.basename(files[1]) == records.NAME else None
    pixels, tokens = (table.read(path) or Table({}, {}) for path in files)
    tables = pixels, found.token_table() if found else tokens
    if tuple(t.meta.get("id") for t in tables) != ids:
        raise DataError(f"The index of {storage.join(root, split)} was built anew while it was in use; open it again.")
    index = Index(root, split, modalities, files, tokens_root, tables, found)
    index.read_nearby(*nearby)
    return index
