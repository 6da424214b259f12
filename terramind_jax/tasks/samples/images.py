"""Data sets with one image a sample. Each function writes one to `root`: samples by split, their side in pixels, the seed."""

from __future__ import annotations

import os

import numpy as np

from terramind_jax import geo
from terramind_jax.modalities import S2L1C_BANDS
from terramind_jax.tasks.datasets import ai4smallfarms, burnscars, eurosat, fivebillionpixels, mados, sen1floods11
from terramind_jax.tasks.samples import drawing

# ---- Sen1Floods11 ----


def write_sen1floods11(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Water as the world has it; clouds are not labelled, and a corner of the radar has no data."""
    source = (s for s in drawing.scenes(seed, size, sar=True) if 0.02 < (s.arrays["LULC"][:size, :size] == drawing.WATER).mean() < 0.9)
    number = 0
    for split, count in counts.items():
        rows = []
        for scene in (next(source) for _ in range(count)):
            number += 1
            name = f"Synthia_{100_000 + number}"
            cover = scene.arrays["LULC"][:size, :size, 0]
            label = np.where((cover == 0) | (cover == drawing.CLOUDS), -1, cover == drawing.WATER).astype(np.int16)
            radar = scene.arrays["S1GRD"][:size, :size].astype(np.float32)
            radar[:2, :2] = np.nan
            where, base = drawing.degrees(scene, size), os.path.join(root, "v1.1", sen1floods11.PUBLISHED)
            names = [f"B{b}" for b in (1, 2, 3, 4, 5, 6, 7, 8, "8A", 9, 10, 11, 12)]
            optical = scene.arrays["S2L1C"][:size, :size].astype(np.int16)
            geo.write(os.path.join(base, "S2Hand", f"{name}_S2Hand.tif"), optical, where, bands=names, nodata=0)
            geo.write(os.path.join(base, "S1Hand", f"{name}_S1Hand.tif"), radar, where, bands=("VV", "VH"), nodata=np.nan)
            geo.write(os.path.join(base, "LabelHand", f"{name}_LabelHand.tif"), label, where)
            rows.append(f"{name}_S1Hand.tif,{name}_LabelHand.tif")
        folder = os.path.join(root, "v1.1", "splits", "flood_handlabeled")
        drawing.write_lines(os.path.join(folder, f"flood_{sen1floods11.SPLITS[split]}_data.csv"), rows)


# ---- HLS Burn Scars ----


def write_burnscars(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """A round scar in each scene: dark, above all in the near infrared, and bright in SWIR 2. A strip has no data."""
    source = drawing.scenes(seed, size)
    total = {"training": max(10, counts["train"] + counts["val"]), "validation": counts["test"]}  # PANGAEA validates on a tenth
    for folder, count in total.items():
        for number in range(count):
            scene = next(source)
            rng = np.random.default_rng((seed, number, folder == "validation"))
            burned = drawing.disc(rng, size)
            change = np.where(burned[..., None], np.float32([0.7, 0.65, 0.7, 0.35, 0.9, 1.6]), 1)
            image = drawing.optical(scene, size, burnscars.BANDS) / 10_000 * change
            image[:, :2] = burnscars.MISSING[1]
            label = burned.astype(np.int16)
            label[:, :2] = -1
            name = f"subsetted_512x512_HLS.S30.T{10 + number:02d}SYN.{2018 + (folder == 'validation')}{1 + number:03d}.v1.4"
            where = drawing.metres(scene, size, 30.0)
            geo.write(os.path.join(root, folder, f"{name}_merged.tif"), image.astype(np.float32), where)
            geo.write(os.path.join(root, folder, f"{name}.mask.tif"), label, where)


# ---- MADOS ----


def write_mados(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """All 15 classes in every crop: small squares whose spectra differ, the rest without label."""
    spectra = np.random.default_rng(seed).uniform(100, 4000, (len(mados.FACTS.class_names), len(mados.BANDS))).astype(np.float32)
    source, number = drawing.scenes(seed, size), 0
    for split, count in counts.items():
        names = []
        for _ in range(count):
            image = drawing.optical(next(source), size, mados.BANDS)
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
        drawing.write_lines(os.path.join(root, "splits", f"{split}_X.txt"), names)


def _write_crop(folder: str, scene: str, image: np.ndarray, label: np.ndarray) -> None:
    for plane, wavelength, metres in zip(np.moveaxis(image, -1, 0), mados.WAVELENGTHS, mados.METRES, strict=True):
        step = metres // 10
        geo.write(os.path.join(folder, str(metres), f"{scene}_L2R_rhorc_{wavelength}_1.tif"), plane[::step, ::step].astype(np.float32))
    for kind in ("cl", "conf", "rep"):
        geo.write(os.path.join(folder, "10", f"{scene}_L2R_{kind}_1.tif"), label if kind == "cl" else np.minimum(label, 1))


# ---- AI4SmallFarms ----


def write_ai4smallfarms(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Cropland as the world has it is the fields."""
    source = (s for s in drawing.scenes(seed, size) if 0.05 < (s.arrays["LULC"][:size, :size] == drawing.CROPS).mean() < 0.95)
    number = 0
    for split, count in counts.items():
        folder = os.path.join(root, ai4smallfarms.BASE, {"val": "validate"}.get(split, split))
        for scene in (next(source) for _ in range(count)):
            where, name = drawing.metres(scene, size), f"{number}_{('vietnam', 'cambodia')[number % 2]}.tif"
            image = drawing.optical(scene, size, ai4smallfarms.BANDS).round().astype(np.uint16)
            geo.write(os.path.join(folder, "images", name), image, where)
            field = scene.arrays["LULC"][:size, :size, 0] == drawing.CROPS
            geo.write(os.path.join(folder, "masks", name), np.where(field, 255, 0).astype(np.uint8), where)
            number += 1


# ---- Five-Billion-Pixels ----

GAOFEN = (0, 11, 6, 2, 4, 12, 17, 16, 0, 9)  # the class that stands for each LULC code; 0: no label


def write_fivebillionpixels(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Land cover as the world has it, in eight of the 24 classes."""
    source, number = drawing.scenes(seed, size), 0
    for split, count in counts.items():
        for scene in (next(source) for _ in range(count)):
            number += 1
            name = f"GF2_PMS1__L1A{number:010d}-MSS1_0_0.tif"
            image = np.clip(drawing.optical(scene, size, fivebillionpixels.BANDS) / 12, 0, 255).astype(np.uint8)
            geo.write(os.path.join(root, split, "images", name), image)
            label = np.uint8(GAOFEN)[scene.arrays["LULC"][:size, :size, 0]]
            geo.write(os.path.join(root, split, "labels", name), label)


# ---- EuroSAT ----


def write_eurosat(root: str, counts: dict[str, int], size: int, seed: int) -> None:
    """`count` images of every class: scenes tinted with a spectrum of their class. The spatial splits part the scenes by longitude."""
    spectra = np.random.default_rng(seed).uniform(500, 4000, (len(eurosat.CLASSES), len(S2L1C_BANDS)))
    stored, source = [S2L1C_BANDS.index(b) for b in eurosat.STORED], drawing.scenes(seed, size)
    longitudes = []
    for number, scene in zip(range(sum(counts.values())), source, strict=False):
        longitudes.append(scene.lon)
        for spectrum, label in zip(spectra, eurosat.CLASSES, strict=True):
            image = 0.5 * scene.arrays["S2L1C"][:size, :size] + 0.5 * spectrum
            path = os.path.join(root, eurosat.FOLDERS[0], label, f"{label}_{number + 1}.tif")
            geo.write(path, image[..., stored].round().astype(np.uint16), drawing.metres(scene, size))
    ends = np.cumsum(list(counts.values()))
    for kind, ordered in (("", np.arange(ends[-1])), ("spatial-", np.argsort(longitudes))):
        for split, part in zip(counts, np.split(ordered, ends[:-1]), strict=True):
            names = [f"{label}_{number + 1}.jpg" for number in part for label in eurosat.CLASSES]
            drawing.write_lines(os.path.join(root, f"eurosat-{kind}{split}.txt"), names)
