"""Where on Earth a scene may lie: a model's whole distribution over coordinates, of which generation draws one point.

A place is two tokens, a latitude and then, given it, a longitude. One pass of the decoder knows all pairs: after the start it reads every
latitude at once, each of which sees the start and itself alone, as if it had been the one that was written.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from terramind_jax import coordinates, decoding
from terramind_jax.model import TerraMind

Variables = Mapping[str, Any]
STREAM = "coords"


def density(
    module: TerraMind,
    variables: Variables,
    inputs: Mapping[str, jax.Array],
    *,
    visible: Mapping[str, jax.Array] | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Probabilities of all places, ``[B, 721, 1440]`` float32; each sample's sum to 1.

    Rows are latitudes from 90 to -90, columns longitudes from -180 to 179.75 degrees, a quarter degree apart (`coordinates.grid`). They are
    those of tokens, so that a row's share does not shrink with its area on the globe, and what is no coordinate is left out.

    Args:
      inputs, visible: as `decoding.generate_tokens` takes them; without inputs, where any scene lies.
      temperature: of latitude and longitude, positive; 1 is the model's own.

    Raises:
      ValueError: a temperature that is not positive, and what `decoding.generate_tokens` objects to.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature is {temperature}; a density needs a positive one.")
    known, masks, batch_size = decoding.check(module, inputs, [STREAM], visible=visible)
    module, variables = decoding.at_inputs(module, variables, known)
    return _density(variables, known, masks, temperature, module=module, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("module", "batch_size"))
def _density(variables, inputs, visible, temperature, *, module, batch_size) -> jax.Array:
    latitudes, longitudes = (jnp.arange(*ids) for ids in (coordinates.LATITUDES, coordinates.LONGITUDES))
    (context,) = decoding.sequence_contexts(module, variables, inputs, visible, STREAM, batch_size)
    b, n = batch_size, len(latitudes)
    ids = jnp.broadcast_to(jnp.append(decoding.START, latitudes), (b, n + 1))
    positions = jnp.broadcast_to(jnp.minimum(jnp.arange(n + 1), 1), (b, n + 1))
    hidden = ~jnp.eye(n + 1, dtype=bool).at[:, 0].set(True)
    queries = module.apply(variables, STREAM, positions, ids, method="queries")
    y = module.apply(variables, queries, *context, jnp.broadcast_to(hidden, (b, *hidden.shape)), method="decode")

    def place(y: jax.Array) -> jax.Array:  # one sample's at a time: of all there are 721 x 30,000 logits
        logits = module.apply(variables, STREAM, y, method="logits") / temperature
        latitude = jax.nn.softmax(logits[0, latitudes])
        return latitude[:, None] * jax.nn.softmax(logits[1:, longitudes])

    joint = jax.lax.map(place, y)[:, ::-1]  # north first
    return joint[..., :-1].at[..., 0].add(joint[..., -1])  # -180 and 180 degrees are one meridian
