"""The tokenizers' vision transformers: patches to features and back (spec 6.2, 6.4).

They differ from the big transformer's blocks: every bias is learned, positions are resized on each call, and a tanh MLP in float32
ends the stack. Layers are stacked under one `nn.scan`. Parameter names are the reference's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from terramind_jax.model.positions import resize_bicubic, sincos_2d
from terramind_jax.tokenizer.config import TokenizerConfig

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()


def uniform(bound: float):
    """Initialiser U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_default(fan_in: int):
    """PyTorch's default for kernel and bias of convolutions, which the reference keeps for them: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return uniform(fan_in**-0.5)


def dense(features: int, axes: tuple[str, str], dtype, *, kernel_init=_xavier, bias_init=_zeros, name: str | None = None) -> nn.Dense:
    """A linear layer whose parameters know their logical axes, ``(input, output)``."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[1:]),
        name=name,
    )


def layer_norm(dtype, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with scale and bias, eps 1e-6, statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
        bias_init=nn.with_logical_partitioning(_zeros, ("norm",)),
        name=name,
    )


def _gelu(x: jax.Array) -> jax.Array:
    """The erf GELU; `jax.nn.gelu(approximate=False)` goes through erfc, which costs XLA's CPU backend several times as much."""
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)).astype(x.dtype))


class Attention(nn.Module):
    """Self-attention without mask; the output axis of `qkv` is [3, heads, head width]."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        head_dim = dim // self.num_heads
        qkv = dense(3 * dim, ("embed", "heads"), self.dtype, kernel_init=uniform((3 / dim) ** 0.5), name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.num_heads, head_dim), (2, 3), (0, 2))  # each [B, h, N, d]
        scores = jnp.einsum("bhqd,bhkd->bhqk", q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("bhqk,bhkd->bqhd", weights, v).reshape(x.shape)
        return dense(dim, ("heads", "embed"), self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """Two linear layers; `tanh` instead of GELU in the MLP that ends a stack."""

    hidden: int
    dtype: str
    tanh: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = dense(self.hidden, ("embed", "mlp"), self.dtype, name="fc1")(x)
        hidden = jnp.tanh(hidden) if self.tanh else _gelu(hidden)
        return dense(x.shape[-1], ("mlp", "embed"), self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """One pre-norm layer, ``[B, N, D]`` -> ``[B, N, D]``; returns a pair because it is the body of a scan."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        x = x + Attention(c.num_heads, c.dtype, name="attn")(layer_norm(c.dtype, "norm1")(x))
        x = x + Mlp(int(c.dim * c.mlp_ratio), c.dtype, name="mlp")(layer_norm(c.dtype, "norm2")(x))
        return x, None


def trunk(module: nn.Module, x: jax.Array) -> jax.Array:
    """What encoder and decoder share, declared inside `module`: positions, layers, final MLP. ``[B, h, w, D]`` to the same in float32.

    The stored positions are resized to ``(h, w)`` on every call: 16 to 14 for 224 pixels.
    """
    c = module.config
    grid = (c.grid, c.grid, c.dim)
    positions = module.variable("buffers", "pos_emb", lambda: jnp.asarray(sincos_2d(c.grid, c.grid, c.dim)).reshape(grid)).value
    x = x + resize_bicubic(positions, x.shape[1:3]).astype(x.dtype)
    layers = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=c.depth,
        unroll=c.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    tokens, _ = layers(c, name="blocks")(x.reshape(x.shape[0], -1, c.dim), None)
    tokens = tokens.astype(jnp.float32)
    final = Mlp(int(c.dim * c.mlp_ratio), "float32", tanh=True, name="post_mlp")
    return (tokens + final(layer_norm("float32", "norm_mlp")(tokens))).reshape(x.shape)


class PatchEmbed(nn.Module):
    """Image ``[B, H, W, C]`` -> ``[B, H/p, W/p, D]``; the kernel is a convolution's, ``[p, p, C, D]``.

    A convolution whose stride is its kernel is a product of patches with a matrix, and cheaper so.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        init = torch_default(p * p * c.channels)
        kernel_init = nn.with_logical_partitioning(init, ("patch", "patch", "channels", "embed"))
        kernel = self.param("kernel", kernel_init, (p, p, c.channels, c.dim))
        bias = self.param("bias", nn.with_logical_partitioning(init, ("embed",)), (c.dim,))
        batch, height, width, _ = image.shape
        patches = image.astype(c.dtype).reshape(batch, height // p, p, width // p, p * c.channels).swapaxes(2, 3)
        patches = patches.reshape(batch, height // p, width // p, p * p * c.channels)
        return patches @ kernel.reshape(-1, c.dim).astype(c.dtype) + bias.astype(c.dtype)


class PatchProject(nn.Module):
    """Features ``[B, h, w, D]`` -> image ``[B, h * p, w * p, C]`` float32; outputs are stored in the reference's order (C, p, p).

    The kernel's columns, not the image's pixels, are brought into channels-last order: whole rows of p * C floats move.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.config.patch_size
        size = c.channels * p * p
        kernel = self.param("kernel", nn.with_logical_partitioning(_xavier, ("embed", "pixels")), (c.dim, size))
        bias = self.param("bias", nn.with_logical_partitioning(_zeros, ("pixels",)), (size,))
        kernel = kernel.reshape(c.dim, c.channels, p, p).transpose(0, 2, 3, 1).reshape(c.dim, size)
        bias = bias.reshape(c.channels, p, p).transpose(1, 2, 0).reshape(size)
        patches = (x.astype(c.dtype) @ kernel.astype(c.dtype)).astype(jnp.float32) + bias
        batch, height, width, _ = x.shape
        rows = patches.reshape(batch, height, width, p, p * c.channels).swapaxes(2, 3)
        return rows.reshape(batch, height * p, width * p, c.channels)


class ViTEncoder(nn.Module):
    """Image ``[B, H, W, C]`` -> features ``[B, H/p, W/p, D]`` float32."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        return trunk(self, PatchEmbed(self.config, name="proj")(image))


class ViTDecoder(nn.Module):
    """Codes ``[B, h, w, latent_dim]`` -> image, or logits of classes, ``[B, h * p, w * p, C]`` float32, in one pass (spec 6.4)."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        c = self.config
        init = torch_default(c.latent_dim)
        x = dense(c.dim, ("latent", "embed"), c.dtype, kernel_init=init, bias_init=init, name="post_quant_proj")(codes)
        return PatchProject(c, name="out_proj")(trunk(self, x))
