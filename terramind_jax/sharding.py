"""How arrays lie on the mesh: one mesh ``(data, fsdp, tensor)`` and one table of logical axes.

`jax.jit` with `NamedSharding` is what `pjit` became; nothing here wraps it. Modules name the axes of their parameters; `RULES`
says which mesh axis holds each name. A dimension that the mesh does not divide is replicated.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("patch", None),
    ("tokens", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1, "the rest". A ValueError says when the sizes do not fit the devices and hosts."""
    sizes = np.array([data, fsdp, tensor])
    devices = jax.device_count()
    if (sizes == -1).sum() > 1 or (sizes == 0).any():
        raise ValueError(f"Mesh sizes {sizes.tolist()} for {AXES} must be positive, at most one of them -1.")
    if -1 in sizes:
        sizes[sizes == -1] = devices // max(1, int(np.prod(sizes[sizes != -1])))
    if np.prod(sizes) != devices:
        raise ValueError(f"A mesh of {' x '.join(map(str, sizes))} ({', '.join(AXES)}) does not cover {devices} devices.")
    # Linen's logical partitioning needs Auto axes; jax.make_mesh makes Explicit ones unless told.
    mesh = jax.make_mesh(tuple(int(n) for n in sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    check_hosts(mesh.devices)
    return mesh


def check_hosts(devices: np.ndarray) -> None:
    """Refuses a mesh ``[data, fsdp, tensor]`` on which two hosts hold the same rows of a batch: `to_global` gives each its own."""
    for same_rows in devices.reshape(-1, devices.shape[-1]):
        hosts = {device.process_index for device in same_rows}
        if len(hosts) > 1:
            raise ValueError(
                f"Mesh size tensor={devices.shape[-1]} puts hosts {min(hosts)} and {max(hosts)} on the same rows of a batch; choose a "
                "size that fits into the devices of one host."
            )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp: every array of a batch, patch buffers included."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """A `NamedSharding` for every leaf of abstract boxed variables (`jax.eval_shape` of `model.init`)."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def place(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(spec, leaf.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(place, specs, meta.unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def to_global(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch -> global arrays on the mesh, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
