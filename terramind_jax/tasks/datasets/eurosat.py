"""EuroSAT (Helber et al. 2019): 27000 images of 64 pixels in ten classes, all 13 bands of Sentinel-2 L1C.

    eurosat-{train,val,test}.txt                                                      names such as AnnualCrop_1.jpg
    ds/images/remote_sensing/otherDatasets/sentinel_2/tif/AnnualCrop/AnnualCrop_1.tif      uint16, reflectance x 10000

The folders may also be those of the authors' archive, ``EuroSAT_MS/AnnualCrop``, or lie in the root. **B8A is stored last**; here it is
where Sentinel-2 has it. The splits are those of Neumann et al. (arXiv 1911.06721); `spatial` ones, ``eurosat-spatial-train.txt``, are by
longitude. `rgb` gives S2RGB instead, as Sentinel-2's true colour images have it: 255 is a reflectance of 0.3558, though nothing is cut off
there. How the S2RGB of TerraMind's pretraining was made is not published.
"""

from __future__ import annotations

import dataclasses
import functools
import os

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
IN_RGB = dataclasses.replace(FACTS, bands={"S2RGB": RGB}, files={"S2RGB": files.bands("S2RGB", STORED, RGB, scale=255 / 3558)})


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
    facts = IN_RGB if rgb else FACTS
    (modality,) = facts.bands
    samples = tuple(_sample(os.path.join(root, _folder(root)), line, where, modality) for line in files.split_names(where))
    files.check_present(((s.name, s.inputs[modality]) for s in samples), where)
    return Dataset(facts, split, samples, functools.partial(generic.read_images, facts.files), generic.given)


def _folder(root: str | os.PathLike) -> str:
    return next((f for f in FOLDERS if os.path.isdir(os.path.join(root, f, CLASSES[0]))), FOLDERS[0])


def _sample(folder: str, line: str, where: str, modality: str) -> Sample:
    name = os.path.splitext(os.path.basename(line))[0]
    label = name.rpartition("_")[0]
    if label not in CLASSES:
        raise ValueError(f"{where} names {line}, which is of none of EuroSAT's classes: {', '.join(CLASSES)}.")
    return Sample(name, {modality: os.path.join(folder, label, f"{name}.tif")}, CLASSES.index(label))
