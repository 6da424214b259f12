"""The encoder as a feature extractor for fine-tuning (spec 5): whole modalities in, the outputs of all layers out.

`Backbone` has the variables of `TerraMind`'s encoder under the same names, so that weights are taken out of a pretraining model by name.
`select_bands` gives a pixel stream other bands. `features` is the whole thing compiled, `attention` what its tokens look at.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax import modalities
from terramind_jax.coordinates import PAD
from terramind_jax.modalities import Stream
from terramind_jax.model.embeddings import NORMAL, Embedder
from terramind_jax.model.layers import EncoderBlock, LayerNorm, stack, uniform
from terramind_jax.model.positions import SEQUENCE_LENGTH

Variables = Mapping[str, Any]
MergeMethod = Literal["mean", "max", "concat", "dict"] | None
Features = list[jax.Array] | list[dict[str, jax.Array]]

REGISTER_TOKENS = "register_tokens"
MISSING_TOKEN = "missing_mod_token"


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Sizes of one feature extractor (spec 5.1).

    `streams` are the inputs it knows; an input may lack some. One that is not TerraMind's own, such as
    ``Stream("PLANET", "PLANET", "pixels", channels=6)``, starts from fresh embeddings.
    """

    dim: int
    encoder_depth: int
    num_heads: int
    gated_mlp: bool
    use_bias: bool
    mlp_ratio: float = 4.0
    streams: tuple[Stream, ...] = modalities.ENCODER_STREAMS
    image_size: int = modalities.IMAGE_SIZE  # of the grid of positions; inputs of another size interpolate it
    patch_size: int = modalities.PATCH_SIZE  # of streams that are not TerraMind's own (spec 3.7)
    merge_method: MergeMethod = "mean"
    num_register_tokens: int = 0
    drop_path_rate: float = 0.0  # of the last block; rises linearly from 0
    modality_drop_rate: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        known = ("mean", "max", "concat", "dict", None)
        if self.merge_method not in known:
            raise ValueError(f"Unknown merge method {self.merge_method!r}; known methods: {', '.join(map(str, known))}.")
        for name in ("drop_path_rate", "modality_drop_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability between 0 and 1.")

    @property
    def encoder(self) -> tuple[Stream, ...]:
        return self.streams

    @property
    def image_streams(self) -> tuple[Stream, ...]:
        return tuple(s for s in self.streams if s.kind != "sequence")

    def patch_size_of(self, stream: Stream) -> int:
        return modalities.PATCH_SIZE if stream.key in modalities.STREAMS else self.patch_size

    def grid_of(self, stream: Stream) -> int:
        """Patches along one side of an image stream; 0 for a sequence."""
        return 0 if stream.kind == "sequence" else self.image_size // self.patch_size_of(stream)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of every layer's output."""
        width = len(self.image_streams) if self.merge_method == "concat" else 1
        return (width * self.dim,) * self.encoder_depth


class Backbone(Embedder):
    """The feature extractor. Variables are ``{"params", "buffers"}``.

    Padding of sequences is hidden, so that a sample does not depend on the captions around it; the reference reads it. Merging equals the
    reference's, except where that fails or contradicts itself:

    - ``concat`` fills missing image modalities with `missing_mod_token`, after those that are there, as in the reference; but there a
      sequence input takes the place of one filler, so that the output is narrower than `out_channels`. Here it does not.
    - Modality dropping: shapes stay, so that one program serves all draws. What is dropped is hidden from attention and left out of the
      merge; ``dict`` and None, where the reference mixes names up or shortens the output, hold zeros in its place. The modality that
      surely survives is an image where the merge needs one.
    """

    config: BackboneConfig

    def setup(self) -> None:
        c = self.config
        self.setup_embeddings()
        if c.num_register_tokens:
            shape = (c.num_register_tokens, c.dim)
            self.register_tokens = self.param(REGISTER_TOKENS, nn.with_logical_partitioning(NORMAL, (None, "norm")), shape)
        if c.merge_method == "concat":
            self.missing_mod_token = self.param(MISSING_TOKEN, nn.with_logical_partitioning(NORMAL, ("norm",)), (c.dim,))
        block = dict(num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, gated_mlp=c.gated_mlp, use_bias=c.use_bias, dtype=self.dtype)
        self.encoder = stack(EncoderBlock, c.encoder_depth, c.remat, c.unroll, broadcast=1, scanned=1)(**block, collect=True)
        self.encoder_norm = LayerNorm(self.dtype)

    @property
    def out_channels(self) -> tuple[int, ...]:
        return self.config.out_channels

    def __call__(self, inputs: Mapping[str, jax.Array], *, train: bool = False) -> Features:
        """The outputs of all blocks, merged over modalities (spec 5.4, 5.5); the norm is on the last one only.

        Args:
          inputs: arrays by stream: pixels ``[B, H, W, C]`` standardised, image tokens ``[B, h, w]`` or ``[B, n]``, of K codebooks
            ``[..., K]``, sequences ``[B, L]``, right-padded with 0, which is hidden. Their order is that of tokens and of concatenated
            channels. `jax.jit` sorts the keys of a plain dict: pass an ``OrderedDict`` through it.
          train: drop paths and modalities, drawn from the rng stream ``dropout``.

        Returns:
          ``encoder_depth`` arrays ``[B, N, D]``; of ``concat`` ``[B, N, D * image streams]``, of None the tokens of all modalities in one
          row, register tokens first; of ``dict`` ``{stream: [B, N, D]}``, with the register tokens under ``register_tokens``.

        Raises:
          ValueError: an unknown stream, a wrong shape, images that cannot be merged.
        """
        _check(self.config, inputs)
        parts = [jnp.add(*self.embed(key, value)) for key, value in inputs.items()]
        lengths = [part.shape[1] for part in parts]
        kept = self._draw_modalities(list(inputs)) if train and self.config.modality_drop_rate and len(parts) > 1 else None
        if self.config.num_register_tokens:
            registers = jnp.broadcast_to(self.register_tokens, (parts[0].shape[0], *self.register_tokens.shape))
            parts, lengths = [registers.astype(self.dtype), *parts], [registers.shape[1], *lengths]
            kept = None if kept is None else jnp.append(True, kept)
        names = [*[REGISTER_TOKENS] * bool(self.config.num_register_tokens), *inputs]
        lengths = dict(zip(names, lengths, strict=True))
        outputs = self._blocks(jnp.concatenate(parts, axis=1), self._mask(inputs, lengths, kept), train)
        return [self._merge(x, lengths, kept) for x in outputs]

    def _mask(self, inputs: Mapping[str, jax.Array], lengths: Mapping[str, int], kept: jax.Array | None) -> jax.Array | None:
        """``[B or 1, 1, 1, N]``, True = hidden from attention: padding of sequences and dropped modalities; None if there is neither."""
        mask = None
        sequences = {s.key for s in self.config.streams if s.kind == "sequence"} & {*inputs}
        if sequences:
            b = next(iter(inputs.values())).shape[0]
            parts = [inputs[key] == PAD if key in sequences else jnp.zeros((b, n), bool) for key, n in lengths.items()]
            mask = jnp.concatenate(parts, axis=1)[:, None, None]
        if kept is not None:
            total = sum(lengths.values())
            dropped = ~jnp.repeat(kept, jnp.asarray([*lengths.values()]), total_repeat_length=total)[None, None, None]
            mask = dropped if mask is None else mask | dropped
        return mask

    def _blocks(self, x: jax.Array, mask: jax.Array | None, train: bool) -> list[jax.Array]:
        rate, depth = self.config.drop_path_rate, self.config.encoder_depth
        rates = jnp.linspace(0, rate, depth, dtype=jnp.float32) if train and rate else None
        x = nn.with_logical_constraint(x, ("batch", "tokens", None))
        last, outputs = self.encoder(x, mask, rates)
        return [*(outputs[i] for i in range(depth - 1)), self.encoder_norm(last)]

    def _draw_modalities(self, names: Sequence[str]) -> jax.Array:
        """``[modalities]`` bool, for the whole batch: one survives, each of the others is dropped at the configured rate (spec 5.4)."""
        survivor, drops = jax.random.split(self.make_rng("dropout"))
        is_image = jnp.asarray([self.stream(name, self.config.streams).kind != "sequence" for name in names])
        weights = is_image if self.config.merge_method in ("mean", "max", "concat") else jnp.ones(len(names))
        kept = jax.random.bernoulli(drops, 1 - self.config.modality_drop_rate, (len(names),))
        return kept | (jnp.arange(len(names)) == jax.random.categorical(survivor, jnp.log(weights)))

    def _merge(self, x: jax.Array, lengths: Mapping[str, int], kept: jax.Array | None) -> jax.Array | dict[str, jax.Array]:
        """One layer's ``[B, N, D]``; `lengths` are the tokens of each part, `kept` ``[parts]`` those that were not dropped."""
        parts = _split(x, lengths)
        there = dict(zip(lengths, jnp.ones(len(lengths), bool) if kept is None else kept, strict=True))
        method, images = self.config.merge_method, [s.key for s in self.config.image_streams]
        if method in ("dict", None):
            parts = parts if kept is None else {key: jnp.where(there[key], part, 0) for key, part in parts.items()}
            return parts if method == "dict" else jnp.concatenate(list(parts.values()), axis=1)
        names = [key for key in parts if key in images]
        stacked = jnp.stack([parts[key] for key in names], axis=1)  # [B, M, N, D]
        chosen = None if kept is None else jnp.stack([there[key] for key in names])[:, None, None]
        if method == "mean":
            return stacked.mean(1) if chosen is None else jnp.where(chosen, stacked, 0).sum(1) / chosen.sum()
        if method == "max":
            return (stacked if chosen is None else jnp.where(chosen, stacked, -jnp.inf)).max(1)
        return self._concatenate(stacked, chosen, len(images))

    def _concatenate(self, stacked: jax.Array, chosen: jax.Array | None, width: int) -> jax.Array:
        """``[B, M, N, D]`` -> ``[B, N, width * D]``: the chosen modalities in order, then fillers."""
        missing = self.missing_mod_token.astype(stacked.dtype)
        if chosen is not None:
            order = jnp.argsort(~chosen[:, 0, 0], stable=True)
            stacked = jnp.where(chosen, stacked, missing)[:, order]
        b, m, n, d = stacked.shape
        stacked = jnp.concatenate([stacked, jnp.broadcast_to(missing, (b, width - m, n, d))], axis=1)
        return jnp.moveaxis(stacked, 1, 2).reshape(b, n, width * d)

    def everything(self) -> jax.Array:
        """Touches every parameter once: what `init` runs."""
        self.touch_embeddings()
        return self._blocks(jnp.zeros((1, 1, self.config.dim), self.dtype), None, False)[-1]


def features(module: Backbone, variables: Variables, inputs: Mapping[str, jax.Array]) -> Features:
    """`Backbone.__call__` without training, compiled once a shape and order of `inputs`."""
    return _features(variables, collections.OrderedDict(inputs), module=module)


@functools.partial(jax.jit, static_argnames="module")
def _features(variables: Variables, inputs: Mapping[str, jax.Array], *, module: Backbone) -> Features:
    return module.apply(variables, inputs)


def attention(module: Backbone, variables: Variables, inputs: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Weights of self-attention in all layers, compiled once a shape and order of `inputs`, which are those of `Backbone.__call__`.

    Returns:
      ``{stream that looks: {stream it looks at: [layers, B, heads, n, m]}}`` float32; register tokens are under ``register_tokens``. The
      weights of one token, over all that it looks at, sum to 1; padding of sequences has none.
    """
    return _attention(variables, collections.OrderedDict(inputs), module=module)


@functools.partial(jax.jit, static_argnames="module")
def _attention(variables: Variables, inputs: Mapping[str, jax.Array], *, module: Backbone) -> dict[str, dict[str, jax.Array]]:
    apart = module.clone(config=dataclasses.replace(module.config, merge_method="dict"))
    features, seen = apart.apply(variables, inputs, mutable=["intermediates"])
    names, lengths = list(features[-1]), [x.shape[1] for x in features[-1].values()]
    ends = list(itertools.accumulate(lengths))[:-1]
    named = lambda parts: collections.OrderedDict(zip(names, parts, strict=True))  # noqa: E731  `jax.jit` keeps its order
    rows = jnp.split(seen["intermediates"]["encoder"]["attn"]["weights"], ends, axis=-2)
    return named(named(jnp.split(row, ends, axis=-1)) for row in rows)


def _split(x: jax.Array, lengths: Mapping[str, int]) -> dict[str, jax.Array]:
    ends = list(itertools.accumulate(lengths.values()))[:-1]
    return dict(zip(lengths, jnp.split(x, ends, axis=1), strict=True))


# ---- bands ----


def with_bands(config: BackboneConfig, bands: Mapping[str, Sequence[str]]) -> BackboneConfig:
    """The configuration of a feature extractor whose pixel streams have other bands (spec 5.3).

    `bands` are names by stream, in the order of the input's channels. A ValueError says that a stream is unknown, has no bands, or is
    asked for none.
    """
    streams = {s.key: s for s in config.streams}
    for name, wanted in bands.items():
        if not (name in streams and streams[name].kind == "pixels" and known_bands(name)):
            pixels = ", ".join(key for key, s in streams.items() if s.kind == "pixels" and known_bands(key))
            raise ValueError(f"{name!r} is not a pixel stream with known bands; this model has {pixels or 'none'}.")
        if not wanted or isinstance(wanted, str):
            raise ValueError(f"{name!r} is given the bands {wanted!r}; expected a list of names such as {list(known_bands(name))[:3]}.")
        streams[name] = dataclasses.replace(streams[name], channels=len(wanted))
    return dataclasses.replace(config, streams=tuple(streams.values()))


def select_bands(variables: Variables, bands: Mapping[str, Sequence[str]], key: jax.Array) -> dict[str, Any]:
    """Variables with all bands of TerraMind's modalities -> with those of `with_bands` (spec 5.3).

    A name that the modality does not have, such as a sensor's own band, starts from fresh weights, uniform as a new PyTorch layer's.
    """
    kernels = dict(variables["params"]["patch_proj"])
    for name, wanted in bands.items():
        kernels[name] = _select_columns(kernels[name], known_bands(name), wanted, jax.random.fold_in(key, modalities.stream_id(name)))
    return {**variables, "params": {**variables["params"], "patch_proj": kernels}}


def known_bands(stream: str) -> tuple[str, ...]:
    """Bands of one of TerraMind's streams; none of any other."""
    return modalities.MODALITIES[modalities.STREAMS[stream].modality].bands if stream in modalities.STREAMS else ()


def _select_columns(kernel: jax.Array, known: Sequence[str], wanted: Sequence[str], key: jax.Array) -> jax.Array:
    """``[P*P * len(known), D]`` -> ``[P*P * len(wanted), D]``; channels are the fastest part of the rows."""
    old = jnp.asarray(kernel).reshape(-1, len(known), kernel.shape[1])
    fresh = uniform((old.shape[0] * len(wanted)) ** -0.5)(key, (old.shape[0], len(wanted), old.shape[2]))
    columns = [old[:, known.index(band)] if band in known else fresh[:, i] for i, band in enumerate(wanted)]
    return jnp.stack(columns, axis=1).reshape(-1, kernel.shape[1])


# ---- arguments ----


def _check(config: BackboneConfig, inputs: Mapping[str, jax.Array]) -> None:
    streams = {s.key: s for s in config.streams}
    if not inputs:
        raise ValueError(f"There is no input; this model takes {', '.join(streams)}.")
    tokens = {}
    for key, value in inputs.items():
        if key not in streams:
            raise ValueError(f"This model has no stream {key!r}; it has {', '.join(streams)}.")
        check = {"pixels": _pixel_tokens, "tokens": _image_tokens, "sequence": _sequence_tokens}[streams[key].kind]
        tokens[key] = check(config, streams[key], value)
    sizes = {key: value.shape[0] for key, value in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The inputs differ in batch size: {', '.join(f'{key} {size}' for key, size in sizes.items())}.")
    if config.merge_method in ("mean", "max", "concat"):
        images = {key: n for key, n in tokens.items() if streams[key].kind != "sequence"}
        if not images:
            raise ValueError(f"merge_method {config.merge_method!r} needs an image modality; given: {', '.join(inputs)}.")
        if len(set(images.values())) > 1:
            counts = ", ".join(f"{key} {n}" for key, n in images.items())
            raise ValueError(f"merge_method {config.merge_method!r} needs equal numbers of tokens a modality; given: {counts}.")


def _pixel_tokens(config: BackboneConfig, stream: Stream, x: jax.Array) -> int:
    p, shape = config.patch_size_of(stream), list(x.shape)
    if x.ndim != 4 or x.shape[3] != stream.channels:
        first = ", which looks channels-first" if x.ndim == 4 and x.shape[1] == stream.channels else ""
        raise ValueError(f"Input {stream.key!r} has shape {shape}{first}; expected [B, H, W, {stream.channels}].")
    if x.shape[1] % p or x.shape[2] % p or 0 in x.shape:
        raise ValueError(f"Input {stream.key!r} is {shape[1]}x{shape[2]} pixels; both sides must be multiples of the patch size {p}.")
    return (x.shape[1] // p) * (x.shape[2] // p)


def _image_tokens(config: BackboneConfig, stream: Stream, x: jax.Array) -> int:
    grid, axes = stream.grid_shape(x.shape), f"[{', '.join(('B', 'h', 'w', *map(str, stream.codes)))}]"
    if not jnp.issubdtype(x.dtype, jnp.integer) or len(grid) not in (1, 2):
        raise ValueError(f"Input {stream.key!r} is {x.dtype} {list(x.shape)}; expected the ids of tokens, integers {axes}.")
    n = math.prod(grid)
    if len(grid) == 1 and round(n**0.5) ** 2 != n:
        raise ValueError(f"Input {stream.key!r} has {n} tokens in a row, which is no square; give them as {axes}.")
    return n


def _sequence_tokens(config: BackboneConfig, stream: Stream, x: jax.Array) -> int:
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim != 2 or x.shape[1] > SEQUENCE_LENGTH:
        expected = f"the ids of at most {SEQUENCE_LENGTH} tokens, integers [B, L]"
        raise ValueError(f"Input {stream.key!r} is {x.dtype} {list(x.shape)}; expected {expected}.")
    return x.shape[1]
