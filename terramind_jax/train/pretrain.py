"""Pretraining of the any-to-any transformer: one straight loop over one pure step (spec 9.2, 9.3)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import checkpoint, flops, modalities, sharding
from terramind_jax import config as configuration
from terramind_jax import model as networks
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.masks import MaskConfig
from terramind_jax.data.pipeline import DataConfig, batches
from terramind_jax.modalities import Stream
from terramind_jax.train import logging, optimizer, state


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains in `workdir`, continuing what is there, and returns the last metrics.

    Raises ValueError or FileNotFoundError for a configuration or data that cannot work, `checkpoint.Terminated` after a SIGTERM.
    """
    # ---- Data ----
    configuration.check(config)
    config = with_codebooks(config)
    encoder, decoder = streams(config)
    index = open_tokenized(config, config.data.train_split)
    validation = open_validation(config)

    # ---- Length of the run, counted in tokens ----
    batch_size, run = config.train.batch_size, config.run
    tokens = config.mask.input_tokens + config.mask.target_tokens
    steps = config.train.steps or math.ceil(config.train.total_tokens / (tokens * batch_size))
    total = steps * batch_size
    warmup = min(config.optimizer.warmup_tokens / (total * tokens), 0.1)

    # ---- Model, optimizer and state, laid out on the mesh ----
    mesh = sharding.make_mesh(**config.mesh)
    check_batch(config, mesh)
    device_batches(config, index, mesh, workers=run.workers)  # raises what they would, before anything is written
    if validation is not None:
        device_batches(config, validation, mesh, train=False)
    module = networks.TerraMind(transformer_config(config))
    tx = optimizer.adamw(config.optimizer)
    configuration.bind_workdir(config, workdir, write=jax.process_index() == 0)
    checkpoints = checkpoint.Checkpoints(workdir, run.keep)
    train_state, buffers, layout, totals = state.start(partial(networks.init, module), tx, mesh, config.train.seed, checkpoints)
    step = int(train_state.step)

    # ---- The compiled step ----
    replicated = sharding.replicated(mesh)
    loss_fn = partial(loss, module, config.train.loss)
    update = partial(state.apply, tx=tx, config=config.optimizer, batch_size=batch_size, total=total, warmup=warmup)
    step_fn = jax.jit(partial(train_step, loss_fn, update), donate_argnums=0, out_shardings=(layout, replicated))
    sums_fn = jax.jit(lambda params, buffers, batch: loss_fn(params, buffers, batch)[1], out_shardings=replicated)

    # ---- Loop ----
    writer = logging.Writer(workdir, step=step, total=steps, tensorboard=run.tensorboard, progress=run.progress)
    writer.say(
        f"{state.size(train_state.params)} parameters, {len(index)} samples, step {step} of {steps}, {tokens * batch_size} tokens a step"
    )
    work = {
        "tokens": tokens * batch_size,
        "flops": flops.transformer_step(module.config, batch_size, config.mask.input_tokens, config.mask.target_tokens),
        "peak": flops.peak() * jax.device_count(),
    }
    meter = logging.Meter(writer, {"bad": 0, "overflow": 0, **totals}, log_every=run.log_every, work=work)
    validated: dict[str, float] = {}
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        checkpoint.sigterm() as stop,
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
    ):
        data = device_batches(config, index, mesh, consumed=state.consumed(train_state.samples), workers=run.workers)
        while step < steps and not stop.is_set():
            start = time.perf_counter()
            batch = next(data)
            waited = time.perf_counter() - start
            train_state, metrics = step_fn(train_state, buffers, batch)
            step += 1
            meter.add(step, metrics, waited)
            if step_fn._cache_size() > 1:
                raise RuntimeError(f"The training step was compiled again at step {step}: a shape or a sharding has changed.")

            if step % run.checkpoint_every == 0 or step == steps:
                meter.pause()
                state.save(checkpoints, train_state, buffers, meter.totals)
            if validation is not None and (step == steps or run.eval_every and step % run.eval_every == 0):
                meter.pause()
                fixed = device_batches(config, validation, mesh, train=False)
                validated = validate(partial(sums_fn, train_state.params, buffers), fixed, run.eval_batches, decoder, config.train.loss)
                writer.write(step, validated)

        # ---- End ----
        meter.pause()
        if step < steps:
            state.save(checkpoints, train_state, buffers, meter.totals)
    if step < steps:
        raise checkpoint.Terminated(
            f"Stopped by SIGTERM at step {step} of {steps}; the checkpoint is saved and the same command goes on from it."
        )
    return {"step": step, **meter.last, **validated}


# ---- one step, as a pure function ----


def loss(module: networks.TerraMind, kind: str, params: Any, buffers: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple]:
    """The scalar loss of a batch, and per decoder stream the sum of cross-entropies and the number of targets (spec 4.6)."""
    sums, counts = module.apply({"params": params, "buffers": buffers}, batch, method="losses")
    return networks.loss.combine(sums, counts, [s.vocab_size for s in module.config.decoder], kind), (sums, counts)


def train_step(
    loss_fn, update, train_state: state.State, buffers: Any, batch: Mapping[str, jax.Array]
) -> tuple[state.State, dict[str, jax.Array]]:
    """(state, batch) -> (state, metrics): one step of AdamW; `loss_fn` and `update` are bound at the start of a run."""
    (value, (sums, counts)), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params, buffers, batch)
    train_state, metrics = update(train_state, loss=value, grads=grads)
    decoder = loss_fn.args[0].config.decoder
    metrics |= {f"loss/{s.modality}": jnp.where(n > 0, total / n, jnp.nan) for s, total, n in zip(decoder, sums, counts, strict=True)}
    metrics["inputs"] = (batch["input_modality"] != networks.PADDING).sum()
    metrics["targets"] = counts.sum()
    metrics["bad"] = batch["bad"].sum()
    metrics["overflow"] = batch["overflow"].sum()
    return train_state, metrics


def validate(sums_fn, data: Iterator[Mapping[str, jax.Array]], n: int, decoder: tuple[Stream, ...], kind: str) -> dict[str, float]:
    """Loss over the first `n` batches, in all and per modality that has targets."""
    sums, counts = 0.0, 0.0
    for batch in itertools.islice(data, n):
        one = sums_fn(batch)
        sums, counts = sums + one[0], counts + one[1]
    whole = networks.loss.combine(sums, counts, [s.vocab_size for s in decoder], kind)
    each = {f"val/loss/{s.modality}": float(total / m) for s, total, m in zip(decoder, sums, counts, strict=True) if m}
    return {"val/loss": float(whole), **each}


# ---- from a configuration ----


def with_codebooks(config: ConfigDict) -> ConfigDict:
    """The configuration with the vocabularies of the tokenizers that made the token shards, as recorded beside these."""
    codebooks = config.model.codebooks.to_dict()
    for name in sorted({*config.data.inputs, *config.data.targets}):
        path = Path(config.data.tokens or config.data.root) / config.data.train_split / f"{name}_tokens" / "tokenizer.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        size = record.get("codebook_size", codebooks.get(name))
        if codebooks.get(name, size) != size:
            raise ValueError(f"model.codebooks.{name}={codebooks[name]}, but the tokens in {path.parent} come from a codebook of {size}.")
        if record.get("num_codebooks", 1) != 1:
            raise ValueError(
                f"The tokens in {path.parent} have {record['num_codebooks']} codebooks; the transformer takes one token a patch."
            )
        if size is not None:
            codebooks[name] = size
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.codebooks = ConfigDict(codebooks)
    return config.lock()


def open_tokenized(config: ConfigDict, split: str) -> Index:
    """The samples of one split with their tokens; an error if there are none."""
    root, tokens = config.data.root, config.data.tokens or config.data.root
    if not root:
        raise ValueError("config.data.root is empty; set it to a folder of shards with --config.data.root=DIR.")
    index = open_index(root, split, [*config.data.inputs, *config.data.targets], tokens_root=tokens)
    if not index.has_tokens.any():
        raise ValueError(
            f"There are no token shards under {Path(tokens) / split}; make them with "
            f"terramind-jax tokenize --data={root} --weights=DIR --out={tokens}."
        )
    return index


def open_validation(config: ConfigDict) -> Index | None:
    """The samples of the validation split, None if there is no such folder."""
    return open_tokenized(config, config.data.val_split) if (Path(config.data.root) / config.data.val_split).is_dir() else None


def device_batches(
    config: ConfigDict, index: Index, mesh: jax.sharding.Mesh, *, consumed: int = 0, workers: int = 0, train: bool = True
) -> Iterator[dict[str, jax.Array]]:
    """Batches of the whole mesh, of which this process loads its share; `consumed` is the position in the data.

    Checks configuration and data at once and reads when the first batch is asked for.
    """
    encoder, decoder = streams(config)
    pipeline = {name: config.data[name] for name in ("views_per_sample", "view_window", "patch_group", "capacity_sigmas")}
    host = batches(
        index,
        encoder,
        decoder,
        DataConfig(image_size=config.model.image_size, **pipeline),
        MaskConfig(**config.mask.to_dict()),
        batch_size=config.train.batch_size,
        consumed=consumed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=workers,
        seed=config.train.seed,
        train=train,
    )
    return (sharding.to_global({name: value for name, value in batch.items() if name != "sample"}, mesh) for batch in host)


def check_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Every device gets whole groups of samples."""
    unit = config.data.patch_group * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % unit:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {unit}: data.patch_group={config.data.patch_group} "
            f"for each of {unit // config.data.patch_group} devices."
        )


def streams(config: ConfigDict) -> tuple[tuple[Stream, ...], tuple[Stream, ...]]:
    """The encoder's and the decoder's streams, alphabetical by key: inputs as pixels and as tokens, targets as tokens."""
    inputs = [modalities.get(name) for name in config.data.inputs]
    keys = {key for m in inputs for key in (m.pixels, m.tokens) if key}
    targets = {modalities.output_stream(name).key for name in config.data.targets}

    def sized(key: str) -> Stream:
        stream = modalities.STREAMS[key]
        size = config.model.codebooks.get(stream.modality, stream.vocab_size)
        return dataclasses.replace(stream, vocab_size=size) if stream.kind == "tokens" else stream

    return tuple(map(sized, sorted(keys))), tuple(map(sized, sorted(targets)))


def transformer_config(config: ConfigDict) -> networks.TransformerConfig:
    """The module's configuration; dtype ``auto`` is bfloat16 on accelerators and float32 on a CPU."""
    encoder, decoder = streams(config)
    fields = {name: value for name, value in config.model.items() if name != "codebooks"}
    return networks.TransformerConfig(encoder=encoder, decoder=decoder, **{**fields, "dtype": state.compute_dtype(config.model.dtype)})


def load(workdir: str | os.PathLike) -> tuple[networks.TerraMind, dict[str, Any], ConfigDict]:
    """Module, variables ``{"params", "buffers"}`` and configuration of a pretrained model, from its newest checkpoint."""
    config = configuration.of_workdir(workdir)
    module = networks.TerraMind(transformer_config(config))
    abstract = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.random.key(0)))
    return module, checkpoint.load_variables(workdir, abstract), config
