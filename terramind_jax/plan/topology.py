"""Facts about TPUs, and the devices of a slice that need not be there.

Sources: Cloud TPU documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e) for peak rates, HBM, hosts and networks;
"How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter TPUs) for what a link of the interconnect attains, where the
documentation gives 10 % more, and for which axes wrap around. The clock is the peak rate over the products that the matrix units
begin a cycle. The memory that programs get is what the compiler itself states when one does not fit (libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from terramind_jax import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Rates are bytes a second and chip; `link` is one link of the interconnect in one direction."""

    name: str
    clock: float  # cycles a second
    memory: float  # bytes of HBM that a program may use
    memory_rate: float
    link: float
    network_rate: float  # data-centre network, in each direction
    shapes: tuple[str, ...]  # of slices that one can have; for those with three axes also every multiple of 4 in each
    config: str = "default"  # of the compiler: one device a chip

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return flops.PEAK[self.name]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05e9, 30.5 * GIB, 1.2e12, 4.5e10, 6.25e9, _CUBES, "megacore"),
        Chip("v5e", 1.5e9, 15.75 * GIB, 8.19e11, 4.5e10, 3.125e9, _FLAT),
        Chip("v5p", 1.75e9, 95.74 * GIB, 2.765e12, 9e10, 6.25e9, _CUBES),
        Chip("v6e", 1.75e9, 31.25 * GIB, 1.64e12, 9e10, 1.25e10, _FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several joined by the data-centre network. ``str`` of it is what `parse` reads."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        """Machines: of four chips each, as Cloud TPU makes them for slices of more than one host."""
        return max(1, math.prod(self.shape) // 4) * self.slices

    def wraps(self, extent: int) -> bool:
        """Whether an axis of `extent` chips is a ring. With three axes, whole cubes of 4 x 4 x 4 alone are joined around."""
        return extent == 16 if len(self.shape) == 2 else all(n % 4 == 0 for n in self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str, slices: int = 1) -> Topology:
    """``v5e:16x16``; a ValueError says what is wrong with another text."""
    if slices < 1:
        raise ValueError(f"--num_slices is {slices}; expected at least 1.")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not found:
        raise ValueError(f"Topology {text!r} is not CHIP:SHAPE, such as v5e:16x16 or v5p:4x4x4.")
    if found[1] not in CHIPS:
        raise ValueError(f"Topology {text!r} names the chip {found[1]!r}; known: {', '.join(CHIPS)}.")
    chip, shape = CHIPS[found[1]], tuple(int(n) for n in found[2].split("x"))
    cube = chip.shapes is _CUBES and len(shape) == 3 and all(n and n % 4 == 0 for n in shape) and list(shape) == sorted(shape)
    if found[2] not in chip.shapes and not cube:
        more = ", and multiples of 4 in ascending order" if chip.shapes is _CUBES else ""
        raise ValueError(f"Topology {text!r} does not exist; slices of {chip.name} are {', '.join(chip.shapes)}{more}.")
    return Topology(chip, shape, slices)


_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def devices(topology: Topology) -> list[jax.Device]:
    """The slice's devices, for which programs can be compiled and not run. An ImportError says if the TPU compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("plan needs the compiler for TPUs, which is not installed: pip install 'terramind-jax[tpu]'.")
    # No TPU is touched, so its metadata, its lock and the names of its hosts do not matter; without these its runtime complains.
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    options: dict = {"chip_config_name": topology.chip.config}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"The compiler for TPUs has no topology {topology}: {str(error).splitlines()[0]}") from error
