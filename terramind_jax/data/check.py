"""Looks at a data set as a whole: what is indexed, which samples are damaged, and how its statistics compare with the released ones."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from terramind_jax import declarations
from terramind_jax import modalities as registry
from terramind_jax.data import scan, storage, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.table import Table
from terramind_jax.files import is_remote

_SHOWN = 20  # problems kept word for word; the rest are counted
_PIECE = 64  # samples that a process reads at a time for `stats`


@dataclasses.dataclass
class ModalityCheck:
    """Counts over one modality of one split. `nan` and `out_of_range` count samples that hold such a pixel, `constant` S1 and S2 tiles
    whose bands have one value each."""

    present: int = 0
    missing: int = 0
    tokens: int = 0
    corrupt: int = 0
    nan: int = 0
    out_of_range: int = 0
    constant: int = 0


@dataclasses.dataclass
class Check:
    """Result of `check`: `modalities` by name, and the first `problems` as sentences."""

    split: str
    samples: int
    modalities: dict[str, ModalityCheck]
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(m.corrupt or m.nan or m.out_of_range or m.constant for m in self.modalities.values())


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


def splits(root: str | os.PathLike) -> list[str]:
    """The folders of `root` that hold modalities, in a store train and val; FileNotFoundError if there are none."""
    scan.declare(root)
    if is_remote(root):
        there = storage.store(root)
        found = [s for s in ("train", "val") if scan.listing(there, os.fspath(root), s)]
    else:
        names = sorted(e.name for e in os.scandir(root) if e.is_dir()) if os.path.isdir(root) else []
        found = [n for n in names if any(os.path.isdir(os.path.join(root, n, m)) for m in registry.MODALITIES)]
    if not found:
        raise FileNotFoundError(f"No splits in {os.fspath(root)}; expected folders like train/S2L2A and val/S2L2A that hold shards.")
    return found


@dataclasses.dataclass
class IndexReport:
    """What an index says of its shards. By folder, such as ``S2L2A`` or ``S2L2A_tokens``: samples `present`, locations that are `missing`
    there, and samples `repeated` under a key that was there before; `faults` are the damaged tars, one sentence each."""

    path: str
    samples: int
    present: dict[str, int]
    missing: dict[str, int]
    repeated: dict[str, int]
    faults: list[str]


def index(root: str | os.PathLike, split: str | None = None) -> dict[str, IndexReport]:
    """Builds, or brings up to date, the index of one split, or of all. A damaged tar is reported and its samples are left out."""
    return {s: _report(*scan.open_table(root, s, rebuild=True)) for s in ([split] if split else splits(root))}


def _report(path: str, found: Table) -> IndexReport:
    present, n = found.meta["counts"], len(found.arrays["keys"])
    scanned = {c: sum(s[3] for s in shards) for c, shards in found.meta["shards"].items()}
    missing = {c: n - count for c, count in present.items()}
    repeated = {c: scanned[c] - count for c, count in present.items()}
    return IndexReport(path, n, present, missing, repeated, [f for faults in found.meta["faults"].values() for f in faults.values()])


def check(root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None) -> Check:
    """Reads every sample of a split and counts what is missing, corrupt, NaN, outside its valid range or constant."""
    samples = open_index(root, split, modalities)
    result = Check(split, len(samples), {m: ModalityCheck() for m in samples.modalities})
    for column, modality in enumerate(samples.modalities):
        row = result.modalities[modality]
        row.present = int(samples.available[:, column].sum())
        row.missing = len(samples) - row.present
        row.tokens = int(samples.has_tokens[:, column].sum())
        for i in np.flatnonzero(samples.available[:, column]):
            _check_sample(samples, int(i), modality, row, result.problems)
    return result


def _check_sample(samples: Index, i: int, modality: str, row: ModalityCheck, problems: list[str]) -> None:
    try:
        pixels = samples.read(i, modality)
    except DataError as error:
        row.corrupt += 1
        _note(problems, str(error))
        return
    missing = int(np.isnan(pixels).sum()) if pixels.dtype.kind == "f" else 0
    low, high = registry.get(modality).valid
    outside = int(np.count_nonzero((pixels < low) | (pixels > high)))
    row.nan += missing > 0
    row.out_of_range += outside > 0
    if views.is_empty(pixels, modality):
        row.constant += 1
        _note(problems, f"{modality} of sample {samples.keys[i]!r} has one value everywhere, as where nothing was measured.")
    if missing:
        _note(problems, f"{modality} of sample {samples.keys[i]!r} has {missing} NaN values.")
    if outside:
        _note(problems, f"{modality} of sample {samples.keys[i]!r} has {outside} values outside {low}..{high}.")


def _note(problems: list[str], sentence: str) -> None:
    if len(problems) < _SHOWN:
        problems.append(sentence)


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
        jobs += [(modality, rows[at : at + _PIECE]) for at in range(0, len(rows), _PIECE)]
    for (modality, rows), part in zip(jobs, _pieces(samples, jobs, workers), strict=True):
        count, before = result.get(modality, (0, None))
        result[modality] = count + len(rows), part if before is None else before.merged(part)
    return {modality: _statistics(modality, *found) for modality, found in result.items()}


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

    def merged(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque)."""
        count, delta = self.count + other.count, other.mean - self.mean
        share = other.count / np.maximum(count, 1)
        squares = self.squares + other.squares + np.square(delta) * self.count * share
        return Moments(count, self.mean + delta * share, squares, self.classes + other.classes)


def _pieces(samples: Index, jobs: Sequence[tuple[str, np.ndarray]], workers: int | None) -> Iterator[Moments]:
    """What `_piece` makes of each job, in their order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), cores if workers is None else workers)
    if workers <= 1:
        yield from (_piece(samples, *job) for job in jobs)
        return
    # Not fork: the caller may have started JAX, whose threads do not survive one.
    with multiprocessing.get_context("spawn").Pool(workers, _open, (samples,)) as pool:
        yield from pool.imap(_piece_of_opened, jobs)
        pool.close()
        pool.join()


def _open(samples: Index) -> None:
    global _opened
    _opened = samples


def _piece_of_opened(job: tuple[str, np.ndarray]) -> Moments:
    return _piece(_opened, *job)


def _piece(samples: Index, modality: str, rows: np.ndarray) -> Moments:
    """Of the pixels of some samples."""
    m = registry.get(modality)
    total = Moments.of(np.zeros((0, len(m.bands))), len(m.classes))
    for i in rows:
        pixels = samples.read(int(i), modality)
        total = total.merged(Moments.of(pixels[~registry.missing(modality, pixels)], len(m.classes)))
    return total


def _statistics(modality: str, samples: int, found: Moments) -> Statistics:
    m = registry.get(modality)
    released = registry.statistics(modality) if m.std else (None, None)
    classes = found.classes / max(found.classes.sum(), 1) if m.classes else None
    return Statistics(samples, found.mean, np.sqrt(found.squares / np.maximum(found.count, 1)), *released, classes)


# ---- as text ----------------------------------------------------------------------------------------------------------------


def format_index(reports: dict[str, IndexReport]) -> str:
    """How many samples each split holds, by folder, and what is wrong with its tars."""
    lines = []
    for split, r in reports.items():
        lines += [f"{split}: {r.samples} locations, indexed in {r.path}", f"  {'':14}{'present':>12}{'missing':>12}{'repeated':>12}"]
        lines += [f"  {c:14}{r.present[c]:>12}{r.missing[c]:>12}{r.repeated[c]:>12}" for c in r.present]
        lines += [f"- {sentence}" for sentence in r.faults]
    return "\n".join(lines)


def format_check(result: Check) -> str:
    """A table of a `Check`, its problems below."""
    fields = [f.name for f in dataclasses.fields(ModalityCheck)]
    lines = [f"{result.split}: {result.samples} locations", f"{'modality':10}" + "".join(f"{f:>14}" for f in fields)]
    lines += [f"{m:10}" + "".join(f"{getattr(row, f):>14}" for f in fields) for m, row in result.modalities.items()]
    lines += [f"- {p}" for p in result.problems]
    return "\n".join([*lines, "No problems." if result.ok else "There are problems."])


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
