"""The embedded world: procedural scenes with the modalities, formats and statistics of TerraMesh. NumPy only."""

from terramind_jax.data.world.scene import Scene, check_size, scene

__all__ = ["Scene", "check_size", "scene"]
