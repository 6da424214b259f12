"""Fractal terrain with drainage: spectral relief, filled and routed on a coarse grid, cut by its own rivers, then refined.

Rivers follow the routed low ground, lakes fill its depressions, the sea covers what lies below zero.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq

import numpy as np

from terramind_jax.data.world import draws
from terramind_jax.data.world.draws import CELL, MARGIN, PIXEL
from terramind_jax.data.world.place import Place

_REACH = 13  # pixels around a river's line that are searched


@dataclasses.dataclass(frozen=True)
class Terrain:
    """Arrays ``[S, S]`` float32 unless said otherwise; `wide` has the margin on every side."""

    wide: np.ndarray  # elevation of the surface, metres
    elevation: np.ndarray
    slope: np.ndarray  # rise over run
    east: np.ndarray  # d elevation / d east
    north: np.ndarray
    above_river: np.ndarray  # metres above the stream that the pixel drains to
    river: np.ndarray  # bool
    lake: np.ndarray  # bool
    sea: np.ndarray  # bool
    bank: np.ndarray  # 1 at the water's edge, 0 a few pixels away


@functools.lru_cache(maxsize=4)
def _neighbours(n: int) -> list[tuple[int, ...]]:
    index = np.pad(np.arange(n * n).reshape(n, n), 1, constant_values=-1)
    shifts = [(0, 1), (1, 0), (1, 2), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    around = np.stack([index[r : r + n, c : c + n].ravel() for r, c in shifts], axis=1)
    return [tuple(int(j) for j in row if j >= 0) for row in around]


def flood(z: np.ndarray, outlets: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Priority flood of ``z [n, n]`` from the cells `outlets`: (filled [n*n], parent downstream, order from the outlets up).

    `step [n*n]` (positive, small) is how much a flooded cell lies above the next one; random steps make rivers wind over flats.
    """
    n = len(z)
    height, around, step = z.ravel().tolist(), _neighbours(n), step.tolist()
    parent, seen, order = [-1] * (n * n), [False] * (n * n), []
    heap = [(height[i], i) for i in outlets.tolist()]
    for _, i in heap:
        seen[i] = True
    heapq.heapify(heap)
    push, pop = heapq.heappush, heapq.heappop
    while heap:
        level, i = pop(heap)
        order.append(i)
        for j in around[i]:
            if not seen[j]:
                seen[j], parent[j] = True, i
                floor = level + step[j]
                if height[j] < floor:
                    height[j] = floor
                push(heap, (height[j], j))
    return np.array(height, np.float32), parent, order


def _carve(filled: np.ndarray, parent: list[int], order: list[int], inflow: tuple[int, float], rate: float, channel: float):
    """One implicit step of stream-power incision. Returns (height, flow in cells, height of the stream each cell drains to)."""
    flow = [1.0] * len(parent)
    flow[inflow[0]] += inflow[1]
    for i in reversed(order):
        if parent[i] >= 0:
            flow[parent[i]] += flow[i]
    height = filled.tolist()
    stream = height[:]
    power = (rate * np.sqrt(np.minimum(flow, 4000.0))).tolist()
    for i in order:
        p, f = parent[i], power[i]
        if p >= 0:
            height[i] = (height[i] + f * height[p]) / (1 + f)
            stream[i] = height[i] if flow[i] > channel else stream[p]
        else:
            stream[i] = height[i]
    return np.array(height, np.float32), np.array(flow, np.float32), np.array(stream, np.float32)


def _relief(rng: np.random.Generator, place: Place, n: int) -> np.ndarray:
    """Coarse elevation before erosion: spectral hills, rougher where relief is high, and a tilt."""
    z = draws.fractal(rng, n, slope=2.3 if place.relief < 60 else 2.0, shortest=3.0 if place.relief < 60 else 2.0)
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    z = z + rng.uniform(0.5, 1.6) * (x * np.cos(angle) + y * np.sin(angle))
    return (place.elevation + place.relief * (z - z.mean())).astype(np.float32)


def _outlets(z: np.ndarray, endorheic: bool) -> tuple[np.ndarray, int]:
    """Boundary cells where water leaves (the lower half of the border, or its lowest cell) and the lowest cell where a river enters."""
    n = len(z)
    border = np.ones((n, n), bool)
    border[1:-1, 1:-1] = False
    cells = np.flatnonzero(border)
    height = z.ravel()[cells]
    low = cells[height <= np.quantile(height, 0.02 if endorheic else 0.4)]
    column, row = cells % n - n / 2, cells // n - n / 2
    gate = low[np.argmin(z.ravel()[low])]
    opposite = (column * (gate % n - n / 2) + row * (gate // n - n / 2)) < -0.1 * n * n
    opposite &= ~np.isin(cells, low)
    entry = cells[opposite][np.argmin(height[opposite])] if opposite.any() else cells[np.argmax(height)]
    return low, int(entry)


def _dilate_parabola(field: np.ndarray) -> np.ndarray:
    """max over offsets of ``field(x + d) - d**2``: squared half-width minus squared distance to the nearest river point."""
    for axis in (0, 1):
        best = field.copy()
        for d in range(1, _REACH + 1):
            a, b = [slice(None)] * 2, [slice(None)] * 2
            a[axis], b[axis] = slice(d, None), slice(None, -d)
            np.maximum(best[tuple(a)], field[tuple(b)] - d * d, out=best[tuple(a)])
            np.maximum(best[tuple(b)], field[tuple(a)] - d * d, out=best[tuple(b)])
        field = best
    return field


def _river_field(rng, place: Place, size: int, flow: np.ndarray, parent: list[int], channel: float) -> np.ndarray:
    """``[S, S]``: positive inside rivers, otherwise minus the squared distance (pixels) to one, at least -REACH**2."""
    n = draws.coarse_size(size)
    up = np.asarray(parent)
    cells = np.flatnonzero((flow > channel) & (up >= 0))
    cells = cells[up[up[cells]] >= 0]
    field = np.full((size, size), -2.0 * _REACH**2, np.float32)
    if not len(cells):
        return field
    sway = np.stack([draws.fractal(rng, n, 1.2, 2.5).ravel() for _ in range(2)], 1) * (8.0 / (1 + place.relief / 50))
    node = np.stack([np.arange(n * n) // n, np.arange(n * n) % n], 1) * CELL + CELL / 2 - MARGIN + np.clip(sway, -14, 14)
    a, b, c = node[cells], node[up[cells]], node[up[up[cells]]]
    t = np.linspace(0, 1, 9)[:, None, None]
    path = (1 - t) ** 2 * (a + b) / 2 + 2 * t * (1 - t) * b + t**2 * (b + c) / 2  # quadratic curves through the mid-points
    young = np.clip(flow[cells] / channel - 1, 0.2, 1)  # springs start narrow
    half = np.clip(young * 0.055 * np.sqrt(flow[cells]) ** 0.9, 0.3, 9.0).astype(np.float32)
    row, column = np.floor(path).astype(int).reshape(-1, 2).T
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    np.maximum.at(field, (row[inside], column[inside]), np.tile(half**2, 9)[inside])
    return _dilate_parabola(field)


def make(rng: np.random.Generator, place: Place, size: int) -> Terrain:
    """The terrain of a scene of `size` pixels."""
    n = draws.coarse_size(size)
    raw = _relief(rng, place, n)
    lakes = rng.random() < 0.12 + 0.28 * (place.moisture > 0.4) and not place.coastal
    outlets, entry = _outlets(raw, endorheic=lakes)
    filled, parent, order = flood(raw, outlets, 0.05 * rng.random(n * n) ** 2 + 1e-3)
    inflow = 10 ** rng.uniform(3.2, 4.9) * place.moisture if rng.random() < 0.55 else 0.0
    channel = 90 / (0.15 + place.moisture)
    rate = float(rng.uniform(0.1, 0.4)) * (1 + place.relief / 100)
    height, flow, stream = _carve(filled, parent, order, (entry, inflow), rate, channel)
    depth = (filled - raw.ravel()) * lakes
    pond = draws.upsample((depth > 0.12 * place.relief + 0.5).reshape(n, n), size, wide=True) > 0.5
    height = np.where(depth > 0.5, filled, height).reshape(n, n)
    detail = draws.fractal(rng, size + 2 * MARGIN, slope=1.5, shortest=2.0)
    z = draws.upsample(height, size, wide=True) + detail * (0.022 * place.relief + 0.25) * ~pond
    reach = _river_field(rng, place, size, flow, parent, channel * 1.6)
    return _finish(place, size, z, pond, reach, draws.upsample((height.ravel() - stream).reshape(n, n), size))


def _finish(place: Place, size: int, z: np.ndarray, pond: np.ndarray, reach: np.ndarray, above: np.ndarray) -> Terrain:
    core = (slice(MARGIN, MARGIN + size),) * 2
    z[core] -= (0.8 + 0.02 * place.relief) * np.clip(1 + reach / 90, 0, 1) ** 2  # banks slope to the river
    sea = z <= 0 if place.coastal else np.zeros_like(pond)
    z = np.maximum(z, 0) if place.coastal else z
    north, east = np.gradient(z, PIXEL)
    east, north = east[core], -north[core]
    lake, river = pond[core], (reach > 0) & ~pond[core]
    water = (lake | sea[core]).astype(np.float32)
    edge = np.maximum(np.clip(1 + reach / 60, 0, 1), np.clip(2 * box_blur(water, 4), 0, 1))
    return Terrain(z, z[core], np.hypot(east, north), east, north, np.maximum(above, 0), river & ~sea[core], lake, sea[core], edge)


def box_blur(x: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square of ``2*radius + 1`` pixels, edges repeated."""
    for axis in (0, 1):
        width = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        total = np.cumsum(np.pad(x, width, mode="edge"), axis=axis, dtype=np.float64)
        k = 2 * radius + 1
        x = ((total[k:] - total[:-k]) if axis == 0 else (total[:, k:] - total[:, :-k])) / k
    return x.astype(np.float32)
