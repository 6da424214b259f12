"""What a compiled program does, read from its text: the instructions that run and how often, and the bytes of memory they move.

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as often as the loop turns, where the text tells: from
``known_trip_count``, or from the one constant in the loop's condition, which is how the loops of `nn.scan` look.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_CALLS = frozenset("call conditional async-start call-start".split())
_PART = frozenset("dynamic-slice slice gather".split())  # read only what they return
_FREE = frozenset(  # move nothing themselves
    "parameter constant tuple get-tuple-element bitcast while after-all partition-id replica-id iota opt-barrier custom-call "
    "send send-done recv recv-done".split()
).union(_CALLS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array. `on_chip`: it lies in the fast memory of a TPU's chip (memory space 1) and moves nothing to or from HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # f8e4m3fn has 8; pred a byte, a token nothing
        return math.ceil(math.prod(self.dims) * (int(bits[1]) / 8 if bits else self.dtype == "pred"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: ``%name = shapes opcode(operands), rest``. What a constant or parameter holds stands in `rest`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        branches = [name.strip(" %") for found in _BRANCHES.findall(self.rest) for name in found.split(",")]
        return _CALLED.findall(self.rest) + branches

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's own estimate, where it gives one; work handed to a sparse core has 2**63 - 1."""
        found = re.search(r'"estimated_cycles":"(\d{1,18})"', self.rest)
        return int(found[1]) if found else None

    @property
    def number(self) -> int | None:
        """The value of an integer constant, the place of a parameter, the index of an element of a tuple."""
        found = re.search(r"index=(\d+)", self.rest) if self.opcode == "get-tuple-element" else re.match(r"(\d+)(?![.\w])", self.rest)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction; bitcasts stand for their own readers."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in reversed(self.instructions.values()):
            for operand in instruction.operands:
                if operand in users:
                    users[operand] += users[instruction.name] if instruction.opcode == "bitcast" else [instruction]
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    computations: Mapping[str, Computation]
    entry: str

    def loop_length(self, loop: Instruction) -> int | None:
        """How often a ``while`` turns; None if that depends on data."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]].instructions.values()
        bounds = [i.number for i in condition if i.opcode == "constant"]
        counters = [i for i in condition if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or bounds[0] is None or len(counters) != 1:
            return None
        return math.ceil(bounds[0] / self._stride(loop, counters[0].number))

    def _stride(self, loop: Instruction, counter: int) -> int:
        """What a loop's body adds to its counter: more than 1 where the compiler has unrolled it."""
        body = self.computations[loop.called[0]]
        step = body.operands(body.root)[counter]
        added = [o.number for o in body.operands(step) if o.opcode == "constant"] if step.opcode == "add" else []
        return added[0] if added and added[0] else 1


def parse(text: str) -> Program:
    """The text of a compiled program (``compiled.as_text()``) as computations of instructions."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current, entry = {}, head[2] if head[1] else entry
                computations[head[2]] = Computation(head[2], current)
        elif line.startswith("}"):
            current = None
        elif start := _INSTRUCTION.match(line):
            current[start[2]] = _instruction(start[2], line[start.end() :], bool(start[1]))
    return Program(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    # A layout has parentheses but no spaces, so a type ends where its tuple closes, else at the first space.
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, behind = text[end:].lstrip().partition("(")
    close = _closing("(" + behind) - 2
    held = behind[:close]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", held))
    return Instruction(name, opcode, shapes(text[:end]), operands, behind[close + 1 :] if operands else held + behind[close + 1 :], root)


def _closing(text: str) -> int:
    """The index behind the parenthesis that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type; of a tuple all of them."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in layout) for dtype, dims, layout in _SHAPE.findall(text)
    )


def executed(program: Program, unknown: float = 1.0) -> Iterator[tuple[Computation, Instruction, float]]:
    """Every instruction that runs, with its computation and how often: bodies of loops times their length, a fusion as one.

    Args:
      unknown: turns of a loop whose length depends on data.
    """

    def walk(name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            turns = program.loop_length(instruction) if instruction.opcode == "while" else 1
            if instruction.opcode == "while" or instruction.opcode in _CALLS:
                for called in instruction.called:
                    yield from walk(called, times * (unknown if turns is None else turns))

    return walk(program.entry, 1.0)


# ---- traffic between a chip and its memory ----


def traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one run of an instruction moves from and to memory; of what it slices, or updates in place, only that part."""
    opcode, operands = instruction.opcode, computation.operands(instruction)
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode in ("copy-start", "slice-start"):
        both = instruction.shapes[:2]
        return min(shape.bytes for shape in both) * sum(not shape.on_chip for shape in both)
    if opcode == "fusion":
        return _fusion_traffic(program, program.computations[instruction.called[0]], operands)
    if opcode == "dynamic-update-slice":
        return 2 * _off_chip(operands[1:2])
    return _off_chip([instruction]) + (_off_chip([instruction]) if opcode in _PART else _off_chip(operands))


def _off_chip(instructions: Sequence[Instruction]) -> int:
    return sum(shape.bytes for i in instructions for shape in i.shapes if not shape.on_chip)


def _fusion_traffic(program: Program, body: Computation, operands: Sequence[Instruction]) -> int:
    roots = body.operands(body.root) if body.root.opcode == "tuple" else [body.root]
    roots = [_behind_bitcasts(body, root) for root in roots]
    moved = sum(_off_chip(body.operands(r)[1:2] if r.opcode == "dynamic-update-slice" else [r]) for r in roots)
    for parameter in (i for i in body.instructions.values() if i.opcode == "parameter"):
        if not operands[parameter.number].shapes[0].on_chip:
            moved += _read(program, body, parameter)
    return moved


def _read(program: Program, body: Computation, value: Instruction) -> int:
    """Bytes of `value` that its readers need."""
    needed = 0
    for user in body.users[value.name]:
        if user.opcode in _PART:
            needed += user.bytes
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]]
            places = [n for n, o in enumerate(body.operands(user)) if _behind_bitcasts(body, o) is value]
            needed += sum(_read(program, inner, p) for p in inner.instructions.values() if p.opcode == "parameter" and p.number in places)
        elif not (user.opcode == "dynamic-update-slice" and _behind_bitcasts(body, body.operands(user)[0]) is value):
            needed += value.bytes
    return min(value.bytes, needed)


def _behind_bitcasts(body: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = body.operands(instruction)[0]
    return instruction
