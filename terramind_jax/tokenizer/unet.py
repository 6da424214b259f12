"""The diffusion decoder's network: a U-Net on patches, conditioned on codes by concatenation (spec 6.5). Channels last.

It predicts the clean image from a noisy one. Levels halve the grid of patches; the two lowest have attention. Parameter names:
``down_0/res_0/conv1``, ``middle/attn/qkv``, ``up_3/upsample``; the level is that of the grid, 0 the finest.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax.tokenizer.config import GROUPS, TokenizerConfig
from terramind_jax.tokenizer.conv import Conv
from terramind_jax.tokenizer.vit import pointwise

ATTENTION_LEVELS = 2  # the lowest ones


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Integer timesteps ``[B]`` -> ``[B, dim]`` float32: cosines of dim/2 frequencies, then their sines."""
    frequencies = np.exp(-np.log(10_000) * np.arange(dim // 2) / (dim // 2)).astype(np.float32)
    angle = t[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class GroupNorm(nn.Module):
    """32 groups, eps 1e-5, float32, followed by SiLU if asked; ``[B, ..., C]`` -> the same in `dtype`."""

    silu: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, space = x.shape[-1], tuple(range(1, x.ndim - 1))
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (channels,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (channels,))
        x = x.astype(jnp.float32)
        # Means by channel first: they run along memory, where those of a group would jump.
        mean = _group_mean(x.mean(space, keepdims=True))
        variance = _group_mean(jnp.square(x - mean).mean(space, keepdims=True))
        scale = scale * jax.lax.rsqrt(variance + 1e-5)
        y = x * scale + (bias - mean * scale)
        return (nn.silu(y) if self.silu else y).astype(self.dtype)


def _group_mean(x: jax.Array) -> jax.Array:
    """Each channel's value -> its group's mean; the last axis is channels."""
    grouped = x.reshape(*x.shape[:-1], GROUPS, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


class ResBlock(nn.Module):
    """``[B, H, W, I]`` and the time's embedding ``[B, E]`` -> ``[B, H, W, O]``; the second convolution starts at zero."""

    outputs: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        h = Conv(self.outputs, dtype=self.dtype, name="conv1")(GroupNorm(silu=True, dtype=self.dtype, name="norm1")(x))
        shift = pointwise(time.shape[-1], self.outputs, (None, "embed"), self.dtype, "time")(nn.silu(time))
        h = GroupNorm(silu=True, dtype=self.dtype, name="norm2")(h + shift[:, None, None])
        h = Conv(self.outputs, zero=True, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.outputs:
            x = pointwise(x.shape[-1], self.outputs, (None, "embed"), self.dtype, "skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Every place looks at every other, one head as wide as the image: ``[B, H, W, C]`` -> the same. Starts as the identity."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, dim = x.shape
        tokens = GroupNorm(dtype=self.dtype, name="norm")(x).reshape(batch, -1, dim)
        q, k, v = jnp.split(pointwise(dim, 3 * dim, ("embed", None), self.dtype, "qkv")(tokens), 3, axis=-1)
        scale = dim**-0.25  # on q and on k: in half precision their product would be too large
        weights = jax.nn.softmax(jnp.einsum("bmd,bnd->bmn", q * scale, k * scale).astype(jnp.float32))
        out = jnp.einsum("bmn,bnd->bmd", weights.astype(v.dtype), v)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
        out = nn.Dense(dim, dtype=self.dtype, kernel_init=zeros, bias_init=_zero_bias, name="proj")(out)
        return x + out.reshape(x.shape)


_zero_bias = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))


class Down(nn.Module):
    """One level on the way down: ``(x, time)`` -> x at the next level, and what the way up will want."""

    config: TokenizerConfig
    level: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        c = self.config
        width, outputs = c.model_channels * c.channel_mult[self.level], []
        for i in range(c.num_res_blocks):
            x = ResBlock(width, c.dtype, name=f"res_{i}")(x, time)
            x = AttentionBlock(c.dtype, name=f"attn_{i}")(x) if has_attention(c, self.level) else x
            outputs.append(x)
        if self.level + 1 < len(c.channel_mult):
            x = Conv(width, stride=2, dtype=c.dtype, name="downsample")(x)
            outputs.append(x)
        return x, outputs


class Middle(nn.Module):
    """Two residual blocks around one attention, at the lowest level."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        x = ResBlock(x.shape[-1], self.config.dtype, name="res_0")(x, time)
        x = AttentionBlock(self.config.dtype, name="attn")(x)
        return ResBlock(x.shape[-1], self.config.dtype, name="res_1")(x, time)


class Up(nn.Module):
    """One level on the way up; takes from the end of `skips` one map a block."""

    config: TokenizerConfig
    level: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, skips: list[jax.Array]) -> jax.Array:
        c = self.config
        width = c.model_channels * c.channel_mult[self.level]
        for i in range(c.num_res_blocks + 1):
            x = ResBlock(width, c.dtype, name=f"res_{i}")(jnp.concatenate([x, skips.pop()], axis=-1), time)
            x = AttentionBlock(c.dtype, name=f"attn_{i}")(x) if has_attention(c, self.level) else x
        return Conv(width, dtype=c.dtype, name="upsample")(enlarge(x, 2)) if self.level else x


class UNetDecoder(nn.Module):
    """Codes ``[B, h, w, latent_dim]``, noisy image ``[B, H, W, C]``, integer timesteps ``[]`` or ``[B]`` -> clean image, float32."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, codes: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        c, p = self.config, self.config.decoder_patch_size
        time = timestep_embedding(jnp.atleast_1d(t), c.model_channels)
        time = TimeEmbed(4 * c.model_channels, c.dtype, name="time_embed")(time)
        x = jnp.concatenate([to_patches(x, p), enlarge(codes, c.patch_size // p)], axis=-1)
        x = Conv(c.model_channels * c.channel_mult[0], dtype=c.dtype, name="conv_in")(x)
        skips, levels = [x], range(len(c.channel_mult))
        for level in levels:
            x, outputs = Down(c, level, name=f"down_{level}")(x, time)
            skips += outputs
        x = Middle(c, name="middle")(x, time)
        for level in reversed(levels):
            x = Up(c, level, name=f"up_{level}")(x, time, skips)
        x = GroupNorm(silu=True, dtype=c.dtype, name="norm_out")(x)
        x = Conv(c.channels * p * p, zero=True, dtype=c.dtype, name="conv_out")(x)
        return from_patches(x.astype(jnp.float32), p)


class TimeEmbed(nn.Module):
    """Two linear layers with SiLU between."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.silu(pointwise(x.shape[-1], self.width, (None, "embed"), self.dtype, "fc1")(x))
        return pointwise(self.width, self.width, (None, "embed"), self.dtype, "fc2")(hidden)


def has_attention(config: TokenizerConfig, level: int) -> bool:
    """Whether the blocks of a level are followed by attention."""
    return level >= len(config.channel_mult) - ATTENTION_LEVELS


def enlarge(x: jax.Array, factor: int) -> jax.Array:
    """Nearest neighbour: every place of ``[B, h, w, C]`` becomes factor x factor equal ones."""
    batch, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, factor, w, factor, channels))
    return x.reshape(batch, h * factor, w * factor, channels)


def to_patches(x: jax.Array, p: int) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H/p, W/p, C * p * p]``, channel slowest, as the weights have it."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // p, p, width // p, p, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // p, width // p, -1)


def from_patches(x: jax.Array, p: int) -> jax.Array:
    """The inverse of `to_patches`."""
    batch, h, w, size = x.shape
    return x.reshape(batch, h, w, size // p**2, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(batch, h * p, w * p, -1)
