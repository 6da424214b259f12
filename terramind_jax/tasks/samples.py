"""``data sample``: tiny copies of the published downstream data sets, made of the embedded world, to try fine-tuning without data.

Files, names, dtypes and missing values are those of the originals, of CropTypeMapping, DynamicEarthNet, SpaceNet-7, AI4SmallFarms and
Five-Billion-Pixels what PANGAEA's readers expect; so are sizes, unless told otherwise. What the embedded world has not, burn scars,
parcels' seasons, marine debris, is painted onto it: enough to be learned from, and nothing to draw conclusions from.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rasterio

from terramind_jax import geo
from terramind_jax.data import shards, world
from terramind_jax.modalities import S2L1C_BANDS, S2L2A_BANDS
from terramind_jax.tasks.datasets import (
    ai4smallfarms,
    burnscars,
    croptypemapping,
    dynamicearthnet,
    eurosat,
    fivebillionpixels,
    mados,
    multitemporal_crop,
    pastis,
    sen1floods11,
    spacenet7,
)

WATER, CROPS, CLOUDS = 1, 4, 8  # LULC codes
# Of a season on the bands of PASTIS-R, and on six of HLS.
EFFECT_OF_TEN, EFFECT_OF_SIX = (0, 0, -0.3, -0.1, 0.1, 0.3, 0.4, 0.4, 0, -0.1), (0, 0, -0.3, 0.4, 0, -0.1)


def sample(name: str, out: str | os.PathLike, *, count: int = 4, size: int | None = None, seed: int = 0) -> None:
    """Writes a copy of the data set `name` to `out`: `count` training samples and half as many, one at least, of each other split.

    Of EuroSAT they are images of every class, of SpaceNet-7 mosaics of 16 tiles. `size` is the images' side in pixels, by default the
    original's; MADOS needs a multiple of 12. `out` appears only when it is complete.
    Raises ValueError for unknown names and sizes, FileExistsError if `out` holds something.
    """
    if name not in WRITERS:
        raise ValueError(f"There are no samples of {name!r}; known are {', '.join(WRITERS)}.")
    write, published = WRITERS[name]
    size = published if size is None else size
    if count < 1 or seed < 0 or size < 12 or size % 12 and name == "mados":
        raise ValueError(
            f"Cannot make {count} samples of {size} pixels under seed {seed}; count is at least 1, size 12, of MADOS times 12."
        )
    with shards.new_folder(os.fspath(out)) as partial:
        write(partial, {"train": count, "val": max(1, count // 2), "test": max(1, count // 2)}, size, seed)


def scenes(seed: int, size: int, sar: bool = False) -> Iterator[world.Scene]:
    """Scenes at least `size` pixels wide, without end; with `sar` those that have Sentinel-1 GRD."""
    index = 1
    while True:
        yield world.scene(seed, index, "train", max(48, -(-size // 6) * 6))
        index += 2 if sar else 1


# ---- Sen1Floods11 ----


def _sen1floods11(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Water as the world has it; clouds are not labelled, and a corner of the radar has no data."""
    source = (s for s in scenes(seed, size, sar=True) if 0.02 < (s.arrays["LULC"][:size, :size] == WATER).mean() < 0.9)
    number = 0
    for split, count in counts.items():
        rows = []
        for scene in (next(source) for _ in range(count)):
            number += 1
            name = f"Synthia_{100_000 + number}"
            cover = scene.arrays["LULC"][:size, :size, 0]
            label = np.where((cover == 0) | (cover == CLOUDS), -1, cover == WATER).astype(np.int16)
            radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
            radar[:2, :2] = np.nan
            where, base = _degrees(scene, size), os.path.join(root, "v1.1", sen1floods11.PUBLISHED)
            names = [f"B{b}" for b in (1, 2, 3, 4, 5, 6, 7, 8, "8A", 9, 10, 11, 12)]
            optical = scene.arrays["S2L1C"][:size, :size].astype(np.int16)
            geo.write(os.path.join(base, "S2Hand", f"{name}_S2Hand.tif"), optical, where, bands=names, nodata=0)
            geo.write(os.path.join(base, "S1Hand", f"{name}_S1Hand.tif"), radar, where, bands=("VV", "VH"), nodata=np.nan)
            geo.write(os.path.join(base, "LabelHand", f"{name}_LabelHand.tif"), label, where)
            rows.append(f"{name}_S1Hand.tif,{name}_LabelHand.tif")
        folder = os.path.join(root, "v1.1", "splits", "flood_handlabeled")
        _write_lines(os.path.join(folder, f"flood_{sen1floods11.SPLITS[split]}_data.csv"), rows)


def _degrees(scene: world.Scene, size: int) -> geo.Place:
    """A grid of 10 m, at the equator, in degrees."""
    step = 8.983152841195215e-05
    return geo.Place("EPSG:4326", (step, 0.0, scene.lon, 0.0, -step, scene.lat), size, size)


def _metres(scene: world.Scene, size: int, pixel: float = 10.0) -> geo.Place:
    return geo.Place(geo.utm(scene.lon, scene.lat), (pixel, 0.0, 500_000.0, 0.0, -pixel, 100_000.0), size, size)


# ---- HLS Burn Scars ----


def _burnscars(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """A round scar in each scene: dark, above all in the near infrared, and bright in SWIR 2. A strip has no data."""
    source = scenes(seed, size)
    total = {"training": max(10, counts["train"] + counts["val"]), "validation": counts["test"]}  # PANGAEA validates on a tenth
    for folder, count in total.items():
        for number in range(count):
            scene = next(source)
            rng = np.random.default_rng((seed, number, folder == "validation"))
            burned = _disc(rng, size)
            change = np.where(burned[..., None], np.float32([0.7, 0.65, 0.7, 0.35, 0.9, 1.6]), 1)
            image = _optical(scene, size, burnscars.BANDS) / 10_000 * change
            image[:, :2] = burnscars.MISSING[1]
            label = burned.astype(np.int16)
            label[:, :2] = -1
            name = f"subsetted_512x512_HLS.S30.T{10 + number:02d}SYN.{2018 + (folder == 'validation')}{1 + number:03d}.v1.4"
            where = _metres(scene, size, 30.0)
            geo.write(os.path.join(root, folder, f"{name}_merged.tif"), image.astype(np.float32), where)
            geo.write(os.path.join(root, folder, f"{name}.mask.tif"), label, where)


def _optical(scene: world.Scene, size: int, bands: tuple[str, ...]) -> np.ndarray:
    """Reflectance x 10000 of L2A, without the offset of stored values, ``[size, size, C]`` float32."""
    array = scene.arrays["S2L2A"][:size, :size].astype(np.float32) - scene.offsets.get("S2L2A", 0)
    return np.maximum(array[..., [S2L2A_BANDS.index(b) for b in bands]], 1)


def _disc(rng: np.random.Generator, size: int) -> np.ndarray:
    row, column = rng.uniform(0.3, 0.7, 2) * size
    y, x = np.mgrid[:size, :size]
    return np.hypot(y - row, x - column) < rng.uniform(0.15, 0.3) * size


# ---- MADOS ----


def _mados(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """All 15 classes in every crop: small squares whose spectra differ, the rest without label."""
    spectra = np.random.default_rng(seed).uniform(100, 4000, (len(mados.FACTS.class_names), len(mados.BANDS))).astype(np.float32)
    source, number = scenes(seed, size), 0
    for split, count in counts.items():
        names = []
        for _ in range(count):
            image = _optical(next(source), size, mados.BANDS)
            label = np.zeros((size, size), np.uint8)
            rng, cell = np.random.default_rng((seed, number)), size // 4
            for place, k in enumerate(rng.permutation(len(spectra))):
                top, left = divmod(place, 4)
                at = np.s_[top * cell : top * cell + cell // 2, left * cell : left * cell + cell // 2]
                image[at] = 0.3 * image[at] + 0.7 * spectra[k]
                label[at] = k + 1
            image[:, -6:] = np.nan
            names.append(f"Scene_{number}_1")
            _write_crop(os.path.join(root, f"Scene_{number}"), f"Scene_{number}", image / 10_000, label)
            number += 1
        _write_lines(os.path.join(root, "splits", f"{split}_X.txt"), names)


def _write_crop(folder: str, scene: str, image: np.ndarray, label: np.ndarray) -> None:
    for plane, wavelength, metres in zip(np.moveaxis(image, -1, 0), mados.WAVELENGTHS, mados.METRES, strict=True):
        step = metres // 10
        geo.write(os.path.join(folder, str(metres), f"{scene}_L2R_rhorc_{wavelength}_1.tif"), plane[::step, ::step].astype(np.float32))
    for kind in ("cl", "conf", "rep"):
        geo.write(os.path.join(folder, "10", f"{scene}_L2R_{kind}_1.tif"), label if kind == "cl" else np.minimum(label, 1))


# ---- PASTIS-R ----


def _pastis(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land covers are the crops, told apart by the season in which each is green; the border is void."""
    folds = [1 + i % 3 for i in range(counts["train"])] + [4] * counts["val"] + [5] * counts["test"]
    features = []
    for number, (fold, scene) in enumerate(zip(folds, scenes(seed, size, sar=True), strict=False)):
        rng, patch = np.random.default_rng((seed, number)), 10_000 + number
        crop = scene.arrays["LULC"][:size, :size, 0].astype(np.uint8)
        crop[:, 0] = pastis.FACTS.ignore_index
        optical = _optical(scene, size, pastis.BANDS["S2L2A"])
        radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
        properties = {"ID_PATCH": patch, "N_Parcel": 1, "Parcel_Cover": 1.0, "Fold": fold, "TILE": "t31tfj"}
        for stored, length in (("S2", 8), ("S1A", 10), ("S1D", 9)):
            days = np.linspace(0, 360, length).astype(int)
            green = np.sin(2 * np.pi * days[:, None, None] / 365 + crop)  # [T, H, W]
            series = _seasons(optical, green) if stored == "S2" else _backscatter(radar, green, rng)
            _save(os.path.join(root, f"DATA_{stored}", f"{stored}_{patch}.npy"), series)
            dates = [pastis.REFERENCE_DATE + datetime.timedelta(days=int(day)) for day in days]
            properties[f"dates-{stored}"] = {str(i): int(date.strftime("%Y%m%d")) for i, date in enumerate(dates)}
        _save(os.path.join(root, "ANNOTATIONS", f"TARGET_{patch}.npy"), np.stack([crop] * 3))
        features.append({"type": "Feature", "id": str(patch), "properties": properties, "geometry": None})
    with open(os.path.join(root, "metadata.geojson"), "w", encoding="utf-8") as f:
        json.dump({"type": "FeatureCollection", "features": features}, f)


def _seasons(optical: np.ndarray, green: np.ndarray, effect: Sequence[float] = EFFECT_OF_TEN) -> np.ndarray:
    """``[T, C, H, W]`` int16: the near infrared rises and red falls with the green."""
    series = optical[None] * (1 + np.float32(effect) * green[..., None])
    return np.moveaxis(series, -1, 1).round().astype(np.int16)


def _backscatter(radar: np.ndarray, green: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``[T, 3, H, W]`` float16: VV, VH and their difference in dB."""
    series = radar[None] + np.float32([0.5, 1.5]) * green[..., None] + rng.normal(0, 0.5, (*green.shape, 2))
    return np.moveaxis(np.concatenate([series, series[..., :1] - series[..., 1:]], -1), -1, 1).astype(np.float16)


def _save(path: str, array: np.ndarray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    np.save(path, array)


# ---- HLS Multi-Temporal Crop Classification ----


def _multitemporal_crop(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """As of PASTIS-R land covers are the crops; on the border nothing is known. There are no chips for testing."""
    source, number = scenes(seed, size), 0
    for split, name in multitemporal_crop.SPLITS.items():
        chips = []
        for scene in (next(source) for _ in range(counts[split])):
            number += 1
            chip = f"chip_{number:03d}_{number:03d}"
            crop = 1 + scene.arrays["LULC"][:size, :size, 0] % len(multitemporal_crop.CLASSES)
            crop[:, :2] = 0
            green = np.sin(2 * np.pi * np.linspace(0, 1, multitemporal_crop.TIMES)[:, None, None] + crop)  # [T, H, W]
            series = _seasons(_optical(scene, size, multitemporal_crop.BANDS), green, EFFECT_OF_SIX)
            image = np.moveaxis(series.reshape(-1, size, size), 0, -1)  # all bands of a day together
            where, base = _metres(scene, size, 30.0), os.path.join(root, f"{name}_chips", chip)
            geo.write(f"{base}_merged.tif", image, where)
            geo.write(f"{base}.mask.tif", crop.astype(np.uint8), where)
            chips.append(chip)
        _write_lines(os.path.join(root, f"{name}_data.txt"), chips)


# ---- CropTypeMapping-SS ----


def _croptypemapping(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """As of PASTIS-R land covers are the crops; on the border nothing grows, and beside it a crop that does not count."""
    root, rows = os.path.join(root, "southsudan"), ["id,partition"]
    for folder in ("npy", "truth"):
        os.makedirs(os.path.join(root, folder))
    parts = [part for part, count in enumerate(counts.values()) for _ in range(count)]
    for number, (part, scene) in enumerate(zip(parts, scenes(seed, size, sar=True), strict=False), 1):
        crop = 1 + scene.arrays["LULC"][:size, :size, 0] % 4
        crop[:, :2] = 0, 5
        optical = _optical(scene, size, croptypemapping.FACTS.bands["S2L2A"])
        radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
        green = [np.sin(2 * np.pi * np.linspace(0, 1, times)[:, None, None] + crop) for times in (8, 9)]  # [T, H, W]
        series = _seasons(optical, green[0]), _backscatter(radar, green[1], np.random.default_rng((seed, number)))
        s2, s1 = (np.moveaxis(x, 0, -1).astype(np.float32) for x in series)
        name = f"southsudan_{number:06d}.npz"
        np.savez(os.path.join(root, "npy", name), s2=s2, s1=s1)
        np.savez(os.path.join(root, "truth", name), truth=crop)
        rows.append(f"{number},{part}")
    _write_lines(os.path.join(root, "list_eval_partition.csv"), rows)


# ---- DynamicEarthNet ----

EARTH = (4, 5, 2, 3, 1, 0, 4, 4, 4, 2)  # the class that stands for each LULC code


def _dynamicearthnet(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land cover as the world has it, all days of a month alike but for noise."""
    source, number = scenes(seed, size), 0
    for split, count in counts.items():
        lines = []
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, place = np.random.default_rng((seed, number)), f"10N/{number:04d}_13"
            image = np.moveaxis(_optical(scene, size, ("BLUE", "GREEN", "RED", "NIR_BROAD")), -1, 0)
            for day in dynamicearthnet.DAYS:
                seen = image * rng.normal(1, 0.02, image.shape).astype(np.float32)
                _save(os.path.join(root, "planet", place, f"2018-01-{day:02d}.npy"), np.maximum(seen, 1).round().astype(np.int16))
            label = np.uint8(EARTH)[scene.arrays["LULC"][:size, :size, 0]]
            _save(os.path.join(root, "labels", place, "2018-01.npy"), label)
            lines.append(f"/reprocess-cropped/UTM-24000/{place} /labels/{place}/2018-01.tif 2018-01")
        _write_lines(os.path.join(root, "dynnet_training_splits", f"{split}.txt"), lines)


# ---- SpaceNet-7 ----


def _spacenet7(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Bright squares are the buildings of `count` mosaics, a pixel short; of every area two months are left out."""
    root, source = os.path.join(root, "spacenet7"), scenes(seed, size)
    left_out = [{"year": 2017, "month": 11, "mask": True, "label": True}, {"year": 2017, "month": 12, "mask": False, "label": False}]
    months = {}
    for split, count in counts.items():
        areas = [f"L15-{area}_13" for area in spacenet7.AREAS[split].split()]
        for area in areas:
            os.makedirs(os.path.join(root, "train", area))
            months[area] = list(left_out)
        for number in range(count):
            area, at = areas[number % len(areas)], number // len(areas)
            year, month = 2018 + at // 12, 1 + at % 12
            months[area].append({"year": year, "month": month, "mask": False, "label": True})
            rng = np.random.default_rng((seed, number, list(counts).index(split)))
            image, label = _mosaic(next(source), rng, size)
            folder, name = os.path.join(root, "train", area), f"global_monthly_{year}_{month:02d}_mosaic_{area}"
            geo.write(os.path.join(folder, "images_masked", f"{name}.tif"), image)
            geo.write(os.path.join(folder, "labels_raster", f"{name}_Buildings.tif"), label)
    with open(os.path.join(root, "metadata_train.json"), "w", encoding="utf-8") as f:
        json.dump(months, f)


def _mosaic(scene: world.Scene, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Red, green, blue and alpha ``[size - 1, size, 4]`` uint8, two columns without data, and buildings 255."""
    built = _squares(rng.random((12, 12)) < 0.2, size)[:-1]
    image = np.clip(_optical(scene, size, spacenet7.BANDS)[:-1] / 12, 0, 255)
    image = np.where(built[..., None], 255 - image / 4, image)
    image = np.pad(image, [(0, 0), (0, 0), (0, 1)], constant_values=255).astype(np.uint8)
    image[:, -2:] = 0
    return image, np.where(built, 255, 0).astype(np.uint8)


def _squares(values: np.ndarray, size: int) -> np.ndarray:
    """``[size, size]`` with a square for each of ``[12, 12]`` values, together half as wide, and zeros around."""
    cell = max(1, size // 24)
    return np.pad(np.kron(values, np.ones((cell, cell), values.dtype)), [(0, size - 12 * cell)] * 2)


# ---- xView2 ----


def _xview2(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Bright squares are the buildings, the darker afterwards the more they are damaged."""
    source, number = scenes(seed, size), 0
    for split, count in counts.items():
        folder = os.path.join(root, {"val": "hold"}.get(split, split))
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, name = np.random.default_rng((seed, number)), f"synthetic-flood_{number:08d}"
            damage = _squares(rng.choice(5, (12, 12), p=(0.6, 0.1, 0.1, 0.1, 0.1)), size)[..., None]
            image = np.clip(_optical(scene, size, ("RED", "GREEN", "BLUE")) / 12, 0, 255)
            image = np.where(damage > 0, 255 - image / 4, image)
            for when, seen, label in (("pre", image, damage > 0), ("post", image * (1 - 0.2 * np.maximum(damage - 1, 0)), damage)):
                _write_png(os.path.join(folder, "images", f"{name}_{when}_disaster.png"), seen)
                _write_png(os.path.join(folder, "targets", f"{name}_{when}_disaster_target.png"), label)


def _write_png(path: str, pixels: np.ndarray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    height, width, count = pixels.shape
    with rasterio.open(path, "w", driver="PNG", height=height, width=width, count=count, dtype="uint8") as target:
        target.write(np.moveaxis(pixels, -1, 0).astype(np.uint8))


# ---- BioMassters ----

BIOMASS = (0, 0, 150, 40, 10, 0, 0, 0, 0, 30)  # tonnes a hectare of each LULC code, on average
MONTHS = (8, 9)  # May and June
BIOMASSTERS = tuple(band for band in S2L2A_BANDS if band not in ("COASTAL_AEROSOL", "WATER_VAPOR"))


def _biomassters(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Two months of twelve, of which the first lacks every second optical image; biomass as the trees of the world have it."""
    source, number = scenes(seed, size, sar=True), 0
    for split, count in counts.items():
        part, chips = ("test" if split == "test" else "train"), []
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, chip, where = np.random.default_rng((seed, number)), f"{number:08x}", _metres(scene, size)
            for month in MONTHS:
                clouds = rng.integers(0, 101, (size, size, 1)).astype(np.uint16)
                optical = np.append((1 + 0.05 * month) * _optical(scene, size, BIOMASSTERS), clouds, -1)
                radar = np.tile(scene.arrays["S1GRD"][:size, :size].astype(np.float32), 2) + rng.normal(0, 0.5, (size, size, 4))
                radar[:2, :2] = -9999
                name = os.path.join(root, f"{part}_features", f"{chip}_{{}}_{month:02d}.tif")
                geo.write(name.format("S1"), radar.astype(np.float32), where)
                if month == MONTHS[-1] or number % 2:
                    geo.write(name.format("S2"), optical.round().astype(np.uint16), where)
            mass = np.float32(BIOMASS)[scene.arrays["LULC"][:size, :size, 0]] * rng.uniform(0.8, 1.2, (size, size))
            geo.write(os.path.join(root, f"{part}_agbm", f"{chip}_agbm.tif"), mass.astype(np.float32), where)
            chips.append(chip)
        _write_lines(os.path.join(root, f"{split}.txt"), chips)


# ---- AI4SmallFarms ----


def _ai4smallfarms(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Cropland as the world has it is the fields."""
    source = (s for s in scenes(seed, size) if 0.05 < (s.arrays["LULC"][:size, :size] == CROPS).mean() < 0.95)
    number = 0
    for split, count in counts.items():
        folder = os.path.join(root, ai4smallfarms.BASE, {"val": "validate"}.get(split, split))
        for scene in (next(source) for _ in range(count)):
            where, name = _metres(scene, size), f"{number}_{('vietnam', 'cambodia')[number % 2]}.tif"
            image = _optical(scene, size, ai4smallfarms.BANDS).round().astype(np.uint16)
            geo.write(os.path.join(folder, "images", name), image, where)
            field = scene.arrays["LULC"][:size, :size, 0] == CROPS
            geo.write(os.path.join(folder, "masks", name), np.where(field, 255, 0).astype(np.uint8), where)
            number += 1


# ---- Five-Billion-Pixels ----

GAOFEN = (0, 11, 6, 2, 4, 12, 17, 16, 0, 9)  # the class that stands for each LULC code; 0: no label


def _fivebillionpixels(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land cover as the world has it, in eight of the 24 classes."""
    source, number = scenes(seed, size), 0
    for split, count in counts.items():
        for scene in (next(source) for _ in range(count)):
            number += 1
            name = f"GF2_PMS1__L1A{number:010d}-MSS1_0_0.tif"
            image = np.clip(_optical(scene, size, fivebillionpixels.BANDS) / 12, 0, 255).astype(np.uint8)
            geo.write(os.path.join(root, split, "images", name), image)
            label = np.uint8(GAOFEN)[scene.arrays["LULC"][:size, :size, 0]]
            geo.write(os.path.join(root, split, "labels", name), label)


# ---- EuroSAT ----


def _eurosat(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """`count` images of every class: scenes tinted with a spectrum of their class. The spatial splits part the scenes by longitude."""
    spectra = np.random.default_rng(seed).uniform(500, 4000, (len(eurosat.CLASSES), len(S2L1C_BANDS)))
    stored, source = [S2L1C_BANDS.index(b) for b in eurosat.STORED], scenes(seed, size)
    longitudes = []
    for number, scene in zip(range(sum(counts.values())), source, strict=False):
        longitudes.append(scene.lon)
        for spectrum, label in zip(spectra, eurosat.CLASSES, strict=True):
            image = 0.5 * scene.arrays["S2L1C"][:size, :size] + 0.5 * spectrum
            path = os.path.join(root, eurosat.FOLDERS[0], label, f"{label}_{number + 1}.tif")
            geo.write(path, image[..., stored].round().astype(np.uint16), _metres(scene, size))
    ends = np.cumsum(list(counts.values()))
    for kind, ordered in (("", np.arange(ends[-1])), ("spatial-", np.argsort(longitudes))):
        for split, part in zip(counts, np.split(ordered, ends[:-1]), strict=True):
            names = [f"{label}_{number + 1}.jpg" for number in part for label in eurosat.CLASSES]
            _write_lines(os.path.join(root, f"eurosat-{kind}{split}.txt"), names)


def _write_lines(path: str, lines: list[str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")


# By name: what writes it, and the original's side in pixels.
WRITERS: dict[str, tuple[Callable[[str, dict[str, int], int, int], None], int]] = {
    "sen1floods11": (_sen1floods11, 512),
    "burnscars": (_burnscars, 512),
    "mados": (_mados, 240),
    "pastis": (_pastis, 128),
    "eurosat": (_eurosat, 64),
    "multitemporal_crop": (_multitemporal_crop, 224),
    "croptypemapping": (_croptypemapping, 64),
    "dynamicearthnet": (_dynamicearthnet, 1024),
    "spacenet7": (_spacenet7, 1024),
    "ai4smallfarms": (_ai4smallfarms, 496),
    "fivebillionpixels": (_fivebillionpixels, 520),
    "xview2": (_xview2, 1024),
    "biomassters": (_biomassters, 256),
}
