"""Rules for the tokenizers (spec 10.4, 10.5): 601 names with the diffusion decoder, 310 with LULC's ViT."""

from __future__ import annotations

from collections.abc import Iterator

from terramind_jax.convert.rules import Rule
from terramind_jax.tokenizer import TokenizerConfig
from terramind_jax.tokenizer.unet import has_attention


def rules(config: TokenizerConfig) -> list[Rule]:
    """Of a whole tokenizer. As a backbone the reference holds those of ``encoder.`` and ``quant_proj.`` alone."""
    table = [*_weights("encoder/proj", "encoder.proj", "conv"), *_trunk("encoder", config)]
    table += _weights("quant_proj", "quant_proj", "conv1x1")
    if config.decoder == "unet":
        return [*table, *_unet(config)]
    # The reference's out_proj is linear, its outputs in the order (C, p, p), and so is ours.
    table += [*_trunk("decoder", config), *_weights("decoder/out_proj", "decoder.out_proj", "linear")]
    return [*table, *_weights("decoder/post_quant_proj", "post_quant_proj", "conv1x1")]


def _weights(ours: str, torch: str, layout: str, inputs: int = 1) -> list[Rule]:
    return [
        Rule(f"params/{ours}/kernel", (f"{torch}.weight",), layout, inputs=inputs),
        Rule(f"params/{ours}/bias", (f"{torch}.bias",)),
    ]


def _norm(ours: str, torch: str) -> list[Rule]:
    return [Rule(f"params/{ours}/scale", (f"{torch}.weight",)), Rule(f"params/{ours}/bias", (f"{torch}.bias",))]


# ---- ViT ----


def _trunk(part: str, config: TokenizerConfig) -> Iterator[Rule]:
    """Positions, layers and last MLP of ``encoder`` or ``decoder``."""
    yield Rule(f"buffers/{part}/pos_emb", (f"{part}.pos_emb",), "chw")
    ours, torch = f"{part}/blocks", part + ".blocks.{i}"
    if config.depth:
        for name in ("norm1", "norm2"):
            yield from _norm(f"{ours}/{name}", f"{torch}.{name}")
        yield Rule(f"params/{ours}/attn/qkv/kernel", (f"{torch}.attn.qkv.weight",), "linear")
        yield Rule(f"params/{ours}/attn/qkv/bias", (f"{torch}.attn.qkv.bias",), "ones", shape=(-1,))
        yield from _weights(f"{ours}/attn/proj", f"{torch}.attn.proj", "linear", inputs=2)
        for name in ("fc1", "fc2"):
            yield from _weights(f"{ours}/mlp/{name}", f"{torch}.mlp.{name}", "linear")
    yield from _norm(f"{part}/norm_mlp", f"{part}.norm_mlp")
    for name in ("fc1", "fc2"):
        yield from _weights(f"{part}/post_mlp/{name}", f"{part}.post_mlp.{name}", "linear")


# ---- U-Net ----


def _unet(config: TokenizerConfig) -> Iterator[Rule]:
    """The reference numbers all blocks of one direction; a block is a list of residual block, attention and resampling."""
    c, levels = config, range(len(config.channel_mult))
    for i, name in enumerate(("fc1", "fc2")):
        yield from _weights(f"decoder/time_embed/{name}", f"decoder.time_embed.{2 * i}", "linear")
    yield from _weights("decoder/conv_in", "decoder.input_blocks.0.0", "conv")
    n, widths = 1, [c.channel_mult[0]]  # of each map that the way up will take, in units of model_channels
    for level in levels:
        for i in range(c.num_res_blocks):
            yield from _block(f"down_{level}", i, f"decoder.input_blocks.{n}", c, level, widths[-1])
            n, widths = n + 1, [*widths, c.channel_mult[level]]
        if level + 1 < len(levels):
            yield from _weights(f"decoder/down_{level}/downsample", f"decoder.input_blocks.{n}.0.op", "conv")
            n, widths = n + 1, [*widths, widths[-1]]
    for i, name in enumerate(("res_0", "attn", "res_1")):
        make = (
            _attention(f"middle/{name}", f"decoder.middle_block.{i}")
            if name == "attn"
            else _residual(f"middle/{name}", f"decoder.middle_block.{i}")
        )
        yield from make
    n, width = 0, c.channel_mult[-1]
    for level in reversed(levels):
        for i in range(c.num_res_blocks + 1):
            yield from _block(f"up_{level}", i, f"decoder.output_blocks.{n}", c, level, width + widths.pop())
            n, width = n + 1, c.channel_mult[level]
        if level:
            place = 2 if has_attention(c, level) else 1
            yield from _weights(f"decoder/up_{level}/upsample", f"decoder.output_blocks.{n - 1}.{place}.conv", "conv")
    yield from _norm("decoder/norm_out", "decoder.out.0")
    yield from _weights("decoder/conv_out", "decoder.out.2", "conv")


def _block(ours: str, i: int, torch: str, config: TokenizerConfig, level: int, inputs: int) -> Iterator[Rule]:
    yield from _residual(f"{ours}/res_{i}", f"{torch}.0", skip=inputs != config.channel_mult[level])
    if has_attention(config, level):
        yield from _attention(f"{ours}/attn_{i}", f"{torch}.1")


def _residual(ours: str, torch: str, skip: bool = False) -> Iterator[Rule]:
    ours, torch = f"decoder/{ours}", f"{torch}."
    yield from _norm(f"{ours}/norm1", f"{torch}in_layers.0")
    yield from _weights(f"{ours}/conv1", f"{torch}in_layers.2", "conv")
    yield from _weights(f"{ours}/time", f"{torch}emb_layers.1", "linear")
    yield from _norm(f"{ours}/norm2", f"{torch}out_layers.0")
    yield from _weights(f"{ours}/conv2", f"{torch}out_layers.3", "conv")
    if skip:
        yield from _weights(f"{ours}/skip", f"{torch}skip_connection", "conv1x1")


def _attention(ours: str, torch: str) -> Iterator[Rule]:
    yield from _norm(f"decoder/{ours}/norm", f"{torch}.norm")
    yield from _weights(f"decoder/{ours}/qkv", f"{torch}.qkv", "conv1d")
    yield from _weights(f"decoder/{ours}/proj", f"{torch}.proj_out", "conv1d")
