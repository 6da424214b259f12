"""L-TAE: attention over the steps of a time series, a lightweight temporal encoder (arXiv 2007.00586), token by token.

With the sizes that PANGAEA gives it: as wide as the features, 16 heads of 4 channels, and no positions unless days are given.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax.model.layers import uniform
from terramind_jax.tasks.layers import EPS, BatchNorm

PERIOD = 1000.0  # of the positions, in days


class LTAE(nn.Module):
    """``[B, T, N, D]`` -> ``[B, N, D]``; `days` ``[B, T]`` since any date, by which steps are told apart."""

    heads: int = 16
    key_channels: int = 4
    dropout: float = 0.2  # of the result
    attention_dropout: float = 0.1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, days: jax.Array | None = None, train: bool = False) -> jax.Array:
        (b, t, n, d), h, k = x.shape, self.heads, self.key_channels
        spread = nn.initializers.normal(math.sqrt(2 / k))
        x = jnp.swapaxes(x, 1, 2).reshape(b * n, t, d)  # every token has a series of its own
        x = self._linear(d, "inconv", GroupNorm(h, name="in_norm")(x))
        if days is not None:
            x = x + jnp.repeat(jnp.tile(positions(days, d // h), h), n, axis=0).astype(x.dtype)
        keys = self._linear(h * k, "key", x, spread).reshape(b * n, t, h, k)
        scores = jnp.einsum("btgk,gk->btg", keys, self.param("query", spread, (h, k)).astype(x.dtype)) / math.sqrt(k)
        shares = nn.Dropout(self.attention_dropout)(jax.nn.softmax(scores.astype(jnp.float32), axis=1), deterministic=not train)
        x = jnp.einsum("btg,btgv->bgv", shares.astype(x.dtype), x.reshape(b * n, t, h, d // h)).reshape(b * n, d)
        x = nn.relu(BatchNorm(name="norm")(self._linear(d, "mlp", x), train))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return GroupNorm(h, name="out_norm")(x[:, None]).reshape(b, n, d)

    def _linear(self, outputs: int, name: str, x: jax.Array, initializer=None) -> jax.Array:
        bound = uniform(x.shape[-1] ** -0.5)
        return nn.Dense(outputs, kernel_init=initializer or bound, bias_init=bound, dtype=self.dtype, name=name)(x)


class GroupNorm(nn.Module):
    """``[B, T, D]``, over the steps and the channels of each group."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        grouped = x.astype(jnp.float32).reshape(*x.shape[:2], self.groups, -1)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        return ((centred * jax.lax.rsqrt(variance + EPS)).reshape(x.shape) * scale + bias).astype(x.dtype)


def positions(days: jax.Array, channels: int) -> jax.Array:
    """``[B, T]`` -> ``[B, T, channels]``: sines at even places and cosines at odd ones, of periods up to `PERIOD`."""
    place = jnp.arange(channels)
    angle = days[..., None].astype(jnp.float32) / PERIOD ** (2 * (place // 2) / channels)
    return jnp.where(place % 2 == 0, jnp.sin(angle), jnp.cos(angle))
