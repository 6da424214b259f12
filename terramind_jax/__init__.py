"""TerraMind, the any-to-any foundation model for Earth observation (arXiv 2504.11171), in JAX and Flax.

    import terramind_jax as tm

    tile = tm.read("tile.tif", "S2L2A")         # [H, W, C] with its place on Earth
    tm.write("copy.tif", tile, like="tile.tif")

Names are imported when they are first used, so that data workers and ``--help`` never load JAX.
"""

import importlib

_PUBLIC = {"read": "terramind_jax.geo", "write": "terramind_jax.geo"}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'terramind_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
