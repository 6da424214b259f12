"""Batches of a downstream data set: random crops, turned and flipped, for training; for all else windows that cover every pixel once.

As in pretraining, what a position of the stream holds depends on the seed and the position alone. A sample that cannot be read is an error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from terramind_jax.data import order
from terramind_jax.data.pipeline import iterate
from terramind_jax.tasks.datasets import Dataset

Batch = dict[str, Any]
ENDLESS = 2**48
WAYS = 8  # in which a square can be turned and flipped


def training(
    dataset: Dataset,
    scale: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    crop: int,
    batch_size: int,
    seed: int = 0,
    d4: bool = False,
    focus: bool = False,
    consumed: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> Iterator[Batch]:
    """This host's share of the batches from position `consumed` on, without end; an epoch is every sample once.

    ``{"inputs": {modality: [B, (T,) S, S, C]}, "target", "valid": [B, ...] bool, "view": [B]}``, and ``days`` ``[B, T]`` of a time series.
    The view is the sample's number, plus that of its turn (`turned`) times the number of samples.

    Args:
      scale: mean and standard deviation, ``[C]``, by modality.
      crop: S; an image that is smaller is a ValueError.
      focus: draw a labelled pixel of a mask first, and the crop among those that hold it; where nothing is labelled, among all.
    """
    read = functools.partial(_random_crop, dataset, scale, crop, seed, d4, focus)
    return iterate(grain.MapDataset.range(consumed, ENDLESS)[host::hosts].map(read).batch(batch_size // hosts), workers, threads)


def covering(
    dataset: Dataset,
    scale: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    crop: int,
    batch_size: int,
    way: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> Iterator[Batch]:
    """This host's share of all windows of all samples; the last batch is filled up with what is not valid.

    As of `training`, all turned in one `way`; the view is the window's number. Images may differ in size, but a ValueError tells of one
    that takes another number of windows than the first.
    """
    total, first = count(dataset, crop, batch_size), dataset.image_size()
    read = functools.partial(_window, _Reader(dataset, crop, first, len(windows(first, crop))), scale, way)
    return iterate(grain.MapDataset.range(0, total)[host::hosts].map(read).batch(batch_size // hosts), workers, threads)


def count(dataset: Dataset, crop: int, batch_size: int) -> int:
    """How many windows `covering` gives, those with which it fills up the last batch included."""
    parts = windows(dataset.image_size(), crop)
    return -(-len(dataset) * len(parts) // batch_size) * batch_size


# ---- one sample ----


def _random_crop(dataset: Dataset, scale: Mapping, crop: int, seed: int, d4: bool, focus: bool, position: int) -> Batch:
    place = order.place(position, len(dataset), seed)
    sample = dataset.unrouted(place.rank)
    rng = order.generator("crop", seed, place.epoch, place.rank)
    size = next(iter(sample["inputs"].values())).shape[-3:-1]
    check_crop(dataset, crop, size)
    labelled = np.argwhere(_known(dataset, sample["target"])) if focus and np.ndim(sample["target"]) == 2 else ()
    top, left = _corner(rng, size, crop, labelled)
    found = cut(dataset, sample, scale, slice(top, top + crop), slice(left, left + crop))
    way = int(rng.integers(WAYS)) if d4 else 0
    return {**turned(found, way), "view": np.int32(way * len(dataset) + place.rank)}


def _corner(rng: np.random.Generator, size: Sequence[int], crop: int, labelled: Sequence[Sequence[int]]) -> list[int]:
    """Where a crop begins that holds one of the `labelled` pixels, drawn first, if there are any."""
    spans = [(0, side - crop) for side in size]
    if len(labelled):
        pixel = labelled[rng.integers(len(labelled))]
        spans = [(max(0, at - crop + 1), min(at, last)) for at, (_, last) in zip(pixel, spans, strict=True)]
    return [int(rng.integers(first, last + 1)) for first, last in spans]


def _window(reader: _Reader, scale: Mapping, way: int, position: int) -> Batch:
    i, number = divmod(position, reader.many)
    sample, parts = reader(min(i, len(reader.dataset) - 1))
    part = parts[number]
    found = cut(reader.dataset, sample, scale, part.rows, part.columns)
    own = part.own if found["valid"].ndim == 2 else np.bool_(True)
    found["valid"] = found["valid"] & own & (i < len(reader.dataset))
    return {**turned(found, way), "view": np.int32(position)}


def cut(dataset: Dataset, sample: Mapping[str, Any], scale: Mapping, rows: slice, columns: slice) -> Batch:
    """A window of an unrouted sample, routed and standardised, and which of its targets are known."""
    inputs = dataset.route({m: x[..., rows, columns, :] for m, x in sample["inputs"].items()})
    inputs = {m: (x - scale[m][0]) / scale[m][1] for m, x in inputs.items()}
    target = np.asarray(sample["target"], np.float32 if isinstance(sample["target"], float) else None)
    target = target[rows, columns] if dataset.facts.task in ("segmentation", "regression") else target
    valid = _known(dataset, target)
    dates = next(iter(sample["dates"].values()), None) if "dates" in sample else None
    target = np.where(valid, target, 0).astype(np.int32 if target.dtype.kind in "iu" else np.float32)
    return {"inputs": inputs, "target": target, "valid": np.asarray(valid), **({} if dates is None else {"days": dates})}


def _known(dataset: Dataset, target: np.ndarray) -> np.ndarray:
    return ~np.isnan(target) & (True if dataset.ignore_index is None else target != dataset.ignore_index)


def turned(batch: Batch, way: int) -> Batch:
    """One of the eight ways of a square: `way` % 4 quarter turns, and from 4 on flipped."""

    def turn(x: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
        x = np.rot90(x, way % 4, axes)
        return np.ascontiguousarray(np.flip(x, axes[1]) if way >= 4 else x)

    maps = {name: turn(batch[name], (0, 1)) if batch[name].ndim == 2 else batch[name] for name in ("target", "valid")}
    return {**batch, **maps, "inputs": {m: turn(x, (x.ndim - 3, x.ndim - 2)) for m, x in batch["inputs"].items()}}


def check_crop(dataset: Dataset, crop: int, size: tuple[int, int]) -> None:
    """A ValueError for images that are smaller than the crops."""
    if min(size) < crop:
        most = min(size) // 16 * 16
        raise ValueError(f"The images of {dataset.facts.title} are {size[0]}x{size[1]} pixels; data.crop={crop} can be at most {most}.")


# ---- windows ----


@dataclasses.dataclass(frozen=True)
class Window:
    """`own` ``[crop, crop]`` marks the pixels that no earlier window has."""

    rows: slice
    columns: slice
    own: np.ndarray


def windows(size: tuple[int, int], crop: int) -> list[Window]:
    """Windows that cover an image, row by row; the last of a row or column is shifted back to the edge."""
    seen, found = np.zeros(size, bool), []
    starts = [sorted({min(start, side - crop) for start in range(0, side, crop)}) for side in size]
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = slice(top, top + crop), slice(left, left + crop)
            found.append(Window(rows, columns, ~seen[rows, columns]))
            seen[rows, columns] = True
    return found


@dataclasses.dataclass(eq=False)
class _Reader:
    """Keeps the sample that was read last, as its windows follow each other: as `many` as an image of the size `first` has."""

    dataset: Dataset
    crop: int
    first: tuple[int, int]
    many: int
    kept: tuple[int, Any, list[Window]] | None = None

    def __call__(self, i: int) -> tuple[Any, list[Window]]:
        kept = self.kept
        if kept is None or kept[0] != i:
            sample = self.dataset.unrouted(i)
            self.kept = kept = (i, sample, self._windows(sample))
        return kept[1:]

    def _windows(self, sample: Mapping[str, Any]) -> list[Window]:
        size = next(iter(sample["inputs"].values())).shape[-3:-1]
        check_crop(self.dataset, self.crop, size)
        found = windows(size, self.crop)
        if len(found) != self.many:
            what = f"{sample['name']} is {size[0]}x{size[1]} pixels, the first of its split {self.first[0]}x{self.first[1]}"
            told = f"{len(found)} and {self.many} windows of {self.crop} cover them"
            raise ValueError(f"{what}: {told}; choose a data.crop of which all need as many, or cut the images to one size.")
        return found
