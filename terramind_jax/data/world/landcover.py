"""What covers the ground: climate and terrain set natural cover, people add fields, towns and roads on flat, warm, low land.

Fields, blocks, forests and lakes mostly measure 16 pixels or more. Several pairs look alike by pixel and differ by context: fallow
fields, towns and bare ground; green crops and green pasture; dark slopes, cloud shadows and water.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax.data.world import draws
from terramind_jax.data.world.draws import sigmoid
from terramind_jax.data.world.place import LAPSE, Place
from terramind_jax.data.world.terrain import Terrain, box_blur

NO_DATA, WATER, TREES, FLOODED, CROPS, BUILT, BARE, SNOW, CLOUDS, RANGELAND = range(10)


@dataclasses.dataclass(frozen=True)
class Cover:
    """Arrays ``[S, S]``; shares and densities in 0..1. `classes` knows neither clouds nor the edge of the map."""

    classes: np.ndarray  # uint8, LULC codes
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
class _Fields:
    crops: np.ndarray  # bool
    peak: np.ndarray  # day of the year of full growth
    width: np.ndarray  # days
    tone: np.ndarray  # brightness of the bare field
    track: np.ndarray  # bool, farm roads between strips


def make(rng: np.random.Generator, place: Place, terrain: Terrain, size: int) -> Cover:
    """The land cover of a scene at the dates of its optical and radar acquisitions."""
    patch = draws.smooth_field(rng, size, 12.0)
    grain = draws.fractal(rng, size, slope=0.6, shortest=0.8)
    above = terrain.elevation.astype(np.float32) * -LAPSE
    warmest, today = place.warmest + above, place.today + above
    moisture = np.clip(place.moisture + 0.28 * np.exp(-terrain.above_river / 6) - 0.10 + 0.07 * patch, 0.02, 1)
    water = terrain.river | terrain.lake | terrain.sea
    fields = _fields(rng, place, terrain, size, warmest, moisture, ~water)
    canopy = _canopy(rng, place, terrain, size, warmest, moisture, fields)
    bare, rock = _bare(rng, place, terrain, size, warmest, moisture)
    flooded = _flooded(rng, place, terrain, size, warmest, moisture)
    town = _town(rng, place, terrain, size, ~water)
    layers = (
        (BARE, bare),
        (TREES, canopy > 0.45),
        (CROPS, fields.crops),
        (FLOODED, flooded),
        (TREES, town["park"]),
        (BUILT, town["area"]),
        (WATER, water),
    )
    classes = np.full((size, size), RANGELAND, np.uint8)
    for code, where in layers:
        classes[where] = code
    snow = _snow(place, terrain, today, patch, grain, classes, canopy)
    return _compose(rng, place, terrain, size, dict(classes=classes, patch=patch, grain=grain, warmest=warmest, today=today,
                    moisture=moisture, fields=fields, canopy=canopy, rock=rock, town=town, snow=snow))  # fmt: skip


def _edges(rng: np.random.Generator, low: float, high: float, start: float, stop: float) -> np.ndarray:
    count = int((stop - start) / low) + 2
    return start + np.cumsum(rng.uniform(low, high, count)) - high


def _rotated(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) - size / 2
    angle = rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _parcels(rng: np.random.Generator, place: Place, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(parcel id ``[S, S]`` below 64 * strips, distance to the strip's edge in pixels, mask of the parcel's inside)."""
    u, v = _rotated(rng, size)
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
    along = np.clip((v + size + start[strip]) / length[strip], 0, 63.9).astype(np.int32)
    return strip * 64 + along, inside, np.ones((size, size), bool)


def _pivots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Circular fields of centre-pivot irrigation on a square grid."""
    pitch = rng.uniform(34, 56)
    a, b = (u + size) / pitch, (v + size) / pitch
    radius = np.hypot(a % 1 - 0.5, b % 1 - 0.5) * pitch
    edge = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1)) * pitch
    return a.astype(np.int32) * 64 + b.astype(np.int32), edge, radius < 0.48 * pitch


def _fields(rng, place: Place, terrain: Terrain, size: int, warmest, moisture, land) -> _Fields:
    parcel, edge, inside = _parcels(rng, place, size)
    count = int(parcel.max()) + 1
    flat, lush = 1 / (1 + (terrain.slope / 0.14) ** 4), 1 / (1 + np.exp((moisture - 0.95) / 0.05))
    fit = flat * sigmoid((warmest - 13) / 1.5) * sigmoid((moisture - 0.22) / 0.04) * lush * land
    mean = np.bincount(parcel.ravel(), fit.ravel(), count) / np.maximum(np.bincount(parcel.ravel(), minlength=count), 1)
    district = draws.smooth_field(rng, size, 30.0)
    centre = np.bincount(parcel.ravel(), district.ravel(), count) / np.maximum(np.bincount(parcel.ravel(), minlength=count), 1)
    chance = mean * sigmoid((1.5 * place.humans - 0.72 + 0.25 * centre) / 0.06)
    chosen = rng.random(count) < np.clip(1.25 * chance, 0, 0.96)
    kind = rng.random(count)
    summer = 200 if place.lat >= 0 else 20
    peak = summer + np.where(kind < 0.45, -55, 18) + rng.normal(0, 16, count) + (abs(place.lat) < 22) * rng.uniform(-180, 180, count)
    width = np.where(kind < 0.45, 48, 40) + rng.uniform(-6, 14, count)
    crops = chosen[parcel] & inside & (fit > 0.15)
    tracks = crops & (edge < 0.7) & (rng.random(count) < 0.5)[parcel // 64]
    return _Fields(crops, peak[parcel], width[parcel], rng.normal(1, 0.16, count)[parcel].astype(np.float32), tracks)


def _canopy(rng, place: Place, terrain: Terrain, size: int, warmest, moisture, fields: _Fields) -> np.ndarray:
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


def _flooded(rng, place: Place, terrain: Terrain, size: int, warmest, moisture) -> np.ndarray:
    wetland = rng.random() < 0.5
    patch = draws.smooth_field(rng, size, 12.0)
    low = np.exp(-terrain.above_river / 2.5) / (1 + (terrain.slope / 0.04) ** 2) + 0.35 * terrain.bank
    return wetland & (low + 0.28 * patch + 0.3 * (moisture - 0.6) > 0.95) & (warmest > 9) & (moisture > 0.42)


def _town(rng, place: Place, terrain: Terrain, size: int, land: np.ndarray) -> dict[str, np.ndarray]:
    """Towns grow where land is flat and low, near water; blocks between streets, parks, and roads that lead out."""
    u, v = _rotated(rng, size)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    ragged = draws.smooth_field(rng, size, 12.0)
    spots = rng.integers(size // 12, size - size // 12, (24, 2))
    appeal = -terrain.slope[spots[:, 0], spots[:, 1]] * 6 - terrain.above_river[spots[:, 0], spots[:, 1]] / 60 + rng.random(24)
    level = np.full((size, size), -9.0, np.float32)
    towns = int(rng.poisson(3.2 * max(place.humans - 0.2, 0)))
    for row, column in spots[np.argsort(-appeal)[:towns]]:
        radius = 15 * np.exp(rng.exponential(0.75)) * (0.7 + 1.1 * place.humans)
        np.maximum(level, 1 - np.hypot(y - row, x - column) / min(radius, 0.5 * size) + 0.28 * ragged, out=level)
    area = (level > 0) & land & (terrain.slope < 0.4)
    pitch = rng.uniform(17, 24)
    a, b = (u + size) / pitch, (v + size) / pitch
    lane = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1)) * pitch
    block = (a.astype(np.int32) * 64 + b.astype(np.int32)) % 8192
    density = np.clip(rng.normal(0.62, 0.18, 8192), 0.15, 0.95)[block] + 0.25 * np.clip(level, 0, 0.8)
    park = (rng.random(8192) < 0.10)[block] & area
    houses = np.repeat(np.repeat(rng.random((size // 2 + 1, size // 2 + 1)), 2, 0), 2, 1)[:size, :size] < density
    road = (np.abs(lane) < 0.8) & area | _roads(rng, size, u, v, ragged, towns)
    return dict(area=area & ~park, park=park, roofs=area & ~park & ~road & houses, road=road & (terrain.slope < 0.5),
                red=(rng.random(8192) < rng.random())[block])  # fmt: skip


def _roads(rng, size: int, u, v, ragged, towns: int) -> np.ndarray:
    road = np.zeros((size, size), bool)
    for axis in (u, v)[: min(towns, 2)]:
        road |= np.abs(axis + 5 * ragged - rng.uniform(-0.3, 0.3) * size) < 0.75
    return road


def _snow(place: Place, terrain: Terrain, today, patch, grain, classes, canopy) -> np.ndarray:
    """Share of ground under snow at the optical date: cold, shaded slopes first, thin in deserts, wind-blown on cliffs."""
    shade = (terrain.north if place.lat >= 0 else -terrain.north) * -3.0
    depth = (-0.5 - today - shade + 0.9 * patch + 0.25 * grain) / 1.6 + 2.5 * np.clip(place.moisture - 0.35, -0.5, 0.2)
    snow = sigmoid(3.0 * depth) * (1 - np.clip((terrain.slope - 0.7) / 0.5, 0, 0.8)) * sigmoid((place.moisture - 0.1) / 0.03)
    frozen = sigmoid((-6 - today) / 1.0) * (classes == WATER) * (~terrain.sea | (place.today < -14))
    return np.where(classes == WATER, frozen, snow).astype(np.float32)


def _growth(place: Place, c: dict, days: int) -> np.ndarray:
    """Green share of herbs `days` after the optical date: fields follow their own calendar, grass follows warmth and rain."""
    fields, day = c["fields"], place.doy + days
    lag = (day - fields.peak + 182.5) % 365 - 182.5
    crop = 0.95 * np.exp(-((lag / fields.width) ** 2)) + 0.03
    rain = np.clip((c["moisture"] - 0.18) / 0.5, 0, 1) * (1 - 0.35 * np.exp(-(((abs(place.lat) - 14) / 8) ** 2)) * (1 - place.season))
    grass = np.clip(rain * sigmoid((c["today"] - 5 + 0.05 * days) / 2.2) + 0.10 * c["patch"], 0.02, 0.95)
    return np.where(fields.crops, crop, grass).astype(np.float32)


def _compose(rng, place: Place, terrain: Terrain, size: int, c: dict) -> Cover:
    classes, town, fields, canopy = c["classes"], c["town"], c["fields"], c["canopy"]
    tint = draws.smooth_field(rng, size, 16.0)
    wooded = np.isin(classes, (TREES, RANGELAND, FLOODED))
    trees = np.where(wooded, canopy * (1 - 0.12 * np.abs(c["grain"])), 0) + 0.8 * town["park"] + 0.12 * (classes == BUILT)
    needle = sigmoid((15.5 - c["warmest"]) / 1.6 + 0.6 * tint + rng.normal(0, 0.8) + np.clip((terrain.elevation - 1000) / 250, 0, 5))
    herbs = np.select(
        [classes == CROPS, classes == RANGELAND, classes == BARE, classes == FLOODED, classes == BUILT, classes == WATER],
        [0.93, 0.12 + 1.1 * np.clip(c["moisture"], 0, 0.75), 0.05, 0.75, 0.25, 0.0],
        0.9,
    )
    warm = sigmoid((c["warmest"] - 14) / 2)
    thin = 1 - 0.55 * sigmoid((terrain.elevation - 1600) / 300) * (classes == RANGELAND)  # mountain soils are young and grey
    sand = warm * sigmoid((0.20 - c["moisture"]) / 0.05 + 0.7 * tint + 2 * (terrain.bank > 0.5) - 1.0)
    red = sigmoid((26 - abs(place.lat)) / 7 + rng.normal(0, 1.2) + 0.5 * tint) * sigmoid((1100 - terrain.elevation) / 200)
    texture = 1 + 0.05 * c["grain"] + 0.07 * tint + np.where(classes == CROPS, fields.tone - 1, 0) + _dunes(rng, place, terrain, size, classes)
    snow = np.where(classes == TREES, c["snow"] * 0.55, c["snow"]) * np.where(town["roofs"], 0.8, 1)
    classes = np.where((snow > 0.5) | ((classes == WATER) & (snow > 0.4)), SNOW, classes).astype(np.uint8)
    return Cover(
        classes=classes,
        trees=np.clip(trees, 0, 1).astype(np.float32),
        needle=needle.astype(np.float32),
        herbs=np.clip(herbs * thin + 0.08 * tint, 0, 1).astype(np.float32),
        green=_growth(place, c, 0),
        green_radar=_growth(place, c, place.radar_days),
        built=town["roofs"].astype(np.float32),
        roof=town["red"].astype(np.float32),
        paved=((town["road"] | fields.track * (place.humans > 0.6)) & (classes != WATER)).astype(np.float32),
        sand=sand.astype(np.float32),
        red=red.astype(np.float32),
        rock=c["rock"],
        snow=snow.astype(np.float32),
        turbid=np.clip(sigmoid((terrain.slope * 2 - 1 + tint * 0.8 + rng.normal(0, 1.5)) + 1.5 * terrain.river), 0, 1).astype(np.float32),
        wet=np.clip(c["moisture"] + 0.1 * tint - 0.1, 0, 1).astype(np.float32),
        texture=np.clip(texture, 0.5, 1.6).astype(np.float32),
    )


def _dunes(rng, place: Place, terrain: Terrain, size: int, classes: np.ndarray) -> np.ndarray:
    """Brightness of ripples across sandy, gentle desert."""
    if place.moisture > 0.2 or rng.random() < 0.4:
        return np.zeros((size, size), np.float32)
    u, _ = _rotated(rng, size)
    phase = 2 * np.pi * u / rng.uniform(14, 26) + 2.5 * draws.smooth_field(rng, size, 18.0)
    return 0.13 * np.sin(phase + 0.6 * np.sin(phase)) * (classes == BARE) * (terrain.slope < 0.25)


def annual_map(rng: np.random.Generator, classes: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """The LULC product ``[S, S]`` uint8: small islands smoothed away, clouds, and in few scenes a wedge beyond the map's edge."""
    size = len(classes)
    lulc = _majority(classes)
    lulc[cloud] = CLOUDS
    if rng.random() < 0.05:
        u, _ = _rotated(rng, size)
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
