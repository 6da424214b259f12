"""How arrays lie on the mesh: one mesh ``(data, fsdp, tensor)`` and one table of logical axes.

`jax.jit` with `NamedSharding` is what `pjit` became; nothing here wraps it. Modules name the axes of their parameters; `RULES`
says which mesh axis holds each name. A dimension that the mesh does not divide is replicated, and `replicated_dimensions` lists it.

Gradients are summed over the mesh in the dtype of the product that makes them: those of kernels in ``model.dtype``, so in bfloat16 on
accelerators, layer by layer during the backward pass; those of token tables, norms and the loss in float32, since a row of a table is
itself a sum over tokens. A table (5 x 15,360, 4,375 and 30,000 rows, at the encoder and at the decoder) is summed whole after the
backward pass, touched rows or not: at base 683 MB beside 411 MB of kernels. Microbatches are added in float32; of `train.accumulate`
parts each sums its kernels over the mesh, as they come from within the loop over layers, while XLA sums the tables once for all (but
not the decoder's of 30,000 rows), so accumulation costs transfers: at base 2,574 MB a step with 4 parts instead of 1,094.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("codes", "fsdp"),
    ("patch", None),
    ("tokens", None),
    ("norm", None),
    ("layers", None),
)

# Of a model's width, on one device: below it XLA's compiler for TPUs would rather sum whole weights over all devices, which costs more.
MIN_FSDP_ROWS = 96


def compute_dtype(name: str, platform: str | None = None) -> str:
    """A configuration's dtype: ``auto`` is bfloat16 on accelerators and float32 on a CPU. `platform` is by default JAX's."""
    if name == "auto":
        return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return name


# ---- the mesh ----


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all; one size may be -1, "the rest".

    Between slices of TPUs, and between hosts of GPUs, lies the slower network: there the data axis is split first, then the fsdp axis.
    A ValueError says when the sizes do not fit the devices, slices or hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes((data, fsdp, tensor), len(devices))
    # Linen's logical partitioning needs Auto axes; jax.make_mesh makes Explicit ones unless told, and refuses several slices.
    mesh = Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shares(mesh.devices)
    return mesh


def _sizes(sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(f"Mesh sizes {list(sizes)} for {AXES} must be positive, at most one of them -1.")
    rest = devices // math.prod(n for n in sizes if n != -1)
    full = tuple(rest if n == -1 else n for n in sizes)
    if math.prod(full) != devices:
        raise ValueError(f"A mesh of {_text(full)} does not cover {devices} devices.")
    return full


def _text(sizes: Sequence[int]) -> str:
    return f"{' x '.join(map(str, sizes))} ({', '.join(AXES)})"


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as ``[data, fsdp, tensor]``, neighbours on the last axes close to each other."""
    by_process, islands = _islands(devices)
    if islands == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    outer = math.gcd(data, islands)
    inner = islands // outer
    if fsdp % inner:
        kind = "hosts" if by_process else "slices"
        raise ValueError(f"A mesh of {_text(sizes)} cannot be cut along data and fsdp into {islands} {kind}; make data a multiple of it.")
    return mesh_utils.create_hybrid_device_mesh(
        (data // outer, fsdp // inner, tensor),
        (outer, inner, 1),
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def _islands(devices: Sequence[jax.Device]) -> tuple[bool, int]:
    """Groups of devices with a fast network among them: whether each is one process, and how many there are."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    hosts = len({device.process_index for device in devices})
    # GPUs do not always know their slice, which is their host.
    by_process = slices == 1 and hosts > 1 and devices[0].platform == "gpu"
    return by_process, hosts if by_process else slices


def shares(devices: np.ndarray) -> dict[int, int]:
    """Which share of a batch each process loads, for a mesh of devices ``[data, fsdp, tensor]``.

    Shares are equal parts of the rows. Processes with the same rows, which differ along the tensor axis only, load the same share. A
    ValueError says when two processes have rows of which only some are the same.
    """
    rows = collections.defaultdict(set)
    for row, same_rows in enumerate(devices.reshape(-1, devices.shape[-1])):
        for device in same_rows:
            rows[device.process_index].add(row)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != devices.size // devices.shape[-1] or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"A mesh of {_text(devices.shape)} gives {len(rows)} hosts unequal or overlapping parts of a batch; choose a tensor size that "
            "divides the devices of a host or is a multiple of them."
        )
    return {process: parts.index(tuple(sorted(part))) for process, part in rows.items()}


def host_share(mesh: Mesh) -> tuple[int, int]:
    """``(host, hosts)`` for the data pipeline: which share of every batch this process loads, and how many there are."""
    of = shares(mesh.devices)
    return of[jax.process_index()], len(set(of.values()))


# ---- where arrays lie ----


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp: every array of a batch, patch buffers included."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_global(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch, as `host_share` counts them -> global arrays on the mesh, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """A `NamedSharding` for every leaf of abstract boxed variables (`jax.eval_shape` of `model.init`).

    A ValueError names an array with an axis that `RULES` lacks, or with two dimensions on one mesh axis.
    """

    def place(path: tuple, names: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = zip(mesh_axes(_name(path), names), leaf.shape, strict=False)
        return NamedSharding(mesh, PartitionSpec(*(axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in axes)))

    return _map_with_names(place, boxed)


class Replicated(NamedTuple):
    """A dimension that `RULES` would split over `axis`, were its size a multiple of the axis's."""

    array: str
    name: str
    size: int
    axis: str


def replicated_dimensions(mesh: Mesh, boxed: Any) -> list[Replicated]:
    """The dimensions of abstract boxed variables that are replicated because the mesh does not divide them."""

    def look(path: tuple, names: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> list[Replicated]:
        dimensions = zip(names, mesh_axes(_name(path), names), leaf.shape, strict=False)
        return [Replicated(_name(path), name, n, axis) for name, axis, n in dimensions if axis and n % mesh.shape[axis]]

    return jax.tree.leaves(_map_with_names(look, boxed), is_leaf=lambda x: isinstance(x, Replicated))


def mesh_axes(array: str, names: Sequence[str | None]) -> list[str | None]:
    """The mesh axis of each dimension of a parameter, from its logical names; `array` is what an error calls it."""
    table = dict(RULES)
    if unknown := [name for name in names if name is not None and name not in table]:
        raise ValueError(f"{array} has the logical axis {unknown[0]!r}; sharding.RULES knows {', '.join(table)}.")
    axes = [None if name is None else table[name] for name in names]
    for axis in AXES:
        if axes.count(axis) > 1:
            both = " and ".join(repr(name) for name, other in zip(names, axes, strict=True) if other == axis)
            raise ValueError(f"The dimensions {both} of {array} lie on one mesh axis, {axis!r}; give one of them a name on another axis.")
    return axes


def _map_with_names(function: Any, boxed: Any) -> Any:
    """`function` of path, logical names and shape, for every leaf of abstract boxed variables."""
    names = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(function, names, meta.unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
