"""What windows of a scene give to a network: one row of windows at a time, in batches of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, geo
from terramind_jax.model import Backbone, TerraMind
from terramind_jax.scenes import reading
from terramind_jax.scenes.journal import Journal
from terramind_jax.scenes.reading import PATCH, Scene
from terramind_jax.scenes.windows import Cut

T = TypeVar("T")
Strip = Mapping[str, tuple[np.ndarray, np.ndarray] | None]  # see `read`


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
    """One scene, how it is cut, and which of its windows hold data, ``[rows, columns]``.

    `painted` are inputs that are outputs, too: of these a patch is seen only if all of it has data, so that holes are painted to their rim.
    """

    scene: Scene
    cut: Cut
    live: np.ndarray
    painted: Collection[str] = ()


def unfinished(scenes: Sequence[Scene], cuts: Sequence[Cut], done: Journal) -> list[Work]:
    """What is left to do of a command. All of it is read once, so that a raster that cannot be is told now and not after hours of work."""
    todo = [(scene, cut) for scene, cut in zip(scenes, cuts, strict=True) if not done.get(scene.name)]
    bar = tqdm(todo, desc="Reading", unit="scene", dynamic_ncols=True, disable=len(todo) < 2)
    return [Work(scene, cut, reading.measured(scene, cut)) for scene, cut in bar]


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


def read(work: Work, i: int) -> Strip:
    """Of every input under row `i` of windows its pixels ``[L, w, C]``, and which patches are seen, ``[L / 16, w / 16]`` bool.

    None of an input that only gives its position.
    """
    c = work.cut
    if not work.live[i].any():
        return {}
    where = c.rows[i] * PATCH, c.size * PATCH
    strip: dict[str, tuple | None] = dict.fromkeys(work.scene.paths)
    for name in work.scene.images:
        pixels, missing = reading.read(work.scene, name, *where)
        strip[name] = pixels, reading.seen(missing, whole=name in work.painted)
    return strip


def encode(network: Network, work: Work, i: int, js: Sequence[int], strip: Strip) -> tuple[dict[str, Any], dict[str, Any]]:
    """What some windows of row `i` give to the network, and of images which patches are seen, both by stream; `strip` is of `read`."""
    values, visible = {}, {}
    for name, rows in strip.items():
        own, options = generate.input_stream(network.module, name), {"version": network.version}
        if rows is None:
            x = _positions(work, i, js)
        else:
            x, seen = (_windows(work, js, image) for image in rows)
            visible[own.key] = network.put(seen)
            options |= {"visible": seen} if name in work.painted else {}
            options |= {"bands": work.scene.bands.get(name)}  # None: all
        values[own.key] = network.put(generate.encode_input(own, x, network.tokenizers, **options))
    return values, visible


def _windows(work: Work, js: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """Some windows of a row of them, ``[B, L, L, ...]``, of their pixels or patches ``[L, w, ...]``."""
    unit = len(rows) // work.cut.size
    return np.stack([rows[:, unit * left : unit * left + len(rows)] for left in (work.cut.columns[j] for j in js)])


def _positions(work: Work, i: int, js: Sequence[int]) -> np.ndarray:
    """(longitude, latitude) of the middles of windows ``[B, 2]``."""
    middle = [(start + work.cut.size / 2) * PATCH for start in (work.cut.rows[i], *(work.cut.columns[j] for j in js))]
    return np.array([geo.lonlat(work.scene.place, middle[0], column) for column in middle[1:]])
