"""Scenes, generated: their tokens, target after target, then the pixels of each.

Tokens first: all that is random is keyed by place, and each token comes from the window in which it lies most central, so that a scene
has one map of tokens for each target, which conditions the targets after it. Then windows of the map are decoded with noise that they
share, and blended. One row of windows is in memory at a time, and the journal counts them. Small scenes lie side by side in one map.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import coordinates, files, generate, geo, locate, modalities, plot, sampling
from terramind_jax.decoding import generate_tokens, target_passes
from terramind_jax.draws import entropy, probabilities
from terramind_jax.modalities import Stream
from terramind_jax.scenes import feeding, progress, reading, windows, writing
from terramind_jax.scenes.feeding import Network, Strip, Work
from terramind_jax.scenes.journal import Journal
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.tokenizer import diffusion

Batch = Sequence[tuple[int, int]]  # (sample, column) of windows of a row
NO_CLASS = 255  # no data, in class maps
DECODING = ("timesteps", "sampler", "clip")  # options of the decoders of images; all others are of `decoding.generate_tokens`


@dataclasses.dataclass(frozen=True)
class Job:
    """What holds for all scenes of a command; see `generate_scenes.run`."""

    network: Network
    to: Sequence[str]
    seed: int
    samples: int
    batch_size: int
    options: Mapping[str, Any]
    out: Path
    journal: Journal


def generate_together(job: Job, work: Work) -> None:
    """Writes all targets of some scenes; goes on where the journal says."""
    streams = {name: modalities.output_stream(name) for name in job.to}
    made = {s.modality for s in streams.values()}
    painted = {name for name in work.images if modalities.get(modalities.input_stream(name).modality).name in made}
    work = dataclasses.replace(work, painted=painted)
    kinds = [s.kind == "sequence" for s in streams.values()]
    passes = sum(_token_passes(job, key) for key in {s.key for s in streams.values()})
    passes += sum(_pixel_passes(job, name) for name, is_sequence in zip(streams, kinds, strict=True) if not is_sequence)
    total = (passes * job.samples + kinds.count(True)) * int(work.live.sum())  # a density is made once
    with tqdm(desc=work.title, total=total, unit="pass", dynamic_ncols=True) as bar:
        maps: dict[str, np.ndarray] = {}
        for name, stream in streams.items():
            if stream.key not in maps:
                maps[stream.key] = _write_tokens(job, work, name, maps, bar)
        for name, stream in streams.items():
            (_write_sequence if stream.kind == "sequence" else _write_image)(job, work, name, maps[stream.key], bar)


def output_paths(out: Path, scene: str, name: str, samples: int) -> list[Path]:
    """What is written of one target: a GeoTIFF, with several samples also that of their spread; of coordinates JSON and their density."""
    if modalities.output_stream(name).kind == "sequence":
        return [out / name / f"{scene}.json", out / f"{name}_density" / f"{scene}.tif"]
    return [out / folder / f"{scene}.tif" for folder in (name, f"{name}_std")[: 1 if samples == 1 else 2]]


def _decoder_stream(job: Job, key: str) -> Stream:
    return next(s for s in job.network.module.config.decoder if s.key == key)


# ---- what a window costs: passes of a network ----


def _token_passes(job: Job, key: str) -> int:
    return target_passes(job.network.module, _decoder_stream(job, key), **job.options)


def _pixel_passes(job: Job, name: str) -> int:
    tokenizer, _ = job.network.tokenizers[modalities.output_stream(name).modality]
    return diffusion.passes(tokenizer, job.options["timesteps"], job.options["sampler"])


# ---- tokens ----


def _write_tokens(job: Job, work: Work, name: str, maps: Mapping[str, np.ndarray], bar: tqdm) -> np.ndarray:
    """The ids of one target, on disk, by sample: ``[h, w]`` int32 of an image, or ``[h, w, codebooks]``, ``[windows, L]`` of a sequence."""
    key, c = modalities.output_stream(name).key, work.cut
    stream, passes = _decoder_stream(job, key), _token_passes(job, key)
    is_sequence = stream.kind == "sequence"
    shape = (len(c.rows) * len(c.columns), stream.max_tokens) if is_sequence else (*c.grid, *stream.codes)
    path, done = job.journal.folder_of(work.name) / f"{name}.npy", job.journal.get(work.name, name, "tokens")
    ids = writing.mapped(path, np.int32, (job.samples, *shape), goes_on=bool(done))
    owner = windows.owners(c, work.live)
    progress.resume(bar, passes * job.samples * int(work.live[:done].sum()))
    for i in range(done, len(c.rows)):
        strip = feeding.read(work, i)
        for batch in _batches(job, work, i):
            made = _sample(job, work, stream, i, batch, strip, maps)
            for (k, j), new in zip(dict.fromkeys(batch), made, strict=False):
                number = i * len(c.columns) + j
                if is_sequence:
                    ids[k, number] = new
                else:
                    mine = owner[c.window(i, j)] == number
                    ids[k][c.window(i, j)][mine] = new[mine]
                bar.update(passes)
        with writing.space(path):
            ids.flush()
        job.journal.set(work.name, name, "tokens", count=i + 1)
    return ids


def _sample(job: Job, work: Work, stream: Stream, i: int, batch: Batch, strip: Strip, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Ids of some windows of row `i` of windows, given the inputs and the maps of the targets before."""
    network, c, js = job.network, work.cut, [j for _, j in batch]
    values, visible = feeding.encode(network, work, i, js, strip)
    known = {}
    for key, ids in maps.items():
        is_sequence = modalities.output_stream(key).kind == "sequence"
        parts = [ids[k][i * len(c.columns) + j if is_sequence else c.window(i, j)] for k, j in batch]
        known[key] = network.put(np.stack(parts))
    targets = list(dict.fromkeys(modalities.output_stream(name).key for name in job.to))
    options = {name: value for name, value in job.options.items() if name not in DECODING}
    how = dict(seed=_seeds(job, batch), at=c.at(i, js), visible=visible, known_tokens=known, only=stream.key)
    return np.asarray(generate_tokens(network.module, network.variables, values, targets, **how, **options)[stream.key])


# ---- pixels ----


def _write_image(job: Job, work: Work, name: str, ids: np.ndarray, bar: tqdm) -> None:
    """Decodes, blends and writes one target, and the spread of its samples."""
    c, piece = work.cut, (work.name, name, "pixels")
    rasters = [_rasters(job, work, scene, name) for scene in work.scenes]
    done = job.journal.get(*piece)
    if not done:
        for part, _, layer in itertools.chain.from_iterable(rasters):
            writing.create(part, layer)
    progress.resume(bar, _pixel_passes(job, name) * job.samples * int(work.live[:done].sum()))
    tokenizer = job.network.tokenizers[modalities.output_stream(name).modality][0]
    shape = job.samples, c.grid[1] * PATCH, tokenizer.config.channels
    decode = functools.partial(_decode, job, work, name, ids)
    for i, top, pixels in windows.joined(c, PATCH, lambda i: decode(i, bar if i >= done else None), shape, done):
        for (scene, columns, _), files_of in zip(work.parts(), rasters, strict=True):
            mine = pixels[:, : scene.place.height - top, columns.start * PATCH :][:, :, : scene.place.width]
            mine[:, reading.missing(scene, top, mine.shape[1])[:, : scene.place.width]] = np.nan
            for (part, _, _), made in zip(files_of, _with_spread(mine, tokenizer.config.is_class_map), strict=False):
                writing.write_rows(part, top, made)
        job.journal.set(*piece, count=i + 1)
    for part, path, layer in itertools.chain.from_iterable(rasters):
        if part.exists():  # else it is finished since the last time
            writing.finish(part, path, layer)


def _decode(job: Job, work: Work, name: str, ids: np.ndarray, i: int, bar: tqdm | None) -> Iterator[windows.Tile]:
    """The windows of a row, in physical units, of class maps probabilities."""
    network, stream = job.network, modalities.output_stream(name)
    options = {name: value for name, value in job.options.items() if name in DECODING}
    is_class_map, passes = network.tokenizers[stream.modality][0].config.is_class_map, _pixel_passes(job, name)
    for batch in _batches(job, work, i):
        tokens = network.put(np.stack([ids[k][work.cut.window(i, j)] for k, j in batch]))
        how = dict(version=network.version, seed=_seeds(job, batch), at=work.cut.at(i, [j for _, j in batch]), **options)
        images = generate.decode_output(stream, tokens, network.tokenizers, **how)
        for (k, j), image in zip(dict.fromkeys(batch), images, strict=False):
            yield k, work.cut.columns[j] * PATCH, probabilities(image) if is_class_map else image
            if bar is not None:
                bar.update(passes)


def _rasters(job: Job, work: Work, scene: Scene, name: str) -> list[tuple[Path, Path, writing.Layer]]:
    """The files of one target of a scene: where each is made, where it goes, and what it is."""
    layers, paths = (_layer(job, scene, name), _spread_layer(job, scene, name)), output_paths(job.out, scene.name, name, job.samples)
    folder = job.journal.folder_of(work.name, scene.name)  # as its rows are counted for this work
    return [(folder / f"{path.parent.name}.tif", path, layer) for path, layer in zip(paths, layers, strict=False)]


def _with_spread(pixels: np.ndarray, is_class_map: bool) -> Iterator[np.ndarray]:
    """Of samples ``[K, n, W, C]``, NaN where there is no data: what is written, and their spread."""
    if not is_class_map:
        yield pixels[0]
        yield pixels.std(0)
        return
    nothing = np.isnan(pixels[0]).any(-1, keepdims=True)
    yield np.where(nothing, NO_CLASS, pixels[0].argmax(-1)[..., None]).astype(np.uint8)
    yield entropy(pixels.mean(0))[..., None]


def _layer(job: Job, scene: Scene, name: str) -> writing.Layer:
    m, tags = modalities.get(modalities.output_stream(name).modality, job.network.version), job.journal.tags(scene.name)
    if m.kind == "classes":
        tags |= {"classes": ", ".join(f"{i} {name}" for i, name in enumerate(m.classes))}
        return writing.Layer(scene.place, m.bands, "uint8", m.unit, NO_CLASS, tags, plot.LULC_COLOURS)
    return writing.Layer(scene.place, m.bands, "float32", m.unit, np.nan, tags)


def _spread_layer(job: Job, scene: Scene, name: str) -> writing.Layer:
    layer = _layer(job, scene, name)
    if layer.is_class_map:
        return dataclasses.replace(layer, bands=("entropy",), dtype="float32", unit="nat", nodata=np.nan, colours=())
    return dataclasses.replace(layer, bands=tuple(f"{band} standard deviation" for band in layer.bands))


def _write_sequence(job: Job, work: Work, name: str, ids: np.ndarray, bar: tqdm) -> None:
    """Coordinates as JSON, one ``{"lon", "lat"}`` a window with data, row by row, of the first sample; null where none were written."""
    ids = ids[0].reshape(*work.live.shape, -1)
    for scene, _, columns in work.parts():
        points, _ = output_paths(job.out, scene.name, name, job.samples)
        lons, lats = coordinates.decode(ids[:, columns][work.live[:, columns]])
        places = [{"lon": _number(lon), "lat": _number(lat)} for lon, lat in zip(lons, lats, strict=True)]
        files.write_text(files.folder(points), json.dumps(places) + "\n")
    _write_density(job, work, name, bar)


def _write_density(job: Job, work: Work, name: str, bar: tqdm) -> None:
    """What `locate.density` says, the mean over the windows with data: each quarter degree's probability, given the inputs alone."""
    piece, scene_of = (work.name, name, "density"), work.scene_of()
    done, (lons, lats) = job.journal.get(*piece), coordinates.grid()
    sums_path, shape = job.journal.folder_of(work.name) / f"{name}_density.npy", (2, len(work.scenes), len(lats), len(lons))
    sums = writing.mapped(sums_path, np.float64, shape, goes_on=bool(done))  # of an even and an odd number of rows: one stays as it was
    progress.resume(bar, int(work.live[:done].sum()))
    for i in range(done, len(work.cut.rows)):
        strip, total = feeding.read(work, i), sums[(i + 1) % 2]
        total[:] = sums[i % 2]
        for batch in feeding.batches(job.network, work, i, job.batch_size):
            js = [j for _, j in batch]
            values, visible = feeding.encode(job.network, work, i, js, strip)
            found = np.asarray(locate.density(job.network.module, job.network.variables, values, visible=visible))
            for j, one in zip(dict.fromkeys(js), found, strict=False):
                total[scene_of[j]] += one
                bar.update()
        with writing.space(sums_path):
            sums.flush()
        job.journal.set(*piece, count=i + 1)
    step = lons[1] - lons[0]
    where = geo.Place("EPSG:4326", (step, 0, lons[0] - step / 2, 0, -step, lats[0] + step / 2), len(lats), len(lons))
    for scene, total in zip(work.scenes, sums[len(work.cut.rows) % 2], strict=True):
        layer = writing.Layer(where, ("probability",), "float32", "", np.nan, job.journal.tags(scene.name))
        part = job.journal.folder_of(scene.name) / f"{name}_density.tif"
        writing.create(part, layer)
        writing.write_rows(part, 0, (total / total.sum()).astype(np.float32)[..., None])
        writing.finish(part, output_paths(job.out, scene.name, name, job.samples)[1], layer)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---- samples ----


def _batches(job: Job, work: Work, i: int) -> Iterator[Batch]:
    return feeding.batches(job.network, work, i, job.batch_size, job.samples)


def _seeds(job: Job, batch: Batch) -> np.ndarray:
    """``[B]``, one a window: that of its sample."""
    return np.array(sampling.draw_seeds(job.seed, job.samples))[[k for k, _ in batch]]
