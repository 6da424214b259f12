"""Orbax checkpoints of a training run: asynchronous, sharded, atomic, the newest few kept.

A checkpoint is a folder ``{workdir}/checkpoints/{step}`` with one Orbax item for each of ``params``, ``buffers``, ``opt_state``, ``ema``
and ``batch_stats``, those that there are, and the counters as JSON, so that the weights load without the optimiser. An interrupted write
leaves only a temporary folder, which the next start removes. One with a file missing or cut short is passed over for the one before;
whether all bits of a file are right is left to the storage.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from terramind_jax import files

FOLDER = "checkpoints"
COUNTERS = "counters"

RETRY_SECONDS = 1.0
TREES = ("params", "buffers", "opt_state", "ema", "batch_stats")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """Replicas share the writing of large arrays; Orbax would slice the small ones too, and compile for every shape of them."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {COUNTERS: ocp.JsonCheckpointHandler(), **{name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in TREES}}


class Checkpoints:
    """The checkpoints of one work directory, on all processes together."""

    def __init__(self, workdir: str | os.PathLike, keep: int | None = None) -> None:
        """Opens them; with `keep`, for writing, and all but that many of the newest are deleted as new ones come."""
        self._folder, self._writes = files.folder(workdir) / FOLDER, bool(keep)
        # Temporary folders are what a killed run was writing.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=self._writes, cleanup_tmp_directories=self._writes)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, trees: Mapping[str, Any], counters: Mapping[str, float]) -> None:
        """Starts writing `trees` (pytrees of arrays by name, of `TREES`) and `counters`; returns once the arrays may be donated."""
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, **{COUNTERS: ocp.args.JsonSave(dict(counters))}))
        if jax.default_backend() == "cpu":  # there a host copy may be the device's own memory, which the next step overwrites
            self._manager.wait_until_finished()

    def restore(self, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """The trees named in `abstract` (``ShapeDtypeStruct`` leaves, with the shardings to restore to) and the counters.

        From the newest checkpoint that can be read; a warning names each newer one, and if these are open for writing it is deleted, so
        that the run may come to its step again. Raises the error of the newest if none can be read.
        """
        self._manager.wait_until_finished()
        failed: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored, error = self._try(step, abstract)
            if _everywhere(error is None):
                for damaged, why in failed.items():
                    self._give_up(damaged, why, step)
                return restored
            failed[step] = error or ValueError("another process cannot read it")
        raise failed[max(failed)]

    def _try(self, step: int, abstract: Mapping[str, Any]) -> tuple[Any, Exception | None]:
        """What `_read` gives, or the error; a second time before that, as a storage may fail for a moment."""
        for attempt in (1, 2):
            try:
                return self._read(step, abstract), None
            except Exception as damage:  # whatever it leads to
                error = damage
            time.sleep(RETRY_SECONDS if attempt == 1 else 0)
        return None, error

    def _read(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """By the handlers alone: the manager would leave the other processes waiting for one that fails."""
        folder, handlers = self._folder / str(step), _handlers()
        trees = {}
        for name, tree in abstract.items():
            args = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            trees[name] = handlers[name].restore(folder / name, args=args)
        return trees, handlers[COUNTERS].restore(folder / COUNTERS, args=ocp.args.JsonRestore())

    def _give_up(self, step: int, why: Exception, instead: int) -> None:
        reason = " ".join(str(why).split())[:200]
        warnings.warn(
            f"The checkpoint {self._folder / str(step)} cannot be read ({type(why).__name__}: {reason}); step {instead} is used instead.",
            stacklevel=4,
        )
        if self._writes:
            self._manager.delete(step)

    def items(self) -> set[str]:
        """Names of the trees in the newest checkpoint."""
        path = self._folder / str(self.latest())
        return {child.name for child in path.iterdir() if child.is_dir()} - {COUNTERS}

    def close(self) -> None:
        """Waits for the write in progress."""
        self._manager.wait_until_finished()
        self._manager.close()


def _everywhere(ok: bool) -> bool:
    """Whether `ok` holds on all processes."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())


def saved(workdir: str | os.PathLike) -> Checkpoints | None:
    """The checkpoints of a work directory, opened for reading and to be closed; None if none is complete. All processes ask together."""
    if not _everywhere((files.folder(workdir) / FOLDER).is_dir()):  # one alone could see the folder that another makes next
        return None
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest() is not None:
        return checkpoints
    checkpoints.close()
    return None


def is_begun(workdir: str | os.PathLike) -> bool:
    """Whether a work directory has a checkpoint to go on from. All processes ask together."""
    there = saved(workdir)
    if there is not None:
        there.close()
    return there is not None


def load_variables(workdir: str | os.PathLike, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a finished or running training, ``params``, averaged if it keeps an average, ``buffers``, and what else it has.

    `abstract` gives their shapes, as `jax.eval_shape` of the module's unboxed initialisation does.
    """
    checkpoints = saved(workdir)
    if checkpoints is None:
        raise FileNotFoundError(f"{workdir} has no complete checkpoint.")
    try:
        weights = "ema" if "ema" in checkpoints.items() else "params"
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(abstract))
        trees, _ = checkpoints.restore({weights: placed.pop("params"), **placed})
        return {"params": trees.pop(weights), **trees}
    finally:
        checkpoints.close()


class Terminated(Exception):
    """A run stopped at SIGTERM after saving; its message says how to go on."""
