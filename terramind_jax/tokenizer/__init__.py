"""Image tokenizers: ViT encoder, finite scalar quantization, ViT or diffusion decoder (spec 6)."""

from terramind_jax.tokenizer.config import TokenizerConfig
from terramind_jax.tokenizer.diffusion import TRAIN_STEPS, Clip, Sampler, decode, denoise, noised, plan
from terramind_jax.tokenizer.vqvae import Tokenizer, apply, encode_stored, init, prepare, reconstruction_loss

__all__ = [
    "TRAIN_STEPS",
    "Clip",
    "Sampler",
    "Tokenizer",
    "TokenizerConfig",
    "apply",
    "decode",
    "denoise",
    "encode_stored",
    "init",
    "noised",
    "plan",
    "prepare",
    "reconstruction_loss",
]
