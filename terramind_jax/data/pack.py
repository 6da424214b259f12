"""Turns a folder of GeoTIFFs into shards: ``MODALITY/NAME.tif`` in, ``{split}/{modality}/packed_shard_000001.tar`` out.

Pixel values are never shifted, scaled or filled: the +1000 offset of Sentinel-2 differs from product to product, so no rule can
tell what to subtract. What cannot be stored as published is an error that says why.
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
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from terramind_jax import declarations, geo
from terramind_jax import modalities as registry
from terramind_jax.data import scan
from terramind_jax.data.shards import ShardWriter, new_folder, write_sample

INFO = "dataset_info.json"
TILE_SIZE = 264  # TerraMesh's
MIN_SIZE = registry.IMAGE_SIZE

# From a product's codes to the classes of spec 1.6: 0 no data, 1 water, 2 trees, 3 flooded vegetation, 4 crops, 5 built area,
# 6 bare ground, 7 snow/ice, 8 clouds, 9 rangeland.
LULC_CODES: dict[str, dict[int, int]] = {
    "terramesh": {i: i for i in range(len(registry.LULC_CLASSES))},
    "esri": {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9},
    "dynamicworld": {0: 1, 1: 2, 2: 9, 3: 3, 4: 4, 5: 9, 6: 5, 7: 6, 8: 7},  # grass and shrub are both rangeland
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One NAME: its file in each modality, all on one grid."""

    name: str
    files: dict[str, str]
    place: geo.Place

    @property
    def side(self) -> int:
        return min(TILE_SIZE, self.place.height, self.place.width)

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """(key, row, column) of each tile; the last of a row or column is shifted inward, so no pixel is lost."""
        rows, columns = _starts(self.place.height, self.side), _starts(self.place.width, self.side)
        base = self.name.replace(".", "_")
        for r in rows:
            for c in columns:
                yield base if len(rows) == len(columns) == 1 else f"{base}_r{r:05d}_c{c:05d}", r, c


def _starts(length: int, side: int) -> list[int]:
    return [min(i * side, length - side) for i in range(-(-length // side))]


def pack(
    src: str,
    out: str,
    *,
    lulc_codes: str | None = None,
    val_fraction: float = 0.1,
    subset: str = "packed",
    seed: int = 0,
    shard_size: int = 1024,
) -> dict[str, Any]:
    """Packs ``src/MODALITY/NAME.tif`` into shards under `out`, which must not exist yet, and returns what it wrote.

    Files of one NAME share a grid within 0.1 pixel; any of the modalities may be missing. Each is cut into square tiles of at
    most 264 pixels. Splits are by location: tiles of one file, and files that cover one place, stay together; at least one
    location is held out unless `val_fraction` is 0. `lulc_codes` declares the codes of LULC files: ``terramesh``, ``esri`` or
    ``dynamicworld``. `out` appears whole or not at all. Raises ValueError or FileNotFoundError, one sentence naming the file.
    """
    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not empty; give --out a new folder, or delete it first.")
    scenes = find_scenes(src)
    _check_codes(scenes, lulc_codes)
    split_of = _assign_splits(scenes, val_fraction, seed)
    counts = {}
    with new_folder(out) as partial:
        for split in ("train", "val"):
            tiles = [(s, *t) for s in scenes if split_of[s.name] == split for t in s.tiles()]
            counts[split] = _write_split(partial, split, subset, tiles, lulc_codes, shard_size)
        options = dict(subset=subset, lulc_codes=lulc_codes, val_fraction=val_fraction, seed=seed)
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
        for modality, path in sorted(scene.files.items()):
            status = os.stat(path)
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
    scan.declare(src)
    _check_folders(src)
    files: dict[str, dict[str, str]] = {}
    for modality in (m.name for m in registry.MODALITIES.values() if m.is_image):
        folder = os.path.join(src, modality)
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            stem, suffix = os.path.splitext(entry)
            if suffix.lower() not in (".tif", ".tiff") or stem.startswith("."):
                continue
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


def _check_folders(src: str) -> None:
    """Other folders are none of ours, but "s2_l2a" is a modality misspelt, and leaving it out silently would lose data."""
    for entry in sorted(os.listdir(src)) if os.path.isdir(src) else []:
        meant = re.sub(r"[^A-Z0-9]", "", entry.upper())
        if entry not in registry.MODALITIES and meant in registry.MODALITIES and os.path.isdir(os.path.join(src, entry)):
            raise ValueError(f"Folder {os.path.join(src, entry)} is no modality; rename it to {meant} if it holds that.")


def _scene(name: str, files: dict[str, str]) -> Scene:
    headers = {m: geo.read_header(path, m) for m, path in files.items()}
    (first, place), *others = [(files[m], h.place) for m, h in headers.items()]
    for path, other in others:
        if not geo.same_grid(place, other):
            raise ValueError(
                f"{first} ({_grid(place)}) and {path} ({_grid(other)}) are not on one grid; "
                "resample them to the same CRS, corner and size, within 0.1 pixel."
            )
    if min(place.height, place.width) < MIN_SIZE:
        raise ValueError(f"{first} is {place.height}x{place.width} pixels; at least {MIN_SIZE}x{MIN_SIZE} are needed.")
    return Scene(name, files, place)


def _grid(place: geo.Place) -> str:
    x, y = place.xy(0, 0)
    return f"{place.height}x{place.width} at {x:.2f}, {y:.2f}, {place.crs[:20] or 'no CRS'}"


def _check_codes(scenes: Sequence[Scene], lulc_codes: str | None) -> None:
    if lulc_codes is not None and lulc_codes not in LULC_CODES:
        raise ValueError(f"Unknown LULC codes {lulc_codes!r}; expected one of {', '.join(LULC_CODES)}.")
    path = next((s.files["LULC"] for s in scenes if "LULC" in s.files), None)
    if path is not None and lulc_codes is None:
        raise ValueError(f"{path} is a land-cover map and its codes are not declared; say which they are: {', '.join(LULC_CODES)}.")


# ---- splits -----------------------------------------------------------------------------------------------------------------


def _assign_splits(scenes: Sequence[Scene], val_fraction: float, seed: int) -> dict[str, str]:
    """Scene name -> split. Locations are ordered by a hash of (seed, name), so adding a file moves few others."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and below 1.")
    locations = _locations(scenes)
    if val_fraction and len(locations) < 2:
        raise ValueError(
            f"{next(iter(scenes[0].files.values()))} and the files beside it cover one location, and two are needed to hold one "
            "out; add files from elsewhere, or set val_fraction to 0."
        )
    locations.sort(key=lambda names: hashlib.sha256(f"{seed}/{names[0]}".encode()).digest())
    held_out = min(max(1, round(val_fraction * len(locations))), len(locations) - 1) if val_fraction else 0
    return {name: "val" if i < held_out else "train" for i, names in enumerate(locations) for name in names}


def _locations(scenes: Sequence[Scene]) -> list[list[str]]:
    """Names grouped by place: scenes whose middles overlap are one location. Neighbours that only touch are two."""
    boxes = [_middle(s.place) for s in scenes]
    order = sorted((i for i in range(len(scenes)) if boxes[i] is not None), key=lambda i: boxes[i][0])
    leader = list(range(len(scenes)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if boxes[j][0] >= boxes[i][1]:
                break
            if boxes[i][2] < boxes[j][3] and boxes[j][2] < boxes[i][3]:
                leader[find(j)] = find(i)
    groups: dict[int, list[str]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault(find(i), []).append(scene.name)
    return list(groups.values())


def _middle(place: geo.Place) -> tuple[float, float, float, float] | None:
    """(west, east, south, north) in degrees of the middle 60 % of a scene; None where the CRS is unknown."""
    if not place.crs:
        return None
    corners = [geo.lonlat(place, r * place.height, c * place.width) for r in (0.2, 0.8) for c in (0.2, 0.8)]
    longitude, latitude = zip(*corners, strict=True)
    return min(longitude), max(longitude), min(latitude), max(latitude)


# ---- writing ----------------------------------------------------------------------------------------------------------------


def _write_split(
    root: str, split: str, subset: str, tiles: Sequence[tuple[Scene, str, int, int]], lulc_codes: str | None, shard_size: int
) -> dict[str, int]:
    """Writes the shards of a split; a location has the same shard number in every modality. Returns tiles a modality."""
    counts: dict[str, int] = {}
    for number, start in enumerate(range(0, len(tiles), shard_size), 1):
        part = tiles[start : start + shard_size]
        for modality in sorted({m for scene, *_ in part for m in scene.files}):
            with ShardWriter(root, split, modality, subset, number) as shard:
                for scene, key, row, column in part:
                    if modality in scene.files:
                        shard.add(key, _sample(scene, modality, row, column, lulc_codes))
                        counts[modality] = counts.get(modality, 0) + 1
    return {"locations": len(tiles), **counts}


def _sample(scene: Scene, modality: str, row: int, column: int, lulc_codes: str | None) -> bytes:
    path, side = scene.files[modality], scene.side
    header = geo.read_header(path, modality)
    pixels = to_stored(geo.read_window(path, row, column, side, side), modality, path, nodata=header.nodata, lulc_codes=lulc_codes)
    where = scene.place.window(row, column, side, side)
    longitude, latitude = geo.lonlat(where)
    arrays = {
        "bands": np.moveaxis(pixels, -1, 0)[None],
        "center_lon": np.float64(longitude),
        "center_lat": np.float64(latitude),
        "time": np.array([_nanoseconds(header.tags)], np.int64),
        "spatial_ref": np.int64(0),
    }
    array_attrs = {
        "bands": {"grid_mapping": "spatial_ref"},
        "spatial_ref": geo.place_to_attributes(where),
        "time": {"units": "nanoseconds since 1970-01-01", "calendar": "proleptic_gregorian"},
    }
    return write_sample(arrays, attrs={"source": f"{modality}/{os.path.basename(path)}"}, array_attrs=array_attrs)


def _nanoseconds(tags: dict[str, str]) -> int:
    """Acquisition time in nanoseconds since 1970 from the tags that products use, 0 where there is none."""
    for text in (tags.get("datetime"), tags.get("TIFFTAG_DATETIME")):
        for form in ("%Y-%m-%dT%H:%M:%S", "%Y:%m:%d %H:%M:%S"):
            with contextlib.suppress(ValueError, TypeError):
                moment = datetime.datetime.strptime((text or "")[:19], form).replace(tzinfo=datetime.UTC)
                return int(moment.timestamp()) * 10**9
    return 0


# ---- values -----------------------------------------------------------------------------------------------------------------


def to_stored(pixels: np.ndarray, modality: str, path: str, *, nodata: float | None = None, lulc_codes: str | None = None) -> np.ndarray:
    """[H, W, C] of a file -> the dtype that shards store, with every value kept (float16 and whole metres of elevation round).

    Raises a ValueError that names `path` for NaN or nodata pixels, values that the dtype or the modality cannot hold, reflectance
    as fractions, linear SAR power, and undeclared LULC codes.
    """
    if modality == "LULC":
        return _recode(pixels, path, lulc_codes or "terramesh")
    missing = int(np.count_nonzero(~np.isfinite(pixels))) if pixels.dtype.kind == "f" else 0
    if missing:
        raise ValueError(f"{path} has {missing} NaN or infinite pixel values; fill them or cut the file to where it is complete.")
    if nodata is not None and np.any(pixels == nodata):
        count = int(np.count_nonzero(pixels == nodata))
        raise ValueError(f"{path} has {count} pixel values without data ({nodata:g}); fill them or cut the file to where it is complete.")
    low, high = registry.get(modality).valid
    if pixels.min() < low or pixels.max() > high:
        raise ValueError(
            f"{path} holds values from {pixels.min():g} to {pixels.max():g}; {modality} is stored as {_expectation(modality)}."
        )
    if modality in ("S1GRD", "S1RTC") and pixels.min() >= 0:
        raise ValueError(f"{path} has no negative value, so it looks like linear power; {modality} is stored as {_expectation(modality)}.")
    dtype = np.dtype(registry.get(modality).dtype)
    if dtype.kind in "iu" and pixels.dtype.kind == "f":
        rounded = np.rint(pixels)
        if modality != "DEM" and np.any(rounded != pixels):
            raise ValueError(f"{path} holds fractions (up to {pixels.max():g}); {modality} is stored as {_expectation(modality)}.")
        pixels = rounded
    return pixels.astype(dtype)


def _expectation(modality: str) -> str:
    low, high = registry.get(modality).valid
    return f"{registry.get(modality).unit}, {registry.get(modality).dtype} from {low} to {high}"


def _recode(pixels: np.ndarray, path: str, codes: str) -> np.ndarray:
    table = LULC_CODES[codes]
    found = np.unique(pixels)
    strange = [v for v in found.tolist() if v not in table]
    if strange:
        raise ValueError(f"{path} holds the value {strange[0]:g}, which is not among the declared {codes} codes {sorted(table)}.")
    lookup = np.zeros(max(table) + 1, np.uint8)
    lookup[list(table)] = list(table.values())
    return lookup[pixels.astype(np.intp)]
