"""Turns a folder of GeoTIFFs into shards: ``MODALITY/NAME.tif`` in, ``{split}/{modality}/packed_shard_000001.tar`` out.

All files of one NAME come to one grid, north up and of 10 m pixels, and are cut into tiles of at most 264 pixels; a tile with a pixel
that has no data is left out. What already lies on such a grid keeps every value. The +1000 offset of Sentinel-2 differs from product to
product, so no rule can tell what to subtract: it is declared. What cannot be stored as published is an error that says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import declarations, geo
from terramind_jax import modalities as registry
from terramind_jax.data import scan, splits
from terramind_jax.data.shards import ShardWriter, new_folder, write_sample
from terramind_jax.data.stored import LULC_CODES, File, converted, decibels, incomplete, known, look, to_stored

INFO = "dataset_info.json"
TILE_SIZE = 264  # TerraMesh's
MIN_SIZE = registry.IMAGE_SIZE


@dataclasses.dataclass(frozen=True)
class Scene:
    """One NAME: its file in each modality, and the grid that all of them come to."""

    name: str
    files: dict[str, File]
    place: geo.Place

    @property
    def side(self) -> int:
        return min(TILE_SIZE, self.place.height, self.place.width)

    @property
    def is_one_tile(self) -> bool:
        return self.side == self.place.height == self.place.width

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """(key, row, column) of each tile; the last of a row or column is shifted inward, so no pixel is lost."""
        rows, columns = _starts(self.place.height, self.side), _starts(self.place.width, self.side)
        base = self.name.replace(".", "_")
        for r in rows:
            for c in columns:
                yield base if len(rows) == len(columns) == 1 else f"{base}_r{r:05d}_c{c:05d}", r, c

    def window(self, row: int, column: int) -> geo.Place:
        return self.place.window(row, column, self.side, self.side)


def _starts(length: int, side: int) -> list[int]:
    return [min(i * side, length - side) for i in range(-(-length // side))]


def pack(
    src: str,
    out: str,
    *,
    lulc_codes: str | None = None,
    offsets: Mapping[str, float] | None = None,
    val_fraction: float = 0.1,
    subset: str = "packed",
    seed: int = 0,
    shard_size: int = 1024,
) -> dict[str, Any]:
    """Packs ``src/MODALITY/NAME.tif`` into shards under `out`, which must not exist yet, and returns what it wrote.

    Any of the modalities may be missing from a NAME, or cover a part of it. The grid of a NAME is that of its first file, in the order of
    the registry, that is north up and of 10 m pixels; if there is none, one in the UTM zone of its first file. Other files are brought to
    it: class maps from the nearest pixel, radar bilinearly in linear power, everything else bilinearly.

    Splits are by place (`splits.assign`): files of one place stay together, and tiles next to held-out ones are left out.

    Args:
      lulc_codes: the codes of LULC files: ``terramesh``, ``esri`` or ``dynamicworld``.
      offsets: what is added to the values of a modality, or of one file, ``{"S2L2A": -1000, "S2L2A/NAME": 0}``; data stays at least at the
        lowest valid value.
      val_fraction: share of the places that is held out, at least one unless it is 0.

    Warns of files that look like linear radar power, which become decibels, of Sentinel-2 that looks like reflectance of 0-1, which is
    multiplied by 10,000, and of values that are far from what the modality's mean and spread are. `out` appears whole or not at all. Raises
    ValueError or FileNotFoundError, one sentence naming the file.
    """
    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not empty; give another folder, or delete it first.")
    scenes = find_scenes(src)
    _check_codes(scenes, lulc_codes)
    scenes = _looked_at(_with_offsets(scenes, offsets or {}))
    tiles = [list(scene.tiles()) for scene in scenes]
    places = [[scene.window(*at) for _, *at in own] for scene, own in zip(scenes, tiles, strict=True)]
    split_of = splits.assign([s.name for s in scenes], [s.place for s in scenes], places, val_fraction, seed)
    flat = [
        (scene, *tile, split) for scene, own, of in zip(scenes, tiles, split_of, strict=True) for tile, split in zip(own, of, strict=True)
    ]
    counts, report = {}, _Report()
    with new_folder(out) as partial:
        for split in ("train", "val"):
            own = [tile for *tile, of in flat if of == split]
            counts[split] = _write_split(partial, split, subset, own, lulc_codes, shard_size, report)
        dropped = {"next_to_val": sum(of == splits.DROPPED for *_, of in flat), "without_data": report.without_data}
        for lost in sorted(report.reasons.keys() - report.written):
            raise ValueError(report.reasons[lost])
        options = dict(subset=subset, lulc_codes=lulc_codes, val_fraction=val_fraction, seed=seed)
        options |= {"offsets": dict(offsets)} if offsets else {}
        options |= {"left_out": {k: n for k, n in dropped.items() if n}} if any(dropped.values()) else {}
        info = {**_describe(scenes, counts, options), "fingerprint": fingerprint(scenes)}
        with open(os.path.join(partial, INFO), "w", encoding="utf-8") as f:
            json.dump(info, f, indent=1)
        if os.path.isfile(own := os.path.join(src, declarations.NAME)):
            shutil.copyfile(own, os.path.join(partial, declarations.NAME))
    return info


def fingerprint(scenes: Sequence[Scene]) -> str:
    """Changes when a file is added, removed or written again; the folder may move."""
    digest = hashlib.sha256()
    for scene in scenes:
        for modality, file in sorted(scene.files.items(), key=lambda item: item[0]):
            status = os.stat(file.path)
            digest.update(f"{modality}/{scene.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_packed(src: str, out: str | os.PathLike, lulc_codes: str | None = None) -> bool:
    """Whether `out` holds the files of `src` as they are now; False if it is free, a ValueError if it holds anything else."""
    path = os.path.join(out, INFO)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as f:
        info = json.load(f)
    if (info.get("fingerprint"), info.get("lulc_codes")) != (fingerprint(find_scenes(src)), lulc_codes):
        what = f"{os.fspath(out)} was made from other files than those in {src} now, or with other LULC codes"
        raise ValueError(f"{what}; choose another --out, or delete it.")
    return True


def _describe(scenes: Sequence[Scene], counts: dict[str, dict[str, int]], options: dict[str, Any]) -> dict[str, Any]:
    present = {m for s in scenes for m in s.files}
    modalities = {
        m.name: {"bands": list(m.bands), "dtype": m.dtype, "unit": m.unit} for m in registry.MODALITIES.values() if m.name in present
    }
    return {"format": "terramesh-zarr2-tar", "files": len(scenes), "splits": counts, "modalities": modalities, **options}


# ---- what there is ----------------------------------------------------------------------------------------------------------


def find_scenes(src: str) -> list[Scene]:
    """The scenes of a folder, sorted by name, with sizes, bands and grids checked from the headers alone.

    Modalities of the user's own that ``modalities.json`` in the folder declares are declared.
    """
    if not os.path.isdir(src):
        raise FileNotFoundError(f"There is no folder {src}.")
    scan.declare(src)
    _check_folders(src)
    files: dict[str, dict[str, str]] = {}
    for modality in (m.name for m in registry.MODALITIES.values() if m.is_image):
        folder = os.path.join(src, modality)
        for entry in _geotiffs(folder):
            stem = os.path.splitext(entry)[0]
            if modality in files.setdefault(stem, {}):
                raise ValueError(f"{folder} holds {stem!r} twice, as .tif and .tiff; keep one.")
            files[stem][modality] = os.path.join(folder, entry)
    if not files:
        known = ", ".join(m.name for m in registry.MODALITIES.values() if m.is_image)
        raise FileNotFoundError(f"No GeoTIFFs in {src}; expected MODALITY/NAME.tif with a MODALITY among {known}.")
    scenes = [_scene(name, files[name]) for name in sorted(files)]
    keys = [s.name.replace(".", "_") for s in scenes]
    if len(set(keys)) != len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"Two files in {src} would both be called {twice!r}; rename one (a dot in a name counts as an underscore).")
    return scenes


def _geotiffs(folder: str) -> list[str]:
    """The names of a folder's GeoTIFFs, sorted; none if it is no folder. Hidden files are not meant."""
    entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [entry for entry in entries if entry.lower().endswith((".tif", ".tiff")) and not entry.startswith(".")]


def _check_folders(src: str) -> None:
    """Other folders are none of ours, but "s2_l2a" is a modality misspelt, and leaving it out silently would lose data."""
    others = [entry for entry in sorted(os.listdir(src)) if entry not in registry.MODALITIES] if os.path.isdir(src) else []
    for entry in others:
        meant = re.sub(r"[^A-Z0-9]", "", entry.upper())
        if meant in registry.MODALITIES and os.path.isdir(os.path.join(src, entry)):
            raise ValueError(f"Folder {os.path.join(src, entry)} is no modality; rename it to {meant} if it holds that.")
    if left_out := [entry for entry in others if _geotiffs(os.path.join(src, entry))]:
        known = ", ".join(m.name for m in registry.MODALITIES.values() if m.is_image)
        warnings.warn(f"{', '.join(left_out)} in {src} hold GeoTIFFs and are left out; folders are named after {known}.", stacklevel=4)


def _scene(name: str, files: dict[str, str]) -> Scene:
    headers = {m: File(path, geo.read_header(path, m)) for m, path in files.items()}
    return Scene(name, headers, _grid([(f.path, f.header.place) for f in headers.values()]))


def _grid(files: Sequence[tuple[str, geo.Place]]) -> geo.Place:
    """The grid that all files of a NAME come to; a ValueError if they have none, or lie apart."""
    path, place = next(((p, where) for p, where in files if geo.is_metric(where)), files[0])
    if not place.crs and all(geo.same_grid(place, other) for _, other in files):
        grid = place  # nobody knows where: as it is
    elif not geo.is_metric(place):
        try:
            outer, inner = geo.metric_grids(place)
        except ValueError as error:
            raise ValueError(f"{path} {error}.") from None
        # Around a small scene nothing but corners without data would be won; of a large one, tiles.
        grid = inner if inner and min(outer.height, outer.width) < 3 * TILE_SIZE else outer
    else:
        grid = place
    for other, where in files:
        if not geo.same_grid(where, grid) and not geo.overlap(where, grid):
            raise ValueError(f"{path} and {other} share a name but do not overlap; files of one place have one name.")
    if min(grid.height, grid.width) < MIN_SIZE:
        what = "" if grid is place else " once on a grid of 10 m"
        raise ValueError(f"{path} is {grid.height}x{grid.width} pixels{what}; at least {MIN_SIZE}x{MIN_SIZE} are needed.")
    return grid


def _with_offsets(scenes: Sequence[Scene], offsets: Mapping[str, float]) -> list[Scene]:
    known = {key for s in scenes for m in s.files for key in (m, f"{m}/{s.name}")}
    if unknown := [key for key in offsets if key not in known]:
        raise ValueError(f"An offset is given for {unknown[0]}, which is no modality or MODALITY/NAME among the files.")
    made = []
    for s in scenes:
        own = {m: offsets.get(f"{m}/{s.name}", offsets.get(m, 0.0)) for m in s.files}
        made.append(dataclasses.replace(s, files={m: dataclasses.replace(f, offset=own[m]) for m, f in s.files.items()}))
    return made


def _check_codes(scenes: Sequence[Scene], lulc_codes: str | None) -> None:
    if lulc_codes is not None and lulc_codes not in LULC_CODES:
        raise ValueError(f"Unknown LULC codes {lulc_codes!r}; expected one of {', '.join(LULC_CODES)}.")
    path = next((s.files["LULC"].path for s in scenes if "LULC" in s.files), None)
    if path is not None and lulc_codes is None:
        raise ValueError(f"{path} is a land-cover map and its codes are not declared; say which they are: {', '.join(LULC_CODES)}.")


# ---- what the values look like ----------------------------------------------------------------------------------------------


def _looked_at(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes with what their values must be converted from; a warning a modality and kind of doubt, which names the first file."""
    doubts: dict[tuple[str, str], list[str]] = {}
    made = []
    for scene in scenes:
        files = {}
        for modality, file in scene.files.items():
            files[modality], doubt = look(modality, file)
            if doubt:
                doubts.setdefault((modality, doubt), []).append(file.path)
        made.append(dataclasses.replace(scene, files=files))
    for (_, doubt), paths in doubts.items():
        others = f" (and {len(paths) - 1} other files)" if len(paths) > 1 else ""
        warnings.warn(f"{paths[0]}{others} {doubt}", stacklevel=3)
    return made


# ---- writing ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Report:
    """By name and modality: of which files tiles were written, and why first one was not; how many were left out for want of data."""

    written: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    reasons: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    without_data: int = 0


Tile = tuple[Scene, str, int, int]


def _write_split(
    root: str, split: str, subset: str, tiles: Sequence[Tile], lulc_codes: str | None, shard_size: int, report: _Report
) -> dict[str, int]:
    """Writes the shards of a split; a location has the same shard number in every modality. Returns tiles a modality."""
    counts: dict[str, int] = {}
    keys: set[str] = set()
    for number, start in enumerate(range(0, len(tiles), shard_size), 1):
        part = tiles[start : start + shard_size]
        for modality in sorted({m for scene, *_ in part for m in scene.files}):
            with ShardWriter(root, split, modality, subset, number) as shard:
                for scene, key, row, column in part:
                    if modality not in scene.files:
                        continue
                    sample = _sample(scene, modality, row, column, lulc_codes)
                    if isinstance(sample, str) and scene.is_one_tile:
                        raise ValueError(sample)
                    if isinstance(sample, str):
                        report.without_data += 1
                        report.reasons.setdefault((scene.name, modality), sample)
                        continue
                    shard.add(key, sample)
                    keys.add(key)
                    report.written.add((scene.name, modality))
                    counts[modality] = counts.get(modality, 0) + 1
    return {"locations": len(keys), **counts}


def _sample(scene: Scene, modality: str, row: int, column: int, lulc_codes: str | None) -> bytes | str:
    """The bytes of a sample, or why it has no data."""
    file, where = scene.files[modality], scene.window(row, column)
    pixels = _pixels(scene, modality, row, column)
    # What changes values makes NaN of those without data first: an offset may bring others to the same number.
    if reason := incomplete(pixels, modality, file.path, None if file.is_changed else file.header.nodata):
        return reason
    if not file.is_changed and (count := int(registry.missing(modality, pixels).sum())):
        return (
            f"{file.path} has {count} pixels of {registry.get(modality).nodata:g} in all bands, which is no data; cut it to where it has."
        )
    pixels = to_stored(pixels, modality, file.path, lulc_codes=lulc_codes)
    longitude, latitude = geo.lonlat(where)
    arrays = {
        "bands": np.moveaxis(pixels, -1, 0)[None],
        "center_lon": np.float64(longitude),
        "center_lat": np.float64(latitude),
        "time": np.array([_nanoseconds(file.header.tags)], np.int64),
        "spatial_ref": np.int64(0),
    }
    array_attrs = {
        "bands": {"grid_mapping": "spatial_ref"},
        "spatial_ref": geo.place_to_attributes(where),
        "time": {"units": "nanoseconds since 1970-01-01", "calendar": "proleptic_gregorian"},
    }
    attrs = {"source": f"{modality}/{os.path.basename(file.path)}"} | ({"offset": file.offset} if file.offset else {})
    return write_sample(arrays, attrs=attrs, array_attrs=array_attrs)


def _nanoseconds(tags: dict[str, str]) -> int:
    """Acquisition time in nanoseconds since 1970 from the tags that products use, 0 where there is none."""
    for text in (tags.get("datetime"), tags.get("TIFFTAG_DATETIME")):
        for form in ("%Y-%m-%dT%H:%M:%S", "%Y:%m:%d %H:%M:%S"):
            with contextlib.suppress(ValueError, TypeError):
                moment = datetime.datetime.strptime((text or "")[:19], form).replace(tzinfo=datetime.UTC)
                return int(moment.timestamp()) * 10**9
    return 0


# ---- values -----------------------------------------------------------------------------------------------------------------


def _pixels(scene: Scene, modality: str, row: int, column: int) -> np.ndarray:
    """One tile ``[side, side, C]`` in the modality's unit: as in the file where its grid is the scene's, else float32, NaN without data."""
    m, file, where = registry.get(modality), scene.files[modality], scene.window(row, column)
    if geo.same_grid(file.header.place, scene.place):
        pixels = geo.read_window(file.path, row, column, scene.side, scene.side)
        return converted(m, file, known(modality, file, pixels)) if file.is_changed else pixels
    in_power = m.kind == "sar"  # the mean of decibels is no mean

    def prepare(raw: np.ndarray) -> np.ndarray:
        values = converted(m, file, known(modality, file, raw))
        return np.power(10, values / 10, dtype=np.float32) if in_power else values

    pixels = geo.read_onto(file.path, where, m.kind, prepare)
    if in_power:
        return decibels(pixels)
    return np.rint(pixels) if np.dtype(m.dtype).kind in "iu" else pixels
