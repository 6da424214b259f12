"""Pretraining of the any-to-any transformer: one straight loop over one pure step (spec 9.2, 9.3)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import checkpoint, declarations, files, flops, modalities, sharding
from terramind_jax import config as configuration
from terramind_jax import model as networks
from terramind_jax.data import scan, storage
from terramind_jax.data.faults import Faults, read_streams
from terramind_jax.data.groups import filled_slots, template
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.masks import MaskConfig
from terramind_jax.data.pipeline import DataConfig, batches
from terramind_jax.modalities import Stream
from terramind_jax.train import loop, online, optimizer, probe, state


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    initial: Callable[[str, networks.TerraMind], Any] | None = None,
    tokenizer: online.Load | None = None,
) -> dict[str, float]:
    """Trains in `workdir`, continuing what is there, and returns the last metrics.

    `initial` gives the variables that ``train.init`` names, as `weights.initial` does, where a run begins with it; `tokenizer` loads a
    tokenizer, as `weights.tokenizer` does, where the run makes its tokens online.

    Raises ValueError or FileNotFoundError for a configuration or data that cannot work, `checkpoint.Terminated` after a SIGTERM.
    """
    # ---- Data ----
    configuration.check(config, "pretrain")
    config = loop.with_modalities(config, {*config.data.inputs, *config.data.targets})
    index = open_tokenized(config, config.data.train_split)
    validation = open_validation(config)
    tokenizers = online.load(config, sum(streams(config), ()), (index, validation), tokenizer)
    config = with_codebooks(config, tokenizers)
    loop.check_agreement(config, index, validation)

    # ---- Model, optimizer and state, laid out on the mesh ----
    mesh = sharding.make_mesh(**config.mesh)
    check_mesh(config, mesh)
    device_batches(config, index, mesh, workers=config.run.workers)  # raises what they would, before anything is written
    if validation is not None:
        device_batches(config, validation, mesh, train=False)
    module = networks.TerraMind(transformer_config(config))
    tx = optimizer.adamw(config.optimizer)
    given = initial_variables(config, module, workdir, initial)
    configuration.bind_workdir(config, workdir, write=jax.process_index() == 0)
    loop.bind_data(index, workdir, write=jax.process_index() == 0)
    checkpoints = checkpoint.Checkpoints(workdir, config.run.keep)
    init = partial(networks.init, module)
    train_state, buffers, layout, kept = state.start(init, tx, mesh, config.train.seed, checkpoints, initial=given)
    del given

    # ---- The compiled steps ----
    tokenizers = tokenizers and tokenizers.placed(mesh)
    step_fn = make_step(config, module, tx, mesh, layout, tokenizers)
    validated = None if validation is None else make_validation(config, module, validation, mesh, tokenizers)
    if validated is not None and config.train.init:
        validated = compared(validated, workdir)

    # ---- Loop ----
    faults = Faults(index, partial(read_streams, index, streams_read(config), config.model.image_size), workdir, jax.process_index())
    tokens, batch_size = config.mask.input_tokens + config.mask.target_tokens, config.train.batch_size
    training = loop.Training(
        title=f"{state.size(train_state.params)} parameters, {len(index)} samples{tokens_told(config, index)}",
        total=total_samples(config),
        work={
            "tokens": tokens * batch_size,
            "samples": batch_size,
            "flops": step_flops(config, module.config, index),
            "peak": flops.peak() * jax.device_count(),
        },
        summed=("bad", "overflow"),
        step=step_fn,
        batches=lambda consumed: device_batches(config, index, mesh, consumed=consumed, workers=config.run.workers, faults=faults),
        validate=validated,
        validate_first=bool(config.train.init),
        faults=faults,
    )
    return loop.run(training, config, workdir, mesh, checkpoints, train_state, buffers, kept)


def initial_variables(config: ConfigDict, module: networks.TerraMind, workdir: str | os.PathLike, initial: Any) -> Any:
    """What ``train.init`` names, loaded by `initial` before anything is written; None without it, and for a run that goes on."""
    if not config.train.init:
        return None
    if initial is None:
        raise ValueError("train.init names weights to start from; give `train` the function that loads them, weights.initial.")
    return None if checkpoint.is_begun(workdir) else initial(config.train.init, module)


# ---- one step, as a pure function ----


def total_samples(config: ConfigDict) -> int:
    """Samples of the whole run. Its schedule is counted in them, so that it stays the same with another batch size."""
    tokens = config.mask.input_tokens + config.mask.target_tokens
    return config.train.steps * config.train.batch_size or math.ceil(config.train.total_tokens / tokens)


def length(config: ConfigDict) -> int:
    """Steps of the whole run."""
    return math.ceil(total_samples(config) / config.train.batch_size)


def make_step(
    config: ConfigDict,
    module: networks.TerraMind,
    tx: Any,
    mesh: jax.sharding.Mesh,
    layout: state.State,
    tokenizers: online.Tokenizers | None = None,
) -> Any:
    """The jitted (state, buffers, batch) -> (state, metrics) of a run: what `train` calls and `plan` compiles.

    Args:
      layout: shardings of the state, which the step keeps.
      tokenizers: make the batch's tokens first.
    """
    batch_size = config.train.batch_size
    total = total_samples(config)
    tokens = config.mask.input_tokens + config.mask.target_tokens
    warmup = min(config.optimizer.warmup_tokens / (total * tokens), 0.1)
    loss_fn = partial(loss, module, config.train.loss)
    update = partial(state.apply, tx=tx, config=config.optimizer, batch_size=batch_size, total=total, warmup=warmup)
    step = partial(train_step, loss_fn, update, accumulate=config.train.accumulate)
    return online.jit(step, tokenizers, *streams(config), donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh)))


def loss(
    module: networks.TerraMind,
    kind: str,
    params: Any,
    buffers: Any,
    batch: Mapping[str, jax.Array],
    counts: jax.Array | None = None,
) -> tuple[jax.Array, tuple]:
    """The scalar loss of a batch, and per decoder stream the sum of cross-entropies and the number of targets (spec 4.6).

    `counts` are the targets of a whole batch of which `batch` is a part: with them the losses of the parts add up to that of the whole.
    """
    sums, own = module.apply({"params": params, "buffers": buffers}, batch, method="losses")
    sizes = [s.vocab_size for s in module.config.decoder]
    return networks.loss.combine(sums, own if counts is None else counts, sizes, kind), (sums, own)


def gradients(loss_fn, params: Any, buffers: Any, batch: Mapping[str, Any], accumulate: int = 1) -> tuple[tuple, Any]:
    """What `loss_fn` gives for a batch, and the gradients, from `accumulate` microbatches one after the other."""
    if accumulate == 1:
        return jax.value_and_grad(loss_fn, has_aux=True)(params, buffers, batch)
    counts = networks.loss.count(batch["target_modality"], len(loss_fn.args[0].config.decoder))
    one = jax.value_and_grad(partial(loss_fn, counts=counts), has_aux=True)

    def add(total: tuple, part: Mapping[str, Any]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, one(params, buffers, part)), None

    zero = (jnp.zeros(()), (jnp.zeros_like(counts), jnp.zeros_like(counts))), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zero, microbatches(batch, accumulate))[0]


def microbatches(batch: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The batch as `k` along a new first axis; each takes every k-th group of samples that share patch buffers.

    So no group is torn, and every device keeps the samples that it has.
    """
    groups = next((x.shape[0] for x in batch["patches"].values()), len(batch["bad"]))

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(groups // k, k, len(x) // groups, *x.shape[1:]).swapaxes(0, 1)
        return nn.with_logical_constraint(parts.reshape(k, len(x) // k, *x.shape[1:]), (None, "batch", *(None,) * (x.ndim - 1)))

    return jax.tree.map(split, dict(batch))


def train_step(
    loss_fn, update, train_state: state.State, buffers: Any, batch: Mapping[str, jax.Array], *, accumulate: int = 1
) -> tuple[state.State, dict[str, jax.Array]]:
    """(state, batch) -> (state, metrics): one step of AdamW; `loss_fn` and `update` are bound at the start of a run."""
    (value, (sums, counts)), grads = gradients(loss_fn, train_state.params, buffers, batch, accumulate)
    train_state, metrics = update(train_state, loss=value, grads=grads)
    decoder = loss_fn.args[0].config.decoder
    metrics |= {f"loss/{s.modality}": jnp.where(n > 0, total / n, jnp.nan) for s, total, n in zip(decoder, sums, counts, strict=True)}
    metrics["inputs"] = (batch["input_modality"] != networks.PADDING).sum()
    metrics["targets"] = counts.sum()
    metrics["bad"] = batch["bad"].sum()
    metrics["overflow"] = batch["overflow"].sum()
    return train_state, metrics


def make_validation(
    config: ConfigDict, module: networks.TerraMind, index: Index, mesh: jax.sharding.Mesh, tokenizers: online.Tokenizers | None = None
) -> Any:
    """The (state, buffers) -> metrics on held-out samples: loss under fixed masks, and the `probe` of whole scenes."""
    kept, (encoder, decoder) = sharding.replicated(mesh), streams(config)
    sums = lambda params, buffers, batch: loss(module, config.train.loss, params, buffers, batch)[1]  # noqa: E731
    sums_fn = online.jit(sums, tokenizers, encoder, decoder, out_shardings=kept)
    scenes = probe.choose(index, encoder, decoder, config.data.inputs, config.model.image_size, config.run.probe_scenes)
    look_fn = scenes and jax.jit(partial(probe.look_at, module, scenes.source.key, [s.key for s in scenes.targets]), out_shardings=kept)

    def validated(train_state: state.State, buffers: Any) -> dict[str, float]:
        fixed = device_batches(config, index, mesh, train=False)
        found = validate(partial(sums_fn, train_state.params, buffers), fixed, config.run.eval_batches, decoder, config.train.loss)
        variables = {"params": train_state.params, "buffers": buffers}
        return found | scenes(partial(look_fn, variables), mesh) if scenes else found

    return validated


def compared(validated: Any, workdir: str | os.PathLike) -> Any:
    """`validated`, and besides how far each loss has moved since the run began: ``val/change/MODALITY``.

    What it first gave is kept in ``{workdir}/before.json``.
    """
    path = files.folder(workdir) / "before.json"

    def both(train_state: state.State, buffers: Any) -> dict[str, float]:
        found = validated(train_state, buffers)
        if not path.exists() and int(train_state.step) == 0 and jax.process_index() == 0:
            files.write_text(path, json.dumps(found))
        before = json.loads(path.read_text()) if path.exists() else {}
        names = [name for name in found if name.startswith("val/loss") and name in before]
        return found | {name.replace("val/loss", "val/change"): found[name] - before[name] for name in names}

    return both


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


def with_codebooks(config: ConfigDict, tokenizers: online.Tokenizers | None = None) -> ConfigDict:
    """The configuration with the vocabularies of the tokenizers that made the token shards, as recorded beside these, or make tokens."""
    codebooks = config.model.codebooks.to_dict()
    for name in sorted({*config.data.inputs, *config.data.targets}):
        path, record = _tokenizer_of(config, name) if tokenizers is None else tokenizers.record(name)
        if "codebook_size" not in record:
            continue
        size, number = record["codebook_size"], record.get("num_codebooks", 1)
        made = size if number == 1 else (size, number)
        if codebooks.setdefault(name, made) != made:
            what = f"a codebook of {size}" if number == 1 else f"{number} codebooks of {size}"
            raise ValueError(f"model.codebooks.{name}={codebooks[name]}, but the tokens in {path} come from {what}.")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.codebooks = ConfigDict(codebooks)
    return config.lock()


def _tokenizer_of(config: ConfigDict, name: str) -> tuple[str, dict[str, Any]]:
    """The folder of a modality's token shards, and what is recorded there of the tokenizer that made them."""
    root = config.data.tokens or config.data.root
    folder = storage.join(root, config.data.train_split, f"{name}_tokens")
    return folder, json.loads(storage.store(root).read_text(storage.join(folder, "tokenizer.json")) or "{}")


def open_tokenized(config: ConfigDict, split: str) -> Index:
    """The samples of one split with their tokens; an error if there are none, unless tokens are made online."""
    root, tokens = config.data.root, config.data.tokens or config.data.root
    if not root:
        raise ValueError("config.data.root is empty; set it to a folder of shards with --config.data.root=DIR.")
    index = open_index(root, split, [*config.data.inputs, *config.data.targets], tokens_root=tokens)
    if config.data.online_tokens:
        return index
    index.check_tokens()
    if not index.has_tokens.any():
        raise ValueError(
            f"There are no token shards under {storage.join(tokens, split)}; make them with "
            f"terramind-jax tokenize --data={root} --weights=DIR --out={tokens}."
        )
    return index


def tokens_told(config: ConfigDict, index: Index) -> str:
    """How many samples have tokens of each target, where these are stored: who tokenized only some modalities is to see it."""
    names = [] if config.data.online_tokens else [name for name in config.data.targets if name in index.modalities]
    counts = {name: np.count_nonzero(index.has_tokens[:, index.modalities.index(name)]) for name in names}
    return f" with tokens of {', '.join(f'{name} ({count})' for name, count in counts.items())}" if counts else ""


def open_validation(config: ConfigDict) -> Index | None:
    """The samples of the validation split, None if there is none."""
    return open_tokenized(config, config.data.val_split) if scan.is_there(config.data.root, config.data.val_split) else None


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
    share = batches(
        index,
        *data_settings(config),
        batch_size=config.train.batch_size,
        consumed=consumed,
        host=host,
        hosts=hosts,
        workers=workers,
        seed=config.train.seed,
        train=train,
    )
    share = faults.following(share) if faults else share
    return (sharding.to_global(on_device(batch), mesh) for batch in share)


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh, index: Index | None = None) -> dict[str, Any]:
    """What `device_batches` yields, as shapes with their places; without an `index`, as if every sample had every modality."""
    groups, place = config.train.batch_size // config.data.patch_group, sharding.batch_sharding(mesh)
    group = on_device(template(*data_settings(config), index))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((groups * x.shape[0], *x.shape[1:]), x.dtype, sharding=place), group)


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a host's batch travels."""
    return {name: value for name, value in batch.items() if name not in ("sample", "fault")}


def data_settings(config: ConfigDict) -> tuple[tuple[Stream, ...], tuple[Stream, ...], DataConfig, MaskConfig]:
    """Streams of the encoder and the decoder, how samples become batches, and how they are masked."""
    fields = ("views_per_sample", "view_window", "patch_group", "capacity_sigmas", "shuffle_window", "online_tokens")
    given = {name: config.data[name] for name in fields} | {"subset_weights": config.data.subset_weights.to_dict()}
    data = DataConfig(image_size=config.model.image_size, threads=config.run.threads, **given)
    return *streams(config), data, MaskConfig(**config.mask.to_dict())


def step_flops(config: ConfigDict, network: networks.TransformerConfig, index: Index | None = None) -> float:
    """Floating-point operations of a step for the slots that hold a token; empty ones are no work of the model."""
    inputs, targets = filled_slots(*data_settings(config), index)
    counts = sum(inputs.values()), sum(targets.values())
    return flops.transformer_step(network, config.train.batch_size, *counts, patches=inputs, heads=targets)


def check_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """A ValueError for a configuration that this mesh cannot run, a warning for one that wastes it."""
    check_batch(config, mesh)
    check_attention(config, mesh.devices.flat[0].platform)
    fsdp, dim = mesh.shape["fsdp"], config.model.dim
    if fsdp > 1 and dim // fsdp < sharding.MIN_FSDP_ROWS:
        warnings.warn(
            f"mesh.fsdp={fsdp} leaves {dim // fsdp} rows of model.dim={dim} on a device; below {sharding.MIN_FSDP_ROWS} it moves more "
            "bytes than it saves: make it smaller and mesh.data larger.",
            stacklevel=2,
        )


def check_attention(config: ConfigDict, platform: str) -> None:
    """cuDNN's kernel takes some devices, types and shapes only."""
    if config.model.attention != "cudnn":
        return
    head = config.model.dim // config.model.num_heads
    if platform != "gpu":
        need = f"an NVIDIA GPU, not a {platform}"
    elif (dtype := sharding.compute_dtype(config.model.dtype, platform)) == "float32":
        need = f"model.dtype bfloat16, not {dtype}"
    elif head > 128 or head % 8:
        need = f"heads whose channels, model.dim over model.num_heads, are a multiple of 8 up to 128, not {head}"
    elif config.mask.input_tokens % 2 or config.mask.target_tokens % 2:
        need = f"even budgets, not mask.input_tokens={config.mask.input_tokens} and mask.target_tokens={config.mask.target_tokens}"
    else:
        return
    raise ValueError(f"model.attention='cudnn' needs {need}; or set it to 'xla'.")


def check_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Every device gets whole groups of samples, in every microbatch."""
    group, parts = config.data.patch_group, config.train.accumulate
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % (group * parts * devices):
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {group * parts * devices}: data.patch_group={group} for "
            f"each of {devices} devices{f', train.accumulate={parts} times' if parts > 1 else ''}."
        )


def streams(config: ConfigDict) -> tuple[tuple[Stream, ...], tuple[Stream, ...]]:
    """The encoder's and the decoder's streams, alphabetical by key: inputs as pixels and as tokens, targets as tokens."""
    declarations.declare(config.get("modalities", {}), "config.modalities")
    inputs = [modalities.get(name) for name in config.data.inputs]
    keys = {key for m in inputs for key in (m.pixels, m.tokens) if key}
    targets = {modalities.check_generated(name).key for name in config.data.targets}

    def sized(key: str) -> Stream:
        stream = modalities.STREAMS[key]
        size = config.model.codebooks.get(stream.modality, stream.vocab_size)
        size, number = size if isinstance(size, tuple) else (size, 1)
        return dataclasses.replace(stream, vocab_size=size, num_codebooks=number) if stream.kind == "tokens" else stream

    return tuple(map(sized, sorted(keys))), tuple(map(sized, sorted(targets)))


def streams_read(config: ConfigDict) -> tuple[Stream, ...]:
    """All streams as they are read: where tokens are made online, as pixels."""
    every = sum(streams(config), ())
    return tuple(dataclasses.replace(s, kind="pixels") if config.data.online_tokens and s.kind == "tokens" else s for s in every)


def transformer_config(config: ConfigDict, platform: str | None = None) -> networks.TransformerConfig:
    """The module's configuration; dtype ``auto`` is bfloat16 on accelerators and float32 on a CPU; `platform` is by default JAX's."""
    encoder, decoder = streams(config)
    fields = {name: value for name, value in config.model.items() if name != "codebooks"}
    fields["dtype"] = sharding.compute_dtype(config.model.dtype, platform)
    return networks.TransformerConfig(encoder=encoder, decoder=decoder, **fields)


def load(workdir: str | os.PathLike) -> tuple[networks.TerraMind, dict[str, Any], ConfigDict]:
    """Module, variables ``{"params", "buffers"}`` and configuration of a pretrained model, from its newest checkpoint.

    A ValueError for the work directory of another training.
    """
    config = configuration.of_workdir(workdir)
    if (command := configuration.command_of(config)) != "pretrain":
        raise ValueError(f"{workdir} is the work directory of {command}; expected that of a pretraining.")
    module = networks.TerraMind(dataclasses.replace(transformer_config(config), attention="xla"))  # runs anywhere
    abstract = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.random.key(0)))
    return module, checkpoint.load_variables(workdir, abstract), config
