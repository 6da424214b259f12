"""The plan of a run as one dictionary, which ``--json`` prints, and as text."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from terramind_jax import flops
from terramind_jax.data.groups import filled_slots
from terramind_jax.data.index import Index
from terramind_jax.model.loss import BLOCK
from terramind_jax.plan import roofline
from terramind_jax.plan.collectives import Collective, collectives
from terramind_jax.plan.feed import READ_SECONDS, VIEW_SECONDS, feed
from terramind_jax.plan.hlo import parse
from terramind_jax.plan.step import Memory, Step
from terramind_jax.plan.topology import GIB
from terramind_jax.train import pretrain

ASSUMPTION = (
    "Predicted: the compiler's own cycle estimates of all instructions added up; transfers as rings at the attainable rate of the",
    "links, at no cost beside computation until they take longer; input, checkpoints and failures at no cost.",
)


def plan(step: Step, text: str | None, memory: Memory, price: float | None = None, index: Index | None = None) -> dict[str, Any]:
    """Everything that can be said of a step before it runs. `text` is the compiled program's, None if it does not fit."""
    work = _work(step, index)
    facts = {
        "topology": str(step.topology),
        "slices": step.topology.slices,
        "chips": step.topology.chips,
        "hosts": step.topology.hosts,
        "mesh": dict(step.mesh.shape),
        "remat": step.config.model.remat,
        "accumulate": step.config.train.accumulate,
        "batch_size": step.config.train.batch_size,
        "rows_per_chip": step.rows,
        "tokens_per_step": step.tokens,
        "filled": _filled(step, index),
        "parameters": sum(x.size for x in jax.tree.leaves(step.state.params)),
        "replicated": _replicated(step),
        "memory": {**dataclasses.asdict(memory), "total": memory.total, "fits": memory.fits},
        "flops": work,
    }
    if text is not None:
        facts |= _timed(step, text, work, price, index)
    return facts


def _filled(step: Step, index: Index | None) -> dict[str, float]:
    """Mean inputs and targets of a sample; the other slots stay empty."""
    counts = filled_slots(*pretrain.data_settings(step.config), index)
    return dict(zip(("inputs", "targets"), (sum(by_stream.values()) for by_stream in counts), strict=True))


def _work(step: Step, index: Index | None) -> dict[str, float]:
    """Floating-point operations of a step: the model's, those for slots that stay empty, and those that rematerialisation repeats."""
    mask, batch = step.config.mask, step.config.train.batch_size
    model = pretrain.step_flops(step.config, step.module.config, index)
    return {
        "model": model,
        "empty_slots": flops.transformer_step(step.module.config, batch, mask.input_tokens, mask.target_tokens) - model,
        "recomputed": batch * flops.transformer_recomputed(step.module.config, mask.input_tokens, mask.target_tokens),
    }


def _replicated(step: Step) -> list[dict[str, Any]]:
    """Dimensions that the mesh does not divide, one entry for each size and axis."""
    found = collections.defaultdict(list)
    for one in step.replicated:
        found[one.name, one.size, one.axis].append(one.array)
    return [{"name": name, "size": size, "axis": axis, "arrays": arrays} for (name, size, axis), arrays in found.items()]


def _timed(step: Step, text: str, work: Mapping[str, float], price: float | None, index: Index | None) -> dict[str, Any]:
    program, chips = parse(text), step.topology.chips
    turns = loss_turns(step)
    transfers = collectives(program, chips // step.topology.slices, step.topology.slices, turns)
    times = roofline.times(program, transfers, step.mesh, step.topology, sum(work.values()) / chips, turns)
    steps = pretrain.length(step.config)
    hours = steps * times.predicted / 3600
    return {
        "collectives": _transfers(step, transfers),
        "seconds": {
            **dataclasses.asdict(times),
            "bound": times.bound,
            "roofline": times.roofline,
            "predicted": times.predicted,
            "in_line": times.in_line,
        },
        "tokens_per_second": step.tokens / times.predicted,
        "mfu": work["model"] / (chips * step.topology.chip.peak * times.predicted),
        "run": {
            "tokens": steps * step.tokens,
            "steps": steps,
            "days": hours / 24,
            "chip_hours": hours * chips,
            "price": price,
            "money": None if price is None else hours * chips * price,
        },
        "input": {
            "views_per_sample": step.config.data.views_per_sample,
            "layout": "assumed: TerraMesh with all modalities" if index is None else f"{len(index)} samples of config.data.root",
            **dataclasses.asdict(feed(step, times.predicted, index)),
        },
    }


def loss_turns(step: Step) -> float:
    """Expected turns of the loss's loop over blocks of one modality's targets, whose length depends on data."""
    return step.rows * step.config.mask.target_tokens / len(step.module.config.decoder) / BLOCK + 0.5


def _transfers(step: Step, transfers: Sequence[Collective]) -> list[dict[str, Any]]:
    """By kind and mesh axes: how often, bytes of the arrays, bytes that a chip sends, and whether beside computation."""
    found: dict[tuple, dict[str, Any]] = {}
    for one in transfers:
        key = one.kind, roofline.mesh_axes(one, step.mesh), one.hidden
        entry = found.setdefault(key, {"kind": key[0], "axes": key[1], "hidden": key[2], "times": 0.0, "bytes": 0.0, "sent": 0.0})
        entry["times"] += one.times
        entry["bytes"] += one.bytes * one.times
        entry["sent"] += one.sent * one.times
    return sorted(found.values(), key=lambda entry: -entry["sent"])


# ---- as text ----


def render(facts: Mapping[str, Any]) -> str:
    """The plan for a reader."""
    parts = [_head(facts), _memory_text(facts["memory"])]
    if facts["replicated"]:
        parts.append(_replicated_text(facts["replicated"]))
    if "seconds" in facts:
        parts += [_transfers_text(facts["collectives"]), _times_text(facts), _run_text(facts), _input_text(facts["input"])]
    if facts.get("advice"):
        parts.append("What would help, by estimate:\n" + "\n".join(f"  {line}" for line in facts["advice"]))
    return "\n\n".join(parts)


def _head(f: Mapping[str, Any]) -> str:
    slices = f"{f['slices']} slices of " if f["slices"] > 1 else ""
    mesh = ", ".join(f"{name} {n}" for name, n in f["mesh"].items())
    work = f["flops"]
    empty, again = (work[name] / work["model"] for name in ("empty_slots", "recomputed"))
    filled = f"{f['filled']['inputs']:.1f} inputs and {f['filled']['targets']:.1f} targets"
    return "\n".join(
        (
            f"{slices}{f['topology']}: {f['chips']} chips, {f['hosts']} hosts; mesh {mesh}; remat {f['remat']}",
            f"{f['parameters']:,} parameters; {f['tokens_per_step']:,} tokens a step: {f['batch_size']} samples, {f['rows_per_chip']} at a "
            f"time on a chip",
            f"{work['model']:.3g} model FLOPs a step, for {filled} of a sample; {empty:.1%} more for empty slots, {again:.1%} recomputed",
        )
    )


def _memory_text(memory: Mapping[str, Any]) -> str:
    rows = [f"  {name:28s}{size / GIB:8.2f} GiB" for name, size in memory["parts"].items()]
    if memory["kept"] is not None:
        rows.append(
            f"    of which by the trace, before the compiler saves some, activations for the backward pass {memory['kept'] / GIB:.2f} GiB"
        )
    over = memory["total"] - memory["available"]
    verdict = f"DOES NOT FIT: too large by {over / GIB:.2f} GiB" if over > 0 else f"fits, {-over / GIB:.2f} GiB free"
    rows.append(f"  {'total':28s}{memory['total'] / GIB:8.2f} GiB of {memory['available'] / GIB:.2f}: {verdict}")
    return "Memory on a chip\n" + "\n".join(rows)


def _replicated_text(replicated: Sequence[Mapping[str, Any]]) -> str:
    def row(name: str, size: int, axis: str, arrays: Sequence[str]) -> str:
        return f"  {name} {size:,} over {axis}: {arrays[0]}{f' and {len(arrays) - 1} more' if len(arrays) > 1 else ''}"

    rows = [row(**entry) for entry in replicated]
    return "Replicated, because the mesh does not divide them\n" + "\n".join(rows)


def _transfers_text(transfers: Sequence[Mapping[str, Any]]) -> str:
    def row(kind: str, axes: str, hidden: bool, times: float, bytes: float, sent: float) -> str:
        return f"  {kind:20s}{axes:18s}{times:8.0f}{bytes / 1e6:12.1f}{sent / 1e6:12.1f}  {'yes' if hidden else 'no'}"

    if not transfers:
        return "Transfers of a chip and step: none"
    head = f"  {'':20s}{'mesh axes':18s}{'times':>8s}{'MB':>12s}{'MB sent':>12s}  beside computation"
    return "\n".join(("Transfers of a chip and step", head, *(row(**entry) for entry in transfers)))


def _times_text(f: Mapping[str, Any]) -> str:
    s = {name: value * 1e3 for name, value in f["seconds"].items() if name not in ("bound", "parts")}
    parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in f["seconds"]["parts"].items())
    networks = f"network of the slice {s['ici']:.1f}, between slices {s['dcn']:.1f}"
    each = f["tokens_per_second"] / f["chips"]
    rows = (
        f"at least   compute {s['compute']:.1f} ms, memory {s['memory']:.1f}, {networks}: bound by {f['seconds']['bound']}",
        f"predicted  {s['predicted']:.1f} ms: {s['device']:.1f} on the chip, {s['exposed']:.1f} waiting for transfers; "
        f"{s['in_line']:.1f} if nothing overlapped",
        f"           on the chip {parts}",
        f"that is    {f['tokens_per_second']:,.0f} tokens/s, {each:,.0f} a chip, at {f['mfu']:.1%} MFU",
        *ASSUMPTION,
    )
    return "Time of a step\n" + "\n".join(f"  {row}" for row in rows)


def _run_text(f: Mapping[str, Any]) -> str:
    run = f["run"]
    money = "" if run["money"] is None else f", {run['money']:,.0f} at {run['price']:g} an hour and chip"
    return (
        f"The whole run\n  {run['tokens'] / 1e9:,.0f} B tokens in {run['steps']:,} steps: {run['days']:.2f} days, "
        f"{run['chip_hours']:,.0f} chip-hours{money}"
    )


def _input_text(i: Mapping[str, Any]) -> str:
    again = f", read {i['times_read']} times: make data.view_window a multiple of batch times run.workers" if i["times_read"] > 1 else ""
    return (
        f"Input of a host ({i['layout']}, {i['views_per_sample']} views a sample{again})\n"
        f"  {i['views']:,.0f} views/s from {i['samples']:,.0f} samples/s: at most {i['storage'] / 1e9:.2f} GB/s from storage, "
        f"{i['device'] / 1e6:,.0f} MB/s to the chips\n"
        f"  {i['cores']:.1f} cores that read, at the {READ_SECONDS * 1e3:g} ms a sample and {VIEW_SECONDS * 1e3:g} ms a view that "
        f"benchmarks/reader.py measured on a core of an AMD EPYC"
    )
