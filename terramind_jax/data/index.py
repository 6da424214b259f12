"""The index of a split: where each sample of each modality lies in the tars, joined by key.

`scan` builds it once, as one file that every process maps into its memory; a sample's pixels are then one read of exactly their bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from terramind_jax import declarations
from terramind_jax import modalities as registry
from terramind_jax.data import clouds, layout, order, records, scan, storage, table, zips
from terramind_jax.data.columns import Columns, Keys, presence, rows_in, wanted_rows
from terramind_jax.data.errors import DataError
from terramind_jax.data.joined_tokens import TokensInRecords, TokensInTars
from terramind_jax.data.records import Records
from terramind_jax.data.shards import read_attributes, read_sample
from terramind_jax.data.table import Table
from terramind_jax.files import is_remote

if TYPE_CHECKING:
    from terramind_jax.geo import Place

_CHECKED, _TAIL = 8, 4096  # samples of a tar, and bytes of each, that enter its fingerprint
_LOOKED_AT = 256  # shards of a store at most of which one has to hold a sample where its index says


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
        token_records: Records | None = None,
    ):
        """`files` hold the `tables` of pixels and of tokens; of tokens that are in `token_records` it is their table."""
        pixels, tokens = tables
        self.modalities = tuple(modalities)
        self._opened = root, split, self.modalities, files, tokens_root, tuple(t.meta["id"] for t in tables)
        images = {m: m for m in modalities if m in pixels.meta["columns"]}
        ids = {m: f"{m}_tokens" for m in modalities if f"{m}_tokens" in tokens.meta["columns"]}
        joined = pixels if images else tokens  # without pixels the keys are those of the tokens
        rows = wanted_rows(joined, (images or ids).values())
        token_rows = rows if files[0] == files[1] or not images else rows_in(tokens, pixels, rows)
        self.keys = Keys(joined.arrays["keys"], rows)
        self._pixels = Columns(root, split, images, pixels, rows, self.keys)
        if token_records:
            self._tokens = TokensInRecords(token_records, token_rows, self.keys)
        else:
            self._tokens = TokensInTars(Columns(tokens_root, split, ids, tokens, token_rows, self.keys, "tokens of "))
        self._columns = self._pixels or self._tokens.columns  # those that the order of samples and the first look go by
        self.available = presence(joined, [images.get(m, "") for m in modalities], rows)
        self.has_tokens = presence(tokens, [ids.get(m, "") for m in modalities], token_rows)
        self.subsets, subset = tuple(joined.meta["subsets"]), joined.arrays["subset"]
        self.subset = subset if rows is None else subset[rows]
        self._coordinates, self._rows = joined.arrays["coordinates"], rows
        self._layouts = [layout.parse_bytes("bands", text.encode()) for text in pixels.meta["layouts"]]
        self._nearby = 0, 1

    def __reduce__(self):
        return _reopen, (*self._opened, self._nearby, declarations.of(self.modalities))

    def __len__(self) -> int:
        return len(self.keys)

    def stored_bytes(self) -> int:
        """Bytes of all samples in the shards, tokens included: of those in records, all that these hold."""
        return self._pixels.stored_bytes() + self._tokens.stored_bytes()

    @property
    def version(self) -> str:
        """Changes when the tars do, as far as their names, sizes and dates tell."""
        return hashlib.sha256("".join(self._opened[-1]).encode()).hexdigest()

    def check_tokens(self) -> None:
        """A ValueError if the tokens of a modality are those of other samples, pixels or places, as far as a few tell."""
        self._tokens.check(self, self._pixels)

    def read_nearby(self, window: int, readers: int = 1) -> None:
        """Tells that `window` neighbours in the shards are visited together, by so many processes in turns; 0 undoes it.

        What of a remote store is then cheaper to read in blocks is read so, see `storage.block_size`.
        """
        self._nearby = window, readers
        columns, room = (*self._pixels.values(), *self._tokens.columns.values()), storage.KEPT
        # Without a window nothing is asked of millions of sizes: every worker comes by here.
        blocks = [(storage.block_size(column.mean_size(), window, readers) if window else 0, column) for column in columns]
        for block, column in sorted(blocks, key=lambda found: found[0]):
            room -= storage.BLOCKS_IN_USE * block
            column.block = block if room >= 0 else 0

    def in_storage_order(self, samples: np.ndarray) -> np.ndarray:
        """`samples` as they lie in the shards of the first modality, those without it last."""
        column = next(iter(self._columns.values()))
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
        for name, column in self._columns.items():
            there = np.flatnonzero(column.sizes())
            samples = np.full(len(column.shards), -1)
            samples[column.shard[there if column.rows is None else column.rows[there]]] = there
            found += [(i, name) for i in samples[samples >= 0].tolist()]
        for k in np.random.default_rng(0).permutation(len(found)):
            yield found[k]

    def find(self, i: int, modality: str) -> None:
        """A `DataError` if the pixels of sample `i`, or its tokens if there are no pixels, are not where the index says."""
        self._columns.read(i, modality, 0, 1)

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
            raise DataError(f"{self._pixels.where(i, modality)} has no array 'bands'.", "missing")
        while bands.ndim > 3 and len(bands):
            bands = bands[0]
        if bands.ndim != 3 or len(bands) != expected:
            where = self._pixels.where(i, modality)
            raise DataError(f"{where} has 'bands' of shape {bands.shape}, expected [{expected}, y, x].", "shape")
        if bands.dtype.kind not in "biuf":
            where = self._pixels.where(i, modality)
            raise DataError(f"{where} has 'bands' of type {bands.dtype}, expected real numbers.", "value")
        return np.moveaxis(bands, 0, -1)

    def _bands(self, i: int, modality: str, out: np.ndarray | None = None) -> np.ndarray | None:
        """From their own bytes alone where the index knows them, else from the whole zip."""
        column = self._pixels.of(i, modality)
        row = column.row(i)
        found = self._layouts[column.layout[row]] if column.length[row] else None
        if found is None:
            return self.read_all(i, modality, ("bands",)).get("bands")
        piece = self._pixels.read(i, modality, int(column.start[row]), int(column.length[row]))
        try:
            chunks = zips.split(piece)
            if any(member not in chunks for member, _ in found.members()):
                raise ValueError("its chunks are not where they were when the shard was indexed")
            return found.assemble(chunks, out)
        except DataError as error:
            raise DataError(f"{self._pixels.where(i, modality)} {error}.") from error
        except Exception as error:  # codecs raise RuntimeError, zlib.error, ...
            where = self._pixels.where(i, modality)
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
        return self._tokens.read(i, modality)

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
            digest.update(self._pixels.read(int(i), modality, size - length, length))
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
                where = self._pixels.where(i, name)
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
        payload = self._pixels.whole(i, modality)
        try:
            return parse(payload, argument)
        except DataError as error:
            raise DataError(f"{self._pixels.where(i, modality)} {error}.") from error


def has_split(root: str | os.PathLike, split: str, modality: str) -> bool:
    """Whether there is a folder of the modality, or prepared data."""
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
    found = Records(tokens_root, split, modalities) if os.path.basename(files[1]) == records.NAME else None
    pixels, tokens = (table.read(path) or Table({}, {}) for path in files)
    tables = pixels, found.token_table() if found else tokens
    if tuple(t.meta.get("id") for t in tables) != ids:
        raise DataError(f"The index of {storage.join(root, split)} was built anew while it was in use; open it again.")
    index = Index(root, split, modalities, files, tokens_root, tables, found)
    index.read_nearby(*nearby)
    return index
