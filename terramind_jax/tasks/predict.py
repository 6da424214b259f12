"""GeoTIFFs in, maps of a fine-tuned model out: what the command ``predict`` does.

Maps are made as generated scenes are (`scenes`): through windows that overlap and are blended, one row of them in memory at a time, in a
file that a stopped command goes on with. Labels are of whole images, which are read at once.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

from terramind_jax import files, generate_scenes, geo
from terramind_jax.convert.files import check_free
from terramind_jax.draws import probabilities
from terramind_jax.scenes import feeding, journal, reading, windows, writing
from terramind_jax.scenes.generating import NO_CLASS
from terramind_jax.scenes.journal import Journal
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.scenes.windows import Cut
from terramind_jax.tasks import batches, datasets, finetune
from terramind_jax.tasks.datasets.files import Bands, read_rows_of
from terramind_jax.tasks.finetune import Task
from terramind_jax.tasks.model import SERIES

BATCH_SIZE = 8
LABELS = "labels.json"


def run(
    weights: str | os.PathLike,
    inputs: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    *,
    overlap: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Path]:
    """Writes ``{out}/{scene}.tif`` on the input's grid, uint8 classes (255: no data) or float32 values (NaN); of labels of images
    ``{out}/labels.json``. A run that was stopped goes on with the same arguments, as in `generate_scenes.run`.

    Args:
      weights: work directory of a fine-tuning.
      inputs: GeoTIFF, or folder of GeoTIFFs that share their file names, by modality, as the data set stores them (`Facts.files`): its
        bands, also those that the model does not use, unit, and marks of no data. If it has no such files (MADOS, PASTIS-R), with the
        bands `Facts.bands` in their order, Sentinel-2 as reflectance x 10000. A file that names its bands is checked.
      overlap: pixels that neighbouring windows of maps share, a multiple of 16; None: half a window.
      batch_size: windows at once.

    Raises:
      FileExistsError: an output exists already. FileNotFoundError: no work directory or raster. OSError: the disk is full.
      ValueError: an input that is missing or too many, rasters of wrong bands, classes or grid, or too small, or images for a model
        of series.
    """
    task, out = finetune.load(weights), Path(out)
    unknown = [name for name in inputs if name not in task.facts.bands]
    if unknown or len(inputs) < len(task.facts.bands):
        raise ValueError(f"The model takes {', '.join(task.facts.bands)}; {', '.join(inputs)} {'is' if len(inputs) == 1 else 'are'} given.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    found = reading.find(inputs)
    if task.facts.task not in ("segmentation", "regression"):
        return [_write_labels(task, [open_scene(task, *scene) for scene in found.items()], out / LABELS, batch_size)]
    written = {name: out / f"{name}.tif" for name in found}
    journal.check_outputs(out, written.values())
    scenes = [open_scene(task, *scene) for scene in found.items()]
    overlap = task.crop // 2 // PATCH * PATCH if overlap is None else overlap
    cuts = [windows.cut(scene.grid, task.crop // PATCH, overlap) for scene in scenes]
    command = dict(
        version=metadata.version("terramind_jax"),
        model=str(weights),
        weights_sha256=generate_scenes.digest(task.variables, task.held),
        dtype=task.module.backbone.dtype,  # may follow the device: two would mix in one scene
        inputs={name: str(Path(path).absolute()) for name, path in inputs.items()},
        scenes=list(found),
        **dict(overlap=overlap, batch_size=batch_size),
    )
    with journal.start(out, command) as done:
        for scene, cut in zip(scenes, cuts, strict=True):
            if not done.get(scene.name):
                reading.tell_place(scene)
                _write_map(task, scene, cut, batch_size, done, written[scene.name])
                done.finish(scene.name)
                print(f"{scene.name} -> {written[scene.name]}", flush=True)
    return list(written.values())


# ---- reading ----


def open_scene(task: Task, name: str, paths: Mapping[str, Path]) -> Scene:
    """One scene, whose rasters lie on one grid and hold a window at least, and are series for a model that needs them."""
    paths = {modality: paths[modality] for modality in task.facts.bands}
    (first, place), *others = ((path, geo.place(path)) for path in paths.values())
    for path, other in others:
        if not geo.same_grid(other, place):
            raise ValueError(f"{path} and {first} do not lie on one grid; resample one of them to the other.")
    scene = Scene(name, paths, place, {})
    reading.check_size(scene, task.crop)
    single = next((path for modality, path in paths.items() if _how(task, modality).times == 1), None)
    if task.module.time in SERIES and single is not None:
        raise ValueError(f"{single} is one image, and the model takes series: give arrays [B, T, H, W, C] to what finetune.load returns.")
    return scene


def read(task: Task, scene: Scene, row: int = 0, height: int | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of pixels ``[height, w, C]`` float32 by modality, of series ``[T, height, w, C]``, and where no input has data, ``[height, w]``.

    Filled as in training. With `height` both reach to the end of the grid of patches, where the image is mirrored; without, it is whole.
    A ValueError for a map of other classes than the model reads.
    """
    inside = scene.place.height if height is None else min(height, scene.place.height - row)
    found = {m: read_rows_of(str(path), _how(task, m), (row, row + inside)) for m, path in scene.paths.items()}
    for m, (image, _) in found.items():
        datasets.check_class_map(str(scene.paths[m]), m, image)
    over = [(0, 0), (0, 0)] if height is None else [(0, height - inside), (0, scene.grid[1] * PATCH - scene.place.width)]
    pad = functools.partial(np.pad, mode="reflect")
    arrays = {m: pad(image, [(0, 0)] * (image.ndim - 3) + [*over, (0, 0)]) for m, (image, _) in found.items()}
    return arrays, pad(np.logical_and.reduce([missing for _, missing in found.values()]), over)


def _how(task: Task, modality: str) -> Bands:
    bands = task.facts.bands[modality]
    return task.facts.files.get(modality) or Bands(modality, bands, bands)


# ---- maps ----


def _write_map(task: Task, scene: Scene, cut: Cut, batch_size: int, done: Journal, path: Path) -> None:
    """One scene; goes on where the journal says."""
    is_classes = task.facts.task == "segmentation"
    tags = {**done.tags(scene.name), **({"classes": ", ".join(task.facts.class_names)} if is_classes else {})}
    how = ("class",), "uint8", "", NO_CLASS
    layer = writing.Layer(scene.place, *(how if is_classes else (("value",), "float32", "", np.nan)), tags)
    part, begun = done.folder_of(scene.name) / "part.tif", done.get(scene.name, "pixels")
    if not begun:
        writing.create(part, layer)
    shape = 1, cut.grid[1] * PATCH, task.facts.num_classes if is_classes else 1
    with tqdm(desc=scene.name, total=len(cut.rows), initial=begun, unit="row", dynamic_ncols=True) as bar:
        for i, top, pixels in windows.joined(cut, PATCH, functools.partial(_tiles, task, scene, cut, batch_size), shape, begun):
            if top < scene.place.height:
                made = pixels[0, : scene.place.height - top, : scene.place.width]
                made[read(task, scene, top, len(made))[1][:, : scene.place.width]] = np.nan
                writing.write_rows(part, top, _classes(made) if is_classes else made)
                done.set(scene.name, "pixels", count=i + 1)
            bar.update()
    if part.exists():  # else it is finished since the last time
        writing.finish(part, path, layer)


def _classes(pixels: np.ndarray) -> np.ndarray:
    """Probabilities ``[n, W, K]``, NaN where there is no data, to classes ``[n, W, 1]``."""
    return np.where(np.isnan(pixels).any(-1), NO_CLASS, pixels.argmax(-1)).astype(np.uint8)[..., None]


def _tiles(task: Task, scene: Scene, cut: Cut, batch_size: int, i: int) -> Iterator[windows.Tile]:
    """The windows of row `i` that hold data: probabilities of classes ``[L, L, K]``, or values ``[L, L, 1]``."""
    side = cut.size * PATCH
    arrays, missing = read(task, scene, cut.rows[i] * PATCH, side)
    lefts = [column * PATCH for column in cut.columns]
    live = [left for left in lefts if not missing[:, left : left + side].all()]
    size = min(batch_size, len(lefts))
    for start in range(0, len(live), size):
        some = live[start : start + size]
        batch = feeding.padded(some, size)
        outputs = np.asarray(task({m: np.stack([x[..., left : left + side, :] for left in batch]) for m, x in arrays.items()}))
        outputs = probabilities(outputs) if task.facts.task == "segmentation" else outputs[..., None]
        yield from ((0, left, tile) for left, tile in zip(some, outputs, strict=False))


# ---- labels ----


def _write_labels(task: Task, scenes: Sequence[Scene], path: Path, batch_size: int) -> Path:
    check_free(path)
    found = {scene.name: label(task, read(task, scene)[0], batch_size) for scene in scenes}
    files.write_text(files.folder(path), json.dumps(found, indent=1) + "\n")
    return path


def label(task: Task, arrays: Mapping[str, np.ndarray], batch_size: int = BATCH_SIZE) -> str | float | list[str]:
    """The label of one image: a class's name, those of several, or a value; a mean over its windows."""
    parts, made = batches.windows(next(iter(arrays.values())).shape[-3:-1], task.crop), []
    size = min(batch_size, len(parts))
    for start in range(0, len(parts), size):
        some = parts[start : start + size]
        cut = {name: [x[..., part.rows, part.columns, :] for part in feeding.padded(some, size)] for name, x in arrays.items()}
        made += list(jax.device_get(task({name: np.stack(each) for name, each in cut.items()})))[: len(some)]
    mean = np.mean(made, axis=0)
    if task.facts.task == "classification":
        return task.facts.class_names[int(mean.argmax())]
    if task.facts.task == "multilabel":
        return [name for name, logit in zip(task.facts.class_names, mean, strict=True) if logit > 0]
    return float(mean)
