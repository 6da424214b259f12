"""GeoTIFFs in, maps of a fine-tuned model out: what the command ``predict`` does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from terramind_jax import files, geo
from terramind_jax.convert.files import check_free
from terramind_jax.scenes import reading
from terramind_jax.tasks import batches, finetune
from terramind_jax.tasks.datasets.files import Bands, read_image
from terramind_jax.tasks.finetune import Task

BATCH_SIZE = 8
LABELS = "labels.json"


def run(weights: str | os.PathLike, inputs: Mapping[str, str | os.PathLike], out: str | os.PathLike) -> list[Path]:
    """Writes ``{out}/{scene}.tif`` on the input's grid, uint8 classes or float32 values; of labels of images ``{out}/labels.json``.

    Args:
      weights: work directory of a fine-tuning.
      inputs: GeoTIFF, or folder of GeoTIFFs that share their file names, by modality, as the data set stores them (`Facts.files`): its
        bands, also those that the model does not use, unit, and marks of no data. If it has no such files (MADOS, PASTIS-R), with the
        bands `Facts.bands` in their order, Sentinel-2 as reflectance x 10000. A file that names its bands is checked.

    Raises:
      FileExistsError: an output exists already. FileNotFoundError: no work directory or raster.
      ValueError: an input that is missing or too many, rasters of wrong bands, another grid, or too small, or images for a model of series.
    """
    task = finetune.load(weights)
    unknown = [name for name in inputs if name not in task.facts.bands]
    if unknown or len(inputs) < len(task.facts.bands):
        raise ValueError(f"The model takes {', '.join(task.facts.bands)}; {', '.join(inputs)} {'is' if len(inputs) == 1 else 'are'} given.")
    scenes = reading.find(inputs)
    paths = {name: Path(out) / f"{name}.tif" for name in scenes} if _is_map(task) else {LABELS: Path(out) / LABELS}
    for path in paths.values():
        check_free(path)
    found = {}
    for name, of in scenes.items():
        arrays, place = read(task, of)
        if _is_map(task):
            geo.write(paths[name], predict(task, arrays), like=place)
        else:
            found[name] = label(task, arrays)
    if found:
        files.write_text(files.folder(paths[LABELS]), json.dumps(found, indent=1) + "\n")
    return list(paths.values())


def read(task: Task, paths: Mapping[str, Path]) -> tuple[dict[str, np.ndarray], geo.Place]:
    """Arrays ``[H, W, C]`` float32 of one scene, of series ``[T, H, W, C]``, filled as in training, and where it lies."""
    arrays, first = {}, None
    for name in task.facts.bands:
        place = geo.place(paths[name])
        if first is not None and not geo.same_grid(place, first[1]):
            raise ValueError(f"{paths[name]} and {first[0]} do not lie on one grid; resample one of them to the other.")
        first = first or (paths[name], place)
        arrays[name] = read_image(str(paths[name]), task.facts.files.get(name) or Bands(name, *[task.facts.bands[name]] * 2))
    path, place = first
    if task.module.time == "ltae" and arrays[name].ndim == 3:
        raise ValueError(f"{path} is one image, and the model takes series: give arrays [B, T, H, W, C] to what finetune.load returns.")
    if min(place.height, place.width) < task.crop:
        raise ValueError(f"{path} is {place.height}x{place.width} pixels; expected at least {task.crop}x{task.crop}.")
    return arrays, place


def predict(task: Task, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The map of one scene: classes ``[H, W]`` uint8, or values float32; windows as in validation."""
    size = next(iter(arrays.values())).shape[-3:-1]
    made = np.zeros(size, np.uint8 if task.facts.task == "segmentation" else np.float32)
    for window, outputs in _windows(task, arrays):
        part = outputs.argmax(-1) if task.facts.task == "segmentation" else outputs
        made[window.rows, window.columns][window.own] = part[window.own]
    return made


def label(task: Task, arrays: Mapping[str, np.ndarray]) -> str | float | list[str]:
    """The label of one image: a class's name, those of several, or a value; a mean over its windows."""
    mean = np.mean([outputs for _, outputs in _windows(task, arrays)], axis=0)
    if task.facts.task == "classification":
        return task.facts.class_names[int(mean.argmax())]
    if task.facts.task == "multilabel":
        return [name for name, logit in zip(task.facts.class_names, mean, strict=True) if logit > 0]
    return float(mean)


def _windows(task: Task, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[batches.Window, np.ndarray]]:
    """Every window and its outputs; the last batch repeats the last window: one shape, one program."""
    parts = batches.windows(next(iter(arrays.values())).shape[-3:-1], task.crop)
    size = min(BATCH_SIZE, len(parts))
    for start in range(0, len(parts), size):
        some = parts[start : start + size]
        outputs = jax.device_get(task(_batch(arrays, [*some, *[parts[-1]] * (size - len(some))])))
        yield from zip(some, outputs, strict=False)


def _batch(arrays: Mapping[str, np.ndarray], parts: Sequence[batches.Window]) -> dict[str, np.ndarray]:
    return {name: np.stack([x[..., part.rows, part.columns, :] for part in parts]) for name, x in arrays.items()}


def _is_map(task: Task) -> bool:
    return task.facts.task in ("segmentation", "regression")
