"""``evaluate finetuned``: a fine-tuned run on a split of its data set, such as the test split, which training has not seen.

Samples are seen and measured as the run's validation does: windows of the crops' size cover an image, and of a pixel in two the first
counts. So ``val`` gives the numbers that training logged for its best parameters. Of labels of images each window is judged alone.
Every sample of a split is scored, of ``train`` also those whose labels a share ``data.labels`` has left out. All devices work on a batch.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from terramind_jax import config as configuration
from terramind_jax import modalities, sharding
from terramind_jax.evaluation import results
from terramind_jax.tasks import batches, feeding, finetune, losses, validation
from terramind_jax.tasks import config as fields
from terramind_jax.tasks.datasets import Dataset
from terramind_jax.tasks.finetune import Task


def run(
    *,
    weights: str | os.PathLike,
    out: str | os.PathLike,
    split: str = "test",
    data: str | os.PathLike | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Writes ``{out}/report.md`` and ``scores.csv``, of every class and of all, and returns the scores of all, see `validation.summarize`.

    Args:
      weights: work directory of ``finetune``. split: train, val, test, or another that its data set has.
      data: the data set's folder; None: that of the training. limit: the first so many samples; None: all.
      batch_size: windows at once, rounded up to a multiple of the devices; None: as in training.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no fine-tuned run, or data that are not complete.
      ValueError: a split that the data set does not have, or images that are smaller than the windows.
    """
    with results.folder(out) as partial_out:
        task, config = finetune.load(weights), configuration.of_workdir(weights)
        config.data.root = config.data.root if data is None else os.fspath(data)
        config.data.labels = 1.0
        if not config.data.root:
            raise ValueError(f"{weights} does not tell where its data set is; give its folder with --data=ROOT.")
        dataset = finetune.open_split(config, split)
        dataset = dataset.select(range(len(dataset))[:limit])
        criterion = finetune.criterion(config, fields.loss_of(config, task.facts))
        total = measured(task, dataset, criterion, batch_size or config.train.batch_size)
        found, classes = validation.summarize(task.facts, total), validation.by_class(task.facts, total)
        results.write_csv(partial_out / "scores.csv", [*classes, {"class": "all", **found}])
        text = _report(partial_out / "report.md", f"{config.model.name}, {weights}", task, dataset, config, found, classes)
    print("\n" + text)
    return found


def measured(task: Task, dataset: Dataset, criterion: losses.Loss, batch_size: int) -> dict[str, np.ndarray]:
    """The sums of `validation.measure` over all windows of a split."""
    mesh = sharding.make_mesh()
    replicated, batch_size = sharding.replicated(mesh), -(-batch_size // mesh.size) * mesh.size
    variables, held = jax.device_put((task.variables, task.held), replicated)
    frozen = feeding.Frozen(task.module, task.beside, held)
    measure = jax.jit(partial(validation.measure, task.module, criterion, task.facts), out_shardings=replicated)
    stream = batches.covering(dataset, task.scale, crop=task.crop, batch_size=batch_size)
    count = batches.count(dataset, task.crop, batch_size) // batch_size
    shown = tqdm(stream, dataset.split, count, unit="batch", dynamic_ncols=True)
    return validation.add_up(measure(variables, frozen.complete(sharding.to_global(batch, mesh))) for batch in shown)


def _report(path: Path, model: str, task: Task, dataset: Dataset, config: ConfigDict, found: dict[str, float], classes: list) -> str:
    facts = task.facts
    thoughts = [] if task.thinker is None else [f"generated {modalities.STREAMS[key].modality}" for key in task.thinker.targets]
    told = {"model": model, "data set": facts.title, "setting": "fine-tuned", "input": " + ".join([*facts.bands, *thoughts])}
    of_classes = {name.replace("_", " "): 100 * x for name, x in found.items() if name not in ("loss", "rmse", "mae")}
    if facts.task == "segmentation" and facts.num_classes == 2:  # what is mapped is the second
        of_classes |= {f"{row['class']} IoU": 100 * row["IoU"] for row in classes if row["class"] == facts.class_names[1]}
    row = {**told, **of_classes, **{name: x for name, x in found.items() if name in ("loss", "rmse", "mae")}}
    unit = "scores in per cent, but for the loss" if facts.num_classes else "RMSE and MAE in the unit of the labels"
    return results.write_report(
        path,
        f"Fine-tuned: {facts.title}",
        f"{len(dataset)} samples of the {dataset.split} split; {unit}.",
        results.compared("finetuned", [row]),
        f"## By class\n\n{results.table(results.in_per_cent(classes))}" if classes else "",
    )
