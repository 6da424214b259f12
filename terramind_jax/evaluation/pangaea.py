"""``evaluate pangaea``: a frozen encoder with an UPerNet on one of PANGAEA's data sets, as that benchmark's numbers of TerraMind are made.

Its settings: AdamW at 1e-4, a tenth of that after 0.6 of 80 epochs and a hundredth after 0.9; batches of 8 random crops of 224 pixels, of
MADOS around labelled pixels; a validation every 5 epochs, whose best mIoU decides on the parameters; windows that cover a test image
evenly, in the mean where they overlap; seed 234; float32, in products as well, which GPUs and TPUs otherwise make of rounded numbers. A
share of the labels is that of every stratum of three bins (`datasets.strata`), under random numbers of our own. Images come as
`tasks.datasets.pangaea` has it, the UPerNet is PANGAEA's, weights of norms and biases decay, and a class that never occurs counts as 0.
Known to differ: PANGAEA

- trains PASTIS-R and CropTypeMapping-SS against masks of their own size;
- lets MADOS' crops lie a pixel beyond the label or the image's edge;
- gives the two classes of SpaceNet-7 and of AI4SmallFarms one logit, and in its examples dice as the loss (`loss`), with every tile of
  AI4SmallFarms twice an epoch;
- takes some strata for one, as it cuts their names to the length of the first one's;
- validates as it tests, while here of windows that overlap the first one counts, and a class that never occurs does not;
- validates before the first epoch, too, and takes those parameters if none that were trained are better.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from terramind_jax import metrics, zoo
from terramind_jax.convert.files import check_free
from terramind_jax.evaluation import results
from terramind_jax.scenes.feeding import padded
from terramind_jax.tasks import datasets, finetune, validation
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import Dataset, pangaea
from terramind_jax.tasks.finetune import Task

EPOCHS, EVAL_EPOCHS, BATCH_SIZE, SEED, CROP, STRATA = 80, 5, 8, 234, 224, 3
LAYERS = {"large": (7, 11, 15, 23)}  # of other sizes every fourth
FOCUSED = ("mados",)  # crops lie around labelled pixels
WHOLE = ("pastis", "croptypemapping")  # smaller than a crop: enlarged to it, and seen whole
REPORT, TRAINING = "report.md", "training"
WINDOWS = 8  # at once in the test


@dataclasses.dataclass(frozen=True)
class Settings:
    """What may be told otherwise than PANGAEA has it."""

    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE
    crop: int = CROP
    labels: float = 1.0  # share of the training samples
    limit: int | None = None  # samples of each split
    loss: str = "ce"  # or dice
    seed: int = SEED


def run(
    *,
    weights: str | os.PathLike,
    model: str,
    dataset: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings | None = None,
) -> dict[str, float]:
    """Trains in ``{out}/training``, going on with what is there, tests, and writes ``{out}/report.md`` and ``scores.csv``.

    Scores are in per cent in the report, as the paper prints them, and shares of 1 in the table, as they are returned.

    Args:
      weights, model: what `weights.load` takes, `model` being a feature extractor such as terramind_v1_base.
      dataset, data: one of `tasks.datasets.pangaea.KNOWN`, such as mados, and its folder.

    Returns:
      Means over classes on the test split, see `metrics.class_scores`.

    Raises:
      FileExistsError: a report is there already. FileNotFoundError: no model, or a data set that is not complete.
      ValueError: an unknown data set, or settings with which nothing can be trained.
    """
    settings, out = settings or Settings(), Path(out)
    check_free(out / REPORT)
    for split in datasets.SPLITS:
        test = datasets.load("pangaea", data, split, of=dataset, limit=settings.limit)  # what is not there is told before training
    with jax.default_matmul_precision("float32"):
        finetune.train(configuration(settings, weights, model, dataset, data), out / TRAINING)
        confusion = tested(finetune.load(out / TRAINING), test, settings.crop, whole=dataset in WHOLE)
    found = metrics.class_scores(confusion, test.ignore_index, absent=True)
    _write(out, settings, f"{model}, {weights}", test, confusion, found)
    return found


def configuration(settings: Settings, weights: str | os.PathLike, model: str, dataset: str, data: str | os.PathLike) -> ConfigDict:
    """PANGAEA's settings as a configuration of `finetune`."""
    config = finetuning()
    of_time = {"time": "ltae"} if pangaea.KNOWN[dataset].FACTS.has_times else {}
    config.model.update(name=model, weights=os.fspath(weights), layers=LAYERS.get(zoo.get(model).size, ()), **of_time)
    config.model.update(decoder="upernet_pangaea", channels=(512,), dtype="float32")
    config.data.update(dataset="pangaea", root=os.fspath(data), crop=settings.crop, d4=False, statistics="dataset")
    config.data.update(labels=settings.labels, strata=STRATA, focus=dataset in FOCUSED)
    options = {"of": dataset, "limit": settings.limit, "resize": settings.crop if dataset in WHOLE else None}
    config.data.options = ConfigDict({name: value for name, value in options.items() if value is not None})
    config.optimizer.update(learning_rate=1e-4, schedule="steps", weight_decay=0.05, decay_norms=True)
    config.train.update(tune="frozen", loss=settings.loss, epochs=settings.epochs, batch_size=settings.batch_size)
    config.train.update(monitor="val/mIoU", seed=settings.seed)
    epoch = max(1, len(finetune.open_split(config, "train")) // settings.batch_size)
    config.run.update(eval_every=EVAL_EPOCHS * epoch, checkpoint_every=EVAL_EPOCHS * epoch)
    return config


# ---- the test ----


def tested(task: Task, dataset: Dataset, side: int, *, whole: bool = False) -> np.ndarray:
    """Counts ``[K, K]`` of true and predicted classes; with `whole` images are enlarged to `side`, else seen through windows of it."""
    total = np.zeros((dataset.num_classes,) * 2, np.int64)
    for sample in tqdm(dataset, dataset.split, unit="image", dynamic_ncols=True):
        inputs, size = sample["inputs"], sample["target"].shape
        images = {name: pangaea.resized(x, side) for name, x in inputs.items()} if whole else inputs
        logits = sliding(task, images, side)
        if whole:
            logits = np.asarray(jax.image.resize(logits, (*size, logits.shape[-1]), "bilinear", antialias=False))
        total += metrics.confusion_matrix(logits.argmax(-1), sample["target"], len(total), ignore=dataset.ignore_index)
    return total


def sliding(task: Task, inputs: dict[str, np.ndarray], side: int) -> np.ndarray:
    """Logits ``[H, W, K]`` of one image, by modality ``[(T,) H, W, C]``: the mean over windows, as few as cover it, evenly spaced."""
    size = next(iter(inputs.values())).shape[-3:-1]
    tops, lefts = (np.rint(np.linspace(0, length - side, -(-length // side))).astype(int) for length in size)
    corners = [(top, left) for top in tops for left in lefts]
    total, seen = np.zeros((*size, task.facts.num_classes), np.float32), np.zeros((*size, 1), np.float32)
    count = min(WINDOWS, len(corners))
    for start in range(0, len(corners), count):
        some = corners[start : start + count]
        batch = padded(some, count)
        parts = {name: np.stack([x[..., t : t + side, left : left + side, :] for t, left in batch]) for name, x in inputs.items()}
        for (top, left), logits in zip(some, jax.device_get(task(parts)), strict=False):
            at = np.s_[top : top + side, left : left + side]
            total[at] += logits
            seen[at] += 1
    return total / seen


def _write(out: Path, settings: Settings, model: str, test: Dataset, confusion: np.ndarray, found: dict[str, float]) -> None:
    classes = validation.by_class(test.facts, {"confusion": confusion})
    own = {"model": model, test.facts.title: 100 * found["mIoU"], "F1": 100 * found["F1"], "pixel accuracy": 100 * found["pixel_accuracy"]}
    usual = dataclasses.asdict(Settings())
    changed = [f"{name} {value}" for name, value in dataclasses.asdict(settings).items() if value != usual[name]]
    told = "with PANGAEA's settings" + (f", but {', '.join(changed)}" if changed else "")
    results.write_csv(out / "scores.csv", [*classes, {"class": "all", **found}])
    text = results.write_report(
        out / REPORT,
        f"PANGAEA: {test.facts.title}",
        f"mIoU on {len(test)} test images, {told}. All scores are in per cent.",
        results.compared("pangaea", [own]),
        f"## By class\n\n{results.table(results.in_per_cent(classes))}",
    )
    print("\n" + text)
