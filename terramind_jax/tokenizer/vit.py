"""The tokenizers' vision transformers: patches to features and back (spec 6.2, 6.4).

Attention and MLP are the transformer's. What differs: LayerNorm's bias is learned as every other one, positions are resized on each
call, and an MLP with tanh, in float32, ends the stack. Parameter names are the reference's.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax.model.embeddings import patchify
from terramind_jax.model.layers import Initializer, Linear, Mlp, SelfAttention, project, stack, uniform, xavier
from terramind_jax.model.positions import resize_bicubic, sincos_2d
from terramind_jax.tokenizer.config import TokenizerConfig


def torch_default(fan_in: int) -> Initializer:
    """PyTorch's default for a convolution's kernel and bias, which the reference keeps: uniform within 1/sqrt(fan_in)."""
    return uniform(fan_in**-0.5)


def pointwise(inputs: int, outputs: int, axes: tuple[str | None, str | None], dtype: str, name: str | None = None) -> nn.Dense:
    """A 1x1 convolution, initialised as PyTorch does."""
    kernel_init, bias_init = (nn.with_logical_partitioning(torch_default(inputs), a) for a in (axes, axes[1:]))
    return nn.Dense(outputs, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def layer_norm(dtype: str, name: str) -> nn.LayerNorm:
    """LayerNorm with scale and bias, eps 1e-6, statistics in float32."""
    scale_init, bias_init = (nn.with_logical_partitioning(i, ("norm",)) for i in (nn.initializers.ones, nn.initializers.zeros))
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, scale_init=scale_init, bias_init=bias_init, name=name)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `patchify`."""
    batch, h, w, size = patches.shape
    rows = patches.reshape(batch, h, w, patch_size, size // patch_size).swapaxes(2, 3)
    return rows.reshape(batch, h * patch_size, w * patch_size, -1)


class Block(nn.Module):
    """One pre-norm layer, ``[B, N, D]`` -> ``[B, N, D]``, the body of a scan, which stacks the second output."""

    config: TokenizerConfig
    collect: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        x = x + SelfAttention(c.num_heads, use_bias=True, dtype=c.dtype, name="attn")(layer_norm(c.dtype, "norm1")(x), None)
        x = x + Mlp(c.mlp_ratio, gated=False, use_bias=True, dtype=c.dtype, name="mlp")(layer_norm(c.dtype, "norm2")(x))
        x = nn.with_logical_constraint(x, ("batch", "tokens", None))
        return x, x if self.collect else None


class PostMlp(nn.Module):
    """The MLP that ends a stack: tanh between two linear layers, float32."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(Linear((self.hidden,), ("embed", "mlp"), use_bias=True, name="fc1")(x))
        return Linear(x.shape[-1:], ("mlp", "embed"), use_bias=True, name="fc2")(hidden)


def trunk(module: nn.Module, x: jax.Array, collect: bool = False) -> jax.Array | list[jax.Array]:
    """What encoder and decoder share, declared inside `module`: positions, layers, last MLP. ``[B, h, w, D]`` -> the same, float32.

    The stored positions are resized to ``(h, w)`` on every call: 16 to 14 for 224 pixels. With `collect` every layer's output is
    returned, the last one after the MLP.
    """
    c = module.config
    positions = module.variable("buffers", "pos_emb", lambda: jnp.asarray(sincos_2d(c.grid, c.grid, c.dim)).reshape(c.grid, c.grid, c.dim))
    x = x + resize_bicubic(positions.value, x.shape[1:3]).astype(x.dtype)
    tokens, layers = x.reshape(x.shape[0], -1, c.dim), None
    if c.depth:
        tokens, layers = stack(Block, c.depth, "none", c.unroll, broadcast=0)(c, collect, name="blocks")(tokens)
    tokens = tokens.astype(jnp.float32)
    tokens = tokens + PostMlp(int(c.dim * c.mlp_ratio), name="post_mlp")(layer_norm("float32", "norm_mlp")(tokens))
    last = tokens.reshape(x.shape)
    if not collect:
        return last
    return [layer.astype(jnp.float32).reshape(x.shape) for layer in (() if layers is None else layers[:-1])] + [last]


class PatchEmbed(nn.Module):
    """Image ``[B, H, W, C]`` -> ``[B, H/p, W/p, D]``; the kernel is a convolution's, ``[p, p, C, D]``.

    A convolution whose stride is its kernel is a product of patches with a matrix, and cheaper so.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        init = torch_default(p * p * c.channels)
        kernel_init = nn.with_logical_partitioning(init, (None, None, None, "embed"))
        kernel = self.param("kernel", kernel_init, (p, p, c.channels, c.dim)).reshape(-1, c.dim).astype(c.dtype)
        bias = self.param("bias", nn.with_logical_partitioning(init, ("embed",)), (c.dim,))
        return patchify(image.astype(c.dtype), p) @ kernel + bias.astype(c.dtype)


class PatchProject(nn.Module):
    """Features ``[B, h, w, D]`` -> image ``[B, h * p, w * p, C]`` float32; outputs are stored in the reference's order ``(C, p, p)``.

    The kernel's columns, not the image's pixels, are brought into the order of channels last.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        stored = (c.channels, p, p)
        size = c.channels * p * p
        kernel = self.param("kernel", nn.with_logical_partitioning(xavier(c.dim, size), ("embed", None)), (c.dim, size))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (size,))
        kernel = jnp.moveaxis(kernel.reshape(c.dim, *stored), 1, -1).reshape(c.dim, size).astype(c.dtype)
        bias = jnp.moveaxis(bias.reshape(stored), 0, -1).reshape(size)
        return unpatchify(project(x.astype(c.dtype), kernel).astype(jnp.float32) + bias, p)


class ViTEncoder(nn.Module):
    """Image ``[B, H, W, C]`` -> features ``[B, H/p, W/p, D]`` float32, or with `collect` the list of every layer's."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, image: jax.Array, collect: bool = False) -> jax.Array | list[jax.Array]:
        return trunk(self, PatchEmbed(self.config, name="proj")(image), collect)


class ViTDecoder(nn.Module):
    """Codes ``[B, h, w, latent_dim]`` -> image, or logits of classes, ``[B, h * p, w * p, C]`` float32, in one pass (spec 6.4)."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        c = self.config
        x = pointwise(c.latent_dim, c.dim, (None, "embed"), c.dtype, "post_quant_proj")(codes)
        return PatchProject(c, name="out_proj")(trunk(self, x))
