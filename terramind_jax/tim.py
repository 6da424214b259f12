"""Thinking in Modalities: the feature extractor also reads what a frozen TerraMind generates from its inputs (spec 8.6).

Pure functions of two networks. `think` adds the generated ids to the inputs, `features` also runs the backbone. In training, `think`
belongs before the step: nothing differentiates through ids. What differs from the reference, on purpose:

- Generator and backbone have variables of their own, equal arrays after loading. The reference shares the embedding modules if generation
  is chained, so that freezing the generator also freezes the backbone's embeddings. Its state dict cannot hold two sets of them: exporting
  a chained model whose backbone's embeddings were trained is an error (`check_shared`); a directory of `save` holds both.
- Several decoding steps follow their schedule; the reference fails in the second.
- Modality dropping works with any number of generated streams, which it may drop like inputs; one modality survives. The reference
  fails with two streams, and with one it may drop all inputs.
- A generated sequence has the length of a tokenised one; the reference writes up to 50 tokens.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta

from terramind_jax import decoding
from terramind_jax.modalities import Stream
from terramind_jax.model import Backbone, BackboneConfig, TerraMind, TransformerConfig, backbone

Variables = Mapping[str, Any]


def generator(config: BackboneConfig, targets: Sequence[Stream], decoder_depth: int) -> TerraMind:
    """The network that thinks for a backbone of this configuration: the same encoder, and a decoder for `targets`.

    Its encoder reads `config.streams`, and with the targets among them what it has written. The reference's has them if it chains.
    """
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig) if hasattr(config, f.name)}
    return TerraMind(TransformerConfig(**shared | dict(decoder_depth=decoder_depth, decoder=tuple(targets))))


def think(
    module: TerraMind,
    variables: Variables,
    inputs: Mapping[str, jax.Array],
    targets: Sequence[str],
    *,
    seed: int | np.ndarray,
    chained: bool = True,
    steps: int = 1,
    temperature: float = 1.0,
    top_p: float = 0.8,
    top_k: int | float = 0,
) -> collections.OrderedDict[str, jax.Array]:
    """The inputs, followed by the ids of those `targets` that are not among them.

    Args:
      module, variables: the `generator`.
      inputs: arrays by stream, as `Backbone.__call__` takes them; images square and of one size, which need not be the generator's own.
      targets: streams in the order in which they are generated.
      seed: one integer, or ``[B]``, one a sample.
      chained: whether a generated stream conditions those after it.
      steps, temperature, top_p, top_k: as in `decoding.generate_tokens`; temperature 0 takes the most probable tokens.

    Returns:
      Inputs and ids, int32 ``[B, h, w]`` for images and ``[B, L]`` for sequences, in an order that `jax.jit` keeps.

    Raises:
      ValueError: what `decoding.generate_tokens` objects to.
    """
    known = collections.OrderedDict(inputs)
    new = [target for target in targets if target not in known]
    options = dict(seed=seed, chained=chained, steps=steps, temperature=temperature, top_p=top_p, top_k=top_k)
    ids = decoding.generate_tokens(module, variables, known, new, **options)
    sequences = {s.key for s in module.config.decoder if s.kind == "sequence"}
    for key in new:
        known[key] = ids[key][:, :-1] if key in sequences else ids[key]  # a sequence's last place is always padding
    return known


def features(
    module: Backbone,
    variables: Variables,
    thinker: TerraMind,
    thinker_variables: Variables,
    inputs: Mapping[str, jax.Array],
    targets: Sequence[str],
    *,
    seed: int | np.ndarray,
    **options: Any,
) -> backbone.Features:
    """The backbone's features of `inputs` and of what the thinker, a `generator`, makes of them: `think`, then `backbone.features`.

    ``mean``, ``max`` and ``concat`` treat generated images as further modalities; ``dict`` holds the inputs only. `options` are `think`'s.
    """
    thought = think(thinker, thinker_variables, inputs, targets, seed=seed, **options)
    return only_inputs(backbone.features(module, variables, thought), inputs)


def only_inputs(outputs: backbone.Features, inputs: Mapping[str, jax.Array]) -> backbone.Features:
    """Outputs of ``merge_method="dict"`` without the generated streams; any others unchanged."""
    kept = {*inputs, backbone.REGISTER_TOKENS}
    return [{key: x for key, x in output.items() if key in kept} if isinstance(output, Mapping) else output for output in outputs]


# ---- embeddings that the reference shares if generation is chained ----

SHARED = (("params", "mod_emb"), ("params", "patch_proj"), ("params", "encoder_token_emb"), ("buffers", "encoder_pos_emb"))


def share(found: Mapping[str, Mapping[str, Any]], variables: Variables) -> dict[str, Any]:
    """`found`, part of a generator's variables, with the backbone's embeddings where it lacks some."""
    merged = {group: dict(found.get(group, {})) for group in ("params", "buffers")}
    for group, name in SHARED:
        if name in variables[group]:
            merged[group][name] = {**variables[group][name], **merged[group].get(name, {})}
    return merged


def check_shared(variables: Variables, thinker_variables: Variables) -> None:
    """Raises a ValueError unless the embeddings of a backbone and its chained generator are equal."""
    ours, theirs = meta.unbox(variables), meta.unbox(thinker_variables)
    tables = [(name, ours[group].get(name, {}), theirs[group].get(name, {})) for group, name in SHARED]
    differing = [f"{name}/{key}" for name, own, other in tables for key in own if not np.array_equal(own[key], other[key])]
    if differing:
        raise ValueError(
            f"The backbone's embeddings differ from the generator's ({', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}); "
            "TerraTorch's chained model has one for both: keep them frozen, as it does, or save to a directory."
        )
