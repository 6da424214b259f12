"""What people make of the land: fields, circles of irrigation, farm roads, towns of blocks and streets, roads between them."""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax.data.world import draws
from terramind_jax.data.world.draws import sigmoid
from terramind_jax.data.world.place import Place
from terramind_jax.data.world.terrain import Terrain

_IDS = 64  # parcels along a strip


@dataclasses.dataclass(frozen=True)
class Fields:
    """Arrays ``[S, S]``; the calendar of each field is constant over it."""

    crops: np.ndarray  # bool
    peak: np.ndarray  # day of the year of full growth
    width: np.ndarray  # days
    tone: np.ndarray  # brightness of the bare field
    track: np.ndarray  # bool, farm roads between strips


@dataclasses.dataclass(frozen=True)
class Town:
    """Boolean arrays ``[S, S]``."""

    area: np.ndarray
    park: np.ndarray
    roofs: np.ndarray
    red: np.ndarray  # colour of the block's roofs
    road: np.ndarray


def _edges(rng: np.random.Generator, low: float, high: float, start: float, stop: float) -> np.ndarray:
    count = int((stop - start) / low) + 2
    return start + np.cumsum(rng.uniform(low, high, count)) - high


def rotated(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates ``[S, S]`` around the middle of the scene along two perpendicular axes of random direction."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) - size / 2
    angle = rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _parcels(rng: np.random.Generator, place: Place, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(parcel id ``[S, S]``, distance to the strip's edge in pixels, mask of the parcel's inside)."""
    u, v = rotated(rng, size)
    if place.moisture < 0.42 and rng.random() < 0.6:
        return _pivots(rng, u, v, size)
    bend = draws.smooth_field(rng, size, 40.0, slope=2.2) * min(2.0 + place.relief / 8, 10)
    u, v = u + bend, v + 0.6 * bend
    narrow = rng.uniform(16, 26)
    edges = _edges(rng, narrow, 1.7 * narrow, -1.1 * size, 1.1 * size)
    strip = np.searchsorted(edges, u).astype(np.int32)
    inside = np.minimum(np.abs(u - edges[np.clip(strip - 1, 0, None)]), np.abs(edges[np.clip(strip, None, len(edges) - 1)] - u))
    length = rng.uniform(20, 64, len(edges) + 1).astype(np.float32)
    start = rng.uniform(0, 64, len(edges) + 1).astype(np.float32)
    along = np.clip((v + size + start[strip]) / length[strip], 0, _IDS - 0.1).astype(np.int32)
    return strip * _IDS + along, inside, np.ones((size, size), bool)


def _pivots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Circular fields of centre-pivot irrigation on a square grid."""
    pitch = rng.uniform(34, 56)
    a, b = (u + size) / pitch, (v + size) / pitch
    radius = np.hypot(a % 1 - 0.5, b % 1 - 0.5) * pitch
    edge = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1)) * pitch
    return a.astype(np.int32) * _IDS + b.astype(np.int32), edge, radius < 0.48 * pitch


def fields(
    rng: np.random.Generator, place: Place, terrain: Terrain, size: int, warmest: np.ndarray, moisture: np.ndarray, land: np.ndarray
) -> Fields:
    """Whole parcels turn to crops where it is flat, warm and moist enough, in farmed districts."""
    parcel, edge, inside = _parcels(rng, place, size)
    count = int(parcel.max()) + 1
    flat, dryish = 1 / (1 + (terrain.slope / 0.14) ** 4), sigmoid((0.95 - moisture) / 0.05)
    fit = flat * sigmoid((warmest - 13) / 1.5) * sigmoid((moisture - 0.22) / 0.04) * dryish * land
    district = draws.smooth_field(rng, size, 30.0)
    chance = _parcel_mean(parcel, fit) * sigmoid((1.5 * place.humans - 0.72 + 0.25 * _parcel_mean(parcel, district)) / 0.06)
    chosen = rng.random(count) < np.clip(1.25 * chance, 0, 0.96)
    kind = rng.random(count)  # winter grain or summer crops; the tropics sow at any time
    peak = (200 if place.lat >= 0 else 20) + np.where(kind < 0.45, -55, 18) + rng.normal(0, 16, count)
    peak += (abs(place.lat) < 22) * rng.uniform(-180, 180, count)
    width = np.where(kind < 0.45, 54, 46) + rng.uniform(-6, 14, count)
    tone = rng.normal(1, 0.16, count).astype(np.float32)
    crops = chosen[parcel] & inside & (fit > 0.15)
    track = crops & (edge < 0.7) & (rng.random(count) < 0.5)[parcel // _IDS]
    return Fields(crops, peak[parcel], width[parcel], tone[parcel], track)


def _parcel_mean(parcel: np.ndarray, value: np.ndarray) -> np.ndarray:
    area = np.bincount(parcel.ravel())
    return np.bincount(parcel.ravel(), value.ravel()) / np.maximum(area, 1)


def town(rng: np.random.Generator, place: Place, terrain: Terrain, size: int, land: np.ndarray) -> Town:
    """Towns grow where land is flat and low, near water; blocks between streets, parks, and roads that lead out."""
    u, v = rotated(rng, size)
    ragged = draws.smooth_field(rng, size, 12.0)
    level, towns = _extent(rng, place, terrain, size, ragged)
    area = (level > 0) & land & (terrain.slope < 0.4)
    pitch = rng.uniform(17, 24)
    a, b = (u + size) / pitch, (v + size) / pitch
    lane = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1)) * pitch
    block = (a.astype(np.int32) * _IDS + b.astype(np.int32)) % _IDS**2
    density = np.clip(rng.normal(0.55, 0.2, _IDS**2), 0.1, 0.95)[block] + 0.25 * np.clip(level, 0, 0.8)
    park = (rng.random(_IDS**2) < 0.10)[block] & area
    half = rng.random((size // 2, size // 2))
    houses = np.repeat(np.repeat(half, 2, axis=0), 2, axis=1) < density  # 20 m wide
    road = (lane < 0.8) & area | _roads(rng, size, (u, v)[: min(towns, 2)], ragged)
    red = (rng.random(_IDS**2) < rng.random())[block]
    return Town(area & ~park, park, area & ~park & ~road & houses, red, road & (terrain.slope < 0.5))


def _extent(rng: np.random.Generator, place: Place, terrain: Terrain, size: int, ragged: np.ndarray) -> tuple[np.ndarray, int]:
    """(positive inside towns, 1 at their centres; number of towns)."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    spots = rng.integers(size // 12, size - size // 12, (24, 2))
    r, c = spots.T
    appeal = -6 * terrain.slope[r, c] - terrain.above_river[r, c] / 60 + rng.random(len(spots))
    towns = int(rng.poisson(3.2 * max(place.humans - 0.2, 0)))
    level = np.full((size, size), -9.0, np.float32)
    for row, column in spots[np.argsort(-appeal)[:towns]]:
        radius = min(15 * np.exp(rng.exponential(0.75)) * (0.7 + 1.1 * place.humans), 0.5 * size)
        np.maximum(level, 1 - np.hypot(y - row, x - column) / radius + 0.28 * ragged, out=level)
    return level, towns


def _roads(rng: np.random.Generator, size: int, axes: tuple[np.ndarray, ...], ragged: np.ndarray) -> np.ndarray:
    road = np.zeros((size, size), bool)
    for axis in axes:
        road |= np.abs(axis + 5 * ragged - rng.uniform(-0.3, 0.3) * size) < 0.75
    return road
