"""Published data sets as PANGAEA gives them to TerraMind: bands routed, padded and resized as its benchmark numbers were made.

Optical images enter as S2L2A and radar as S1GRD, whatever they are. Cirrus (B10) lies where the water vapour (B9) would, and a band that
the data set lacks is zero after normalisation, which is by the data set's own statistics (PANGAEA, configs/encoder/terramind_large.yaml).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import modalities
from terramind_jax.tasks.datasets import (
    ai4smallfarms,
    burnscars,
    croptypemapping,
    dynamicearthnet,
    fivebillionpixels,
    mados,
    pastis,
    sen1floods11,
    spacenet7,
)
from terramind_jax.tasks.datasets.dataset import Dataset, Facts, Sample

KNOWN = {
    "sen1floods11": sen1floods11,
    "burnscars": burnscars,
    "mados": mados,
    "pastis": pastis,
    "croptypemapping": croptypemapping,
    "dynamicearthnet": dynamicearthnet,
    "spacenet7": spacenet7,
    "ai4smallfarms": ai4smallfarms,
    "fivebillionpixels": fivebillionpixels,
}
ENTERS_AS = {"S2L1C": "S2L2A", "S2L2A": "S2L2A", "S1GRD": "S1GRD"}
STANDS_FOR = {"WATER_VAPOR": "CIRRUS"}  # what the data set's band is called that lies at a band of the model
ABSENT = -1


def dataset(root: str | os.PathLike, split: str = "train", *, of: str = "", limit: int | None = None, resize: int | None = None) -> Dataset:
    """A split of the data set `of`, one of `KNOWN`, in `root`.

    Args:
      limit: the first so many samples; None: all.
      resize: side that images are brought to, bilinearly, and masks by the nearest pixel; None: they stay.
    """
    if of not in KNOWN:
        raise ValueError(f"Of PANGAEA's data sets there is no {of!r}; known are {', '.join(KNOWN)}.")
    original = KNOWN[of].dataset(root, split)
    facts = routed(original.facts)
    places = {m: places_of(original.facts.bands[m], facts.bands[ENTERS_AS[m]]) for m in original.facts.bands}
    samples = tuple(dataclasses.replace(sample, dates=None) for sample in original.samples[:limit])  # its L-TAE is told no days
    read_inputs = functools.partial(_read_inputs, original.read_inputs, resize)
    read_target = functools.partial(_read_target, original.read_target, resize)
    return Dataset(facts, split, samples, read_inputs, read_target, functools.partial(_route, places))


def routed(facts: Facts) -> Facts:
    """Facts with the modalities that the images enter as, all of their bands, and statistics that leave absent bands zero."""
    changed: dict[str, dict] = {"bands": {}, "mean": {}, "std": {}, "files": {}}
    for name, bands in facts.bands.items():
        enters = ENTERS_AS[name]
        changed["bands"][enters] = modalities.get(enters).bands
        at = places_of(bands, modalities.get(enters).bands)
        for key, nothing in (("mean", 0.0), ("std", 1.0)):
            changed[key][enters] = tuple(nothing if i == ABSENT else getattr(facts, key)[name][i] for i in at)
    return dataclasses.replace(facts, **changed)


def places_of(bands: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each wanted band lies among those of a data set, `ABSENT` where it has none."""
    names = [STANDS_FOR.get(band, band) for band in wanted]
    return [bands.index(name) if name in bands else ABSENT for name in names]


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """``[..., H, W, C]`` to ``[..., side, side, C]``, bilinearly; pixels' centres keep their places."""
    rows, columns = (_weights(length, side) for length in image.shape[-3:-1])
    return np.einsum("yh,...hwc,xw->...yxc", rows, image, columns, optimize=True).astype(np.float32)


def _weights(length: int, side: int) -> np.ndarray:
    """``[side, length]``: what each pixel takes of each."""
    at = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length))).astype(np.float32)


def _read_inputs(read, resize: int | None, sample: Sample) -> dict[str, np.ndarray]:
    return {name: image if resize is None else resized(image, resize) for name, image in read(sample).items()}


def _route(places: Mapping[str, Sequence[int]], images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the images enter as, with all of its bands, of any window of them."""
    found = {}
    for name, image in images.items():
        there = [i for i, at in enumerate(places[name]) if at != ABSENT]
        found[ENTERS_AS[name]] = np.zeros((*image.shape[:-1], len(places[name])), image.dtype)
        found[ENTERS_AS[name]][..., there] = image[..., [places[name][i] for i in there]]
    return found


def _read_target(read, resize: int | None, sample: Sample) -> Any:
    target = read(sample)
    if resize is None:
        return target
    rows, columns = (np.arange(resize) * length // resize for length in target.shape)
    return target[rows[:, None], columns]
