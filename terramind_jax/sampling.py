"""How tokens are drawn: schedules, filters and the random material of each draw (spec 8.1, 8.2).

Every draw depends on the sample's seed, the target, the step and the token's place on the grid of its scene, and on nothing else: not on
the batch around it, nor on what was generated before, nor on the window in which a scene is seen. So windows that overlap share what is
random. Keys are arrays ``[B]``, one key a sample, and all random functions here are mapped over them.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import modalities

TokenSchedule = Literal["linear", "cosine"]
TemperatureSchedule = Literal["constant", "linear"]

MIN_TEMPERATURE = 1e-9  # floor of the linear temperature schedule
GREEDY_TEMPERATURE = 1e-10  # at or below it the most probable token is taken
SCENE_SIDE = 2**16  # tokens along the largest scene


def token_schedule(kind: TokenSchedule, steps: int, tokens: int) -> tuple[int, ...]:
    """How many of `tokens` are written in each step (spec 8.1). Never zero, and sums to `tokens`, so it can be shorter than `steps`.

    ``linear`` splits evenly, larger steps first; ``cosine`` starts and ends with few.
    """
    if steps < 1:
        raise ValueError(f"The number of decoding steps is {steps}; it must be at least 1.")
    if kind == "linear":
        edges = [step * tokens // steps for step in range(steps + 1)]
        counts = sorted((b - a for a, b in zip(edges, edges[1:], strict=False)), reverse=True)
    elif kind == "cosine":
        level = [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps + 1)]
        counts, left = [], tokens
        for a, b in zip(level[: steps - 1], level[1:], strict=False):
            counts.append(min(round(tokens * (a - b)), left))
            left -= counts[-1]
        counts.append(left)
    else:
        raise ValueError(f"Unknown token schedule {kind!r}; known schedules: linear, cosine.")
    return tuple(count for count in counts if count)


def temperature_schedule(kind: TemperatureSchedule, temperature: float, counts: tuple[int, ...]) -> np.ndarray:
    """The temperature of each step, ``[steps]`` float32 (spec 8.1). ``linear`` falls with the share of tokens that are still missing."""
    if not temperature >= 0:
        raise ValueError(f"The temperature is {temperature}; it must be 0 (always the most probable token) or more.")
    if kind == "constant" or temperature <= GREEDY_TEMPERATURE:
        return np.full(len(counts), temperature, np.float32)
    if kind != "linear":
        raise ValueError(f"Unknown temperature schedule {kind!r}; known schedules: constant, linear.")
    written = np.cumsum([0, *counts[:-1]])
    return np.maximum(temperature * (1 - written / sum(counts)), MIN_TEMPERATURE).astype(np.float32)


def seed_words(seed: int | np.ndarray | jax.Array, batch_size: int) -> np.ndarray | jax.Array:
    """`seed` as two 32-bit words a sample, ``[B, 2]`` uint32.

    An integer `seed` gives every sample the same random material, so a sample's result is the same in any batch and at any place in it.
    An array ``[B]`` of seeds gives each sample its own; inside a program these are uint32.
    """
    if isinstance(seed, jax.core.Tracer):  # in a program: one 32-bit seed a sample
        return jnp.stack([jnp.zeros_like(seed), seed], axis=-1)
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu":
        raise ValueError(f"The seed has dtype {seeds.dtype}; expected an integer or an array of integers, one a sample.")
    if seeds.shape not in ((), (batch_size,)):
        raise ValueError(f"The seed has shape {seeds.shape}; expected one integer or [{batch_size}], one a sample.")
    wide = np.broadcast_to(seeds, (batch_size,)).astype(np.uint64)
    return np.stack([wide >> np.uint64(32), wide & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def draw_seeds(seed: int | np.ndarray, num_samples: int) -> list[np.ndarray]:
    """The seeds of so many draws, each uint64 of `seed`'s shape, ``[]`` or ``[B]``. The first is `seed` itself; more change none before."""
    if num_samples < 1:
        raise ValueError(f"The number of samples is {num_samples}; it must be at least 1.")
    first = np.asarray(seed).astype(np.uint64)
    states = [np.random.SeedSequence(int(one)).generate_state(num_samples, np.uint64) for one in first.ravel()]
    return [first, *np.stack(states, axis=-1)[1:].reshape(-1, *first.shape)]


def sample_keys(words: jax.Array, target: str) -> jax.Array:
    """One key a sample, ``[B]``, for everything drawn for stream `target`; `words` as from `seed_words`."""
    # Threefry whatever the default is: hardware generators give other bits under vmap, so a sample would depend on its batch.
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.vmap(lambda key: jax.random.fold_in(key, modalities.stream_id(target)))(keys)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """The keys ``[B]`` of one step."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def corners(at: np.ndarray | None, batch_size: int) -> np.ndarray | jax.Array:
    """`at` as ``[B, 2]`` int32: row and column of each window's first token on the grid of its scene; None: the windows are the scenes."""
    if at is None:
        return jnp.zeros((batch_size, 2), jnp.int32)
    at = np.asarray(at)
    if at.shape != (batch_size, 2) or at.dtype.kind not in "iu":
        raise ValueError(f"The option at is {at.dtype} of shape {list(at.shape)}; expected integers [{batch_size}, 2], row and column.")
    if at.min(initial=0) < 0 or at.max(initial=0) >= SCENE_SIDE:
        raise ValueError(f"The option at goes from {at.min()} to {at.max()}; expected tokens of a scene's grid, 0-{SCENE_SIDE - 1}.")
    return at.astype(np.int32)


def places(at: jax.Array, height: int, width: int) -> jax.Array:
    """Numbers of all tokens of windows on the grids of their scenes, the same whatever a scene's width: ``[B, height * width]`` uint32."""
    rows, columns = (at[:, i, None, None].astype(jnp.uint32) for i in range(2))
    rows, columns = rows + jnp.arange(height, dtype=jnp.uint32)[:, None], columns + jnp.arange(width, dtype=jnp.uint32)
    return (rows * SCENE_SIDE + columns).reshape(at.shape[0], -1)


def place_keys(keys: jax.Array, places: jax.Array) -> jax.Array:
    """The keys ``[B, n]`` of the tokens at `places` ``[B, n]``."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, places)


def codebook_keys(keys: jax.Array, number: int) -> jax.Array:
    """The keys ``[B, n, number]`` of the codes of tokens with the keys ``[B, n]``."""
    return jax.vmap(jax.vmap(lambda key: jax.random.split(key, number)))(keys)


def random_orders(keys: jax.Array, places: jax.Array) -> jax.Array:
    """One random order of ``0 ... n - 1`` a sample, ``[B, n]`` int32; two tokens come in the same order in every window that holds them."""
    # Step 2**31 - 1 is never reached, so the order shares no key with a draw.
    bits = jax.vmap(jax.vmap(jax.random.bits))(place_keys(step_keys(keys, 2**31 - 1), places))
    return jnp.argsort(bits, axis=1).astype(jnp.int32)


def normal(keys: jax.Array, at: jax.Array, shape: tuple[int, int], patch_size: int, channels: int) -> jax.Array:
    """Normal noise of images of `shape` patches whose first lies at `at` ``[B, 2]``, patch by patch: ``[B, H, W, C]`` float32."""
    patch = (patch_size, patch_size, channels)
    own = place_keys(keys, places(at, *shape))
    noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, patch)))(own).reshape(-1, *shape, *patch)
    return noise.swapaxes(2, 3).reshape(-1, shape[0] * patch_size, shape[1] * patch_size, channels)


def check_filters(top_k: int | float, top_p: float) -> None:
    """Raises a ValueError unless `top_k` and `top_p` can be used by `filter_logits`."""
    if top_k < 0 or (isinstance(top_k, float) and top_k > 1):
        raise ValueError(f"top_k is {top_k}; expected 0 (off), a number of tokens, or a fraction of the vocabulary between 0 and 1.")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a probability between 0 (off) and 1.")


def filter_logits(logits: jax.Array, top_k: int | float = 0, top_p: float = 0.0) -> jax.Array:
    """Sets improbable entries of ``[..., V]`` logits to -inf: first top-k, then top-p (spec 8.2). 0 switches either off.

    `top_k` is a number of tokens, or a float: a fraction of the vocabulary. Top-p drops the tokens whose more probable
    competitors already exceed `top_p`; the token that crosses it is kept. Equal logits are kept or dropped together.
    """
    check_filters(top_k, top_p)
    vocab_size = logits.shape[-1]
    k = max(int(top_k * vocab_size), 1) if isinstance(top_k, float) and top_k > 0 else int(top_k)
    if 0 < k < vocab_size:
        logits = jnp.where(logits >= jax.lax.top_k(logits, k)[0][..., -1:], logits, -jnp.inf)
    if 0 < top_p < 1:
        probability = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probability >= _least_kept(probability, top_p), logits, -jnp.inf)
    return logits


def _least_kept(probability: jax.Array, top_p: float) -> jax.Array:
    """The smallest value ``[..., 1]`` whose larger competitors sum to at most `top_p`.

    Found by halving the interval of bit patterns, which order non-negative floats: exact after 31 sums, where a sort of the vocabulary
    takes several times as long on a CPU.
    """

    def halve(_, interval):
        low, high = interval
        middle = low + (high - low) // 2
        larger = jnp.where(probability > jax.lax.bitcast_convert_type(middle, jnp.float32), probability, 0).sum(-1, keepdims=True)
        return jnp.where(larger <= top_p, low, middle + 1), jnp.where(larger <= top_p, middle, high)

    shape = (*probability.shape[:-1], 1)
    one = int(np.float32(1).view(np.int32))
    interval = jnp.zeros(shape, jnp.int32), jnp.full(shape, one + 1, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, interval)[1], jnp.float32)


def draw(keys: jax.Array, logits: jax.Array, temperature: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Draws from ``[B, n, V]`` filtered logits: ids ``[B, n]`` int32 and their probabilities ``[B, n]`` after tempering (spec 8.2).

    `keys` are ``[B, n]``, one a token. `temperature` must be positive; temperature 0 is `most_probable`.
    """
    logits = logits / temperature
    ids = jax.vmap(jax.vmap(jax.random.categorical))(keys, logits)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return ids.astype(jnp.int32), jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def most_probable(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Temperature 0 on ``[B, n, V]`` logits: ids ``[B, n]`` int32 and their untempered probabilities ``[B, n]``.

    The reference gives every token confidence 1 here, so that MaskGIT writes tokens in raster order; the probability keeps its meaning.
    """
    ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return ids, jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
