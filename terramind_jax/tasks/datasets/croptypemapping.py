"""CropTypeMapping of South Sudan (Rustowicz et al. 2019): fields in series of Sentinel-2 and Sentinel-1, in patches of 64 pixels.

    southsudan/list_eval_partition.csv        columns id and partition, which is 0, 1 and 2 for training, validation and test
    southsudan/npy/southsudan_000001.npz      s2 [10, 64, 64, T], reflectance x 10000, and s1 [C, 64, 64, T], of which VV and VH in dB come
                                              first; the oldest image first, and as many as there are
    southsudan/truth/southsudan_000001.npz    truth [64, 64], crops from 1 on

As in PANGAEA the latest six images are used, from the last on, zeros standing for those that a shorter series lacks, and the four most
frequent crops count. Patches whose file is damaged are left out; there the next patch stands for them.
"""

from __future__ import annotations

import csv
import os
import zipfile

import numpy as np

from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://drive.google.com/drive/folders/1WhVObtFOzYFiXBsbbrEGy1DUtv7ov7wF (archive.tar.gz)"
TIMES = 6
STORED = {"S2L2A": "s2", "S1GRD": "s1"}

# Classes, mean and standard deviation: PANGAEA, configs/dataset/croptypemapping.yaml.
FACTS = Facts(
    title="CropTypeMapping-SS",
    task="segmentation",
    bands={
        "S2L2A": ("BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW", "SWIR_1", "SWIR_2"),
        "S1GRD": ("VV", "VH"),
    },
    class_names=("Sorghum", "Maize", "Rice", "Groundnut"),
    ignore_index=-1,
    has_times=True,
    mean={
        "S2L2A": (
            *(2031.16920682, 1961.43060316, 1979.41012191, 2145.66313603, 2700.28841168),
            *(3006.88002707, 2870.5346053, 3215.05569934, 2367.76517845, 1645.22422113),
        ),
        "S1GRD": (-9.44869226, -15.3094007),
    },
    std={
        "S2L2A": (
            *(2112.21251357, 2027.46443505, 2136.80409481, 2100.72540842, 2082.19262389),
            *(2142.97310584, 2071.28295354, 2152.28899028, 1334.5474462, 1059.03926125),
        ),
        "S1GRD": (4.10761933, 5.67646377),
    },
)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The patches of ``train``, ``val`` or ``test``."""
    if split not in SPLITS:
        raise ValueError(f"CropTypeMapping-SS has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = files.base(root, "southsudan")
    files.require(FACTS.title, root, ["list_eval_partition.csv", "npy", "truth"], SOURCE)
    where = os.path.join(root, "list_eval_partition.csv")
    with open(where, encoding="utf-8", newline="") as f:
        names = [f"southsudan_{int(row['id']):06d}" for row in csv.DictReader(f) if int(row["partition"]) == SPLITS.index(split)]
    samples = [Sample(name, *(os.path.join(root, folder, f"{name}.npz") for folder in ("npy", "truth"))) for name in names]
    files.check_present(((s.name, path) for s in samples for path in (s.inputs, s.target)), where)
    return Dataset(FACTS, split, tuple(s for s in samples if zipfile.is_zipfile(s.inputs)), read_inputs, read_target)


def read_inputs(sample: Sample) -> dict[str, np.ndarray]:
    """``{modality: [6, 64, 64, C]}``, the latest image first."""
    with np.load(sample.inputs) as stored:
        return {modality: _latest(stored[key][: len(FACTS.bands[modality])]) for modality, key in STORED.items()}


def _latest(series: np.ndarray) -> np.ndarray:
    """``[C, H, W, T]`` to ``[TIMES, H, W, C]``."""
    series = series[..., ::-1][..., :TIMES]
    filled = np.pad(series, [(0, 0)] * 3 + [(0, TIMES - series.shape[-1])])
    return np.ascontiguousarray(filled.transpose(3, 1, 2, 0), np.float32)


def read_target(sample: Sample) -> np.ndarray:
    """Classes from 0, -1 elsewhere."""
    with np.load(sample.target) as stored:
        crop = stored["truth"].astype(np.int32) - 1
    return np.where((crop >= 0) & (crop < FACTS.num_classes), crop, FACTS.ignore_index)
