"""A start for tokenizers that depends on the data, so that their codes are in use from the first step on.

Drawn weights make every latent much the same function of a patch's mean, so that tokens lie on a curve through the codebook, and where
data vary little about a mean far from zero, as the heights of a plain do, positions outweigh the image.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from terramind_jax import tokenizer as networks

EMBEDDING_STD = 4.0  # beside positions, whose standard deviation is 0.7
LATENT_STD = 1.0  # two of them reach 88 % of a code's range; at more the sigmoid flattens what is rare

Path = tuple[str, ...]
EMBED, ENCODER, LATENT = ("encoder", "proj"), ("encoder",), ("quant_proj",)
OUTPUT = ("decoder", "out_proj", "kernel")


def data_init(module: networks.Tokenizer, params: Any, buffers: Any, image: jax.Array, weight: jax.Array) -> Any:
    """Parameters with which patch embeddings and latents of a batch have mean 0 and the standard deviations above.

    After Salimans and Kingma (arXiv 1602.07868, section 3). The latents are the principal components, the largest first, of what differs
    between images at one place, so they are independent. `image` ``[B, H, W, C]`` is what `reconstruction.prepare` gives; images of
    weight 0 do not count, and what does not vary is left as it is, as are latents beyond the width of the encoder.
    """
    share = weight / jnp.maximum(weight.sum(), 1)
    flat = dict(traverse_util.flatten_dict(params))

    def output(path: Path) -> jax.Array:
        variables = {"params": traverse_util.unflatten_dict(flat), "buffers": buffers}
        _, found = module.apply(variables, image, method="latent", capture_intermediates=lambda layer, _: layer.path == path)
        (value,) = traverse_util.flatten_dict(found["intermediates"])[(*path, "__call__")]
        return value.astype(jnp.float32)

    embedded = output(EMBED)
    mean = _mean(embedded, share)
    scale = _times(EMBEDDING_STD, jnp.sqrt(_mean(jnp.square(embedded - mean), share)))
    flat[*EMBED, "kernel"] *= scale
    flat[*EMBED, "bias"] = jnp.where(scale == 1, flat[*EMBED, "bias"], (flat[*EMBED, "bias"] - mean) * scale)

    features, kernel = output(ENCODER), flat[*LATENT, "kernel"]
    varying = features - jnp.einsum("b,bhwd->hwd", share, features)
    places = features.shape[1] * features.shape[2]
    values, vectors = jnp.linalg.eigh(jnp.einsum("b,bhwd,bhwe->de", share, varying, varying) / places)  # in ascending order
    count = min(kernel.shape)
    first = slice(None, -count - 1, -1)
    std = jnp.sqrt(jnp.maximum(values[first], 0))
    kernel = kernel.at[:, :count].set(jnp.where(std > TINY, vectors[:, first] * _times(LATENT_STD, std), kernel[:, :count]))
    flat[*LATENT, "kernel"], flat[*LATENT, "bias"] = kernel, -_mean(features, share) @ kernel
    return traverse_util.unflatten_dict(flat)


def zero_output(params: Any) -> Any:
    """Parameters with which a ViT decoder draws zeros, whatever the codes.

    Drawn weights begin with a pattern of their own in each patch, of which a short training leaves metres: as much as a plain varies.
    From zero the pixels of a flat patch learn the same.
    """
    flat = dict(traverse_util.flatten_dict(params))
    flat[OUTPUT] = jnp.zeros_like(flat[OUTPUT])
    return traverse_util.unflatten_dict(flat)


TINY = 1e-4


def _mean(x: jax.Array, share: jax.Array) -> jax.Array:
    """``[B, h, w, D]`` -> ``[D]``."""
    return jnp.einsum("b,bd->d", share, x.mean((1, 2)))


def _times(wanted: float, std: jax.Array) -> jax.Array:
    """What brings each channel to a standard deviation; 1 for one that does not vary."""
    return jnp.where(std > TINY, wanted / jnp.maximum(std, TINY), 1.0)
