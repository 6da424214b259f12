"""TerraMind, the any-to-any foundation model for Earth observation (arXiv 2504.11171), in JAX and Flax.

    import terramind_jax as tm

    model = tm.load("terramind_v1_base_generate", modalities=["S2L2A"], output_modalities=["S1GRD", "LULC"])
    tile = tm.read("tile.tif", "S2L2A")         # [H, W, C] with its place on Earth
    made = model.generate({"S2L2A": tile[None]}, seed=0, timesteps=10, standardize=True)
    tm.write("radar.tif", made["S1GRD"][0], like="tile.tif")

Beside these names, which `dir` lists, the notebooks use the modules `modalities` (what each is), `plot`, `tasks`, `data.synthesize` (tiles
of the embedded world), `data.index` (the keys of shards) and `train.logging` (the metrics of a run).

Names are imported when they are first used, so that data workers and ``--help`` never load JAX.
"""

import importlib

_PUBLIC = {
    "read": "terramind_jax.geo",
    "write": "terramind_jax.geo",
    "declare": "terramind_jax.declarations",
    "list_models": "terramind_jax.zoo",
    "load": "terramind_jax.weights",
    "save": "terramind_jax.weights",
    "from_torch": "terramind_jax.weights",
    "to_torch": "terramind_jax.weights",
}
__all__ = [*_PUBLIC]


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'terramind_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
