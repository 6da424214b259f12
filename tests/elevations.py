"""Rasters of elevation for the tests of scenes, and a folder of them of which one cannot be read."""

import numpy as np
import pytest

from terramind_jax import geo

PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 100, 59)

with_a_bad_raster = pytest.mark.parametrize(
    "how, message", [("cut", "b.tif is damaged or truncated"), ("empty", "b.tif is empty: none of its pixels has data")]
)


def elevation(path, height=100, width=59, seed=0, hole=None):
    """Writes a GeoTIFF of whole metres, NaN in the `hole`; its pixels ``[height, width, 1]``."""
    array = np.random.default_rng(seed).integers(0, 2000, (height, width, 1)).astype(np.float32)
    if hole is not None:
        array[hole] = np.nan
    path.parent.mkdir(exist_ok=True)
    geo.write(path, array, like=geo.Place(PLACE.crs, PLACE.transform, height, width))
    return array


def folder_with_a_bad_raster(folder, how):
    """``a.tif`` and ``b.tif``, which is cut short or has no data; the path of the latter."""
    elevation(folder / "a.tif")
    bad = folder / "b.tif"
    elevation(bad, hole=np.s_[:] if how == "empty" else None)
    if how == "cut":
        bad.write_bytes(bad.read_bytes()[:-100])
    return bad
