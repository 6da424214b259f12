"""Parity with TerraTorch, run by ``make test-parity``; without TerraTorch nothing here is collected.

Unlike the other tests these compute much and compile little: one device, and a compiler that optimises.
"""

import importlib.util
import os

if os.environ.get("XLA_FLAGS", "").startswith("--xla_force_host_platform_device_count=8"):  # what tests/conftest.py has just set
    del os.environ["XLA_FLAGS"]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's idle threads would otherwise spin on the cores that JAX computes on

if importlib.util.find_spec("terratorch") is None:
    collect_ignore_glob = ["test_*.py"]
