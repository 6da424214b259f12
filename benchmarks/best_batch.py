"""Looks for the batch size that is fastest in tokens a second, given a function that measures one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

OUT_OF_MEMORY = "out of memory"
NO_TIME = "no time left"

Result = dict[str, Any]  # {"tokens": of a step, "seconds": a step, ...}, or {"failed": why}


def search(measure: Callable[[int], Result], first: int, largest: float, gain: float = 1.02) -> dict[int, Result]:
    """What was measured, by batch size: doubled from `first` on until it fails or tokens/s twice in a row rise by less than `gain`.

    A first batch that does not fit is halved until one does.
    """
    tried, batch, best, stalls = {}, first, 0.0, 0
    while 1 <= batch <= largest and stalls < 2:
        one = tried[batch] = measure(batch)
        if one.get("failed") == OUT_OF_MEMORY and not best:
            batch //= 2
            largest = batch
            continue
        if "failed" in one:
            break
        stalls = stalls + 1 if speed(one) < gain * best else 0
        best = max(best, speed(one))
        batch *= 2
    return tried


def speed(one: Result) -> float:
    """Tokens a second."""
    return one["tokens"] / one["seconds"]


def fastest(tried: Mapping[int, Result]) -> int | None:
    """The batch with most tokens a second, None if all failed."""
    return max((batch for batch, one in tried.items() if "failed" not in one), key=lambda batch: speed(tried[batch]), default=None)


def until(limit: float, measure: Callable[[int], Result], clock: Callable[[], float] = time.monotonic) -> Callable[[int], Result]:
    """`measure`, but NO_TIME for a call that would end after `limit` if it took as long as the one before."""
    last = 0.0

    def one(batch: int) -> Result:
        nonlocal last
        begin = clock()
        if last and begin + last > limit:
            return {"failed": NO_TIME}
        result = measure(batch)
        last = clock() - begin
        return result

    return one
