"""What windows of a scene give to a network: one row of windows at a time, in batches of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from terramind_jax import generate, geo
from terramind_jax.model import Backbone, TerraMind
from terramind_jax.scenes import reading
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.scenes.windows import Cut

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Network:
    """What looks at windows. `sharding` spreads them over several devices."""

    module: TerraMind | Backbone
    variables: Mapping[str, Any]
    tokenizers: generate.Tokenizers
    version: str = "v1"
    sharding: jax.sharding.NamedSharding | None = None

    @property
    def dtype(self) -> str:
        """Of the computation: "float32" or "bfloat16", or both if the networks differ."""
        networks = [self.module, *(tokenizer for tokenizer, _ in self.tokenizers.values())]
        return ", ".join(sorted({network.config.dtype for network in networks}))

    def put(self, x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return x if self.sharding is None else jax.device_put(x, self.sharding)


@dataclasses.dataclass(frozen=True)
class Work:
    """One scene, how it is cut, and which of its windows hold data, ``[rows, columns]``."""

    scene: Scene
    cut: Cut
    live: np.ndarray


def spread(network: Network) -> Network:
    """The network on all devices of this machine, if they are several."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return network
    mesh = jax.sharding.Mesh(np.array(devices), ("windows",))
    everywhere, parted = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("windows",)))
    tokenizers = {name: (module, jax.device_put(variables, everywhere)) for name, (module, variables) in network.tokenizers.items()}
    return dataclasses.replace(network, variables=jax.device_put(network.variables, everywhere), tokenizers=tokenizers, sharding=parted)


def batches(network: Network, work: Work, i: int, size: int) -> Iterator[list[int]]:
    """Columns of windows of row `i`, all of one length: the last window of a batch is repeated. One shape, one program.

    No batch holds windows of two rows, so that a window has the same neighbours whatever was done before.
    """
    devices, most = 1 if network.sharding is None else network.sharding.num_devices, len(work.cut.columns)
    size = -(-most // -(-most // size))  # as many batches, but even ones: of 9 windows not 8 and 1, but 5 and 4
    size = -(-size // devices) * devices
    columns = [int(j) for j in np.flatnonzero(work.live[i])]
    for start in range(0, len(columns), size):
        yield padded(columns[start : start + size], size)


def padded(batch: list[T], size: int) -> list[T]:
    """A batch of one size, the last item repeated: one shape, one program."""
    return batch + batch[-1:] * (size - len(batch))


def read(work: Work, i: int) -> dict[str, np.ndarray | None]:
    """The pixels of every input under row `i` of windows, ``[L, w, C]``; None of one that only gives its position."""
    c, images = work.cut, set(work.scene.images)
    if not work.live[i].any():
        return {}
    where = c.rows[i] * PATCH, c.size * PATCH
    return {name: reading.read(work.scene, name, *where)[0] if name in images else None for name in work.scene.paths}


def encode(network: Network, work: Work, i: int, js: Sequence[int], strip: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """What some windows of row `i` give to the network, by stream; `strip` is of `read`."""
    values, length = {}, work.cut.size * PATCH
    for name, rows in strip.items():
        lefts = [work.cut.columns[j] * PATCH for j in js]
        x = _positions(work, i, js) if rows is None else np.stack([rows[:, left : left + length] for left in lefts])
        own = generate.input_stream(network.module, name)
        values[own.key] = network.put(generate.encode_input(own, x, network.tokenizers, version=network.version))
    return values


def _positions(work: Work, i: int, js: Sequence[int]) -> np.ndarray:
    """(longitude, latitude) of the middles of windows ``[B, 2]``."""
    middle = [(start + work.cut.size / 2) * PATCH for start in (work.cut.rows[i], *(work.cut.columns[j] for j in js))]
    return np.array([geo.lonlat(work.scene.place, middle[0], column) for column in middle[1:]])
