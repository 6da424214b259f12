"""What frozen networks make of a data set, once a sample instead of in every epoch: a backbone's features, a generator's tokens.

Every process holds all of it, in files that are gone with the process, so that it may be larger than memory.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from terramind_jax.data import order
from terramind_jax.tasks.batches import Batch

Kept = Any  # arrays [N, ...] of all windows, in a tree


def keep(stream: Iterable[Batch], make: Callable[[Batch], Any], count: int) -> Kept:
    """What `make` gives of every batch of `batches.covering`, in the order of its `count` windows. Batches are global arrays."""
    kept = None
    for batch in stream:
        rows, made = multihost_utils.process_allgather((batch["view"], make(batch)), tiled=True)
        kept = jax.tree.map(lambda x: _mapped((count, *x.shape[1:]), x.dtype), made) if kept is None else kept
        jax.tree.map(lambda to, x, rows=rows: to.__setitem__(rows, x), kept, made)
    return kept


def _mapped(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=tuple(shape))


def take(kept: Kept, rows: Any) -> Any:
    """Some rows, in memory."""
    return jax.tree.map(lambda x: np.array(x[rows]), kept)


def training(
    kept: Kept, samples: int, *, batch_size: int, seed: int = 0, consumed: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """As `batches.training`, of kept windows, one a sample: the same samples in the same order."""
    for start in itertools.count(consumed, batch_size):
        positions = range(start + host, start + batch_size, hosts)
        yield take(kept, [order.place(position, samples, seed).rank for position in positions])


def covering(kept: Kept, *, batch_size: int, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
    """As `batches.covering`."""
    for start in range(0, len(jax.tree.leaves(kept)[0]), batch_size):
        yield take(kept, slice(start + host, start + batch_size, hosts))
