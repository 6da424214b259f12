"""The batches of a fine-tuning on its mesh, with what frozen networks make of them: once a sample where nothing else changes it.

A frozen backbone's features are kept (`caching`) if every sample is always seen in one way: images are of the crop's size, and none is
turned. What tokenizers and a thinker make is kept for each of the ways in which a whole image can be turned, if a run has more epochs than
those, and always for validation. Random crops of larger images hardly ever repeat: they are tokenised, thought about and seen anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from terramind_jax import sharding
from terramind_jax.tasks import batches, caching
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.batches import Batch
from terramind_jax.tasks.beside import Beside
from terramind_jax.tasks.datasets import Dataset
from terramind_jax.tasks.model import TaskModel

Scale = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches as `loss` and `validation.measure` take them, global arrays."""

    training: Callable[[int], Iterator[Batch]]  # from a position in the data
    covering: Callable[[], Iterator[Batch]]  # all windows of the validation split


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The networks that are not trained: those beside the backbone, and of `module` the backbone itself."""

    module: TaskModel
    beside: Beside
    held: Mapping[str, Any]

    def ids(self, batch: Batch) -> dict[str, jax.Array]:
        """What the networks beside the backbone make of a batch."""
        return self.beside.ids(self.held, batch["inputs"])

    def complete(self, batch: Batch) -> Batch:
        """With those ids among the inputs."""
        return _with_inputs(batch, self.ids(batch))

    def featured(self, batch: Batch) -> Batch:
        """With features in the place of inputs."""
        batch = self.complete(batch)
        variables = networks.join({}, self.held, None)
        features = _features(variables, batch["inputs"], module=self.module)
        return {"features": features, **{name: x for name, x in batch.items() if name != "inputs"}}


@partial(jax.jit, static_argnames="module")
def _features(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array], *, module: TaskModel) -> list[jax.Array]:
    return module.apply(variables, inputs, method="features")


def open_feed(
    config: ConfigDict, dataset: Dataset, held_out: Dataset, scale: Scale, mesh: jax.sharding.Mesh, frozen: Frozen, total: int
) -> Feed:
    """The batches of a run over `total` samples; what can be kept is made here."""
    to_mesh = partial(map, partial(sharding.to_global, mesh=mesh))
    crops, windows = partial(random_crops, config, dataset, scale, mesh), partial(covering, config, scale=scale, mesh=mesh)
    size, (host, hosts) = config.train.batch_size, sharding.host_share(mesh)

    def keep(split: Dataset, make: Callable[[Batch], Any], way: int = 0) -> caching.Kept:
        return caching.keep(to_mesh(windows(split, way=way)), make, batches.count(split, config.data.crop, size))

    if keeps_features(config, dataset):
        share = dict(batch_size=size, host=host, hosts=hosts)
        seen, validated = keep(dataset, frozen.featured), keep(held_out, frozen.featured)
        in_order = partial(caching.training, seen, len(dataset), seed=config.train.seed, **share)
        return Feed(lambda consumed: to_mesh(in_order(consumed=consumed)), lambda: to_mesh(caching.covering(validated, **share)))
    feed = Feed(lambda consumed: map(frozen.complete, to_mesh(crops(consumed))), lambda: map(frozen.complete, to_mesh(windows(held_out))))
    if not config.train.cache or not frozen.beside:
        return feed
    of_windows = keep(held_out, frozen.ids)
    feed = dataclasses.replace(feed, covering=lambda: to_mesh(with_ids(windows(held_out), of_windows)))
    ways = batches.WAYS if config.data.d4 else 1
    if not has_whole_images(config, dataset) or total <= ways * len(dataset):
        return feed
    of_ways = [keep(dataset, frozen.ids, way) for way in range(ways)]
    of_images = jax.tree.map(lambda *each: np.concatenate([x[: len(dataset)] for x in each]), *of_ways)
    return dataclasses.replace(feed, training=lambda consumed: to_mesh(with_ids(crops(consumed), of_images)))


def has_whole_images(config: ConfigDict, dataset: Dataset) -> bool:
    """Whether crops are whole images."""
    return set(dataset.image_size()) == {config.data.crop}


def keeps_features(config: ConfigDict, dataset: Dataset) -> bool:
    """Whether features are kept: those of a sample never change."""
    drops = config.model.drop_path_rate or config.model.modality_drop_rate
    never_change = config.train.tune == "frozen" and not config.data.d4 and not drops and has_whole_images(config, dataset)
    return config.train.cache and never_change


def with_ids(stream: Iterable[Batch], ids: caching.Kept) -> Iterator[Batch]:
    """Batches of one process with the ids of their views."""
    return (_with_inputs(batch, caching.take(ids, batch["view"])) for batch in stream)


def _with_inputs(batch: Batch, more: Mapping[str, Any]) -> Batch:
    return {**batch, "inputs": {**batch["inputs"], **more}}


def random_crops(config: ConfigDict, dataset: Dataset, scale: Scale, mesh: jax.sharding.Mesh, consumed: int) -> Iterator[Batch]:
    """This process's share of the training batches from a position on."""
    host, hosts = sharding.host_share(mesh)
    drawn = dict(crop=config.data.crop, seed=config.train.seed, d4=config.data.d4, focus=config.data.focus)
    options = dict(batch_size=config.train.batch_size, workers=config.run.workers, threads=config.run.threads, **drawn)
    return batches.training(dataset, scale, consumed=consumed, host=host, hosts=hosts, **options)


def covering(config: ConfigDict, dataset: Dataset, scale: Scale, mesh: jax.sharding.Mesh, way: int = 0) -> Iterator[Batch]:
    """This process's share of the batches with all windows of a split."""
    host, hosts = sharding.host_share(mesh)
    options = dict(crop=config.data.crop, batch_size=config.train.batch_size, workers=config.run.workers, threads=1)
    return batches.covering(dataset, scale, way=way, host=host, hosts=hosts, **options)
