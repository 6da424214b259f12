"""Which scenes are done together, and what their windows give to a network: one row of windows at a time, in batches of one shape."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, geo
from terramind_jax.model import Backbone, TerraMind
from terramind_jax.scenes import reading, windows
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

    def of_all_devices(self, size: int) -> int:
        """A size of a batch, or the next larger one that the devices can share."""
        devices = 1 if self.sharding is None else self.sharding.num_devices
        return -(-size // devices) * devices

    def put(self, x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return x if self.sharding is None else jax.device_put(x, self.sharding)


@dataclasses.dataclass(frozen=True)
class Work:
    """Scenes that are done together, side by side, how they are cut, and which of their windows hold data, ``[rows, columns]``.

    `width` is how many windows a row of such work has at most. `painted` are inputs that are outputs, too: of these a patch is seen only if
    all of it has data, so that holes are painted to their rim.
    """

    scenes: Sequence[Scene]
    cut: Cut
    live: np.ndarray
    width: int
    painted: Collection[str] = ()

    @property
    def name(self) -> str:
        """In the journal; no other scenes together have it."""
        return self.scenes[0].name + (f"/+{len(self.scenes) - 1}" if self.scenes[1:] else "")

    @property
    def title(self) -> str:
        """For people."""
        first, *others = [scene.name for scene in self.scenes]
        return f"{first} ... {others[-1]} ({len(self.scenes)} scenes)" if others else first

    @property
    def images(self) -> list[str]:
        return self.scenes[0].images

    def parts(self) -> Iterator[tuple[Scene, slice, slice]]:
        """Its scenes, and for each which columns of patches are its own, and which columns of windows."""
        origins = np.array(self.cut.origins)
        for scene, origin in zip(self.scenes, np.unique(origins), strict=True):
            mine = np.flatnonzero(origins == origin)
            yield scene, slice(int(origin), int(origin) + scene.grid[1]), slice(int(mine[0]), int(mine[-1]) + 1)

    def missing(self, row: int, height: int) -> np.ndarray:
        """`reading.missing` of all its scenes."""
        return np.concatenate([reading.missing(scene, row, height) for scene in self.scenes], axis=1)


def unfinished(scenes: Sequence[Scene], cuts: Sequence[Cut], done: Journal, size: int) -> list[Work]:
    """What is left to do of a command; small scenes together, `size` windows a row at most.

    All of it is read before, so that a raster that cannot be is told now and not after hours of work.
    """
    todo = [i for i, scene in enumerate(scenes) if not done.get(scene.name)]
    bar = tqdm(todo, desc="Reading", unit="scene", dynamic_ncols=True, disable=len(todo) < 2)
    live = {i: reading.measured(scenes[i], cuts[i]) for i in bar}
    groups, widest = together(cuts, size), collections.Counter()
    for some in groups:
        rows, width = cuts[some[0]].rows, sum(len(cuts[i].columns) for i in some)
        if width <= size:
            widest[rows] = max(widest[rows], width)
    left = []
    for some in groups:
        if some := [i for i in some if i in live]:
            cut = windows.side_by_side([cuts[i] for i in some])
            width = max(len(cut.columns), widest[cut.rows])  # others are as wide: one shape, one program
            left.append(Work([scenes[i] for i in some], cut, np.concatenate([live[i] for i in some], axis=1), width))
    return left


def at_once(network: Network, batch_size: int) -> int:
    """How many windows of several scenes are done together: a batch. A CPU is no faster with several, and has the first scene sooner."""
    return network.of_all_devices(1 if jax.default_backend() == "cpu" else batch_size)


def together(cuts: Sequence[Cut], size: int) -> list[list[int]]:
    """Which scenes are done together: those that are cut at the same rows, in even groups of at most `size` windows a row, or one of more.

    It does not depend on what was done before, so that windows have the same neighbours after a stop.
    """
    counts = collections.Counter()
    for c in cuts:
        counts[c.rows] += len(c.columns)
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, ...], tuple[list[int], int]] = {}  # by rows, and their windows a row
    for i, c in enumerate(cuts):
        most = even(counts[c.rows], size)
        some, count = open_groups.get(c.rows, ([], most))
        if count + len(c.columns) > most:
            some, count = [], 0
            groups.append(some)
        some.append(i)
        open_groups[c.rows] = some, count + len(c.columns)
    return groups


def even(count: int, size: int) -> int:
    """The size of as few parts of at most `size` as there can be, but even ones: of 9 not 8 and 1, but 5 and 4."""
    return -(-count // -(-count // size))


def spread(network: Network) -> Network:
    """The network on all devices of this machine, if they are several."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return network
    mesh = jax.sharding.Mesh(np.array(devices), ("windows",))
    everywhere, parted = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("windows",)))
    tokenizers = {name: (module, jax.device_put(variables, everywhere)) for name, (module, variables) in network.tokenizers.items()}
    return dataclasses.replace(network, variables=jax.device_put(network.variables, everywhere), tokenizers=tokenizers, sharding=parted)


def batches(network: Network, work: Work, i: int, size: int, samples: int = 1) -> Iterator[list[tuple[int, int]]]:
    """(sample, column) of windows of row `i`, all of one length: the last window of a batch is repeated. One shape, one program.

    No batch holds windows of two rows, so that a window has the same neighbours whatever was done before.
    """
    size = network.of_all_devices(even(samples * work.width, size))
    todo = [(k, int(j)) for k in range(samples) for j in np.flatnonzero(work.live[i])]
    for start in range(0, len(todo), size):
        yield padded(todo[start : start + size], size)


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
    strip: dict[str, tuple | None] = dict.fromkeys(work.scenes[0].paths)
    for name in work.images:
        pixels, missing = (np.concatenate(x, 1) for x in zip(*(reading.read(scene, name, *where) for scene in work.scenes), strict=True))
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
            options |= {"bands": work.scenes[0].bands.get(name)}  # None: all
        values[own.key] = network.put(generate.encode_input(own, x, network.tokenizers, **options))
    return values, visible


def _windows(work: Work, js: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """Some windows of a row of them, ``[B, L, L, ...]``, of their pixels or patches ``[L, w, ...]``."""
    unit = len(rows) // work.cut.size
    return np.stack([rows[:, unit * left : unit * left + len(rows)] for left in (work.cut.columns[j] for j in js)])


def _positions(work: Work, i: int, js: Sequence[int]) -> np.ndarray:
    """(longitude, latitude) of the middles of windows ``[B, 2]``."""
    places = [scene.place for scene, _, columns in work.parts() for _ in work.cut.columns[columns]]
    middles = (work.cut.at(i, js) + work.cut.size / 2) * PATCH
    return np.array([geo.lonlat(places[j], *middle) for j, middle in zip(js, middles, strict=True)])
