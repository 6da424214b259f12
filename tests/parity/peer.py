"""The reference, TerraTorch, as the parity tests and benchmarks use it: models by name, random weights, arrays in and out.

Images are ``[B, C, H, W]`` over there; `nchw` and `nhwc` turn them round. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
from flax.core import meta
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from terramind_jax import coordinates, zoo
from terramind_jax import model as networks
from terramind_jax.convert import rules, transformer
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS, IMAGE_SIZE, Stream
from terramind_jax.tokenizer import TokenizerConfig
from terramind_jax.tokenizer.unet import has_attention


def _import_torchvision() -> None:
    """Imports it also where its wheel was built for another device than PyTorch's, so that its compiled operators do not load.

    The import fails at the first operator that is not there. TerraMind uses none, so declaring them is enough.
    """
    with contextlib.suppress(RuntimeError):
        import torchvision  # noqa: F401

        return
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    source = pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
    for name in set(re.findall(r"torchvision::(\w+)", source)) | set(re.findall(r"register_meta\(\"(\w+)\"\)", source)):
        with contextlib.suppress(RuntimeError):  # declared already
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _import_torchvision()
    from terratorch.models.backbones.terramind.model import terramind_register as register
    from terratorch.models.backbones.terramind.model.modality_info import MODALITY_INFO
    from terratorch.models.backbones.terramind.model.terramind import TerraMind
    from terratorch.models.backbones.terramind.model.tm_utils import LayerNorm
    from terratorch.models.backbones.terramind.tokenizer import vqvae
    from terratorch.models.backbones.terramind.tokenizer.models import vit_models
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY, TERRATORCH_FULL_MODEL_REGISTRY

# Importing TerraTorch sets "medium" (its models/backbones/clay_v15/model.py): bfloat16 in float32 products where the processor has AMX.
torch.set_float32_matmul_precision("highest")
logging.getLogger("terramind").setLevel(logging.ERROR)  # it reports every weight that is not pretrained

# ---- models ----


def encdec(
    size: str, encoder: tuple[Stream, ...] = ENCODER_STREAMS, decoder: tuple[Stream, ...] = DECODER_STREAMS, seed: int | None = 0, **changes
) -> TerraMind:
    """The pretraining model of `size` with these streams; `changes` replace fields of `zoo.SIZES`, such as ``encoder_depth=2``.

    Built from the class: the registered ``_encdec`` builders of 1.2.11 pass an argument that it refuses. `seed` is `build`'s.
    """
    sizes = {**zoo.SIZES[size], **changes}
    dim, bias = sizes["dim"], sizes["use_bias"]

    def embeddings(streams: tuple[Stream, ...], kind: str) -> dict[str, torch.nn.Module]:
        return {s.key: MODALITY_INFO[s.key][kind](image_size=IMAGE_SIZE, dim_tokens=dim, **MODALITY_INFO[s.key]) for s in streams}

    def make() -> TerraMind:
        return TerraMind(
            **{k: sizes[k] for k in ("dim", "encoder_depth", "decoder_depth", "num_heads", "gated_mlp")},
            mlp_ratio=4,
            qkv_bias=bias,
            proj_bias=bias,
            mlp_bias=bias,
            norm_layer=partial(LayerNorm, eps=1e-6, bias=False),
            act_layer=torch.nn.SiLU if sizes["gated_mlp"] else torch.nn.GELU,
            encoder_embeddings=embeddings(encoder, "encoder_embedding"),
            decoder_embeddings=embeddings(decoder, "decoder_embedding"),
            modality_info=MODALITY_INFO,
        )

    return _made(make, seed)


def build(
    name: str,
    *,
    backbone: bool = False,
    tokenizers: Mapping[str, Callable[..., torch.nn.Module]] | None = None,
    seed: int | None = 0,
    **options: Any,
) -> torch.nn.Module:
    """A registered model in evaluation mode: ``terramind_v1_tiny``, ``..._tim``, ``..._generate``, ``terramind_v1_tokenizer_s2l2a``.

    Args:
      backbone: take the backbone of that name (of tokenizers: encoder and quantizer only) although a full model has it, too.
      tokenizers: what the model finds in place of the released tokenizers, by stream: functions that return a module. None: those.
      seed: of `randomize`; None keeps the reference's own initialisation.
      **options: the reference's.
    """
    registry = TERRATORCH_FULL_MODEL_REGISTRY if not backbone and name in TERRATORCH_FULL_MODEL_REGISTRY else TERRATORCH_BACKBONE_REGISTRY
    known = register.tokenizer_dict["v01" if "_v01_" in name else "v1"]
    replaced = contextlib.nullcontext() if tokenizers is None else mock.patch.dict(known, tokenizers, clear=True)
    with replaced, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _made(lambda: registry.build(name, pretrained=False, **options), seed)


def tokenizer(config: TokenizerConfig, seed: int | None = 0, **options: Any) -> torch.nn.Module:
    """The reference's DiVAE or VQVAE of any sizes: its own have names, of which these are put beside them while it is built.

    `seed` is `build`'s; `options` are of the class, such as ``thresholding=False``, which lifts the clip of a DiVAE.
    """
    vit = dict(dim_tokens=config.dim, depth=config.depth, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio)
    levels = range(len(config.channel_mult))
    sizes = {name: getattr(config, name) for name in ("model_channels", "num_res_blocks", "channel_mult")}
    sizes |= {"patch_size": config.decoder_patch_size, "attention_resolutions": [2**i for i in levels if has_attention(config, i)]}
    presets = {
        "vit_own_enc": (vqvae.vit_models, lambda **given: vit_models.ViTEncoder(**{**given, **vit})),
        "vit_own_dec": (vqvae.vit_models, lambda **given: vit_models.ViTDecoder(**{**given, **vit})),
        "unet_own": (vqvae.unet, lambda **given: vqvae.unet.PatchedUNetCondCat(**{**given, **sizes})),
    }
    kind, decoder = (vqvae.DiVAE, "unet_own") if config.decoder == "unet" else (vqvae.VQVAE, "vit_own_dec")
    codes = dict(quant_type="fsq", codebook_size="-".join(map(str, config.levels)), latent_dim=config.latent_dim)
    networks = dict(enc_type="vit_own_enc", dec_type=decoder, post_mlp=True, patch_size=config.patch_size)
    with contextlib.ExitStack() as stack:
        for name, (module, make) in presets.items():
            stack.enter_context(mock.patch.object(module, name, make, create=True))
        return _made(lambda: kind(image_size=config.image_size, n_channels=config.channels, **networks, **codes, **options), seed)


def _made(make: Callable[[], torch.nn.Module], seed: int | None) -> torch.nn.Module:
    with contextlib.nullcontext() if seed is None else _no_initialisation():
        model = make().eval()
    if seed is not None:
        randomize(model, seed)
    return model


@contextlib.contextmanager
def _no_initialisation() -> Iterator[None]:
    """Leaves memory as it comes where PyTorch would draw initial values: most of the time of building a model."""
    with contextlib.ExitStack() as stack:
        for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "normal_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor))
        yield


class PassTokens(torch.nn.Module):
    """Stands for an image tokenizer, so that generation can be compared token by token: its image of a token is that token's id."""

    patch_size = 16

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def encode(self, x: torch.Tensor, device: Any) -> tuple[torch.Tensor]:
        return (x[:, 0, ::16, ::16].long(),)

    def decode_tokens(self, tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        return tokens


def coords_tokenizer(path: pathlib.Path) -> Callable[..., torch.nn.Module]:
    """The reference's coordinate tokenizer with a vocabulary file that is written to `path`: published as the rule has it (spec 7.1)."""
    words = coordinates.vocabulary()
    _write_vocabulary(path, words, added=words)
    return lambda **_: register.terramind_v1_coords_tokenizer(pretrained=False, tokenizer_file=str(path))


SENTINELS = {f"[S_{i}]": coordinates.SENTINEL + i for i in range(200)}
WORDS = {word: 300 + i for i, word in enumerate(("a", "river", "with", "field", "##s", "and", "sea", ".", ",", "the", "city", "!"))}


def caption_tokenizer(path: pathlib.Path) -> Callable[..., torch.nn.Module]:
    """The reference's caption tokenizer with a vocabulary file that is written to `path`: the special tokens and `WORDS`."""
    specials = coordinates.SPECIALS | SENTINELS
    _write_vocabulary(path, specials | WORDS, added=specials)
    return lambda **_: register.terramind_v01_caption_tokenizer(pretrained=False, tokenizer_file=str(path))


def _write_vocabulary(path: pathlib.Path, words: dict[str, int], added: Mapping[str, int]) -> None:
    """`added` are never split; those in brackets are special."""
    vocabulary = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    vocabulary.normalizer, vocabulary.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    vocabulary.decoder = decoders.WordPiece()
    vocabulary.add_tokens([AddedToken(text, normalized=False, special=text.startswith("[")) for text in added])
    vocabulary.save(str(path))


# ---- weights ----


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter, and every buffer that a file could hold another value for, random values of the scale of trained ones.

    Norms are 1 +- 0.1, biases 0.02 (those that are buffers, too), embeddings 0.05, matrices 1 / sqrt(fan in), also where the reference
    starts from zeros. Positions stay; tied tensors are drawn once. Uniform numbers: normal ones take five times as long.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for module in model.modules():
        buffers = {k: v for k, v in module.named_buffers(recurse=False) if k == "bias"}
        for name, tensor in {**dict(module.named_parameters(recurse=False)), **buffers}.items():
            if id(tensor) not in seen and not name.endswith("pos_emb"):
                centre, spread = _scale(module, name, tensor)
                tensor.uniform_(centre - spread * math.sqrt(3), centre + spread * math.sqrt(3), generator=generator)
            seen.add(id(tensor))


def _scale(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation that fit one parameter."""
    if name.endswith("bias"):
        return 0.0, 0.02
    if "Norm" in type(module).__name__:
        return 1.0, 0.1
    if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
        return 0.0, tensor[0].numel() ** -0.5
    return 0.0, 0.05  # token tables, modality embeddings, mask and register tokens


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays, which share the model's memory; tied tensors appear under each of their names."""
    return {key: value.numpy() for key, value in model.state_dict().items()}


def load_state(model: torch.nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Strictly loads what `numpy_state` or `terramind_jax.to_torch` gives."""
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, strict=True)


def converted(
    model: torch.nn.Module,
    size: str,
    encoder: tuple[Stream, ...] = ENCODER_STREAMS,
    decoder: tuple[Stream, ...] = DECODER_STREAMS,
    prefix: str = "",
    **changes: Any,
) -> tuple[networks.TerraMind, dict[str, Any], list[rules.Rule]]:
    """Our module and variables of a pretraining model that the reference holds under `prefix`, and the rules between the two."""
    sizes = {**zoo.SIZES[size], **changes}
    module = networks.TerraMind(networks.TransformerConfig(**sizes, encoder=encoder, decoder=decoder))
    named = {k: sizes[k] for k in ("dim", "gated_mlp", "use_bias")}
    table = transformer.rules(encoder, decoder, **named)
    found = {key.removeprefix(prefix): value for key, value in numpy_state(model).items() if key.startswith(prefix)}
    state = {key: value.copy() for key, value in found.items()}  # the model may be trained
    abstract = meta.unbox(jax.eval_shape(partial(networks.init, module), jax.random.key(0)))
    return module, rules.from_torch(state, table, abstract), table


def tensors(tree: Any) -> Any:
    """Arrays in nested dicts and lists -> tensors."""
    if isinstance(tree, Mapping):
        return {key: tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [tensors(value) for value in tree]
    return torch.from_numpy(np.array(tree))


# ---- arrays ----


def nchw(x: Any) -> torch.Tensor:
    """``[B, H, W, C]`` array -> ``[B, C, H, W]`` tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """``[B, C, H, W]`` tensor -> ``[B, H, W, C]`` array."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def array(x: Any) -> np.ndarray:
    """A tensor or array as a NumPy array."""
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the standard deviation of `theirs`; shapes must agree. NaN anywhere gives NaN."""
    ours, theirs = array(ours).astype(np.float64), array(theirs).astype(np.float64)
    assert ours.shape == theirs.shape, f"ours {ours.shape}, theirs {theirs.shape}"
    error = float(np.abs(ours - theirs).max() / theirs.std())
    print(f"error {error:.1e} of std")  # pytest -s
    return error


def difference(ours: Any, theirs: Any) -> float:
    """Largest relative difference of numbers, such as losses."""
    worst = float(np.abs(np.asarray(ours, np.float64) / np.asarray(theirs, np.float64) - 1).max())
    print(f"relative difference {worst:.1e}")
    return worst
