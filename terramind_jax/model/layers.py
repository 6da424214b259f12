"""Transformer blocks of TerraMind (spec 2.2). ``[B, N, D]`` in, ``[B, N, D]`` out; masks are True where attention is forbidden.

Parameters carry logical axis names, which `terramind_jax.sharding` maps to the mesh. The reference's LayerNorm biases are
buffers: values that are loaded, added and exported, and never trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def xavier(fan_in: int, fan_out: int) -> Initializer:
    """Xavier uniform with the fans of the whole matrix, whatever shape the kernel is stored in (spec 4.8)."""
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, eps 1e-6, statistics in float32 or wider; ``bias`` is a buffer (spec 2.2)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        bias = self.variable("buffers", "bias", jnp.zeros, (x.shape[-1],)).value
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-6) * scale + bias).astype(self.dtype)


def project(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """``[..., *inputs]`` times ``[*inputs, *outputs]`` -> ``[..., *outputs]``; `inputs` is how many axes are contracted.

    Axes are not merged: the compiler could not split a merged one over the mesh. Where the outputs are wider than the inputs, the
    gradient is one that is cheaper on a CPU (reverse mode only).
    """
    wider = math.prod(kernel.shape[inputs:]) > math.prod(kernel.shape[:inputs])
    return _widen(x, kernel, inputs) if wider else _contract(x, kernel, inputs)


def _contract(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """Contracts the last `n` axes of `x` with the first `n` of `kernel`."""
    return jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _widen(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """The gradient of the kernel is written as ``x^T g``.

    JAX writes ``(g^T x)^T``, for which XLA's CPU backend first transposes ``g``. Where that is the wider operand, as in the first layer
    of an MLP, it took a third of a base model's training step.
    """
    return _contract(x, kernel, inputs)


def _widen_forward(x: jax.Array, kernel: jax.Array, inputs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(x, kernel, inputs), (x, kernel)


def _widen_backward(inputs: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, outputs = tuple(range(x.ndim - inputs)), tuple(range(x.ndim - inputs, g.ndim))
    dx = jax.lax.dot_general(g, kernel, ((outputs, tuple(range(inputs, kernel.ndim))), ((), ())))
    return dx, jax.lax.dot_general(x, g, ((rows, rows), ((), ())))


_widen.defvjp(_widen_forward, _widen_backward)


class Linear(nn.Module):
    """``[..., *inputs]`` -> ``[..., *outputs]``; the kernel keeps the shape ``(*inputs, *outputs)`` so that heads stay an axis."""

    outputs: Sequence[int]
    axes: Sequence[str | None]
    inputs: int = 1  # how many trailing axes are contracted
    use_bias: bool = False
    initializer: Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[-self.inputs :], *self.outputs)
        fan_in, fan_out = math.prod(shape[: self.inputs]), math.prod(self.outputs)
        kernel = self.param("kernel", nn.with_logical_partitioning(self.initializer or xavier(fan_in, fan_out), tuple(self.axes)), shape)
        y = project(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
        if self.use_bias:
            partitioned = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.axes[self.inputs :]))
            y = y + self.param("bias", partitioned, tuple(self.outputs)).astype(self.dtype)
        return y


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, implementation: str = "xla") -> jax.Array:
    """q ``[B, M, h, d]``, k and v ``[B, N, h, d]``, mask broadcastable to ``[B, h, M, N]`` -> ``[B, M, h, d]``; softmax in float32.

    A row whose keys are all masked returns a finite average, so that gradients of padding stay finite (spec 2.2).

    Args:
      implementation: ``xla``, or ``cudnn``, a fused kernel of NVIDIA GPUs for 16-bit types, which never stores the scores.
    """
    mask = None if mask is None else ~mask
    if implementation == "cudnn" and mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))  # its mask has whole rows and columns
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """What `attend` multiplies the values with: q ``[B, M, h, d]``, k ``[B, N, h, d]`` -> float32 ``[B, h, M, N]``, rows that sum to 1."""
    scores = jnp.einsum("bmhd,bnhd->bhmn", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return nn.softmax(scores if mask is None else jnp.where(mask, jnp.finfo(jnp.float32).min, scores))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection, output axes ``[3, heads, d]`` (spec 2.2).

    Where the collection ``intermediates`` is mutable, the `attention_weights` are in it as ``weights``.
    """

    num_heads: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"  # implementation of `attend`

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        dim = x.shape[-1]
        heads = (self.num_heads, dim // self.num_heads)
        axes = ("embed", None, "heads", None)
        qkv = Linear((3, *heads), axes, use_bias=self.use_bias, initializer=xavier(dim, dim), dtype=self.dtype, name="qkv")(x)
        if self.is_mutable_collection("intermediates"):  # else not even traced
            self.sow("intermediates", "weights", attention_weights(qkv[:, :, 0], qkv[:, :, 1], mask), reduce_fn=lambda _, new: new)
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask, self.attention)
        return Linear((dim,), ("heads", None, "embed"), inputs=2, use_bias=self.use_bias, dtype=self.dtype, name="proj")(out)


class CrossAttention(nn.Module):
    """Queries from `x`, keys and values from `context`; key-value axes ``[2, heads, d]`` (spec 2.2)."""

    num_heads: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"  # implementation of `attend`

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        dim = x.shape[-1]
        heads = (self.num_heads, dim // self.num_heads)
        q = Linear(heads, ("embed", "heads", None), use_bias=self.use_bias, dtype=self.dtype, name="q")(x)
        axes = ("embed", None, "heads", None)
        kv = Linear((2, *heads), axes, use_bias=self.use_bias, initializer=xavier(dim, dim), dtype=self.dtype, name="kv")(context)
        out = attend(q, kv[:, :, 0], kv[:, :, 1], mask, self.attention)
        return Linear((dim,), ("heads", None, "embed"), inputs=2, use_bias=self.use_bias, dtype=self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """Plain: ``fc2(gelu(fc1 x))`` with the erf GELU. Gated: ``fc2(silu(fc1 x) * fc3 x)``, hidden width times 2/3, truncated (spec 2.2)."""

    mlp_ratio: float
    gated: bool
    use_bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        hidden = int((2 / 3 if self.gated else 1) * self.mlp_ratio * dim)

        def linear(outputs: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear((outputs,), axes, use_bias=self.use_bias, dtype=self.dtype, name=name)

        h = linear(hidden, ("embed", "mlp"), "fc1")(x)
        if self.gated:
            h = nn.silu(h) * linear(hidden, ("embed", "mlp"), "fc3")(x)
        else:
            h = nn.gelu(h, approximate=False)
        return linear(dim, ("mlp", "embed"), "fc2")(h)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastic depth (spec 2.2): zero for a sample with probability `rate`, else over ``1 - rate``. ``[B, ...]`` -> ``[B, ...]``."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
    # At rate 1 nothing is kept, and nothing must divide by zero, not even for the gradient of what is not selected.
    return jnp.where(keep, x / jnp.maximum(1 - rate, 1e-6).astype(x.dtype), 0)


class EncoderBlock(nn.Module):
    """``x += attn(norm1 x); x += mlp(norm2 x)``. Returns the carry and the output of an `nn.scan` body: (x, x or None)."""

    num_heads: int
    mlp_ratio: float
    gated_mlp: bool
    use_bias: bool
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    collect: bool = False  # whether the scan shall stack what every block returns

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, drop_rate: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        def branch(y: jax.Array) -> jax.Array:
            return y if drop_rate is None else drop_path(y, drop_rate, self.make_rng("dropout"))

        x = x + branch(SelfAttention(self.num_heads, self.use_bias, self.dtype, self.attention, name="attn")(norm("norm1")(x), mask))
        x = x + branch(Mlp(self.mlp_ratio, self.gated_mlp, self.use_bias, self.dtype, name="mlp")(norm("norm2")(x)))
        x = nn.with_logical_constraint(x, ("batch", "tokens", None))
        return x, x if self.collect else None


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the context (normalised again in every block), MLP (spec 2.2)."""

    num_heads: int
    mlp_ratio: float
    gated_mlp: bool
    use_bias: bool
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, self_mask: jax.Array | None, context: jax.Array, context_mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        x = x + SelfAttention(self.num_heads, self.use_bias, self.dtype, self.attention, name="self_attn")(norm("norm1")(x), self_mask)
        query, context = norm("query_norm")(x), norm("context_norm")(context)
        x = x + CrossAttention(self.num_heads, self.use_bias, self.dtype, self.attention, name="cross_attn")(query, context, context_mask)
        x = x + Mlp(self.mlp_ratio, self.gated_mlp, self.use_bias, self.dtype, name="mlp")(norm("norm2")(x))
        return nn.with_logical_constraint(x, ("batch", "tokens", None)), None


REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the products with weights, recompute the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep block inputs only
}


def stack(block: type[nn.Module], length: int, remat: str, unroll: int, broadcast: int, scanned: int = 0) -> type[nn.Module]:
    """`length` copies of `block` under one `nn.scan`, parameters and buffers with a leading ``layers`` axis.

    `broadcast` is how many arguments after the carry are the same for every layer; `scanned` more have one value a layer.
    """
    if REMAT_POLICIES[remat] is not None:
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "buffers": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(*(nn.broadcast,) * broadcast, *(0,) * scanned),
        length=length,
        unroll=min(unroll, length),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
