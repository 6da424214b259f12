"""Rules for the pretraining model and the feature extractor (spec 10.2, 10.3)."""

from __future__ import annotations

from collections.abc import Sequence

from terramind_jax.convert.rules import Rule
from terramind_jax.modalities import Stream
from terramind_jax.model import BackboneConfig


def rules(encoder: Sequence[Stream], decoder: Sequence[Stream], *, dim: int, gated_mlp: bool, use_bias: bool) -> list[Rule]:
    """Of a model with these streams; without `decoder` streams, of its encoder alone."""
    table = [*_streams(encoder, decoder, dim), *_norm("encoder_norm", "encoder_norm"), *_encoder_block(gated_mlp, use_bias)]
    if decoder:
        table += [
            Rule("params/mask_token", ("mask_token",), "ones", shape=(1, 1, dim)),
            *_norm("decoder_norm", "decoder_norm"),
            *_linear("decoder_proj_context", "decoder_proj_context", True),
            *_decoder_block(gated_mlp, use_bias),
        ]
    return table


def backbone_rules(config: BackboneConfig) -> list[Rule]:
    """Of a feature extractor (spec 10.3, wrapped names)."""
    table = rules(config.streams, (), dim=config.dim, gated_mlp=config.gated_mlp, use_bias=config.use_bias)
    if config.num_register_tokens:
        table.append(Rule("params/register_tokens", ("register_tokens",), "ones", shape=(1, -1, config.dim)))
    if config.merge_method == "concat":
        table.append(Rule("params/missing_mod_token", ("missing_mod_token",)))
    return table


def _streams(encoder: Sequence[Stream], decoder: Sequence[Stream], dim: int) -> list[Rule]:
    """Embeddings: a stream of both sides has one modality embedding, a decoder's tokens are its output projection (spec 3.4, 3.6)."""
    table = []
    for stream in {s.key: s for s in (*encoder, *decoder)}.values():
        sides = [side for side, streams in (("encoder", encoder), ("decoder", decoder)) if stream in streams]
        names = tuple(f"{side}_embeddings.{stream.key}.mod_emb" for side in sides)
        table.append(Rule(f"params/mod_emb/{stream.key}", names, "ones", shape=(1, 1, dim)))
        for side in sides:
            torch = f"{side}_embeddings.{stream.key}"
            table.append(Rule(f"buffers/{side}_pos_emb/{stream.key}", (f"{torch}.pos_emb",), "ones", shape=(1, -1, dim)))
            if stream.kind == "pixels":
                table.append(Rule(f"params/patch_proj/{stream.key}", (f"{torch}.proj.weight",), "linear"))
            elif stream.codes:
                table += _codebooks(f"encoder_codebook_emb/{stream.key}" if side == "encoder" else f"decoder_codebook_head/{stream.key}")
            else:
                tied = (f"{torch}.to_logits.weight",) if side == "decoder" else ()
                table.append(Rule(f"params/{side}_token_emb/{stream.key}", (f"{torch}.token_emb.weight", *tied)))
    return table


def _codebooks(ours: str) -> list[Rule]:
    """Of a stream with several codebooks, which the reference has not."""
    layers = [Rule(f"params/{ours}/{layer}/{leaf}", ()) for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")]
    norm = [Rule(f"params/{ours}/norm/scale", ()), Rule(f"buffers/{ours}/norm/bias", ())]
    return layers + (norm if ours.startswith("encoder") else [])


def _norm(ours: str, torch: str) -> list[Rule]:
    return [Rule(f"params/{ours}/scale", (f"{torch}.weight",)), Rule(f"buffers/{ours}/bias", (f"{torch}.bias",))]


def _linear(ours: str, torch: str, use_bias: bool, inputs: int = 1, bias_shape: tuple[int, ...] = ()) -> list[Rule]:
    """`bias_shape` is torch's, where ours has its heads on an axis."""
    kernel = Rule(f"params/{ours}/kernel", (f"{torch}.weight",), "linear", inputs=inputs)
    bias = Rule(f"params/{ours}/bias", (f"{torch}.bias",), "ones" if bias_shape else "same", shape=bias_shape)
    return [kernel, bias] if use_bias else [kernel]


def _attention(ours: str, torch: str, projections: Sequence[str], use_bias: bool) -> list[Rule]:
    heads = [rule for p in projections for rule in _linear(f"{ours}/{p}", f"{torch}.{p}", use_bias, bias_shape=(-1,))]
    return [*heads, *_linear(f"{ours}/proj", f"{torch}.proj", use_bias, inputs=2)]


def _mlp(ours: str, torch: str, gated: bool, use_bias: bool) -> list[Rule]:
    layers = ("fc1", "fc2", "fc3") if gated else ("fc1", "fc2")
    return [rule for layer in layers for rule in _linear(f"{ours}/{layer}", f"{torch}.{layer}", use_bias)]


def _encoder_block(gated_mlp: bool, use_bias: bool) -> list[Rule]:
    torch = "encoder.{i}"
    return [
        *(rule for norm in ("norm1", "norm2") for rule in _norm(f"encoder/{norm}", f"{torch}.{norm}")),
        *_attention("encoder/attn", f"{torch}.attn", ("qkv",), use_bias),
        *_mlp("encoder/mlp", f"{torch}.mlp", gated_mlp, use_bias),
    ]


def _decoder_block(gated_mlp: bool, use_bias: bool) -> list[Rule]:
    torch = "decoder.{i}"
    norms = ("norm1", "query_norm", "context_norm", "norm2")
    return [
        *(rule for norm in norms for rule in _norm(f"decoder/{norm}", f"{torch}.{norm}")),
        *_attention("decoder/self_attn", f"{torch}.self_attn", ("qkv",), use_bias),
        *_attention("decoder/cross_attn", f"{torch}.cross_attn", ("q", "kv"), use_bias),
        *_mlp("decoder/mlp", f"{torch}.mlp", gated_mlp, use_bias),
    ]
