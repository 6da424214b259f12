"""The embedded world: procedural scenes with the modalities, formats and statistics of TerraMesh. NumPy only."""

from terramind_jax.data.world.scene import Scene, scene

__all__ = ["Scene", "scene"]
