"""EuroSAT (Helber et al. 2019): 27000 images of 64 pixels in ten classes, all 13 bands of Sentinel-2 L1C.

    eurosat-{train,val,test}.txt                                                      names such as AnnualCrop_1.jpg
    ds/images/remote_sensing/otherDatasets/sentinel_2/tif/AnnualCrop/AnnualCrop_1.tif      uint16, reflectance x 10000

The folders may also be those of the authors' archive, ``EuroSAT_MS/AnnualCrop``, or lie in the root. **B8A is stored last**; here it is
where Sentinel-2 has it. The splits are those of Neumann et al. (arXiv 1911.06721); `spatial` ones, ``eurosat-spatial-train.txt``, are by
longitude. `rgb` gives S2RGB instead (`true_colour`), from top-of-atmosphere reflectance where the pretraining's is of L2A; it is for the
protocols that look at features.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import numpy as np

from terramind_jax import modalities
from terramind_jax.tasks.datasets import files, generic
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://huggingface.co/datasets/torchgeo/eurosat (EuroSATallBands.zip and eurosat-[spatial-]{train,val,test}.txt)"
FOLDERS = ("ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "EuroSAT_MS", "")
CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
STORED = (*(b for b in modalities.S2L1C_BANDS if b != "NIR_NARROW"), "NIR_NARROW")
FACTS = Facts(
    title="EuroSAT",
    task="classification",
    bands={"S2L1C": modalities.S2L1C_BANDS},
    class_names=CLASSES,
    files={"S2L1C": files.bands("S2L1C", STORED, modalities.S2L1C_BANDS)},
)
RGB = ("RED", "GREEN", "BLUE")
IN_RGB = dataclasses.replace(FACTS, bands={"S2RGB": RGB}, files={})
WHITE = 2000  # reflectance x 10000 that is 255 at least


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    folder = _folder(root)
    parts = [os.path.join(folder, name) for name in CLASSES]
    files.require(FACTS.title, os.fspath(root), parts, SOURCE)


def dataset(root: str | os.PathLike, split: str = "train", *, spatial: bool = False, rgb: bool = False) -> Dataset:
    """The images of ``train``, ``val`` or ``test``; see the module."""
    check(root)
    if split not in SPLITS:
        raise ValueError(f"EuroSAT has no split {split!r}; it has {', '.join(SPLITS)}.")
    list_name = f"eurosat-{'spatial-' if spatial else ''}{split}.txt"
    files.require(FACTS.title, os.fspath(root), [list_name], SOURCE)
    where = os.path.join(root, list_name)
    facts, read = (IN_RGB, read_rgb) if rgb else (FACTS, functools.partial(generic.read_images, FACTS.files))
    (modality,) = facts.bands
    samples = tuple(_sample(os.path.join(root, _folder(root)), line, where, modality) for line in files.split_names(where))
    files.check_present(((s.name, s.inputs[modality]) for s in samples), where)
    return Dataset(facts, split, samples, read, generic.given)


def read_rgb(sample: Sample) -> dict[str, np.ndarray]:
    """``{"S2RGB": [H, W, 3]}``."""
    return {"S2RGB": true_colour(files.read_image(sample.inputs["S2RGB"], files.bands("S2L1C", STORED, RGB)))}


def true_colour(image: np.ndarray) -> np.ndarray:
    """Reflectance x 10000 ``[H, W, 3]`` as 0-255, stretched as TerraMind's authors do it for S2RGB.

    What lies below the lesser of the 2 per cent quantile and 1000, or above the larger of the 98 per cent quantile and `WHITE`, comes
    nearer to it by half. Then 0 is the quantile of 0.2 per cent, from 0 to 500, and 255 that of 99.8, from `WHITE` to 20000. An image
    whose median is at most half of `WHITE` is not made darker: there 0 stays 0. From TerraTorch's
    examples/notebooks/TerraMindEmbedding.ipynb.
    """
    low, median, high = np.quantile(image, (0.02, 0.5, 0.98))
    is_bright = median > WHITE / 2
    low, high = np.clip(low, 0, 1000) if is_bright else 0, max(high, WHITE)
    soft = image - np.minimum(image - low, 0) / 2 - np.maximum(image - high, 0) / 2
    black, white = np.quantile(soft, (0.002, 0.998))
    black, white = np.clip(black, 0, 500) if is_bright else 0, np.clip(white, WHITE, 20_000)
    return np.clip((soft - black) * (255 / (white - black)), 0, 255).round().astype(np.float32)


def _folder(root: str | os.PathLike) -> str:
    return next((f for f in FOLDERS if os.path.isdir(os.path.join(root, f, CLASSES[0]))), FOLDERS[0])


def _sample(folder: str, line: str, where: str, modality: str) -> Sample:
    name = os.path.splitext(os.path.basename(line))[0]
    label = name.rpartition("_")[0]
    if label not in CLASSES:
        raise ValueError(f"{where} names {line}, which is of none of EuroSAT's classes: {', '.join(CLASSES)}.")
    return Sample(name, {modality: os.path.join(folder, label, f"{name}.tif")}, CLASSES.index(label))
