"""Overlapping windows of a scene: where they lie, which one decides on a token, how their pixels are blended. NumPy only.

A scene lies on a grid of patches. Windows are squares of `size` patches; the last ones of a row or column are shifted back to the edge.
Scenes that are done together lie side by side on one grid, and no window reaches from one into another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from terramind_jax.modalities import PATCH_SIZE

Tile = tuple[int, int, np.ndarray]  # sample, first pixel column, and pixels [L, L, C] of a window


@dataclasses.dataclass(frozen=True)
class Cut:
    """How scenes are cut: windows of `size` patches, neighbours sharing at least `overlap`, at these first `rows` and `columns`.

    `origins` are the first columns of the scenes in which the windows of each of the `columns` lie: 0 where there is one scene.
    """

    size: int
    overlap: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    origins: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows[-1] + self.size, self.columns[-1] + self.size

    def window(self, i: int, j: int) -> tuple[slice, slice]:
        """The patches of one window."""
        return slice(self.rows[i], self.rows[i] + self.size), slice(self.columns[j], self.columns[j] + self.size)

    def at(self, i: int, js: Sequence[int]) -> np.ndarray:
        """``[B, 2]``: row and column in its scene of the first patch of some windows of a row."""
        return np.array([(self.rows[i], self.columns[j] - self.origins[j]) for j in js], np.int32)


def cut(grid: tuple[int, int], size: int, overlap: int) -> Cut:
    """Windows of `size` patches over a grid that is not smaller, sharing at least `overlap` pixels; a ValueError if it cannot be."""
    pixels = size * PATCH_SIZE
    if overlap % PATCH_SIZE or not 0 <= overlap < pixels:
        raise ValueError(f"The overlap is {overlap} pixels; expected a multiple of {PATCH_SIZE} below the window's {pixels}.")
    overlap //= PATCH_SIZE
    rows, columns = ((*range(0, n - size, size - overlap), n - size) for n in grid)
    return Cut(size, overlap, rows, columns, (0,) * len(columns))


def side_by_side(cuts: Sequence[Cut]) -> Cut:
    """Scenes that are cut at the same rows, as one."""
    columns, origins, origin = [], [], 0
    for c in cuts:
        columns += [origin + column for column in c.columns]
        origins += [origin] * len(c.columns)
        origin += c.grid[1]
    return dataclasses.replace(cuts[0], columns=tuple(columns), origins=tuple(origins))


def owners(c: Cut, live: np.ndarray) -> np.ndarray:
    """Which window decides on each patch: ``[h, w]`` int32, its index row by row, -1 where no window is.

    That is the live window in whose middle the patch lies most nearly, the first of equals. `live` is ``[rows, columns]`` bool.
    """
    nearest, owner = np.full(c.grid, np.inf, np.float32), np.full(c.grid, -1, np.int32)
    away = np.abs(np.arange(c.size) - (c.size - 1) / 2)
    distance = np.hypot(away[:, None], away).astype(np.float32)
    for i, j in np.argwhere(live):
        part = np.s_[c.rows[i] : c.rows[i] + c.size, c.columns[j] : c.columns[j] + c.size]
        nearer = distance < nearest[part]
        nearest[part][nearer] = distance[nearer]
        owner[part][nearer] = i * len(c.columns) + j
    return owner


def weights(length: int, overlap: int) -> np.ndarray:
    """``[length, length]`` float32 weights of a window's pixels: a raised cosine over the `overlap` pixels at each edge, 1 inside.

    `blend` divides by their sum, so that they add up to one wherever windows lie.
    """
    edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    ramp = np.sin(np.pi / 2 * np.minimum(1, edge / max(overlap, 0.5))) ** 2
    return (ramp[:, None] * ramp).astype(np.float32)


def blend(rows: Iterable[tuple[int, int, Iterable[Tile]]], weight: np.ndarray, shape: tuple[int, int, int]) -> Iterator:
    """Joins windows, row of windows by row of windows: yields ``(first pixel row, [K, n, W, C] float32)`` of what no later window touches.

    Pixels under no window are NaN. Only one row of windows is held in memory. The K samples have the same windows.

    Args:
      rows: ``(first pixel row, that of the next row of windows, windows)``; of the last row the second is the end of the scene.
      weight: of `weights`, ``[L, L]``.
      shape: (K, W, C) of what comes out.
    """
    length, (k, width, channels) = len(weight), shape
    total, summed = np.zeros((k, length, width, channels), np.float32), np.zeros((length, width, 1), np.float32)
    for top, bottom, tiles in rows:
        for sample, left, tile in tiles:
            part = np.s_[:, left : left + length]
            total[sample][part] += weight[..., None] * tile
            if sample == 0:
                summed[part] += weight[..., None]
        n = bottom - top
        with np.errstate(invalid="ignore", divide="ignore"):
            yield top, total[:, :n] / summed[:n]
        for buffer in (*total, summed):
            buffer[: length - n] = buffer[n:].copy()
            buffer[length - n :] = 0


def joined(c: Cut, unit: int, tiles: Callable[[int], Iterable[Tile]], shape: tuple[int, int, int], done: int = 0) -> Iterator:
    """`blend` from the row of windows `done` on: yields ``(i, first row, [K, n, W, C])``, bit for bit as if it had begun at the first.

    What is final of a row of windows also depends on those before it that reach into it; these are made again.

    Args:
      unit: pixels of what comes out along a patch: 16 of images, 1 of features.
      tiles: the windows of row `i`, their columns counted in those pixels.
    """
    tops = [*(row * unit for row in c.rows), c.grid[0] * unit]
    again = [i for i in range(done) if tops[i] + c.size * unit > tops[done]] if done < len(c.rows) else []
    todo = [*again, *range(done, len(c.rows))]
    rows = ((tops[i], tops[i + 1], tiles(i)) for i in todo)
    overlap = c.overlap * unit
    for i, (top, pixels) in zip(todo, blend(rows, weights(c.size * unit, overlap), shape), strict=True):
        if i >= done:
            yield i, top, pixels
