"""Training of one modality's tokenizer: one straight loop over one pure step (spec 9.4, 9.5).

A ViT decoder is trained to reconstruct, by squared error or for LULC cross-entropy; a U-Net to tell the image from the image under noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import checkpoint, declarations, files, flops, modalities, sampling, sharding
from terramind_jax import config as configuration
from terramind_jax import tokenizer as networks
from terramind_jax.data import clouds
from terramind_jax.data.errors import DataError
from terramind_jax.data.faults import Faults
from terramind_jax.data.index import Index, has_split, open_index
from terramind_jax.data.pipeline import image_batches
from terramind_jax.data.views import read_variants
from terramind_jax.train import loop, optimizer, reconstruction, state
from terramind_jax.train.data_init import data_init, zero_output
from terramind_jax.train.random_crops import random_crops


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains in `workdir`, continuing what is there, and returns the last metrics.

    Raises ValueError or FileNotFoundError for a configuration or data that cannot work, `checkpoint.Terminated` after a SIGTERM.
    """
    # ---- Data ----
    configuration.check(config, "train-tokenizer")
    config = loop.with_modalities(config, [config.model.modality])
    module = networks.Tokenizer(tokenizer_config(config))
    check_sizes(config, module.config)
    if config.train.zero_output and module.config.decoder != "vit":
        raise ValueError(f"train.zero_output is of the decoder vit; model.decoder is {module.config.decoder}.")
    modality, index = config.model.modality, open_images(config, config.data.train_split)
    size = side_read(config, index)
    there = has_split(config.data.root, config.data.val_split, modality)
    validation = open_images(config, config.data.val_split) if there else None
    loop.check_agreement(config, index, validation)

    # ---- Length of the run, counted in samples ----
    batch_size = config.train.batch_size
    total = config.train.steps * batch_size or math.ceil(config.train.total_samples)
    warmup = min(config.optimizer.warmup_samples / total, 0.1)

    # ---- Model, optimizer and state, laid out on the mesh ----
    mesh = sharding.make_mesh(**config.mesh)
    if batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"train.batch_size={batch_size} must be a multiple of the {mesh.shape['data'] * mesh.shape['fsdp']} devices.")
    device_batches(config, index, mesh, workers=config.run.workers)  # raises what they would, before anything is written
    if validation is not None:
        device_batches(config, validation, mesh, train=False)
    tx = optimizer.adamw(config.optimizer)
    configuration.bind_workdir(config, workdir, write=jax.process_index() == 0)
    loop.bind_data(index, workdir, tokens=False, write=jax.process_index() == 0)
    checkpoints = checkpoint.Checkpoints(workdir, config.run.keep)
    init = partial(networks.init, module)
    train_state, buffers, layout, kept = state.start(init, tx, mesh, config.train.seed, checkpoints, ema=True)

    if (config.train.data_init or config.train.zero_output) and not int(train_state.step):
        first, starts = next(device_batches(config, index, mesh)), (config.train.data_init, config.train.zero_output)
        train_state = jax.jit(partial(begin, module, *starts), donate_argnums=0, out_shardings=layout)(train_state, buffers, first)

    # ---- The compiled steps ----
    replicated = sharding.replicated(mesh)
    update = partial(
        state.apply,
        tx=tx,
        config=config.optimizer,
        batch_size=batch_size,
        total=total,
        warmup=warmup,
        ema_decay=config.train.ema_decay,
    )
    draws = Draws(config.train.seed, tuple(config.data.sizes), config.data.min_crop_scale)
    step_fn = jax.jit(partial(train_step, module, draws, update), donate_argnums=0, out_shardings=(layout, replicated))
    measure_fn = jax.jit(partial(measure, module, draws, config.run.timesteps), out_shardings=replicated)

    def validated(train_state: state.State, buffers: Any) -> dict[str, float]:
        step, run = int(train_state.step), config.run
        batches = itertools.islice(device_batches(config, validation, mesh, train=False), run.eval_batches)
        measured = (measure_fn(train_state.ema, buffers, batch) for batch in batches)
        first = next(measured)
        number = math.ceil(step / run.eval_every) if run.eval_every else 1
        if run.pictures_every and number % run.pictures_every == 0 and jax.process_index() == 0:
            path = files.folder(workdir) / "pictures" / f"step_{step:09d}.png"
            reconstruction.draw(path, modality, *jax.device_get(first[1]), title=f"{modality} at step {step}")
        return reconstruction.summarize(module.config, (sums for sums, _ in itertools.chain([first], measured)))

    # ---- Loop ----
    faults = Faults(index, lambda i: read_variants(index, i, modality, size), workdir, jax.process_index())
    sides = draws.sizes or (size,)
    training = loop.Training(
        title=f"{modality} tokenizer: {state.size(train_state.params)} parameters, {len(index)} samples",
        total=total,
        work={
            "images": batch_size,
            "samples": batch_size,
            "flops": sum(flops.tokenizer_step(module.config, batch_size, side) for side in sides) / len(sides),
            "peak": flops.peak() * jax.device_count(),
        },
        summed=("bad",),
        step=step_fn,
        batches=lambda consumed: device_batches(config, index, mesh, consumed=consumed, workers=config.run.workers, faults=faults),
        validate=None if validation is None else validated,
        faults=faults,
    )
    return loop.run(training, config, workdir, mesh, checkpoints, train_state, buffers, kept)


# ---- one step, as a pure function ----


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a step draws, all of it from `seed` and the samples' positions in the data.

    `sizes` are the sides of images made of random crops of at least `min_crop_scale` of a tile's area; without any, crops are fixed.
    """

    seed: int = 0
    sizes: Sequence[int] = ()
    min_crop_scale: float = 0.8

    def keys(self, position: jax.Array, what: str) -> jax.Array:
        """A key a sample ``[B]`` from positions, two words each, ``[B, 2]`` uint32."""
        return sampling.step_keys(sampling.sample_keys(position, f"tokenizer {what}"), self.seed)


def loss(
    module: networks.Tokenizer, params: Any, buffers: Any, image: jax.Array, weight: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean loss over the images ``[B, H, W, C]`` of weight 1, ``[]``, and counts of tokens (`reconstruction.usage`).

    `image` is what `reconstruction.prepare` gives. `keys` ``[B]`` draw noise and timesteps for a diffusion decoder.
    """
    noised = networks.noised(keys, image) if module.config.decoder == "unet" else ()
    made, codes = module.apply({"params": params, "buffers": buffers}, image, *noised)
    each = networks.reconstruction_loss(module.config, made, image)
    return (each * weight).sum() / jnp.maximum(weight.sum(), 1), reconstruction.usage(module.config, codes, weight)


def value_and_grad(
    module: networks.Tokenizer, draws: Draws, params: Any, buffers: Any, batch: Mapping[str, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """((loss, counts of tokens), gradients) of a batch, at the one of `draws.sizes` that falls to it.

    Each side has a branch of its own in one program, so shapes are static and a step takes the time of its own side.
    """
    image = reconstruction.prepare(module.config, batch["image"])
    keys, crop_keys = draws.keys(batch["position"], "noise"), draws.keys(batch["position"], "crops")

    def at(side: int | None):
        def branch(params: Any, image: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
            if side is not None:
                image = random_crops(crop_keys, image, side, draws.min_crop_scale, nearest=module.config.is_class_map)
            return jax.value_and_grad(partial(loss, module), has_aux=True)(params, buffers, image, ~batch["bad"], keys)

        return branch

    if not draws.sizes:
        return at(None)(params, image)
    drawn = jax.random.randint(draws.keys(batch["position"][:1], "size")[0], (), 0, len(draws.sizes))
    return jax.lax.switch(drawn, [at(side) for side in draws.sizes], params, image)


def begin(
    module: networks.Tokenizer, spread: bool, zero: bool, train_state: state.State, buffers: Any, batch: Mapping[str, jax.Array]
) -> state.State:
    """A fresh state, its parameters spread over a first batch, or with the decoder's last layer at zero, or both."""
    params = train_state.params
    if spread:
        params = data_init(module, params, buffers, reconstruction.prepare(module.config, batch["image"]), ~batch["bad"])
    if zero:
        params = zero_output(params)
    return train_state.replace(params=params, ema=jax.tree.map(jnp.copy, params))


def train_step(
    module: networks.Tokenizer, draws: Draws, update, train_state: state.State, buffers: Any, batch: Mapping[str, jax.Array]
) -> tuple[state.State, dict[str, jax.Array]]:
    """(state, batch) -> (state, metrics): one step of AdamW and of the average."""
    (value, counts), grads = value_and_grad(module, draws, train_state.params, buffers, batch)
    train_state, metrics = update(train_state, loss=value, grads=grads)
    metrics["codes_in_batch"] = (counts > 0).mean()
    metrics["bad"] = batch["bad"].sum()
    return train_state, metrics


def measure(module: networks.Tokenizer, draws: Draws, timesteps: int, params: Any, buffers: Any, batch: Mapping[str, jax.Array]):
    """`reconstruction.measure` with noise that is the same in every evaluation."""
    return reconstruction.measure(module, timesteps, params, buffers, batch, draws.keys(batch["position"], "noise"))


# ---- from a configuration ----


def tokenizer_config(config: ConfigDict) -> networks.TokenizerConfig:
    """The module's configuration; dtype ``auto`` is bfloat16 on accelerators and float32 on a CPU."""
    declarations.declare(config.get("modalities", {}), "config.modalities")
    modality = modalities.get(config.model.modality)
    if not modality.levels:
        known = ", ".join(m.name for m in modalities.MODALITIES.values() if m.levels)
        raise ValueError(f"{modality.name} has no tokenizer, as it has no levels; tokenizers exist for {known}.")
    return networks.TokenizerConfig(
        channels=modality.channels, **{**config.model.to_dict(), "dtype": sharding.compute_dtype(config.model.dtype)}
    )


def side_read(config: ConfigDict, index: Index, train: bool = True) -> int:
    """Side of what is read of a tile: all of it where random crops are made of it, else a fixed crop."""
    if not (train and config.data.sizes):
        return config.data.image_size
    return config.data.tile_size or first_side(index, config.model.modality)


def first_side(index: Index, modality: str) -> int:
    """The side of the first tile of a modality that can be read, the shorter one; a ValueError if none of the first hundred can."""
    for i in np.flatnonzero(index.available[:, index.modalities.index(modality)])[:100]:
        with contextlib.suppress(DataError, OSError):
            return min(index.read(int(i), modality).shape[:2])
    raise ValueError(f"None of the first tiles of {modality} can be read; look at them with `terramind-jax data check`.")


def check_sizes(config: ConfigDict, network: networks.TokenizerConfig) -> None:
    """A ValueError for sides that the network cannot halve often enough, and for crops that are none."""
    multiple, data = network.decoder_multiple, config.data
    for field, side in (("image_size", data.image_size), *(("sizes", side) for side in data.sizes)):
        if side < multiple or side % multiple:
            raise ValueError(f"data.{field} has {side}; a tokenizer with the decoder {network.decoder!r} needs multiples of {multiple}.")
    if not 0 < data.min_crop_scale <= 1:
        raise ValueError(f"data.min_crop_scale={data.min_crop_scale}; expected a part of the tile's area, above 0 and at most 1.")


def open_images(config: ConfigDict, split: str) -> Index:
    """The samples of one split; an error if there is none."""
    if not config.data.root:
        raise ValueError("config.data.root is empty; set it to a folder of shards with --config.data.root=DIR.")
    return open_index(config.data.root, split, [config.model.modality])


def device_batches(
    config: ConfigDict,
    index: Index,
    mesh: jax.sharding.Mesh,
    *,
    consumed: int = 0,
    workers: int = 0,
    train: bool = True,
    faults: Faults | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Batches of the whole mesh, of which this process loads its share; `consumed` is the position in the data.

    ``{"image": [B, S, S, C] as stored, "bad": [B], "position": [B, 2] uint32}``; a position is the sample's place in the whole run, in
    two words, high and low. For validation of Sentinel-2 ``"clear"`` is as in `image_batches`. Checks configuration and data at once and
    reads when the first batch is asked for. `faults` are told of bad samples.
    """
    host, hosts = sharding.host_share(mesh)
    batch_size = config.train.batch_size
    share = image_batches(
        index,
        config.model.modality,
        batch_size=batch_size,
        seed=config.train.seed,
        consumed=consumed,
        host=host,
        hosts=hosts,
        workers=workers,
        image_size=side_read(config, index, train),
        train=train,
        threads=config.run.threads,
        clear=not train and clouds.has_mask(config.model.modality),
    )
    share = faults.following(share) if faults else share

    def placed(step: int, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        position = sampling.seed_words(consumed + step * batch_size + np.arange(host, batch_size, hosts), batch_size // hosts)
        return {name: batch[name] for name in ("image", "bad", "clear") if name in batch} | {"position": position}

    return (sharding.to_global(placed(step, batch), mesh) for step, batch in enumerate(share))


def load(workdir: str | os.PathLike) -> tuple[networks.Tokenizer, dict[str, Any]]:
    """Module and variables ``{"params", "buffers"}`` of a trained tokenizer, averaged weights, from its newest checkpoint."""
    module = networks.Tokenizer(tokenizer_config(configuration.of_workdir(workdir)))
    abstract = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.random.key(0)))
    return module, checkpoint.load_variables(workdir, abstract)
