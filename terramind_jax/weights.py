"""Weights in and out of models: from the hub, a file, a directory or at random; to a file or a directory.

A model is one or more networks, each with a prefix in the reference's state dict (spec 10.3). All are filled alike: what the source lacks
and may lack, such as the embedding of a user's own modality, is fresh; anything else that is missing is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from terramind_jax import build, hub, modalities, zoo
from terramind_jax import model as networks
from terramind_jax.convert import files, rules, tokenizers, transformer
from terramind_jax.model import backbone
from terramind_jax.models import FeatureExtractor, Generator, Model, ThinkingInModalities, Variables
from terramind_jax.tokenizer import Tokenizer

GENERATOR, TOKENIZER = "sampler.model.", "tokenizer."
INFO, ARRAYS, MAIN = "model.json", "arrays", "main"  # what a directory of `save` holds, and its name of an empty prefix

# What a feature extractor or a generator leaves in a file of the whole model: the rest of it, and modalities that it was not built with.
REST = (
    "mask_token",
    "decoder.*",
    "decoder_*",
    *(f"encoder_embeddings.{key}.*" for key in modalities.STREAMS),
    GENERATOR + "*",
    TOKENIZER + "*",
)


def load(name: str, weights: str | os.PathLike = "hub", *, seed: int = 0, **options: Any) -> Model:
    """A released model with its weights.

    Args:
      name: one of `zoo.list_models`.
      weights: ``hub``, the published file, downloaded and converted once; ``random``; or a path: ``.pt``, ``.safetensors``, a directory of
        `save`, or the work directory of a training.
      seed: of what is drawn: random weights, fresh embeddings of new modalities.
      **options: the reference's (spec 5.1, 8.5, 8.6); `build.OPTIONS` lists them with their defaults. ``tokenizers`` says where the
        tokenizers of tokenised inputs and of outputs come from: ``hub``, ``random``, or a folder with one work directory, or directory
        of `save`, a modality. Default: the file or directory of the weights if it holds them, else the words of `weights`.

    Raises:
      ValueError: an unknown name or option, or weights that do not fit, with everything that is wrong at once.
      FileNotFoundError, ConnectionError, ImportError: no weights there, no network, no PyTorch to read a ``.pt``.
    """
    of_tokenizers = options.pop("tokenizers", None)
    model, key = build.model(name, **options), jax.random.key(seed)
    source = open_source(weights, zoo.get(name))
    filled = {}
    for i, (prefix, (module, _)) in enumerate(networks_of(model).items()):
        inner, here = source, prefix
        if prefix.startswith(TOKENIZER) and (of_tokenizers is not None or not source.holds(prefix)):
            (module, inner), here = _open_tokenizer(model, module, of_tokenizers or weights), ""
        filled[prefix] = module, _on_device(complete(module, inner.take(here, module), jax.random.fold_in(key, i)))
    model = with_networks(model, filled)
    bands = model.options.get("bands")
    return select_bands(model, bands, jax.random.fold_in(key, len(filled))) if bands else model


def _open_tokenizer(model: Model, module: Tokenizer, words: str | os.PathLike) -> tuple[Tokenizer, Source]:
    """`open_tokenizer`; one that only decodes what Thinking in Modalities generates may be missing, and is random then."""
    try:
        return open_tokenizer(words, module, model.version)
    except FileNotFoundError:
        inputs = [stream.modality for stream in getattr(model, "streams", {}).values()]
        if not isinstance(model, ThinkingInModalities) or module.config.modality in inputs:
            raise
        warnings.warn(
            f"There is no tokenizer of {module.config.modality} near {words}; it is random, and only decoding needs it.", stacklevel=3
        )
        return module, Random()


def from_torch(state_dict: Mapping[str, Any], name: str, **options: Any) -> dict[str, Any]:
    """Variables of the main network of a model from the state dict, of tensors or arrays, of the reference's model of that name.

    Further networks, such as tokenizers, come with ``load(name, path)``. A file of the whole pretraining model fits every name of its size.

    Raises:
      ValueError: an unknown name or option, or a state dict that does not fit, with everything that is wrong at once.
    """
    model = build.model(name, **options)
    prefix, (module, _) = next(iter(networks_of(model).items()))
    source = StateDict({key: np.asarray(x) for key, x in state_dict.items()})
    return complete(module, source.take(prefix, module), jax.random.key(0))


def to_torch(model: Model) -> dict[str, np.ndarray]:
    """The state dict, float32 NumPy arrays, that loads strictly into TerraTorch's model of the same name and options (spec 10.6)."""
    state: dict[str, np.ndarray] = {}
    for prefix, (module, variables) in networks_of(model).items():
        part = rules.to_torch(jax.device_get(meta.unbox(variables)), rules_of(module))
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
        (partial / INFO).write_text(json.dumps({"name": model.name, "options": dict(model.options)}, indent=1))
        arrays = {prefix or MAIN: _on_device(meta.unbox(variables)) for prefix, (_, variables) in networks_of(model).items()}
        # Compressed, or from NumPy, weights would be in memory twice and more; they hardly compress.
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
        ocp.Checkpointer(handler).save(partial.absolute() / ARRAYS, args=ocp.args.PyTreeSave(arrays))


def select_bands(model: FeatureExtractor, bands: Mapping[str, list[str]], key: jax.Array) -> FeatureExtractor:
    """A feature extractor for some bands of its modalities, by user name (spec 5.3); see `model.backbone.select_bands`."""
    unknown = [name for name in bands if name not in model.streams]
    if unknown:
        raise ValueError(f"bands are given for {unknown[0]!r}, which is no input of this model; it has {', '.join(model.streams)}.")
    by_stream = {model.streams[name].key: list(wanted) for name, wanted in bands.items()}
    config, variables = backbone.select_bands(model.module.config, model.variables, by_stream, key)
    now = {s.key: s for s in config.streams}
    streams = {name: now[s.key] for name, s in model.streams.items()}
    return dataclasses.replace(model, module=networks.Backbone(config), variables=variables, streams=streams)


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
    if source.is_dir() and not target.suffix:
        raise ValueError(f"{source} and {target} are both directories; copy it, or give {target} a suffix such as {files.SAFETENSORS}.")
    start = time.monotonic()
    print(f"Reading {source}", flush=True)
    state = _directory_to_torch(source) if source.is_dir() else files.read(source)
    if target.suffix:
        print(f"Writing {target}: {len(state)} tensors", flush=True)
        files.write(target, state)
    else:
        model = build.model(name or identify(state, source))
        print(f"Converting {len(state)} tensors to {model.name}", flush=True)
        flat = rules.flatten(rules.from_torch(state, rules_of(model.module), build.abstract(model.module)))
        for path in flat:  # one by one: NumPy's array is freed before the next is copied
            flat[path] = jax.numpy.asarray(flat[path])
        print(f"Writing {target}", flush=True)
        save(dataclasses.replace(model, variables=rules.unflatten(flat)), target)
    print(f"Done in {time.monotonic() - start:.0f} s", flush=True)


def _directory_to_torch(path: Path) -> dict[str, np.ndarray]:
    """State dict of a directory of `save` or a work directory."""
    if not (path / INFO).is_file():
        module, variables = _read_workdir(path)
        return rules.to_torch(variables, rules_of(module))
    info = json.loads((path / INFO).read_text())
    model, arrays = build.model(info["name"], **info["options"]), read_directory(path)
    state = {}
    for prefix, (module, _) in networks_of(model).items():
        flat = rules.flatten(arrays.pop(prefix))
        state |= {prefix + key: x for key, x in rules.flat_to_torch(flat, rules_of(module)).items()}
    return state


def identify(state: Mapping[str, Any], path: Path) -> str:
    """Name of the model that a state dict of one network, read from `path`, belongs to; a ValueError if that cannot be told."""
    if "mask_token" in state:
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
    main = GENERATOR if isinstance(model, Generator) else ""
    parts = {main: (model.module, model.variables)}
    if getattr(model, "generator", None):
        parts[GENERATOR] = model.generator
    return parts | {_prefix(name): part for name, part in model.tokenizers.items()}


def with_networks(model: Model, parts: Mapping[str, tuple[nn.Module, Variables]]) -> Model:
    """The model with other networks, by prefix."""
    (module, variables), *_ = parts.values()
    changes: dict[str, Any] = dict(module=module, variables=variables)
    changes["tokenizers"] = {name: parts[_prefix(name)] for name in model.tokenizers}
    if getattr(model, "generator", None):
        changes["generator"] = parts[GENERATOR]
    return dataclasses.replace(model, **changes)


def _prefix(modality: str) -> str:
    """Of a tokenizer."""
    return f"{TOKENIZER}{modalities.MODALITIES[modality].tokens}."


def rules_of(module: nn.Module) -> list[rules.Rule]:
    """How one network's variables and the reference's state dict correspond."""
    c = module.config
    if isinstance(module, Tokenizer):
        return tokenizers.rules(c)
    if isinstance(module, networks.Backbone):
        return transformer.backbone_rules(c)
    return transformer.rules(c.encoder, c.decoder, dim=c.dim, gated_mlp=c.gated_mlp, use_bias=c.use_bias)


def may_lack(module: nn.Module, path: str) -> bool:
    """Whether a source may lack a leaf, which is then fresh: what TerraMind does not have, and positions of another image size."""
    if isinstance(module, Tokenizer):
        return False
    c, (_, group, *rest) = module.config, path.split("/")
    is_new = bool(rest) and group in ("mod_emb", "patch_proj", "encoder_pos_emb") and rest[-1] not in modalities.STREAMS
    return (
        is_new or group in (backbone.REGISTER_TOKENS, "missing_mod_token") or ("pos_emb" in group and c.image_size != modalities.IMAGE_SIZE)
    )


def complete(module: nn.Module, found: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """`found`, part of a network's variables, with what is missing fresh from `key`; only that is computed."""
    there = rules.flatten(found)
    missing = [path for path in rules.flatten(build.abstract(module)) if path not in there]
    if not missing:
        return rules.unflatten(there)

    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        variables = rules.flatten(meta.unbox(build.init(module, key)))
        return {path: variables[path] for path in missing}

    return rules.unflatten(there | jax.jit(fresh)(key))


def _on_device(variables: Variables) -> dict[str, Any]:
    return jax.tree.map(jax.numpy.asarray, dict(variables))


# ---- sources: where the variables of a network, by its prefix, come from ----


class Random:
    """Nothing: everything is fresh."""

    def holds(self, prefix: str) -> bool:
        return True

    def take(self, prefix: str, module: nn.Module) -> dict[str, Any]:
        return {}


class StateDict:
    """A state dict of the reference: of the whole pretraining model, or of the very model that is wanted."""

    def __init__(self, state: Mapping[str, np.ndarray], origin: str = "") -> None:
        self._state, self._origin = state, origin
        halves = sorted({str(x.dtype) for x in state.values() if x.dtype in rules.HALVES})
        if halves:
            warnings.warn(f"{origin or 'The state dict'} holds {' and '.join(halves)} weights; they become float32.", stacklevel=4)

    def holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self._state)

    def take(self, prefix: str, module: nn.Module) -> dict[str, Any]:
        """One network's variables, by the names with the prefix, or the plain ones of a pretraining model if there are none."""
        is_whole = not prefix and isinstance(module, networks.TerraMind)
        prefix = prefix if self.holds(prefix) else ""
        part = {key[len(prefix) :]: x for key, x in self._state.items() if key.startswith(prefix)}
        ignore = () if is_whole or isinstance(module, Tokenizer) else REST
        optional = partial(may_lack, module)
        try:
            return rules.from_torch(part, rules_of(module), build.abstract(module), optional=optional, ignore=ignore)
        except ValueError as error:
            raise ValueError(f"{self._origin}: {error}" if self._origin else str(error)) from None


class Tree:
    """Variables of ours by prefix; a network takes by name what it has."""

    def __init__(self, arrays: Mapping[str, Variables], origin: str | os.PathLike) -> None:
        self._arrays, self._origin = arrays, origin

    def holds(self, prefix: str) -> bool:
        return prefix in self._arrays

    def take(self, prefix: str, module: nn.Module) -> dict[str, Any]:
        there = rules.flatten(self._arrays[prefix if prefix in self._arrays else next(iter(self._arrays))])
        found, problems = {}, []
        for path, leaf in rules.flatten(build.abstract(module)).items():
            if path in there and there[path].shape == leaf.shape:
                found[path] = there[path]
            elif not may_lack(module, path):
                problems.append(
                    f"{path} is {list(there[path].shape)}, expected {list(leaf.shape)}" if path in there else f"{path} is missing"
                )
        if problems:
            more = f", and {len(problems) - rules.SHOWN} more" if len(problems) > rules.SHOWN else ""
            raise ValueError(f"{self._origin} does not fit this model: {', '.join(problems[: rules.SHOWN])}{more}.")
        return rules.unflatten(found)


Source = Random | StateDict | Tree


def open_source(weights: str | os.PathLike, entry: zoo.Entry) -> Source:
    """What `weights` of `load` means."""
    if weights == "random":
        return Random()
    if weights == "hub":
        return StateDict(hub.weights(entry), f"{entry.repository}/{entry.file}")
    path = Path(weights)
    return Tree(read_directory(path), path) if path.is_dir() else StateDict(files.read(path), str(path))


def read_directory(path: Path) -> dict[str, Variables]:
    """Variables by prefix from a directory of `save` or the work directory of a training."""
    if (path / INFO).is_file():
        import orbax.checkpoint as ocp

        checkpointer = ocp.PyTreeCheckpointer()
        known = checkpointer.metadata((path / ARRAYS).absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known)
        arrays = checkpointer.restore((path / ARRAYS).absolute(), restore_args=as_numpy)
        return {"" if prefix == MAIN else prefix: variables for prefix, variables in arrays.items()}
    return {"": _read_workdir(path)[1]}


def _read_workdir(path: Path) -> tuple[nn.Module, Variables]:
    """Network and variables of a training's work directory, of either kind."""
    from terramind_jax import config
    from terramind_jax.train import pretrain, tokenizer

    is_tokenizer = "modality" in config.of_workdir(path).model
    return (tokenizer if is_tokenizer else pretrain).load(path)[:2]


def open_tokenizer(words: str | os.PathLike, module: Tokenizer, version: str) -> tuple[Tokenizer, Source]:
    """One modality's tokenizer from the hub, at random, or from a folder that holds or lies beside it. A trained one has its own sizes."""
    modality = module.config.modality
    if words in ("hub", "random"):
        return module, open_source(words, zoo.tokenizer(modality, version))
    path = find_tokenizer(Path(words), modality, version)
    if (path / "config.json").is_file():
        module, variables = _read_workdir(path)
        return module, Tree({"": variables}, path)
    return module, open_source(path, zoo.tokenizer(modality, version))


def find_tokenizer(near: Path, modality: str, version: str) -> Path:
    """The tokenizer of one modality in a folder, its ``tokenizers``, or beside it; by the modality's name or the published file's."""
    here = near if near.is_dir() else near.parent
    stems = (modality, Path(zoo.tokenizer(modality, version).file).stem)
    for folder in (here, here / "tokenizers", here.resolve().parent / "tokenizers"):
        for stem in stems:
            for path in (folder / stem, *(folder / f"{stem}{suffix}" for suffix in (files.SAFETENSORS, *files.TORCH_SUFFIXES))):
                if path.exists():
                    return path
    raise FileNotFoundError(f"There is no tokenizer of {modality} in {near} or beside it; say where with tokenizers=, such as 'hub'.")
