"""The released models by name: load, call, save (the names and options are the reference's).

    model = tm.load("terramind_v1_base_generate", modalities=["S2L2A"], output_modalities=["S1GRD", "LULC"])
    made = model.generate({"S2L2A": pixels}, seed=0, timesteps=10, standardize=True)

A `Model` is frozen data: networks, variables, options. Its methods are one line over the pure functions of `generate`, `tim`,
`model` and `tokenizer`, which is what a sharded job calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from terramind_jax import captions, decoding, export, generate, modalities, program, tim, tokenizer, zoo
from terramind_jax import model as networks
from terramind_jax.modalities import Stream
from terramind_jax.model import backbone, temporal

Variables = Mapping[str, Any]

# The reference's options of sampling, and what `decoding.generate_tokens` calls them.
SAMPLING = {"decoding_steps": "steps", "temps": "temperature", "top_p": "top_p", "top_k": "top_k"}


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """One model. ``module.apply(variables, ...)`` is pure; `dataclasses.replace` with other variables gives the same model retrained."""

    name: str
    module: nn.Module
    variables: Variables
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: Mapping[str, tuple[tokenizer.Tokenizer, Variables]] = dataclasses.field(default_factory=dict)  # by modality
    vocabulary: captions.Tokenizer | None = None  # of captions; without it captions are ids

    def __repr__(self) -> str:
        """Without the weights, which a notebook would print."""
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(self.variables.get("params", {})))
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"<{type(self).__name__} {self.name}, {size / 1e6:.1f} M parameters{options}>"

    @property
    def version(self) -> str:
        return zoo.get(self.name).version

    def standardize(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays ``[..., C]`` by user name in physical units -> zero mean, unit variance; names without statistics pass (spec 1.4)."""
        return {name: self._scale(name, x, inverse=False) for name, x in inputs.items()}

    def destandardize(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `standardize`; what a generator makes has the statistics of what it is generated as, ``S2`` those of S2L2A."""
        return {name: self._scale(name, x, inverse=True) for name, x in outputs.items()}

    def _scale(self, name: str, x: np.ndarray, *, inverse: bool) -> np.ndarray:
        modality = self._made(name) if inverse else self._modality(name)
        known = modalities.MODALITIES.get(modality)
        if known is None or not known.is_image or known.kind == "classes":
            return x
        mean, std = modalities.statistics(modality, self.version, self.options.get("offset", {}).get(name, 0.0))
        bands = None if inverse and name in self.options.get("output_modalities", ()) else self.options.get("bands", {}).get(name)
        if bands:
            at = [modalities.get(modality).bands.index(band) for band in bands if band in modalities.get(modality).bands]
            if len(at) != len(bands):
                raise ValueError(f"{name} has bands without statistics ({', '.join(bands)}); standardise them yourself.")
            mean, std = mean[at], std[at]
        x = np.asarray(x, np.float32)
        if x.shape[-1:] != mean.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected its {len(mean)} bands last.")
        return x * std + mean if inverse else (x - mean) / std

    def _modality(self, name: str) -> str:
        return modalities.input_stream(name).modality

    def _made(self, name: str) -> str:
        """The modality of an output."""
        return self._modality(name)


@dataclasses.dataclass(frozen=True, repr=False)
class FeatureExtractor(Model):
    """``terramind_*``: standardised inputs to features of every layer (spec 5)."""

    streams: Mapping[str, Stream] = dataclasses.field(default_factory=dict)  # by user name

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> list:
        """Inputs by user name, in the order of concatenation: pixels ``[B, H, W, C]`` standardised, LULC ``[B, H, W]`` classes, NDVI
        ``[B, H, W, 1]``, coords ``[B, 2]``, caption a list of strings or ids ``[B, L]`` -> a list of `encoder_depth` features
        ``[B, N, D]`` (`merge_method` dict: by user name). Two names of one stream, such as S2L1C and S2L1C_L8, cannot be given at once;
        the reference reads both through one embedding."""
        encoded = self.encode(inputs)
        with self._user_names():
            return self._rename(backbone.features(self.module, self.variables, encoded))

    def over_time(
        self,
        inputs: Mapping[str, np.ndarray],
        pooling: temporal.Pooling = "mean",
        *,
        subset_lengths: Sequence[int] | None = None,
        **options: Any,
    ) -> list:
        """Features of time series: all steps in one call of the encoder, then pooled (`model.temporal.over_time`).

        Args:
          inputs: as of a call, with time second: images ``[B, T, H, W, C]``, coords ``[B, T, 2]``, captions as ids ``[B, T, L]``.
          pooling: ``keep`` gives ``[B, T, N, D]``, ``concat`` ``[B, N, T * D]``, ``mean``, ``max`` and ``diff`` ``[B, N, D]``.
          subset_lengths: splits the steps into groups, which are averaged first.
          **options: of a call; the `seed` of Thinking in Modalities may be ``[B * T]``.
        """
        for name, x in inputs.items():
            if self._stream(name).kind == "pixels" and np.ndim(x) != 5:
                raise ValueError(f"{name} has shape {list(np.shape(x))}; a time series is [B, T, H, W, C].")
        encode = functools.partial(self, **options)
        return temporal.over_time(encode, inputs, pooling, subset_lengths=subset_lengths)

    def attention(self, inputs: Mapping[str, np.ndarray], **options: Any) -> dict[str, dict[str, jax.Array]]:
        """What the tokens of each modality look at, layer by layer: weights of self-attention.

        Args:
          inputs, options: as of a call.

        Returns:
          ``{modality that looks: {modality it looks at: [layers, B, heads, n, m]}}`` float32, by the names of the inputs. The weights of
          one token, over all modalities, sum to 1. Thinking in Modalities has what was generated under its stream, ``tok_lulc@224``.
        """
        read = self._read(inputs, **options)
        with self._user_names():
            found = backbone.attention(self.module, self.variables, read)
        names = {stream.key: name for name, stream in self.streams.items() if name in inputs}
        return {names.get(key, key): {names.get(other, other): w for other, w in row.items()} for key, row in found.items()}

    def _read(self, inputs: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """What the encoder reads, by stream."""
        return self.encode(inputs)

    def encode(self, inputs: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Inputs by stream as the network takes them: images whose stream holds tokens are tokenised."""
        generate.check_by_name(inputs)
        streams = {name: self._stream(name) for name in inputs}
        modalities.check_distinct(streams)
        return {stream.key: self._encode(stream, inputs[name]) for name, stream in streams.items()}

    def _encode(self, stream: Stream, x: np.ndarray | Sequence[str]) -> np.ndarray | jax.Array:
        if stream.kind == "pixels":
            modalities.check_finite(stream.modality, x)
            if stream.modality in modalities.MODALITIES:
                modalities.check_scale(stream.modality, x, standardised=True)
            return x  # of any bands, and of modalities of the user's own
        return generate.encode_input(stream, x, self.tokenizers, vocabulary=self.vocabulary, standardize=False)

    @contextlib.contextmanager
    def _user_names(self) -> Iterator[None]:
        """Errors of the network, which knows streams, name the inputs as the user does."""
        try:
            yield
        except ValueError as error:
            text = str(error)
            for name, stream in self.streams.items():
                text = text.replace(stream.key, name)
            raise ValueError(text) from error

    def _stream(self, name: str) -> Stream:
        if name not in self.streams:
            raise ValueError(f"This model has no input {name!r}; it was built with {', '.join(self.streams)}.")
        return self.streams[name]

    def _modality(self, name: str) -> str:
        return self._stream(name).modality

    def _rename(self, features: list) -> list:
        if self.module.config.merge_method != "dict":
            return features
        names = {stream.key: name for name, stream in self.streams.items()}
        return [{names.get(key, key): x for key, x in layer.items()} for layer in features]


@dataclasses.dataclass(frozen=True, repr=False)
class ThinkingInModalities(FeatureExtractor):
    """``*_tim``: a feature extractor that first generates `tim_modalities` from its inputs, and reads them, too (spec 8.6)."""

    generator: tuple[networks.TerraMind, Variables] | None = None

    def __call__(self, inputs: Mapping[str, np.ndarray], seed: int | np.ndarray = 0) -> list:
        """As `FeatureExtractor.__call__`; `seed` is of the generation, one integer or ``[B]``."""
        encoded, settings = self.encode(inputs), self._settings(seed)
        with self._user_names():
            return self._rename(tim.features(self.module, self.variables, *self.generator, encoded, self._targets, **settings))

    def think(self, inputs: Mapping[str, np.ndarray], seed: int | np.ndarray = 0) -> dict[str, jax.Array]:
        """The inputs by stream, followed by the ids of what was generated from them."""
        return tim.think(*self.generator, self.encode(inputs), self._targets, **self._settings(seed))

    def _read(self, inputs: Mapping[str, np.ndarray], seed: int | np.ndarray = 0) -> dict[str, jax.Array]:
        return self.think(inputs, seed)

    @property
    def _targets(self) -> list[str]:
        return [modalities.output_stream(name).key for name in self.options["tim_modalities"]]

    def _settings(self, seed: int | np.ndarray) -> dict[str, Any]:
        own = {ours: self.options[f"tim_{theirs}"] for theirs, ours in SAMPLING.items()}
        return {"seed": seed, "chained": self.options["tim_chained_generations"], **own}


@dataclasses.dataclass(frozen=True, repr=False)
class Generator(Model):
    """``*_generate``: any modalities to any others (spec 8.5)."""

    def generate(
        self,
        inputs: Mapping[str, np.ndarray],
        seed: int | np.ndarray = 0,
        timesteps: int | None = None,
        standardize: bool | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        sampler: tokenizer.Sampler = "dpmpp",
        clip: tokenizer.Clip = "published",
        num_samples: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Inputs by user name to every output that the model was built for, each conditioning those after it.

        Their order is that of the option ``output_modalities``, and the caller's to choose: no best one is known. A new size of images
        compiles programs of its own, and so does a new batch size; accelerators fill batches up, so that there are few
        (`generate.in_buckets`).

        Args:
          inputs: images ``[B, S, S, C]``, of those bands that the model was built with (option ``bands``; what `fill_bands` does for the
            others, see `bands.fill_missing`), LULC ``[B, S, S]`` classes, coords ``[B, 2]`` as (lon, lat), caption a list of strings or ids
            ``[B, L]``. Images are of one size, any multiple of 16 pixels; diffusion decoders need multiples of 32.
          seed: one integer, or ``[B]``, one a sample; a sample's draws do not depend on the batch around it, how they are rounded does a
            little, see `decoding.generate_tokens`.
          timesteps: of diffusion decoders. standardize: whether arrays are in physical units. Default: what the model was built with; one
            that was built with neither takes as many timesteps as the sampler needs, see `tokenizer.decode`, and standardised arrays.
          noise: what diffusion decoders start from, ``[B, S, S, C]`` by output, instead of drawing it.
          sampler: of diffusion decoders: "dpmpp", "ddim" as published, which needs several times its steps, or "ddpm".
          clip: the limit of their predictions: "published", one standard deviation around the mean, "none" or "dynamic".
          num_samples: how often each output is drawn; None: once.
          **options: `at`, for windows of a scene, and `visible`, for images of which some patches are hidden, as in `generate.generate`;
            `bands` and `fill_bands`, which the model can be built with; and those of `decoding.generate_tokens`, also under the names that
            the model is built with (`SAMPLING`), and over what it was built with; a mapping gives each output its own.

        Returns:
          ``{name: array}``: float32 ``[B, S, S, C]`` of the inputs' size, of LULC logits of the classes, coords ``[B, 2]`` with NaN where
          none was written, caption a list of strings, or ids without a vocabulary. With `num_samples` an image is a `draws.Draws` with
          `values` ``[N, B, S, S, C]``, `mean`, `std` and `quantiles`, LULC a `draws.ClassDraws` with `probabilities` and `entropy`, and
          coords are ``[N, B, 2]``; the first draw is what is made without `num_samples`, on accelerators but for rounding.

        Raises:
          ValueError: as `generate.generate`.
        """
        timesteps = self.options["timesteps"] if timesteps is None else timesteps
        decoding = dict(timesteps=timesteps, noise=noise, sampler=sampler, clip=clip)
        settings = dict(seed=seed, **decoding, **self._settings(standardize, options))
        if num_samples is None:
            return generate.in_buckets(generate.generate, *self._parts(inputs), **settings)
        return generate.generate_draws(*self._parts(inputs), num_samples=num_samples, **settings)

    def generate_tokens(
        self, inputs: Mapping[str, np.ndarray], seed: int | np.ndarray = 0, standardize: bool | None = None, **options: Any
    ) -> dict[str, jax.Array]:
        """The same before decoding: ``{name: ids}``, int32 ``[B, s, s]``, of sequences ``[B, L]``."""
        return generate.in_buckets(generate.output_tokens, *self._parts(inputs), seed=seed, **self._settings(standardize, options))

    def compile(self, batch_size: int = 1, image_size: int | None = None, **options: Any) -> program.Compiled:
        """`generate` for one batch size and size of images, compiled now: ``made = model.compile(8)(inputs, seed=0)``.

        The whole is one program, which a call neither traces nor compiles. `image_size` is the model's by default; `options` are those of
        `generate` that hold for all calls: not `noise`, `num_samples`, `at`, `bands`, `visible`, `known_tokens` and `only`.
        """
        run, inputs = self._program(batch_size, image_size, **options)
        standardize = self._settings(options.get("standardize"), {})["standardize"]
        check = functools.partial(generate.check_input, self.module, self.tokenizers, standardize)
        return program.compile_for(run, self._weights(), inputs, check)

    def export(
        self,
        path: str | os.PathLike,
        batch_size: int | None = None,
        image_size: int | None = None,
        platforms: Sequence[str] = export.PLATFORMS,
        **options: Any,
    ) -> None:
        """Writes `generate` as a program that JAX runs without this package, and its weights, to the folder `path`; see `export`.

        Arguments as of `compile`; the batch size is open by default.
        """
        run, inputs = self._program(export.open_size() if batch_size is None else batch_size, image_size, **options)
        export.write(path, run, self._weights(), inputs, platforms)

    def _program(
        self,
        batch_size: Any,
        image_size: int | None,
        timesteps: int | None = None,
        standardize: bool | None = None,
        sampler: tokenizer.Sampler = "dpmpp",
        clip: tokenizer.Clip = "published",
        **options: Any,
    ) -> tuple:
        settings = self._settings(standardize, options)
        refused = [name for name in ("at", "bands", "visible", "known_tokens", "only") if name in options]
        if refused or settings["bands"]:
            raise ValueError(f"A compiled program takes no {', '.join(refused) or 'bands'}; use generate.")
        settings = {name: value for name, value in settings.items() if name not in ("vocabulary", "bands", "fill_bands")}
        settings |= dict(timesteps=self.options["timesteps"] if timesteps is None else timesteps, sampler=sampler, clip=clip)
        networks = {name: module for name, (module, _) in self.tokenizers.items()}
        names = self.options["modalities"]
        run = program.build(self.module, networks, names, self.options["output_modalities"], **settings)
        return run, program.shapes(self.module, names, batch_size, image_size or self.options["img_size"])

    def _weights(self) -> dict[str, jax.Array]:
        return program.flat_weights(self.variables, {name: variables for name, (_, variables) in self.tokenizers.items()})

    def locate(
        self, inputs: Mapping[str, np.ndarray], standardize: bool | None = None, temperature: float = 1.0, **options: Any
    ) -> np.ndarray:
        """How probable each place on Earth is, float32 ``[B, 721, 1440]``, of a model that makes coords; see `locate.density`.

        Each sample's sum to 1; `coordinates.grid` gives longitudes and latitudes. `options` are `visible`, `bands` and `fill_bands`.
        """
        settings = {name: value for name, value in self._settings(standardize, options).items() if name in generate.ENCODING}
        return generate.locate(self.module, self.variables, self.tokenizers, inputs, temperature=temperature, **settings)

    def _parts(self, inputs: Mapping[str, np.ndarray]) -> tuple:
        return self.module, self.variables, self.tokenizers, inputs, self.options["output_modalities"]

    def _settings(self, standardize: bool | None, options: Mapping[str, Any]) -> dict[str, Any]:
        standardize = self.options["standardize"] if standardize is None else standardize
        _check_options(options)
        scale = dict(vocabulary=self.vocabulary, standardize=standardize, version=self.version)
        scale |= {name: self.options[name] for name in ("offset", "bands", "fill_bands")}
        built = {ours: self.options[theirs] for theirs, ours in SAMPLING.items()}
        return {**scale, **built, **{SAMPLING.get(name, name): value for name, value in options.items()}}

    def _modality(self, name: str) -> str:
        return generate.input_stream(self.module, name).modality

    def _made(self, name: str) -> str:
        return modalities.output_stream(name).modality if name in self.options["output_modalities"] else self._modality(name)


def _check_options(options: Mapping[str, Any]) -> None:
    known = {*SAMPLING, "bands", "fill_bands", *inspect.signature(decoding.generate_tokens).parameters}
    known -= {"module", "variables", "inputs", "targets", "seed"}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "standardize", "timesteps", "noise", "sampler", "clip", "num_samples"], n=1)
            raise ValueError(f"Unknown option {name!r} of generation{f'; did you mean {close[0]!r}?' if close else '.'}")


@dataclasses.dataclass(frozen=True, repr=False)
class Pretraining(Model):
    """``*_encdec``: the whole pretraining model (spec 4)."""

    def __call__(self, batch: Mapping[str, jax.Array], kind: str = "mod") -> tuple[jax.Array, dict[str, jax.Array]]:
        """A batch of slots, described in `terramind_jax.data.pipeline` -> loss and mean loss a stream, 0 where it has no targets."""
        if missing := [name for name in ("input_modality", "target_modality", "patches") if name not in batch]:
            raise ValueError(f"The batch has no {missing[0]!r}; a pretraining model takes batches of slots, as data.pipeline makes them.")
        return _losses(self.variables, batch, module=self.module, kind=kind)


@functools.partial(jax.jit, static_argnames=("module", "kind"))
def _losses(variables: Variables, batch, *, module: networks.TerraMind, kind: str):
    sums, counts = module.apply(variables, batch, method="losses")
    streams = module.config.decoder
    loss = networks.loss.combine(sums, counts, [s.vocab_size for s in streams], kind)
    return loss, {s.key: sums[i] / jax.numpy.maximum(counts[i], 1) for i, s in enumerate(streams)}


@dataclasses.dataclass(frozen=True, repr=False)
class ImageTokenizer(Model):
    """``*_tokenizer_*``: one modality's images to tokens and back (spec 6)."""

    def encode(self, x: np.ndarray) -> jax.Array:
        """Standardised ``[B, H, W, C]``, of LULC also classes ``[B, H, W]`` -> int32 tokens ``[B, h, w]``."""
        modalities.check_scale(self.module.config.modality, x, standardised=True)
        self._check_classes(x)
        return tokenizer.apply(self.module, self.variables, x, "encode")

    def decode(
        self,
        tokens: np.ndarray,
        seed: int | np.ndarray = 0,
        timesteps: int | None = None,
        noise: np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Tokens ``[B, h, w]`` -> standardised ``[B, H, W, C]``, of LULC logits; `noise` fixes what the diffusion starts from.

        `options` are those of `tokenizer.decode`, such as ``sampler="ddim"``, the published one, or ``clip="none"``: the published clip
        keeps outputs within one standard deviation.
        """
        generate.check_integers("tokens", tokens, self.module.config.codebook_size, "tokens")
        return tokenizer.decode(self.module, self.variables, tokens, seed=seed, timesteps=timesteps, noise=noise, **options)

    def features(self, x: np.ndarray, return_type: str = "embedding"):
        """As a backbone: ``embedding``, ``latent`` or ``quantized`` maps of standardised images (spec 6.8)."""
        self._check_classes(x)
        return tokenizer.apply(self.module, self.variables, x, "features", return_type=return_type)

    def _check_classes(self, x: np.ndarray) -> None:
        config = self.module.config
        if config.is_class_map and np.shape(x)[3:] in ((), (1,)):  # no probabilities
            generate.check_integers(config.modality, x, config.channels, "classes")

    def _modality(self, name: str) -> str:
        return modalities.get(name).name
