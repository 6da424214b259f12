"""Looks at a data set as a whole: what is indexed, which samples are damaged, and how its statistics compare with the released ones."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from terramind_jax import modalities as registry
from terramind_jax.data import scan, storage, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.table import Table
from terramind_jax.files import is_remote

# What a stored value can be, by modality and unit. NDVI leaves [-1, 1] where offset-corrected reflectances turn negative.
VALID_RANGE: dict[str, tuple[float, float]] = {
    "S2L2A": (0, 32767),
    "S2L1C": (0, 32767),
    "S2RGB": (0, 255),
    "S1GRD": (-100, 60),
    "S1RTC": (-100, 60),
    "DEM": (-500, 9000),
    "LULC": (0, len(registry.LULC_CLASSES) - 1),
    "NDVI": (-2, 2),
}
_SHOWN = 20  # problems kept word for word; the rest are counted


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
    """Mean and standard deviation a band, over `samples` samples, beside the released ones; for LULC the share of each class."""

    samples: int
    mean: np.ndarray
    std: np.ndarray
    released_mean: np.ndarray
    released_std: np.ndarray
    classes: np.ndarray | None = None


def splits(root: str | os.PathLike) -> list[str]:
    """The folders of `root` that hold modalities, in a store train and val; FileNotFoundError if there are none."""
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
    """Reads every sample of a split and counts what is missing, corrupt, NaN, outside `VALID_RANGE` or constant."""
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
    low, high = VALID_RANGE[modality]
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


def stats(root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None, limit: int | None = None) -> dict[str, Statistics]:
    """Mean and standard deviation of each band over a split, or over `limit` samples spread evenly through it. NaN is left out."""
    samples = open_index(root, split, modalities)
    result = {}
    for column, modality in enumerate(samples.modalities):
        rows = np.flatnonzero(samples.available[:, column])
        if limit is not None and len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
        if len(rows):
            mean, std = _moments(samples, rows, modality)
            classes = _class_shares(samples, rows) if modality == "LULC" else None
            result[modality] = Statistics(len(rows), mean, std, *registry.statistics(modality), classes)
    return result


def _moments(samples: Index, rows: np.ndarray, modality: str) -> tuple[np.ndarray, np.ndarray]:
    bands = len(registry.get(modality).bands)
    count, total, squares = np.zeros(bands), np.zeros(bands), np.zeros(bands)
    origin = registry.statistics(modality)[0].astype(np.float64)  # sums of squares about a near-mean lose no digits
    for i in rows:
        pixels = samples.read(int(i), modality).reshape(-1, bands).astype(np.float64) - origin
        valid = ~np.isnan(pixels)
        count += valid.sum(0)
        total += np.sum(pixels, 0, where=valid)
        squares += np.sum(pixels**2, 0, where=valid)
    mean = total / np.maximum(count, 1)
    return mean + origin, np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))


def _class_shares(samples: Index, rows: np.ndarray) -> np.ndarray:
    counts = sum(np.bincount(samples.read(int(i), "LULC").ravel(), minlength=256)[: len(registry.LULC_CLASSES)] for i in rows)
    return counts / counts.sum()


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
    """One line a band: mean and spread here, the released ones, and the ratio of the spreads; for LULC one line a class."""
    lines = [f"{'modality':9}{'band':18}{'mean':>11}{'released':>11}{'std':>11}{'released':>11}{'std ratio':>11}"]
    for modality, s in result.items():
        if s.classes is not None:
            lines += [f"{modality:9}{name:18}{share:11.1%}" for name, share in zip(registry.LULC_CLASSES, s.classes, strict=True)]
            continue
        for i, band in enumerate(registry.get(modality).bands):
            ratio = s.std[i] / s.released_std[i]
            numbers = (s.mean[i], s.released_mean[i], s.std[i], s.released_std[i], ratio)
            lines.append(f"{modality:9}{band:18}" + "".join(f"{v:11.3f}" for v in numbers))
    return "\n".join(lines)
