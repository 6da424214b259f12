"""A live table of a training run, read from its work directory alone: any machine that sees it will do, and no device is touched."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from etils import epath

from terramind_jax import config as configuration
from terramind_jax import files
from terramind_jax.checkpoint import FOLDER
from terramind_jax.data import faults
from terramind_jax.train import pretrain
from terramind_jax.train.logging import METRICS, count, pieces

TAIL = 1 << 18  # bytes at the end of the log that are read: some hundred lines, so also the last validation
CLEAR = "\x1b[H\x1b[J"  # a terminal's cursor to the top left, and the rest wiped


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a work directory tells at one moment.

    `metrics` holds the newest value of each name, `earlier` what it was before the last training step that is logged; None stands for
    a value that is not finite.
    """

    workdir: str
    step: int
    steps: int | None  # at its end
    metrics: Mapping[str, float | None]
    earlier: Mapping[str, float | None]
    interval: int  # steps between the newest lines
    age: float  # seconds since the log was written
    checkpoint: tuple[int, float] | None  # step of the newest one, and seconds since it was complete
    bad: Mapping[str, int]  # samples listed as bad, by reason


def watch(workdir: str | os.PathLike, *, every: float = 10.0, once: bool = False) -> int:
    """Prints the table of a run every so many seconds until it has ended, or once; 1 if it was once and there is no log yet."""
    shown = before = None
    try:
        while True:
            now = read(workdir)
            if now is not None and (shown is None or now.step != shown.step):
                before, shown = shown, now
            text = f"waiting for {os.fspath(workdir)}/{METRICS}" if now is None else table(now, before.metrics if before else now.earlier)
            print(f"{CLEAR if sys.stdout.isatty() and not once else ''}{text}\n", flush=True)
            if once:
                return int(now is None)
            if now is not None and now.step == now.steps:
                return 0
            time.sleep(every)
    except KeyboardInterrupt:
        return 0


# ---- what is read ----


def read(workdir: str | os.PathLike, now: float | None = None) -> Snapshot | None:
    """The newest state of a run at the time `now`, by default the present; None if its log has no whole line yet."""
    # Else a bucket's listings are kept for good, and a later look would see what the first one saw.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    folder, now = files.folder(workdir), time.time() if now is None else now
    log = pieces(folder)
    lines = _lines(log)
    if not lines:
        return None
    checkpoint = _checkpoint(folder / FOLDER)
    metrics, steps = _newest(lines), sorted({line["step"] for line in lines})
    trained = [i for i, line in enumerate(lines) if "loss" in line] or [0]
    return Snapshot(
        workdir=os.fspath(workdir),
        step=steps[-1],
        steps=_steps(workdir, steps[-1], metrics.get("samples")),
        metrics=metrics,
        earlier=_newest(lines[: trained[-1]]),
        interval=steps[-1] - steps[-2] if len(steps) > 1 else 0,
        age=now - max(file.stat().mtime for file in log),
        checkpoint=checkpoint and (checkpoint[0], now - checkpoint[1]),
        bad=faults.counts(workdir),
    )


def _lines(log: list[epath.Path]) -> list[dict[str, Any]]:
    """The last lines of a log, which may be long, by step; of a step that stands in two of its pieces the later one counts."""
    lines, size = [], 0
    for file in reversed(log):
        text = _tail(file, TAIL - size)
        lines = [*_parsed(text), *lines]
        size += len(text)
        if size >= TAIL:
            break
    return sorted(lines, key=lambda line: line["step"])


def _tail(file: epath.Path, size: int) -> bytes:
    """The last `size` bytes, from the start of a line."""
    with file.open("rb") as f:
        f.seek(0, os.SEEK_END)
        start = max(0, f.tell() - size)
        f.seek(start)
        text = f.read()
    return text.partition(b"\n")[2] if start else text


def _parsed(text: bytes) -> Iterator[dict[str, Any]]:
    """A line that is only half written is left for the next time."""
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
            yield parsed


def _newest(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    return {name: value for line in lines for name, value in line.items()}


def _steps(workdir: str | os.PathLike, step: int, samples: float | None) -> int | None:
    """The last step of the run, which after `step` has consumed `samples`: its batch may have been another one before."""
    try:
        config = configuration.of_workdir(workdir)
    except FileNotFoundError:
        return None
    if "mask" in config:
        total = pretrain.total_samples(config)
    else:
        total = config.train.steps * config.train.batch_size or math.ceil(config.train.total_samples)
    batch = config.train.batch_size
    return math.ceil(total / batch) if samples is None else step + max(0, math.ceil((total - samples) / batch))


def _checkpoint(folder: epath.Path) -> tuple[int, float] | None:
    """Step of the newest checkpoint that is complete, and when it was."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    for step in sorted(steps, reverse=True):
        path = folder / str(step) / "_CHECKPOINT_METADATA"
        done = json.loads(path.read_text()).get("commit_timestamp_nsecs") if path.exists() else None
        if done:
            return step, done / 1e9
    return None


# ---- what is shown ----


def table(now: Snapshot, before: Mapping[str, float | None]) -> str:
    """The table as text; losses with their change since `before`, metrics by name."""
    rows = [
        ("step", _progress(now)),
        ("time left", _left(now)),
        ("speed", _speed(now.metrics)),
        ("step time", _step_time(now.metrics)),
        ("gradient", _gradient(now.metrics)),
        ("skipped", _skipped(now.metrics)),
        ("bad samples", "   ".join(f"{n:,} {reason}" for reason, n in now.bad.items()) or "none listed"),
        ("memory", _memory(now.metrics)),
        ("held out", _probed(now.metrics)),
        ("checkpoint", "none yet" if now.checkpoint is None else f"step {now.checkpoint[0]:,}   {duration(now.checkpoint[1])} ago"),
    ]
    head = f"{now.workdir}   {_freshness(now)}"
    return "\n".join([head, "", *(f"{name:<12s}{text}" for name, text in rows), "", *_losses(now.metrics, before)])


def _progress(now: Snapshot) -> str:
    return f"{now.step:,} of {now.steps:,}   {_percent(now.step / now.steps)}" if now.steps else f"{now.step:,}"


def _left(now: Snapshot) -> str:
    seconds = now.metrics.get("step_seconds")
    return duration((now.steps - now.step) * seconds) if now.steps and seconds else "-"


def _freshness(now: Snapshot) -> str:
    """When the log was written, that the run has ended, or that this is long ago if it is."""
    if now.step == now.steps:
        return f"ended {duration(now.age)} ago"
    due = 60 + 3 * now.interval * (now.metrics.get("step_seconds") or 0)
    return f"nothing new for {duration(now.age)}" if now.age > due else f"{duration(now.age)} ago"


def _speed(metrics: Mapping[str, float | None]) -> str:
    rates = [(name.removesuffix("_per_second"), value) for name, value in metrics.items() if name.endswith("_per_second")]
    parts = [f"{count(value)} {unit}/s" for unit, value in rates if value is not None]
    return "   ".join([*parts, f"MFU {_percent(metrics.get('mfu'))}", f"goodput {_percent(metrics.get('goodput'))}"])


def _step_time(metrics: Mapping[str, float | None]) -> str:
    """The share that is neither waiting for data nor held up by a checkpoint is computing."""
    seconds, data, saving = (metrics.get(name) for name in ("step_seconds", "data_wait", "checkpoint_block"))
    if not seconds:
        return "-"
    compute = None if data is None else 1 - data - (saving or 0)
    return f"{seconds:.3g} s   compute {_percent(compute)}   data wait {_percent(data)}   checkpoint {_percent(saving)}"


def _skipped(metrics: Mapping[str, float | None]) -> str:
    names = {"bad": "samples", "overflow": "patches", "skipped": "steps"}
    parts = [f"{metrics[name]:,} {what}" for name, what in names.items() if metrics.get(name) is not None]
    if metrics.get("rewinds"):
        parts.append(f"back to a checkpoint: {metrics['rewinds']}")
    return "   ".join(parts) or "-"


def _gradient(metrics: Mapping[str, float | None]) -> str:
    """Its norm, in all and by part of the model, and the learning rate."""
    norms = [("norm", metrics.get("grad_norm"))]
    norms += [(name.removeprefix("grad_norm/"), value) for name, value in metrics.items() if name.startswith("grad_norm/")]
    rate = metrics.get("learning_rate")
    parts = [f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in [*norms, ("learning rate", rate)]]
    return "   ".join(parts)


def _memory(metrics: Mapping[str, float | None]) -> str:
    """The most that a device has held; a CPU does not tell."""
    held = metrics.get("memory_bytes")
    return "-" if held is None else f"{held / 2**30:.2f} GiB a device"


def _probed(metrics: Mapping[str, float | None]) -> str:
    """What `train.probe` found: tokens generated right, and scenes whose land cover their nearest neighbours tell."""
    begin = "val/generated/"
    parts = [f"{name.removeprefix(begin)} {_percent(value)}" for name, value in sorted(metrics.items()) if name.startswith(begin)]
    parts = [f"generated right: {', '.join(parts)}"] if parts else []
    if "val/knn" in metrics:
        parts.append(f"k-NN {_percent(metrics['val/knn'])}, the most common class {_percent(metrics.get('val/knn_majority'))}")
    return "   ".join(parts) or "-"


def _losses(metrics: Mapping[str, float | None], before: Mapping[str, float | None]) -> list[str]:
    names = sorted({name.removeprefix("val/") for name in metrics if name.removeprefix("val/").split("/")[0] == "loss"})
    lines = [f"{'loss':<12s}{'now':>10s}{'change':>10s}{'validation':>12s}"]
    for name in names:
        value, old, held_out = metrics.get(name), before.get(name), metrics.get(f"val/{name}")
        change = f"{value - old:+.4f}" if value is not None and old is not None else "-"
        lines.append(f"{name.removeprefix('loss').lstrip('/') or 'all':<12s}{_number(value):>10s}{change:>10s}{_number(held_out):>12s}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def duration(seconds: float) -> str:
    """``93784`` -> ``"1 d 2 h"``."""
    seconds = max(0, round(seconds))
    for length, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit} {seconds % length // smaller} {part}"
    return f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
