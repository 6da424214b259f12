"""Sentinel-1: backscatter of the cover at the radar's own date, terrain effects, thermal noise and speckle.

GRD is brightness against the ellipsoid: slopes that face the radar shine. RTC has that removed. Clouds play no part.
"""

from __future__ import annotations

import numpy as np

from terramind_jax.data.world import draws
from terramind_jax.data.world.landcover import BUILT, FLOODED, Cover
from terramind_jax.data.world.place import LAPSE, Place
from terramind_jax.data.world.terrain import Terrain

LOOKS = 4.4
_NOISE_DB = (-27.0, -29.5)  # thermal noise, VV and VH

# gamma-nought in dB, (VV, VH)
_GAMMA = {
    "calm water": (-24.5, -31.5),
    "trees": (-9.0, -14.6),
    "conifers": (-10.0, -16.0),
    "green herb": (-10.8, -16.6),
    "dry herb": (-13.0, -20.5),
    "dry soil": (-18.0, -27.5),
    "wet soil": (-9.0, -19.0),
    "rock": (-9.5, -17.5),
    "roofs": (0.0, -8.5),
    "paved": (-16.0, -24.0),
    "snow": (-13.0, -19.0),
    "wet snow": (-19.0, -25.5),
    "ice": (-12.5, -18.5),
    "flooded": (-6.5, -14.5),
}


def _power(name: str) -> np.ndarray:
    return (10 ** (np.array(_GAMMA[name], np.float32) / 10))[:, None, None]


def gamma_nought(rng: np.random.Generator, place: Place, terrain: Terrain, cover: Cover, size: int) -> np.ndarray:
    """Mean backscatter ``[2, S, S]`` in linear power, free of terrain effects, thermal noise and speckle."""
    wind = rng.gamma(2.0, 1.0)
    rain = rng.normal(0, 0.18)
    ground = 1 - cover.trees
    wet = np.clip(cover.wet + rain, 0, 1)
    soil = _power("dry soil") * (1 - wet) + _power("wet soil") * wet
    soil = soil * (1 - cover.rock) + _power("rock") * cover.rock
    soil = soil * np.exp(0.35 * (cover.texture - 1) / 0.16)[None]  # roughness of tilled fields
    herb = _power("dry herb") * (1 - cover.green_radar) + _power("green herb") * cover.green_radar
    land = cover.herbs * (0.75 * herb + 0.25 * soil) + (1 - cover.herbs) * soil
    land = land * ground + (_power("trees") * (1 - cover.needle) + _power("conifers") * cover.needle) * cover.trees
    aligned = 0.6 + 0.8 * rng.random()  # streets that face the radar return more
    land = np.where(cover.classes == BUILT, 0.45 * land + aligned * _power("roofs") * (0.1 + 0.9 * cover.built), land)
    land = np.where(cover.paved > 0, 0.5 * (land + _power("paved")), land)
    land = np.where(cover.classes == FLOODED, 0.5 * (land + _power("flooded")), land)
    melt = draws.sigmoid((place.today - LAPSE * terrain.elevation + 1.0) / 0.7)
    land = land * (1 - 0.5 * cover.snow) + cover.snow * 0.5 * (_power("snow") * (1 - melt) + _power("wet snow") * melt)
    land = np.where(cover.ice, _power("ice"), land)
    waves = _power("calm water") * (0.4 + wind * (0.6 + 0.9 * terrain.sea)) * np.exp(0.2 * draws.smooth_field(rng, size, 20.0))
    return np.where(cover.water, waves, land).astype(np.float32)


def slope_effect(rng: np.random.Generator, terrain: Terrain) -> np.ndarray:
    """Brightness ``[S, S]`` of GRD over that of RTC: the incidence angle and the area that a slope presents to the radar.

    All passes are descending ones and look west, so that the morning sun's shading in Sentinel-2 tells which slopes shine.
    """
    incidence = np.radians(rng.uniform(31, 45))
    heading = np.radians(280)
    toward = -(terrain.east * np.sin(heading) + terrain.north * np.cos(heading))
    across = terrain.east * np.cos(heading) - terrain.north * np.sin(heading)
    local = np.clip(incidence - np.arctan(-toward), 0.12, 1.5)
    area = np.tan(incidence) / np.tan(local) * np.cos(np.arctan(across))
    return (np.cos(incidence) * np.clip(area, 0.1, 8.0)).astype(np.float32)


def product(rng: np.random.Generator, place: Place, terrain: Terrain, cover: Cover, size: int, grd: bool) -> tuple[np.ndarray, np.ndarray]:
    """(speckled, mean) backscatter ``[2, S, S]`` float16 in dB: S1GRD if `grd`, otherwise S1RTC."""
    power = gamma_nought(rng, place, terrain, cover, size)
    effect = slope_effect(rng, terrain)
    power = power * effect if grd else power
    power = power + (10 ** (np.array(_NOISE_DB, np.float32) / 10))[:, None, None]
    speckle = rng.standard_gamma(LOOKS, power.shape, dtype=np.float32) / np.float32(LOOKS)
    return _decibel(power * speckle), _decibel(power)


def _decibel(power: np.ndarray) -> np.ndarray:
    return (10 * np.log10(np.maximum(power, 1e-5))).astype(np.float16)
