"""What the copies of several data sets are made of: scenes of the embedded world, what is painted onto them, and how files are written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import rasterio

from terramind_jax import geo
from terramind_jax.data import world
from terramind_jax.modalities import S2L2A_BANDS

WATER, CROPS, CLOUDS = 1, 4, 8  # LULC codes
# Of a season on the bands of PASTIS-R, and on six of HLS.
EFFECT_OF_TEN, EFFECT_OF_SIX = (0, 0, -0.3, -0.1, 0.1, 0.3, 0.4, 0.4, 0, -0.1), (0, 0, -0.3, 0.4, 0, -0.1)


def scenes(seed: int, size: int, sar: bool = False) -> Iterator[world.Scene]:
    """Scenes at least `size` pixels wide, without end; with `sar` those that have Sentinel-1 GRD."""
    index = 1
    while True:
        yield world.scene(seed, index, "train", max(48, -(-size // 6) * 6))
        index += 2 if sar else 1


def degrees(scene: world.Scene, size: int) -> geo.Place:
    """A grid of 10 m, at the equator, in degrees."""
    step = 8.983152841195215e-05
    return geo.Place("EPSG:4326", (step, 0.0, scene.lon, 0.0, -step, scene.lat), size, size)


def metres(scene: world.Scene, size: int, pixel: float = 10.0) -> geo.Place:
    return geo.Place(geo.utm(scene.lon, scene.lat), (pixel, 0.0, 500_000.0, 0.0, -pixel, 100_000.0), size, size)


def optical(scene: world.Scene, size: int, bands: tuple[str, ...]) -> np.ndarray:
    """Reflectance x 10000 of L2A, without the offset of stored values, ``[size, size, C]`` float32."""
    array = scene.arrays["S2L2A"][:size, :size].astype(np.float32) - scene.offsets.get("S2L2A", 0)
    return np.maximum(array[..., [S2L2A_BANDS.index(b) for b in bands]], 1)


def disc(rng: np.random.Generator, size: int) -> np.ndarray:
    row, column = rng.uniform(0.3, 0.7, 2) * size
    y, x = np.mgrid[:size, :size]
    return np.hypot(y - row, x - column) < rng.uniform(0.15, 0.3) * size


def squares(values: np.ndarray, size: int) -> np.ndarray:
    """``[size, size]`` with a square for each of ``[12, 12]`` values, together half as wide, and zeros around."""
    cell = max(1, size // 24)
    return np.pad(np.kron(values, np.ones((cell, cell), values.dtype)), [(0, size - 12 * cell)] * 2)


def seasons(optical: np.ndarray, green: np.ndarray, effect: Sequence[float] = EFFECT_OF_TEN) -> np.ndarray:
    """``[T, C, H, W]`` int16: the near infrared rises and red falls with the green."""
    series = optical[None] * (1 + np.float32(effect) * green[..., None])
    return np.moveaxis(series, -1, 1).round().astype(np.int16)


def backscatter(radar: np.ndarray, green: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``[T, 3, H, W]`` float16: VV, VH and their difference in dB."""
    series = radar[None] + np.float32([0.5, 1.5]) * green[..., None] + rng.normal(0, 0.5, (*green.shape, 2))
    return np.moveaxis(np.concatenate([series, series[..., :1] - series[..., 1:]], -1), -1, 1).astype(np.float16)


def save(path: str, array: np.ndarray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    np.save(path, array)


def write_lines(path: str, lines: list[str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")


def write_png(path: str, pixels: np.ndarray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    height, width, count = pixels.shape
    with rasterio.open(path, "w", driver="PNG", height=height, width=width, count=count, dtype="uint8") as target:
        target.write(np.moveaxis(pixels, -1, 0).astype(np.uint8))
