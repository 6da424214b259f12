"""The processes of one run: how they find each other, stop together, and tell which of them the others wait for."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # the store of keys and values has no public name, nor has whether devices are up
from jax.experimental import multihost_utils

HEARTBEATS = "terramind_jax/at/"  # folder of the coordinator's store of keys and values: what each process does


def join(coordinator: str | None = None, *, heartbeat_seconds: int = 100) -> None:
    """Joins the processes of a cluster, if there is one; call it before anything touches a device.

    A cluster is one that JAX knows (TPU pod, GKE, SLURM, Open MPI) or one that is described: `coordinator`, ``HOST:PORT`` of process
    0, or ``JAX_COORDINATOR_ADDRESS``, with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` where JAX cannot tell them. A process that is
    silent for `heartbeat_seconds` counts as dead, and all others end. Raises ValueError for a description that is incomplete or late.
    """
    if jax.distributed.is_initialized():
        return
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    described = {"coordinator_address": address, "num_processes": _number("JAX_NUM_PROCESSES"), "process_id": _number("JAX_PROCESS_ID")}
    if address and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"The coordinator is {address!r}; expected HOST:PORT, such as 10.0.0.2:8476.")
    if xla_bridge.backends_are_initialized():  # called from a program that has arranged its devices
        if address:
            raise ValueError(f"This process cannot join others at {address}, as it uses its devices already; join before it does.")
        return
    try:
        jax.distributed.initialize(**described, heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        if set(described.values()) == {None} and "coordinator_address" in str(error):
            return  # no cluster that JAX knows: this process is all
        raise ValueError(
            f"The processes of this run cannot join: {error} Outside of clusters that JAX knows, all of --coordinator=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID are needed."
        ) from error


def several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ValueError(f"{name} is {text!r}; expected a number.")
    return None if text is None else int(text)


def check_agreement(what: Mapping[str, bytes]) -> None:
    """Raises a ValueError, on all processes, for the first of `what`, by name, that is not the same on all of them."""
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(content) for content in what.values()], np.uint32)
    everywhere = multihost_utils.process_allgather(digests)
    for name, column in zip(what, everywhere.T, strict=True):
        others = np.flatnonzero(column != column[0]).tolist()
        if others:
            who, verb = _names(others, len(column)), "has" if len(others) == 1 else "have"
            raise ValueError(f"{who[0].upper()}{who[1:]} {verb} another {name} than process 0; all need the same.")


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether to save and stop before it: after SIGTERM at this process or at any other.

    It is to be asked at every step, for processes agree on one that none has reached yet. SIGTERM does not end the process meanwhile.
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals: a notebook's worker thread goes without
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield lambda step: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


class Watchdog:
    """A thread that reports a step which takes longer than `seconds`, with the processes that the others wait for; 0: none.

    Each process leaves what it does in the coordinator's store, and process 0 reports: at `seconds`, twice, four times as many.
    """

    DOING = ("reads its data", "computes", "saves", "validates")  # in the order in which a process comes to them

    def __init__(self, seconds: float, say: Callable[[str], None] = print) -> None:
        self._seconds, self._say = seconds, say
        self._now = {"step": 0, "doing": self.DOING[0], "since": time.time()}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Says that this process now does one of `DOING` for `step`."""
        self._now = {"step": step, "doing": doing, "since": time.time()}

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()

    def _watch(self) -> None:
        reported, limit = None, self._seconds
        while not self._end.wait(self._seconds / 4):
            now, client = self._now, distributed.global_state.client
            if client is not None:
                client.key_value_set(f"{HEARTBEATS}{jax.process_index()}", json.dumps({**now, "told": time.time()}), allow_overwrite=True)
            if now["step"] != reported:
                reported, limit = now["step"], self._seconds
            if time.time() - now["since"] > limit and jax.process_index() == 0:
                limit *= 2
                all_of_them = client.key_value_dir_get(HEARTBEATS) if client is not None else []
                told = {int(key.rpartition("/")[2]): json.loads(value) for key, value in all_of_them}
                self._say(report(now, told, jax.process_count(), self._seconds))


def report(now: Mapping[str, Any], told: Mapping[int, Mapping[str, Any]], processes: int, seconds: float) -> str:
    """The sentence on a step that takes long, from what this process does and what each of so many has told."""
    text = f"Step {now['step']} has taken {time.time() - now['since']:.0f} s"
    if processes == 1:
        return f"{text}: this process {now['doing']}."
    silent = [p for p in range(processes) if p not in told or time.time() - told[p]["told"] > seconds]
    if silent:
        return f"{text}; waiting for {_names(silent, processes)}, silent for more than {seconds:.0f} s."
    places = {p: (at["step"], Watchdog.DOING.index(at["doing"])) for p, at in told.items()}
    step, doing = behind = min(places.values())
    return f"{text}; waiting for {_names([p for p in told if places[p] == behind], processes)}, at step {step}: {Watchdog.DOING[doing]}."


def _names(some: list[int], processes: int) -> str:
    """``"process 3"``, ``"processes 1, 2"``, ``"all 64 processes"``."""
    if len(some) == processes:
        return f"all {processes} processes"
    shown = ", ".join(map(str, sorted(some)[:8]))
    return f"process {shown}" if len(some) == 1 else f"processes {shown}{' and more' if len(some) > 8 else ''}"
