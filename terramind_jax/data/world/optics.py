"""Sentinel-2: from materials to the L1C, L2A, RGB and NDVI products, with and without noise.

Light falls on slopes, terrain and clouds cast shadows, the air scatters and absorbs, sensors add noise at their native 10, 20 or
60 m, and each product is quantised with its own offset.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax.data.clouds import CLOUD_SHADOW, LAND, OPEN_WATER, SNOW, THICK_CLOUD, THIN_CLOUD
from terramind_jax.data.world import draws, spectra
from terramind_jax.data.world.draws import MARGIN, PIXEL, sigmoid
from terramind_jax.data.world.landcover import SNOW as SNOW_CLASS
from terramind_jax.data.world.landcover import Cover
from terramind_jax.data.world.place import Place
from terramind_jax.data.world.terrain import Terrain


@dataclasses.dataclass(frozen=True)
class Sky:
    """Arrays ``[S, S]`` float32: opacity of low clouds and of cirrus, brightness of low clouds, share of sunlight they block."""

    cloud: np.ndarray
    cirrus: np.ndarray
    bright: np.ndarray
    shadow: np.ndarray
    aerosol: float  # optical depth at sea level


def sky(rng: np.random.Generator, place: Place, size: int) -> Sky:
    """Clouds over a scene; their shadows fall away from the sun by height times the tangent of its zenith angle."""
    n = size + 2 * MARGIN
    aerosol = float(rng.gamma(2.5, 0.05))
    zero = np.zeros((size, size), np.float32)
    high = _cirrus(rng, place, size)
    if place.cloudiness == 0:
        return Sky(zero, high, zero, zero, aerosol)
    puffy = rng.uniform(1.0, 1.8)
    field = draws.fractal(rng, n, slope=puffy, shortest=5.0) + 0.06 * draws.fractal(rng, n, slope=0.9, shortest=1.5)
    excess = field - np.quantile(field, 1 - place.cloudiness)
    opacity = 1 - np.exp(-6.0 * np.clip(excess + 0.05, 0, None))
    reach = min(rng.uniform(90, 220) * np.tan(place.sun_zenith), MARGIN * PIXEL - 1) / PIXEL
    dr, dc = round(reach * np.cos(place.sun_azimuth)), round(-reach * np.sin(place.sun_azimuth))
    core = opacity[MARGIN:-MARGIN, MARGIN:-MARGIN]
    cast = opacity[MARGIN - dr : MARGIN - dr + size, MARGIN - dc : MARGIN - dc + size]
    bright = np.clip(0.62 + 0.26 * np.sqrt(np.clip(excess[MARGIN:-MARGIN, MARGIN:-MARGIN], 0, 2)), 0, 1.05)
    return Sky(core, high, bright.astype(np.float32), cast, aerosol)


def _cirrus(rng: np.random.Generator, place: Place, size: int) -> np.ndarray:
    if rng.random() > 0.06 + 0.45 * (place.cloudiness > 0):
        return np.zeros((size, size), np.float32)
    veil = sigmoid(1.5 * draws.smooth_field(rng, size, 20.0, slope=2.0) - 1.0)
    return (rng.uniform(0.03, 0.35) * veil).astype(np.float32)


def materials(cover: Cover) -> np.ndarray:
    """Shares of the materials ``[15, S, S]``: they sum to the brightness of the texture, under snow to nearly one."""
    water = (cover.water | cover.ice).astype(np.float32)
    ground = (1 - np.clip(cover.trees, 0, 0.95)) * (1 - water)
    hard = np.maximum(cover.built, cover.paved) * 0.9
    soil = ground * (1 - hard) * (1 - cover.herbs)
    herb = ground * (1 - hard) * cover.herbs
    dry = herb * (1 - cover.green)
    dirt = 1 - cover.rock
    shares = {
        "clear water": water * (1 - cover.turbid),
        "turbid water": water * cover.turbid,
        "broadleaf": cover.trees * (1 - cover.needle) * (1 - water),
        "conifer": cover.trees * cover.needle * (1 - water),
        "green herb": herb * cover.green,
        "dry herb": dry * 0.45,
        "dark soil": soil * dirt * (1 - cover.sand) * (1 - cover.red) + dry * 0.55 * (1 - cover.red),
        "red soil": soil * dirt * (1 - cover.sand) * cover.red + dry * 0.55 * cover.red,
        "sand": soil * dirt * cover.sand,
        "rock": soil * (1 - dirt),
        "grey roof": ground * hard * (cover.built > 0) * (1 - cover.roof),
        "red roof": ground * hard * (cover.built > 0) * cover.roof,
        "asphalt": ground * hard * (cover.built == 0),
    }
    bare = np.stack([shares[name] * cover.texture for name in shares]) * (1 - cover.snow)
    snow = cover.snow * np.stack([1 - 0.5 * cover.ice, 0.5 * cover.ice]) * (0.93 + 0.07 * cover.texture)
    return np.concatenate([bare, snow]).astype(np.float32)


def sunlight(place: Place, terrain: Terrain, size: int) -> np.ndarray:
    """Direct light on the ground ``[S, S]`` relative to a flat, open surface: slopes and the shadows that mountains cast."""
    east, north = np.sin(place.sun_azimuth), np.cos(place.sun_azimuth)
    tangent = np.tan(place.sun_zenith)
    facing = 1 - (terrain.east * east + terrain.north * north) * tangent
    light = np.clip(facing / np.sqrt(1 + terrain.slope**2), 0, 2.2)
    if place.relief < 30:
        return light.astype(np.float32)
    shade = np.zeros((size, size), np.float32)
    for k in range(2, MARGIN, 3):
        r, c = MARGIN - round(k * north), MARGIN + round(k * east)
        over = terrain.wide[r : r + size, c : c + size] - k * PIXEL / tangent - terrain.elevation
        np.maximum(shade, over, out=shade)
    return (light * (1 - np.clip(shade / 6, 0, 1))).astype(np.float32)


def _native(x: np.ndarray, step: int) -> np.ndarray:
    """Block means of ``[S, S]`` at a native resolution of `step` pixels."""
    if step == 1:
        return x
    rows = x.reshape(len(x) // step, step, -1).sum(axis=1)
    return rows.reshape(len(rows), -1, step).sum(axis=2) / np.float32(step * step)


def _repeat(x: np.ndarray, step: int) -> np.ndarray:
    return x if step == 1 else np.repeat(np.repeat(x, step, axis=0), step, axis=1)


@dataclasses.dataclass(frozen=True)
class _Air:
    """What the atmosphere does, one number a band: light added and lost, and the haze and loss that the L2A correction leaves."""

    path: np.ndarray
    through: np.ndarray
    haze: np.ndarray
    residual: np.ndarray


def _air(rng: np.random.Generator, place: Place, aerosol: float) -> _Air:
    height = max(place.elevation, 0.0)
    airmass = 1 / np.cos(place.sun_zenith)
    thick = aerosol * np.exp(-height / 1500)
    tau = spectra.RAYLEIGH * np.exp(-height / 8400)
    path = 0.37 * tau * (0.6 + 0.4 * airmass) + 0.075 * thick * spectra.AEROSOL * np.sqrt(airmass)
    vapour = (0.25 + place.moisture) * np.exp(0.055 * (place.today - 8)) * np.exp(-height / 2100) * airmass**0.5
    through = np.exp(-0.5 * tau * airmass - 0.06 * thick * airmass)
    through[spectra.VAPOUR] *= np.exp(-1.25 * vapour**0.5)
    through[spectra.CIRRUS_BAND] = np.exp(-5 - 6 * vapour)
    path[spectra.CIRRUS_BAND] = 0.001
    haze = np.clip(rng.normal(0.25, 0.2), -0.2, 1.0) * 0.075 * thick * spectra.AEROSOL
    residual = np.ones(13, np.float32)
    residual[spectra.VAPOUR] = np.exp(-0.07 * vapour**0.5)  # water vapour is never quite corrected in its own band
    return _Air(path.astype(np.float32), through.astype(np.float32), haze.astype(np.float32), residual)


def products(rng: np.random.Generator, place: Place, terrain: Terrain, cover: Cover, sky: Sky, size: int) -> tuple[dict, dict]:
    """(noisy, noise-free) products: S2L1C ``[13, S, S]`` and S2L2A ``[12, S, S]`` uint16, S2RGB ``[3, S, S]`` uint8, NDVI float16."""
    ground = np.einsum("mb,mp->bp", spectra.REFLECTANCE, materials(cover).reshape(len(spectra.MATERIALS), -1))
    direct = sunlight(place, terrain, size) * (1 - 0.92 * sky.shadow)
    clear = (1 - sky.cloud) * (1 - sky.cirrus)
    air = _air(rng, place, sky.aerosol)
    noisy, exact = {"S2L1C": [], "S2L2A": []}, {"S2L1C": [], "S2L2A": []}
    for b, step in enumerate(spectra.NATIVE):
        diffuse = spectra.DIFFUSE[b]
        surface = ground[b].reshape(size, size) * (diffuse * (1 - 0.35 * sky.shadow) + (1 - diffuse) * direct) * clear
        cloud = spectra.CLOUD[b] * sky.cloud * sky.bright * (1 - sky.cirrus) + spectra.CIRRUS[b] * sky.cirrus
        surface, cloud = _native(surface, step), _native(cloud, step)
        open_air = _native(clear, step)
        top = surface * air.through[b] + air.path[b] * (0.25 + 0.75 * open_air) + cloud * (0.36 + 0.4 * air.through[b])
        bottom = surface * air.residual[b] + cloud + air.haze[b] * open_air
        noise = rng.standard_normal(top.shape, dtype=np.float32) * (spectra.NOISE[b] * np.sqrt(0.4 + 4 * np.clip(top, 0, None)))
        for name, value, error in (("S2L1C", top, noise), ("S2L2A", bottom, noise / max(air.through[b], 0.3))):
            if name == "S2L2A" and b == spectra.CIRRUS_BAND:
                continue
            exact[name].append(_repeat(_store(value, place.offsets[name]), step))
            noisy[name].append(_repeat(_store(value + error, place.offsets[name]), step))
    return _derived({k: np.stack(v) for k, v in noisy.items()}), _derived({k: np.stack(v) for k, v in exact.items()})


def _store(reflectance: np.ndarray, offset: int) -> np.ndarray:
    return np.clip(np.rint(reflectance * 10_000) + offset, 1, 28_000).astype(np.uint16)


def _derived(s2: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds S2RGB, one stretch for the three bands of the scene, and NDVI, both from the stored L2A as in the published products."""
    rgb = s2["S2L2A"][[spectra.RED, spectra.GREEN, spectra.BLUE]].astype(np.float32)
    low, high = np.percentile(rgb[:, ::3, ::3], (0.5, 99.7))
    low = 0.35 * low
    high = low + 1.25 * max(high - low, 1800)
    stretched = np.clip((rgb - low) * (255 / (high - low)), 0, 255)
    red, nir = s2["S2L2A"][spectra.RED].astype(np.float32), s2["S2L2A"][spectra.NIR].astype(np.float32)
    return s2 | {"S2RGB": np.rint(stretched).astype(np.uint8), "NDVI": ((nir - red) / (nir + red))[None].astype(np.float16)}


def cloud_mask(cover: Cover, sky: Sky) -> np.ndarray:
    """``[S, S]`` uint8: land, open water, snow, thin cloud, thick cloud, cloud shadow (codes of `data.clouds`)."""
    mask = np.full(cover.classes.shape, LAND, np.uint8)
    mask[cover.water] = OPEN_WATER
    mask[cover.classes == SNOW_CLASS] = SNOW
    mask[sky.shadow > 0.5] = CLOUD_SHADOW
    opacity = 1 - (1 - sky.cloud) * (1 - 0.8 * sky.cirrus)
    mask[opacity > 0.15] = THIN_CLOUD
    mask[opacity > 0.5] = THICK_CLOUD
    return mask
