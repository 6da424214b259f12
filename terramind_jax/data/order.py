"""Which sample, which view and which random numbers belong to a position: functions of integers, nothing else.

The training state holds one integer, the samples (views) consumed. Hosts, workers and batch size do not enter here, so changing them,
resuming or skipping ahead never changes what a position means.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# What a draw is for; part of its key, so draws for different purposes never share numbers.
_PURPOSES = {"order": 1, "crop": 2, "mask": 3}


class Place(NamedTuple):
    """What stands at one position of the stream."""

    slot: int  # position among samples, counted over all epochs
    epoch: int
    rank: int  # of the sample in the index's order
    view: int


def generator(purpose: str, seed: int, epoch: int = 0, sample: int = 0, view: int = 0) -> np.random.Generator:
    """The counter-based generator of one draw; `purpose` is "order", "crop" or "mask".

    The key is (seed, purpose); sample, epoch and view fill the three high words of Philox's 256-bit counter and the draw itself advances
    the low one, so no two draws overlap.
    """
    counter = np.array([0, view, sample, epoch], np.uint64)
    key = np.array([seed % 2**64, _PURPOSES[purpose]], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


@functools.lru_cache(maxsize=2)  # a window of views may straddle two epochs; 4 bytes a sample each
def permutation(n: int, seed: int, epoch: int, shuffle_window: int = 0) -> np.ndarray:
    """The order in which `epoch` visits `n` samples: uint32 ``[n]``, every sample exactly once. Read-only.

    With a `shuffle_window` the samples are cut into windows of so many neighbours, which are visited one after the other, in random
    order and each shuffled in itself: what is read together lies together.
    """
    rng = generator("order", seed, epoch)
    order = rng.permutation(np.arange(n, dtype=np.uint32))
    if shuffle_window:
        turns = rng.permutation(-(-n // shuffle_window))
        order = order[np.argsort(turns[order // shuffle_window], kind="stable")]
    order.flags.writeable = False
    return order


def place(position: int, n: int, seed: int, views: int = 1, window: int = 1, shuffle_window: int = 0) -> Place:
    """What stands at `position` when `n` samples are visited epoch after epoch, each `views` times.

    `window` samples are shown in their first view, then the same ones in their second, and so on: the views of one sample are `window`
    positions apart, in different batches as long as a batch is no larger.
    """
    block, rest = divmod(position, views * window)
    view, offset = divmod(rest, window)
    slot = block * window + offset
    epoch, index = divmod(slot, n)
    return Place(slot, epoch, int(permutation(n, seed, epoch, shuffle_window)[index]), view)
