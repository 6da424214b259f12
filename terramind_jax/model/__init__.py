"""The any-to-any transformer: pure Linen modules and functions of arrays."""

from terramind_jax.model import loss
from terramind_jax.model.backbone import Backbone, BackboneConfig, features
from terramind_jax.model.transformer import PADDING, TerraMind, TransformerConfig, init

__all__ = ["PADDING", "Backbone", "BackboneConfig", "TerraMind", "TransformerConfig", "features", "init", "loss"]
