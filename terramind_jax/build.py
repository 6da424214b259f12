"""The released models by name and options, without their weights: networks, and the shapes of what they need (spec 5.1, 6.1, 8.5, 8.6)."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from terramind_jax import modalities, sharding, tim, tokenizer, zoo
from terramind_jax import model as networks
from terramind_jax.modalities import Stream
from terramind_jax.model import backbone
from terramind_jax.models import FeatureExtractor, Generator, ImageTokenizer, Model, Pretraining, ThinkingInModalities

REQUIRED = "required"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_NETWORK = dict(dtype="auto", remat="none", unroll=1)  # auto: see `sharding.compute_dtype`
_OWN = dict(
    sizes={},  # of a pretraining of your own, in the place of the released ones: dim, encoder_depth, ...
    codebooks={},  # its vocabularies, by modality
)
_BACKBONE = dict(
    modalities=None,  # names, and {name: channels} of new ones; None: every released one
    merge_method="mean",
    img_size=224,
    patch_size=16,  # of new modalities
    num_register_tokens=0,
    drop_path_rate=0.0,
    modality_drop_rate=0.0,
    **_OWN,
    **_NETWORK,
)
_SAMPLING = dict(decoding_steps=1, temps=1.0, top_p=0.8, top_k=0)

# Options of each kind of model with their defaults: the reference's names, then those of the networks. Not offered, as no released model
# uses them: the reference's drop_rate, attn_drop_rate, qk_norm and encoder_norm.
OPTIONS: dict[str, dict[str, Any]] = {
    "backbone": dict(bands={}, in_chans=None, **_BACKBONE),
    "tim": dict(tim_modalities=["LULC"], tim_chained_generations=True, **{f"tim_{k}": v for k, v in _SAMPLING.items()}, **_BACKBONE),
    "generate": dict(
        modalities=REQUIRED,
        output_modalities=REQUIRED,
        bands={},
        fill_bands="neighbours",  # or "zeros", see `bands.fill_missing`
        timesteps=None,  # as many as the sampler needs, see `tokenizer.decode`
        img_size=224,
        standardize=False,
        offset={},
        **_SAMPLING,
        **_OWN,
        **_NETWORK,
    ),
    "encdec": dict(_NETWORK),
    "tokenizer": dict(dtype="auto", unroll=1),
}


def model(name: str, **options: Any) -> Model:
    """The model `name` with `jax.ShapeDtypeStruct` for weights; a ValueError for an unknown name, option or modality."""
    entry = zoo.get(name)
    options = _complete(entry, options)
    return _BUILDERS[entry.kind](entry, options)


def abstract(module: nn.Module) -> dict:
    """Shapes of the variables of a network of ours, unboxed."""
    return meta.unbox(jax.eval_shape(partial(init, module), jax.random.key(0)))


def init(module: nn.Module, key: jax.Array) -> dict:
    """Fresh variables of a network of ours, boxed with their logical axes."""
    return tokenizer.init(module, key) if isinstance(module, tokenizer.Tokenizer) else networks.init(module, key)


def tokenizer_of(modality: str, version: str, **options: Any) -> tokenizer.Tokenizer:
    """The released tokenizer of one modality (spec 6.1)."""
    m = modalities.get(modality, version)
    decoder = "vit" if m.kind == "classes" else "unet"
    return tokenizer.Tokenizer(tokenizer.TokenizerConfig(modality=m.name, channels=m.channels, levels=m.levels, decoder=decoder, **options))


def _complete(entry: zoo.Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    known = OPTIONS[entry.kind]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}."
            raise ValueError(f"{entry.name} has no option {name!r}{hint}")
    given = {name: value for name, value in options.items() if value is not None or known[name] != {}}  # None is the reference's {}
    full = {**copy.deepcopy(known), **given}
    missing = [name for name, value in full.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{entry.name} needs the option{'s' if len(missing) > 1 else ''} {' and '.join(missing)}.")
    if full["dtype"] not in DTYPES:
        raise ValueError(f"The dtype is {full['dtype']!r}; known dtypes: {', '.join(DTYPES)}.")
    if full.get("img_size", 0) % modalities.PATCH_SIZE:
        raise ValueError(f"img_size is {full['img_size']}; expected a multiple of {modalities.PATCH_SIZE}.")
    for name in ("modalities", "output_modalities", "tim_modalities"):
        if isinstance(full.get(name), (str, Mapping)):
            full[name] = [full[name]]
    return full


def _pick(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Fields of a configuration that are options."""
    return {name: sharding.compute_dtype(options[name]) if name == "dtype" else options[name] for name in names}


# ---- one kind each ----


def _backbone(entry: zoo.Entry, options: dict[str, Any]) -> FeatureExtractor:
    streams = _with_codebooks(input_streams(entry, options), options)
    config = backbone.with_bands(_backbone_config(entry, options, streams.values()), bands_by_stream(streams, options["bands"]))
    module, chosen = networks.Backbone(config), {s.key: s for s in config.streams}
    own = {"streams": {name: chosen[s.key] for name, s in streams.items()}, "tokenizers": _tokenizers(entry, options, streams.values())}
    return FeatureExtractor(entry.name, module, abstract(module), options, **own)


def bands_by_stream(streams: Mapping[str, Stream], bands: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The option ``bands``, by user name, keyed by stream."""
    unknown = [name for name in bands if name not in streams]
    if unknown:
        raise ValueError(f"bands are given for {unknown[0]!r}, which is no input of this model; it has {', '.join(streams)}.")
    return {streams[name].key: wanted for name, wanted in bands.items()}


def _backbone_config(entry: zoo.Entry, options: Mapping[str, Any], streams: Sequence[Stream]) -> networks.BackboneConfig:
    size = {name: value for name, value in _sizes(entry, options).items() if name != "decoder_depth"}
    same = ("patch_size", "merge_method", "num_register_tokens", "drop_path_rate", "modality_drop_rate", *_NETWORK)
    streams = tuple({s.key: s for s in streams}.values())
    return networks.BackboneConfig(**size, streams=streams, image_size=options["img_size"], **_pick(options, *same))


def _sizes(entry: zoo.Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    known = {**zoo.SIZES[entry.size], "mlp_ratio": 4.0}
    unknown = [name for name in options["sizes"] if name not in known]
    if unknown:
        raise ValueError(f"There is no size {unknown[0]!r}; known are {', '.join(known)}.")
    return {**known, **options["sizes"]}


def _with_codebooks(streams: Mapping[str, Stream], options: Mapping[str, Any]) -> dict[str, Stream]:
    """Tokens with the vocabularies of ``codebooks``."""
    own = options["codebooks"]
    sized = {
        name: dataclasses.replace(s, vocab_size=own.get(s.modality, s.vocab_size)) for name, s in streams.items() if s.kind == "tokens"
    }
    return {**streams, **sized}


def _tim(entry: zoo.Entry, options: dict[str, Any]) -> ThinkingInModalities:
    streams = _with_codebooks(input_streams(entry, options), options)
    made = {name: modalities.output_stream(name) for name in options["tim_modalities"]}
    targets = list(_with_codebooks(made, options).values())
    config = _backbone_config(entry, options, [*streams.values(), *targets])
    # Unchained, the generator does not know what it generated, and so has no embeddings of it (spec 8.6).
    seen = config if options["tim_chained_generations"] else _backbone_config(entry, options, streams.values())
    module, generator = networks.Backbone(config), tim.generator(seen, targets, _sizes(entry, options)["decoder_depth"])
    tokenizers = _tokenizers(entry, options, (*streams.values(), *targets))  # as the reference, also of what is only generated
    own = {"streams": streams, "tokenizers": tokenizers, "generator": (generator, abstract(generator))}
    return ThinkingInModalities(entry.name, module, abstract(module), options, **own)


def _generate(entry: zoo.Entry, options: dict[str, Any]) -> Generator:
    read = _with_codebooks(input_streams(entry, options), options)
    made = {name: modalities.output_stream(name) for name in options["output_modalities"]}
    outputs = list(_with_codebooks(made, options).values())
    bands_by_stream(read, options["bands"])  # raises for a name that is no input
    unknown, inputs = [name for name in options["offset"] if name not in (*read, *options["output_modalities"])], read.values()
    if unknown:
        names = ", ".join(dict.fromkeys((*read, *options["output_modalities"])))
        raise ValueError(f"An offset is given for {unknown[0]!r}, which is no input and no output of this model; it has {names}.")
    seen = {s.key: s for s in (*inputs, *outputs[:-1])}  # a later output sees the earlier ones (spec 8.5.1)
    settings = dict(encoder=tuple(seen.values()), decoder=tuple({s.key: s for s in outputs}.values()), image_size=options["img_size"])
    module = networks.TerraMind(networks.TransformerConfig(**_sizes(entry, options), **settings, **_pick(options, *_NETWORK)))
    return Generator(entry.name, module, abstract(module), options, _tokenizers(entry, options, (*inputs, *outputs)))


def _encdec(entry: zoo.Entry, options: dict[str, Any]) -> Pretraining:
    module = networks.TerraMind(networks.TransformerConfig(**zoo.SIZES[entry.size], **_pick(options, *options)))
    return Pretraining(entry.name, module, abstract(module), options)


def _tokenizer(entry: zoo.Entry, options: dict[str, Any]) -> ImageTokenizer:
    module = tokenizer_of(entry.modality, entry.version, **_pick(options, *options))
    return ImageTokenizer(entry.name, module, abstract(module), options)


_BUILDERS = {"backbone": _backbone, "tim": _tim, "generate": _generate, "encdec": _encdec, "tokenizer": _tokenizer}


def input_streams(entry: zoo.Entry, options: Mapping[str, Any]) -> dict[str, Stream]:
    """The inputs of a feature extractor by user name; ``{name: channels}`` makes a new pixel stream of that name (spec 5.1)."""
    chosen = options["modalities"]
    if chosen is None and options.get("in_chans"):
        chosen = {"image": options["in_chans"]}
    if chosen is None:
        released = modalities.ENCODER_STREAMS if entry.version == "v1" else modalities.V01_ENCODER_STREAMS
        chosen = [_user_name(stream, released) for stream in released]
    streams: dict[str, Stream] = {}
    for item in [chosen] if isinstance(chosen, Mapping) else chosen:
        if isinstance(item, Mapping):
            streams |= {name: _new_stream(name, channels) for name, channels in item.items()}
        else:
            streams[item] = modalities.input_stream(item)
    return streams


def _new_stream(name: str, channels: int) -> Stream:
    """Pixels of a modality of the user's own."""
    if name in modalities.MODALITIES or name in modalities.STREAMS:
        raise ValueError(f"The new modality {name!r} has the name of a released one; choose another, or take some bands with `bands`.")
    if not name or "/" in name or "." in name:
        raise ValueError(f"The new modality {name!r} needs a name without '/' and '.', which part the names of weights.")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"The new modality {name!r} has {channels!r} channels; expected a positive integer.")
    return Stream(name, name, "pixels", channels=channels)


def _user_name(stream: Stream, released: Sequence[Stream]) -> str:
    """The modality's name where that means this stream, else the stream's key: S2L2A pixels and tokens are two inputs."""
    return stream.modality if modalities.input_stream(stream.modality) == stream else stream.key


def _tokenizers(entry: zoo.Entry, options: Mapping[str, Any], streams: Sequence[Stream]) -> dict[str, tuple]:
    names = dict.fromkeys(s.modality for s in streams if s.kind == "tokens")
    found = {name: tokenizer_of(name, entry.version, **_pick(options, "dtype")) for name in names}
    return {name: (module, abstract(module)) for name, module in found.items()}
