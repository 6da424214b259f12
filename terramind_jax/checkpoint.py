"""Orbax checkpoints of a training run: asynchronous, sharded, atomic, the newest few kept.

A checkpoint is a folder ``{workdir}/checkpoints/{step}`` with one Orbax item for each of ``params``, ``buffers``, ``opt_state``
and ``ema`` and the counters as JSON, so that the weights load without the optimiser. An interrupted write leaves only a temporary
folder, which the next start removes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

FOLDER = "checkpoints"
COUNTERS = "counters"

TREES = ("params", "buffers", "opt_state", "ema")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """Replicas share the writing of large arrays; Orbax would slice the small ones too, and compile for every shape of them."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {COUNTERS: ocp.JsonCheckpointHandler(), **{name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in TREES}}


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: str | Path, keep: int | None = None) -> None:
        """Opens them; with `keep`, for writing, and all but that many of the newest are deleted as new ones come."""
        folder = epath.Path(os.path.abspath(workdir) if "://" not in str(workdir) else workdir) / FOLDER
        if keep and folder.is_dir() and jax.process_index() == 0:
            for path in folder.iterdir():  # what a killed run was writing
                if ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=bool(keep))
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=_handlers())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, trees: Mapping[str, Any], counters: Mapping[str, int]) -> None:
        """Starts writing `trees` (pytrees of arrays by name, of `TREES`) and `counters`; returns once the arrays may be donated."""
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, **{COUNTERS: ocp.args.JsonSave(dict(counters))}))
        if jax.default_backend() == "cpu":  # there a host copy may be the device's own memory, which the next step overwrites
            self._manager.wait_until_finished()

    def restore(self, abstract: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, int]]:
        """The trees named in `abstract` (``ShapeDtypeStruct`` leaves, with the shardings to restore to) and the counters."""
        step = self.latest() if step is None else step
        items = {
            name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in abstract.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{COUNTERS: ocp.args.JsonRestore()}))
        return {name: restored[name] for name in abstract}, restored[COUNTERS]

    def items(self) -> set[str]:
        """Names of the trees in the newest checkpoint."""
        path = self._manager.directory / str(self.latest())
        return {child.name for child in path.iterdir() if child.is_dir()} - {COUNTERS}

    def close(self) -> None:
        """Waits for the write in progress."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_variables(workdir: str | Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Variables ``{"params", "buffers"}`` of a finished or running training, averaged weights if it keeps an average.

    `abstract` gives their shapes, as `jax.eval_shape` of the module's unboxed initialisation does.
    """
    checkpoints = Checkpoints(workdir) if (Path(workdir) / FOLDER).is_dir() else None
    if checkpoints is None or checkpoints.latest() is None:
        raise FileNotFoundError(f"{workdir} has no complete checkpoint.")
    try:
        weights = "ema" if "ema" in checkpoints.items() else "params"
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(abstract))
        trees, _ = checkpoints.restore({weights: placed["params"], "buffers": placed["buffers"]})
        return {"params": trees[weights], "buffers": trees["buffers"]}
    finally:
        checkpoints.close()


class Terminated(Exception):
    """A run stopped at SIGTERM after saving; its message says how to go on."""


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, so that a loop can save and stop between two steps."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals: a notebook's worker thread goes without
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
