"""Frozen features of the images of a labelled data set: what k-NN, linear probe and few-shot classification read."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from terramind_jax import embed_scenes, generate, modalities, sources, weights
from terramind_jax.data import order
from terramind_jax.generate_scenes import workdir
from terramind_jax.modalities import PATCH_SIZE
from terramind_jax.model import backbone
from terramind_jax.scenes.feeding import Network, spread
from terramind_jax.tasks import batches, datasets, finetune
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import Dataset, Facts


@dataclasses.dataclass(frozen=True)
class Features:
    """Of one split: `x` ``[N, D]``, a mean over the image; `bands` ``[N, 2 C]``, mean and deviation of each band; `labels` ``[N]``."""

    names: tuple[str, ...]
    x: np.ndarray
    bands: np.ndarray
    labels: np.ndarray

    def representations(self) -> dict[str, np.ndarray]:
        """What there is to classify by: the model's features, and what needs no model."""
        return {"features": self.x, "mean and deviation of bands": self.bands}


def run(
    *,
    weights: str | os.PathLike,
    dataset: str,
    data: str | os.PathLike,
    splits: Sequence[str],
    options: Mapping[str, Any] = {},
    model: str | None = None,
    inputs: Sequence[str] = (),
    layer: int = -1,
    resize: int | None = None,
    limit: int | None = None,
    statistics: str = "pretrained",
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[Facts, list[Features]]:
    """What a data set says of itself, and the features of some of its splits.

    Args:
      weights: work directory of a pretrained model; with `model`, what `weights.load` takes.
      dataset, data: name of a data set whose images have one label, and its folder; `options` are of `datasets.load`.
      inputs: modalities; empty: all that the data set has.
      layer: of the encoder, 0 the first; -1: the last, which alone is normalised.
      resize: side that images are brought to, bilinearly; None: they stay, and one that is no multiple of 16 is seen through windows.
      limit: samples of a split, drawn under `seed`; None: all.
      statistics: of ``pretrained``, or of the ``dataset``, with which inputs are standardised.

    Raises:
      ValueError: a data set of another task, an input that the model lacks, a layer that there is not.
      FileNotFoundError: no model, or a data set that is not complete.
    """
    sources.declare(workdir(weights))
    chosen = [_chosen(datasets.load(dataset, data, split, **options), inputs, limit, seed) for split in splits]
    facts = chosen[0].facts
    network = spread(load_encoder(weights, model, facts))
    depth = network.module.config.encoder_depth
    if not -depth <= layer < depth:
        raise ValueError(f"The layer is {layer}; this model's are 0-{depth - 1}, or -{depth} to -1 from the last.")
    config = finetuning()
    config.data.statistics = statistics
    scale = finetune.scale_of(config, facts)
    return facts, [extract(network, of, scale, layer=layer, resize=resize, batch_size=batch_size) for of in chosen]


def _chosen(dataset: Dataset, inputs: Sequence[str], limit: int | None, seed: int) -> Dataset:
    if dataset.facts.task != "classification":
        raise ValueError(f"{dataset.facts.title} is a {dataset.facts.task}; this protocol needs images with one label each.")
    dataset = dataset.only(inputs) if inputs else dataset
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(order.permutation(len(dataset), seed, 0)[:limit]))


def told(options: Mapping[str, Any]) -> str:
    """For a report: whether the split of `run` is EuroSAT's spatial one."""
    return ", spatial split" if options.get("options", {}).get("spatial") else ""


def load_encoder(source: str | os.PathLike, model: str | None, facts: Facts) -> Network:
    """The encoder for these inputs; a ValueError for those that it does not read as pixels."""
    partial = {name: list(bands) for name, bands in facts.bands.items() if bands != modalities.get(name).bands}
    if model is None and partial:
        name, bands = next(iter(partial.items()))
        raise ValueError(f"{facts.title} has the bands {', '.join(bands)} of {name}; a work directory's model reads all.")
    if model is None:
        network = embed_scenes.load_network(source, None, list(facts.bands))
    else:
        loaded = weights.load(model, source, modalities=list(facts.bands), bands=partial)
        network = Network(loaded.module, loaded.variables, {}, loaded.version)
    for name in facts.bands:
        if generate.input_stream(network.module, name).kind != "pixels":
            raise ValueError(f"{name} enters as tokens, which this protocol does not read.")
    return network


def extract(
    network: Network, dataset: Dataset, scale: Mapping, *, layer: int = -1, resize: int | None = None, batch_size: int = 32
) -> Features:
    """The features of one split; of an image that windows cover their mean. `scale` is of `finetune.scale_of`."""
    size = dataset.image_size()
    crop = min(size) // PATCH_SIZE * PATCH_SIZE if resize is None else min(size)
    if not crop:
        raise ValueError(f"The images of {dataset.facts.title} are {size[0]}x{size[1]} pixels; give them a size of at least {PATCH_SIZE}.")
    devices = 1 if network.sharding is None else network.sharding.num_devices
    windows, size = len(batches.windows(size, crop)), -(-batch_size // devices) * devices
    streams = tuple((name, generate.input_stream(network.module, name).key) for name in dataset.facts.bands)
    encode = functools.partial(_pooled, module=network.module, streams=streams, layer=layer, resize=resize)
    found, total = [], -(-len(dataset) * windows // size)
    for batch in tqdm(batches.covering(dataset, scale, crop=crop, batch_size=size), dataset.split, total, dynamic_ncols=True):
        images = {name: network.put(x) for name, x in batch["inputs"].items()}
        found.append([*jax.device_get(encode(network.variables, images)), batch["target"]])
    x, bands, labels = (np.concatenate(parts)[: len(dataset) * windows] for parts in zip(*found, strict=True))
    x, bands = (of.reshape(len(dataset), windows, -1).mean(1) for of in (x, bands))
    return Features(dataset.names, x, bands, labels.reshape(len(dataset), windows)[:, 0])


@functools.partial(jax.jit, static_argnames=("module", "streams", "layer", "resize"))
def _pooled(variables, images: Mapping[str, jax.Array], *, module, streams: tuple, layer: int, resize: int | None) -> tuple:
    """Standardised images ``[B, H, W, C]`` by modality to features ``[B, D]``, and mean and deviation of their bands ``[B, 2 C]``."""
    bands = [f(x, (1, 2)) for x in images.values() for f in (jnp.mean, jnp.std)]
    if resize is not None:
        sizes = {name: (len(x), resize, resize, x.shape[-1]) for name, x in images.items()}
        images = {name: jax.image.resize(x, sizes[name], "bilinear", antialias=False) for name, x in images.items()}
    features = backbone.features(module, variables, {stream: images[name] for name, stream in streams})[layer]
    return features.mean(1).astype(jnp.float32), jnp.concatenate(bands, 1)
