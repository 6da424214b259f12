"""The any-to-any transformer: pure Linen modules and functions of arrays."""

from terramind_jax.model import loss
from terramind_jax.model.transformer import PADDING, TerraMind, TransformerConfig, init, patchify

__all__ = ["PADDING", "TerraMind", "TransformerConfig", "init", "loss", "patchify"]
