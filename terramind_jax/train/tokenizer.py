"""Training of one modality's tokenizer: one straight loop over one pure step (spec 9.4, 9.5)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import checkpoint, flops, modalities, sharding
from terramind_jax import config as configuration
from terramind_jax import tokenizer as networks
from terramind_jax.data.faults import Faults
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.pipeline import image_batches
from terramind_jax.data.views import read_variants
from terramind_jax.tokenizer import fsq
from terramind_jax.train import loop, optimizer, state


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains in `workdir`, continuing what is there, and returns the last metrics.

    Raises ValueError or FileNotFoundError for a configuration or data that cannot work, `checkpoint.Terminated` after a SIGTERM.
    """
    # ---- Data ----
    configuration.check(config, "train-tokenizer")
    module = networks.Tokenizer(tokenizer_config(config))
    if module.config.decoder != "vit":
        raise ValueError(f"model.decoder is {module.config.decoder!r}; only tokenizers with the decoder 'vit' can be trained here.")
    modality, size = config.model.modality, config.data.image_size
    index = open_images(config, config.data.train_split)
    validation = (
        open_images(config, config.data.val_split) if (Path(config.data.root) / config.data.val_split / modality).is_dir() else None
    )

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
    checkpoints = checkpoint.Checkpoints(workdir, config.run.keep)
    init = partial(networks.init, module)
    train_state, buffers, layout, kept = state.start(init, tx, mesh, config.train.seed, checkpoints, ema=True)

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
    step_fn = jax.jit(partial(train_step, module, update), donate_argnums=0, out_shardings=(layout, replicated))
    errors_fn = jax.jit(partial(errors, module), out_shardings=replicated)

    def validated(train_state: state.State, buffers: Any) -> dict[str, float]:
        fixed = device_batches(config, validation, mesh, train=False)
        return validate(partial(errors_fn, train_state.ema, buffers), fixed, config.run.eval_batches, module.config)

    # ---- Loop ----
    faults = Faults(index, lambda i: read_variants(index, i, modality, size))
    training = loop.Training(
        title=f"{modality} tokenizer: {state.size(train_state.params)} parameters, {len(index)} samples",
        total=total,
        work={
            "images": batch_size,
            "samples": batch_size,
            "flops": flops.tokenizer_step(module.config, batch_size, size),
            "peak": flops.peak() * jax.device_count(),
        },
        summed=("bad",),
        step=step_fn,
        batches=lambda consumed: device_batches(config, index, mesh, consumed=consumed, workers=config.run.workers, faults=faults),
        validate=None if validation is None else validated,
        reasons=faults.reasons,
    )
    return loop.run(training, config, workdir, mesh, checkpoints, train_state, buffers, kept)


# ---- one step, as a pure function ----


def _prepare(config: networks.TokenizerConfig, image: jax.Array) -> jax.Array:
    """Stored values -> what the tokenizer reads: standardised floats, or class maps as they are."""
    return image if config.is_class_map else modalities.standardize(config.modality, image)


def loss(module: networks.Tokenizer, params: Any, buffers: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean reconstruction loss of the readable images ``[]`` and their tokens ``[B, h, w, K]``."""
    image = _prepare(module.config, batch["image"])
    reconstruction, codes = module.apply({"params": params, "buffers": buffers}, image)
    weight = ~batch["bad"]
    each = networks.reconstruction_loss(module.config, reconstruction, image)
    return (each * weight).sum() / jnp.maximum(weight.sum(), 1), _tokens(module.config, codes)


def _tokens(config: networks.TokenizerConfig, codes: jax.Array) -> jax.Array:
    grouped = codes.reshape(*codes.shape[:-1], config.num_codebooks, len(config.levels))
    return fsq.codes_to_tokens(grouped, config.levels)


def train_step(
    module, update, train_state: state.State, buffers: Any, batch: Mapping[str, jax.Array]
) -> tuple[state.State, dict[str, jax.Array]]:
    """(state, batch) -> (state, metrics): one step of AdamW and of the average."""
    (value, tokens), grads = jax.value_and_grad(partial(loss, module), has_aux=True)(train_state.params, buffers, batch)
    train_state, metrics = update(train_state, loss=value, grads=grads)
    metrics["codes_in_batch"] = (usage(module.config, tokens, ~batch["bad"]) > 0).mean()
    metrics["bad"] = batch["bad"].sum()
    return train_state, metrics


def usage(config: networks.TokenizerConfig, tokens: jax.Array, weight: jax.Array) -> jax.Array:
    """How often each code occurs in tokens ``[B, h, w, K]`` of the images with weight 1: ``[codebook_size]`` float32."""
    weight = jnp.broadcast_to(weight[:, None, None, None], tokens.shape).astype(jnp.float32)
    return jnp.zeros(config.codebook_size).at[tokens.reshape(-1)].add(weight.reshape(-1))


def errors(module: networks.Tokenizer, params: Any, buffers: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the readable images: pixels, squared error in the modality's unit (LULC: wrong pixels), loss, code counts."""
    config, weight = module.config, ~batch["bad"]
    image = _prepare(config, batch["image"])
    reconstruction, codes = module.apply({"params": params, "buffers": buffers}, image)
    if config.is_class_map:
        wrong = (reconstruction.argmax(-1) != image[..., 0]).mean((1, 2))
    else:
        _, std = modalities.statistics(config.modality)
        wrong = jnp.square((reconstruction - image) * std).mean((1, 2, 3))
    return {
        "images": weight.sum(),
        "error": (wrong * weight).sum(),
        "loss": (networks.reconstruction_loss(config, reconstruction, image) * weight).sum(),
        "codes": usage(config, _tokens(config, codes), weight),
    }


def validate(errors_fn, data: Iterator[Mapping[str, jax.Array]], n: int, config: networks.TokenizerConfig) -> dict[str, float]:
    """Loss, error and use of the codebook over the first `n` batches of centre crops.

    The error is the RMSE in the modality's unit, for LULC the share of right pixels. `codes` is the share of the codebook that
    occurs, `perplexity` how many equally frequent codes would carry as much.
    """
    sums: dict[str, Any] = {}
    for batch in itertools.islice(data, n):
        one = errors_fn(batch)
        sums = one if not sums else jax.tree.map(jnp.add, sums, one)
    images = float(jnp.maximum(sums["images"], 1))
    share = sums["codes"] / jnp.maximum(sums["codes"].sum(), 1)
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1))).sum()
    error = float(sums["error"]) / images
    quality = {"val/accuracy": 1 - error} if config.is_class_map else {"val/rmse": math.sqrt(error)}
    codes = {"val/codes": float((sums["codes"] > 0).mean()), "val/perplexity": float(jnp.exp(entropy))}
    return {"val/loss": float(sums["loss"]) / images, **quality, **codes}


# ---- from a configuration ----


def tokenizer_config(config: ConfigDict) -> networks.TokenizerConfig:
    """The module's configuration; dtype ``auto`` is bfloat16 on accelerators and float32 on a CPU."""
    modality = modalities.get(config.model.modality)
    if not modality.levels:
        known = ", ".join(m.name for m in modalities.MODALITIES.values() if m.levels)
        raise ValueError(f"{modality.name} has no tokenizer; tokenizers exist for {known}.")
    return networks.TokenizerConfig(
        channels=modality.channels, **{**config.model.to_dict(), "dtype": state.compute_dtype(config.model.dtype)}
    )


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

    Checks configuration and data at once and reads when the first batch is asked for. `faults` are told of bad samples.
    """
    host, hosts = sharding.host_share(mesh)
    share = image_batches(
        index,
        config.model.modality,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        consumed=consumed,
        host=host,
        hosts=hosts,
        workers=workers,
        image_size=config.data.image_size,
        train=train,
    )
    share = faults.following(share) if faults else share
    return (sharding.to_global({"image": batch["image"], "bad": batch["bad"]}, mesh) for batch in share)


def load(workdir: str | os.PathLike) -> tuple[networks.Tokenizer, dict[str, Any]]:
    """Module and variables ``{"params", "buffers"}`` of a trained tokenizer, averaged weights, from its newest checkpoint."""
    module = networks.Tokenizer(tokenizer_config(configuration.of_workdir(workdir)))
    abstract = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.random.key(0)))
    return module, checkpoint.load_variables(workdir, abstract)
