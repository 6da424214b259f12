"""Eight CPU devices for every test, and a compiler that does not optimise: tests compile much and compute little.

Set before JAX starts; commands that tests run in processes of their own inherit it.
"""

import os
import sys
from pathlib import Path

import pytest

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="module")
def compile_fast():
    """These programs run for milliseconds and compile for seconds."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def forget_declarations():
    """The modalities that a module's tests declare end with it."""
    from terramind_jax import modalities

    registries = [(d, dict(d)) for d in (modalities.MODALITIES, modalities.STREAMS)]
    yield
    for registry, before in registries:
        registry.clear()
        registry.update(before)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs are let go before they are too many: each has memory maps of its own, and at 65,530 of them XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        sys.modules["jax"].clear_caches()
