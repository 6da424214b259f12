"""Downstream data sets: `load` opens a published one by name, or a user's own, told in the fields of `generic.dataset`.

floods = datasets.load("sen1floods11", "data/sen1floods11", "train")
floods[0]["inputs"]["S2L1C"], floods[0]["target"]      # [512, 512, 13] float32, [512, 512] int32
"""

from __future__ import annotations

import os

from terramind_jax.tasks.datasets import ai4smallfarms, burnscars, eurosat, generic, mados, pangaea, pastis, sen1floods11
from terramind_jax.tasks.datasets.dataset import SPLITS, TASKS, Dataset, Facts, Sample, check_class_map, class_counts, statistics, strata

OTHERS = {"generic": generic, "pangaea": pangaea}
PUBLISHED = {
    "sen1floods11": sen1floods11,
    "burnscars": burnscars,
    "mados": mados,
    "pastis": pastis,
    "eurosat": eurosat,
    "ai4smallfarms": ai4smallfarms,
}

__all__ = [
    "PUBLISHED",
    "SPLITS",
    "TASKS",
    "Dataset",
    "Facts",
    "Sample",
    "check",
    "check_class_map",
    "class_counts",
    "facts",
    "load",
    "statistics",
    "strata",
]


def load(name: str, root: str | os.PathLike, split: str = "train", **options) -> Dataset:
    """A split of the published data set `name` in `root`, with ``"generic"`` of one that `options` describe, or with ``"pangaea"`` of a
    published one as that benchmark gives it to TerraMind.

    Raises ValueError for unknown names and empty splits, FileNotFoundError in one sentence for what is not there.
    """
    return (OTHERS.get(name) or _published(name)).dataset(root, split, **options)


def facts(name: str, **options) -> Facts:
    """What `load` would say of the data set, without its files."""
    return generic.facts(**options) if name == "generic" else _published(name).FACTS


def check(name: str, root: str | os.PathLike) -> None:
    """Raises a FileNotFoundError that tells what of a published data set is not in `root`, and where to get it."""
    _published(name).check(root)


def _published(name: str):
    if name not in PUBLISHED:
        raise ValueError(f"There is no data set {name!r}; known are {', '.join(PUBLISHED)}, and generic for your own.")
    return PUBLISHED[name]
