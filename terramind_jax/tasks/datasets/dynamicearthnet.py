"""DynamicEarthNet (Toker et al. 2022) as PANGAEA takes it: land cover of a month from daily images of Planet, 1024 pixels.

    dynnet_training_splits/{train,val,test}.txt     a line a month: the folder of its images, its labels' path, both with a / in front, and
                                                    the month, such as 2018-01
    FOLDER/2018-01-01.npy                           [4, 1024, 1024], blue, green, red and near infrared, reflectance x 10000
    LABELS.npy                                      [1024, 1024], classes from 0, for what the split names LABELS.tif

The series is the first six days of the month. Of a folder /reprocess-cropped/UTM-24000/ in the splits the images lie in /planet/.
"""

from __future__ import annotations

import os

import numpy as np

from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://mediatum.ub.tum.de/1650201"
DAYS = (1, 2, 3, 4, 5, 6)

# Classes, bands, mean and standard deviation: PANGAEA, configs/dataset/dynamicen.yaml, for which the near infrared is B5.
FACTS = Facts(
    title="DynamicEarthNet",
    task="segmentation",
    bands={"S2L2A": ("BLUE", "GREEN", "RED", "RED_EDGE_1")},
    class_names=("impervious surface", "agriculture", "forest & other vegetation", "wetlands", "soil", "water"),
    ignore_index=-1,
    has_times=True,
    mean={"S2L2A": (671.260559082031, 915.618408203125, 1042.59240722656, 2605.20922851562)},
    std={"S2L2A": (596.943908691406, 715.548767089843, 957.958435058593, 1059.90319824218)},
)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The months of ``train``, ``val`` or ``test``."""
    if split not in SPLITS:
        raise ValueError(f"DynamicEarthNet has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = files.base(root, "DynamicEarthNet")
    where = f"dynnet_training_splits/{split}.txt"
    files.require(FACTS.title, root, [where], SOURCE)
    samples = tuple(_sample(root, *line.split()) for line in files.split_names(os.path.join(root, where)))
    files.check_present(((s.name, path) for s in samples for path in (*s.inputs, s.target)), os.path.join(root, where))
    return Dataset(FACTS, split, samples, read_inputs, read_target)


def read_inputs(sample: Sample) -> dict[str, np.ndarray]:
    """``{"S2L2A": [6, H, W, 4]}``."""
    return {"S2L2A": np.moveaxis(np.stack([files.map_npy(path) for path in sample.inputs], dtype=np.float32), 1, -1)}


def read_target(sample: Sample) -> np.ndarray:
    """Classes ``[H, W]``."""
    return files.map_npy(sample.target).astype(np.int32)


def _sample(root: str, folder: str, labels: str, month: str) -> Sample:
    folder = folder.replace("/reprocess-cropped/UTM-24000/", "/planet/")
    images = [os.path.join(root, folder[1:], f"{month}-{day:02d}.npy") for day in DAYS]
    return Sample(f"{folder[1:]}/{month}", images, os.path.join(root, labels[1:].replace("tif", "npy")))
