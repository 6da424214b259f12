"""HLS Multi-Temporal Crop Classification (Cecil et al. 2023): crops and land cover of the United States in 2022, in three images a chip.

As published (https://huggingface.co/datasets/ibm-nasa-geospatial/multi-temporal-crop-classification), it is a generic data set:

    {training,validation}_chips/CHIP_merged.tif    18 bands, six of each of three days, reflectance x 10000, 224 pixels of 30 m
    {training,validation}_chips/CHIP.mask.tif      0: no data, 1-13: the classes
    {training,validation}_data.txt                 a CHIP a line

Statistics are those of TerraTorch's MultiTemporalCropClassificationDataModule.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from terramind_jax.tasks.datasets import files

BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
MEAN = (494.905781, 815.239594, 924.335066, 2968.881459, 2634.621962, 1739.579917)
STD = (284.925432, 357.84876, 575.566823, 896.601013, 951.900334, 921.407808)
TIMES = 3
CLASSES = (
    *("Natural Vegetation", "Forest", "Corn", "Soybeans", "Wetlands", "Developed / Barren", "Open Water", "Winter Wheat", "Alfalfa"),
    *("Fallow / Idle Cropland", "Cotton", "Sorghum", "Other"),
)
SPLITS = {"train": "training", "val": "validation"}  # there is no other


def options(
    root: str = "", *, modality: str = "S2L2A", bands: Sequence[str] = BANDS, zero_is_none: bool = True, replace: float = 0.0
) -> dict[str, Any]:
    """Fields of `generic.dataset`, whose `root` is that of `root`; the images are series of `modality` with `bands`.

    Without `zero_is_none` the stored 0, no data, is the first class. Raises ValueError for bands that the files do not have.
    """
    bands = files.bands(modality, BANDS, bands).use
    chips = {split: posixpath.join(root, f"{name}_chips") for split, name in SPLITS.items()}
    own = {"mean": tuple(MEAN[BANDS.index(b)] for b in bands), "std": tuple(STD[BANDS.index(b)] for b in bands)}
    image = {"folder": chips, "pattern": "*_merged.tif", "bands": BANDS, "use": bands, "times": TIMES, "replace": replace, **own}
    return dict(
        title="Multi-Temporal Crop Classification",
        images={modality: image},
        labels={"folder": chips, "pattern": "*.mask.tif", "zero_is_none": zero_is_none},
        splits={split: posixpath.join(root, f"{name}_data.txt") for split, name in SPLITS.items()},
        class_names=CLASSES if zero_is_none else ("No Data", *CLASSES),
        ignore_index=-1,
    )
