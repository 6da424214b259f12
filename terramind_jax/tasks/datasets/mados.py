"""MADOS, Marine Debris and Oil Spill (Kikaki et al. 2024): sparse labels on crops of 240 pixels, Sentinel-2 corrected for air by ACOLITE.

    splits/{train,val,test}_X.txt                 names SCENE_CROP, such as Scene_0_1
    Scene_0/10/Scene_0_L2R_rhorc_492_1.tif        float32, reflectance 0-1, NaN: no data; a file a band, named by wavelength in nm
            20/Scene_0_L2R_rhorc_704_1.tif        bands of 20 m and 60 m at their own resolution: 120 and 40 pixels
            60/Scene_0_L2R_rhorc_443_1.tif
            10/Scene_0_L2R_cl_1.tif               classes from 1, 0: no label; beside them _conf_ and _rep_, which nobody reads

The satellites differ in their wavelengths by a few nanometres, so bands are told by their order. Coarse ones are repeated to 10 m.
"""

from __future__ import annotations

import os
import re

import numpy as np

from terramind_jax import geo
from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://zenodo.org/records/10664073 (MADOS.zip)"
BANDS = (
    *("COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW"),
    *("SWIR_1", "SWIR_2"),
)
WAVELENGTHS = (443, 492, 560, 665, 704, 740, 783, 833, 865, 1614, 2202)  # nm, of Sentinel-2A
METRES = (60, 10, 10, 10, 20, 20, 20, 10, 20, 20, 20)
SCALE = 10_000.0

# Classes, mean and standard deviation (times 10000): PANGAEA, configs/dataset/mados.yaml.
FACTS = Facts(
    title="MADOS",
    task="segmentation",
    bands={"S2L2A": BANDS},
    class_names=(
        *("Marine Debris", "Dense Sargassum", "Sparse Floating Algae", "Natural Organic Material", "Ship", "Oil Spill", "Marine Water"),
        *("Sediment-Laden Water", "Foam", "Turbid Water", "Shallow Water", "Waves & Wakes", "Oil Platform", "Jellyfish", "Sea snot"),
    ),
    ignore_index=-1,
    mean={"S2L2A": (582.676, 522.3386, 438.1474, 357.083, 341.2902, 368.0401, 399.9107, 356.6442, 396.5081, 267.993, 197.8944)},
    std={"S2L2A": (324.0627, 343.2253, 354.812, 375.769, 378.5412, 499.2323, 588.4482, 554.5856, 642.3746, 421.1187, 301.9115)},
)


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    root = files.base(root, "MADOS")
    parts = [f"splits/{split}_X.txt" for split in SPLITS]
    files.require(FACTS.title, root, parts, SOURCE)
    if not any(name.startswith("Scene_") for name in os.listdir(root)):
        raise FileNotFoundError(f"MADOS is not complete in {root}: no folder Scene_N is there; get it from {SOURCE}.")


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The crops of ``train``, ``val`` or ``test``."""
    check(root)
    if split not in SPLITS:
        raise ValueError(f"MADOS has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = files.base(root, "MADOS")
    where = os.path.join(root, "splits", f"{split}_X.txt")
    names = files.split_names(where)
    scenes = {scene: _bands_by_crop(os.path.join(root, scene), scene) for scene in sorted({_parts(name)[0] for name in names})}
    samples = tuple(_sample(root, name, scenes, where) for name in names)
    return Dataset(FACTS, split, samples, read_inputs, read_target)


def read_inputs(sample: Sample) -> dict[str, np.ndarray]:
    """Each pixel of a coarse band is repeated; bands that have no data are 0."""
    planes = [geo.read_valid(path, (name,), "S2L2A")[..., 0] for path, name in zip(sample.inputs, BANDS, strict=True)]
    side = planes[BANDS.index("BLUE")].shape
    planes = [plane.repeat(side[0] // len(plane), 0).repeat(side[1] // plane.shape[1], 1) for plane in planes]
    for plane, name in zip(planes, BANDS, strict=True):
        if plane.shape != side:
            raise ValueError(f"{name} of {sample.name} is {plane.shape[0]}x{plane.shape[1]} pixels at 10 m and BLUE {side[0]}x{side[1]}.")
    return {"S2L2A": np.nan_to_num(np.stack(planes, -1), nan=0.0) * np.float32(SCALE)}


def read_target(sample: Sample) -> np.ndarray:
    """Classes from 0, -1 where nothing is labelled, which is almost everywhere."""
    return files.read_mask(sample.target, FACTS.ignore_index, zero_is_none=True).astype(np.int32)


def _parts(name: str) -> tuple[str, str]:
    scene, _, crop = name.rpartition("_")
    return scene, crop


def _bands_by_crop(folder: str, scene: str) -> dict[str, list[str]]:
    """The files of the bands of each crop, by wavelength."""
    found: dict[str, list[tuple[int, str]]] = {}
    for metres in map(str, sorted(set(METRES))):
        inner = os.path.join(folder, metres)
        for file in os.listdir(inner) if os.path.isdir(inner) else ():
            match = re.fullmatch(rf"{re.escape(scene)}_L2R_rhorc_(\d+)_(\d+)\.tif", file)
            if match:
                found.setdefault(match[2], []).append((int(match[1]), os.path.join(inner, file)))
    return {crop: [path for _, path in sorted(bands)] for crop, bands in found.items()}


def _sample(root: str, name: str, scenes: dict[str, dict[str, list[str]]], where: str) -> Sample:
    scene, crop = _parts(name)
    bands, mask = scenes[scene].get(crop, []), os.path.join(root, scene, "10", f"{scene}_L2R_cl_{crop}.tif")
    if not bands or not os.path.exists(mask):
        raise FileNotFoundError(f"{where} names {name}, whose {'mask' if bands else 'bands'} {os.path.join(root, scene)} does not hold.")
    if len(bands) != len(BANDS):
        raise FileNotFoundError(f"{name} of MADOS has {len(bands)} bands, expected {len(BANDS)}; unpack it again from {SOURCE}.")
    return Sample(name, bands, mask)
