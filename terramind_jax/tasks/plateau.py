"""What a sequence of validations says: whether the last is the best, how far to lower the learning rate, whether to end.

Functions of the list of values, oldest first, which the log of a run holds, so that nothing else need be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

THRESHOLD = 1e-4  # by which part a value must be better to count for the learning rate, as PyTorch's ReduceLROnPlateau has it


def is_larger_better(name: str) -> bool:
    """Of losses and errors less is better, of scores more."""
    return name.rsplit("/", 1)[-1] not in ("loss", "rmse", "mae")


def is_best(values: Sequence[float], larger: bool) -> bool:
    """Whether the last value is better than all before; one that is not finite never is."""
    sign, finite = 1 if larger else -1, [v for v in values[:-1] if math.isfinite(v)]
    return math.isfinite(values[-1]) and all(sign * values[-1] > sign * v for v in finite)


def since_best(values: Sequence[float], larger: bool) -> int:
    """How many values have followed the best."""
    best = [i for i in range(len(values)) if is_best(values[: i + 1], larger)]
    return len(values) - 1 - best[-1] if best else len(values)


def scale(values: Sequence[float], larger: bool, factor: float, patience: int) -> float:
    """Of the learning rate: `factor` for every time that more than `patience` values in a row were not better."""
    sign, best, waited, found = 1 if larger else -1, -math.inf, 0, 1.0
    for value in values:
        better = math.isfinite(value) and (best == -math.inf or sign * value > best + THRESHOLD * abs(best))
        best, waited = (sign * value, 0) if better else (best, waited + 1)
        if waited > patience:
            found, waited = found * factor, 0
    return found
