"""The training step of a configuration, compiled for chips that need not be there, and the memory that it takes on one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax import model as networks
from terramind_jax import sharding
from terramind_jax.data.groups import template
from terramind_jax.data.index import Index
from terramind_jax.data.pipeline import check_sizes
from terramind_jax.plan import topology
from terramind_jax.plan.topology import Topology
from terramind_jax.train import optimizer, pretrain, state


@dataclasses.dataclass(frozen=True)
class Step:
    """What `pretrain` would run on a topology, as shapes with their places; nothing is allocated."""

    config: ConfigDict
    topology: Topology
    mesh: jax.sharding.Mesh
    module: networks.TerraMind
    state: state.State
    buffers: Any
    batch: dict[str, Any]
    replicated: list[sharding.Replicated]

    @property
    def rows(self) -> int:
        """Samples that a chip has in memory at a time."""
        return self.config.train.batch_size // (self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.train.accumulate)

    @property
    def tokens(self) -> int:
        """Input and target tokens of a step."""
        return self.config.train.batch_size * (self.config.mask.input_tokens + self.config.mask.target_tokens)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip. `parts` add up to `total`.

    Attributes:
      kept: what the traced program keeps for the backward pass, before the compiler saves some of it; None if not known.
    """

    parts: dict[str, int]
    available: float
    kept: int | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def prepare(config: ConfigDict, where: Topology, index: Index | None = None, devices: Sequence[jax.Device] | None = None) -> Step:
    """The step of `config` on `where`. Without an `index` every sample is taken to have every modality.

    Args:
      devices: to compile for, instead of those of `where`.

    Raises ValueError for a configuration that cannot work there, ImportError without the compiler for TPUs.
    """
    configuration.check(config, "pretrain")
    config = pretrain.with_codebooks(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices or topology.devices(where))
    pretrain.check_mesh(config, mesh)
    hosts = len(set(sharding.shares(mesh.devices).values()))
    check_sizes(pretrain.data_settings(config)[2], config.train.batch_size, 0, 0, hosts, train=True)
    module = networks.TerraMind(pretrain.transformer_config(config, mesh.devices.flat[0].platform))
    init = partial(networks.init, module)
    run, buffers = state.abstract(init, optimizer.adamw(config.optimizer), mesh)
    batch = pretrain.abstract_batch(config, mesh, index)
    uneven = sharding.replicated_dimensions(mesh, jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))))
    return Step(config, where, mesh, module, run, buffers, batch, uneven)


def lower(step: Step) -> jax.stages.Lowered:
    """The very step that `pretrain.train` calls, ready for the compiler."""
    layout = jax.tree.map(lambda x: x.sharding, step.state)
    jitted = pretrain.make_step(step.config, step.module, optimizer.adamw(step.config.optimizer), step.mesh, layout)
    with nn.logical_axis_rules(sharding.RULES), jax.set_mesh(step.mesh):
        traced = jitted.trace(step.state, step.buffers, step.batch)
        return traced.lower(lowering_platforms=(step.mesh.devices.flat[0].platform,))


def compile(step: Step) -> tuple[str | None, Memory]:
    """The compiled program's text and its memory. The text is None where it does not fit: the compiler then only says by how much."""
    try:
        compiled = lower(step).compile()
    except jax.errors.JaxRuntimeError as error:
        return None, _memory(step, needed=_needed(str(error), error))
    return compiled.as_text(), _memory(step, compiled.memory_analysis())


def _needed(message: str, error: Exception) -> int:
    """Bytes that a program would take which the compiler refuses."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise error
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def _memory(step: Step, analysis: Any = None, needed: int = 0) -> Memory:
    """Arguments by their shapes, the rest by the compiler, whose peak is what must fit."""
    parts = arguments(step)
    given = sum(parts.values())
    if analysis is not None:
        parts["padding of these"] = max(analysis.argument_size_in_bytes - given, 0)
        given, needed = analysis.argument_size_in_bytes, analysis.peak_memory_in_bytes
        parts["program"] = analysis.generated_code_size_in_bytes
    parts["activations and temporaries"] = max(needed - given, 0)
    return Memory(parts, step.topology.chip.memory, kept(step))


def arguments(step: Step) -> dict[str, int]:
    """Bytes on one chip of what the step is given."""
    parts = {
        "parameters": step.state.params,
        "optimizer state": step.state.opt_state,
        "averaged parameters": step.state.ema,
        "buffers": step.buffers,
        "batch": step.batch,
    }
    return {name: size for name, tree in parts.items() if (size := bytes_of(tree))}


def bytes_of(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept(step: Step) -> int | None:
    """Bytes a chip that the forward pass keeps for the backward pass; None with a tensor axis, along which only some of it is split.

    The compiler does not tell these from other temporaries, so they are read from the traced program: the residuals of `jax.vjp`.
    """
    return None if step.mesh.shape["tensor"] > 1 else residuals(step.module, step.config, step.rows)


def residuals(module: networks.TerraMind, config: ConfigDict, rows: int) -> int:
    """Bytes of the residuals of the loss of `rows` samples on one device, parameters themselves not counted."""
    variables = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.eval_shape(lambda: jax.random.key(0))))
    group = pretrain.on_device(template(*pretrain.data_settings(config)))
    groups = max(1, rows // config.data.patch_group)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((groups * x.shape[0], *x.shape[1:]), x.dtype), group)

    def forward(params, buffers, batch):
        return jax.vjp(lambda p: pretrain.loss(module, config.train.loss, p, buffers, batch)[0], params)[1]

    jaxpr = jax.make_jaxpr(forward)(variables["params"], variables["buffers"], batch).jaxpr
    made = {id(v): v.aval for v in jaxpr.outvars if v not in jaxpr.invars and hasattr(v, "aval")}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())
