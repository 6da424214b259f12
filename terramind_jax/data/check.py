"""Looks at a data set as a whole: what is indexed, what a copy lacks, which samples are damaged, and whether the values can be right."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import modalities as registry
from terramind_jax.data import metadata, records, scan, storage, tars, views
from terramind_jax.data.errors import NAMED, DataError, some
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.stats import Moments, Statistics, in_processes, pieces
from terramind_jax.data.table import Table
from terramind_jax.files import is_remote
from terramind_jax.modalities import Stream

_SHOWN = 20  # damaged samples that are told word for word; the rest are counted
_OTHER = {"S1GRD": "S1RTC", "S1RTC": "S1GRD"}  # products of Sentinel-1: TerraMesh has one of them a location
# Samples of TerraMesh, and its shards by subset, which carry one number each in all modalities.
PUBLISHED = {"train": (9_089_536, {"majortom": 793, "ssl4eos12": 96}), "val": (89_088, {"majortom": 8, "ssl4eos12": 1})}

# Statistics that no data of a modality have, however few samples and whatever they show: a mean so many released standard deviations off, a
# standard deviation so many times the released one, or, of what is never constant, so small a part of it.
FAR, WIDE, NARROW = 5.0, 5.0, 1e-3

# Almost nothing at the ground is seen in the cirrus band of S2L1C, so the darkest pixels of almost any tile are near 0 there, and near 1000
# where the product's offset was not taken off. Between, all is under cirrus, and above it nothing can be told.
_CIRRUS = registry.S2L1C_BANDS.index("CIRRUS")
_PLAIN, _SHIFTED = (0, 300), (950, 1300)


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


def lacking(names: Sequence[str], available: np.ndarray, subset: np.ndarray) -> dict[str, np.ndarray]:
    """The locations that lack each of the folders `names`, as rows of ``available [n, len(names)]``.

    One product of Sentinel-1 stands for the other, and a subset that has neither anywhere was published without.
    """
    found = {}
    for column, name in enumerate(names):
        there = available[:, column]
        product, tokens, _ = name.partition("_tokens")
        if product in _OTHER:
            there = there | available[:, [names.index(n) for n in names if n == _OTHER[product] + tokens]].any(1)
            found[name] = np.flatnonzero(~there & np.isin(subset, np.unique(subset[there])))
        else:
            found[name] = np.flatnonzero(~there)
    return found


# ---- the index --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class IndexReport:
    """What an index says of its shards. By folder, such as ``S2L2A`` or ``S2L2A_tokens``: samples `present`, locations that are `missing`
    there, samples `repeated` under a key that was there before, and the first keys that are `lacking` (`check.lacking`) or `twice` there;
    `faults` are the damaged tars, one sentence each, and `listed` says how the published list of samples compares (`metadata`)."""

    path: str
    samples: int
    present: dict[str, int]
    missing: dict[str, int]
    repeated: dict[str, int]
    lacking: dict[str, list[str]]
    twice: dict[str, list[str]]
    faults: list[str]
    listed: list[str]


def index(root: str | os.PathLike, split: str | None = None) -> dict[str, IndexReport]:
    """Builds, or brings up to date, the index of one split, or of all. A damaged tar is reported and its samples are left out."""
    return {s: _report(root, s, *scan.open_table(root, s, rebuild=True)) for s in ([split] if split else splits(root))}


def _report(root: str | os.PathLike, split: str, path: str, found: Table) -> IndexReport:
    present, keys = found.meta["counts"], found.arrays["keys"]
    scanned = {c: sum(s[3] for s in shards) for c, shards in found.meta["shards"].items()}
    repeated = {c: scanned[c] - count for c, count in present.items()}
    lacks = lacking(found.meta["columns"], found.arrays["available"], found.arrays["subset"])
    return IndexReport(
        path=path,
        samples=len(keys),
        present=present,
        missing={c: len(keys) - count for c, count in present.items()},
        repeated=repeated,
        lacking={c: [k.decode() for k in keys[rows[: NAMED + 1]].tolist()] for c, rows in lacks.items() if len(rows)},
        twice={c: list(itertools.islice(_twice(root, split, c, found), NAMED + 1)) for c, count in repeated.items() if count},
        faults=[f for faults in found.meta["faults"].values() for f in faults.values()],
        listed=list(itertools.chain(*metadata.compare(root, split, keys))),
    )


def _twice(root: str | os.PathLike, split: str, folder: str, found: Table) -> Iterator[str]:
    """Keys that a folder holds again: those of its tars that do not lie where the index says. Only tars with such samples are read."""
    store, keys, suffix = storage.store(root), found.arrays["keys"], scan.suffix_of(folder)
    shard, offset, size = (found.arrays[f"{folder}/{f}"] for f in ("shard", "offset", "size"))
    kept = np.bincount(shard[size > 0], minlength=len(found.meta["shards"][folder]))
    for number, (name, length, _, count) in enumerate(found.meta["shards"][folder]):
        path = storage.join(root, split, folder, name)
        read = functools.partial(store.read, path, block=16 << 20)
        for member, start, _ in tars.scan(path, read, length) if kept[number] < count else ():
            key = os.path.basename(member).removesuffix(suffix)
            row = int(scan.places_in(np.array([key.encode()]), keys)[0])
            if member.endswith(suffix) and (shard[row], offset[row]) != (number, start):
                yield key


# ---- every sample -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ModalityCheck:
    """Counts over one modality of one split. `nan` and `out_of_range` count samples that hold such a pixel, `constant` S1 and S2 tiles
    whose bands have one value each, `bad_tokens` those that cannot be read or that no tokenizer of the modality gives."""

    present: int = 0
    missing: int = 0
    tokens: int = 0
    corrupt: int = 0
    nan: int = 0
    out_of_range: int = 0
    constant: int = 0
    bad_tokens: int = 0


@dataclasses.dataclass
class Check:
    """Result of `check`: `modalities` and the `statistics` of their sound samples by name, and as sentences what is wrong, all `problems`
    of the split and the first of its samples, and what is only worth knowing, `notes`."""

    split: str
    samples: int
    modalities: dict[str, ModalityCheck]
    statistics: dict[str, Statistics] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def check(root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None, workers: int | None = None) -> Check:
    """Reads every sample of a split, its tokens too, by `workers` processes (default: all cores).

    A problem is what is corrupt, NaN, outside its valid range or constant, tokens of another shape, vocabulary or sample, a shard that
    only some modalities have, samples that only the published list of all has (`metadata`, where all `modalities` are checked), and
    statistics that no data of a modality have (`FAR`, `WIDE`, `NARROW`; small sets differ from the released ones as they like). Samples
    that lack a modality are noted, tiles of several sizes, and in how many of S2L1C the reflectance is stored with an offset of 1000.
    """
    samples = open_index(root, split, modalities)
    result = Check(split, len(samples), {m: ModalityCheck() for m in samples.modalities})
    total, shifted, plain = {}, 0, 0
    sizes = {m: collections.Counter() for m in samples.modalities}
    for part in in_processes(_check, samples, _jobs(root, split, samples), workers):
        row = result.modalities[part.modality]
        for field in dataclasses.fields(row):
            setattr(row, field.name, getattr(row, field.name) + getattr(part.counts, field.name))
        result.problems += part.problems[: _SHOWN - len(result.problems)]
        count, moments = total.get(part.modality, (0, Moments.of_none(part.modality)))
        total[part.modality] = count + part.sound, moments.merged(part.moments)
        shifted, plain = shifted + part.shifted, plain + part.plain
        sizes[part.modality].update(part.sizes)
    for row in result.modalities.values():
        row.missing = len(samples) - row.present
    try:
        samples.check_tokens()
    except ValueError as error:
        result.problems.append(str(error))
    result.statistics = {m: Statistics.of(m, *found) for m, found in total.items() if found[0]}
    result.problems += [p for m, s in result.statistics.items() if (p := _implausible(m, s))]
    lacks = lacking(samples.modalities, samples.available, samples.subset)
    result.notes += [
        f"{m} is lacking in {len(rows)} samples: {some([samples.keys[int(i)] for i in rows[: NAMED + 1]])}."
        for m, rows in lacks.items()
        if len(rows) and result.modalities[m].present
    ]
    result.notes += [f"{m} has tiles of several sizes: {_sizes(found)}." for m, found in sizes.items() if len(found) > 1]
    if shifted + plain:
        result.notes.append(_offsets(shifted, plain, result.modalities["S2L1C"].present))
    if not records.is_prepared(root, split):
        _check_shards(root, split, samples.modalities, result)
    if modalities is None:
        problems, notes = metadata.compare(root, split, samples.keys.raw(slice(None)))
        result.problems, result.notes = result.problems + problems, result.notes + notes
    return result


@dataclasses.dataclass
class _Part:
    """What was found in some samples of one modality: `moments` of those that are `sound`; how many S2L1C have an offset, and have none;
    how many have each height and width."""

    modality: str
    counts: ModalityCheck
    moments: Moments
    problems: list[str] = dataclasses.field(default_factory=list)
    sound: int = 0
    shifted: int = 0
    plain: int = 0
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)


def _jobs(root: str | os.PathLike, split: str, samples: Index) -> list[tuple[str, np.ndarray, Stream | None, int]]:
    """Of each modality pieces of its pixels, then of its tokens with their stream and the side of the crops they were made of."""
    jobs = []
    for column, modality in enumerate(samples.modalities):
        jobs += [(modality, rows, None, 0) for rows in pieces(np.flatnonzero(samples.available[:, column]))]
        path = storage.join(root, split, f"{modality}_tokens", "tokenizer.json")
        stream = registry.STREAMS.get(registry.get(modality).tokens)
        if stream is not None and samples.has_tokens[:, column].any():
            made = json.loads(storage.store(root).read_text(path) or "{}")
            known = {"vocab_size": made.get("codebook_size", stream.vocab_size), "num_codebooks": made.get("num_codebooks", 1)}
            side = made.get("image_size", registry.IMAGE_SIZE)
            stream = dataclasses.replace(stream, **known)
            jobs += [(modality, rows, stream, side) for rows in pieces(np.flatnonzero(samples.has_tokens[:, column]))]
    return jobs


def _check(samples: Index, modality: str, rows: np.ndarray, tokens: Stream | None, image_size: int) -> _Part:
    """Pixels, or the `tokens` of a stream, of some samples."""
    part = _Part(modality, ModalityCheck(), Moments.of_none(modality))
    for i in rows:
        if tokens is None:
            _check_pixels(samples, int(i), part)
        else:
            _check_tokens(samples, int(i), tokens, image_size, part)
    return part


def _check_pixels(samples: Index, i: int, part: _Part) -> None:
    modality, row, told = part.modality, part.counts, len(part.problems)
    row.present += 1
    try:
        pixels = samples.read(i, modality)
    except DataError as error:
        row.corrupt += 1
        part.problems.append(str(error))
        return
    part.sizes[pixels.shape[:2]] += 1
    missing = int(np.isnan(pixels).sum()) if pixels.dtype.kind == "f" else 0
    low, high = registry.get(modality).valid
    outside = int(np.count_nonzero((pixels < low) | (pixels > high)))
    row.nan += missing > 0
    row.out_of_range += outside > 0
    what = f"{modality} of sample {samples.keys[i]!r} has"
    if views.is_empty(pixels, modality):
        row.constant += 1
        part.problems.append(f"{what} one value everywhere, as where nothing was measured.")
    if missing:
        part.problems.append(f"{what} {missing} NaN values.")
    if outside:
        part.problems.append(f"{what} {outside} values outside {low}..{high}.")
    if len(part.problems) > told:
        return
    part.sound += 1
    part.moments = part.moments.merged(Moments.of_pixels(modality, pixels))
    measured = pixels[~registry.missing(modality, pixels)] if modality == "S2L1C" else ()
    if len(measured):
        darkest = np.percentile(measured[:, _CIRRUS], 1)
        part.plain += _PLAIN[0] <= darkest < _PLAIN[1]
        part.shifted += _SHIFTED[0] <= darkest < _SHIFTED[1]


def _check_tokens(samples: Index, i: int, stream: Stream, image_size: int, part: _Part) -> None:
    part.counts.tokens += 1
    what, expected = f"Sample {samples.keys[i]!r}", views.tokens_shape(stream, image_size)
    try:
        grid = samples.tokens(i, part.modality)
        if grid.shape != expected:
            raise DataError(f"{what}: tokens of {part.modality} have shape {grid.shape}, expected {expected}.", "shape")
        views.check_ids(grid, stream, what)
    except DataError as error:
        part.counts.bad_tokens += 1
        part.problems.append(str(error))


# ---- the split as a whole ---------------------------------------------------------------------------------------------------


def _implausible(modality: str, s: Statistics) -> str:
    """What is wrong with statistics that no data of the modality have; "" for all others."""
    if s.released_std is None or s.classes is not None:
        return ""
    far, wide = _distances(s)
    narrow = (wide < NARROW) & (modality in registry.RELEASED and modality.startswith(views.NEVER_CONSTANT))
    wrong = np.flatnonzero((far > FAR) | (wide > WIDE) | narrow)
    if not len(wrong):
        return ""
    i = int(wrong[0])
    return (
        f"{modality} has a mean of {s.mean[i]:.4g} and a standard deviation of {s.std[i]:.4g} in {registry.get(modality).bands[i]}, where "
        f"{s.released_mean[i]:.4g} and {s.released_std[i]:.4g} are expected; is it in another unit?"
    )


def _distances(s: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """By band: how many released standard deviations the mean is off, and the standard deviation over the released one."""
    return np.abs(s.mean - s.released_mean) / s.released_std, s.std / s.released_std


def _sizes(found: collections.Counter[tuple[int, int]]) -> str:
    return ", ".join(f"{count} of {height} x {width} pixels" for (height, width), count in found.most_common(NAMED))


def _offsets(shifted: int, plain: int, samples: int) -> str:
    """No problem of a copy: TerraMesh's own example tiles are of both kinds."""
    counts = f"{shifted} of {samples} samples are stored with an offset of 1000, {plain} without"
    both = " Both occur, as in TerraMesh: no fault of a copy, though the same ground is stored in two ways." if shifted and plain else ""
    return f"By their cirrus band, S2L1C: {counts}, and of {samples - shifted - plain} it cannot be told.{both}"


def _check_shards(root: str | os.PathLike, split: str, modalities: Sequence[str], result: Check) -> None:
    """Shards that only some modalities have, or for packed data samples that are fewer than were packed; how much of TerraMesh there is."""
    _, found = scan.open_table(root, split)
    shards = {m: {s[0] for s in found.meta["shards"][m]} for m in modalities if m in found.meta["shards"]}
    made = _made(root)
    if made.get("format") == "terramesh-zarr2-tar":  # `data pack`: a stretch of its places may lack a modality altogether
        packed = made["splits"].get(split, {})
        fewer = {m: (row.present, packed.get(m, 0)) for m, row in result.modalities.items() if row.present < packed.get(m, 0)}
        result.problems += [f"{m} has {there} samples of {count} that were packed; copy them again." for m, (there, count) in fewer.items()]
        return
    for modality, names in missing_shards(shards).items():
        result.problems.append(f"{modality} lacks {len(names)} shards that other modalities have, {some(names)}; copy them.")
    total, subsets = PUBLISHED.get(split, (0, {}))
    names = set().union(*shards.values())
    if names and "scenes" not in made and {scan.subset_of(n) for n in names} <= set(subsets):
        result.notes.append(
            f"Of TerraMesh's {total} samples of {split} {result.samples} are here, in {len(names)} of {sum(subsets.values())} shards."
        )


def missing_shards(shards: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Names that a modality's `shards` lack and others' have.

    A product of Sentinel-1 is expected in the subsets that it has a shard of, and not where the other is.
    """
    everything, missing = set().union(*shards.values()), {}
    for modality, names in shards.items():
        expected, subsets = everything, {scan.subset_of(n) for n in names}
        if modality in _OTHER:
            expected = {n for n in everything if scan.subset_of(n) in subsets} - set(shards.get(_OTHER[modality], ()))
        if lost := sorted(expected - set(names)):
            missing[modality] = lost
    return missing


def _made(root: str | os.PathLike) -> dict[str, Any]:
    """What `data pack` and `data synthesize` say of what they wrote; {} where nothing, or something else, is said."""
    try:
        made = json.loads(storage.store(root).read_text(storage.join(root, "dataset_info.json")) or "{}")
    except (ValueError, OSError):
        return {}
    return made if isinstance(made, dict) else {}


# ---- as text ----------------------------------------------------------------------------------------------------------------


def format_index(reports: dict[str, IndexReport]) -> str:
    """How many samples each split holds, by folder, the first keys that a folder lacks or holds twice, and what is wrong with its tars."""
    lines = []
    for split, r in reports.items():
        lines += [f"{split}: {r.samples} locations, indexed in {r.path}", f"  {'':14}{'present':>12}{'missing':>12}{'repeated':>12}"]
        lines += [f"  {c:14}{r.present[c]:>12}{r.missing[c]:>12}{r.repeated[c]:>12}" for c in r.present]
        lines += [f"- {c} lacks {some(keys)}" for c, keys in r.lacking.items() if r.present[c]]
        lines += [f"- {c} repeats {some(keys)}" for c, keys in r.twice.items()]
        lines += [f"- {sentence}" for sentence in r.faults + r.listed]
    return "\n".join(lines)


def format_check(result: Check) -> str:
    """A table of a `Check`, how its statistics compare, notes, and problems."""
    fields = [f.name for f in dataclasses.fields(ModalityCheck)]
    lines = [f"{result.split}: {result.samples} locations", f"{'modality':10}" + "".join(f"{f:>14}" for f in fields)]
    lines += [f"{m:10}" + "".join(f"{getattr(row, f):>14}" for f in fields) for m, row in result.modalities.items()]
    for m, s in result.statistics.items():
        if s.released_std is not None and s.classes is None:
            far, wide = _distances(s)
            worst = registry.get(m).bands[int(far.argmax())]
            spread = f"standard deviations {wide.min():.2f} to {wide.max():.2f} of the released"
            lines.append(f"{m}: means up to {far.max():.2f} released standard deviations off ({worst}), {spread}.")
    lines += result.notes
    lines += [f"- {p}" for p in result.problems]
    return "\n".join([*lines, "No problems." if result.ok else "There are problems."])
