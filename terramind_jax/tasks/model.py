"""A backbone with a decoder on it, and which of its parameters are trained."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from terramind_jax import tim
from terramind_jax.modalities import PATCH_SIZE
from terramind_jax.model import Backbone, BackboneConfig, temporal
from terramind_jax.model.layers import uniform
from terramind_jax.tasks import decoders, layers
from terramind_jax.tasks.beside import NOTHING, Beside
from terramind_jax.tasks.decoders import DecoderConfig
from terramind_jax.tasks.temporal import LTAE

Variables = Mapping[str, Any]
EMBEDDINGS = tuple(name for group, name in tim.SHARED if group == "params")
SERIES = ("concat", "diff", "ltae")  # of the ways to pool over time, those that no single image has
ADAPTED = ("attn/qkv/kernel", "attn/proj/kernel")  # what LoRA adds to, of each layer of the encoder


class TaskModel(nn.Module):
    """Variables are ``{"params", "buffers", "batch_stats"}``, of the parts `encoder`, `neck`, `decoder`, `head` and `over_time`."""

    backbone: BackboneConfig
    config: DecoderConfig
    streams: tuple[tuple[str, str], ...]  # (user name, stream) of the inputs, in order; then of what is generated, (stream, stream)
    time: str = "mean"  # how the features of a time series become those of one image
    times: int = 1  # images of a series, for ``concat``, which makes features as many times as wide

    def setup(self) -> None:
        c = self.config
        self.encoder = Backbone(self.backbone)
        self.neck = decoders.Pyramid(c.dtype, c.is_pangaea) if c.pyramid else None
        self.decoder, self.head = decoders.decoder(c), decoders.head(c)
        self.over_time = LTAE(dtype=c.dtype) if self.time == "ltae" else None

    def __call__(self, inputs: Mapping[str, jax.Array], train: bool = False, days: jax.Array | None = None) -> jax.Array:
        """Standardised ``[B, H, W, C]`` or ``[B, T, H, W, C]`` by user name -> float32 ``[B, H, W, outputs]``, of labels ``[B, outputs]``.

        What enters as tokens is ids ``[B, (T,) h, w]`` (`beside`). A regression of one variable has no last axis. `days` ``[B, T]`` are
        those of a time series.
        """
        return self.decode(self.features(inputs, train), self._shape(inputs)[-2:], train, days)

    def features(self, inputs: Mapping[str, jax.Array], train: bool = False) -> list[jax.Array]:
        """What the backbone makes of them: ``[B, N, D]`` of each of the layers that the decoder reads, for L-TAE ``[B, T, N, D]``."""
        ordered = collections.OrderedDict((stream, inputs[name]) for name, stream in self.streams if name in inputs)
        encode = lambda x: [every[i] for every in [self.encoder(x, train=train)] for i in self.config.layers]  # noqa: E731
        first, shape = next(iter(ordered.values())), self._shape(inputs)
        if len(shape) == 3:
            if self.time in SERIES:
                raise ValueError(
                    f"With time={self.time!r} a model reads time series, [B, T, H, W, C]; its input has the shape {first.shape}."
                )
            return encode(ordered)
        if self.time == "concat" and shape[1] != self.times:
            raise ValueError(f"The model joins the features of {self.times} images, and its input is a series of {shape[1]}.")
        return temporal.over_time(encode, ordered, "keep" if self.time == "ltae" else self.time)

    def _shape(self, inputs: Mapping[str, jax.Array]) -> tuple[int, ...]:
        """``(B, (T,) H, W)`` of the images, of which ids have one for each patch."""
        name, key = next((name, key) for name, key in self.streams if name in inputs)
        x, stream = inputs[name], next(stream for stream in self.backbone.streams if stream.key == key)
        if stream.kind == "pixels":
            return x.shape[:-1]
        *lead, h, w = x.shape[: x.ndim - len(stream.codes)]
        return (*lead, h * PATCH_SIZE, w * PATCH_SIZE)

    def decode(
        self,
        features: Sequence[jax.Array],
        size: Sequence[int] | None = None,
        train: bool = False,
        days: jax.Array | None = None,
    ) -> jax.Array:
        """Features to outputs, of maps at `size`; None: a square of whole patches."""
        if features[0].ndim == 4:
            features = [self.over_time(x, days, train) for x in features]
        size = (math.isqrt(features[0].shape[1]) * PATCH_SIZE,) * 2 if size is None else size
        x = [decoders.to_image(f, [n // PATCH_SIZE for n in size]) for f in features]
        x = self.neck(x, train) if self.neck is not None else x
        x = self.decoder(x, train)
        x = self.head(x, train) if self.head is not None else x
        x = layers.resize(x, size).astype(jnp.float32) if self.config.is_pixelwise else x
        return x[..., 0] if "regression" in self.config.task and self.config.num_outputs == 1 else x

    def everything(self) -> jax.Array:
        """Touches every parameter once: what `init` runs."""
        self.encoder.everything()
        width = self.backbone.out_channels[0] * (self.times if self.time == "concat" else 1)
        time = () if self.over_time is None else (2,)
        return self.decode([jnp.zeros((1, *time, 16, width))] * len(self.config.layers))


def outputs(module: TaskModel, variables: Variables, batch: Mapping[str, Any], **options: Any) -> Any:
    """`TaskModel.__call__` of a batch with ``inputs``, or from the ``features`` that the backbone has made of them (`caching`)."""
    if "features" in batch:
        return module.apply(variables, batch["features"], days=batch.get("days"), method="decode", **options)
    return module.apply(variables, batch["inputs"], days=batch.get("days"), **options)


# ---- which parameters are trained ----


def init(module: TaskModel, key: jax.Array, tune: str = "full", rank: int = 0, beside: Beside = NOTHING) -> dict[str, Any]:
    """Fresh variables, the encoder's boxed, parted as `part` does; with ``lora`` the products of rank `rank` are zero.

    Those of the networks `beside` the encoder are in ``buffers``; if they share its embeddings, these are not trained.
    """
    variables = module.init(key, method="everything")
    if tune == "lora":
        adapted = init_lora(jax.random.fold_in(key, 1), nn.meta.unbox(variables["params"]["encoder"]), rank)
        variables = {**variables, "params": {**variables["params"], "lora": adapted}}
    parted = part(variables, tune, beside.keeps_embeddings)
    encoder = {group: variables[group]["encoder"] for group in ("params", "buffers")}
    parted["buffers"] |= beside.init(jax.random.fold_in(key, 2), encoder)
    return parted


def part(variables: Variables, tune: str, keeps_embeddings: bool = False) -> dict[str, Any]:
    """``params`` that are trained; what is not is in ``buffers``, as ``frozen`` and ``buffers``.

    `keeps_embeddings`: the encoder's are never trained.
    """
    params = dict(variables["params"])
    encoder = dict(params.pop("encoder"))
    held = {name for name in encoder if tune != "full" or keeps_embeddings and name in EMBEDDINGS}
    frozen, trained = ({name: x for name, x in encoder.items() if (name in held) == is_held} for is_held in (True, False))
    params |= {"encoder": trained} if trained else {}
    own = {name: variables[name] for name in ("batch_stats",) if name in variables}
    return {"params": params, "buffers": {"frozen": {"encoder": frozen} if frozen else {}, "buffers": variables["buffers"]}, **own}


def with_encoder(parted: Variables, params: Variables) -> Variables:
    """Parted variables with other parameters of the encoder."""
    for tree in (parted["params"], parted["buffers"]["frozen"]):
        if "encoder" in tree:
            tree["encoder"] = {name: params[name] for name in tree["encoder"]}
    return parted


def join(params: Variables, held: Variables, batch_stats: Variables | None, alpha: float = 1.0) -> dict[str, Any]:
    """The module's own variables from parted ones; products of LoRA are added to the kernels that they belong to."""
    params = {**params, "encoder": {**params.get("encoder", {}), **held["frozen"].get("encoder", {})}}
    if "lora" in params:
        params["encoder"] = add_lora(params["encoder"], params.pop("lora"), alpha)
    return {"params": params, "buffers": held["buffers"], "batch_stats": batch_stats or {}}


# ---- LoRA (arXiv 2106.09685) ----


def init_lora(key: jax.Array, encoder: Variables, rank: int) -> dict[str, dict[str, jax.Array]]:
    """Two factors for each of `ADAPTED`, stacked over layers: ``down`` ``[L, inputs, rank]`` and ``up`` ``[L, rank, outputs]``, zero."""
    found = {}
    for i, name in enumerate(ADAPTED):
        depth, inputs, outputs = _matrix(name, _leaf(encoder, name).shape)
        down = uniform(inputs**-0.5)(jax.random.fold_in(key, i), (depth, inputs, rank))
        found[name.replace("/", "_")] = {"down": down, "up": jnp.zeros((depth, rank, outputs))}
    return found


def add_lora(encoder: Variables, factors: Variables, alpha: float) -> dict[str, Any]:
    """The encoder's parameters with ``alpha / rank`` times the products."""
    encoder = jax.tree.map(lambda x: x, dict(encoder))
    for name in ADAPTED:
        kernel, (down, up) = _leaf(encoder, name), (factors[name.replace("/", "_")][key] for key in ("down", "up"))
        product = jnp.einsum("lir,lro->lio", down, up, precision="highest") * (alpha / down.shape[-1])
        _leaf(encoder, name.removesuffix("/kernel"))["kernel"] = kernel + product.reshape(kernel.shape)
    return encoder


def _leaf(encoder: Variables, name: str) -> Any:
    node = encoder["encoder"]
    for key in name.split("/"):
        node = node[key]
    return node


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Layers, inputs and outputs of a stacked kernel ``[L, *inputs, *outputs]``."""
    inputs = 2 if "/proj/" in name else 1
    return shape[0], math.prod(shape[1 : 1 + inputs]), math.prod(shape[1 + inputs :])


# ---- learning rates ----


def rates(params: Variables, depth: int, decay: float) -> Any:
    """Factors of the learning rate: 1 of what stands on the backbone and of its norm, `decay` of its last layer, and so on down.

    Of the embeddings ``decay ** (depth + 1)``. Leaves of stacked layers have ``[L, 1, ...]``.
    """

    def factor(path: tuple, x: jax.Array) -> Any:
        names = [str(getattr(key, "key", key)) for key in path]
        if names[0] == "lora" or names[:2] == ["encoder", "encoder"]:
            return (decay ** jnp.arange(depth, 0, -1, dtype=jnp.float32)).reshape(depth, *(1,) * (x.ndim - 1))
        return decay ** (depth + 1) if names[0] == "encoder" and names[1] != "encoder_norm" else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)
