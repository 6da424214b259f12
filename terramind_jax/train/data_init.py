"""A start for tokenizers that depends on the data, so that their codes are in use from the first step on.

Drawn weights alone give all patches nearly one token where the data vary little about a mean that is far from zero, as heights of a
plain do: positions then outweigh the image in the encoder, and few codes are ever found.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from terramind_jax import tokenizer as networks

# Standard deviation of the logistic distribution, of which the sigmoid, and so each code, is uniform.
UNIFORM_CODES = math.pi / math.sqrt(3)
SPREADS = {("encoder", "proj"): 1.0, ("quant_proj",): UNIFORM_CODES}


def data_init(module: networks.Tokenizer, params: Any, buffers: Any, image: jax.Array, weight: jax.Array) -> Any:
    """Parameters with which patch embeddings and latents of a batch have mean 0 and the standard deviations `SPREADS`, each channel.

    After Salimans and Kingma (arXiv 1602.07868, section 3), one layer after the other. `image` ``[B, H, W, C]`` is what
    `reconstruction.prepare` gives; images of weight 0 do not count. A channel that does not vary is left as it is.
    """
    flat = traverse_util.flatten_dict(params)
    for path, spread in SPREADS.items():
        _, found = module.apply(
            {"params": traverse_util.unflatten_dict(flat), "buffers": buffers},
            image,
            method="latent",
            capture_intermediates=lambda layer, _, path=path: layer.path == path,
        )
        (output,) = traverse_util.flatten_dict(found["intermediates"])[(*path, "__call__")]
        mean, std = _moments(output.astype(jnp.float32), weight)
        scale = jnp.where(std > 1e-6, spread / std, 1.0)
        kernel, bias = flat[(*path, "kernel")], flat[(*path, "bias")]
        flat |= {(*path, "kernel"): kernel * scale, (*path, "bias"): jnp.where(std > 1e-6, (bias - mean) * scale, bias)}
    return traverse_util.unflatten_dict(flat)


def _moments(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation ``[D]`` of ``[B, h, w, D]`` over images of weight 1 and places."""
    share = weight / jnp.maximum(weight.sum(), 1)
    mean = jnp.einsum("b,bd->d", share, x.mean((1, 2)))
    return mean, jnp.sqrt(jnp.einsum("b,bd->d", share, jnp.square(x - mean).mean((1, 2))))
