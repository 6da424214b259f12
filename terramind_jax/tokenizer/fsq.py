"""Finite scalar quantization as TerraMind does it: by a sigmoid, codes in [0, 1], the first dimension fastest (spec 6.3).

It differs from the published FSQ, which uses tanh and centred codes. `levels` is e.g. ``(8, 8, 8, 6, 5)``: 15,360 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def codebook_size(levels: Sequence[int]) -> int:
    """Number of tokens that `levels` distinguish."""
    return math.prod(levels)


def quantize(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Latents ``[..., len(levels)]`` -> codes in [0, 1], same shape, float32.

    Rounding (half to even) passes the gradient straight through; the sigmoid is differentiated as it is.
    """
    top = np.asarray(levels, np.float32) - 1
    scaled = jax.nn.sigmoid(z.astype(jnp.float32)) * top
    return (scaled + jax.lax.stop_gradient(jnp.round(scaled) - scaled)) / top


def codes_to_tokens(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Codes ``[..., len(levels)]`` -> tokens ``[...]`` int32, exact."""
    steps = jnp.round(codes * (np.asarray(levels, np.float32) - 1)).astype(jnp.int32)
    return (steps * _basis(levels)).sum(-1)


def tokens_to_codes(tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Tokens ``[...]`` -> codes ``[..., len(levels)]`` float32: the inverse of `codes_to_tokens`."""
    steps = tokens[..., None] // _basis(levels) % np.asarray(levels, np.int32)
    return steps.astype(jnp.float32) / (np.asarray(levels, np.float32) - 1)


def _basis(levels: Sequence[int]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)
