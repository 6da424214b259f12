"""Coordinates as tokens: (lon, lat) snapped to a quarter degree, one id for the latitude and one for the longitude (spec 7.1).

The reference keeps a WordPiece vocabulary of texts such as ``lat=46.25``; its ids follow the plain rule written here, so no file is
needed; `check_vocabulary` compares the published file, where it is at hand, with that rule. The reference spells -0.0 as ``-0.00``,
which its vocabulary lacks; here -0.0 and 0.0 are one id.
"""

from __future__ import annotations

import json
import os

import numpy as np

PAD = 0
UNK = 1
SOS = 2
EOS = 3
SENTINEL = 4  # [S_0]; [S_i] is SENTINEL + i
VOCAB_SIZE = 30_000
SPECIALS = {"[PAD]": PAD, "[UNK]": UNK, "[SOS]": SOS, "[EOS]": EOS, **{f"[S_{i}]": SENTINEL + i for i in range(3)}}

_FIRST_LATITUDE = 4204  # lat=-90.00; below it lie the specials, 200 sentinels and 4M's 4000 unused box tokens
_FIRST_LONGITUDE = 4925  # lon=-180.00; the last is 6365, lon=180.00
_STEPS_PER_DEGREE = 4
LATITUDES = (_FIRST_LATITUDE, _FIRST_LATITUDE + 180 * _STEPS_PER_DEGREE + 1)  # first id, and the one after the last
LONGITUDES = (_FIRST_LONGITUDE, _FIRST_LONGITUDE + 360 * _STEPS_PER_DEGREE + 1)


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


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Longitudes ``[1440]`` eastwards from -180 and latitudes ``[721]`` southwards from 90, in degrees: the places of `locate.density`."""
    return np.arange(360 * _STEPS_PER_DEGREE) / _STEPS_PER_DEGREE - 180, 90 - np.arange(180 * _STEPS_PER_DEGREE + 1) / _STEPS_PER_DEGREE


def vocabulary() -> dict[str, int]:
    """The reference's vocabulary by the rule: 7 special tokens, 721 latitudes and 1441 longitudes with their ids (spec 7.1)."""
    steps = _STEPS_PER_DEGREE
    latitudes = {f"lat={i / steps - 90:.2f}": _FIRST_LATITUDE + i for i in range(180 * steps + 1)}
    longitudes = {f"lon={i / steps - 180:.2f}": _FIRST_LONGITUDE + i for i in range(360 * steps + 1)}
    return {**SPECIALS, **latitudes, **longitudes}


def check_vocabulary(path: str | os.PathLike) -> None:
    """Compares a published coordinate vocabulary, a Hugging Face tokenizers JSON, with the rule that `encode` and `decode` follow.

    Raises:
      ValueError: it is no such file; or entries are missing, have another id, or are coordinates or share an id that the rule knows
        otherwise. One message counts all differences and shows the first of each kind.
    """
    found, expected = _read_vocabulary(path), vocabulary()
    ids = set(expected.values())
    problems = {
        "missing": [text for text in expected if text not in found],
        "with another id": [f"{text} {found[text]}, not {i}" for text, i in expected.items() if found.get(text, i) != i],
        "unknown": [f"{t} {i}" for t, i in found.items() if t not in expected and (i in ids or t.startswith(("lat=", "lon=")))],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(texts)} {kind} ({_first(texts)})" for kind, texts in problems.items() if texts)
        raise ValueError(f"The coordinate vocabulary {path} differs from the rule of ids that this package follows: {listed}.")


def _first(texts: list[str], shown: int = 8) -> str:
    return ", ".join([*texts[:shown], *(["..."] if len(texts) > shown else [])])


def _read_vocabulary(path: str | os.PathLike) -> dict[str, int]:
    """Every text of a tokenizers JSON and its id."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
    except (ValueError, TypeError, KeyError) as error:  # ValueError: neither text nor JSON
        raise ValueError(f"{path} is no vocabulary of the tokenizers library: {error!r}.") from error
