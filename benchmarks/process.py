"""What the benchmarks share: one process a measurement, and the machine's name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# How JAX, PyTorch and their libraries say it.
TOO_LITTLE_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


class Failed(SystemExit):
    """A measurement that ended with an error, which is the message."""


def measure(script: str, *flags: str, timeout: float | None = None) -> dict[str, Any]:
    """Runs a benchmark with `flags` in a process of its own, so that no two sides share threads or memory; its last line is JSON.

    Raises Failed for a process that ends with an error, TimeoutError for one that takes longer than `timeout` seconds, MemoryError for
    one that was killed, as Linux does where memory runs out, or whose error is of too little memory, as a GPU's is.
    """
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}  # as the Makefile sets it; both sides gain
    name = f"{Path(script).name} {' '.join(flags)}"
    try:
        done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{name} took longer than {timeout:.0f} s.") from None
    if done.returncode == -signal.SIGKILL:
        raise MemoryError(f"{name} was killed.")
    if done.returncode and any(sign in done.stderr for sign in TOO_LITTLE_MEMORY):
        raise MemoryError(f"{name} ran out of memory.")
    if done.returncode:
        raise Failed(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def where() -> str:
    """What a table was measured on: the NVIDIA GPU if there is one, else cores and processor, and the version of JAX."""
    return f"{_gpu() or f'{os.cpu_count()} cores of {_processor()}'}, JAX {importlib.metadata.version('jax')}"


def _gpu() -> str:
    """Name of the first GPU, from the driver: JAX would take its memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
        return ""
    found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout.strip() else ""


def _processor() -> str:
    """Name of the CPU, with its widest vector instructions where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in fields.get("flags", "").split()), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()
