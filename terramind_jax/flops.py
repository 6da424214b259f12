"""What a step costs: an analytic count of the floating-point operations of the matrix products, and the rate of the devices.

Of networks that are put together freely, as in fine-tuning, the products of the traced program are counted instead.

XLA's own count is of no use here: it counts the body of a scan once, whatever its length. One multiply-add is two operations; a
backward pass is two forward passes; rematerialisation is not counted, so that MFU is the *model's* utilisation.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from terramind_jax.modalities import Stream
from terramind_jax.model import TransformerConfig, codebooks
from terramind_jax.tokenizer import TokenizerConfig
from terramind_jax.tokenizer.unet import has_attention

# Dense bfloat16 peak of one device as JAX counts devices, in FLOP/s; float16's where there is no bfloat16. The longest name that stands
# as words of its own in `device_kind` decides. TPUs: Cloud TPU's documentation. GPUs: NVIDIA's data sheets, whose figures "with sparsity"
# are twice these (B200: HGX and GB200 NVL72; A10G: the one for AWS); RTX: the white papers of GA102 and Ada, sums in float32.
PEAK = {
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 61.5e12,  # half a chip: JAX shows its two cores
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12,
    "T4": 65e12,
    "V100": 125e12,
}


def _mlp(tokens: float, dim: int, mlp_ratio: float, gated: bool) -> float:
    hidden = int((2 / 3 if gated else 1) * mlp_ratio * dim)
    return (6 if gated else 4) * tokens * dim * hidden


def encoder_block(tokens: float, dim: int, mlp_ratio: float, gated: bool = False) -> float:
    """Projections, full attention and MLP of one block, for one sample."""
    return 8 * tokens * dim**2 + 4 * tokens**2 * dim + _mlp(tokens, dim, mlp_ratio, gated)


def decoder_block(targets: float, context: float, dim: int, mlp_ratio: float, gated: bool = False) -> float:
    """An encoder block over the targets plus cross-attention to the context, for one sample."""
    cross = 4 * targets * dim**2 + 4 * context * dim**2 + 4 * targets * context * dim
    return encoder_block(targets, dim, mlp_ratio, gated) + cross


def transformer_forward(
    config: TransformerConfig,
    inputs: float,
    targets: float,
    patches: Mapping[str, float] | None = None,
    heads: Mapping[str, float] | None = None,
) -> float:
    """Operations of one sample's forward pass.

    Args:
      inputs, targets: tokens in the encoder and the decoder.
      patches: how many inputs are of each encoder stream; a token of one code costs nothing. Default: evenly over all.
      heads: how many targets each decoder stream has; default: evenly. A head spans its own stream's vocabulary only.
    """
    c = config
    patches = patches or {s.key: inputs / len(c.encoder) for s in c.encoder}
    heads = heads or {s.key: targets / len(c.decoder) for s in c.decoder}
    read, made = ({s.key: s for s in streams} for streams in (c.encoder, c.decoder))
    embed = sum(n * _embedding(read[key], c) for key, n in patches.items())
    encode = c.encoder_depth * encoder_block(inputs, c.dim, c.mlp_ratio, c.gated_mlp) + 2 * inputs * c.dim**2
    decode = c.decoder_depth * decoder_block(targets, inputs, c.dim, c.mlp_ratio, c.gated_mlp)
    return embed + encode + decode + sum(n * _head(made[key], c.dim) for key, n in heads.items())


def _embedding(stream: Stream, config: TransformerConfig) -> float:
    """Of one input: a patch is projected, several codes go through an MLP, and one is looked up."""
    if stream.kind == "pixels":
        return 2 * config.patch_size**2 * stream.channels * config.dim
    return _codebook_mlp(stream, config.dim) if stream.codes else 0.0


def _head(stream: Stream, dim: int) -> float:
    """Of one target."""
    return _codebook_mlp(stream, dim) if stream.codes else 2 * dim * stream.vocab_size


def _codebook_mlp(stream: Stream, dim: int) -> float:
    """Between the codes of a patch and the model's width, either way."""
    return 2 * codebooks.WIDTH * dim * (stream.num_codebooks * stream.vocab_size + dim)


def transformer_step(config: TransformerConfig, batch_size: int, inputs: float, targets: float, **counts: Mapping[str, float]) -> float:
    """Operations of one training step: forward and backward over a batch. Arguments as `transformer_forward`."""
    return 3 * batch_size * transformer_forward(config, inputs, targets, **counts)


def transformer_recomputed(config: TransformerConfig, inputs: float, targets: float) -> float:
    """Operations that the backward pass of one sample repeats under ``config.remat``; the model's own count leaves them out.

    ``dots`` keeps the products with weights and repeats attention's two; ``full`` repeats every block but its last product.
    """
    c = config
    if c.remat == "none":
        return 0.0
    attention = 4 * c.dim * (c.encoder_depth * inputs**2 + c.decoder_depth * (targets**2 + targets * inputs))
    if c.remat == "dots":
        return attention
    last = _mlp(1, c.dim, c.mlp_ratio, c.gated_mlp) / (3 if c.gated_mlp else 2)
    encode = encoder_block(inputs, c.dim, c.mlp_ratio, c.gated_mlp) - inputs * last
    decode = decoder_block(targets, inputs, c.dim, c.mlp_ratio, c.gated_mlp) - targets * last
    return c.encoder_depth * encode + c.decoder_depth * decode


def tokenizer_forward(config: TokenizerConfig, image_size: int) -> float:
    """Operations of one image through a ViT encoder, which ends in one more MLP (spec 6.2), and a ViT decoder or one pass of a U-Net."""
    c, tokens = config, (image_size // config.patch_size) ** 2
    patch = 2 * tokens * c.patch_size**2 * c.channels * c.dim
    latent = 2 * tokens * c.dim * c.latent_dim
    vit = patch + latent + c.depth * encoder_block(tokens, c.dim, c.mlp_ratio) + _mlp(tokens, c.dim, c.mlp_ratio, False)
    return vit + (unet_forward(c, image_size) if c.decoder == "unet" else vit)


def unet_forward(config: TokenizerConfig, image_size: int) -> float:
    """Operations of one pass through the diffusion decoder (spec 6.5), but for those of the timestep, which are few."""
    c, last = config, len(config.channel_mult) - 1
    widths = [c.model_channels * m for m in c.channel_mult]

    def places(level: int) -> int:
        return (image_size // c.decoder_patch_size >> level) ** 2

    def conv(level: int, inputs: int, outputs: int) -> float:
        return 18 * places(level) * inputs * outputs

    def residual(level: int, inputs: int) -> float:
        skip = 2 * places(level) * inputs * widths[level] if inputs != widths[level] else 0
        return conv(level, inputs, widths[level]) + conv(level, widths[level], widths[level]) + skip

    def attention(level: int) -> float:
        n, width = places(level), widths[level]
        return 8 * n * width**2 + 4 * n**2 * width if has_attention(c, level) else 0

    pixels = c.channels * c.decoder_patch_size**2
    total, skips = conv(0, pixels + c.latent_dim, widths[0]) + conv(0, widths[0], pixels), [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(c.num_res_blocks):
            total += residual(level, skips[-1]) + attention(level)
            skips.append(width)
        if level < last:
            total += conv(level + 1, width, width)
            skips.append(width)
    total += 2 * residual(last, widths[last]) + attention(last)
    width = widths[last]
    for level in range(last, -1, -1):
        for _ in range(c.num_res_blocks + 1):
            total += residual(level, width + skips.pop()) + attention(level)
            width = widths[level]
        total += conv(level - 1, width, width) if level else 0
    return total


def tokenizer_step(config: TokenizerConfig, batch_size: int, image_size: int) -> float:
    """Operations of one training step of a tokenizer."""
    return 3 * batch_size * tokenizer_forward(config, image_size)


def traced(f: Callable[..., Any], *arguments: Any) -> float:
    """Operations of the matrix products and convolutions of a program on abstract arguments, with every pass of a scan.

    Of the branches of a ``cond`` the one with most counts. A ``while`` counts as one pass, for how many it makes is not known.
    """
    return float(_products(jax.make_jaxpr(f)(*arguments).jaxpr))


def _products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[outputs]
        total += max(map(_products, _programs(equation.params.get("branches", ()))), default=0)
        total += equation.params.get("length", 1) * sum(map(_products, _programs(equation.params.values())))
    return total


def _programs(values: Iterable[Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, whether closed or not."""
    return [jaxpr for jaxpr in (getattr(value, "jaxpr", value) for value in values) if hasattr(jaxpr, "eqns")]


def peak(device: jax.Device | None = None) -> float:
    """FLOP/s of one device: the data sheet's for TPUs and GPUs, measured for a CPU, 0 for a device that is not in the table."""
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return measure_matmul() / jax.local_device_count()  # forced host devices share the machine
    return known_peak(device.device_kind)


def known_peak(device_kind: str) -> float:
    """`PEAK` of a device by what JAX calls it, 0 if it is not in the table."""
    named = [name for name in PEAK if re.search(rf"\b{name}\b", device_kind)]
    return PEAK[max(named, key=len)] if named else 0.0


def measure_matmul(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of two square matrices on the first device, the best of a few runs."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
