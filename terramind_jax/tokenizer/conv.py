"""3x3 convolutions, channels last. On a CPU the wide ones multiply 2x2 outputs at a time after Winograd, as matrix products.

XLA's CPU convolution takes the time of its multiplications; Winograd's F(2x2, 3x3) needs 4 instead of 9 a pixel and, its factors being 0,
1 and 1/2, rounds as a convolution does. Accelerators keep the convolution of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax.model.layers import uniform

COLLECTION = "winograd"  # transformed kernels, made from "params" by `transform_kernels` where many calls share them
SMALLEST = 14  # sides from which the transform pays; below it, reading the larger kernel takes the time that is saved


class Conv(nn.Module):
    """3x3, padding 1, with bias: ``[B, H, W, I]`` -> ``[B, H / stride, W / stride, O]``; PyTorch's default initialisation, or zeros."""

    outputs: int
    stride: int = 1
    zero: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.zero else uniform((9 * x.shape[-1]) ** -0.5)
        kernel_init = nn.with_logical_partitioning(init, (None, None, None, "embed"))
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.outputs)).astype(self.dtype)
        bias = self.param("bias", nn.with_logical_partitioning(init, ("embed",)), (self.outputs,)).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.stride == 1 and self.dtype == "float32" and pays(x.shape) and self.has_variable(COLLECTION, "kernel"):
            transformed = self.get_variable(COLLECTION, "kernel")
            return jax.lax.platform_dependent(x, kernel, transformed, cpu=_cpu, default=_default) + bias
        return convolve(x, kernel, self.stride) + bias


def _cpu(x: jax.Array, kernel: jax.Array, transformed: jax.Array) -> jax.Array:
    return winograd(x, transformed)


def _default(x: jax.Array, kernel: jax.Array, transformed: jax.Array) -> jax.Array:
    return convolve(x, kernel)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Padding 1 on each side, with any stride; ``SAME`` would pad an even side unevenly."""
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pays(shape: Sequence[int]) -> bool:
    """Whether images ``[B, H, W, C]`` are even-sided and large enough for Winograd."""
    return not (shape[1] % 2 or shape[2] % 2) and min(shape[1:3]) >= SMALLEST


def transform_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `COLLECTION` of these parameters: every 3x3 kernel transformed. What no layer uses is never computed under jit."""
    tree = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            tree[name] = transform_kernels(value)
        elif name == "kernel" and value.shape[:2] == (3, 3):
            tree[name] = transform_kernel(value)
    return tree


def transform_kernel(kernel: jax.Array) -> jax.Array:
    """``[3, 3, I, O]`` -> ``[16, I, O]``."""

    def four(a, b, c):
        return a, (a + b + c) / 2, (a - b + c) / 2, c

    columns = [four(*row) for row in kernel]
    return jnp.stack([x for row in zip(*(four(*column) for column in zip(*columns, strict=True)), strict=True) for x in row])


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, H, W, I]`` with even sides and a transformed kernel ``[16, I, O]`` -> ``[B, H, W, O]``."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _inputs([padded[:, i : i + height - 1 : 2] for i in range(4)])  # each [B, H/2, W + 2, I]
    tiles = [_inputs([row[:, :, j : j + width - 1 : 2] for j in range(4)]) for row in rows]
    tiles = jnp.stack([tile.reshape(-1, channels) for row in tiles for tile in row])
    products = jax.lax.dot_general(tiles, kernel, (((2,), (1,)), ((0,), (0,))))  # [16, B * H/2 * W/2, O]
    products = products.reshape(4, 4, batch, height // 2, width // 2, -1)
    columns = [jnp.stack(_outputs(list(row)), axis=3) for row in products]  # each [B, H/2, W/2, 2, O]
    return jnp.stack(_outputs(columns), axis=2).reshape(batch, height, width, -1)


def _inputs(d: Sequence[jax.Array]) -> list[jax.Array]:
    """Four neighbours, two apart -> what the four products of one axis take."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _outputs(m: Sequence[jax.Array]) -> list[jax.Array]:
    """The four products of one axis -> two outputs."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
