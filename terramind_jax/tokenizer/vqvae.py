"""One modality's tokenizer: ViT encoder, FSQ, and a decoder chosen by name (spec 6).

Inputs are standardised images, channels last; LULC comes as class maps or as one probability a class and pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax import modalities
from terramind_jax.tokenizer import fsq
from terramind_jax.tokenizer.config import TokenizerConfig
from terramind_jax.tokenizer.unet import UNetDecoder
from terramind_jax.tokenizer.vit import ViTDecoder, ViTEncoder, patchify, pointwise

# A decoder is a module of TokenizerConfig that maps codes [B, h, w, latent_dim] to [B, H, W, C]; a diffusion decoder takes a noisy
# image and its timestep, too, and `diffusion.decode` calls it once a step.
DECODERS = {"vit": ViTDecoder, "unet": UNetDecoder}

Features = Literal["embedding", "latent", "quantized"]


class Tokenizer(nn.Module):
    """Images to tokens and back. Variables are ``{"params", "buffers"}``; buffers are the positions, never trained."""

    config: TokenizerConfig

    def setup(self) -> None:
        c = self.config
        if c.decoder not in DECODERS:
            raise ValueError(f"Unknown tokenizer decoder {c.decoder!r}; known decoders: {', '.join(DECODERS)}.")
        self.encoder = ViTEncoder(c)
        self.quant_proj = pointwise(c.dim, c.latent_dim, ("embed", None), "float32")
        self.decoder = DECODERS[c.decoder](c)

    def __call__(self, x: jax.Array, *noised: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image -> (reconstruction ``[B, H, W, C]``, codes ``[B, h, w, latent_dim]``), differentiable straight through the rounding.

        For LULC the reconstruction is unnormalised logits. A diffusion decoder predicts the image from `noised`: the image under noise
        ``[B, H, W, C]`` and its timestep, ``[]`` or ``[B]``. Use `fsq.codes_to_tokens` on codes to count tokens in use.
        """
        codes = self.quantize(x)
        return self.decoder(codes, *noised), codes

    def latent(self, x: jax.Array) -> jax.Array:
        """Image -> what is quantized, ``[B, h, w, latent_dim]`` float32."""
        return self.quant_proj(self.encoder(prepare(self.config, x)))

    def quantize(self, x: jax.Array) -> jax.Array:
        """Image -> codes in [0, 1], ``[B, h, w, latent_dim]`` float32."""
        z = self.latent(x)
        return fsq.quantize(_grouped(self.config, z), self.config.levels).reshape(z.shape)

    def features(self, x: jax.Array, return_type: Features = "embedding") -> jax.Array | list[jax.Array]:
        """The tokenizer as a backbone (spec 6.8).

        "embedding" is the output of every layer of the encoder, a list of ``[B, h, w, D]``, the last one after its final MLP; "latent"
        and "quantized" are ``[B, h, w, latent_dim]`` before and after quantization. All float32.
        """
        if return_type == "embedding":
            return self.encoder(prepare(self.config, x), collect=True)
        if return_type not in ("latent", "quantized"):
            raise ValueError(f"Unknown return_type {return_type!r}; known types: embedding, latent, quantized.")
        return self.latent(x) if return_type == "latent" else self.quantize(x)

    def encode(self, x: jax.Array) -> jax.Array:
        """Image -> int32 tokens ``[B, h, w]``, or ``[B, h, w, K]`` with several codebooks."""
        tokens = fsq.codes_to_tokens(_grouped(self.config, self.quantize(x)), self.config.levels)
        return tokens[..., 0] if self.config.num_codebooks == 1 else tokens

    def codes(self, tokens: jax.Array) -> jax.Array:
        """Tokens as `encode` gives them -> codes ``[B, h, w, latent_dim]``."""
        tokens = tokens[..., None] if self.config.num_codebooks == 1 else tokens
        codes = fsq.tokens_to_codes(tokens, self.config.levels)
        return codes.reshape(*codes.shape[:3], self.config.latent_dim)

    def decode(self, tokens: jax.Array) -> jax.Array:
        """Tokens as `encode` gives them -> image, or logits, ``[B, H, W, C]``, by a decoder that needs one pass.

        `terramind_jax.tokenizer.decode` is for any decoder.
        """
        return self.decoder(self.codes(tokens))

    def predict(self, codes: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """A diffusion decoder's prediction of the clean image from the noisy `x` ``[B, H, W, C]`` at timestep `t`."""
        return self.decoder(codes, x, t)


@functools.partial(jax.jit, static_argnames=("module", "method", "return_type"))
def apply(module: Tokenizer, variables: Mapping[str, Any], x: jax.Array, method: str, **options: str) -> Any:
    """One of `Tokenizer`'s methods, compiled: ``encode``, ``decode`` or, with a ``return_type``, ``features``."""
    return module.apply(variables, x, method=method, **options)


def encode_stored(module: Tokenizer, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Images ``[B, H, W, C]`` as shards store them -> tokens, as `Tokenizer.encode` gives them of standardised ones."""
    images = images if module.config.is_class_map else modalities.standardize(module.config.modality, images)
    return module.apply(variables, images, method="encode")


def init(module: Tokenizer, key: jax.Array) -> dict:
    """Variables as spec 6.2 initialises them, boxed with their logical axes. Pure: jit or `jax.eval_shape` it at will."""
    side, channels = module.config.decoder_multiple, module.config.channels
    x = jnp.zeros((1, side, side, channels))
    return module.init(key, x, *([x, jnp.zeros((), jnp.int32)] if module.config.decoder == "unet" else []))


def prepare(config: TokenizerConfig, x: jax.Array) -> jax.Array:
    """Checks an image; class maps ``[B, H, W]`` or ``[B, H, W, 1]`` become one-hot ``[B, H, W, C]``, anything else passes.

    Classes outside ``0..C-1`` would become all zeros: shapes and values under jit cannot be refused, so data checks them before.
    """
    shape = x.shape
    if config.is_class_map and (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] == 1)):
        x = jax.nn.one_hot(x.reshape(x.shape[:3]).astype(jnp.int32), config.channels)
    if x.ndim != 4 or x.shape[-1] != config.channels:
        maps = " or class maps [B, H, W] or [B, H, W, 1]" if config.is_class_map else ""
        raise ValueError(f"{config.modality} has shape {shape}, expected [B, H, W, {config.channels}]{maps}, channels last.")
    if x.shape[1] % config.patch_size or x.shape[2] % config.patch_size:
        raise ValueError(f"{config.modality} has shape {shape}; height and width must be multiples of {config.patch_size}.")
    return x


def reconstruction_loss(config: TokenizerConfig, reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Loss per sample ``[B]`` float32, a mean over pixels: squared error, or cross-entropy of logits for LULC (spec 9.4, 9.5).

    `target` is what was given to the tokenizer: for LULC class maps or class probabilities.
    """
    # Patch by patch, the pixels' order in which encoder and decoder have them: XLA then drops the decoder's way back to an image.
    prediction = patchify(reconstruction, config.patch_size)
    target = patchify(prepare(config, target), config.patch_size)
    if not config.is_class_map:
        return jnp.square(prediction - target).mean((1, 2, 3))
    classes = (*target.shape[:3], -1, config.channels)
    log_probability = jax.nn.log_softmax(prediction.reshape(classes))
    return -(target.reshape(classes) * log_probability).sum(-1).mean((1, 2, 3))


def _grouped(config: TokenizerConfig, latent: jax.Array) -> jax.Array:
    """``[..., latent_dim]`` -> ``[..., num_codebooks, len(levels)]``."""
    return latent.reshape(*latent.shape[:-1], config.num_codebooks, len(config.levels))
