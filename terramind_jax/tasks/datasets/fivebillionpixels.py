"""Five-Billion-Pixels (Tong et al. 2023) as PANGAEA reads it: 24 classes of land cover on Gaofen-2 at 4 m, in tiles of 520 pixels.

    {train,val,test}/images/TILE.tif     uint8, near infrared, red, green, blue
    {train,val,test}/labels/TILE.tif     0: no label, 1-24: classes

Its publishers have whole scenes without splits: PANGAEA's authors have cut them, without overlap, and parted them, but not published how.
A label may also be called TILE and something more, such as ``TILE_24label.tif``. Values are no reflectance, so that only the statistics
here fit them.
"""

from __future__ import annotations

import os

from terramind_jax.tasks.datasets import generic
from terramind_jax.tasks.datasets.dataset import SPLITS, Dataset

SOURCE = "https://x-ytong.github.io/project/Five-Billion-Pixels.html (8-bit scenes, to be cut into tiles and parted)"
BANDS = ("NIR_BROAD", "RED", "GREEN", "BLUE")
CLASSES = (
    *("unlabeled", "industrial area", "paddy field", "irrigated field", "dry cropland", "garden land", "arbor forest", "shrub forest"),
    *("park", "natural meadow", "artificial meadow", "river", "urban residential", "lake", "pond", "fish pond", "snow", "bareland"),
    *("rural residential", "stadium", "square", "road", "overpass", "railway station", "airport"),
)
_IMAGES, _LABELS = ({"folder": {split: f"{split}/{kind}" for split in SPLITS}, "pattern": "*.tif"} for kind in ("images", "labels"))

# What `generic.dataset` is told. Classes, of which the first does not count, mean and standard deviation: PANGAEA,
# configs/dataset/fivebillionpixels.yaml.
FIELDS = dict(
    title="FiveBillionPixels",
    source=SOURCE,
    images={"S2L2A": {**_IMAGES, "bands": BANDS, "mean": (92.6, 124.3, 94.2, 98.0), "std": (44.5, 51.0, 50.0, 47.1)}},
    labels=_LABELS,
    class_names=CLASSES,
    ignore_index=0,
)
FACTS = generic.facts(**FIELDS)


def dataset(root: str | os.PathLike, split: str = "train") -> Dataset:
    """The tiles of ``train``, ``val`` or ``test``."""
    return generic.dataset(root, split, **FIELDS)
