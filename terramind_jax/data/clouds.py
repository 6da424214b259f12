"""What TerraMesh's Sentinel-2 modalities tell of clouds: the array ``cloud_mask`` ``[y, x]`` beside their bands; what is clear."""

from __future__ import annotations

import numpy as np

NAME = "cloud_mask"

# Its codes, as SEnSeI v2 gives them (arXiv 2504.11172).
LAND, OPEN_WATER, SNOW, THIN_CLOUD, THICK_CLOUD, CLOUD_SHADOW, NO_DATA = range(7)
CLEAR = (LAND, OPEN_WATER, SNOW)


def has_mask(modality: str) -> bool:
    """Whether samples of a modality may carry a mask."""
    return modality.startswith("S2")


def clear(mask: np.ndarray) -> np.ndarray:
    """Bool, where neither cloud, shadow nor missing data hides the ground."""
    return np.isin(mask, CLEAR)
