"""PASTIS-R (Garnot et al. 2022): crops of parcels in France, from a year of Sentinel-2 L2A and of Sentinel-1, 128 pixels.

    metadata.geojson                     features with ID_PATCH, Fold (1-5), dates-S2, dates-S1A and dates-S1D: {"0": 20180924, ...}
    DATA_S2/S2_ID.npy                    int16 [T, 10, 128, 128], reflectance x 10000
    DATA_S1A/S1A_ID.npy                  [T, 3, 128, 128], VV, VH and VV - VH in dB, ascending orbits; DATA_S1D descending ones
    ANNOTATIONS/TARGET_ID.npy            [3, 128, 128], of which the first is the class: 0 background ... 19 void

Folds 1-3 train, 4 validates and 5 tests, as in PANGAEA; void pixels do not count. PANGAEA first draws 50 of a series that is longer, in
random order; here the times are evenly spaced over all of it.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Mapping

import numpy as np

from terramind_jax.tasks.datasets import files
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://zenodo.org/records/5735646 (PASTIS-R.zip)"
FOLDS = {"train": (1, 2, 3), "val": (4,), "test": (5,)}
REFERENCE_DATE = datetime.date(2018, 9, 1)
TIMES = 6  # PANGAEA's
STORED = {"S2L2A": "S2", "S1GRD": "S1A"}
BANDS = {
    "S2L2A": ("BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW", "SWIR_1", "SWIR_2"),
    "S1GRD": ("VV", "VH"),
}
PLANES = {"S2L2A": BANDS["S2L2A"], "S1GRD": ("VV", "VH", "VV-VH")}  # what the files hold

# Mean and standard deviation: PANGAEA, configs/dataset/pastis.yaml.
FACTS = Facts(
    title="PASTIS-R",
    task="segmentation",
    bands=BANDS,
    class_names=(
        *("Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed", "Spring barley", "Sunflower"),
        *("Grapevine", "Beet", "Winter triticale", "Winter durum wheat", "Fruits, vegetables, flowers", "Potatoes"),
        *("Leguminous fodder", "Soybeans", "Orchard", "Mixed cereal", "Sorghum", "Void label"),
    ),
    ignore_index=19,
    has_times=True,
    mean={
        "S2L2A": (1161.6764, 1371.4307, 1423.4067, 1759.7251, 2714.5259, 3055.8376, 3197.8960, 3313.3577, 2415.9675, 1626.8431),
        "S1GRD": (-10.9433, -17.3600),
    },
    std={
        "S2L2A": (2045.0698, 1983.1763, 2060.7969, 1968.8173, 1867.2159, 1885.1361, 1897.5105, 1885.1636, 1542.7665, 1375.2511),
        "S1GRD": (3.3847, 3.3727),
    },
)


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    parts = ["metadata.geojson", "DATA_S2", "DATA_S1A", "ANNOTATIONS"]
    files.require(FACTS.title, files.base(root, "PASTIS-R"), parts, SOURCE)


def dataset(root: str | os.PathLike, split: str = "train", *, times: int = TIMES) -> Dataset:
    """The patches of ``train``, ``val`` or ``test``, each modality's series as `times` images evenly spaced over it."""
    check(root)
    if split not in SPLITS:
        raise ValueError(f"PASTIS-R has no split {split!r}; it has {', '.join(SPLITS)}.")
    if times < 1:
        raise ValueError(f"PASTIS-R was asked for {times} times of each series; expected at least 1.")
    root = files.base(root, "PASTIS-R")
    where = os.path.join(root, "metadata.geojson")
    with open(where, encoding="utf-8") as f:
        patches = [feature["properties"] for feature in json.load(f)["features"]]
    samples = tuple(_sample(root, patch, times) for patch in patches if patch["Fold"] in FOLDS[split])
    files.check_present(((s.name, p) for s in samples for p in (*s.inputs.values(), s.target)), where)
    return Dataset(FACTS, split, samples, functools.partial(read_inputs, times=times), read_target)


def read_inputs(sample: Sample, *, times: int) -> dict[str, np.ndarray]:
    """``{modality: [times, H, W, C]}``; of a file only those times are read."""
    return {modality: _read_series(path, modality, times) for modality, path in sample.inputs.items()}


def _read_series(path: str, modality: str, times: int) -> np.ndarray:
    series = files.map_npy(path)
    if series.ndim != 4 or series.shape[1] != len(PLANES[modality]):
        raise ValueError(f"{path} has shape {series.shape}, expected [T, {len(PLANES[modality])}, H, W] ({', '.join(PLANES[modality])}).")
    chosen = series[spaced(len(series), times)][:, : len(BANDS[modality])]
    return np.ascontiguousarray(np.moveaxis(chosen, 1, -1), np.float32)


def read_target(sample: Sample) -> np.ndarray:
    """Classes ``[H, W]``."""
    return files.map_npy(sample.target)[0].astype(np.int32)


def spaced(length: int, times: int) -> np.ndarray:
    """`times` places in a series from its first to its last, rounded down; of a single one, the last."""
    return np.linspace(0, length - 1, times).astype(np.int64) if times > 1 else np.array([length - 1])


def _sample(root: str, patch: Mapping, times: int) -> Sample:
    name = str(patch["ID_PATCH"])
    inputs = {m: os.path.join(root, f"DATA_{stored}", f"{stored}_{name}.npy") for m, stored in STORED.items()}
    dates = {m: _days(patch[f"dates-{stored}"], times) for m, stored in STORED.items()}
    return Sample(name, inputs, os.path.join(root, "ANNOTATIONS", f"TARGET_{name}.npy"), dates)


def _days(dates: Mapping[str, int] | str, times: int) -> np.ndarray:
    """Days since the reference date of the chosen images."""
    dates = json.loads(dates) if isinstance(dates, str) else dates
    found = [datetime.datetime.strptime(str(dates[key]), "%Y%m%d").date() for key in sorted(dates, key=int)]
    return np.array([(found[i] - REFERENCE_DATE).days for i in spaced(len(found), times)], np.int32)
