"""Thinking in Modalities in fine-tuning: what a frozen generator makes of the inputs enters the backbone beside them (`tim`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from terramind_jax import modalities, tim
from terramind_jax.model import TerraMind
from terramind_jax.models import SAMPLING, ThinkingInModalities


@dataclasses.dataclass(frozen=True)
class Thinker:
    """A generator; what it makes of a sample depends on the sample and the seed alone, whatever batch it is in."""

    module: TerraMind
    streams: tuple[tuple[str, str], ...]  # (user name, stream) of the inputs, in order
    targets: tuple[str, ...]  # streams that it makes
    chained: bool
    settings: tuple[tuple[str, Any], ...]  # of `tim.think`

    def __call__(self, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Standardised ``[B, (T,) H, W, C]``, or ids ``[B, (T,) h, w]``, by user name -> ids by stream, of sequences ``[B, (T,) L]``."""
        return _think(variables, dict(inputs), thinker=self)


def of(extractor: ThinkingInModalities, seed: int) -> Thinker:
    """The thinker of a model, which makes what is no input, as in TerraTorch."""
    streams = tuple((name, stream.key) for name, stream in extractor.streams.items())
    named = (modalities.output_stream(name).key for name in extractor.options["tim_modalities"])
    targets = tuple(key for key in named if key not in dict(streams).values())
    settings = {ours: extractor.options[f"tim_{theirs}"] for theirs, ours in SAMPLING.items()}
    chained = extractor.options["tim_chained_generations"]
    return Thinker(extractor.generator[0], streams, targets, chained, tuple({"seed": seed, **settings}.items()))


@partial(jax.jit, static_argnames="thinker")
def _think(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array], *, thinker: Thinker) -> dict[str, jax.Array]:
    arrays = {stream: inputs[name] for name, stream in thinker.streams}
    ranks = {s.key: 3 if s.kind == "pixels" else 2 + len(s.codes) for s in thinker.module.config.encoder}  # of one image
    lead = next(x.shape[: x.ndim - ranks[stream]] for stream, x in arrays.items())
    folded = {stream: x.reshape(-1, *x.shape[len(lead) :]) for stream, x in arrays.items()}
    found = tim.think(thinker.module, variables, folded, thinker.targets, chained=thinker.chained, **dict(thinker.settings))
    return {key: found[key].reshape(*lead, *found[key].shape[1:]) for key in thinker.targets}
