"""AI4SmallFarms (Persello et al. 2023): the fields of small farms in Vietnam and Cambodia on tiles of Sentinel-2, about 500 pixels a side.

    sentinel-2-asia/{train,validate,test}/images/TILE.tif     blue, green, red and near infrared, reflectance x 10000
    sentinel-2-asia/{train,validate,test}/masks/TILE.tif      0: other, 255: field

``validate`` may also be called ``val``, as PANGAEA's download has it.
"""

from __future__ import annotations

import os
from typing import Any

from terramind_jax.tasks.datasets import files, generic
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset

SOURCE = "https://doi.org/10.17026/dans-xy6-ngg6"
BASE = "sentinel-2-asia"
BANDS = ("BLUE", "GREEN", "RED", "NIR_BROAD")


def fields(validation: str = "validate") -> dict[str, Any]:
    """What `generic.dataset` is told of it; `validation` is what the folder of that split is called.

    Mean and standard deviation: PANGAEA, configs/dataset/ai4smallfarms.yaml; codes of the masks: its pangaea/datasets/ai4smallfarms.py.
    """
    parts = {"train": "train", "val": validation, "test": "test"}
    images, masks = ({split: f"{BASE}/{part}/{kind}" for split, part in parts.items()} for kind in ("images", "masks"))
    mean, std = (750.2136, 1032.7277, 1165.1279, 2416.0448), (283.3842, 332.7280, 518.9025, 702.3791)
    return dict(
        title="AI4SmallFarms",
        source=SOURCE,
        images={"S2L2A": {"folder": images, "pattern": "*.tif", "bands": BANDS, "mean": mean, "std": std}},
        labels={"folder": masks, "pattern": "*.tif", "codes": (0, 255)},
        class_names=("other", "field"),
        ignore_index=-1,
    )


FACTS = generic.facts(**fields())


def check(root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what is not there and where to get it."""
    images, masks = (_fields(root)[what] for what in ("images", "labels"))
    parts = [*images["S2L2A"]["folder"].values(), *masks["folder"].values()]
    files.require(FACTS.title, os.fspath(root), parts, SOURCE)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The tiles of ``train``, ``val`` or ``test``."""
    if split not in SPLITS:
        raise ValueError(f"{FACTS.title} has no split {split!r}; it has {', '.join(SPLITS)}.")
    return generic.dataset(root, split, **_fields(root))


def _fields(root: str | os.PathLike) -> dict[str, Any]:
    return fields("val" if os.path.isdir(os.path.join(root, BASE, "val")) else "validate")
