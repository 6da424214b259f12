"""TerraMind, the any-to-any foundation model for Earth observation (arXiv 2504.11171), in JAX and Flax."""
