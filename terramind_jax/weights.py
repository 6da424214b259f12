"""Weights in and out of models: from the hub, a file, a directory or at random; to a file or a directory.

A model is one or more networks, each with a prefix in the reference's state dict (spec 10.3). All are filled alike: what the source lacks
and may lack, such as the embedding of a user's own modality, is fresh; anything else that is missing is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import build, captions, config, coordinates, declarations, hub, modalities, sources, tim, zoo
from terramind_jax import model as networks
from terramind_jax.convert import files, rules
from terramind_jax.model import backbone
from terramind_jax.models import FeatureExtractor, Generator, Model, ThinkingInModalities, Variables
from terramind_jax.tokenizer import Tokenizer


def load(name: str, weights: str | os.PathLike = "hub", *, revision: str | None = None, seed: int = 0, **options: Any) -> Model:
    """A released model with its weights.

    Args:
      name: one of `zoo.list_models`.
      weights: ``hub``, the published file, downloaded and converted once; ``random``; or a path: ``.pt``, ``.safetensors``, a directory of
        `save`, whose options hold where none are given, the work directory of a training, or the folder of a quickstart. A training may
        have had other sizes than the model of that name, which then are the model's.
      revision: of the model's repository on the hub, a commit; None: the one that was downloaded first, see `hub`.
      seed: of what is drawn: random weights, fresh embeddings of new modalities.
      **options: the reference's, by kind of model (`build.OPTIONS` has the defaults):

        - feature extractors and ``_tim``: ``modalities``, names and ``{name: channels}`` of new ones (all); ``merge_method``, how the
          modalities' tokens become one output: mean, max, concat, dict (by name) or None (all tokens in a row); ``bands``, ``{name: [band,
          ...]}`` for inputs with some bands, by the names of `modalities.get`; ``in_chans``, channels of one image instead of modalities;
          ``img_size`` (224); ``patch_size`` of new modalities (16); ``num_register_tokens``; ``drop_path_rate`` and
          ``modality_drop_rate`` in training.
        - ``_tim``: ``tim_modalities`` that are generated first (LULC), ``tim_chained_generations``, ``tim_decoding_steps``, ``tim_temps``,
          ``tim_top_p``, ``tim_top_k``.
        - ``_generate``: ``modalities`` and ``output_modalities`` (needed), ``timesteps`` of diffusion decoders (None: as many as
          their sampler needs, see `tokenizer.decode`), ``standardize``, whether arrays are in physical units (False), ``offset``,
          ``{name: value}`` added to a modality's mean, ``decoding_steps``, ``temps``, ``top_p``, ``top_k``; and of this package ``bands``,
          as above, and ``fill_bands``, what stands for the others, see `bands.fill_missing`.
        - these three: ``sizes`` and ``codebooks`` of a network that is not the released one, which the work directory of a pretraining
          tells.
        - all: ``dtype`` of the computation, of the tokenizers too (auto: bfloat16 on accelerators, float32 on a CPU), ``remat``, ``unroll``
          of the layers.

        ``tokenizers`` says where the tokenizers of tokenised inputs and of outputs come from: ``hub``, ``random``, or a folder with one
        work directory, or directory of `save`, a modality. Default: the file or directory of the weights if it holds them, else the words
        of `weights`. The same place may have the published vocabularies, in a folder as ``caption.json`` and ``coords.json``: captions
        are ids without theirs, that of coordinates is only compared with the rule that the package follows.

    Raises:
      ValueError: an unknown name or option, or weights that do not fit, with everything that is wrong at once.
      FileNotFoundError, ConnectionError, ImportError: no weights there, no network, no PyTorch to read a ``.pt``.
    """
    of_tokenizers = options.pop("tokenizers", None)
    if weights not in ("hub", "random"):
        weights = sources.within(weights, zoo.get(name))
        sources.declare(Path(weights))
    options = saved_options(name, weights) | options
    model, key = build.model(name, **options), jax.random.key(seed)
    online = weights == "hub" and not hub.has_weights(zoo.get(name))
    source = sources.open_source(weights, zoo.get(name), revision)
    filled = {}
    for i, (prefix, (module, _)) in enumerate(networks_of(model).items()):
        inner, here = source, prefix
        if prefix.startswith(sources.TOKENIZER) and (of_tokenizers is not None or not source.holds(prefix)):
            inner, here = _open_tokenizer(model, module, of_tokenizers or weights), ""
        module, fresh = inner.network(here, module), jax.random.fold_in(key, i)
        found = _take_bands(inner, model, fresh) if not prefix and model.options.get("bands") else inner.take(here, module)
        if prefix == sources.GENERATOR and is_chained(model):
            found = tim.share(found, filled[""][1])
        filled[prefix] = module, _on_device(complete(module, found, fresh))
    return with_vocabulary(with_networks(model, filled), of_tokenizers or weights, online=online)


def saved_options(name: str, weights: str | os.PathLike) -> dict[str, Any]:
    """Options that follow from weights in a directory: those it was saved with, or the sizes of a pretraining.

    A ValueError if another version or size is in it.
    """
    path = None if weights in ("hub", "random") else Path(sources.within(weights, zoo.get(name)))
    if path is not None and (path / "config.json").is_file() and "sizes" in build.OPTIONS[zoo.get(name).kind]:
        return _sizes(config.of_workdir(path))
    info = {} if path is None else sources.read_info(path)
    saved, wanted = zoo.get(info.get("name", name)), zoo.get(name)
    if (saved.version, saved.size) != (wanted.version, wanted.size):
        raise ValueError(f"{weights} holds {saved.name}, which is no {name}.")
    return dict(info.get("options", {})) if saved.name == name else {}


def _sizes(settings: ConfigDict) -> dict[str, Any]:
    """Of a pretraining; nothing of any other training."""
    if config.command_of(settings) != "pretrain":
        return {}
    m = settings.model
    names = ("dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "gated_mlp", "use_bias")
    return dict(sizes={name: m[name] for name in names}, codebooks=m.codebooks.to_dict(), img_size=m.image_size)


def _take_bands(source: sources.Source, model: FeatureExtractor, key: jax.Array) -> dict[str, Any]:
    """Variables of a feature extractor for some bands, from a source that has those bands already or, as the published files, all."""
    config, bands = model.module.config, build.bands_by_stream(model.streams, model.options["bands"])
    whole = {name: backbone.known_bands(name) for name, wanted in bands.items() if source.holds_all_bands(name, wanted)}
    found = source.take("", networks.Backbone(backbone.with_bands(config, whole)))
    for name in whole:
        own = [band for band in bands[name] if band not in whole[name]]
        if own:
            known = ", ".join(whole[name])
            what = modalities.STREAMS[name].modality
            warnings.warn(f"{what} has no band {', '.join(own)}: embedded by fresh random weights. Its bands: {known}.", stacklevel=3)
    return backbone.select_bands(found, {name: bands[name] for name in whole}, key) if whole else found


def _open_tokenizer(model: Model, module: Tokenizer, words: str | os.PathLike) -> sources.Source:
    """`sources.open_tokenizer` of one of a model's networks."""
    modality = module.config.modality
    inputs = [stream.modality for stream in getattr(model, "streams", {}).values()]
    optional = isinstance(model, ThinkingInModalities) and modality not in inputs
    return sources.open_tokenizer(words, modality, model.version, optional=optional)


def with_vocabulary(model: Model, words: str | os.PathLike, *, online: bool) -> Model:
    """The model with the vocabulary of its captions if that is found; the one of its coordinates, if found, is checked.

    A missing one is no error: captions are ids then, and the rule of coordinates is known. So the hub is only asked for the latter when
    it has just been reached (`online`).
    """
    streams = {stream.key for stream in getattr(model.module.config, "streams", ())}
    if "coords" in streams and (path := sources.find_vocabulary("coords", words, fetch=online)):
        coordinates.check_vocabulary(path)
    if "caption" in streams and (path := sources.find_vocabulary("caption", words)):
        return dataclasses.replace(model, vocabulary=captions.load(path))
    return model


def tokenizer(modality: str, words: str | os.PathLike, version: str = "v1", *, optional: bool = False) -> tuple[Tokenizer, Variables]:
    """One modality's tokenizer: ``hub``, ``random``, or from a folder of work directories, directories of `save`, or published files.

    `optional` is as of `sources.open_tokenizer`.
    """
    source = sources.open_tokenizer(words, modality, version, optional=optional)
    module = source.network("", build.tokenizer_of(modality, version))
    return module, complete(module, source.take("", module), jax.random.key(0))


def initial(words: str, module: networks.TerraMind, seed: int = 0) -> dict[str, Any]:
    """What a pretraining starts from: a released model's name, whose file comes from the hub, or a path as of `load`.

    Modalities that `module` lacks are left out, those that the weights lack are fresh; a ValueError says what else does not fit.
    """
    is_path = Path(words).exists() or Path(words).name != words or Path(words).suffix
    is_name = words in zoo.MODELS or (words.startswith("terramind_") and not is_path)
    entry = zoo.get(words if is_name else "terramind_v1_base")
    if entry.kind == "tokenizer":
        raise ValueError(f"A pretraining cannot start from {words}, which is a tokenizer.")
    source = sources.open_source("hub" if is_name else words, entry)
    return complete(module, source.take("", module, part=True), jax.random.key(seed))


def from_torch(state_dict: Mapping[str, Any], name: str, **options: Any) -> dict[str, Any]:
    """Variables of the main network of a model from the state dict, of tensors or arrays, of the reference's model of that name.

    Further networks, such as tokenizers, come with ``load(name, path)``. A file of the whole pretraining model fits every name of its size.

    Raises:
      ValueError: an unknown name or option, or a state dict that does not fit, with everything that is wrong at once.
    """
    model = build.model(name, **options)
    prefix, (module, _) = next(iter(networks_of(model).items()))
    source, key = sources.StateDict({key: files.to_numpy(x) for key, x in state_dict.items()}), jax.random.key(0)
    found = _take_bands(source, model, key) if model.options.get("bands") else source.take(prefix, module)
    return complete(module, found, key)


def to_torch(model: Model) -> dict[str, np.ndarray]:
    """The state dict that loads strictly into TerraTorch's model of the same name and options (spec 10.6).

    float32 NumPy arrays, for ``torch.from_numpy``; `save` writes a ``.pt`` of them.

    A ValueError if that cannot hold the model: chained Thinking in Modalities whose backbone has embeddings of its own, see `tim`.
    """
    if is_chained(model):
        tim.check_shared(model.variables, model.generator[1])
    state: dict[str, np.ndarray] = {}
    for prefix, (module, variables) in networks_of(model).items():
        part = rules.to_torch(jax.device_get(meta.unbox(variables)), sources.rules_of(module))
        state |= {prefix + key: x for key, x in part.items()}
    return state


def save(model: Model, path: str | os.PathLike) -> None:
    """Writes a model by the suffix of `path`: ``.pt`` or ``.safetensors``, a state dict as of `to_torch`; without one, an Orbax directory.

    Written under a temporary name and renamed; what exists is never replaced (FileExistsError).
    """
    path = Path(path)
    if path.suffix:
        files.check_free(path)
        return files.write(path, to_torch(model))
    import orbax.checkpoint as ocp

    with files.replacing(path) as partial:
        partial.mkdir()
        parts = {prefix or sources.MAIN: part for prefix, part in networks_of(model).items()}
        own = {name: dataclasses.asdict(module.config) for name, (module, _) in parts.items() if isinstance(module, Tokenizer)}
        info = {"name": model.name, "options": dict(model.options), sources.TOKENIZERS: own}
        info[sources.MODALITIES] = declarations.of(s.modality for s in getattr(model.module.config, "streams", ()))
        (partial / sources.INFO).write_text(json.dumps(info, indent=1))
        arrays = {name: _on_device(meta.unbox(variables)) for name, (_, variables) in parts.items()}
        # Compressed, from NumPy, or many at a time, weights would be in memory twice and more; they hardly compress.
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=sources.largest(arrays), use_compression=False)
        ocp.Checkpointer(handler).save(partial.absolute() / sources.ARRAYS, args=ocp.args.PyTreeSave(arrays))


def convert(source: str | os.PathLike, target: str | os.PathLike, name: str | None = None) -> None:
    """Copies weights into another format, by suffix; a name without one is a directory. Holds little more than the weights in memory.

    Args:
      source: ``.pt``, ``.safetensors``, a directory of `save`, or the work directory of a training.
      target: must not exist yet.
      name: of the model in a file that becomes a directory, where the file does not tell.

    Raises:
      ValueError: a file that fits no model, or two directories. FileExistsError: `target` exists.
    """
    source, target = Path(source), Path(target)
    files.check_free(target)
    if target.suffix:
        files.is_safetensors(target)  # raises for other suffixes than its and PyTorch's, before anything is read
    elif source.is_dir():
        raise ValueError(f"{source} and {target} are both directories; copy it, or give {target} a suffix such as {files.SAFETENSORS}.")
    start = time.monotonic()
    print(f"Reading {source}", flush=True)
    with _without_pytorch_or_orbax(source, target) as readable:
        _convert(_directory_to_torch(source) if readable.is_dir() else files.read(readable), source, target, name)
    print(f"Done in {time.monotonic() - start:.0f} s", flush=True)


@contextlib.contextmanager
def _without_pytorch_or_orbax(source: Path, target: Path) -> Iterator[Path]:
    """`source`, or between PyTorch and Orbax a copy of it as .safetensors, so that the two are never in memory together.

    Another process makes the copy; its error is a ValueError here.
    """
    if not (source.is_dir() and target.suffix in files.TORCH_SUFFIXES or source.suffix in files.TORCH_SUFFIXES and not target.suffix):
        yield source
        return
    copy = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{files.SAFETENSORS}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "terramind_jax", "convert", source, copy], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode:
            raise ValueError((done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1].removeprefix("error: "))
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _convert(state: Mapping[str, Any], source: Path, target: Path, name: str | None) -> None:
    """`convert` of a state dict that is read when it is used."""
    if target.suffix:
        print(f"Writing {target}: {len(state)} tensors", flush=True)
        files.write(target, state)
    else:
        model, where = build.model(name or identify(state, source)), sources.StateDict(state, str(source))
        print(f"Converting {len(state)} tensors to {model.name}", flush=True)
        held = {key: part for key, part in networks_of(model).items() if not key.startswith(sources.TOKENIZER) or where.holds(key)}
        model = dataclasses.replace(model, tokenizers={m: part for m, part in model.tokenizers.items() if _prefix(m) in held})
        parts = {prefix: (module, _one_by_one(where.take(prefix, module))) for prefix, (module, _) in held.items()}
        print(f"Writing {target}", flush=True)
        save(with_networks(model, parts), target)


def _directory_to_torch(path: Path) -> dict[str, np.ndarray]:
    """State dict of a directory of `save` or a work directory."""
    if not (path / sources.INFO).is_file():
        module, variables = sources.read_workdir(path)
        return rules.to_torch(variables, sources.rules_of(module))
    directory = sources.read_directory(path)
    model, arrays = build.model(directory.name, **directory.options), directory.arrays
    if is_chained(model):
        tim.check_shared(arrays[""], arrays[sources.GENERATOR])
    state = {}
    for prefix, (module, _) in networks_of(model).items():
        if prefix in arrays:  # a tokenizer may be elsewhere
            flat, table = rules.flatten(arrays.pop(prefix)), sources.rules_of(directory.tokenizers.get(prefix, module))
            state |= {prefix + key: x for key, x in rules.flat_to_torch(flat, table).items()}
    return state


def _one_by_one(variables: dict[str, Any]) -> Variables:
    """On the device; NumPy's array is freed before the next is copied. `variables` are emptied."""
    flat = rules.flatten(variables)
    variables.clear()
    for path in flat:
        flat[path] = jax.device_put(flat[path]).block_until_ready()
    return rules.unflatten(flat)


def identify(state: Mapping[str, Any], path: Path) -> str:
    """Name of the model that a state dict of one network, read from `path`, belongs to; a ValueError if that cannot be told."""
    if "mask_token" in state and not any(".caption." in name for name in state):  # v0.1 has no name for the whole
        sizes = [size for size, facts in zoo.SIZES.items() if facts["dim"] == state["mask_token"].shape[-1]]
        if sizes:
            return f"terramind_v1_{sizes[0]}_encdec"
    elif "quant_proj.weight" in state and "encoder.proj.weight" in state:
        channels = state["encoder.proj.weight"].shape[1]
        fitting = [e for e in zoo.MODELS.values() if e.kind == "tokenizer" and modalities.get(e.modality, e.version).channels == channels]
        named = [e for e in fitting if e.modality.lower() in path.stem.lower() and ("v01" in path.stem) == (e.version == "v01")]
        if len(named) == 1:
            return named[0].name
        if fitting:
            names = ", ".join(e.name for e in fitting)
            raise ValueError(f"{path} is a tokenizer of {channels} channels, of which there are several; say which with --model: {names}.")
    raise ValueError(f"{path} is no whole TerraMind pretraining model and no tokenizer; say what it is with --model.")


# ---- the networks of a model ----


def networks_of(model: Model) -> dict[str, tuple[nn.Module, Variables]]:
    """Every network of a model by its prefix in the reference's state dict, the main one first."""
    main = sources.GENERATOR if isinstance(model, Generator) else ""
    parts = {main: (model.module, model.variables)}
    if getattr(model, "generator", None):
        parts[sources.GENERATOR] = model.generator
    return parts | {_prefix(name): part for name, part in model.tokenizers.items()}


def with_networks(model: Model, parts: Mapping[str, tuple[nn.Module, Variables]]) -> Model:
    """The model with other networks, by prefix."""
    (module, variables), *_ = parts.values()
    changes: dict[str, Any] = dict(module=module, variables=variables)
    changes["tokenizers"] = {name: parts[_prefix(name)] for name in model.tokenizers}
    if getattr(model, "generator", None):
        changes["generator"] = parts[sources.GENERATOR]
    return dataclasses.replace(model, **changes)


def is_chained(model: Model) -> bool:
    """Whether the reference's model of that name has one set of embeddings for its backbone and its generator."""
    return isinstance(model, ThinkingInModalities) and model.options["tim_chained_generations"]


def _prefix(modality: str) -> str:
    """Of a tokenizer."""
    return f"{sources.TOKENIZER}{modalities.MODALITIES[modality].tokens}."


def complete(module: nn.Module, found: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """`found`, part of a network's variables, with what is missing fresh from `key`; only that is computed."""
    there = rules.flatten(found)
    missing = tuple(path for path in rules.flatten(build.abstract(module)) if path not in there)
    return rules.unflatten(there | _fresh(module, missing, key) if missing else there)


@partial(jax.jit, static_argnums=(0, 1))
def _fresh(module: nn.Module, paths: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    variables = rules.flatten(meta.unbox(build.init(module, key)))
    return {path: variables[path] for path in paths}


def _on_device(variables: Variables) -> dict[str, Any]:
    return jax.device_put(dict(variables))
