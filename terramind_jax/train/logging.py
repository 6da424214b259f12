"""Metrics of a run: ``metrics.jsonl``, TensorBoard event files and a progress bar, all on process 0 only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

METRICS = "metrics.jsonl"
PATIENCE = 100  # steps in a row that may be skipped


def truncate(path: Path, step: int) -> None:
    """Drops the lines of `path` past `step`, so that a continued run never writes a step twice. A line cut short is dropped too."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, oldest first."""
    return [json.loads(line) for line in (Path(workdir) / METRICS).read_text().splitlines()]


class Writer:
    """Writes scalars of a step to every sink. A value that is not finite is ``null`` in JSON."""

    def __init__(self, workdir: str | Path, *, step: int, total: int, tensorboard: bool = True, progress: bool = True) -> None:
        """Continues the metrics of `workdir` after `step`; `total` is the length of the progress bar."""
        self._lines = self._events = self._bar = None
        if jax.process_index():
            return
        path = Path(workdir) / METRICS
        if path.is_file():
            truncate(path, step)
        self._lines = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter  # here, as importing it takes longer than the rest of this module

            self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)
        if progress:
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One line: ``{"step": 10, "loss": 9.1, ...}``."""
        if self._lines is None:
            return
        scalars = {name: _number(value) for name, value in scalars.items()}
        self._lines.write(json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in scalars.items()}}) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in scalars.items():
                if math.isfinite(value):
                    self._events.add_scalar(name, value, step)

    def advance(self, step: int, shown: Mapping[str, str]) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._lines is not None:
            tqdm.write(text)

    def close(self) -> None:
        for sink in (self._lines, self._events, self._bar):
            if sink is not None:
                sink.close()


class Meter:
    """Follows a loop: reads the metrics of a step once the next one is dispatched, so that the device never waits for the host.

    `totals` sums the metrics named in it over the run; `last` holds the newest scalars.
    """

    def __init__(self, writer: Writer, totals: Mapping[str, int], *, log_every: int, work: Mapping[str, float]) -> None:
        """`work` is what a step does, e.g. ``{"tokens": 2048, "flops": 1e9}``, and under ``peak`` the devices' FLOP/s."""
        self.totals, self.last = dict(totals), {}
        self._writer, self._log_every, self._work = writer, log_every, work
        self._pending: tuple | None = None
        self._clock: float | None = None
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._skipped = 0  # steps in a row

    def add(self, step: int, metrics: Mapping[str, Any], waited: float) -> None:
        """Takes the metrics of a step just dispatched, which waited so many seconds for its data, and reads those of the one before."""
        self.flush()
        self._pending = (step, metrics, waited)

    def flush(self) -> None:
        """Reads the metrics still outstanding; a ValueError once `PATIENCE` steps in a row have been skipped."""
        if self._pending is None:
            return
        step, metrics, waited = self._pending
        self._pending = None
        metrics = {name: _number(value) for name, value in jax.device_get(metrics).items()}
        self._time(waited)
        for name in self.totals:
            self.totals[name] += metrics[name]
        self.last = {**metrics, **self.totals, **self._rates()}
        if step % self._log_every == 0:
            self._writer.write(step, self.last)
            self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._writer.advance(step, _shown(self.last))
        self._skipped = 0 if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]) else self._skipped + 1
        if self._skipped >= PATIENCE:
            raise ValueError(
                f"The loss or its gradient was not finite in the last {PATIENCE} steps, to step {step}, and nothing was learned; lower "
                "optimizer.learning_rate, set optimizer.clip_norm, or look for wrong values with `terramind-jax data check`."
            )

    def pause(self) -> None:
        """What follows until the next step is no part of its time."""
        self.flush()
        self._clock = None

    def _time(self, waited: float) -> None:
        now = time.perf_counter()
        if self._clock is not None:  # a first step compiles: its time says nothing
            self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + now - self._clock, self._waited + waited
        self._clock = now

    def _rates(self) -> dict[str, float]:
        if not self._steps:
            return {}
        seconds = self._seconds / self._steps
        unit = next(iter(self._work))
        rates = {"step_seconds": seconds, f"{unit}_per_second": self._work[unit] / seconds, "data_wait": self._waited / self._seconds}
        if self._work["peak"]:
            rates["mfu"] = self._work["flops"] / seconds / self._work["peak"]
        return rates


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


def _number(value: Any) -> float | int:
    value = np.asarray(value).item()
    return value if isinstance(value, int) else float(value)


def count(n: float) -> str:
    """``15300`` -> ``"15.3k"``."""
    for unit in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"
