"""What a run is doing and whether it still does something useful: rates, shares of time, totals, and what has gone wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from terramind_jax.train.logging import Writer, count, number

WINDOW = 100  # steps over which the share of bad samples is averaged


class Meter:
    """Follows a loop: reads the metrics of a step once the next one is dispatched, so that the device never waits for the host.

    `last` holds the newest scalars. Shares are of the time since the last line of the log, validation apart: `data_wait` of waiting for
    data, `checkpoint_block` of waiting until a checkpoint may be written in the background; the rest is computing. `goodput` is the
    part of the time since the run first began, all interruptions included, in which devices computed steps that still count.
    """

    def __init__(
        self,
        writer: Writer,
        summed: Sequence[str],
        kept: Mapping[str, float],
        *,
        log_every: int,
        work: Mapping[str, float],
        samples: int = 0,
        skipped: int = 0,
        max_bad_fraction: float = math.inf,
        reasons: Callable[[], str] = str,
    ) -> None:
        """
        Args:
          summed: metrics to be summed over the run.
          kept: what `counters` gave to the checkpoint with which the run goes on.
          work: what a step does, e.g. ``{"tokens": 2048, "samples": 8, "flops": 1e9}``, and under ``peak`` the devices' FLOP/s.
          samples, skipped: samples consumed and steps skipped so far.
          max_bad_fraction: of the samples of about `WINDOW` steps; past it a ValueError names the `reasons`.
        """
        self.last: dict[str, float] = {}
        self.streak = 0  # steps in a row that were skipped
        self.rewinds = int(kept.get("rewinds", 0))
        self.tries = 0  # rewinds since the last checkpoint
        self._totals = {name: int(kept.get(name, 0)) for name in summed}
        self._began = kept.get("began", time.time())
        self._productive = self._productive_saved = kept.get("productive_seconds", 0.0)
        self._samples, self._skipped = samples, skipped
        self._writer, self._log_every, self._work = writer, log_every, work
        self._max_bad, self._reasons, self._bad = max_bad_fraction, reasons, 0.0
        self._pending: tuple | None = None
        self._unlogged: int | None = None  # the step of `last`, until it is in the log
        self._clock: float | None = None
        self._waiting = 0.0  # for data, since `_clock`
        self._steps, self._seconds, self._waited, self._saving = 0, 0.0, 0.0, 0.0

    def add(self, step: int, metrics: Mapping[str, Any], waited: float) -> None:
        """Takes the metrics of a step just dispatched, which waited so many seconds for its data, and reads those of the one before."""
        self._waiting += waited
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads the metrics still outstanding; a ValueError if too many samples cannot be read."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: number(value) for name, value in jax.device_get(metrics).items()}
        self._samples += self._work["samples"]
        self._totals = {name: total + metrics[name] for name, total in self._totals.items()}
        useful, self._skipped = metrics["skipped"] == self._skipped, metrics["skipped"]
        self.streak = 0 if useful else self.streak + 1
        self._time(useful)
        self.last = {**metrics, **self._totals, "samples": self._samples, "rewinds": self.rewinds, **self._rates()}
        self._unlogged = step
        if step % self._log_every == 0:
            self.log()
        self._writer.advance(step, _shown(self.last))
        self._check_samples(step, metrics["bad"])

    def log(self) -> None:
        """Writes the newest step that was read to the log, if it is not there: the last of a run, whatever its number."""
        if self._unlogged is None:
            return
        self._writer.write(self._unlogged, self.last)
        self._unlogged = None
        self._steps, self._seconds, self._waited, self._saving = 0, 0.0, 0.0, 0.0

    @contextmanager
    def aside(self, saving: bool = False) -> Iterator[None]:
        """What happens within is no part of a step; if it is `saving`, it is what a checkpoint holds up."""
        self.flush()
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        if self._clock is not None:
            self._clock = now
            self._saving += now - start if saving else 0.0

    def counters(self) -> dict[str, float]:
        """What a checkpoint written now keeps for the next start."""
        self._productive_saved = self._productive
        self.tries = 0 if not self.streak else self.tries
        return {**self._totals, "rewinds": self.rewinds, "began": self._began, "productive_seconds": self._productive}

    def rewound(self) -> None:
        """The run went back to its last checkpoint: what it learned since no longer counts."""
        self.streak, self.rewinds, self.tries, self._productive = 0, self.rewinds + 1, self.tries + 1, self._productive_saved

    def _time(self, useful: bool) -> None:
        now = time.perf_counter()
        if self._clock is not None:  # a first step compiles: its time says nothing
            seconds = now - self._clock
            self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + seconds, self._waited + self._waiting
            self._productive += seconds - self._waiting if useful else 0.0
        self._clock, self._waiting = now, 0.0

    def _rates(self) -> dict[str, float]:
        if not self._steps:
            return {}
        seconds, all_seconds = self._seconds / self._steps, self._seconds + self._saving
        unit = next(iter(self._work))
        rates = {
            "step_seconds": seconds,
            f"{unit}_per_second": self._work[unit] / seconds,
            "data_wait": self._waited / all_seconds,
            "checkpoint_block": self._saving / all_seconds,
            "goodput": self._productive / max(time.time() - self._began, 1e-9),
        }
        if self._work["peak"]:
            rates["mfu"] = self._work["flops"] / seconds / self._work["peak"]
        return {**rates, **_memory()}

    def _check_samples(self, step: int, bad: float) -> None:
        self._bad += (bad / self._work["samples"] - self._bad) / WINDOW
        if self._bad > self._max_bad:
            raise ValueError(
                f"{100 * self._bad:.0f} % of the samples of the last {WINDOW} steps, to step {step}, could not be read, more than "
                f"run.max_bad_fraction={self._max_bad:g}: {self._reasons()}"
            )


def _memory() -> dict[str, float]:
    """The most bytes that a device of this process has held; CPUs do not tell."""
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if "peak_bytes_in_use" in (stats := d.memory_stats() or {})]
    return {"memory_bytes": max(peaks)} if peaks else {}


def _shown(scalars: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar says."""
    shown = {"loss": f"{scalars['loss']:.4f}"}
    for name, value in scalars.items():
        if name.endswith("_per_second"):
            shown[f"{name.removesuffix('_per_second')}/s"] = count(value)
        elif name in ("mfu", "data_wait"):
            shown[name] = f"{100 * value:.0f}%"
        elif name in ("skipped", "bad", "overflow") and value:
            shown[name] = count(value)
    return shown
