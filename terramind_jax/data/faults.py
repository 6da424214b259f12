"""Why samples were bad. Data workers only mark them; when somebody asks, the last ones are read again, with everything they have."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax.data import views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index
from terramind_jax.modalities import Stream

SHOWN = 4  # samples that are named


class Faults:
    """Remembers the bad samples among this host's batches."""

    def __init__(self, index: Index, read: Callable[[int], Any]) -> None:
        """`read` reads all that matters of a sample, given by its place in the index."""
        self._index, self._read = index, read
        self._bad: collections.deque[int] = collections.deque(maxlen=SHOWN)

    def following(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The same batches, as the data pipeline gives them; their bad samples are remembered as they pass."""
        for batch in batches:
            for i in batch["sample"][batch["bad"]].tolist():
                if i >= 0 and i not in self._bad:
                    self._bad.append(i)
            yield batch

    def reasons(self) -> str:
        """One sentence a sample, of the last `SHOWN`."""
        return " ".join(map(self._reason, self._bad)) or "those of this host are none of them."

    def _reason(self, i: int) -> str:
        try:
            self._read(i)
        except (DataError, OSError) as error:
            return str(error)
        return f"Sample {self._index.keys[i]!r} can be read now."


def read_streams(index: Index, streams: Sequence[Stream], image_size: int, i: int) -> None:
    """Reads what sample `i` has of `streams`; a `DataError` or OSError for the first that cannot be read."""
    for stream in streams:
        table = index.available if stream.kind == "pixels" else index.has_tokens
        there = stream.modality in index.modalities and table[i, index.modalities.index(stream.modality)]
        if stream.kind == "pixels" and there:
            views.read_variants(index, i, stream.modality, image_size)
        elif stream.kind == "sequence" or there:
            views.Sample(index, i, 0, image_size).ids(stream, np.zeros(0, int))
