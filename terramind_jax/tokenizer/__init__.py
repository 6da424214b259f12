"""Image tokenizers: ViT encoder, finite scalar quantization, ViT or diffusion decoder (spec 6)."""

from terramind_jax.tokenizer.config import TokenizerConfig
from terramind_jax.tokenizer.diffusion import decode
from terramind_jax.tokenizer.vqvae import Tokenizer, apply, init, reconstruction_loss

__all__ = ["Tokenizer", "TokenizerConfig", "apply", "decode", "init", "reconstruction_loss"]
