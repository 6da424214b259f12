"""What a validation measures, and what a run of validations says: the learning rate, the end, and which parameters are the best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from terramind_jax import metrics
from terramind_jax.tasks import losses, plateau
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.datasets import Facts
from terramind_jax.tasks.model import TaskModel
from terramind_jax.train import logging


def measure(module: TaskModel, criterion: losses.Loss, facts: Facts, variables: Mapping, batch: Mapping) -> dict[str, jax.Array]:
    """Sums of one batch of `batches.covering`."""
    outputs = networks.outputs(module, variables, batch)
    target, valid = batch["target"], batch["valid"]
    count = valid.sum()
    sums = {"loss": criterion(outputs, target, valid) * count, "count": count}
    if facts.task in ("segmentation", "classification"):
        k = facts.num_classes
        pairs = jnp.where(valid, target * k + outputs.argmax(-1), k * k)
        return {**sums, "confusion": jnp.zeros(k * k + 1, jnp.int32).at[pairs].add(1)[:-1].reshape(k, k)}
    if facts.task == "multilabel":
        hit, said = (outputs > 0) & (target > 0), (outputs > 0).astype(jnp.int32)
        return {**sums, "labels": jnp.stack([(x * valid).sum(0) for x in (hit, said, target.astype(jnp.int32), valid)])}
    difference = jnp.where(valid, outputs - target, 0)
    return {**sums, "squared": jnp.square(difference).sum(), "absolute": jnp.abs(difference).sum()}


def add_up(measured: Iterable[Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """The sums of all batches that `measure` gives, without overflow."""
    total: dict[str, np.ndarray] = {}
    for sums in measured:
        wide = {name: np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64) for name, x in sums.items()}
        total = {name: total.get(name, 0) + x for name, x in wide.items()}
    return total


def summarize(facts: Facts, total: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``loss``, a mean over batches weighted by what is valid, and scores of classes, or ``rmse`` and ``mae``."""
    n = max(int(total["count"]), 1)
    found = {"loss": float(total["loss"]) / n}
    if "confusion" in total:
        return {**found, **metrics.class_scores(total["confusion"], facts.ignore_index)}
    if "labels" in total:
        return {**found, **{name: float(each.mean()) for name, each in label_scores(total["labels"]).items()}}
    return {**found, "rmse": math.sqrt(total["squared"] / n), "mae": float(total["absolute"]) / n}


def label_scores(labels: np.ndarray) -> dict[str, np.ndarray]:
    """``F1`` and ``accuracy`` of every label, ``[K]``, from the sums ``labels`` of `measure`."""
    hit, said, true, count = labels.astype(float)
    return {"F1": 2 * hit / np.maximum(said + true, 1), "accuracy": (count - said - true + 2 * hit) / np.maximum(count, 1)}


def by_class(facts: Facts, total: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every class that truth or prediction has, as a row: how many pixels or images are of it, and its scores; none of a regression."""
    if not facts.num_classes:
        return []
    if "labels" in total:
        _, said, true, _ = total["labels"]
        each = label_scores(total["labels"])
    else:
        said, true = total["confusion"].sum(0), total["confusion"].sum(1)
        each = metrics.scores_by_class(total["confusion"])
    of = "pixels" if facts.task == "segmentation" else "images"
    shown = [k for k in np.flatnonzero(said + true) if k != facts.ignore_index]
    return [{"class": facts.class_names[k], of: int(true[k]), **{name: float(x[k]) for name, x in each.items()}} for k in shown]


class Progress:
    """The validations of a run so far, which its log remembers, and what follows from them."""

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike, step: int) -> None:
        self._name, self._train, self._optimizer = config.train.monitor, config.train, config.optimizer
        self._larger = plateau.is_larger_better(self._name)
        past = [line for line in (logging.read(workdir) if step else []) if self._name in line and line["step"] <= step]
        self._values = [math.nan if line[self._name] is None else line[self._name] for line in past]

    def add(self, found: Mapping[str, float]) -> bool:
        """Takes one more, and says whether it is the best."""
        if self._name not in found:
            raise ValueError(f"train.monitor={self._name!r}; a validation tells {', '.join(found)}.")
        self._values.append(float(found[self._name]))
        return plateau.is_best(self._values, self._larger)

    @property
    def rate(self) -> float:
        """What multiplies the learning rate."""
        o = self._optimizer
        return plateau.scale(self._values, self._larger, o.plateau_factor, o.plateau_patience) if o.schedule == "plateau" else 1.0

    @property
    def is_over(self) -> bool:
        return 0 < self._train.stop_after <= plateau.since_best(self._values, self._larger)
