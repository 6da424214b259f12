"""Necks, decoders and heads that turn features of some layers into maps or labels (spec 5.7), with TerraTorch's results.

    features of the chosen layers  [B, N, D] each
      reshape                      [B, h, w, D]
      Pyramid (optional)           four resolutions, 4, 2, 1 and 1/2 times the tokens'
      decoder                      [B, H, W, channels]
      head                         [B, H, W, outputs], or [B, outputs] of a label

Running statistics of BatchNorm are in the collection ``batch_stats``; what draws or changes them is told ``train``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax.model.layers import uniform
from terramind_jax.tasks import layers

Task = Literal["segmentation", "regression", "classification", "scalar_regression"]
DECODERS = ("unet", "upernet", "upernet_pangaea", "fcn", "linear", "identity")
PYRAMIDAL = ("unet", "upernet", "upernet_pangaea")  # decoders that may stand on a pyramid
PIXEL_TASKS, LABEL_TASKS = ("segmentation", "regression"), ("classification", "scalar_regression")
CHANNELS = {"unet": (512, 256, 128, 64), "upernet": (512,), "upernet_pangaea": (512,), "fcn": (256,), "linear": (), "identity": ()}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What stands on a backbone, from the layers that it reads to the number of outputs.

    Several labels at once are a ``classification``, too: what makes them so is the loss. ``upernet_pangaea`` is an UPerNet as PANGAEA has
    it: its pyramid keeps the features' width, corners are not aligned where images are enlarged, dropout takes whole channels.
    """

    task: Task
    num_outputs: int  # classes, or variables of a regression
    layers: tuple[int, ...] = (2, 5, 8, 11)  # of the backbone, from 0; large: 5, 11, 17, 23
    pyramid: bool = True  # learned interpolation to four resolutions
    decoder: str = "unet"
    channels: tuple[int, ...] = ()  # of each block of a U-Net; of an UPerNet, FCN or linear decoder one number; empty: `CHANNELS`
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)  # of an UPerNet
    num_convs: int = 4  # blocks of an FCN, each of which doubles the resolution
    upsampling: int = 16  # factor of a linear decoder
    head_channels: tuple[int, ...] = ()  # of the layers of the head before its last
    head_dropout: float = 0.0
    linear_after_pool: bool = False  # labels: the head sees the mean over the image, not each token
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for what, given, known in (("task", self.task, (*PIXEL_TASKS, *LABEL_TASKS)), ("decoder", self.decoder, DECODERS)):
            if given not in known:
                raise ValueError(f"Unknown {what} {given!r}; known: {', '.join(known)}.")
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs is {self.num_outputs}; expected at least 1.")
        if self.pyramid and len(self.layers) != 4:
            raise ValueError(f"A pyramid has 4 levels, so it takes features of 4 layers; {len(self.layers)} are given.")
        if self.decoder == "unet" and len(self.widths) != len(self.layers):
            raise ValueError(f"A U-Net has a block a layer; there are {len(self.widths)} channels for {len(self.layers)} layers.")

    @property
    def widths(self) -> tuple[int, ...]:
        return self.channels or CHANNELS[self.decoder]

    @property
    def is_pixelwise(self) -> bool:
        return self.task in PIXEL_TASKS

    @property
    def is_pangaea(self) -> bool:
        return self.decoder == "upernet_pangaea"

    @property
    def includes_head(self) -> bool:
        """Whether the decoder itself makes the outputs: a linear one without channels of its own."""
        return self.decoder == "linear" and not self.channels


def to_image(tokens: jax.Array, grid: Sequence[int]) -> jax.Array:
    """``[B, N, D]`` -> ``[B, *grid, D]``, row by row."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"There are {tokens.shape[1]} tokens, which are no image of {grid[0]}x{grid[1]}.")
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


class Pyramid(nn.Module):
    """Four images of one resolution -> four of 4, 2, 1 and 1/2 times that, of a quarter, half, all and all of the width, or if told all."""

    dtype: str = "float32"
    keeps_width: bool = False

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> list[jax.Array]:
        first, second, third, fourth = features
        half, quarter = (first.shape[-1] // (1 if self.keeps_width else n) for n in (2, 4))
        x = layers.Upscale(half, dtype=self.dtype, name="fpn1_up1")(first)
        x = nn.gelu(layers.BatchNorm(name="fpn1_norm")(x, train), approximate=False)
        x = layers.Upscale(quarter, dtype=self.dtype, name="fpn1_up2")(x)
        y = layers.Upscale(half, dtype=self.dtype, name="fpn2_up")(second)
        return [x, y, third.astype(self.dtype), nn.max_pool(fourth.astype(self.dtype), (2, 2), (2, 2))]


# ---- decoders: images of several resolutions, finest first -> one image ----


class UNet(nn.Module):
    """From the coarsest image to the finest: enlarge to the next one's size, concatenate it, convolve twice."""

    channels: Sequence[int]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        x, *skips = (f.astype(self.dtype) for f in reversed(features))
        for i, width in enumerate(self.channels):
            if i < len(skips):
                x = jnp.concatenate([layers.nearest(x, skips[i].shape[1:3]), skips[i]], axis=-1)
            for name in ("conv1", "conv2"):
                he = uniform(math.sqrt(6 / (9 * x.shape[-1])))
                x = layers.ConvNormReLU(width, initializer=he, dtype=self.dtype, name=f"blocks_{i}_{name}")(x, train)
        return x


class UPerNet(nn.Module):
    """Pooling pyramid on the coarsest image, then a feature pyramid from it to the finest (arXiv 1807.10221)."""

    channels: int = 512
    pool_scales: Sequence[int] = (1, 2, 3, 6)
    dtype: str = "float32"
    align_corners: bool = True

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        def conv(name: str, x: jax.Array, size: int) -> jax.Array:
            return layers.ConvNormReLU(self.channels, size, dtype=self.dtype, name=name)(x, train)

        def to(x: jax.Array, like: jax.Array) -> jax.Array:
            return layers.resize(x, like.shape[1:3], align_corners=self.align_corners)

        *finer, top = (f.astype(self.dtype) for f in features)
        laterals = [conv(f"lateral_convs_{i}", x, 1) for i, x in enumerate(finer)]
        pooled = [to(conv(f"psp_{i}", layers.adaptive_mean(top, n), 1), top) for i, n in enumerate(self.pool_scales)]
        laterals.append(conv("bottleneck", jnp.concatenate([top, *pooled], axis=-1), 3))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] += to(laterals[i], laterals[i - 1])
        out = [conv(f"fpn_convs_{i}", x, 3) for i, x in enumerate(laterals[:-1])] + laterals[-1:]
        return conv("fpn_bottleneck", jnp.concatenate([to(x, out[0]) for x in out], axis=-1), 3)


class FCN(nn.Module):
    """Blocks on the last image, each of which doubles the resolution."""

    channels: int = 256
    num_convs: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        x = features[-1]
        for i in range(self.num_convs):
            x = layers.Upscale(self.channels, dtype=self.dtype, name=f"convs_{i}_up")(x)
            x = layers.Conv(self.channels, dtype=self.dtype, name=f"convs_{i}_conv")(x)
            x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=f"convs_{i}_norm")(x)
            x = nn.gelu(x.astype(self.dtype), approximate=False)
        return x


class Linear(nn.Module):
    """One transposed convolution on the last image: straight to the outputs, or to channels that a head reads."""

    channels: int
    upsampling: int = 16
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        return layers.Upscale(self.channels, self.upsampling, dtype=self.dtype, name="conv")(features[-1])


class Identity(nn.Module):
    """The last image as it is."""

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> jax.Array:
        return features[-1]


def decoder(config: DecoderConfig, **options) -> nn.Module:
    """The decoder of a configuration; `options` are Linen's, such as its name."""
    match config.decoder:
        case "unet":
            return UNet(config.widths, config.dtype, **options)
        case "upernet" | "upernet_pangaea":
            return UPerNet(config.widths[0], config.pool_scales, config.dtype, not config.is_pangaea, **options)
        case "fcn":
            return FCN(config.widths[0], config.num_convs, config.dtype, **options)
        case "linear":
            return Linear(config.num_outputs if config.includes_head else config.widths[0], config.upsampling, config.dtype, **options)
    return Identity(**options)


# ---- heads: one image -> outputs, float32 ----


class PixelHead(nn.Module):
    """Segmentation: 3x3 convolutions with ReLU. Regression: with BatchNorm, too, and dropout of channels, as PANGAEA's has. Then 1x1."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c, is_regression = self.config, self.config.task == "regression"
        for i, width in enumerate(c.head_channels):
            if is_regression:
                x = layers.ConvNormReLU(width, dtype=c.dtype, name=f"layers_{i}")(x, train)
            else:
                x = nn.relu(layers.Conv(width, dtype=c.dtype, name=f"layers_{i}")(x))
        x = nn.Dropout(c.head_dropout, broadcast_dims=(1, 2) if is_regression or c.is_pangaea else ())(x, deterministic=not train)
        return layers.Conv(c.num_outputs, 1, dtype=c.dtype, name="out")(x).astype(jnp.float32)


class LabelHead(nn.Module):
    """Linear layers with ReLU on every pixel, then the mean over the image, or the other way round."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def linear(outputs: int, name: str, x: jax.Array) -> jax.Array:
            bound = uniform(x.shape[-1] ** -0.5)
            return nn.Dense(outputs, kernel_init=bound, bias_init=bound, dtype=c.dtype, name=name)(x)

        c, x = self.config, x.reshape(x.shape[0], -1, x.shape[-1])
        x = x.mean(1) if c.linear_after_pool else x
        for i, width in enumerate(c.head_channels):
            x = nn.relu(linear(width, f"layers_{i}", x))
        x = nn.Dropout(c.head_dropout)(x, deterministic=not train)
        x = linear(c.num_outputs, "out", x).astype(jnp.float32)
        return x if c.linear_after_pool else x.mean(1)


def head(config: DecoderConfig, **options) -> nn.Module | None:
    """The head of a configuration; None if its decoder makes the outputs."""
    if config.includes_head:
        return None
    return PixelHead(config, **options) if config.is_pixelwise else LabelHead(config, **options)
