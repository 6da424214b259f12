"""Data sets with several images a sample, or several of a place. Each function writes one to `root`, as those of `images` do."""

from __future__ import annotations

import datetime
import json
import os

import numpy as np

from terramind_jax import geo
from terramind_jax.data import world
from terramind_jax.modalities import S2L2A_BANDS
from terramind_jax.tasks.datasets import croptypemapping, dynamicearthnet, multitemporal_crop, pastis, spacenet7
from terramind_jax.tasks.samples import drawing

# ---- PASTIS-R ----


def write_pastis(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land covers are the crops, told apart by the season in which each is green; the border is void."""
    folds = [1 + i % 3 for i in range(counts["train"])] + [4] * counts["val"] + [5] * counts["test"]
    features = []
    for number, (fold, scene) in enumerate(zip(folds, drawing.scenes(seed, size, sar=True), strict=False)):
        rng, patch = np.random.default_rng((seed, number)), 10_000 + number
        crop = scene.arrays["LULC"][:size, :size, 0].astype(np.uint8)
        crop[:, 0] = pastis.FACTS.ignore_index
        optical = drawing.optical(scene, size, pastis.BANDS["S2L2A"])
        radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
        properties = {"ID_PATCH": patch, "N_Parcel": 1, "Parcel_Cover": 1.0, "Fold": fold, "TILE": "t31tfj"}
        for stored, length in (("S2", 8), ("S1A", 10), ("S1D", 9)):
            days = np.linspace(0, 360, length).astype(int)
            green = np.sin(2 * np.pi * days[:, None, None] / 365 + crop)  # [T, H, W]
            series = drawing.seasons(optical, green) if stored == "S2" else drawing.backscatter(radar, green, rng)
            drawing.save(os.path.join(root, f"DATA_{stored}", f"{stored}_{patch}.npy"), series)
            dates = [pastis.REFERENCE_DATE + datetime.timedelta(days=int(day)) for day in days]
            properties[f"dates-{stored}"] = {str(i): int(date.strftime("%Y%m%d")) for i, date in enumerate(dates)}
        drawing.save(os.path.join(root, "ANNOTATIONS", f"TARGET_{patch}.npy"), np.stack([crop] * 3))
        features.append({"type": "Feature", "id": str(patch), "properties": properties, "geometry": None})
    with open(os.path.join(root, "metadata.geojson"), "w", encoding="utf-8") as f:
        json.dump({"type": "FeatureCollection", "features": features}, f)


# ---- HLS Multi-Temporal Crop Classification ----


def write_multitemporal_crop(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """As of PASTIS-R land covers are the crops; on the border nothing is known. There are no chips for testing."""
    source, number = drawing.scenes(seed, size), 0
    for split, name in multitemporal_crop.SPLITS.items():
        chips = []
        for scene in (next(source) for _ in range(counts[split])):
            number += 1
            chip = f"chip_{number:03d}_{number:03d}"
            crop = 1 + scene.arrays["LULC"][:size, :size, 0] % len(multitemporal_crop.CLASSES)
            crop[:, :2] = 0
            green = np.sin(2 * np.pi * np.linspace(0, 1, multitemporal_crop.TIMES)[:, None, None] + crop)  # [T, H, W]
            series = drawing.seasons(drawing.optical(scene, size, multitemporal_crop.BANDS), green, drawing.EFFECT_OF_SIX)
            image = np.moveaxis(series.reshape(-1, size, size), 0, -1)  # all bands of a day together
            where, base = drawing.metres(scene, size, 30.0), os.path.join(root, f"{name}_chips", chip)
            geo.write(f"{base}_merged.tif", image, where)
            geo.write(f"{base}.mask.tif", crop.astype(np.uint8), where)
            chips.append(chip)
        drawing.write_lines(os.path.join(root, f"{name}_data.txt"), chips)


# ---- CropTypeMapping-SS ----


def write_croptypemapping(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """As of PASTIS-R land covers are the crops; on the border nothing grows, and beside it a crop that does not count."""
    root, rows = os.path.join(root, "southsudan"), ["id,partition"]
    for folder in ("npy", "truth"):
        os.makedirs(os.path.join(root, folder))
    parts = [part for part, count in enumerate(counts.values()) for _ in range(count)]
    for number, (part, scene) in enumerate(zip(parts, drawing.scenes(seed, size, sar=True), strict=False), 1):
        crop = 1 + scene.arrays["LULC"][:size, :size, 0] % 4
        crop[:, :2] = 0, 5
        optical = drawing.optical(scene, size, croptypemapping.FACTS.bands["S2L2A"])
        radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
        green = [np.sin(2 * np.pi * np.linspace(0, 1, times)[:, None, None] + crop) for times in (8, 9)]  # [T, H, W]
        series = drawing.seasons(optical, green[0]), drawing.backscatter(radar, green[1], np.random.default_rng((seed, number)))
        s2, s1 = (np.moveaxis(x, 0, -1).astype(np.float32) for x in series)
        name = f"southsudan_{number:06d}.npz"
        np.savez(os.path.join(root, "npy", name), s2=s2, s1=s1)
        np.savez(os.path.join(root, "truth", name), truth=crop)
        rows.append(f"{number},{part}")
    drawing.write_lines(os.path.join(root, "list_eval_partition.csv"), rows)


# ---- DynamicEarthNet ----

EARTH = (4, 5, 2, 3, 1, 0, 4, 4, 4, 2)  # the class that stands for each LULC code


def write_dynamicearthnet(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land cover as the world has it, all days of a month alike but for noise."""
    source, number = drawing.scenes(seed, size), 0
    for split, count in counts.items():
        lines = []
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, place = np.random.default_rng((seed, number)), f"10N/{number:04d}_13"
            image = np.moveaxis(drawing.optical(scene, size, ("BLUE", "GREEN", "RED", "NIR_BROAD")), -1, 0)
            for day in dynamicearthnet.DAYS:
                seen = image * rng.normal(1, 0.02, image.shape).astype(np.float32)
                drawing.save(os.path.join(root, "planet", place, f"2018-01-{day:02d}.npy"), np.maximum(seen, 1).round().astype(np.int16))
            label = np.uint8(EARTH)[scene.arrays["LULC"][:size, :size, 0]]
            drawing.save(os.path.join(root, "labels", place, "2018-01.npy"), label)
            lines.append(f"/reprocess-cropped/UTM-24000/{place} /labels/{place}/2018-01.tif 2018-01")
        drawing.write_lines(os.path.join(root, "dynnet_training_splits", f"{split}.txt"), lines)


# ---- SpaceNet-7 ----


def write_spacenet7(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Bright squares are the buildings of `count` mosaics, a pixel short; of every area two months are left out."""
    root, source = os.path.join(root, "spacenet7"), drawing.scenes(seed, size)
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
    built = drawing.squares(rng.random((12, 12)) < 0.2, size)[:-1]
    image = np.clip(drawing.optical(scene, size, spacenet7.BANDS)[:-1] / 12, 0, 255)
    image = np.where(built[..., None], 255 - image / 4, image)
    image = np.pad(image, [(0, 0), (0, 0), (0, 1)], constant_values=255).astype(np.uint8)
    image[:, -2:] = 0
    return image, np.where(built, 255, 0).astype(np.uint8)


# ---- xView2 ----


def write_xview2(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Bright squares are the buildings, the darker afterwards the more they are damaged."""
    source, number = drawing.scenes(seed, size), 0
    for split, count in counts.items():
        folder = os.path.join(root, {"val": "hold"}.get(split, split))
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, name = np.random.default_rng((seed, number)), f"synthetic-flood_{number:08d}"
            damage = drawing.squares(rng.choice(5, (12, 12), p=(0.6, 0.1, 0.1, 0.1, 0.1)), size)[..., None]
            image = np.clip(drawing.optical(scene, size, ("RED", "GREEN", "BLUE")) / 12, 0, 255)
            image = np.where(damage > 0, 255 - image / 4, image)
            for when, seen, label in (("pre", image, damage > 0), ("post", image * (1 - 0.2 * np.maximum(damage - 1, 0)), damage)):
                drawing.write_png(os.path.join(folder, "images", f"{name}_{when}_disaster.png"), seen)
                drawing.write_png(os.path.join(folder, "targets", f"{name}_{when}_disaster_target.png"), label)


# ---- BioMassters ----

BIOMASS = (0, 0, 150, 40, 10, 0, 0, 0, 0, 30)  # tonnes a hectare of each LULC code, on average
MONTHS = (8, 9)  # May and June
BIOMASSTERS = tuple(band for band in S2L2A_BANDS if band not in ("COASTAL_AEROSOL", "WATER_VAPOR"))


def write_biomassters(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Two months of twelve, of which the first lacks every second optical image; biomass as the trees of the world have it."""
    source, number = drawing.scenes(seed, size, sar=True), 0
    for split, count in counts.items():
        part, chips = ("test" if split == "test" else "train"), []
        for scene in (next(source) for _ in range(count)):
            number += 1
            rng, chip, where = np.random.default_rng((seed, number)), f"{number:08x}", drawing.metres(scene, size)
            for month in MONTHS:
                clouds = rng.integers(0, 101, (size, size, 1)).astype(np.uint16)
                optical = np.append((1 + 0.05 * month) * drawing.optical(scene, size, BIOMASSTERS), clouds, -1)
                radar = np.tile(scene.arrays["S1GRD"][:size, :size].astype(np.float32), 2) + rng.normal(0, 0.5, (size, size, 4))
                radar[:2, :2] = -9999
                name = os.path.join(root, f"{part}_features", f"{chip}_{{}}_{month:02d}.tif")
                geo.write(name.format("S1"), radar.astype(np.float32), where)
                if month == MONTHS[-1] or number % 2:
                    geo.write(name.format("S2"), optical.round().astype(np.uint16), where)
            mass = np.float32(BIOMASS)[scene.arrays["LULC"][:size, :size, 0]] * rng.uniform(0.8, 1.2, (size, size))
            geo.write(os.path.join(root, f"{part}_agbm", f"{chip}_agbm.tif"), mass.astype(np.float32), where)
            chips.append(chip)
        drawing.write_lines(os.path.join(root, f"{split}.txt"), chips)
