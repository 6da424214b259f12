"""HLS Burn Scars (Phillips et al. 2023): 804 scenes of 512 pixels of 30 m, six bands of Harmonized Landsat Sentinel-2.

    training/subsetted_512x512_HLS.S30.TILE.DATE.v1.4_merged.tif     float32, reflectance 0-1
             subsetted_512x512_HLS.S30.TILE.DATE.v1.4.mask.tif       int16, -1: no data, 0: not burned, 1: burned
    validation/                                                      the same

PANGAEA trains on nine tenths of ``training``, validates on the tenth, and tests on ``validation``. The TerraMind repository's
configuration expects all files in ``data/`` and NAMEs in ``splits/{train,val,test}.txt``, which is read as well.
"""

from __future__ import annotations

import functools
import math
import os

import numpy as np

from terramind_jax.tasks.datasets import files, generic
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset, Facts, Sample

SOURCE = "https://huggingface.co/datasets/ibm-nasa-geospatial/hls_burn_scars (hls_burn_scars.tar.gz)"
BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
IMAGE, MASK = "*_merged.tif", "*.mask.tif"
MISSING = (9999.0, -9999.0)  # what PANGAEA and the authors' own configuration take for no data
SCALE = 10_000.0

# Mean and standard deviation: PANGAEA, configs/dataset/hlsburnscars.yaml, times 10000.
FACTS = Facts(
    title="HLS Burn Scars",
    task="segmentation",
    bands={"S2L2A": BANDS},
    class_names=("not burned", "burn scar"),
    ignore_index=-1,
    mean={"S2L2A": (333.49706741586264, 570.1185520536176, 588.9748132001316, 2323.245113436119, 1972.854853760658, 1194.4914225186566)},
    std={"S2L2A": (226.9135568823774, 268.07560223070237, 400.4109844362779, 779.1733242672691, 870.8738838140137, 724.1979477437814)},
    files={"S2L2A": files.bands("S2L2A", BANDS, scale=SCALE, missing=MISSING)},
)


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    root = files.base(root, "hls_burn_scars")
    files.require(FACTS.title, root, ["splits"] if _has_splits(root) else ["training", "validation"], SOURCE)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The scenes of ``train``, ``val`` or ``test``."""
    check(root)
    if split not in SPLITS:
        raise ValueError(f"HLS Burn Scars has no split {split!r}; it has {', '.join(SPLITS)}.")
    root = files.base(root, "hls_burn_scars")
    if _has_splits(root):
        where, folder = os.path.join(root, "splits", f"{split}.txt"), os.path.join(root, "data")
        names = [files.name_of(name, IMAGE) or name for name in files.split_names(where)]
    else:
        where = folder = os.path.join(root, "validation" if split == "test" else "training")
        names = files.names_in(folder, IMAGE)
        names = names if split == "test" else tenth(names, held_out=split == "val")
    paths = {name: [files.path_of(folder, pattern, name) for pattern in (IMAGE, MASK)] for name in names}
    files.check_present(((name, path) for name, both in paths.items() for path in both), where)
    samples = tuple(Sample(name, {"S2L2A": image}, mask) for name, (image, mask) in paths.items())
    read_target = functools.partial(generic.read_map, task=FACTS.task, ignore_index=FACTS.ignore_index)
    return Dataset(FACTS, split, samples, functools.partial(generic.read_images, FACTS.files), read_target)


def tenth(names: list[str], *, held_out: bool) -> list[str]:
    """PANGAEA's division of the training scenes, that of scikit-learn's ``train_test_split(test_size=0.1, random_state=23)``."""
    order = np.random.RandomState(23).permutation(len(names))
    count = math.ceil(0.1 * len(names))
    return [names[i] for i in (order[:count] if held_out else order[count:])]


def _has_splits(root: str) -> bool:
    return os.path.isdir(os.path.join(root, "data"))
