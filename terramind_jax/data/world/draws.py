"""Random streams and smooth random fields: every draw is keyed by (seed, split, scene, purpose), so nothing depends on order."""

from __future__ import annotations

import functools
import statistics

import numpy as np

SPLITS = ("train", "val")
PURPOSES = ("place", "terrain", "cover", "clouds", "optics", "radar")
MARGIN = 28  # pixels around the scene that shadows may come from
CELL = 4  # pixels a coarse cell
PIXEL = 10.0  # metres
_DIMENSIONS = 8


def stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """The counter-based generator of one scene and purpose."""
    word = (PURPOSES.index(purpose) << 56) | (SPLITS.index(split) << 48) | index
    return np.random.Generator(np.random.Philox(key=np.array([seed, word], np.uint64)))


def quasi_uniform(seed: int, split: str, index: int) -> np.ndarray:
    """``[8]`` numbers in (0, 1), evenly spread over consecutive scenes, so that few scenes already have the world's statistics.

    The additive sequence of the generalised golden ratio (the root of x^9 = x + 1), shifted by the seed.
    """
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (_DIMENSIONS + 1))
    steps = ratio ** -np.arange(1.0, _DIMENSIONS + 1)
    shift = np.random.Generator(np.random.Philox(key=np.array([seed, SPLITS.index(split)], np.uint64))).random(_DIMENSIONS)
    return np.clip((shift + (index + 1) * steps) % 1.0, 1e-4, 1 - 1e-4)


@functools.lru_cache(maxsize=64)
def _spectrum(n: int, slope: float, shortest: float) -> np.ndarray:
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :]
    f = np.hypot(fy, fx)
    f[0, 0] = 1.0
    amplitude = f**-slope * np.exp(-((f * shortest) ** 2))
    amplitude[0, 0] = 0.0
    return amplitude.astype(np.float32)


def fractal(rng: np.random.Generator, n: int, slope: float = 1.8, shortest: float = 0.0) -> np.ndarray:
    """``[n, n]`` float32 field of zero mean and unit variance with amplitude ``f**-slope``, smooth below `shortest` pixels."""
    amplitude = _spectrum(n, slope, shortest)
    phase = rng.standard_normal((*amplitude.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = np.fft.irfft2(phase * amplitude, s=(n, n)).astype(np.float32)
    return field / field.std()


def coarse_size(size: int) -> int:
    """Cells on a side of the coarse grid that covers a scene of `size` pixels and its margin."""
    return -(-(size + 2 * MARGIN) // CELL)


@functools.lru_cache(maxsize=8)
def _spline(size: int, wide: bool) -> np.ndarray:
    n, margin = coarse_size(size), MARGIN if wide else 0
    pixels = np.arange(-margin, size + margin) + MARGIN
    position = (pixels + 0.5) / CELL - 0.5
    distance = np.abs(position[:, None] - np.arange(-1, n + 1)[None, :])
    weight = np.where(distance < 1, 2 / 3 - distance**2 * (1 - distance / 2), np.clip(2 - distance, 0, None) ** 3 / 6)
    weight[:, 1] += weight[:, 0]  # repeat the border cells
    weight[:, -2] += weight[:, -1]
    return np.ascontiguousarray(weight[:, 1:-1], np.float32)


def upsample(coarse: np.ndarray, size: int, wide: bool = False) -> np.ndarray:
    """Coarse grid -> ``[size, size]`` pixels by cubic B-splines (smoothing); `wide` keeps the margin."""
    w = _spline(size, wide)
    return w @ coarse.astype(np.float32) @ w.T


def smooth_field(rng: np.random.Generator, size: int, scale: float, slope: float = 1.6) -> np.ndarray:
    """``[size, size]`` field of unit variance whose objects measure about `scale` pixels and more."""
    return upsample(fractal(rng, coarse_size(size), slope, shortest=scale / CELL), size)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def normal_quantile(u: float) -> float:
    """The standard normal quantile at `u` in (0, 1)."""
    return statistics.NormalDist().inv_cdf(float(u))
