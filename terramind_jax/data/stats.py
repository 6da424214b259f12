"""Mean and spread of each band over a data set, beside the released ones: read by several processes, merged in one order."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from terramind_jax import declarations
from terramind_jax import modalities as registry
from terramind_jax.data.index import Index, open_index

PIECE = 64  # samples that a process reads at a time

Found = TypeVar("Found")


@dataclasses.dataclass
class Statistics:
    """Mean and standard deviation a band, over `samples` samples, beside the released or declared ones, None where there are none; for
    class maps the share of each class."""

    samples: int
    mean: np.ndarray
    std: np.ndarray
    released_mean: np.ndarray | None
    released_std: np.ndarray | None
    classes: np.ndarray | None = None

    @classmethod
    def of(cls, modality: str, samples: int, moments: Moments) -> Statistics:
        m = registry.get(modality)
        released = registry.statistics(modality) if m.std else (None, None)
        classes = moments.classes / max(moments.classes.sum(), 1) if m.classes else None
        return cls(samples, moments.mean, np.sqrt(moments.squares / np.maximum(moments.count, 1)), *released, classes)


def stats(
    root: str | os.PathLike,
    split: str,
    modalities: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> dict[str, Statistics]:
    """Mean and standard deviation of each band over a split, or over `limit` samples spread evenly through it.

    Pixels without data are left out (`modalities.missing`). `workers` processes read (default: all cores); the numbers do not depend on
    how many, to the last bit. A sample that cannot be read is a `DataError`.
    """
    samples = open_index(root, split, modalities)
    jobs, result = [], {}
    for column, modality in enumerate(samples.modalities):
        rows = np.flatnonzero(samples.available[:, column])
        if limit is not None and len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
        jobs += [(modality, piece) for piece in pieces(rows)]
    for (modality, rows), part in zip(jobs, in_processes(_moments, samples, jobs, workers), strict=True):
        count, before = result.get(modality, (0, None))
        result[modality] = count + len(rows), part if before is None else before.merged(part)
    return {modality: Statistics.of(modality, *found) for modality, found in result.items()}


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of values by band ``[C]``, float64: how many, their mean, the sum of squares about it, and how often each class occurs."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, classes: int) -> Moments:
        """Of ``[n, C]``."""
        values, n = values.astype(np.float64), np.full(values.shape[1], float(len(values)))
        mean = values.mean(0) if len(values) else np.zeros(values.shape[1])
        occurs = np.bincount(values[:, 0].astype(np.int64).clip(0), minlength=classes)[:classes] if classes else np.zeros(0)
        return cls(n, mean, np.square(values - mean).sum(0), occurs)

    @classmethod
    def of_pixels(cls, modality: str, pixels: np.ndarray) -> Moments:
        """Of ``[..., C]`` as stored; pixels without data are left out."""
        return cls.of(pixels[~registry.missing(modality, pixels)], len(registry.get(modality).classes))

    @classmethod
    def of_none(cls, modality: str) -> Moments:
        m = registry.get(modality)
        return cls.of(np.zeros((0, len(m.bands))), len(m.classes))

    def merged(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque)."""
        count, delta = self.count + other.count, other.mean - self.mean
        share = other.count / np.maximum(count, 1)
        squares = self.squares + other.squares + np.square(delta) * self.count * share
        return Moments(count, self.mean + delta * share, squares, self.classes + other.classes)


def _moments(samples: Index, modality: str, rows: np.ndarray) -> Moments:
    """Of the pixels of some samples."""
    total = Moments.of_none(modality)
    for i in rows:
        total = total.merged(Moments.of_pixels(modality, samples.read(int(i), modality)))
    return total


# ---- by several processes ---------------------------------------------------------------------------------------------------


def pieces(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[at : at + PIECE] for at in range(0, len(rows), PIECE)]


def in_processes(
    function: Callable[..., Found], samples: Index, jobs: Sequence[tuple[Any, ...]], workers: int | None = None
) -> Iterator[Found]:
    """``function(samples, *job)`` of each job, in their order, by `workers` processes (default: all cores); a function of a module."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), cores if workers is None else workers)
    with tqdm(total=len(jobs), desc=function.__name__.strip("_"), unit="piece", disable=len(jobs) < 100) as bar:
        if workers <= 1:
            for job in jobs:
                yield function(samples, *job)
                bar.update()
            return
        # Not fork: the caller may have started JAX, whose threads do not survive one.
        with multiprocessing.get_context("spawn").Pool(workers, _open, (function, samples)) as pool:
            for found in pool.imap(_call, jobs):
                yield found
                bar.update()
            pool.close()
            pool.join()


def _open(function: Callable[..., Any], samples: Index) -> None:
    global _opened
    _opened = function, samples


def _call(job: tuple[Any, ...]) -> Any:
    function, samples = _opened
    return function(samples, *job)


# ---- as text ----------------------------------------------------------------------------------------------------------------


def format_stats(result: dict[str, Statistics]) -> str:
    """One line a band: mean and spread here, the released or declared ones, and the ratio of the spreads; of class maps one line a class.

    Below, what a declaration of the modalities of a user's own is to say.
    """
    lines = [f"{'modality':9}{'band':18}{'mean':>11}{'released':>11}{'std':>11}{'released':>11}{'std ratio':>11}"]
    for modality, s in result.items():
        if s.classes is not None:
            lines += [f"{modality:9}{name:18}{share:11.1%}" for name, share in zip(registry.get(modality).classes, s.classes, strict=True)]
            continue
        for i, band in enumerate(registry.get(modality).bands):
            known = (s.released_mean[i], s.released_std[i]) if s.released_std is not None else (np.nan, np.nan)
            numbers = (s.mean[i], known[0], s.std[i], known[1], s.std[i] / known[1])
            lines.append(f"{modality:9}{band:18}" + "".join(f"{'-':>11}" if np.isnan(v) else f"{v:11.3f}" for v in numbers))
    for modality, fields in declarations.of(result).items():
        if result[modality].classes is None:
            found = {name: [float(f"{v:.6g}") for v in getattr(result[modality], name)] for name in ("mean", "std")}
            lines.append(f'For {declarations.NAME}:  "{modality}": {json.dumps(fields | found)}')
    return "\n".join(lines)


def as_json(result: dict[str, Statistics]) -> dict[str, dict[str, Any]]:
    """The same as plain numbers, in full."""
    made = {}
    for modality, s in result.items():
        made[modality] = {"samples": s.samples, "mean": s.mean.tolist(), "std": s.std.tolist()}
        if s.classes is not None:
            made[modality] |= {"classes": dict(zip(registry.get(modality).classes, s.classes.tolist(), strict=True))}
    return made
