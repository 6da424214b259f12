"""Any modalities in, any modalities out, between arrays in physical units (spec 8.5).

Pure functions of (module, variables, tokenizers, inputs, seed). What enters the transformer as tokens is tokenised, `decoding` samples the
output streams one after another, a finished one being an input of those that follow, and the tokenizers turn them into arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import captions, coordinates, draws, modalities, sampling
from terramind_jax import locate as location
from terramind_jax.bands import FillBands, fill_missing
from terramind_jax.decoding import PerTarget, T, generate_tokens, one_role
from terramind_jax.modalities import Stream
from terramind_jax.model import TerraMind
from terramind_jax.tokenizer import Clip, Sampler, Tokenizer, apply, decode

Variables = Mapping[str, Any]
Tokenizers = Mapping[str, tuple[Tokenizer, Variables]]  # by modality

ENCODING = ("vocabulary", "standardize", "version", "offset", "bands", "fill_bands", "visible")  # options of `encode_inputs`
OF_SAMPLES = ("noise", "at", "known_tokens")  # options that hold one array a sample
TOGETHER = 8
_LARGE = 16  # batches above share programs of its multiples: to fill up more would cost more than it saves


def in_buckets(make: Callable[..., dict[str, Any]], *parts: Any, seed: int | np.ndarray, **options: Any) -> dict[str, Any]:
    """What `make`, `generate` or `output_tokens`, makes of a batch that is filled up on accelerators, to 1, 2, 4, 8, 16, 32, 48, ...

    So batches of any size share a few programs, each of which takes a minute to compile. The last sample is repeated, and what is made of
    its copies left out. A CPU would compute what is filled up as slowly as the rest. `parts` are the arguments of `make` by position.
    """
    if jax.default_backend() == "cpu":
        return make(*parts, seed=seed, **options)
    *networks, inputs, outputs = parts
    own = {name: options[name] for name in (*OF_SAMPLES, "visible") if options.get(name) is not None}
    arrays, names = jax.tree.flatten({"inputs": inputs} | own, is_leaf=lambda x: isinstance(x, list | tuple))
    sizes = {len(x) for x in arrays}
    n = next(iter(sizes), 1)
    more = _bucket(n) - n
    if len(sizes) != 1 or not more:  # if they differ, it is told by what reads them
        return make(*parts, seed=seed, **options)
    sampling.seed_words(seed, n)  # a ValueError if they do not fit
    arrays = [[*x, *x[-1:] * more] if isinstance(x, list | tuple) else np.concatenate([x, np.repeat(x[-1:], more, 0)]) for x in arrays]
    own = jax.tree.unflatten(names, arrays)
    inputs, seeds = own.pop("inputs"), np.broadcast_to(seed, (n,))
    made = make(*networks, inputs, outputs, seed=np.append(seeds, seeds[-1:].repeat(more)), **(options | own))
    return {name: x[:n] for name, x in made.items()}


def _bucket(batch_size: int) -> int:
    """The batch size of the program that serves such batches."""
    return 1 << (batch_size - 1).bit_length() if batch_size <= _LARGE else -(-batch_size // _LARGE) * _LARGE


def generate(
    module: TerraMind,
    variables: Variables,
    tokenizers: Tokenizers,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    *,
    seed: int | np.ndarray,
    vocabulary: captions.Tokenizer | None = None,
    standardize: bool = True,
    version: str = "v1",
    offset: Mapping[str, float] | None = None,
    bands: Mapping[str, Sequence[str]] | None = None,
    fill_bands: FillBands = "neighbours",
    visible: Mapping[str, np.ndarray] | None = None,
    timesteps: int | None = None,
    noise: Mapping[str, np.ndarray] | None = None,
    sampler: Sampler = "dpmpp",
    clip: Clip = "published",
    at: np.ndarray | None = None,
    **options: Any,
) -> dict[str, np.ndarray | list[str]]:
    """Generates modalities from modalities (spec 8.5).

    Args:
      tokenizers: ``{modality: (module, variables)}`` of every tokenised input and every image output.
      inputs: by user name: images ``[B, S, S, C]`` in the modality's unit, LULC also ``[B, S, S]`` classes, coords ``[B, 2]`` as
        (lon, lat) in degrees, caption a list of strings or ids ``[B, L]``.
      outputs: user names in the order of generation; each conditions those after it, unless the option `chained` is False.
      vocabulary: of captions, see `terramind_jax.captions`; None: captions are ids.
      standardize: False if the inputs are standardised already; then the outputs are, too.
      version, offset: whose statistics standardise, and by how much they move a modality's mean, by user name.
      bands, fill_bands: which bands an input has, by user name, if not all, and what stands for the others; see `bands.fill_missing`.
      visible: bool ``[B, S / 16, S / 16]`` by input, which patches of an image are seen, such as those without clouds. The pixels of the
        others may be anything, NaN too. Where tokens enter, those that are seen are made of an image without the others: their pixels are
        the mean, or class 0. Such an input may be an output, too, which repaints it: one that enters as pixels (S2L2A, S1GRD, DEM) as a
        whole, of one that enters as tokens (LULC, NDVI) the patches that are not seen, and the tokens of the others stay.
      timesteps, noise, sampler, clip: of diffusion decoders, see `terramind_jax.tokenizer.decode`; `noise` ``[B, S, S, C]`` by output.
        The published sampler is ``sampler="ddim"``.
      at: ``[B, 2]``, row and column of an image's first patch of 16 pixels on its scene's grid. Windows of a scene with one seed then share
        all random material where they overlap.
      **options: those of `decoding.generate_tokens`; mappings are keyed by the names in `outputs`.

    Returns:
      ``{name: array}`` for each of `outputs`: float32 ``[B, S, S, C]`` (LULC: logits of the 10 classes), coords ``[B, 2]``, NaN where the
      model wrote none, caption a list of strings.

    Raises:
      ValueError: an unknown modality, a wrong array, a missing tokenizer, or anything `decoding.generate_tokens` objects to.
    """
    offset, noise = offset or {}, noise or {}
    _check_given("Noise is", noise, "output", outputs)
    scale = dict(vocabulary=vocabulary, standardize=standardize, version=version)
    own = dict(offset=offset, bands=bands, fill_bands=fill_bands, visible=visible)
    tokens = output_tokens(module, variables, tokenizers, inputs, outputs, seed=seed, at=at, **own, **scale, **options)
    decoding = dict(seed=seed, at=at, timesteps=timesteps, sampler=sampler, clip=clip)

    def finish(name: str, ids: jax.Array) -> np.ndarray | list[str]:
        own = dict(offset=offset.get(name, 0.0), noise=noise.get(name))
        return decode_output(modalities.output_stream(name), ids, tokenizers, **own, **scale, **decoding)

    # One after the other: of the released decoders only those of S1GRD and S1RTC have one shape, and under `vmap` they take longer.
    return {name: finish(name, ids) for name, ids in tokens.items()}


def generate_draws(
    module: TerraMind,
    variables: Variables,
    tokenizers: Tokenizers,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    *,
    seed: int | np.ndarray,
    num_samples: int,
    **options: Any,
) -> dict[str, Any]:
    """`generate`, drawn `num_samples` times: ``{name: draws}``, see `draws.collect`. The first draw is that of `seed` alone.

    The inputs are standardised and tokenised once. Accelerators make several draws at once, of up to `TOGETHER` images, which rounds as any
    batch does (`seed` of `decoding.generate_tokens`).
    """
    seeds = sampling.draw_seeds(seed, num_samples)
    _check_call(module, inputs, outputs, tokenizers, options.get("visible"))
    encoded = encode_inputs(module, tokenizers, inputs, **{name: options[name] for name in ENCODING if name in options})
    own = {"encoded": encoded} | {name: options.pop(name) for name in OF_SAMPLES if options.get(name) is not None}
    arrays, names = jax.tree.flatten(own, is_leaf=lambda x: isinstance(x, list))
    batch_size = np.shape(arrays[0])[0] if arrays else np.size(seed)
    sampling.seed_words(seed, batch_size)  # a ValueError if they do not fit
    groups = -(-num_samples // max(1, _together() // batch_size))
    size = -(-num_samples // groups)  # even groups, the last one filled up: one shape, one program
    made = []
    for start in range(0, num_samples, size):
        some = [seeds[min(k, num_samples - 1)] for k in range(start, start + size)]
        own = jax.tree.unflatten(names, [x if size == 1 else jnp.concatenate([jnp.asarray(x)] * size) for x in arrays])
        own["seed"] = np.concatenate([np.broadcast_to(one, (batch_size,)) for one in some])
        found = generate(module, variables, tokenizers, inputs, outputs, **own, **options)
        made += [{name: x[k : k + batch_size] for name, x in found.items()} for k in range(0, size * batch_size, batch_size)]
    return {name: draws.collect(name, [one[name] for one in made[:num_samples]]) for name in made[0]}


def _together() -> int:
    """How many images draws are made of at once. A CPU is no faster with several."""
    return 1 if jax.default_backend() == "cpu" else TOGETHER


def output_tokens(
    module: TerraMind,
    variables: Variables,
    tokenizers: Tokenizers,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    *,
    seed: int | np.ndarray,
    known_tokens: Mapping[str, np.ndarray] | None = None,
    only: str | None = None,
    encoded: tuple[dict, dict] | None = None,
    **options: Any,
) -> dict[str, jax.Array]:
    """`generate` before decoding: ``{name: ids}``, int32 ``[B, s, s]`` or ``[B, s, s, K]``, of sequences ``[B, L]``.

    Names of one stream have the same ids. With ``only=name`` that output alone is sampled, given the `known_tokens` ``{name: ids}`` of
    those before it; `outputs` stay the same. `encoded` is what `encode_inputs` made of the inputs, if that is known. `options` are of
    `encode_inputs` and of `decoding.generate_tokens`.
    """
    _check_call(module, inputs, outputs, tokenizers, options.get("visible"))
    made = {name: modalities.output_stream(name) for name in outputs}
    _check_known(known_tokens or {}, only, made)
    encoding = {name: options.pop(name) for name in ENCODING if name in options}
    options = {name: _by_stream(value, made) for name, value in (options | {"known_tokens": known_tokens}).items()}
    values, visible = encoded or encode_inputs(module, tokenizers, inputs, **encoding)
    targets = list(dict.fromkeys(stream.key for stream in made.values()))
    chosen = only and made[only].key
    tokens = generate_tokens(module, variables, values, targets, seed=seed, visible=visible, only=chosen, **options)
    return {name: tokens[stream.key] for name, stream in made.items() if stream.key in tokens}


def locate(
    module: TerraMind,
    variables: Variables,
    tokenizers: Tokenizers,
    inputs: Mapping[str, np.ndarray],
    *,
    temperature: float = 1.0,
    **options: Any,
) -> np.ndarray:
    """Where on Earth the inputs may lie: `locate.density`, float32 ``[B, 721, 1440]``; `options` are of `encode_inputs`."""
    _check_call(module, inputs, [location.STREAM], tokenizers)
    values, visible = encode_inputs(module, tokenizers, inputs, **options)
    return np.asarray(location.density(module, variables, values, visible=visible, temperature=temperature))


def encode_inputs(
    module: TerraMind,
    tokenizers: Tokenizers,
    inputs: Mapping[str, np.ndarray],
    *,
    vocabulary: captions.Tokenizer | None = None,
    standardize: bool = True,
    version: str = "v1",
    offset: Mapping[str, float] | None = None,
    bands: Mapping[str, Sequence[str]] | None = None,
    fill_bands: FillBands = "neighbours",
    visible: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray | jax.Array], dict[str, np.ndarray]]:
    """Inputs by user name as the encoder takes them, and masks of what is seen of them, both by stream; options as of `generate`."""
    read = {name: input_stream(module, name) for name in inputs}
    _check_sizes(inputs, read)
    _check_given("Bands are", bands or {}, "input", inputs)
    _check_given("Visible patches are", visible or {}, "input", inputs)
    masks = {name: _mask(name, mask, inputs[name], read[name]) for name, mask in (visible or {}).items()}
    scale = dict(vocabulary=vocabulary, standardize=standardize, version=version, fill_bands=fill_bands)

    def encode(name: str, stream: Stream) -> np.ndarray | jax.Array:
        own = dict(offset=(offset or {}).get(name, 0.0), bands=(bands or {}).get(name), visible=masks.get(name))
        return encode_input(stream, inputs[name], tokenizers, **own, **scale)

    values = {stream.key: encode(name, stream) for name, stream in read.items()}
    return values, {read[name].key: mask for name, mask in masks.items()}


def input_stream(module: TerraMind, name: str) -> Stream:
    """The stream through which `name` enters this network, which may have modalities of the user's own."""
    own = {s.modality: s for s in module.config.encoder if s.key not in modalities.STREAMS}
    return own[name] if name in own else modalities.input_stream(name)


def encode_input(
    stream: Stream,
    x: np.ndarray | Sequence[str],
    tokenizers: Tokenizers,
    *,
    vocabulary: captions.Tokenizer | None = None,
    standardize: bool = True,
    version: str = "v1",
    offset: float = 0.0,
    bands: Sequence[str] | None = None,
    fill_bands: FillBands = "neighbours",
    visible: np.ndarray | None = None,
) -> np.ndarray | jax.Array:
    """One user array, or captions, as its encoder stream takes it: standardised pixels, or ids where the stream holds tokens.

    An image on devices stays on them. One with `bands` is completed to all of its modality, see `bands.fill_missing`.
    """
    if stream.modality == "caption":
        return captions.encode(vocabulary, x)
    if stream.kind == "sequence":
        return x if isinstance(x, jax.core.Tracer) else coordinates.encode(np.asarray(x))  # programs take ids
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if stream.modality not in modalities.MODALITIES:
        return x if visible is None else _without_hidden(x, visible, 0)  # a modality of the user's own: without statistics
    is_class_map = modalities.get(stream.modality).kind == "classes"
    x = x[..., None] if is_class_map and x.ndim == 3 else x
    if bands is not None:
        own = dict(standardised=not standardize, version=version, offset=offset)
        x = fill_missing(stream.modality, np.asarray(x), bands, fill_bands, **own)
    if visible is not None:
        mean = modalities.statistics(stream.modality, version, offset)[0] if standardize and not is_class_map else 0
        x = _without_hidden(x, visible, mean)
    _check_values(stream, x, tokenizers, standardize)
    if standardize and not is_class_map:
        x = modalities.standardize(stream.modality, x, version, offset)
    if stream.kind == "pixels":
        return x
    tokenizer, variables = tokenizers[stream.modality]
    return apply(tokenizer, variables, x, "encode")


def _without_hidden(x: np.ndarray, visible: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """An image ``[B, H, W, C]`` whose hidden patches hold `value`, whatever they held."""
    rows = np.repeat(np.repeat(visible, modalities.PATCH_SIZE, 1), modalities.PATCH_SIZE, 2)
    return np.where(rows[..., None], x, np.asarray(value, np.asarray(x).dtype))


def decode_output(
    stream: Stream,
    tokens: jax.Array,
    tokenizers: Tokenizers,
    *,
    vocabulary: captions.Tokenizer | None = None,
    standardize: bool = True,
    version: str = "v1",
    offset: float = 0.0,
    seed: int | np.ndarray = 0,
    **decoding: Any,
) -> np.ndarray | list[str]:
    """Ids of one stream as the user's array, or captions; see `generate`. `decoding` are options of `terramind_jax.tokenizer.decode`."""
    if stream.modality == "caption":
        return captions.decode(vocabulary, np.asarray(tokens))
    if stream.kind == "sequence":
        return np.stack(coordinates.decode(np.asarray(tokens)), axis=-1)
    scale = dict(standardize=standardize, version=version, offset=offset)
    return np.array(decode_image(stream, tokens, tokenizers, seed=seed, **scale, **decoding), np.float32)  # a copy, which can be written to


def decode_image(
    stream: Stream,
    tokens: jax.Array,
    tokenizers: Tokenizers,
    *,
    standardize: bool = True,
    version: str = "v1",
    offset: float = 0.0,
    **decoding: Any,
) -> jax.Array:
    """`decode_output` of an image, left on its devices."""
    tokenizer, variables = tokenizers[stream.modality]
    x = decode(tokenizer, variables, tokens, **decoding)
    is_class_map = tokenizer.config.is_class_map
    return modalities.destandardize(stream.modality, x, version, offset) if standardize and not is_class_map else x


# ---- arguments ----


def _by_stream(value: PerTarget[T], streams: Mapping[str, Stream]) -> PerTarget[T]:
    """Rekeys a setting from user names to streams."""
    if not isinstance(value, Mapping):
        return value
    _check_given("A setting is", value, "output", streams)
    return {streams[name].key: setting for name, setting in value.items()}


def _check_given(what: str, given: Iterable[str], role: str, known: Iterable[str]) -> None:
    """Raises a ValueError for names that are none of the inputs, or outputs; `role` is the singular."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{what} given for {', '.join(unknown)}, which is no {role}; {role}s: {', '.join(known)}.")


def _check_known(tokens: Mapping[str, np.ndarray], only: str | None, made: Mapping[str, Stream]) -> None:
    """Errors in tokens that are known, and in the one output to be sampled."""
    _check_given("The option only is", [] if only is None else [only], "output", made)
    _check_given("known_tokens is", tokens, "output", made)
    for name, ids in tokens.items():
        check_integers(f"known_tokens of {name}", ids, made[name].vocab_size, "tokens")


def _check_call(
    module: TerraMind, inputs: Any, outputs: Iterable[str], tokenizers: Tokenizers, visible: Iterable[str] | None = None
) -> None:
    """Errors in what is given and asked for, by name."""
    check_by_name(inputs)
    check_names(module, inputs, outputs, tokenizers, visible or ())


def check_input(module: TerraMind, tokenizers: Tokenizers, standardize: bool, name: str, x: np.ndarray) -> None:
    """Raises a ValueError for an image that `encode_input` would not take, and warns of a scale that looks wrong."""
    stream = input_stream(module, name)
    if stream.kind != "sequence" and stream.modality in modalities.MODALITIES:
        is_flat = modalities.get(stream.modality).kind == "classes" and x.ndim == 3
        _check_values(stream, x[..., None] if is_flat else x, tokenizers, standardize)


def _check_values(stream: Stream, x: Any, tokenizers: Tokenizers, standardize: bool) -> None:
    modalities.check_image(stream.modality, x)
    modalities.check_scale(stream.modality, x, standardised=not standardize)
    if modalities.get(stream.modality).kind == "classes":
        check_integers(stream.modality, x, tokenizers[stream.modality][0].config.channels, "classes")


def _streams(module: TerraMind, inputs: Iterable[str], outputs: Iterable[str]) -> tuple[dict[str, Stream], dict[str, Stream]]:
    return {name: input_stream(module, name) for name in inputs}, {name: modalities.output_stream(name) for name in outputs}


def check_names(
    module: TerraMind, inputs: Iterable[str], outputs: Iterable[str], tokenizers: Tokenizers, visible: Iterable[str] = ()
) -> None:
    """Raises a ValueError for user names that a model does not know or that do not go together, before anything is computed.

    `visible` are inputs of which it is known what is seen: their tokens may be outputs, too.
    """
    read, made = _streams(module, inputs, outputs)
    encoder = {s.key: s.modality for s in module.config.encoder}
    decoder = {s.key: s.modality for s in module.config.decoder}
    modalities.check_distinct(read)
    for role, verb, streams, known in (("input", "takes", read, encoder), ("output", "makes", made, decoder)):
        for name, stream in streams.items():
            if stream.key not in known:
                raise ValueError(f"This model {verb} no {name}; it {verb} {', '.join(dict.fromkeys(known.values()))}.")
            if stream.kind == "tokens" and stream.modality not in tokenizers:
                raise ValueError(f"The {role} {name} needs a tokenizer of {stream.modality}; given: {', '.join(tokenizers) or 'none'}.")
    both = [name for name, stream in read.items() if stream in made.values() and (name not in visible or stream.kind == "sequence")]
    if both:
        raise ValueError(f"{both[0]} is both an input and an output; {one_role(read[both[0]])}.")


def _check_sizes(inputs: Mapping[str, Any], read: Mapping[str, Stream]) -> None:
    """Raises unless the inputs are of one batch and the images of one size."""
    batches = {name: np.shape(x)[0] for name, x in inputs.items()}
    sides = {name: np.shape(x)[1:3] for name, x in inputs.items() if read[name].kind != "sequence"}
    if len(set(batches.values())) > 1:
        raise ValueError(f"The inputs differ in batch size: {', '.join(f'{name} {size}' for name, size in batches.items())}.")
    if len(set(sides.values())) > 1:
        sizes = (f"{name} {'x'.join(map(str, side))}" for name, side in sides.items())
        raise ValueError(f"The images must be of one size; theirs are {', '.join(sizes)} pixels.")


def _mask(name: str, visible: np.ndarray, x: Any, stream: Stream) -> np.ndarray:
    """`visible` as an array, a ValueError unless it fits the image `x`."""
    visible, shape = np.asarray(visible), np.shape(x)
    if stream.kind == "sequence":
        raise ValueError(f"Visible patches are given for {name}, which is no image.")
    if visible.dtype != bool or visible.shape != (shape[0], shape[1] // modalities.PATCH_SIZE, shape[2] // modalities.PATCH_SIZE):
        expected = f"bool, one a patch of 16 pixels of {list(shape[:3])}"
        raise ValueError(f"The visible patches of {name} are {visible.dtype} of shape {list(visible.shape)}; expected {expected}.")
    return visible


def check_by_name(inputs: Any) -> None:
    """Raises a ValueError unless `inputs` are arrays by name."""
    if not isinstance(inputs, Mapping):
        raise ValueError(f"The inputs are of type {type(inputs).__name__}; expected a dict by modality, such as {{'S2L2A': array}}.")


def check_integers(name: str, x: np.ndarray, count: int, kind: str) -> None:
    """Raises a ValueError unless `x` holds integers below `count`; `kind` is what they are: classes, tokens."""
    if isinstance(x, jax.core.Tracer):
        return  # values are not known in a program
    x = np.asarray(x)
    if x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= count:
        raise ValueError(f"{name} holds {x.dtype} values from {x.min()} to {x.max()}; expected integer {kind} 0-{count - 1}.")
