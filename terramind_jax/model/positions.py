"""Fixed sine-cosine positions and PyTorch's bicubic resize (spec 2.3). Computed once with NumPy in float64, stored as float32."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

SEQUENCE_LENGTH = 512  # every 1-D buffer of the reference has this length, whatever the modality's max_tokens


def _sin_cos(position: np.ndarray, dim: int) -> np.ndarray:
    """[n] positions -> [n, dim]: sines of dim/2 frequencies, then their cosines."""
    angle = position[:, None] * 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


@functools.cache
def sincos_1d(length: int, dim: int) -> np.ndarray:
    """[length, dim] float32."""
    return _sin_cos(np.arange(length), dim).astype(np.float32)


@functools.cache
def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """[height * width, dim] float32, row-major: the first half of the channels encodes the row, the second the column."""
    rows, columns = (axis.ravel() for axis in np.meshgrid(np.arange(height), np.arange(width), indexing="ij"))
    return np.concatenate([_sin_cos(rows, dim // 2), _sin_cos(columns, dim // 2)], axis=1).astype(np.float32)


@functools.cache
def _bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] weights of one axis: the cubic convolution kernel with A = -0.75, borders clamped, no antialias."""
    a = -0.75
    source = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    base = np.floor(source)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        x = np.abs(source - (base + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = np.clip(base + tap, 0, size_in - 1).astype(int)
        np.add.at(matrix, (np.arange(size_out), index), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def resize_bicubic(grid, size: tuple[int, int]):
    """``[h, w, D]`` -> ``[*size, D]`` as PyTorch's ``interpolate(mode="bicubic", align_corners=False)``; the identity when sizes agree.

    ``jax.image.resize`` uses another kernel, antialiases and renormalises, so it gives other numbers.
    """
    if grid.shape[:2] == tuple(size):
        return grid
    rows, columns = (_bicubic_matrix(n, m) for n, m in zip(grid.shape[:2], size, strict=True))
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, grid, precision="highest")
