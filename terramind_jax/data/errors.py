"""What the reader raises, and the short words by which bad data is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

# corrupt: a tar, zip, chunk or .npy is damaged; missing: what the index knows is not there; shape: of an array, or too small a tile;
# constant: an S1 or S2 tile where nothing was measured; nan: not finite; value: what no such array can hold; unreachable: the storage
# did not give it, however often it was asked.
REASONS = ("corrupt", "missing", "shape", "constant", "nan", "value", "unreachable")
NAMED = 5  # keys that a sentence names of however many


class DataError(Exception):
    """A shard or sample that cannot be read; the message is one sentence naming it, `reason` is one of `REASONS`."""

    def __init__(self, message: str, reason: str = "corrupt"):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def reading(modality: str) -> Iterator[None]:
    """What is raised inside tells of which modality it was."""
    try:
        yield
    except (DataError, OSError) as error:
        error.modality = modality
        raise


def fault(error: DataError | OSError) -> str:
    """Modality and reason, such as ``"S2L2A corrupt"``."""
    return f"{getattr(error, 'modality', '')} {getattr(error, 'reason', 'unreachable')}"


def some(names: Sequence[str]) -> str:
    """The first of `names` for a sentence: ``"'a', 'b', ..."``."""
    return ", ".join([*map(repr, names[:NAMED]), *["..."] * (len(names) > NAMED)])
