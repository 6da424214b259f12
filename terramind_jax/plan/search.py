"""Other settings of a run: which of them would fit, by estimate, and how fast the likeliest are, compiled."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from terramind_jax import flops, sharding
from terramind_jax import model as networks
from terramind_jax.config import override
from terramind_jax.data.index import Index
from terramind_jax.model.layers import REMAT_POLICIES
from terramind_jax.plan import report, roofline
from terramind_jax.plan import step as steps
from terramind_jax.plan.step import Memory, Step
from terramind_jax.plan.topology import GIB, Topology

Fields = Mapping[str, Any]  # {"model.remat": "full"}


def changed(config: ConfigDict, fields: Fields) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        override(config, name, str(value))
    return config


def text(fields: Fields) -> str:
    """As on the command line."""
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())


# ---- what would help ----


def advice(step: Step, memory: Memory, index: Index | None = None) -> list[str]:
    """Settings with which a step that does not fit should, the fewest changes first, and about how much they would take."""
    estimate = estimator()
    spare = max(memory.total - sum(estimate(step)), 0)  # workspace and program: taken to stay as they are
    reliefs = _reliefs(step)
    for changes in (reliefs, [{**a, **b} for a, b in itertools.combinations(reliefs, 2) if not a.keys() & b.keys()]):
        found = []
        for fields in changes:
            try:
                size = sum(estimate(steps.prepare(changed(step.config, fields), step.topology, index))) + spare
            except ValueError:
                continue  # a batch or a mesh that does not divide
            if size <= memory.available:
                found.append(f"{text(fields)}: about {size / GIB:.1f} GiB")
        if found:
            return found
    return [f"nothing that keeps the batch; take a smaller train.batch_size or more than {step.topology.chips} chips"]


def _reliefs(step: Step) -> list[Fields]:
    """Single changes that save memory and keep the result."""
    config, mesh = step.config, step.mesh.shape
    policies = list(REMAT_POLICIES)
    reliefs: list[Fields] = [{"model.remat": name} for name in policies[policies.index(config.model.remat) + 1 :]]
    reliefs += [{"train.accumulate": config.train.accumulate * n} for n in (2, 4, 8)]
    wider = [mesh["fsdp"] * n for n in (2, 4, 8) if config.model.dim // (mesh["fsdp"] * n) >= sharding.MIN_FSDP_ROWS]
    return reliefs + [{"mesh.data": -1, "mesh.fsdp": n} for n in wider]


def estimator() -> Callable[[Step], tuple[float, float]]:
    """A function that tells, without compiling a step, the bytes on a chip of its arguments and gradients, and of its activations.

    Steps of one function may differ in mesh, batch and policy; activations are traced once a policy, as they grow with the samples.
    """
    lines: dict[str, tuple[float, float]] = {}

    def estimate(step: Step) -> tuple[float, float]:
        remat, group = step.module.config.remat, step.config.data.patch_group
        if remat not in lines:
            one, two = (activations(step, n * group) for n in (1, 2))
            lines[remat] = 2 * one - two, (two - one) / group
        constant, slope = lines[remat]
        at_rest = sum(steps.arguments(step).values()) + steps.bytes_of(step.state.params)
        return at_rest, (constant + slope * step.rows) / step.mesh.shape["tensor"]

    return estimate


def activations(step: Step, rows: int) -> float:
    """Bytes of `rows` samples that wait for the backward pass, and with rematerialisation those of the one block that is at work."""
    kept = steps.residuals(step.module, step.config, rows)
    if step.module.config.remat == "none":
        return kept
    config = dataclasses.replace(step.module.config, remat="none")
    blocks = config.encoder_depth + config.decoder_depth
    return kept + steps.residuals(networks.TerraMind(config), step.config, rows) / blocks


# ---- the search ----


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings, and by estimate the bytes that they take on a chip and the tokens a second that they give."""

    fields: Fields
    bytes: float
    speed: float


def search(
    config: ConfigDict, where: Topology, limit: int, price: float | None, index: Index | None, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Plans of the likeliest settings, fastest first, those that do not fit last; `limit` of them are compiled.

    Mesh shapes, batch sizes from half to four times the configuration's, and rematerialisation policies are tried.
    """
    found, tried = [], pick(candidates(config, where, index), where.chip.memory, limit)
    for number, one in enumerate(tried, 1):
        step = steps.prepare(changed(config, one.fields), where, index)
        facts = report.plan(step, *steps.compile(step), price, index)
        found.append({"settings": dict(one.fields), **facts})
        progress(f"{number} of {len(tried)}: {text(one.fields)}: {_outcome(facts)}")
    return sorted(found, key=lambda facts: -facts.get("tokens_per_second", 0.0) * facts["memory"]["fits"])


def _outcome(facts: Mapping[str, Any]) -> str:
    memory = facts["memory"]
    over = (memory["total"] - memory["available"]) / GIB
    return f"too large by {over:.2f} GiB" if over > 0 else f"{facts['tokens_per_second']:,.0f} tokens/s, MFU {facts['mfu']:.1%}"


def candidates(config: ConfigDict, where: Topology, index: Index | None = None) -> Iterator[Candidate]:
    """Every combination that the batch and the model divide."""
    estimate = estimator()
    for mesh, batch, remat in itertools.product(meshes(config, where.chips), _batches(config), REMAT_POLICIES):
        fields = {**{f"mesh.{axis}": n for axis, n in mesh.items()}, "train.batch_size": batch, "model.remat": remat}
        if batch > config.data.view_window:  # which must hold a batch
            fields["data.view_window"] = batch * max(config.run.workers, 1)
        try:
            step = steps.prepare(changed(config, fields), where, index)
        except ValueError:
            continue
        at_rest, passing = estimate(step)
        yield Candidate(fields, at_rest + passing, speed(step, passing))


def meshes(config: ConfigDict, chips: int) -> Iterator[dict[str, int]]:
    """Shapes that pay: FSDP no wider than leaves enough rows, tensor parallelism by two at most."""
    for fsdp, tensor in itertools.product((2**n for n in range(10)), (1, 2)):
        rows = config.model.dim // fsdp
        if chips % (fsdp * tensor) == 0 and (fsdp == 1 or rows >= sharding.MIN_FSDP_ROWS) and config.model.num_heads % tensor == 0:
            yield {"data": chips // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def _batches(config: ConfigDict) -> list[int]:
    batch = config.train.batch_size
    return [batch, 2 * batch, 4 * batch, batch // 2]


def speed(step: Step, passing: float) -> float:
    """Tokens a second by a coarse model, to choose what is worth compiling; `passing` are the bytes of a chip's activations.

    Products at half the peak rate, one pass over the optimizer's state, activations written, read and read again, gradients summed in
    two bytes; with FSDP also along its axis and whole, as XLA does it; with a tensor axis activations summed four times a layer.
    """
    c, chip, mask, parts = step.module.config, step.topology.chip, step.config.mask, step.config.train.accumulate
    batch = step.config.train.batch_size
    model = flops.transformer_step(c, batch, mask.input_tokens, mask.target_tokens)
    again = batch * flops.transformer_recomputed(c, mask.input_tokens, mask.target_tokens)
    own = steps.bytes_of(step.state.params)
    whole = own * step.mesh.shape["fsdp"] / 2
    width = (c.encoder_depth * mask.input_tokens + c.decoder_depth * mask.target_tokens) * c.dim
    seconds = (
        (model + again) / step.topology.chips / (chip.peak / 2),
        (7 * own + 3 * passing * parts) / chip.memory_rate,
        own / _rate(step.mesh.devices[:, 0, 0], step.topology),
        2 * parts * whole / _rate(step.mesh.devices[0, :, 0], step.topology),
        4 * 2 * step.rows * parts * width / _rate(step.mesh.devices[0, 0, :], step.topology),
        (step.topology.slices > 1) * 2 * whole / (math.prod(step.topology.shape) * chip.network_rate),
    )
    return step.tokens / sum(seconds)


def _rate(devices: np.ndarray, where: Topology) -> float:
    """Bytes a second that a chip sends in a ring over `devices`; a single one has nothing to send."""
    places = list(dict.fromkeys(roofline.place(device, where) for device in devices))
    return where.chip.link * roofline.links(places, where) if len(places) > 1 else math.inf


def pick(found: Iterator[Candidate], available: float, limit: int) -> list[Candidate]:
    """The fastest that should fit, in turn for each batch size, and of a batch size the best of each mesh before any second best."""
    queues = collections.defaultdict(list)
    seen: collections.Counter = collections.Counter()
    for one in sorted(found, key=lambda c: -c.speed):
        if one.bytes <= available:
            settings = tuple(item for item in one.fields.items() if item[0] != "model.remat")
            queues[one.fields["train.batch_size"]].append((seen[settings], one))
            seen[settings] += 1
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(sorted(q, key=lambda ranked: ranked[0]) for q in queues.values())))
    return [turn[1] for turn in turns if turn is not None][:limit]


def table(found: list[dict[str, Any]]) -> str:
    """The plans of a search, one a line."""
    head = f"{'tokens/s':>12s}{'MFU':>8s}{'days':>9s}{'GiB a chip':>12s}  settings"
    rows = [
        f"{f['tokens_per_second']:12,.0f}{f['mfu']:8.1%}{f['run']['days']:9.2f}{f['memory']['total'] / GIB:12.2f}  {text(f['settings'])}"
        if "seconds" in f
        else f"{'does not fit':>29s}{f['memory']['total'] / GIB:12.2f}  {text(f['settings'])}"
        for f in found
    ]
    return "\n".join([head, *rows])
