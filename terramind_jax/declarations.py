"""Modalities of a user's own, declared in a few fields: ``modalities.json`` beside the shards, ``modalities`` in a configuration.

    {"TEMP": {"bands": ["TEMP"], "mean": [285.2], "std": [8.1], "dtype": "float16", "unit": "K", "levels": [8, 8, 8, 6, 5]}}

`declare` puts them among TerraMind's, after which nothing tells them apart. A name means one thing in the whole process, as what is
compiled depends on it; data workers are told by the index that they are given, and whoever loads a checkpoint by its configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from terramind_jax.modalities import MODALITIES, RELEASED, RELEASED_STREAMS, STREAMS, Kind, Modality, image_streams

NAME = "modalities.json"
DTYPES = ("uint8", "int16", "uint16", "float16", "float32")  # of stored pixels
_FIELDS = ("bands", "kind", "mean", "std", "dtype", "unit", "levels", "valid", "classes", "nodata")
_LISTS = ("bands", "mean", "std", "levels", "valid", "classes")


def declare(declarations: Mapping[str, Mapping[str, Any]], where: str = "the declaration") -> None:
    """Adds modalities of a user's own: from now on they are in `MODALITIES` and `STREAMS`, and go wherever TerraMind's go.

    Declaring one again is no error if it is the same, or adds the statistics.

    Args:
      declarations: ``{name: fields}``, fields being ``bands``, names; ``kind``: continuous (default), classes, or sar, which is backscatter
        in dB; ``mean`` and ``std``, a number a band in its unit, needed once it is trained with; ``dtype`` of stored pixels (float32,
        of classes uint8); ``unit``; ``levels`` of its tokenizer's codebook: without them it enters as pixels alone and cannot be
        generated; ``valid``, its lowest and highest value; ``classes``, names of the values of a class map, which enters as tokens alone;
        ``nodata``, the value where nothing was measured, besides NaN.
      where: for errors, the file that they come from.

    Raises:
      ValueError: a name that is taken, a field that is none, a standard deviation of 0, or lists of other lengths than the bands.
    """
    for name, fields in declarations.items():
        new, old = _modality(name, fields, where), MODALITIES.get(name)
        if old is not None and _bare(old) == _bare(new) and not (old.std and new.std):
            new = old if old.std else new
        elif old not in (None, new):
            different = [f for f in _FIELDS if getattr(old, f) != getattr(new, f)]
            both = "; ".join(f"{f} {_plain(getattr(new, f))} and before {_plain(getattr(old, f))}" for f in different)
            raise ValueError(f"{where} declares {name} otherwise than before in this process: {both}. Give one of them another name.")
        MODALITIES[name] = new
        STREAMS.update({s.key: s for s in image_streams(new)})


def _bare(m: Modality) -> Modality:
    return dataclasses.replace(m, mean=(), std=())


def of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those of `names` that are a user's own, as `declare` takes them, for configurations and JSON."""
    own = [MODALITIES[name] for name in names if name in MODALITIES and name not in RELEASED]
    return {m.name: {f: _plain(getattr(m, f)) for f in _FIELDS if getattr(m, f) not in ((), None)} for m in own}


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """The declarations in the text of a ``modalities.json``; a ValueError if it is none, or has one name twice."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{where} declares {twice[0]!r} twice; give one of them another name.")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no JSON object; expected {{NAME: {{'bands': [...], ...}}}}.")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _modality(name: str, fields: Mapping[str, Any], where: str) -> Modality:
    """One checked declaration."""
    what = f"The modality {name!r} of {where}"
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"{what} needs a name of letters, digits and underscores that begins with a letter.")
    taken = next((known for known in MODALITIES if known.lower() == name.lower() and (known in RELEASED or known != name)), None)
    if taken:
        raise ValueError(f"{what} has the name of another, {taken}; choose one that differs in more than case.")
    if name.endswith("_tokens") or f"untok_{name.lower()}@224" in RELEASED_STREAMS:
        raise ValueError(f"{what} has a name that means something else in shards or weights; choose another.")
    if not hasattr(fields, "items"):
        raise ValueError(f"{what} is {fields!r}; expected its fields, such as {{'bands': ['{name}'], 'mean': [0.3], 'std': [0.2]}}.")
    for field in fields:
        if field not in _FIELDS:
            close = difflib.get_close_matches(field, _FIELDS, n=1)
            raise ValueError(f"{what} has a field {field!r}; {f'did you mean {close[0]}' if close else 'expected ' + ', '.join(_FIELDS)}?")
    given = {f: tuple(v) if f in _LISTS and isinstance(v, list | tuple) else v for f, v in fields.items()}
    if bad := [f for f in _LISTS if not isinstance(given.get(f, ()), tuple)]:
        raise ValueError(f"{what} has {bad[0]} {given[bad[0]]!r}; expected a list.")
    kind = given.get("kind", "classes" if given.get("classes") else "continuous")
    dtype = given.get("dtype", "uint8" if kind == "classes" else "float32")
    _check_declaration(what, given, kind, dtype)
    bands, levels = tuple(map(str, given["bands"])), tuple(map(int, given.get("levels", ())))
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    own = {"mean": tuple(map(float, given.get("mean", ()))), "std": tuple(map(float, given.get("std", ())))}
    own |= {"valid": given.get("valid", (float(limits.min), float(limits.max))), "channels": len(bands)}
    if kind == "classes":
        names = tuple(map(str, given["classes"]))
        own = {"mean": (0.0,), "std": (1.0,), "valid": (0, len(names) - 1), "classes": names, "channels": len(names)}
    keys = {"pixels": "" if kind == "classes" else f"untok_{name.lower()}@224", "tokens": f"tok_{name.lower()}@224" if levels else ""}
    own |= {"unit": str(given.get("unit", "")), "nodata": given.get("nodata")}
    return Modality(name, bands, dtype=dtype, levels=levels, kind=kind, **own, **keys)


def _check_declaration(what: str, given: Mapping[str, Any], kind: str, dtype: str) -> None:
    bands, mean, std = (given.get(f, ()) for f in ("bands", "mean", "std"))
    nodata = [] if given.get("nodata") is None else [given["nodata"]]
    if not bands or len(set(bands)) < len(bands):
        raise ValueError(f"{what} has the bands {list(bands)}; expected at least one name, and none twice.")
    if kind not in get_args(Kind):
        raise ValueError(f"{what} is of kind {kind!r}; expected one of {', '.join(get_args(Kind))}.")
    if dtype not in DTYPES:
        raise ValueError(f"{what} has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}.")
    for field, values in (
        ("mean", mean),
        ("std", std),
        ("levels", given.get("levels", ())),
        ("valid", given.get("valid", ())),
        ("nodata", nodata),
    ):
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ValueError(f"{what} has {field} {list(values)}; expected numbers.")
    if len({len(mean), len(std)} - {0} | {len(bands)}) > 1 or bool(mean) != bool(std):
        raise ValueError(f"{what} has {len(bands)} bands, {len(mean)} values of mean and {len(std)} of std; expected as many of each.")
    if any(v <= 0 for v in std):
        raise ValueError(f"{what} has std {list(std)}; expected positive numbers: a band that never varies tells nothing.")
    if any(v < 2 or v != int(v) for v in given.get("levels", ())):
        raise ValueError(f"{what} has levels {list(given['levels'])}; expected whole numbers of at least 2.")
    if given.get("valid") and (len(given["valid"]) != 2 or given["valid"][0] >= given["valid"][1]):
        raise ValueError(f"{what} has valid {list(given['valid'])}; expected its lowest and its highest value.")
    if kind == "classes" and not (given.get("classes") and given.get("levels") and len(bands) == 1 and dtype == "uint8"):
        raise ValueError(
            f"{what} is a class map, so it needs one band, the dtype uint8, names of its classes, and levels of its tokenizer."
        )
    if kind != "classes" and given.get("classes"):
        raise ValueError(f"{what} has names of classes and is of kind {kind!r}; leave out one of the two.")
