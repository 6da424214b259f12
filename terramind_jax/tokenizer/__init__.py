"""Image tokenizers: ViT encoder, finite scalar quantization, pluggable decoder (spec 6)."""

from terramind_jax.tokenizer.config import TokenizerConfig
from terramind_jax.tokenizer.vqvae import Tokenizer, init, reconstruction_loss

__all__ = ["Tokenizer", "TokenizerConfig", "init", "reconstruction_loss"]
