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

_STEPS = (0.7548776662, 0.6180339887, 0.5698402910, 0.8812714616, 0.7766393890, 0.6844301295, 0.6031687406, 0.5315553977)


def stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """The counter-based generator of one scene and purpose."""
    word = (PURPOSES.index(purpose) << 56) | (SPLITS.index(split) << 48) | index
    return np.random.Generator(np.random.Philox(key=np.array([seed, word], np.uint64)))


def quasi_uniform(seed: int, split: str, index: int) -> np.ndarray:
    """``[8]`` numbers in (0, 1), evenly spread over consecutive scenes, so that few scenes already have the world's statistics.

    Additive sequences of irrational steps, shifted by the seed; the second number, on which the heaviest tails hang, has the most
    even one, the golden ratio.
    """
    shift = np.random.Generator(np.random.Philox(key=np.array([seed, SPLITS.index(split)], np.uint64))).random(8)
    return np.clip((shift + (index + 1) * np.array(_STEPS)) % 1.0, 1e-4, 1 - 1e-4)


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


def _cubic(distance: float) -> float:
    """The cubic B-spline at `distance` cells."""
    d = abs(distance)
    return 2 / 3 - d * d * (1 - d / 2) if d < 1 else max(2 - d, 0) ** 3 / 6


# Weights of the five cells around each of a cell's pixels. Plain sums, no BLAS: the same bits whatever the number of threads.
_WEIGHTS = [[_cubic((r + 0.5) / CELL - 0.5 - k) for k in range(-2, 3)] for r in range(CELL)]


def _refine(x: np.ndarray) -> np.ndarray:
    n = len(x)
    padded = np.pad(x, ((2, 2), (0, 0)), mode="edge")
    out = np.empty((n, CELL, x.shape[1]), np.float32)
    for r, weights in enumerate(_WEIGHTS):
        out[:, r] = sum(padded[k : k + n] * np.float32(w) for k, w in enumerate(weights) if w)
    return out.reshape(n * CELL, -1)


def upsample(coarse: np.ndarray, size: int, wide: bool = False) -> np.ndarray:
    """Coarse grid -> ``[size, size]`` pixels by cubic B-splines (smoothing); `wide` keeps the margin."""
    rows = _refine(coarse.astype(np.float32))
    pixels = np.ascontiguousarray(_refine(np.ascontiguousarray(rows.T)).T)
    start, stop = (0, size + 2 * MARGIN) if wide else (MARGIN, MARGIN + size)
    return pixels[start:stop, start:stop]


def smooth_field(rng: np.random.Generator, size: int, scale: float, slope: float = 1.6) -> np.ndarray:
    """``[size, size]`` field of unit variance whose objects measure about `scale` pixels and more."""
    return upsample(fractal(rng, coarse_size(size), slope, shortest=scale / CELL), size)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def normal_quantile(u: float) -> float:
    """The standard normal quantile at `u` in (0, 1)."""
    return statistics.NormalDist().inv_cdf(float(u))
