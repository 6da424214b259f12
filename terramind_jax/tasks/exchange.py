"""Whole fine-tuned models to TerraTorch and back: backbone, neck, decoder and head, in its names (spec 5.7, 10.3).

The state dict is that of the model which TerraTorch's ``EncoderDecoderFactory`` builds; a ``.ckpt`` is a checkpoint of its task, as
Lightning writes them, ``{"state_dict": {"model.NAME": ...}}``, and is read without running anything that is in it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import build, sources, weights
from terramind_jax import config as configuration
from terramind_jax.convert import files, rules
from terramind_jax.modalities import IMAGE_SIZE
from terramind_jax.models import ThinkingInModalities
from terramind_jax.tasks import config as fields
from terramind_jax.tasks import convert, datasets, finetune
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.datasets import Facts
from terramind_jax.tasks.decoders import DecoderConfig
from terramind_jax.tasks.finetune import Task

TASK = "model."  # what a task calls its model
ENCODER = "encoder."  # what the model calls its backbone, and what reads time series with a backbone calls that
PEFT = "base_model."  # what begins the names of a backbone with adapters


def export(workdir: str | os.PathLike, target: str | os.PathLike) -> None:
    """Writes the best parameters of a fine-tuning by the suffix of `target`: ``.pt``, ``.safetensors``, or Lightning's ``.ckpt``.

    LoRA's products are added to the kernels, so that TerraTorch loads them without its ``peft_config``. A linear decoder without
    ``model.channels`` has a head there, too, which changes nothing: ``decoder_num_classes`` is the number of outputs, and there is no
    ``head_channel_list``.

    Raises FileExistsError if `target` exists, ValueError for what TerraTorch cannot hold.
    """
    target = Path(target)
    files.check_free(target)
    files.is_safetensors(target)  # raises for unknown suffixes, before anything is read
    state = to_torch(finetune.load(workdir), finetune.where_tokenizers(configuration.of_workdir(workdir)))
    prefix = TASK if target.suffix == files.LIGHTNING else ""
    files.write(target, {prefix + name: x for name, x in state.items()})


def to_torch(task: Task, tokenizers: str = "random") -> dict[str, np.ndarray]:
    """The state dict that loads strictly into TerraTorch's model of the same configuration.

    Thinking in Modalities holds tokenizers there, too, of what it generates, which nothing but decoding needs: `tokenizers` says whence,
    as in `weights.load`.
    """
    if task.module.time == "ltae":
        raise ValueError("TerraTorch has no L-TAE, so a model with model.time='ltae' cannot be exported.")
    if task.module.config.is_pangaea:
        raise ValueError("TerraTorch has no neck as PANGAEA's, so a model with model.decoder='upernet_pangaea' cannot be exported.")
    model = dataclasses.replace(task.extractor, variables={group: task.variables[group]["encoder"] for group in ("params", "buffers")})
    own = {model.streams[name].modality: (module, task.held["tokenizers"][name]) for name, module in task.beside.tokenizers}
    others = [modality for modality in model.tokenizers if modality not in own]
    own |= {modality: weights.tokenizer(modality, tokenizers, model.version, optional=True) for modality in others}
    model = dataclasses.replace(model, tokenizers=own)
    if task.thinker is not None:
        model = dataclasses.replace(model, generator=(task.thinker.module, task.generator))
    prefix = ENCODER * (2 if task.facts.has_times else 1)
    state = {prefix + name: x for name, x in weights.to_torch(model).items()}
    config, rest = task.module.config, _without_encoder(jax.device_get(task.variables))
    if config.includes_head:
        config, rest["params"] = _with_head(config, rest["params"])
    return state | rules.to_torch(rest, convert.rules(config))


def _with_head(config: DecoderConfig, params: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """A linear decoder, which makes the outputs here, with the head that TerraTorch puts on each: one that changes nothing."""
    n = config.num_outputs
    same = {"kernel": np.eye(n, dtype=np.float32)[None, None], "bias": np.zeros(n, np.float32)}
    return dataclasses.replace(config, channels=(n,), head_channels=()), {**params, "head": {"out": same}}


def _without_encoder(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {group: {name: x for name, x in tree.items() if name != "encoder"} for group, tree in variables.items()}


def from_torch(state: Mapping[str, np.ndarray], config: ConfigDict, facts: Facts) -> dict[str, Any]:
    """``{"params", "buffers", "batch_stats"}`` of a `TaskModel` from TerraTorch's model, or from its task, and those of a `Beside`.

    Raises ValueError for a state dict that is not of this configuration.
    """
    if any(name.startswith(TASK) for name in state):  # a task, which also holds a loss and metrics
        state = {name.removeprefix(TASK): x for name, x in state.items() if name.startswith(TASK)}
    extractor = finetune.backbone(config, facts)
    module, aside = finetune.task_model(config, facts, extractor)
    encoder = {name.removeprefix(ENCODER): x for name, x in state.items() if name.startswith(ENCODER)}
    rest = {name: x for name, x in state.items() if not name.startswith(ENCODER)}
    if any(name.startswith(PEFT) for name in encoder):
        raise ValueError("The model holds adapters of PEFT; merge them in TerraTorch first, with model.encoder.merge_and_unload().")
    if reads_series(state):
        encoder = {name.removeprefix(ENCODER): x for name, x in encoder.items()}
    abstract = _without_encoder(meta.unbox(jax.eval_shape(lambda key: module.init(key, method="everything"), jax.random.key(0))))
    found = rules.from_torch(rest, convert.rules(module.config), abstract)
    own = {name: x for name, x in encoder.items() if not name.startswith((sources.GENERATOR, sources.TOKENIZER))}
    for group, tree in _network(own, extractor.module).items():
        found[group]["encoder"] = tree

    def inner(prefix: str, network: Any) -> dict[str, Any]:
        return _network({name.removeprefix(prefix): x for name, x in encoder.items() if name.startswith(prefix)}, network)

    if isinstance(extractor, ThinkingInModalities):
        found["generator"] = inner(sources.GENERATOR, extractor.generator[0])
    if aside.tokenizers:
        keys = {name: extractor.streams[name].key for name, _ in aside.tokenizers}
        found["tokenizers"] = {name: inner(f"{sources.TOKENIZER}{keys[name]}.", network) for name, network in aside.tokenizers}
    return found


def reads_series(state: Mapping[str, np.ndarray]) -> bool:
    """Whether the backbone of a model, or of a task, stands in what reads time series with it."""
    names = [name.removeprefix(TASK) for name in state]
    return all(name.startswith(ENCODER * 2) for name in names if name.startswith(ENCODER))


def _network(state: dict[str, np.ndarray], module: Any) -> dict[str, Any]:
    return rules.from_torch(state, sources.rules_of(module), build.abstract(module))


def import_model(source: str | os.PathLike, workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Makes a work directory, as `predict` and `finetune.load` read it, of a file with a fine-tuned model of TerraTorch.

    Args:
      source: ``.pt``, ``.safetensors``, or Lightning's ``.ckpt``.
      workdir: must not exist yet.
      config: of the model; of its data set no file is read.

    Raises FileExistsError, FileNotFoundError, ValueError for a file of another configuration or with anything but tensors in it.
    """
    workdir, config = Path(workdir), config.copy_and_resolve_references()
    files.check_free(workdir)
    config.train.tune = "full"  # LoRA's products are in the kernels
    config.data.crop = config.data.crop or IMAGE_SIZE
    fields.check_values(config)
    facts = datasets.facts(config.data.dataset, **config.data.options.to_dict())
    facts = facts.only(config.model.modalities) if config.model.modalities else facts
    state = files.read(source)
    facts = dataclasses.replace(facts, has_times=facts.has_times or reads_series(state))
    found = from_torch(state, config, facts)
    aside = {name: found.pop(name) for name in ("tokenizers", "generator") if name in found}
    parted = networks.part(found, "full", "generator" in aside and config.model.tim_chained)
    with files.replacing(workdir) as partial:
        configuration.bind_workdir(config, partial)
        finetune.write_task(partial, facts, finetune.scale_of(config, facts))
        held = {**parted["buffers"], **aside}
        finetune.save_best(partial, 0, *map(jax.device_put, (parted["params"], held, parted.get("batch_stats"))))
