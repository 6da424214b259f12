"""Transfers between chips in a compiled program: of which kind, among whom, how large and how often.

A reduce-scatter may hide in a fusion that reduces everything and keeps a part; an all-gather may be dealt out over a chain of fusions,
which is one transfer; between slices XLA for TPUs sends to and receives from its "megascale" runtime.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from terramind_jax.plan.hlo import Computation, Instruction, Program, executed

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One transfer that every chip takes part in.

    Attributes:
      bytes: of the array that is reduced, gathered, scattered or exchanged, as one chip sees it whole; of what a chip sends elsewhere.
      group: numbers, within a slice, of the devices that exchange with the first one; empty if the text does not tell.
      times: how often it happens in a step.
      hidden: it runs beside computation.
      between_slices: it takes the data-centre network.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: float
    hidden: bool = False
    between_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a chip sends once, by the algorithms that move least: rings."""
        n = max(len(self.group), 2)
        if self.kind in ("collective-permute", "send"):
            return self.bytes
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program, devices: int, slices: int = 1, unknown: float = 1.0) -> list[Collective]:
    """All transfers of a step, among the `devices` of a slice and between `slices`; `unknown` as in `hlo.executed`."""
    found = []
    for computation, instruction, times in executed(program, unknown):
        for inner, owner, fused in _with_fused(program, computation, instruction):
            if (one := _read(inner, owner, fused, devices, slices)) is not None:
                found.append(dataclasses.replace(one, times=times))
    return found


def _with_fused(program: Program, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction, bool]]:
    """The instruction, or if it is a fusion those that it consists of."""
    if instruction.opcode != "fusion":
        yield computation, instruction, False
        return
    for called in instruction.called:
        body = program.computations[called]
        for inner in body.instructions.values():
            for owner, found, _ in _with_fused(program, body, inner):
                yield owner, found, True


def _read(computation: Computation, instruction: Instruction, fused: bool, devices: int, slices: int) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    size = sum(operand.bytes for operand in computation.operands(instruction))
    if kind == "send" and "_xla_megascale_transfer_type" in instruction.rest:
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)[1].lower().replace("_", "-")
        return Collective(kind if kind in KINDS else "send", size, tuple(range(slices)), 1.0, hidden=True, between_slices=True)
    if kind not in KINDS:
        return None
    chain = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', instruction.rest)
    if chain and chain[1] != "-1":
        return None  # a later part of the chain
    group = _group(instruction.rest, devices)
    if len(group) == 1:
        return None
    if kind == "all-gather":
        size *= max(len(group), 1)
    if kind == "all-reduce" and fused and computation.root.bytes < size:
        kind = "reduce-scatter"
    return Collective(kind, size, group, 1.0, hidden=bool(chain) or instruction.opcode.endswith("-start"))


def _group(text: str, devices: int) -> tuple[int, ...]:
    """Members of the first device's group: from ``{{0,1},{2,3}}``, ``[2,4]<=[8]T(..)``, a named mesh, or pairs of a permutation."""
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        pairs = [tuple(_numbers(pair)) for pair in found[1].split("},{")]
        return next((pair for pair in pairs if pair[0] != pair[1]), ())
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\S+?)(?:, |$)", text):
        shape, _, devices_of = found[1].partition("<=")
        return tuple(_iota(devices_of).reshape(_numbers(shape))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", text):
        return _of_mesh(found[1], found[2], found[3])
    return tuple(range(devices)) if "replica_groups={}" in text else ()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: the numbers from 0 in this shape, transposed, flat."""
    shape, _, order = text.partition("T")
    array = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return (array.transpose(_numbers(order)) if order else array).reshape(-1)


def _of_mesh(axes: str, devices: str | None, members: str) -> tuple[int, ...]:
    """``'a'=4,'b'=2`` and ``'b'``, or a part of an axis ``'a':(2)2``: its numbers 2 wide inside blocks of 2."""
    names = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)]
    total = int(np.prod([size for _, size in names]))
    array = (np.arange(total) if devices is None else _iota(devices)).reshape([size for _, size in names])
    index: list[Any] = [0] * len(names)
    for name, before, width in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", members):
        place = [n for n, _ in names].index(name)
        stride = names[place][1] // (int(before) * int(width)) if before else 1
        index[place] = slice(0, stride * int(width) if before else None, stride)
    return tuple(np.ravel(array[tuple(index)]).tolist())
