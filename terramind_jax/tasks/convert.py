"""Rules for what TerraTorch puts on a backbone: neck, decoder and head (its ``EncoderDecoderFactory``, necks in their usual order)."""

from __future__ import annotations

import dataclasses

from terramind_jax.convert import transformer
from terramind_jax.convert.rules import Rule
from terramind_jax.tasks.decoders import DecoderConfig
from terramind_jax.tasks.model import TaskModel

NECK = "neck.2"  # after SelectIndices and ReshapeTokensToImage


def model_rules(module: TaskModel) -> list[Rule]:
    """Of a whole model, which in TerraTorch is a PixelWiseModel or a ScalarOutputModel of the same configuration."""

    def within(rule: Rule) -> Rule:
        collection, path = rule.ours.split("/", 1)
        return dataclasses.replace(rule, ours=f"{collection}/encoder/{path}", torch=tuple(f"encoder.{name}" for name in rule.torch))

    return [*map(within, transformer.backbone_rules(module.backbone)), *rules(module.config)]


def rules(config: DecoderConfig) -> list[Rule]:
    """Of ``{"params", "batch_stats"}`` with the entries `neck`, `decoder` and `head`."""
    return [*(_pyramid() if config.pyramid else []), *_DECODERS[config.decoder](config), *_head(config)]


def _layer(ours: str, torch: str, layout: str, use_bias: bool = True) -> list[Rule]:
    kernel, bias = Rule(f"params/{ours}/kernel", (f"{torch}.weight",), layout), Rule(f"params/{ours}/bias", (f"{torch}.bias",))
    return [kernel, bias] if use_bias else [kernel]


def _norm(ours: str, torch: str, running: bool = True) -> list[Rule]:
    table = [Rule(f"params/{ours}/scale", (f"{torch}.weight",)), Rule(f"params/{ours}/bias", (f"{torch}.bias",))]
    if running:
        for name, theirs in (("mean", "running_mean"), ("var", "running_var")):
            table.append(Rule(f"batch_stats/{ours}/{name}", (f"{torch}.{theirs}",)))
        table.append(Rule(f"batch_stats/{ours}/count", (f"{torch}.num_batches_tracked",), "count"))
    return table


def _conv_norm(ours: str, torch: str, conv: str = "conv", norm: str = "norm") -> list[Rule]:
    return [*_layer(f"{ours}/conv", f"{torch}.{conv}", "conv", use_bias=False), *_norm(f"{ours}/norm", f"{torch}.{norm}")]


def _pyramid() -> list[Rule]:
    return [
        *_layer("neck/fpn1_up1", f"{NECK}.fpn1.0", "upscale"),
        *_norm("neck/fpn1_norm", f"{NECK}.fpn1.1"),
        *_layer("neck/fpn1_up2", f"{NECK}.fpn1.3", "upscale"),
        *_layer("neck/fpn2_up", f"{NECK}.fpn2.0", "upscale"),
    ]


def _unet(config: DecoderConfig) -> list[Rule]:
    table = []
    for i in range(len(config.widths)):
        for name in ("conv1", "conv2"):
            table += _conv_norm(f"decoder/blocks_{i}_{name}", f"decoder.decoder.blocks.{i}.{name}", "0", "1")
    return table


def _upernet(config: DecoderConfig) -> list[Rule]:
    table = [rule for i in range(len(config.pool_scales)) for rule in _conv_norm(f"decoder/psp_{i}", f"decoder.psp_modules.{i}.1")]
    table += _conv_norm("decoder/bottleneck", "decoder.bottleneck")
    for i in range(len(config.layers) - 1):
        for name in ("lateral_convs", "fpn_convs"):
            table += _conv_norm(f"decoder/{name}_{i}", f"decoder.{name}.{i}")
    return table + _conv_norm("decoder/fpn_bottleneck", "decoder.fpn_bottleneck")


def _fcn(config: DecoderConfig) -> list[Rule]:
    table = []
    for i in range(config.num_convs):
        table += _layer(f"decoder/convs_{i}_up", f"decoder.convs.{i}.0", "upscale")
        table += _layer(f"decoder/convs_{i}_conv", f"decoder.convs.{i}.1", "conv")
        table += _norm(f"decoder/convs_{i}_norm", f"decoder.convs.{i}.2.ln", running=False)
    return table


def _linear(config: DecoderConfig) -> list[Rule]:
    return _layer("decoder/conv", "decoder.conv", "upscale")


_DECODERS = {"unet": _unet, "upernet": _upernet, "upernet_pangaea": _upernet, "fcn": _fcn, "linear": _linear, "identity": lambda config: []}


def _head(config: DecoderConfig) -> list[Rule]:
    if config.includes_head:
        return []
    layout, is_regression = "conv" if config.is_pixelwise else "linear", config.task == "regression"
    table = []
    for i in range(len(config.head_channels)):
        ours, torch = f"head/layers_{i}", f"head.head.0.{i}"
        table += _conv_norm(ours, torch, "0", "1") if is_regression else _layer(ours, f"{torch}.0", layout)
    last = 1 if is_regression and not config.head_channels else 2  # a regression has nothing where others have an identity
    return table + _layer("head/out", f"head.head.{last}", layout)
