"""Where and when a scene lies: a fixed planet, location blocks, and the latent climate that all modalities share.

The planet is the same for every seed. Latitude, elevation and a hidden date set temperature; latitude, a smooth field of the
globe and height set moisture. Train and validation scenes come from different blocks of 10 by 10 degrees.
"""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np

from terramind_jax.data.world import draws

BLOCK = 10  # degrees
LAPSE = 6.5e-3  # K per metre
_OFFSET_SHARE = {"S2L1C": 0.42, "S2L2A": 0.16}

# How land lies over the latitudes, and how wet each latitude is.
_LAND_LATITUDE = ((-56, -40, -30, -20, -10, 0, 10, 20, 30, 40, 50, 60, 70, 74), (0, 3, 9, 18, 27, 34, 43, 52, 63, 73, 84, 93, 98.5, 100))
_LATITUDE_MOISTURE = ((0, 8, 15, 22, 30, 38, 48, 58, 68, 75), (0.90, 0.84, 0.60, 0.38, 0.40, 0.56, 0.68, 0.66, 0.56, 0.46))


@dataclasses.dataclass(frozen=True)
class Place:
    """The latent state of a scene. Temperatures in degrees Celsius at sea level, angles in radians, elevation in metres."""

    lon: float
    lat: float
    elevation: float
    relief: float  # standard deviation of the terrain before erosion, metres
    moisture: float  # 0 desert .. 1 rain forest
    annual: float
    warmest: float
    today: float
    season: float  # -1 midwinter .. 1 midsummer
    doy: int
    year: int
    radar_days: int  # acquisition of Sentinel-1 minus that of Sentinel-2
    humans: float
    cloudiness: float  # share of the scene
    coastal: bool
    sun_zenith: float
    sun_azimuth: float
    offsets: dict[str, int]  # added to stored Sentinel-2 values, by product


def block(lon: float, lat: float) -> tuple[int, int]:
    """(column, row) of the location block that holds a point."""
    return int((lon + 180) % 360 // BLOCK), int((lat + 90) // BLOCK)


def split_of(lon: float, lat: float) -> str:
    """The split that owns a point: one block in eight is for validation, in every row and most columns."""
    column, row = block(lon, lat)
    return "val" if (column + 3 * row) % 8 == 0 else "train"


def wetness(lon: float, lat: float) -> float:
    """A smooth field of the globe, about standard normal: rainy and dry sides of continents."""
    rng = np.random.Generator(np.random.Philox(key=2024))
    waves, phases = rng.standard_normal((24, 3)) * 3.0, rng.random(24) * 2 * np.pi
    a, b = np.radians(lon), np.radians(lat)
    point = np.array([np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)])
    return float(np.cos((waves * point).sum(axis=1) + phases).sum() / np.sqrt(12))


def sun(lat: float, doy: int) -> tuple[float, float]:
    """(zenith, azimuth) of the sun at half past ten, local solar time."""
    latitude, hour = np.radians(lat), np.radians(-22.5)
    declination = np.radians(23.44) * np.sin(2 * np.pi * (doy - 81) / 365)
    up = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(latitude) * np.sin(declination) - np.sin(latitude) * np.cos(declination) * np.cos(hour)
    return float(np.arccos(np.clip(up, -1, 1))), float(np.arctan2(east, north))


def draw(seed: int, split: str, index: int) -> Place:
    """The place of scene `index`: pure in its arguments."""
    u = draws.quasi_uniform(seed, split, index)
    rng = draws.stream(seed, split, index, "place")
    lat = round(float(np.interp(100 * u[0], _LAND_LATITUDE[1], _LAND_LATITUDE[0])), 5)
    lon = _longitude(split, u[3], lat)
    coastal = u[1] < 0.09
    elevation = float(2 + 30 * u[1] / 0.09) if coastal else float(25 + 3750 * u[1] ** 4.5)
    relief = float(np.clip(0.14 * (elevation + 60) ** 0.92 * np.exp(0.55 * draws.normal_quantile(u[7])), 3, 340))
    doy = _day(lat, u[2])
    moisture = np.interp(abs(lat), *_LATITUDE_MOISTURE) + 0.13 * wetness(lon, lat) + 0.12 * draws.normal_quantile(u[4])
    moisture -= 0.10 * np.clip((elevation - 900) / 1000, 0, 2)  # high plateaus lie in the rain shadow
    annual = 29 - 39 * np.sin(np.radians(lat)) ** 2 + rng.normal(0, 1.0)
    swing = 2 + 20 * np.sin(np.radians(abs(lat))) ** 1.3
    season = float(np.cos(2 * np.pi * (doy - 200) / 365) * (1 if lat >= 0 else -1))
    zenith, azimuth = sun(lat, doy)
    return Place(
        lon=lon,
        lat=lat,
        elevation=elevation,
        relief=relief,
        moisture=float(np.clip(moisture, 0.03, 1.0)),
        annual=float(annual),
        warmest=float(annual + swing),
        today=float(annual + swing * season + rng.normal(0, 1.5)),
        season=season,
        doy=doy,
        year=int(rng.integers(2017, 2025)),
        radar_days=int(rng.integers(1, 9) * rng.choice((-1, 1))),
        humans=_humans(u[6], elevation, annual),
        cloudiness=0.0 if u[5] < 0.6 else float(0.62 * ((u[5] - 0.6) / 0.4) ** 2 + 0.02),
        coastal=bool(coastal),
        sun_zenith=zenith,
        sun_azimuth=azimuth,
        offsets={name: 1000 if rng.random() < share else 0 for name, share in _OFFSET_SHARE.items()},
    )


def _longitude(split: str, u: float, lat: float) -> float:
    for k in range(10_000):  # walk around the parallel until the block belongs to the split
        lon = round(float((u + k * 0.3819660113) % 1.0 * 360 - 180), 5)
        if split_of(lon, lat) == split:
            return lon
    raise RuntimeError(f"No block of {split} at latitude {lat}.")


def _day(lat: float, u: float) -> int:
    for k in range(200):  # no acquisitions in the polar night, few in the depth of winter
        doy = 1 + int((u + k * 0.3819660113) % 1.0 * 365)
        if sun(lat, doy)[0] < np.radians(66):
            return doy
    raise RuntimeError(f"The sun never rises at latitude {lat}.")


def _humans(u: float, elevation: float, annual: float) -> float:
    cold = draws.sigmoid((annual - LAPSE * elevation - 2) / 2.5)
    high = draws.sigmoid((1700 - elevation) / 350)
    return float(u * cold * high)


def nanoseconds(place: Place, days: int = 0) -> int:
    """Acquisition time (int64 nanoseconds since 1970) of the optical product, or `days` later."""
    date = datetime.datetime(place.year, 1, 1, 10, 30) + datetime.timedelta(days=place.doy - 1 + days)
    return int((date - datetime.datetime(1970, 1, 1)).total_seconds()) * 10**9
