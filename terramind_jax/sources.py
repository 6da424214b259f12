"""Where weights come from: the hub, a file, a directory of ours, or nowhere; each gives a network its variables by prefix.

A prefix is a network's in the reference's state dict (spec 10.3); the main network of most models has none.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from terramind_jax import build, declarations, hub, modalities, zoo
from terramind_jax import model as networks
from terramind_jax.convert import files, rules, tokenizers, transformer
from terramind_jax.model import backbone
from terramind_jax.models import Variables
from terramind_jax.tokenizer import Tokenizer, TokenizerConfig

GENERATOR, TOKENIZER = "sampler.model.", "tokenizer."
INFO, ARRAYS = "model.json", "arrays"  # what a directory of `save` holds
MAIN, TOKENIZERS = "main", "tokenizers"  # in it, the name of an empty prefix, and of the tokenizers' configurations
MODALITIES = "modalities"  # in it, and in the configuration of a work directory: declarations of a user's own

# What a feature extractor or a generator leaves in a file of the whole model: the rest of it, and modalities that it was not built with.
REST = (
    "mask_token",
    "decoder.*",
    "decoder_*",
    *(f"encoder_embeddings.{key}.*" for key in modalities.STREAMS),
    GENERATOR + "*",
    TOKENIZER + "*",
)


# One leaf a stream: those of a modality that TerraMind does not have are fresh.
EMBEDDINGS = ("mod_emb", "patch_proj", "encoder_pos_emb", "encoder_token_emb", "decoder_pos_emb", "decoder_token_emb")
CODEBOOKS = ("encoder_codebook_emb", "decoder_codebook_head")  # of streams with several, which no released model has


class Random:
    """Nothing: everything is fresh."""

    def holds(self, prefix: str) -> bool:
        return True

    def network(self, prefix: str, module: nn.Module) -> nn.Module:
        return module

    def holds_all_bands(self, stream: str, wanted: Sequence[str]) -> bool:
        return False

    def take(self, prefix: str, module: nn.Module, *, part: bool = False) -> dict[str, Any]:
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

    def network(self, prefix: str, module: nn.Module) -> nn.Module:
        return module

    def holds_all_bands(self, stream: str, wanted: Sequence[str]) -> bool:
        """Whether a pixel stream has all bands of its modality: in a pretraining model, or where their number is not the wanted one."""
        name, known = f"encoder_embeddings.{stream}.proj.weight", backbone.known_bands(stream)
        if "mask_token" in self._state or name not in self._state:
            return "mask_token" in self._state
        if len(wanted) == len(known) and tuple(wanted) != known:
            raise ValueError(f"{self._origin} does not tell the order of its bands; load it without `bands` and order the channels.")
        return self._state[name].shape[1] != len(wanted) * modalities.PATCH_SIZE**2

    def take(self, prefix: str, module: nn.Module, *, part: bool = False) -> dict[str, Any]:
        """One network's variables, by the names with the prefix, or the plain ones of a pretraining model if there are none.

        `part`: a pretraining model need not use all of them.
        """
        is_whole = not prefix and isinstance(module, networks.TerraMind) and not part
        prefix = prefix if self.holds(prefix) else ""
        part = {key[len(prefix) :]: x for key, x in self._state.items() if key.startswith(prefix)}
        ignore = () if is_whole or isinstance(module, Tokenizer) else REST
        lenient = dict(optional=partial(may_lack, module), resizable=partial(may_differ, module), ignore=ignore)
        try:
            return rules.from_torch(part, rules_of(module), build.abstract(module), **lenient)
        except ValueError as error:
            raise ValueError(f"{self._origin}: {error}" if self._origin else str(error)) from None


class Tree:
    """Variables of ours by prefix; a network takes by name what it has. `tokenizers` among them may have sizes of their own."""

    def __init__(self, directory: Directory, origin: str | os.PathLike) -> None:
        self._directory, self._origin = directory, origin

    def network(self, prefix: str, module: nn.Module) -> nn.Module:
        """The network that the weights of a prefix belong to, in place of the released one."""
        if prefix not in self._directory.tokenizers or not isinstance(module, Tokenizer):
            return module
        own, released = self._directory.tokenizers[prefix].config, module.config
        if own.modality != released.modality:
            raise ValueError(f"{self._origin} holds a tokenizer of {own.modality}, not of {released.modality}.")
        return Tokenizer(dataclasses.replace(own, dtype=released.dtype, unroll=released.unroll))

    def holds(self, prefix: str) -> bool:
        return prefix in self._directory.arrays

    def holds_all_bands(self, stream: str, wanted: Sequence[str]) -> bool:
        """Whether a pixel stream has all bands of its modality, and not the wanted ones."""
        bands = {modalities.input_stream(name).key: list(own) for name, own in (self._directory.options.get("bands") or {}).items()}
        return bands.get(stream) != list(wanted)

    def take(self, prefix: str, module: nn.Module, *, part: bool = False) -> dict[str, Any]:
        arrays = self._directory.arrays
        there, wanted = rules.flatten(arrays[prefix if prefix in arrays else next(iter(arrays))]), rules.flatten(build.abstract(module))
        is_whole = isinstance(module, Tokenizer) or not prefix and isinstance(module, networks.TerraMind) and not part
        problems = [f"{path} is unexpected" for path in there if path not in wanted] if is_whole else []
        found = {}
        for path, leaf in wanted.items():
            x = there.get(path)
            if x is not None and x.shape == leaf.shape and jax.numpy.issubdtype(x.dtype, np.floating):
                found[path] = x.astype(np.float32, copy=False)
            elif not (may_lack if x is None else may_differ)(module, path):
                problems.append(f"{path} is missing" if x is None else f"{path} is {x.dtype} {[*x.shape]}, expected {[*leaf.shape]}")
        if problems:
            more = f", and {len(problems) - rules.SHOWN} more" if len(problems) > rules.SHOWN else ""
            raise ValueError(f"{self._origin} does not fit this model: {', '.join(problems[: rules.SHOWN])}{more}.")
        return rules.unflatten(found)


Source = Random | StateDict | Tree


# ---- how a network's variables and the reference's state dict correspond ----


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
    _, group, *rest = path.split("/")
    is_new = bool(rest) and group in EMBEDDINGS and rest[-1] not in modalities.RELEASED_STREAMS
    return is_new or group in (*CODEBOOKS, backbone.REGISTER_TOKENS, backbone.MISSING_TOKEN) or may_differ(module, path)


def may_differ(module: nn.Module, path: str) -> bool:
    """Whether a source may have a leaf in another shape, which is then fresh: positions, of another image size."""
    return "pos_emb" in path and not isinstance(module, Tokenizer) and module.config.image_size != modalities.IMAGE_SIZE


# ---- finding and opening ----


def within(path: str | os.PathLike, entry: zoo.Entry) -> str | os.PathLike:
    """The work directory of a model in a folder of the quickstart, ``model`` or ``tokenizers/MODALITY``; any other path as it is."""
    inner = Path(path) / ("model" if entry.kind != "tokenizer" else f"tokenizers/{entry.modality}")
    is_quickstart = (inner / "config.json").is_file() and not (Path(path) / "config.json").is_file()
    return inner if is_quickstart else path


def open_source(weights: str | os.PathLike, entry: zoo.Entry | None, revision: str | None = None) -> Source:
    """What `weights` and `revision` of `load` mean; `entry` is the released model, None where there is none."""
    if revision is not None and weights != "hub":
        raise ValueError(f"The revision {revision!r} is one of the hub, but the weights come from {os.fspath(weights)!r}.")
    if weights == "random":
        return Random()
    if weights == "hub" and entry is None:
        raise FileNotFoundError("The hub has no tokenizer of a modality of your own; give the folder of yours.")
    if weights == "hub":
        return StateDict(hub.weights(entry, revision=revision), f"{entry.repository}/{entry.file}")
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"The weights are {weights!r}; expected 'hub', 'random', or the path of a file or directory.")
    path = Path(weights)
    if not path.exists():
        raise FileNotFoundError(f"There are no weights {path}; expected 'hub', 'random', or the path of a file or directory.")
    return Tree(read_directory(path), path) if path.is_dir() else StateDict(files.read(path), str(path))


def open_tokenizer(words: str | os.PathLike, modality: str, version: str, *, optional: bool = False) -> Source:
    """One modality's tokenizer from the hub, at random, or from a folder that holds or lies beside it.

    One that only decodes what Thinking in Modalities generates is `optional`: random, with a warning, where it is missing.
    """
    try:
        path = words if words in ("hub", "random") else find_tokenizer(Path(words), modality, version)
        return open_source(path, zoo.tokenizer(modality, version) if modality in modalities.RELEASED else None)
    except FileNotFoundError:
        if not optional:
            raise
        warnings.warn(f"There is no tokenizer of {modality} near {words}; it is random, and only decoding needs it.", stacklevel=4)
        return Random()


def find_tokenizer(near: Path, modality: str, version: str) -> Path:
    """The tokenizer of one modality in a folder, its ``tokenizers``, or beside it; by the modality's name or the published file's."""
    stems = (modality, Path(zoo.tokenizer(modality, version).file).stem) if modality in modalities.RELEASED else (modality,)
    for folder in _folders(near):
        for stem in stems:
            for path in (folder / stem, *(folder / f"{stem}{suffix}" for suffix in (files.SAFETENSORS, *files.TORCH_SUFFIXES))):
                if path.exists():
                    return path
    where = "(--tokenizers; finetune: --config.model.tokenizers; pretrain: --config.data.tokenizers)"
    raise FileNotFoundError(f"There is no tokenizer of {modality} in {near} or beside it; give tokenizers= {where}, such as 'hub'.")


def _folders(near: Path) -> tuple[Path, ...]:
    """Where tokenizers and vocabularies are looked for: in a folder, or that of a file, its ``tokenizers``, and beside it."""
    here = near if near.is_dir() else near.parent
    return here, here / "tokenizers", here.resolve().parent / "tokenizers"


def find_vocabulary(name: str, words: str | os.PathLike, *, fetch: bool = True) -> Path | None:
    """The published vocabulary of ``coords`` or ``caption``: the hub's, or ``{name}.json`` where tokenizers are looked for."""
    if words == "random":
        return None
    if words != "hub":
        return next((path for folder in _folders(Path(words)) if (path := folder / f"{name}.json").is_file()), None)
    try:
        return hub.vocabulary(name, fetch=fetch)
    except (ConnectionError, PermissionError) as error:
        warnings.warn(f"There is no vocabulary of {name}: {error}", stacklevel=4)
        return None


# ---- directories ----


@dataclasses.dataclass(frozen=True)
class Directory:
    """What a directory holds: variables and tokenizers by prefix, and the name and options of the model if it was saved as one."""

    arrays: dict[str, Variables]
    tokenizers: dict[str, Tokenizer]
    name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_directory(path: Path) -> Directory:
    """A directory of `weights.save` or the work directory of a training; a ValueError if it is damaged."""
    if not (path / INFO).is_file():
        module, variables = read_workdir(path)
        return Directory({"": variables}, {"": module} if isinstance(module, Tokenizer) else {})
    info = read_info(path)
    declare(path)
    try:
        arrays = _restore((path / ARRAYS).absolute())
        tokenizers = {_prefix_of(name): Tokenizer(TokenizerConfig(**fields)) for name, fields in info.get(TOKENIZERS, {}).items()}
    except Exception as error:  # Orbax and TensorStore raise whatever the damage leads to
        raise ValueError(f"{path} is no complete directory of weights ({type(error).__name__}); save or copy it again.") from error
    return Directory({_prefix_of(name): variables for name, variables in arrays.items()}, tokenizers, info["name"], info["options"])


def declare(path: Path) -> None:
    """Declares the modalities of a user's own that the model in a directory, of `weights.save` or of a training, has."""
    from terramind_jax import config

    settings = config.of_workdir(path) if (path / "config.json").is_file() else read_info(path)
    declarations.declare(settings.get(MODALITIES, {}), str(path))


def read_info(path: Path) -> dict[str, Any]:
    """Name and options of the model in a directory of `weights.save`; nothing of any other path."""
    if not (path / INFO).is_file():
        return {}
    try:
        info = json.loads((path / INFO).read_text())
        zoo.get(info["name"]), dict(info["options"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / INFO} does not describe a model ({error}).") from None
    return info


def _restore(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    known = ocp.PyTreeCheckpointer().metadata(folder).item_metadata.tree
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=largest(known))  # many at a time are in memory twice
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known)
    return ocp.Checkpointer(handler).restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _prefix_of(name: str) -> str:
    return "" if name == MAIN else name


def read_workdir(path: Path) -> tuple[nn.Module, Variables]:
    """Network and variables of a training's work directory, of either kind."""
    from terramind_jax import config
    from terramind_jax.train import pretrain, tokenizer

    command = config.command_of(config.of_workdir(path))
    if command == "finetune":
        raise ValueError(f"{path} is a fine-tuned model, which `terramind-jax predict` and tasks.finetune.load read.")
    return (tokenizer if command == "train-tokenizer" else pretrain).load(path)[:2]


def largest(arrays: Any) -> float:
    """GB that hold the largest of some arrays."""
    return max(math.prod(x.shape) * np.dtype(x.dtype).itemsize + 1 for x in jax.tree.leaves(arrays)) / 1e9
