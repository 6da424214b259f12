"""``evaluate generation``: what a model generates beside the truth, on a split of shards or a folder of GeoTIFFs.

Each target is generated alone, so that a wrong one misleads no other. Of shards the centre crops are generated; scenes of a folder have
any size, and windows of them are joined as the command ``generate`` does it, whose seams are measured then. The reference may generate
the same beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, generate_scenes, geo, modalities, plot, sources
from terramind_jax.data import views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index, open_index
from terramind_jax.evaluation import reference as references
from terramind_jax.evaluation import results, scores
from terramind_jax.evaluation.scores import Lines, Scores, scores_of
from terramind_jax.scenes import reading, windows
from terramind_jax.scenes.feeding import Network, padded
from terramind_jax.scenes.generating import NO_CLASS
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.tokenizer import Clip, Sampler, diffusion

GENERATED = "generated"  # folder of the GeoTIFFs
OURS = "terramind_jax"  # beside the reference
TOLD = {  # of numbers that some modalities have
    "spectral angle": "The spectral angle is a mean over pixels, in degrees.",
    "seam": "Seam: how much rougher borders of windows are than other lines between patches; 1 is no seam.",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is generated how; see `run`."""

    network: Network
    weights: str | os.PathLike
    inputs: Sequence[str]
    to: Sequence[str]
    seed: int
    batch_size: int
    options: Mapping[str, Any]
    reference: references.Reference | None = None

    @property
    def makers(self) -> tuple[str, ...]:
        """Who generates, ours first."""
        return (OURS, self.reference.name) if self.reference else (OURS,)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images of one place by modality, ``[H, W, C]`` in the unit, class maps ``[H, W]``, and which pixels of a target count."""

    name: str
    inputs: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray]
    made: Mapping[str, np.ndarray]
    valid: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lines: tuple[Lines, Lines] | None = None


def run(
    *,
    weights: str | os.PathLike,
    data: str | os.PathLike,
    inputs: Sequence[str],
    to: Sequence[str],
    out: str | os.PathLike,
    model: str | None = None,
    tokenizers: str | os.PathLike | None = None,
    split: str = "val",
    lulc_codes: str | None = None,
    limit: int | None = None,
    clear: bool = False,
    reference: bool = False,
    pictures: int = 4,
    batch_size: int = generate_scenes.BATCH_SIZE,
    seed: int = 0,
    timesteps: int | None = None,
    sampler: Sampler | None = None,
    clip: Clip = "published",
    **options: Any,
) -> dict[str, Scores]:
    """Generates `to` from `inputs` and writes ``{out}/report.md``, ``scores.csv`` of every sample, ``samples.png``; of a folder GeoTIFFs.

    Args:
      weights, model, tokenizers, lulc_codes, seed, batch_size: as of `generate_scenes.run`.
      data: root of shards, or a folder ``MODALITY/NAME.tif`` with inputs and targets.
      split: of shards.
      limit: the first so many samples that have all inputs and a target; None: all.
      clear: of shards, compare only pixels that the cloud mask calls clear; samples without a mask are left out.
      reference: whether TerraTorch generates the same, with the same weights and settings, but its own random draws; needs `model`. Of a
        folder all scenes must be as large as one window then.
      pictures: samples in the picture.
      timesteps, sampler, clip: of diffusion decoders, as of `generate_scenes.run`; beside the reference the sampler is "ddim", which is
        all that TerraTorch has.
      **options: of the generation, such as steps and temperature.

    Returns:
      What the model's own outputs score; the reference's scores are in the files.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no model, or no samples. ImportError: no TerraTorch.
      ValueError: modalities that the model or the data lack, or that are no images.
    """
    results.check_free(Path(out))
    sources.declare(generate_scenes.workdir(weights))
    rasters = is_folder(data, inputs)
    if clear and rasters:
        raise ValueError("clear needs the cloud masks of shards; a folder of GeoTIFFs has none: mark clouds there as no data.")
    generate_scenes.check_names(dict.fromkeys(inputs), to, lulc_codes if rasters or not inputs else "terramesh")
    inputs, to = (
        [of(name).modality for name in names] for of, names in ((modalities.input_stream, inputs), (modalities.output_stream, to))
    )
    check_images(to)
    if rasters and "LULC" in to:
        reading.check_names({"LULC": None}, lulc_codes)
    sampler = sampler or ("ddim" if reference else "dpmpp")
    options |= dict(timesteps=diffusion.steps_of(sampler, timesteps), sampler=sampler, clip=diffusion.check_clip(clip))
    if reference:
        references.check(model, inputs, to, options)
    index = None if rasters else open_index(data, split)
    network = generate_scenes.load_network(weights, model, inputs, to, tokenizers)
    generate.check_names(network.module, inputs, to, network.tokenizers)
    theirs = references.load(model, network, inputs, to, seed, **options) if reference else None
    job = Job(network, weights, inputs, to, seed, batch_size, options, theirs)
    with results.folder(out) as partial:
        samples = _of_shards(job, index, limit, clear) if index is not None else _of_folder(job, Path(data), partial, lulc_codes, limit)
        total, each = {by: {name: scores_of(name) for name in to} for by in job.makers}, []
        shown: dict[tuple[str, ...], list[plot.Scene]] = {}  # by what was generated
        for sample in samples:
            for by, images in _of_makers(job, sample).items():
                for name, made in images.items():
                    given = made, sample.truth[name], sample.valid.get(name), sample.lines
                    total[by][name].add(*given)
                    each.append({"sample": sample.name, **_labels(name, by, job), **scores.summary(scores_of(name).add(*given))})
            alike = shown.setdefault(tuple(sample.made), [])
            if len(alike) < pictures:
                seen = {name: x for name, x in sample.inputs.items() if modalities.get(name).is_image}
                alike.append(plot.Scene(sample.name, seen, sample.made, sample.truth))
        if not each:
            raise FileNotFoundError(
                f"{data} has no sample with {', '.join(inputs)} and one of {', '.join(to)}{' and a cloud mask' * clear}."
            )
        for name in to:
            if total[OURS][name].is_empty:
                print(f"{name}: none of these samples has it, so it was not generated.", flush=True)
        if pictures:
            plot.contact_sheet(partial / "samples.png", shown[max(shown, key=len)], title=f"Generated from {', '.join(inputs)}")
        found = {(name, by): of[name] for name in to for by, of in total.items() if not of[name].is_empty}
        results.write_csv(partial / "scores.csv", [*each, *_rows(found, job)])
        print("\n" + _report(partial / "report.md", job, found, len({row["sample"] for row in each}), model or str(weights), clear))
    return total[OURS]


def _of_makers(job: Job, sample: Sample) -> dict[str, Mapping[str, np.ndarray]]:
    """What each maker generated of a sample's targets."""
    if job.reference is None:
        return {OURS: sample.made}
    made = job.reference(sample.inputs, list(sample.made))
    return {OURS: sample.made, job.reference.name: {name: classes(x) if is_class_map(name) else x for name, x in made.items()}}


def _labels(name: str, by: str, job: Job) -> dict[str, str]:
    """The columns that say what was generated, and by whom where there are two."""
    return {"modality": name} | ({"by": by} if job.reference else {})


def is_folder(data: str | os.PathLike, names: Sequence[str]) -> bool:
    """Whether `data` is a folder of GeoTIFFs rather than the root of shards."""
    return any((Path(data) / name).is_dir() for name in names)


def check_images(names: Sequence[str]) -> None:
    """A ValueError for what is no image."""
    for name in names:
        if not modalities.get(name).is_image:
            raise ValueError(f"{name} is no image; `evaluate geolocate` measures generated coordinates.")


# ---- samples of shards ----


def _of_shards(job: Job, index: Index, limit: int | None, clear: bool) -> Iterator[Sample]:
    """Centre crops of the model's size; a sample that cannot be read is left out, and told."""
    check_there(index, [name for name in job.inputs if modalities.get(name).is_image])
    wanted = (i for i in range(len(index)) if all(has(index, i, m) for m in job.inputs) and any(has(index, i, m) for m in job.to))
    chosen = list(itertools.islice(wanted, limit))
    read, size = _readable(job, index, chosen, clear), min(job.batch_size, len(chosen))
    with tqdm(desc="samples", total=len(chosen), unit="sample", dynamic_ncols=True) as bar:
        while batch := list(itertools.islice(read, size)):
            made = _generated(job, padded(batch, size))
            for i, sample in enumerate(batch):
                yield dataclasses.replace(sample, made={name: made[name][i] for name in sample.truth})
            bar.update(len(batch))


def _readable(job: Job, index: Index, chosen: Sequence[int], clear: bool) -> Iterator[Sample]:
    side = job.network.module.config.image_size
    for i in chosen:
        there = [name for name in job.to if has(index, i, name)]
        try:
            inputs, truth = ({m: center(index, i, m, side) for m in names} for names in (job.inputs, there))
            counting = views.read_clear(index, i, 0, side) if clear else None
            if clear and counting is None:
                raise DataError(f"Sample {index.keys[i]!r} has no cloud mask.", "missing")
            yield Sample(index.keys[i], inputs, truth, {}, {} if counting is None else dict.fromkeys(there, counting))
        except DataError as error:
            print(f"Left out: {error}", flush=True)


def _generated(job: Job, batch: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Every target of a batch, whether a sample has its truth or not."""
    inputs = {name: np.stack([sample.inputs[name] for sample in batch]) for name in job.inputs}
    return {name: alone(job.network, inputs, name, job.seed, **job.options) for name in job.to}


def alone(network: Network, inputs: Mapping[str, np.ndarray], name: str, seed: int | np.ndarray = 0, **options: Any) -> np.ndarray:
    """One target from inputs in their units: ``[B, S, S, C]`` in the unit, or classes ``[B, S, S]``."""
    what = network.module, network.variables, network.tokenizers, inputs, [name]
    made = generate.generate(*what, seed=seed, version=network.version, **options)[name]
    return classes(made) if is_class_map(name) else made


def check_there(index: Index, names: Sequence[str]) -> None:
    """A ValueError for images that no sample of the shards has."""
    absent = [name for name in names if name not in index.modalities]
    if absent:
        raise ValueError(f"The shards have no {absent[0]}; they have {', '.join(index.modalities)}.")


def has(index: Index, i: int, name: str) -> bool:
    """Whether sample `i` has a modality; coordinates have all that say where they are."""
    if not modalities.get(name).is_image:
        return index.coordinates(i) is not None
    return name in index.modalities and bool(index.available[i, index.modalities.index(name)])


def center(index: Index, i: int, name: str, side: int = modalities.IMAGE_SIZE) -> np.ndarray:
    """The centre crop of a sample ``[side, side, C]`` float32 in the unit, S2 as stored; classes ``[side, side]``; coordinates ``[2]``.

    A `DataError` if it cannot be read.
    """
    if not modalities.get(name).is_image:
        return np.array(index.coordinates(i))
    image = views.read_variant(index, i, name, 0, side)
    return image[..., 0] if is_class_map(name) else image.astype(np.float32)


def is_class_map(name: str) -> bool:
    return modalities.get(name).kind == "classes"


def classes(logits: np.ndarray) -> np.ndarray:
    """The most likely class, uint8."""
    return logits.argmax(-1).astype(np.uint8)


# ---- scenes of a folder ----


def _of_folder(job: Job, data: Path, out: Path, lulc_codes: str | None, limit: int | None) -> Iterator[Sample]:
    """Every scene with all inputs and a target; the targets are generated to ``{out}/generated/MODALITY`` first."""
    images = [name for name in job.inputs if modalities.get(name).is_image]
    if not images:
        raise ValueError(f"{', '.join(job.inputs)} is no image; a folder of scenes needs at least one.")
    folders = {name: data / (name if name in images else images[0]) for name in job.inputs}
    found = reading.find(folders)
    truth = {name: reading.find({name: data / name}) for name in job.to if (data / name).is_dir()}
    chosen = [scene for scene in found if any(scene in of for of in truth.values())][:limit]
    side, opened = job.network.module.config.image_size, []
    for scene in chosen:
        paths = {name: found[scene][name] for name in images} | {name: of[scene][name] for name, of in truth.items() if scene in of}
        opened.append(reading.open_scene(scene, paths, lulc_codes))
        place = opened[-1].place
        if job.reference and (place.height, place.width) != (side, side):
            size = f"{place.height} x {place.width}"
            raise ValueError(f"{scene} has {size} pixels; the reference is compared on scenes of one window, {side} x {side}.")
    for name, of in truth.items():
        if only := [scene for scene in chosen if scene in of]:
            same = dict(weights=job.weights, network=job.network, seed=job.seed, batch_size=job.batch_size, **job.options)
            generate_scenes.run(inputs=folders, to=[name], out=out / GENERATED, lulc_codes=lulc_codes, quicklook=False, only=only, **same)
    for scene in opened:
        yield _compared(scene, images, [name for name, of in truth.items() if scene.name in of], out / GENERATED, side)


def _compared(scene: Scene, inputs: Sequence[str], to: Sequence[str], folder: Path, side: int) -> Sample:
    """A scene whose targets were generated to `folder` by windows of `side` pixels."""
    made, truth, valid = {}, {}, {}
    for name in to:
        image = np.asarray(geo.read(folder / name / f"{scene.name}.tif"))
        nothing = (image == NO_CLASS if is_class_map(name) else np.isnan(image)).any(-1)
        truth[name], missing = _pixels(scene, name)
        made[name] = np.where(nothing, 0, image[..., 0]) if is_class_map(name) else image
        valid[name] = ~nothing & ~missing
    size = side // PATCH
    lines = seams(windows.cut(scene.grid, size, size // 2 * PATCH), scene.place.height, scene.place.width)
    return Sample(scene.name, {name: _pixels(scene, name)[0] for name in inputs}, truth, made, valid, lines)


def _pixels(scene: Scene, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A whole raster as shards have it, class maps ``[H, W]``, and which of its pixels have no data."""
    height, width = scene.place.height, scene.place.width
    stored, missing = (x[:height, :width] for x in reading.read(scene, name, 0, scene.grid[0] * PATCH))
    return (stored[..., 0] if is_class_map(name) else stored.astype(np.float32)), missing


def seams(cut: windows.Cut, height: int, width: int) -> tuple[Lines, Lines] | None:
    """Lines at which windows begin or end, (rows, columns), and all others between patches; None where there is one window."""
    if len(cut.rows) == len(cut.columns) == 1:
        return None
    borders, others = [], []
    for starts, side in ((cut.rows, height), (cut.columns, width)):
        ends = {*starts, *(start + cut.size for start in starts)}
        inner = range(1, -(-side // PATCH))
        borders.append([line * PATCH for line in inner if line in ends])
        others.append([line * PATCH for line in inner if line not in ends])
    return tuple(borders), tuple(others)


# ---- what is written ----


def _rows(found: Mapping[tuple[str, str], Scores], job: Job) -> list[results.Row]:
    """All samples together: one row a modality and maker, then its bands or classes."""
    rows = []
    for (name, by), of in found.items():
        labels = {"sample": "all", **_labels(name, by, job)}
        rows.append({**labels, **scores.summary(of)})
        rows += [{**labels, "part": part, **numbers} for part, numbers in scores.parts(of).items()]
    return rows


def _report(path: Path, job: Job, found: Mapping[tuple[str, str], Scores], count: int, model: str, clear: bool) -> str:
    source, images = " + ".join(job.inputs), {name: of for (name, by), of in found.items() if by == OURS and of.bands}
    settings = ", ".join(f"{name} {value}" for name, value in {"seed": job.seed, **job.options}.items())
    ranges = ", ".join(f"{name} {next(iter(of.bands.values())).data_range:g}" for name, of in images.items())
    units = ", ".join(f"{name} {modalities.get(name).unit}" for name in images)
    parts = {
        kind: [
            {**_labels(*key, job), kind: part, **x} for key, of in found.items() if of.part == kind for part, x in scores.parts(of).items()
        ]
        for kind in ("band", "class")
    }
    told = [text for name, text in TOLD.items() if not all(math.isnan(scores.summary(of)[name]) for of in found.values())]
    own = [{"model": model, "input": source, "output": name, **scores.of_errors(of.errors)} for name, of in images.items()]
    return results.write_report(
        path,
        "Generation",
        f"{model} generated each target alone from {source} of {count} samples ({settings}).",
        f"{job.reference.name} did so, too, with the same weights and settings and random draws of its own." if job.reference else "",
        results.table([{**_labels(*key, job), **scores.summary(of)} for key, of in found.items()]),
        f"MAE, RMSE and bias (generated minus truth) are in the unit: {units}. PSNR and SSIM take as full scale: {ranges}."
        if units
        else "",
        "Only pixels that the cloud mask calls clear count." if clear else "",
        " ".join(told),
        *(f"## By {kind}\n\n{results.table(rows)}" for kind, rows in parts.items() if rows),
        f"## Published\n\n{results.compared('generation', own)}" if own else "",
    )
