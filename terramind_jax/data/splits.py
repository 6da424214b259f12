"""Which tiles are held out for validation: whole cells of the map, and what touches them belongs to neither side.

A tile that touches a held-out one, or shows the same place at another date, would make validation look better than it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from terramind_jax import geo

EARTH = 6_371_008.8  # metres, its mean radius
CELL = 50_000.0  # metres: the largest cells
SMALLEST = 264 * geo.PIXEL  # and the smallest, a tile
DROPPED = ""  # the split of a tile that lies in the margin


def assign(
    names: Sequence[str], scenes: Sequence[geo.Place], tiles: Sequence[Sequence[geo.Place]], val_fraction: float, seed: int
) -> list[list[str]]:
    """The split of every tile of every scene: train, val, or `DROPPED`.

    Cells are 50 km wide, halved until there are ``1 / val_fraction`` of them or they are no larger than a tile; then each location is
    one. A scene that fits a cell lies in that of its middle, with all that shows the same location at other dates; a larger one has its
    tiles in several. A hash of the seed and the cell's place, or the location's first name, says which are held out: at least one, unless
    `val_fraction` is 0. Training tiles that touch or overlap held-out ones are dropped.

    Raises:
      ValueError: a fraction that is none, a single location, or nothing that is left for training.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and below 1.")
    if not val_fraction:
        return [["train"] * len(own) for own in tiles]
    middles = [[geo.lonlat(tile) for tile in own] for own in tiles]
    cells = _cells(names, scenes, middles, val_fraction)
    order = sorted({cell for own in cells for cell in own}, key=lambda cell: hashlib.sha256(f"{seed}/{cell}".encode()).digest())
    if len(order) < 2:
        raise ValueError(
            "The files cover one location, and two are needed to hold one out; add files from elsewhere, or set val_fraction to 0."
        )
    held_out = set(order[: min(max(1, round(val_fraction * len(order))), len(order) - 1)])
    splits = [["val" if cell in held_out else "train" for cell in own] for own in cells]
    margin = 2 * geo.PIXEL * max(max(tile.height, tile.width) for own in tiles for tile in own)
    return _without_margin(middles, splits, margin)


Middles = Sequence[Sequence[tuple[float, float]]]  # longitude and latitude of every tile of every scene


def _cells(names: Sequence[str], scenes: Sequence[geo.Place], middles: Middles, val_fraction: float) -> list[list[str]]:
    """The cell of every tile."""
    groups = locations(scenes)
    leaders = [geo.lonlat(scenes[groups[i]]) for i in range(len(scenes))]
    side = CELL
    while side > SMALLEST:
        cells = []
        for i, (scene, own) in enumerate(zip(scenes, middles, strict=True)):
            is_small = max(scene.height, scene.width) * geo.PIXEL <= side
            places = [leaders[i]] * len(own) if is_small else own
            cells.append([names[groups[i]] if math.isnan(lon) else _cell(lon, lat, side) for lon, lat in places])
        if len({cell for own in cells for cell in own}) >= 1 / val_fraction:
            return cells
        side /= 2
    return [[names[groups[i]]] * len(own) for i, own in enumerate(middles)]


def _cell(longitude: float, latitude: float, side: float) -> str:
    """The name of the cell of a place: rows of equal height, cut into cells of about equal width."""
    degrees = math.degrees(side / EARTH)
    row = math.floor(latitude / degrees)
    across = max(1, round(360 / degrees * math.cos(math.radians((row + 0.5) * degrees))))
    return f"{side:g} {row} {math.floor((longitude + 180) / 360 * across)}"


def locations(scenes: Sequence[geo.Place]) -> list[int]:
    """The first scene of the location of each: scenes whose middles overlap are one. Neighbours that only touch are two."""
    boxes = [_middle(scene) for scene in scenes]
    order = sorted((i for i in range(len(scenes)) if boxes[i] is not None), key=lambda i: boxes[i][0])
    leader = list(range(len(scenes)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if boxes[j][0] >= boxes[i][1]:
                break
            if boxes[i][2] < boxes[j][3] and boxes[j][2] < boxes[i][3]:
                first, second = sorted((find(i), find(j)))
                leader[second] = first
    return [find(i) for i in range(len(scenes))]


def _middle(place: geo.Place) -> tuple[float, float, float, float] | None:
    """(west, east, south, north) in degrees of the middle 60 % of a scene; None where the CRS is unknown."""
    if not place.crs:
        return None
    corners = [geo.lonlat(place, r * place.height, c * place.width) for r in (0.2, 0.8) for c in (0.2, 0.8)]
    longitude, latitude = zip(*corners, strict=True)
    return min(longitude), max(longitude), min(latitude), max(latitude)


def _without_margin(middles: Middles, splits: Sequence[Sequence[str]], margin: float) -> list[list[str]]:
    """The same splits, with `DROPPED` for training tiles less than `margin`, two sides of a tile, from a held-out one, middle to middle."""
    flat, points = np.array([s for own in splits for s in own]), np.array([_on_the_globe(*p) for own in middles for p in own])
    known = ~np.isnan(points).any(1)
    val = known & (flat == "val")
    at = np.flatnonzero(known & (flat == "train"))
    if val.any() and len(at):
        distance, _ = cKDTree(points[val]).query(points[at], distance_upper_bound=0.99 * margin)
        flat[at[np.isfinite(distance)]] = DROPPED
    if not (flat == "train").any():
        raise ValueError(
            "All tiles but the held-out ones touch these, so that none is left for training; add files from elsewhere, or set "
            "val_fraction to 0."
        )
    ends = np.cumsum([len(own) for own in splits])[:-1]
    return [part.tolist() for part in np.split(flat, ends)]


def _on_the_globe(longitude: float, latitude: float) -> tuple[float, float, float]:
    """Metres from the centre of the Earth."""
    a, b = math.radians(longitude), math.radians(latitude)
    return EARTH * math.cos(b) * math.cos(a), EARTH * math.cos(b) * math.sin(a), EARTH * math.sin(b)
