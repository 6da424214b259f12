"""What covers the ground: climate and terrain set natural cover, people add fields, towns and roads on flat, warm, low land.

Fields, blocks, forests and lakes mostly measure 16 pixels or more. Several pairs look alike by pixel and differ by context: fallow
fields, towns and bare ground; green crops and green pasture; dark slopes, cloud shadows and water.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax.data.world import draws, people
from terramind_jax.data.world.draws import sigmoid
from terramind_jax.data.world.place import LAPSE, Place
from terramind_jax.data.world.terrain import Terrain, box_blur

NO_DATA, WATER, TREES, FLOODED, CROPS, BUILT, BARE, SNOW, CLOUDS, RANGELAND = range(10)

# Ground under herbs by class, and how much more of it a moist climate covers.
_HERBS = np.array([0.9, 0.0, 0.9, 0.75, 0.93, 0.12, 0.08, 0.9, 0.9, 0.12], np.float32)
_HERBS_BY_RAIN = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1.1], np.float32)


@dataclasses.dataclass(frozen=True)
class Cover:
    """Arrays ``[S, S]``; shares and densities in 0..1. `classes` knows neither clouds nor the edge of the map."""

    classes: np.ndarray  # uint8, LULC codes
    water: np.ndarray  # bool, open water
    ice: np.ndarray  # bool, frozen water
    trees: np.ndarray  # canopy
    needle: np.ndarray  # share of conifers
    herbs: np.ndarray  # ground covered by grass or crops, green or dry
    green: np.ndarray  # green share of the herbs at the optical date
    green_radar: np.ndarray  # the same at the radar date
    built: np.ndarray  # roofs
    roof: np.ndarray  # 0 grey, 1 red
    paved: np.ndarray
    sand: np.ndarray  # soil colour: 1 sand
    red: np.ndarray  # soil colour: 1 red earth
    rock: np.ndarray
    snow: np.ndarray
    turbid: np.ndarray  # water colour
    wet: np.ndarray  # soil moisture
    texture: np.ndarray  # brightness, about 1


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What `make` works out before it composes the cover."""

    classes: np.ndarray
    warmest: np.ndarray
    today: np.ndarray
    moisture: np.ndarray
    canopy: np.ndarray
    rock: np.ndarray
    fields: people.Fields
    town: people.Town
    patch: np.ndarray  # smooth noise
    grain: np.ndarray  # pixel noise


def make(rng: np.random.Generator, place: Place, terrain: Terrain, size: int) -> Cover:
    """The land cover of a scene at the dates of its optical and radar acquisitions."""
    patch = draws.smooth_field(rng, size, 12.0)
    grain = draws.fractal(rng, size, slope=0.6, shortest=0.8)
    cooling = LAPSE * terrain.elevation
    warmest, today = place.warmest - cooling, place.today - cooling
    moisture = np.clip(place.moisture + 0.28 * np.exp(-terrain.above_river / 6) - 0.10 + 0.07 * patch, 0.02, 1)
    water = terrain.river | terrain.lake | terrain.sea
    fields = people.fields(rng, place, terrain, size, warmest, moisture, ~water)
    canopy = _canopy(rng, place, terrain, size, warmest, moisture, fields)
    bare, rock = _bare(rng, place, terrain, size, warmest, moisture)
    flooded = _flooded(rng, terrain, size, warmest, moisture)
    town = people.town(rng, place, terrain, size, ~water)
    layers = (
        (BARE, bare),
        (TREES, canopy > 0.45),
        (CROPS, fields.crops),
        (FLOODED, flooded),
        (TREES, town.park),
        (BUILT, town.area),
        (WATER, water),
    )
    classes = np.full((size, size), RANGELAND, np.uint8)
    for code, where in layers:
        classes[where] = code
    return _compose(rng, place, terrain, size, _Parts(classes, warmest, today, moisture, canopy, rock, fields, town, patch, grain))


def _canopy(rng, place: Place, terrain: Terrain, size: int, warmest, moisture, fields: people.Fields) -> np.ndarray:
    """Tree cover: below the tree line where it is wet, in patches; cleared where people live, kept on slopes and along streams."""
    patch = draws.smooth_field(rng, size, 13.0)
    line = sigmoid((warmest - 9.5) / 0.8)
    wet = (moisture - 0.48) / 0.12 + 0.9 * np.clip(terrain.slope / 0.25, 0, 1.5)
    cleared = 3.2 * sigmoid((place.humans - 0.45) / 0.1)
    gallery = 1.3 * terrain.bank * (moisture > 0.25)
    cover = line * sigmoid(2.2 * (wet + 1.5 * patch - cleared + gallery))
    scattered = 0.18 * np.clip(moisture, 0, 0.6) * line
    return np.where(fields.crops, 0.0, np.maximum(cover, scattered)).astype(np.float32)


def _bare(rng, place: Place, terrain: Terrain, size: int, warmest, moisture) -> tuple[np.ndarray, np.ndarray]:
    """(bare ground, share of rock in it): deserts, alpine ground, cliffs and beaches."""
    patch = draws.smooth_field(rng, size, 14.0)
    desert = (0.24 - moisture) / 0.05
    alpine = (5.5 - warmest) / 1.3
    cliff = (terrain.slope - 0.75) / 0.1 + 1.5 * sigmoid((6 - warmest) / 2)
    score = np.maximum(np.maximum(desert, alpine), cliff) + 0.9 * patch
    beach = (terrain.bank > 0.55) & (place.coastal | (moisture < 0.4)) & (patch > -0.3)
    rock = sigmoid((terrain.slope - 0.3) / 0.08 + 0.6 * patch) + sigmoid((terrain.elevation - 1300) / 250 + 0.5 * patch)
    return (score > 0.35) | beach, np.where(beach, 0.05, np.clip(rock, 0, 1)).astype(np.float32)


def _flooded(rng, terrain: Terrain, size: int, warmest, moisture) -> np.ndarray:
    wetland = rng.random() < 0.5
    patch = draws.smooth_field(rng, size, 12.0)
    low = np.exp(-terrain.above_river / 2.5) / (1 + (terrain.slope / 0.04) ** 2) + 0.35 * terrain.bank
    return wetland & (low + 0.28 * patch + 0.3 * (moisture - 0.6) > 0.95) & (warmest > 9) & (moisture > 0.42)


def _snow(place: Place, terrain: Terrain, parts: _Parts) -> np.ndarray:
    """Share of ground under snow at the optical date: cold, shaded slopes first, thin in deserts, wind-blown on cliffs."""
    poleward = terrain.north if place.lat >= 0 else -terrain.north
    cold = (-0.5 - parts.today + 3.0 * poleward + 0.9 * parts.patch + 0.25 * parts.grain) / 1.6
    depth = cold + 2.5 * np.clip(place.moisture - 0.35, -0.5, 0.2)
    cliff = np.clip((terrain.slope - 0.7) / 0.5, 0, 0.8)
    snow = sigmoid(3.0 * depth) * (1 - cliff) * sigmoid((place.moisture - 0.1) / 0.03)
    ice = sigmoid(-6 - parts.today) * (~terrain.sea | (place.today < -14))
    return np.where(parts.classes == WATER, ice, snow)


def _growth(place: Place, parts: _Parts, days: int) -> np.ndarray:
    """Green share of herbs `days` after the optical date: fields follow their own calendar, grass follows warmth and rain."""
    lag = (place.doy + days - parts.fields.peak + 182.5) % 365 - 182.5
    crop = 0.95 * np.exp(-((lag / parts.fields.width) ** 2)) + 0.03
    monsoon = 0.35 * np.exp(-(((abs(place.lat) - 14) / 8) ** 2)) * (1 - place.season)
    rain = np.clip((parts.moisture - 0.18) / 0.5, 0, 1) * (1 - monsoon)
    grass = np.clip(rain * sigmoid((parts.today - 5 + 0.05 * days) / 2.2) + 0.10 * parts.patch, 0.02, 0.95)
    return np.where(parts.fields.crops, crop, grass)


def _compose(rng: np.random.Generator, place: Place, terrain: Terrain, size: int, parts: _Parts) -> Cover:
    classes, town, high = parts.classes, parts.town, terrain.elevation
    tint = draws.smooth_field(rng, size, 16.0)
    wooded = np.isin(classes, (TREES, RANGELAND, FLOODED))
    trees = np.where(wooded, parts.canopy * (1 - 0.12 * np.abs(parts.grain)), 0) + 0.8 * town.park + 0.05 * (classes == BUILT)
    montane = np.clip((high - 1000) / 250, 0, 5)
    needle = sigmoid((15.5 - parts.warmest) / 1.6 + montane + 0.6 * tint + rng.normal(0, 0.8))
    thin = 1 - 0.55 * sigmoid((high - 1600) / 300) * (classes == RANGELAND)  # mountain soils are young, thin and grey
    sand = sigmoid((0.20 - parts.moisture) / 0.05 + 0.7 * tint + 2 * (terrain.bank > 0.5) - 1.0) * sigmoid((parts.warmest - 14) / 2)
    red = sigmoid((26 - abs(place.lat)) / 7 + rng.normal(0, 1.2) + 0.5 * tint) * sigmoid((1100 - high) / 200)
    tone = np.where(classes == CROPS, parts.fields.tone - 1, 0) + _dunes(rng, place, terrain, size, classes)
    texture = 1 + 0.05 * parts.grain + 0.07 * tint + tone
    snow = _snow(place, terrain, parts)
    snow = np.where(classes == TREES, 0.55, 1) * np.where(town.roofs, 0.8, 1) * snow
    murk = sigmoid(terrain.slope * 2 - 1 + tint * 0.8 + rng.normal(0, 1.5) + 1.5 * terrain.river)
    frozen = (snow > 0.5) | ((classes == WATER) & (snow > 0.4))
    arrays = dict(
        trees=np.clip(trees, 0, 1),
        needle=needle,
        herbs=np.clip(_HERBS[classes] + _HERBS_BY_RAIN[classes] * np.clip(parts.moisture, 0, 0.75) * thin + 0.08 * tint, 0, 1),
        green=_growth(place, parts, 0),
        green_radar=_growth(place, parts, place.radar_days),
        built=town.roofs,
        roof=town.red,
        paved=(town.road | parts.fields.track & (place.humans > 0.6)) & (classes != WATER),
        sand=sand,
        red=red,
        rock=parts.rock,
        snow=snow,
        turbid=murk,
        wet=np.clip(parts.moisture + 0.1 * tint - 0.1, 0, 1),
        texture=np.clip(texture, 0.5, 1.6),
    )
    return Cover(
        classes=np.where(frozen, SNOW, classes).astype(np.uint8),
        water=(classes == WATER) & ~frozen,
        ice=(classes == WATER) & frozen,
        **{name: a.astype(np.float32) for name, a in arrays.items()},
    )


def _dunes(rng, place: Place, terrain: Terrain, size: int, classes: np.ndarray) -> np.ndarray:
    """Brightness of ripples across sandy, gentle desert."""
    if place.moisture > 0.2 or rng.random() < 0.4:
        return np.zeros((size, size), np.float32)
    u, _ = people.rotated(rng, size)
    phase = 2 * np.pi * u / rng.uniform(14, 26) + 2.5 * draws.smooth_field(rng, size, 18.0)
    return 0.13 * np.sin(phase + 0.6 * np.sin(phase)) * (classes == BARE) * (terrain.slope < 0.25)


def annual_map(rng: np.random.Generator, classes: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """The LULC product ``[S, S]`` uint8: small islands smoothed away, clouds, and in few scenes a wedge beyond the map's edge."""
    size = len(classes)
    lulc = _majority(classes)
    lulc[cloud] = CLOUDS
    if rng.random() < 0.05:
        u, _ = people.rotated(rng, size)
        lulc[u > rng.uniform(0.2, 0.45) * size] = NO_DATA
    return lulc


def _majority(classes: np.ndarray) -> np.ndarray:
    """The commonest class in 5 by 5 pixels."""
    best, winner = np.full(classes.shape, 0.0, np.float32), classes.copy()
    for code in np.unique(classes):
        share = box_blur((classes == code).astype(np.float32), 2)
        better = share > best
        best[better], winner[better] = share[better], code
    return winner
