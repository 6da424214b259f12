"""Tokens made in the training step: frozen tokenizers look at whole crops on the device, in the place of stored tokens.

The data pipeline (``DataConfig.online_tokens``) leaves the ids of token streams zero and sends the crops along; `jit` puts what fills
them in before the function, in the same program. The tokenizers' variables are no part of the state or the model's buffers: nothing trains,
checkpoints or donates them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from terramind_jax import sharding
from terramind_jax.data.groups import tokenized
from terramind_jax.data.index import Index
from terramind_jax.modalities import Stream
from terramind_jax.tokenizer import Tokenizer, encode_stored

Load = Callable[[str, str], tuple[Tokenizer, Any]]  # modality, where -> module and variables, as `weights.tokenizer` does
_ENCODER = ("encoder", "quant_proj")  # what of a tokenizer makes tokens


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """Encoders by modality; `variables` on every device of the mesh, once `placed`."""

    where: str
    modules: Mapping[str, Tokenizer]
    variables: Mapping[str, Any]

    def record(self, name: str) -> tuple[str, dict[str, int]]:
        """Where the tokenizer of a modality is, and its vocabulary as ``tokenizer.json`` tells it; nothing where there is none."""
        if name not in self.modules:
            return self.where, {}
        config = self.modules[name].config
        return f"{self.where}/{name}", {"codebook_size": config.codebook_size, "num_codebooks": config.num_codebooks}

    def placed(self, mesh: jax.sharding.Mesh) -> Tokenizers:
        where = sharding.replicated(mesh)
        place = partial(jax.make_array_from_callback, sharding=where)
        variables = jax.tree.map(lambda x: place(x.shape, data_callback=lambda index: x[index]), self.variables)
        return dataclasses.replace(self, variables=variables)


def load(config: ConfigDict, streams: Iterable[Stream], indexes: Iterable[Index | None], tokenizer: Load | None) -> Tokenizers | None:
    """The tokenizers in ``data.tokenizers`` of what the data have, loaded by `tokenizer`; None without ``data.online_tokens``.

    Raises FileNotFoundError if one is missing, ValueError if none is named.
    """
    if not config.data.online_tokens:
        return None
    if tokenizer is None:
        raise ValueError("data.online_tokens needs tokenizers; give `train` the function that loads them, weights.tokenizer.")
    if not config.data.tokenizers:
        raise ValueError("data.online_tokens makes tokens with tokenizers; name their folder, or hub, with --config.data.tokenizers=DIR.")
    streams = tuple(streams)
    names = sorted({name for index in indexes if index is not None for name in tokenized(streams, index)})
    found = {name: tokenizer(name, config.data.tokenizers) for name in names}
    modules = {name: module for name, (module, _) in found.items()}
    return Tokenizers(str(config.data.tokenizers), modules, {name: _encoder(v) for name, (_, v) in found.items()})


def _encoder(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Without the decoder, which would take memory for nothing."""
    kept = {kind: {part: tree for part, tree in some.items() if part in _ENCODER} for kind, some in variables.items()}
    return jax.tree.map(np.asarray, kept)


def jit(function: Callable[..., Any], tokenizers: Tokenizers | None, encoder: Sequence[Stream], decoder: Sequence[Stream], **options: Any):
    """`jax.jit` of a function whose last argument is a batch; with `tokenizers`, of one that first makes the batch's tokens."""
    if tokenizers is None:
        return jax.jit(function, **options)

    def filled(*arguments: Any) -> Any:
        *rest, batch, variables = arguments
        return function(*rest, fill(tokenizers.modules, encoder, decoder, variables, batch))

    compiled = jax.jit(filled, **options)

    def bound(*arguments: Any) -> Any:
        return compiled(*arguments, tokenizers.variables)

    bound._cache_size = compiled._cache_size  # by which the loop notices that a step was compiled twice
    return bound


def fill(
    modules: Mapping[str, Tokenizer],
    encoder: Sequence[Stream],
    decoder: Sequence[Stream],
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
) -> dict[str, Any]:
    """The batch with the ids of its token slots, made from its ``images`` ``[B, S, S, C]``, and without these."""
    images = batch["images"]
    tokens = {m: encode_stored(modules[m], variables[m], x) for m, x in images.items()}
    filled = {name: value for name, value in batch.items() if name != "images"}
    for kind, streams in (("input", encoder), ("target", decoder)):
        position = batch[f"{kind}_position"].astype(jnp.int32)
        for number, stream in enumerate(streams):
            if stream.kind == "tokens" and stream.modality in tokens:
                grid = tokens[stream.modality]
                grid = grid.reshape(len(grid), -1, *grid.shape[3:])  # [B, N] or [B, N, K]
                at, mine = jnp.minimum(position, grid.shape[1] - 1), batch[f"{kind}_modality"] == number
                if not stream.codes:
                    filled[f"{kind}_id"] = jnp.where(mine, jnp.take_along_axis(grid, at, axis=1), filled[f"{kind}_id"])
                else:
                    own, codes = jnp.take_along_axis(grid, at[..., None], axis=1), filled[f"{kind}_codes"]
                    own = jnp.where(mine[..., None], own.astype(codes.dtype), codes[..., : own.shape[-1]])
                    filled[f"{kind}_codes"] = codes.at[..., : own.shape[-1]].set(own)
    return filled
