"""Which scenes are done together, and what their windows give to a network: one row of windows at a time, in batches of one shape."""

from __future__ import annotations

import dataclasses
import hashlib
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

    For so many windows a row, `width`, are its batches made: that of the widest of like works, so that one program serves all. `painted`
    are inputs that are outputs, too: of these a patch is seen only if all of it has data, so that holes are painted to their rim.
    """

    scenes: Sequence[Scene]
    cut: Cut
    live: np.ndarray
    width: int
    painted: Collection[str] = ()

    @property
    def names(self) -> list[str]:
        return [scene.name for scene in self.scenes]

    @property
    def name(self) -> str:
        """In the journal, where no other scenes together have it: on other devices a scene may have other neighbours."""
        first, *others = self.names
        return f"{first}/{hashlib.sha256('/'.join(others).encode()).hexdigest()[:16]}" if others else first

    @property
    def title(self) -> str:
        """For people."""
        first, *others = self.names
        return f"{first} ... {others[-1]} ({len(self.scenes)} scenes)" if others else first

    @property
    def images(self) -> list[str]:
        return self.scenes[0].images

    def parts(self) -> Iterator[tuple[Scene, slice, slice]]:
        """Its scenes, and for each which columns of patches are its own, and which columns of windows."""
        left = first = 0
        for scene in self.scenes:
            count = self.cut.origins.count(left)
            yield scene, slice(left, left + scene.grid[1]), slice(first, first + count)
            left, first = left + scene.grid[1], first + count

    def scene_of(self) -> list[int]:
        """Of each column of windows the number of its scene."""
        return [n for n, (*_, columns) in enumerate(self.parts()) for _ in self.cut.columns[columns]]

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
    left = []
    for some, width in together(cuts, size):
        if some := [i for i in some if i in live]:
            cut = windows.side_by_side([cuts[i] for i in some])
            left.append(Work([scenes[i] for i in some], cut, np.concatenate([live[i] for i in some], axis=1), width))
    return left


def at_once(network: Network, batch_size: int, samples: int = 1) -> int:
    """How many windows a row scenes that are done together have: with their samples a batch.

    A CPU is no faster with several, and has the first scene sooner.
    """
    return -(-network.of_all_devices(1 if jax.default_backend() == "cpu" else batch_size) // samples)


def together(cuts: Sequence[Cut], size: int) -> list[tuple[list[int], int]]:
    """Which scenes are done together, and how many windows a row the widest of like groups has; in the order of their first scenes.

    Those that are cut at the same rows, with `size` windows a row at most; a wider one is alone. It does not depend on what was done
    before, so that windows have the same neighbours after a stop.
    """
    alike: dict[object, list[int]] = {}
    for i, c in enumerate(cuts):
        alike.setdefault(c.rows if len(c.columns) <= size else i, []).append(i)
    found = []
    for some in alike.values():
        widths = {i: len(cuts[i].columns) for i in some}
        fewest = len(_filled(widths, size))
        # As few groups as there can be, but even ones: 5 and 4 windows rather than 8 and 1.
        groups = next(groups for limit in range(1, size + 1) if len(groups := _filled(widths, limit)) == fewest)
        widest = max(sum(widths[i] for i in group) for group in groups)
        found += [(group, widest) for group in groups]
    return sorted(found)


def _filled(widths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Scenes, in their order, in groups that are no wider than `limit`, unless one scene is."""
    groups, width = [], limit
    for i, more in widths.items():
        if width + more > limit:
            groups.append([])
            width = 0
        groups[-1].append(i)
        width += more
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
    size = network.of_all_devices(even(samples * work.width, network.of_all_devices(size)))
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
    scene_of, middles = work.scene_of(), (work.cut.at(i, js) + work.cut.size / 2) * PATCH
    return np.array([geo.lonlat(work.scenes[scene_of[j]].place, *middle) for j, middle in zip(js, middles, strict=True)])
