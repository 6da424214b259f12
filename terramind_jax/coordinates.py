"""Coordinates as tokens: (lon, lat) snapped to a quarter degree, one id for the latitude and one for the longitude (spec 7.1).

The reference keeps a WordPiece vocabulary of texts such as ``lat=46.25``; its ids follow the plain rule written here, so no file is
needed. The reference spells -0.0 as ``-0.00``, which its vocabulary lacks; here -0.0 and 0.0 are one id.
"""

from __future__ import annotations

import numpy as np

PAD = 0
UNK = 1
SOS = 2
EOS = 3
SENTINEL = 4  # [S_0]; [S_i] is SENTINEL + i
VOCAB_SIZE = 30_000

_FIRST_LATITUDE = 4204  # lat=-90.00; below it lie the specials, 200 sentinels and 4M's 4000 unused box tokens
_FIRST_LONGITUDE = 4925  # lon=-180.00; the last is 6365, lon=180.00
_STEPS_PER_DEGREE = 4


def _ids(degrees: np.ndarray, first: int, limit: int, name: str) -> np.ndarray:
    """Degrees in [-limit, limit] -> ids; half a step rounds to the even step, as in the reference."""
    inside = np.abs(degrees) <= limit  # False for NaN as well
    if not inside.all():
        wrong = np.asarray(degrees)[~inside].flat[0]
        raise ValueError(f"{name} is {wrong}, expected degrees in [-{limit}, {limit}].")
    return first + (np.round(_STEPS_PER_DEGREE * degrees) + _STEPS_PER_DEGREE * limit).astype(np.int32)


def encode(lon: float | np.ndarray, lat: float | np.ndarray | None = None) -> np.ndarray:
    """``(lon, lat)`` in degrees, WGS 84 -> int32 ``[3]``: latitude id, longitude id, EOS.

    Arrays ``[B]``, or one array ``[B, 2]`` of (lon, lat) pairs, give ``[B, 3]``. A value outside the globe, or NaN, is a ValueError.
    """
    if lat is None:
        pairs = np.asarray(lon)
        if pairs.shape[-1:] != (2,):
            raise ValueError(f"Coordinates have shape {pairs.shape}, expected (lon, lat) pairs [..., 2].")
        lon, lat = pairs[..., 0], pairs[..., 1]
    latitude = _ids(np.asarray(lat), _FIRST_LATITUDE, 90, "Latitude")
    longitude = _ids(np.asarray(lon), _FIRST_LONGITUDE, 180, "Longitude")
    return np.stack([latitude, longitude, np.full_like(latitude, EOS)], axis=-1)


def decode(ids: np.ndarray) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Ids ``[>=2]`` -> ``(lon, lat)`` in degrees; ``[B, >=2]`` -> two arrays ``[B]``.

    The first id is read as the latitude, the second as the longitude. Where either is not one, both are NaN.
    """
    ids = np.asarray(ids)
    lat = (ids[..., 0] - _FIRST_LATITUDE) / _STEPS_PER_DEGREE - 90
    lon = (ids[..., 1] - _FIRST_LONGITUDE) / _STEPS_PER_DEGREE - 180
    valid = (np.abs(lat) <= 90) & (np.abs(lon) <= 180)
    lon, lat = np.where(valid, lon, np.nan), np.where(valid, lat, np.nan)
    return (lon, lat) if ids.ndim > 1 else (float(lon), float(lat))
