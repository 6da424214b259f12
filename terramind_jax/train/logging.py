"""Where the metrics of a run go: ``metrics.jsonl``, TensorBoard, Weights & Biases and a progress bar, from process 0 only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm.auto import tqdm

from terramind_jax import files

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 30  # between writes to an object store
PIECE = 1 << 18  # bytes after which a log in an object store goes on in another object


# ---- metrics.jsonl ----


def pieces(folder: epath.Path) -> list[epath.Path]:
    """The files of a log, oldest first: ``metrics.jsonl``, or in an object store ``metrics-STEP.jsonl``, as nothing is appended there."""
    stem, dot, suffix = METRICS.partition(".")
    return sorted(folder.glob(f"{stem}*{dot}{suffix}")) if folder.is_dir() else []


def truncate(path: epath.Path, step: int) -> None:
    """Drops the lines of `path` past `step`, so that a continued run never writes a step twice. A line cut short is dropped too."""
    text, kept = path.read_text(), []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    if not kept:
        path.unlink()
    elif "".join(kept) != text:
        files.write_text(path, "".join(kept))


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics, oldest first."""
    return [json.loads(line) for path in pieces(files.folder(workdir)) for line in path.read_text().splitlines()]


class Lines:
    """A log that goes on after `step`. In an object store its last piece is written anew, once in `FLUSH_SECONDS`, until it is full."""

    def __init__(self, folder: epath.Path, step: int) -> None:
        for path in pieces(folder):
            truncate(path, step)
        self._folder, self._remote = folder, files.is_remote(folder)
        self._file = None if self._remote else Path(folder / METRICS).open("a")
        self._text, self._name, self._unwritten, self._written = "", "", False, time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line: ``{"step": 10, "loss": 9.1, ...}``. A value that is not finite is ``null``."""
        line = json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in scalars.items()}}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._name = self._name if self._text else f"metrics-{step:09d}.jsonl"
        self._text, self._unwritten = self._text + line, True
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """What was written is stored when this returns."""
        if self._unwritten:
            files.write_text(self._folder / self._name, self._text)
            self._unwritten, self._written = False, time.monotonic()
            self._text = self._text if len(self._text) < PIECE else ""

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


# ---- TensorBoard and Weights & Biases ----


class Events:
    """TensorBoard's event files. For an object store they are written here and copied whole, one after the other."""

    def __init__(self, folder: epath.Path, step: int) -> None:
        self._folder = folder / "tensorboard"
        self._local = tempfile.TemporaryDirectory() if files.is_remote(folder) else None
        self._open(step + 1 if step else None)

    def _open(self, purge_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter  # here, as importing it takes longer than the rest of this module

        self._events, self._written = SummaryWriter(self._local.name if self._local else str(self._folder), purge_step), time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        if self._local and time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """What the writer's thread has put down by now; the rest follows with the next flush, at the latest when closing."""
        self._events.flush()
        self._written = time.monotonic()
        if self._local and self._copy() > PIECE:
            self._finish()
            self._open()

    def close(self) -> None:
        self._finish()
        if self._local:
            self._local.cleanup()

    def _finish(self) -> None:
        """Closing alone waits for the writer's thread, so what is copied is copied after it."""
        self._events.close()
        if self._local:
            self._copy()
            next(Path(self._local.name).iterdir()).unlink()

    def _copy(self) -> int:
        """Copies the local event file and returns its size."""
        (path,) = Path(self._local.name).iterdir()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / path.name).write_bytes(data := path.read_bytes())
        return len(data)


class WandB:
    """A run of Weights & Biases of its own for each work directory; a continued one goes on there."""

    def __init__(self, folder: epath.Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError("run.wandb needs Weights & Biases; pip install wandb, or set it to False.") from None
        name, identity = os.fspath(folder), hashlib.sha1(os.fspath(folder).encode()).hexdigest()[:16]
        self._run = wandb.init(project="terramind_jax", name=name, id=identity, resume="allow", config=dict(config))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


# ---- all of them ----


class Writer:
    """Writes scalars of a step to every sink, and shows how far the run is."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        step: int,
        total: int,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        """Continues the metrics of `workdir` after `step`; `total` is the length of the progress bar, `wandb` what W&B is told."""
        self._sinks, self._bar, self._first = [], None, jax.process_index() == 0
        if not self._first:
            return
        folder = files.folder(workdir)
        self._sinks.append(Lines(folder, step))
        if tensorboard:
            self._sinks.append(Events(folder, step))
        if wandb is not None:
            self._sinks.append(WandB(folder, wandb))
        if progress:
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """The metrics of one step, or of a validation after it."""
        scalars = {name: number(value) for name, value in scalars.items()}
        self._each(lambda sink: sink.write(step, scalars))

    def flush(self) -> None:
        """What was written is stored when this returns, so that a checkpoint is never ahead of the log."""
        self._each(lambda sink: sink.flush())

    def _each(self, do: Any) -> None:
        """A sink that fails, such as one that cannot be reached for a moment, does not end the run."""
        for sink in self._sinks:
            try:
                do(sink)
            except Exception as error:
                warnings.warn(f"{type(sink).__name__} of the metrics failed: {error}", stacklevel=3)

    def advance(self, step: int, shown: Mapping[str, str]) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._first:
            tqdm.write(text)

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        if self._bar is not None:
            self._bar.close()


def number(value: Any) -> float | int:
    """A scalar of whatever kind as a Python number."""
    value = np.asarray(value).item()
    return value if isinstance(value, int) else float(value)


def count(n: float) -> str:
    """``15300`` -> ``"15.3k"``."""
    for unit in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"
