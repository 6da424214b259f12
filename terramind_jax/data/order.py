"""Which sample, which view and which random numbers belong to a position: functions of integers, nothing else.

The training state holds one integer, the samples (views) consumed. Hosts, workers and batch size do not enter here, so changing them,
resuming or skipping ahead never changes what a position means.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# What a draw is for; part of its key, so draws for different purposes never share numbers.
_PURPOSES = {"order": 1, "crop": 2, "mask": 3, "labels": 4}


class Place(NamedTuple):
    """What stands at one position of the stream."""

    slot: int  # position among samples, counted over all epochs
    epoch: int  # of the sample's subset
    rank: int  # of the sample in the index's order; with several subsets, in the first one's, then the second one's, ...
    view: int


def generator(purpose: str, seed: int, epoch: int = 0, sample: int = 0, view: int = 0) -> np.random.Generator:
    """The counter-based generator of one draw; `purpose` is "order", "crop", "mask" or "labels".

    The key is (seed, purpose); sample, epoch and view fill the three high words of Philox's 256-bit counter and the draw itself advances
    the low one, so no two draws overlap.
    """
    counter = np.array([0, view, sample, epoch], np.uint64)
    key = np.array([seed % 2**64, _PURPOSES[purpose]], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def permutation(n: int, seed: int, epoch: int, shuffle_window: int = 0, subset: int = 0) -> np.ndarray:
    """The order in which `epoch` visits the `n` samples of a subset: uint32 ``[n]``, every sample exactly once. Read-only.

    With a `shuffle_window` the samples are cut into windows of so many neighbours, which are visited one after the other, in random
    order and each shuffled in itself: what is read together lies together.
    """
    return _kept(subset)(n, seed, epoch, shuffle_window, subset)


@functools.cache
def _kept(subset: int):
    """The last two permutations of a subset, 4 bytes a sample each: a window of views may straddle two epochs."""
    return functools.lru_cache(maxsize=2)(_permutation)


def _permutation(n: int, seed: int, epoch: int, shuffle_window: int, subset: int) -> np.ndarray:
    rng = generator("order", seed, epoch, subset)
    order = rng.permutation(np.arange(n, dtype=np.uint32))
    if shuffle_window:
        turns = rng.permutation(-(-n // shuffle_window))
        order = order[np.argsort(turns[order // shuffle_window], kind="stable")]
    order.flags.writeable = False
    return order


def place(
    position: int,
    n: int | Sequence[int],
    seed: int,
    views: int = 1,
    window: int = 1,
    shuffle_window: int = 0,
    weights: Sequence[int] = (1,),
) -> Place:
    """What stands at `position` when `n` samples are visited epoch after epoch, each `views` times.

    `window` samples are shown in their first view, then the same ones in their second, and so on: the views of one sample are `window`
    positions apart, in different batches as long as a batch is no larger. With the sizes of several subsets for `n`, each goes through
    epochs of its own, and they take turns by `weights` (`turn`).
    """
    sizes = (n,) if isinstance(n, int) else n
    block, rest = divmod(position, views * window)
    view, offset = divmod(rest, window)
    slot = block * window + offset
    subset, visit = turn(slot, weights)
    epoch, index = divmod(visit, sizes[subset])
    first = sum(sizes[:subset])
    return Place(slot, epoch, first + int(permutation(sizes[subset], seed, epoch, shuffle_window, subset)[index]), view)


def turn(slot: int, weights: Sequence[int]) -> tuple[int, int]:
    """Whose turn it is at `slot` when subsets take turns by integer `weights`, and how many turns it had before.

    Two halves of the subsets share any first `i` slots as ``round(i * share)`` and the rest, and so on within a half: two to four subsets
    are never more than one sample away from their shares.
    """
    first, last = 0, len(weights)
    while last - first > 1:
        middle = (first + last) // 2
        part, whole = sum(weights[first:middle]), sum(weights[first:last])
        before, after = ((2 * i * part + whole) // (2 * whole) for i in (slot, slot + 1))
        slot, first, last = (before, first, middle) if after > before else (slot - before, middle, last)
    return first, slot


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the same proportions, so that turns are exact at any position: 0.8 and 0.2 are 4 and 1."""
    exact = [Fraction(str(w)) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    return tuple(w // math.gcd(*whole) for w in whole)


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `count`, evenly spread from the first to the last: samples that stand for all."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)) if count else np.zeros(0, int)
