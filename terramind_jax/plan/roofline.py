"""How long a step takes: the least that each resource allows, and what the compiler expects.

Transfers are priced as rings over the links of the slice: both directions of an axis that wraps around, one of an axis that does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from terramind_jax.plan import hlo
from terramind_jax.plan.collectives import KINDS, Collective
from terramind_jax.plan.topology import Topology

# What stands in the names of instructions; the first that does decides.
PARTS = {"encoder": "TerraMind.encode", "decoder": "TerraMind.decode", "embedding": "_slots", "loss": "TerraMind.losses"}
REST = "optimizer and rest"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step. The first four are lower bounds, each with its resource at full rate and nothing else in the way.

    Attributes:
      device: the compiler's estimate for all instructions of a chip, transfers apart, one after the other.
      exposed: transfers for which a chip waits.
      hidden: transfers between chips of a slice that run beside computation.
      parts: of `device`, by part of the step.
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    device: float
    exposed: float
    hidden: float
    parts: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def bound(self) -> str:
        """The resource that sets the lower bound."""
        return max(("compute", "memory", "ici", "dcn"), key=lambda name: getattr(self, name))

    @property
    def roofline(self) -> float:
        return getattr(self, self.bound)

    @property
    def predicted(self) -> float:
        """Transfers beside computation cost nothing until they take longer than it; the others cost their whole time."""
        return max(self.device, self.memory, self.hidden, self.dcn) + self.exposed

    @property
    def in_line(self) -> float:
        """As if nothing overlapped."""
        return self.device + self.hidden + self.dcn + self.exposed


def times(
    program: hlo.Program, transfers: Sequence[Collective], mesh: jax.sharding.Mesh, where: Topology, flops: float, unknown: float
) -> Times:
    """Of one step; `flops` are those of a chip, recomputation included."""
    chip, moved, parts = where.chip, 0.0, dict.fromkeys((*PARTS, REST), 0.0)
    for computation, instruction, n in hlo.executed(program, unknown):
        traffic = hlo.traffic(program, computation, instruction)
        moved += n * traffic
        if instruction.cycles is not None:
            parts[part(instruction)] += n * instruction.cycles / chip.clock
        elif not instruction.opcode.endswith("-start") and instruction.opcode not in KINDS:
            parts[part(instruction)] += n * traffic / chip.memory_rate
    within = [(c, seconds(c, mesh, where) * c.times) for c in transfers if not c.between_slices]
    return Times(
        compute=flops / chip.peak,
        memory=moved / chip.memory_rate,
        ici=sum(time for _, time in within),
        dcn=sum(c.sent * c.times for c in transfers if c.between_slices) / chip.network_rate,
        device=sum(parts.values()),
        exposed=sum(time for c, time in within if not c.hidden),
        hidden=sum(time for c, time in within if c.hidden),
        parts=parts,
    )


def part(instruction: hlo.Instruction) -> str:
    """The part of the step that an instruction belongs to, by the name that JAX gave it."""
    return next((name for name, mark in PARTS.items() if mark in instruction.rest), REST)


def seconds(transfer: Collective, mesh: jax.sharding.Mesh, where: Topology) -> float:
    """One transfer within a slice."""
    places = [place(mesh.devices.flat[i], where) for i in members(transfer, mesh)]
    link = where.chip.link
    if not places or len(set(places)) == 1:
        return 0.0
    if transfer.kind in ("collective-permute", "send"):
        return transfer.sent / link * distance(places[0], places[1], where)
    far = len(places) / 4 if transfer.kind == "all-to-all" else 1  # blocks pass through those between
    return transfer.sent / (link * links(places, where)) * max(far, 1)


def members(transfer: Collective, mesh: jax.sharding.Mesh) -> list[int]:
    """Where the devices of a transfer's group stand in the flat mesh; a program numbers those of one slice."""
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    own = [n for n, slice_of in enumerate(slices) if slice_of == slices[0]]
    return [own[i] for i in transfer.group]


def place(device: jax.Device, where: Topology) -> tuple[int, ...]:
    """Where a chip lies in its slice."""
    return tuple(device.coords[: len(where.shape)])


def links(places: Sequence[tuple[int, ...]], where: Topology) -> int:
    """How many links a ring over these chips may send on at once."""
    extents = [len(set(axis)) for axis in zip(*places, strict=True)]
    if math.prod(extents) != len(places):
        return 1  # no box of chips
    return sum(2 if extent == size and where.wraps(size) else 1 for extent, size in zip(extents, where.shape, strict=True) if extent > 1)


def distance(a: tuple[int, ...], b: tuple[int, ...], where: Topology) -> int:
    """Links between two chips."""
    steps = np.abs(np.subtract(a, b))
    around = [min(d, n - d) if where.wraps(n) else d for d, n in zip(steps.tolist(), where.shape, strict=True)]
    return max(1, sum(around))


def mesh_axes(transfer: Collective, mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which a transfer's devices lie, such as ``data+fsdp``; for one between slices, ``slices``."""
    if transfer.between_slices:
        return "slices"
    if not transfer.group:
        return "?"
    index = np.unravel_index(members(transfer, mesh), mesh.devices.shape)
    return "+".join(name for name, along in zip(mesh.axis_names, index, strict=True) if len(set(along.tolist())) > 1) or "none"
