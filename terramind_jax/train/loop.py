"""The loop that both trainings share: steps, checkpoints and validations, and what is done when something goes wrong.

A run killed at any moment goes on with the same data and the same numbers; SIGTERM at any process saves first. A step that would spoil
the parameters is skipped (`state.apply`), and after `run.patience` in a row the run goes back to its last checkpoint and on with other
data. Samples that cannot be read have weight zero and are listed in the work directory, until they are too many. A stalled step is
reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax import declarations, files, modalities, processes, sharding
from terramind_jax.checkpoint import Checkpoints, Terminated
from terramind_jax.data import scan
from terramind_jax.data.faults import Faults
from terramind_jax.data.index import Index
from terramind_jax.train import state
from terramind_jax.train.logging import Writer
from terramind_jax.train.meter import Meter

DATA = "data.json"  # which samples a run is trained on


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop needs to know of that which it trains."""

    title: str
    total: int  # samples of the whole run
    work: Mapping[str, float]  # of a step, see `Meter`
    summed: tuple[str, ...]  # metrics to be summed over the run
    step: Callable[..., tuple[state.State, Mapping[str, jax.Array]]]  # jitted: state, buffers, batch -> state, metrics
    batches: Callable[[int], Iterator[Mapping[str, jax.Array]]]  # from a position in the data
    validate: Callable[[state.State, Any], dict[str, float]] | None
    faults: Faults = dataclasses.field(default_factory=Faults)  # the samples that could not be read
    validate_first: bool = False  # also before the first step
    is_over: Callable[[], bool] = lambda: False  # whether validations say that going on would not help


def with_modalities(config: ConfigDict, names: Iterable[str]) -> ConfigDict:
    """The configuration with the declarations of those of `names` that are a user's own, from itself or beside the shards.

    So a checkpoint knows them. Raises ValueError for one without statistics.
    """
    declarations.declare(config.modalities, "config.modalities")
    if config.data.root:
        scan.declare(config.data.root)
    for name in sorted(own := declarations.of(names)):
        modalities.statistics(name)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.modalities = ConfigDict(own)
    return config.lock()


def run(
    training: Training,
    config: ConfigDict,
    workdir: str | os.PathLike,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    train_state: state.State,
    buffers: Any,
    kept: Mapping[str, float],
) -> dict[str, float]:
    """Trains to the end from what `state.start` gave, closes `checkpoints`, and returns the last metrics.

    Raises `Terminated` after a SIGTERM, ValueError when too many samples cannot be read or too many steps come to nothing.
    """
    run, step, samples = config.run, int(train_state.step), state.consumed(train_state.samples)
    steps = step if training.is_over() else step + max(0, math.ceil((training.total - samples) / config.train.batch_size))
    wandb = config.to_dict() if run.wandb else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpoints))
        writer = Writer(workdir, step=step, total=steps, tensorboard=run.tensorboard, wandb=wandb, progress=run.progress)
        stack.enter_context(contextlib.closing(writer))
        stack.callback(training.faults.flush)
        writer.say(f"{training.title}, step {step} of {steps}, {training.work['samples']} samples a step")
        meter = follow(training, run, writer, train_state, kept)
        preempted = stack.enter_context(processes.preemption())
        watchdog = stack.enter_context(processes.Watchdog(run.stall_seconds, writer.say))
        trace = stack.enter_context(contextlib.closing(Trace(run.profile, workdir, meter.flush)))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(sharding.RULES))

        def save() -> None:
            watchdog.at(step, "saves")
            with meter.aside(saving=True):
                writer.flush()
                training.faults.flush()
                state.save(checkpoints, train_state, buffers, meter.counters())

        if training.validate_first and step == 0 and training.validate is not None:
            watchdog.at(step, "validates")
            writer.write(step, training.validate(train_state, buffers))
        data, validated = training.batches(samples), {}
        while step < steps and not preempted(step):
            # ---- One step ----
            trace.at(step)
            watchdog.at(step + 1, "reads its data")
            start = time.perf_counter()
            batch = next(data)
            waited = time.perf_counter() - start
            watchdog.at(step + 1, "computes")
            with jax.transfer_guard("disallow"):  # all that the step needs is on the devices; what is not would be copied at every step
                train_state, metrics = training.step(train_state, buffers, batch)
            step += 1
            meter.add(step, metrics, waited)
            if training.step._cache_size() > 1:
                raise RuntimeError(f"The training step was compiled again at step {step}: a shape or a sharding has changed.")

            # ---- Steps in a row that came to nothing ----
            if meter.streak >= run.patience:
                train_state = rewind(meter, run, step, checkpoints, train_state, buffers)
                writer.say(f"{run.patience} steps in a row were skipped, to step {step}: back to the last checkpoint, with other data.")

            # ---- Validation and checkpoint, which knows what the validation was ----
            validates = training.validate is not None and (step == steps or run.eval_every and step % run.eval_every == 0)
            if validates:
                watchdog.at(step, "validates")
                with meter.aside():
                    validated = training.validate(train_state, buffers)
                if training.is_over():
                    writer.say(f"Ends at step {step} of {steps}: the validation has not become better for long enough.")
                    steps = step
            if step == steps:
                meter.flush()
                meter.log()
            if validates:
                writer.write(step, validated)
            if step == steps or step % run.checkpoint_every == 0:
                meter.flush()
                if step == steps or not meter.streak:  # else the parameters may be what is wrong
                    save()

        # ---- End ----
        meter.flush()
        if meter.streak:
            writer.say(f"The last {meter.streak} steps were skipped: their loss or gradient was not finite, or far above its mean.")
        if step < steps:
            save()
    if step < steps:
        raise Terminated(f"Stopped by SIGTERM at step {step} of {steps}; the checkpoint is saved and the same command goes on from it.")
    return {"step": step, **meter.last, **validated}


def check_agreement(config: ConfigDict, index: Index, validation: Index | None) -> None:
    """A ValueError unless all processes of a run have one configuration and one list of samples: else they would wait for each other."""
    agree(config, {"training index": _digest(index), "validation index": _digest(validation)})


def agree(config: ConfigDict, contents: Mapping[str, bytes]) -> None:
    """As `check_agreement`, of any contents by name."""
    processes.check_agreement({"configuration": _shared(config), **contents})


def _shared(config: ConfigDict) -> bytes:
    """What of a configuration all processes must have; each may find the data elsewhere."""
    config = config.copy_and_resolve_references().unlock()
    for field in {"root", "tokens", "tokenizers"} & set(config.data):
        del config.data[field]
    return configuration.to_json(config).encode()


def bind_data(index: Index, workdir: str | os.PathLike, *, tokens: bool = True, write: bool = True) -> None:
    """Ties `workdir` to its training samples: a ValueError for others, among which a position would mean another sample.

    `tokens` is False where none are read: they may be made in between. `write` is False on all processes but the first.
    """
    path = files.folder(workdir) / DATA
    own = {"samples": len(index), "digest": _digest(index, tokens).hex()}
    if path.exists() and (old := json.loads(path.read_text())) != own:
        raise ValueError(
            f"{workdir} is trained on {old['samples']} samples, and the {own['samples']} of config.data.root differ from them in keys, "
            f"modalities{' or tokens' * tokens}; continue with the same shards, or delete {path} to go on with these, ordered anew."
        )
    if write:
        files.write_text(path, json.dumps(own))


@functools.lru_cache(maxsize=2)  # millions of keys, which are asked for by the hosts' agreement and by the work directory
def _digest(index: Index | None, tokens: bool = True) -> bytes:
    """Changes with what decides the order of samples and with what is known of each, its tokens as far as they matter."""
    if index is None:
        return b""
    keys = hashlib.sha256(np.ascontiguousarray(index.keys.raw(slice(None)))).digest()
    return hashlib.sha256(keys + np.column_stack([index.available, index.has_tokens & tokens, index.subset]).tobytes()).digest()


def follow(training: Training, run: ConfigDict, writer: Writer, train_state: state.State, kept: Mapping[str, float]) -> Meter:
    """The meter of a run that goes on from `train_state`."""
    return Meter(
        writer,
        training.summed,
        kept,
        log_every=run.log_every,
        work=training.work,
        samples=state.consumed(train_state.samples),
        skipped=int(train_state.skipped),
        max_bad_fraction=run.max_bad_fraction,
        reasons=training.faults.reasons,
    )


def rewind(meter: Meter, run: ConfigDict, step: int, checkpoints: Checkpoints, train_state: state.State, buffers: Any) -> state.State:
    """The last checkpoint's parameters after too many skipped steps; a ValueError if that would not help."""
    with meter.aside():
        check_rewind(meter, run, step, checkpoints.latest())
        train_state = state.rewind(checkpoints, train_state, buffers)
    meter.rewound()
    return train_state


def check_rewind(meter: Meter, run: ConfigDict, step: int, latest: int | None) -> None:
    """A ValueError if going back has not helped or there is nothing to go back to."""
    if latest is not None and meter.tries < run.rewinds:
        return
    tried = f", also after going back {meter.tries} times" if meter.tries else ""
    raise ValueError(
        f"The loss or its gradient was not finite, or far above its mean, in the last {run.patience} steps, to step {step}{tried}, and "
        "nothing was learned; lower optimizer.learning_rate, set optimizer.clip_norm, or look for wrong values with "
        "`terramind-jax data check`."
    )


class Trace:
    """Writes the trace of some steps, ``"START:STOP"``, to ``{workdir}/profile``, on process 0; an empty string: none."""

    def __init__(self, profile: str, workdir: str | os.PathLike, finish: Callable[[], None]) -> None:
        """`finish` waits for the steps that are under way."""
        self._interval = configuration.interval(profile) if jax.process_index() == 0 else None
        self._target, self._finish, self._local = files.folder(workdir) / "profile", finish, None

    def at(self, step: int) -> None:
        """Begins or ends, before the step after `step`."""
        if self._interval and self._local is None and self._interval[0] <= step < self._interval[1]:
            self._finish()
            self._local = tempfile.TemporaryDirectory()  # the profiler knows no object stores
            jax.profiler.start_trace(self._local.name)
        elif self._local is not None and step >= self._interval[1]:
            self._finish()
            self.close()

    def close(self) -> None:
        self._interval = None
        if self._local is None:
            return
        with self._local as name:
            jax.profiler.stop_trace()
            for path in (p for p in Path(name).rglob("*") if p.is_file()):
                copy = self._target / path.relative_to(name).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        self._local = None
