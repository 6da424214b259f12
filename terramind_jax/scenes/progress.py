"""How far a scene is."""

from __future__ import annotations

from tqdm.auto import tqdm


def resume(bar: tqdm, count: int) -> None:
    """Moves the start of a bar over what an earlier run has done: that took none of this run's time, and would make its rate too high."""
    if bar.disable:  # it then has no start
        return
    bar.initial += count
    bar.n += count
    bar.last_print_n += count
    bar.refresh()
