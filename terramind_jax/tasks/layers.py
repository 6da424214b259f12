"""Layers of the decoders, as PyTorch computes and initialises them, on ``[B, H, W, C]``.

Resizing and pooling are products with one small matrix an axis, which every device does fast and differentiates without scattering.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax.model.layers import Initializer, uniform

STATISTICS = "batch_stats"  # the collection of running statistics
EPS = 1e-5  # of BatchNorm
MOMENTUM = 0.1  # share of a new batch in the running statistics


class Conv(nn.Module):
    """``[B, H, W, I]`` -> ``[B, H, W, O]``, an odd `size` of kernel; PyTorch's default initialisation, or `initializer` without bias."""

    outputs: int
    size: int = 3
    use_bias: bool = True
    initializer: Initializer | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = uniform((self.size**2 * x.shape[-1]) ** -0.5)
        kernel = self.param("kernel", self.initializer or bound, (self.size, self.size, x.shape[-1], self.outputs))
        padding = ((self.size // 2, self.size // 2),) * 2
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x.astype(self.dtype), kernel.astype(self.dtype), (1, 1), padding, dimension_numbers=dimensions)
        return y + self.param("bias", bound, (self.outputs,)).astype(self.dtype) if self.use_bias else y


class Upscale(nn.Module):
    """Transposed convolution whose kernel and stride are both `factor`: ``[B, H, W, I]`` -> ``[B, H * factor, W * factor, O]``."""

    outputs: int
    factor: int = 2
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        f, (b, h, w, inputs) = self.factor, x.shape
        bound = uniform((f**2 * self.outputs) ** -0.5)  # PyTorch takes the outputs for the fan in
        kernel = self.param("kernel", bound, (inputs, f, f, self.outputs))
        bias = self.param("bias", bound, (self.outputs,))
        y = jnp.einsum("bhwc,cijo->bhiwjo", x.astype(self.dtype), kernel.astype(self.dtype))
        return y.reshape(b, h * f, w * f, self.outputs) + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """Over all but the last axis. In training it keeps a running mean and (unbiased) variance, which it uses outside of it.

    Statistics are float32 and of the whole batch, on however many devices it lies. `count` is of the batches seen.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape, n = x.shape[-1:], math.prod(x.shape[:-1])
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable(STATISTICS, "mean", jnp.zeros, shape)
        variance = self.variable(STATISTICS, "var", jnp.ones, shape)
        count = self.variable(STATISTICS, "count", jnp.zeros, (), jnp.int32)
        wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        if not train:
            centred, own = wide - mean.value, variance.value
        else:
            own_mean = wide.mean(axes)
            centred = wide - own_mean
            own = jnp.square(centred).mean(axes)
            mean.value += MOMENTUM * (own_mean - mean.value)
            variance.value += MOMENTUM * (own * (n / max(n - 1, 1)) - variance.value)
            count.value += 1
        return (centred * jax.lax.rsqrt(own + EPS) * scale + bias).astype(x.dtype)


class ConvNormReLU(nn.Module):
    """A convolution without bias, BatchNorm and ReLU."""

    outputs: int
    size: int = 3
    initializer: Initializer | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.outputs, self.size, use_bias=False, initializer=self.initializer, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(name="norm")(x, train))


# ---- other sizes ----


def resize(x: jax.Array, size: Sequence[int], align_corners: bool = False) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, *size, C]``, bilinear as PyTorch's ``interpolate``: not antialiased."""
    if x.shape[1:3] == tuple(size):
        return x
    return _along_both(x, *(_bilinear(n, m, align_corners) for n, m in zip(x.shape[1:3], size, strict=True)))


def nearest(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, *size, C]``, the pixel at or before, as PyTorch's ``interpolate(mode="nearest")``."""
    b, h, w, c = x.shape
    if size[0] % h or size[1] % w:
        return _along_both(x, *(_nearest(n, m) for n, m in zip((h, w), size, strict=True)))
    wide = jnp.broadcast_to(x[:, :, None, :, None], (b, h, size[0] // h, w, size[1] // w, c))
    return wide.reshape(b, *size, c)


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, size, size, C]``: means of parts that may overlap, as PyTorch's ``AdaptiveAvgPool2d``."""
    return _along_both(x, *(_parts(n, size) for n in x.shape[1:3]))


def _along_both(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    rows, columns = (jnp.asarray(m, x.dtype) for m in (rows, columns))
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x, precision="highest")


@functools.cache
def _bilinear(n: int, m: int, align_corners: bool) -> np.ndarray:
    """Weights ``[m, n]`` of one axis."""
    if align_corners:
        at = np.arange(m) * ((n - 1) / (m - 1) if m > 1 else 0.0)
    else:
        at = np.maximum((np.arange(m) + 0.5) * (n / m) - 0.5, 0)
    first = np.minimum(at.astype(int), n - 1)
    second, share = np.minimum(first + 1, n - 1), at - first
    weights = np.zeros((m, n))
    np.add.at(weights, (np.arange(m), first), 1 - share)
    np.add.at(weights, (np.arange(m), second), share)
    return weights


@functools.cache
def _nearest(n: int, m: int) -> np.ndarray:
    return np.eye(n)[np.arange(m) * n // m]


@functools.cache
def _parts(n: int, size: int) -> np.ndarray:
    """Weights ``[size, n]`` of the means over ``floor(i n / size)`` to ``ceil((i + 1) n / size)``."""
    weights = np.zeros((size, n))
    for i in range(size):
        first, end = i * n // size, -(-(i + 1) * n // size)
        weights[i, first:end] = 1 / (end - first)
    return weights
