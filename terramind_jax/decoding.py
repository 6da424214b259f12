"""The decoding of tokens: streams of a transformer, sampled from other streams (spec 8.1-8.4).

What the network sees in a step is the reference's; three things are not: the schedule is followed (the reference decodes everything in
the first step and fails in the second), random orders belong to a sample rather than to the batch, and guidance works for every kind of
condition.

What is generated has the size of the images that are given, whatever the model was built for: positions of encoder and decoder are
interpolated, as in the reference (spec 5.6). There the last image decides and another size fails later; here all must agree. Without an
image the size is the model's own, there 224 pixels.

A target compiles once for its number of steps: the steps are a scan over padded counts, and the target's own tokens have
encoder slots from the start, hidden until they are written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import coordinates, sampling
from terramind_jax.modalities import Stream
from terramind_jax.model import TerraMind, transformer

Variables = Mapping[str, Any]
Schedule = Literal["roar", "maskgit"]
T = TypeVar("T")
PerTarget = T | Mapping[str, T]  # one value for all targets, or one a target

START = coordinates.SENTINEL + 1  # [S_1]: a sequence that is to be written is this one token in the encoder, and starts with it
LAST_SENTINEL = coordinates.SENTINEL + 199


def generate_tokens(
    module: TerraMind,
    variables: Variables,
    inputs: Mapping[str, jax.Array],
    targets: Sequence[str],
    *,
    seed: int | np.ndarray,
    steps: PerTarget[int] = 1,
    schedule: PerTarget[Schedule] = "roar",
    token_schedule: PerTarget[sampling.TokenSchedule] = "linear",
    temperature: PerTarget[float] = 1.0,
    temperature_schedule: PerTarget[sampling.TemperatureSchedule] = "constant",
    top_k: PerTarget[int | float] = 0,
    top_p: PerTarget[float] = 0.8,
    guidance_scale: PerTarget[float] = 1.0,
    known_tokens: Mapping[str, jax.Array] | None = None,
    only: str | None = None,
    at: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """Samples the streams `targets` in their order (spec 8.1-8.4).

    Args:
      inputs: arrays by encoder stream: pixels ``[B, S, S, C]`` standardised, image tokens ``[B, s, s]`` or ``[B, s * s]``, of K codebooks
        ``[..., K]``, sequences ``[B, L]`` right-padded with 0. Images are of one size, any multiple of the patch size. May be empty.
      targets: decoder streams. One that also is an encoder stream conditions those after it; if it is a sequence, those before it read
        its start token, as in the reference.
      seed: one integer: a sample's result depends on it and on the sample alone, whatever batch it is in. Or ``[B]``, one a sample.
      steps: decoding steps of an image. Sequences are written token by token. The codes of a patch are drawn in one step, each by itself.
      schedule: ``roar`` writes a random subset in each step; ``maskgit`` draws all that is missing and keeps the most probable.
      token_schedule: ``linear`` or ``cosine``, how many tokens each step writes.
      temperature: 0 takes the most probable token.
      top_k, top_p: filters of `sampling.filter_logits`.
      guidance_scale: ``u + (c - u) * scale`` of the logits with (c) and without (u) the inputs and the finished targets; 1 is off.
      known_tokens: ids of targets that are finished, ``{target: [B, s, s]}``; they condition as if they had been sampled here.
      only: the one target to sample now. Target after target, each with `known_tokens` of those before, gives what one call gives.
      at: ``[B, 2]``, row and column of an image's first token on the grid of its scene. Windows of a scene with one seed share the random
        material of each token there. None: zeros.

    Returns:
      ``{target: ids}`` of what was sampled, int32: ``[B, s, s]`` or ``[B, s, s, K]`` for images, ``[B, L]``, right-padded with 0, for
      sequences.

    Raises:
      ValueError: a stream that the model lacks or that is both input and target, wrong shapes, images of different sizes, settings out
        of range.
    """
    encoder = {s.key: s for s in module.config.encoder}
    decoder = {s.key: s for s in module.config.decoder}
    finished = {key: jnp.asarray(value) for key, value in (known_tokens or {}).items()}
    known = {key: jnp.asarray(value) for key, value in inputs.items()}
    batch_size = _check(known, targets, encoder, decoder, seed, finished, only)
    known |= {key: value for key, value in finished.items() if key in encoder}
    module, variables = transformer.at_size(module, variables, _image_size(module, known))
    words, at = jnp.asarray(sampling.seed_words(seed, batch_size)), jnp.asarray(sampling.corners(at, batch_size))
    outputs = {}
    for i, target in enumerate(targets):
        if target in finished or only not in (None, target):
            continue
        option = functools.partial(_option, target=target)
        settings = dict(top_k=option(top_k), top_p=float(option(top_p)), guided=option(guidance_scale) != 1)
        sampling.check_filters(settings["top_k"], settings["top_p"])
        if decoder[target].kind == "sequence":
            counts, run = (1,), _write_sequence
        else:
            counts = sampling.token_schedule(option(token_schedule), option(steps), module.config.grid**2)
            settings |= dict(schedule=_check_schedule(option(schedule)), width=max(counts), even=len(set(counts)) == 1)
            run = _write_image
        temperatures = sampling.temperature_schedule(option(temperature_schedule), option(temperature), counts)
        settings["greedy"] = option(temperature) <= sampling.GREEDY_TEMPERATURE
        plan = (jnp.asarray(counts), jnp.asarray(temperatures), jnp.float32(option(guidance_scale)))
        later = [key for key in targets[i + 1 :] if key in encoder and key not in finished and encoder[key].kind == "sequence"]
        seen = known | {key: jnp.full((batch_size, 1), START) for key in later}
        outputs[target] = run(variables, seen, words, at, *plan, module=module, target=target, **settings)
        if target in encoder:
            known[target] = outputs[target]
    return outputs


# ---- one target, one program ----

_STATIC = ("module", "target", "top_k", "top_p", "guided", "greedy")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "schedule", "width", "even"))
def _write_image(
    variables, inputs, words, at, counts, temperatures, guidance_scale, *, module, target, schedule, width, even, guided, **settings
) -> jax.Array:
    """All steps of one image stream -> ids ``[B, h, w]`` or ``[B, h, w, K]``.

    `counts` and `temperatures` are ``[steps]``; `width` is the largest count.
    """
    b, grid, length = words.shape[0], module.config.grid, module.config.grid**2
    keys, places = sampling.sample_keys(words, target), sampling.places(at, grid, grid)
    slots = _embed(module, variables, inputs)
    sees_itself = target in {s.key for s in module.config.encoder} and (counts.shape[0] > 1 or not inputs)
    order = jnp.pad(sampling.random_orders(keys, places), ((0, 0), (0, width)))

    def body(state, plan):
        ids, written = state
        step, start, count, temperature = plan
        own = _hide(*module.apply(variables, target, ids, method="embed"), ~written) if sees_itself else None
        if schedule == "roar":
            positions = jax.lax.dynamic_slice_in_dim(order, start, width, axis=1)
            missing = jnp.broadcast_to(jnp.arange(width) < count, positions.shape)
        else:
            positions, missing = jnp.broadcast_to(jnp.arange(length), (b, length)), ~written
        # Slots that need no token are hidden keys, so that the decoder works as if they were not there (spec 8.3 has no other mask).
        needs_mask = not even if schedule == "roar" else counts.shape[0] > 1
        self_mask = jnp.broadcast_to(~missing[:, None, :], (*missing.shape, missing.shape[1])) if needs_mask else None
        queries = module.apply(variables, target, positions, method="queries")
        contexts = _encode(module, variables, slots, own, guided)
        y = [module.apply(variables, queries, *context, self_mask, method="decode") for context in contexts]
        logits = _logits(module, variables, target, y, guidance_scale)
        # A step that draws each token once needs no number: windows of a scene may come to a token in different steps.
        drawn = sampling.step_keys(keys, step if schedule == "maskgit" else 0)
        drawn = sampling.place_keys(drawn, jnp.take_along_axis(places, positions, axis=1))
        new, confidence = _sample(drawn, logits, temperature, **settings)
        chosen = missing if schedule == "roar" else _most_confident(confidence, missing, count)
        return _write(ids, written, positions, new, chosen), None

    codes = next(s.codes for s in module.config.decoder if s.key == target)
    state = (jnp.zeros((b, length, *codes), jnp.int32), jnp.zeros((b, length), bool))
    plan = (jnp.arange(counts.shape[0]), jnp.cumsum(counts) - counts, counts, temperatures)
    (ids, _), _ = jax.lax.scan(body, state, plan)
    return ids.reshape(b, grid, grid, *codes)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _write_sequence(variables, inputs, words, at, counts, temperatures, guidance_scale, *, module, target, guided, **settings) -> jax.Array:
    """One sequence stream, token after token -> ids ``[B, L]`` (spec 8.4). Ends at the first sentinel; the rest is padding."""
    del at, counts  # a sequence lies on no grid, and is written token by token
    b = words.shape[0]
    total = next(s.max_tokens for s in module.config.decoder if s.key == target)
    length = total - 1  # the first place is the input's [S_1]
    keys = sampling.sample_keys(words, target)
    slots, own = _embed(module, variables, inputs), None
    if target in {s.key for s in module.config.encoder}:
        own = _hide(*module.apply(variables, target, jnp.full((b, 1), START), method="embed"), jnp.zeros((b, 1), bool))
    contexts = _encode(module, variables, slots, own, guided)
    positions = jnp.broadcast_to(jnp.arange(length), (b, length))
    future = jnp.broadcast_to(jnp.arange(length)[None, :] > jnp.arange(length)[:, None], (b, length, length))

    def body(ids, step):
        queries = module.apply(variables, target, positions, ids[:, :-1], method="queries")
        y = [module.apply(variables, queries, *context, future, method="decode") for context in contexts]
        last = [jax.lax.dynamic_slice_in_dim(x, step, 1, axis=1) for x in y]
        logits = _logits(module, variables, target, last, guidance_scale)
        new, _ = _sample(sampling.step_keys(keys, step)[:, None], logits, temperatures[0], **settings)
        return jax.lax.dynamic_update_slice_in_dim(ids, new, step + 1, axis=1), None

    ids = jnp.full((b, total), coordinates.PAD).at[:, 0].set(START)
    ids, _ = jax.lax.scan(body, ids, jnp.arange(length))
    return jnp.pad(_until_sentinel(ids[:, 1:]), ((0, 0), (0, 1)), constant_values=coordinates.PAD)


# ---- pieces of a step ----


def _embed(module: TerraMind, variables: Variables, inputs: Mapping[str, jax.Array]) -> list[tuple]:
    """Encoder slots ``(content, emb, hidden)`` of each input; padding of sequences is hidden."""
    slots = []
    for stream in module.config.encoder:  # in the model's order, so that the caller's does not matter
        if stream.key in inputs:
            value = inputs[stream.key]
            content, emb = module.apply(variables, stream.key, value, method="embed")
            is_padding = value == coordinates.PAD if stream.kind == "sequence" else jnp.zeros(content.shape[:2], bool)
            slots.append(_hide(content, emb, is_padding))
    return slots


def _hide(content: jax.Array, emb: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden slots hold zeros (spec 4.1)."""
    return jnp.where(hidden[..., None], 0, content), jnp.where(hidden[..., None], 0, emb), hidden


def _encode(module: TerraMind, variables: Variables, slots: list[tuple], own: tuple | None, guided: bool) -> list[tuple]:
    """What the decoder looks at, ``(context [B, N, D], hidden [B, N])``: once, or for guidance also without the inputs (spec 8.3)."""
    passes = [slots, [_hide(content, emb, jnp.ones_like(hidden)) for content, emb, hidden in slots]]
    contexts = []
    for visible in passes if guided else passes[:1]:
        content, emb, hidden = (jnp.concatenate(parts, axis=1) for parts in zip(*visible, *([own] if own else []), strict=True))
        contexts.append((module.apply(variables, content, emb, hidden, method="encode"), hidden))
    return contexts


def _logits(module: TerraMind, variables: Variables, target: str, y: list[jax.Array], guidance_scale: jax.Array) -> jax.Array:
    """``[B, m, V]`` or ``[B, m, K, V]`` of one decoder output, or of a conditional and an unconditional one under guidance."""
    logits = [module.apply(variables, target, x, method="logits") for x in y]
    if len(logits) == 1:
        return logits[0]
    conditional, unconditional = logits
    return unconditional + (conditional - unconditional) * guidance_scale


def _sample(keys, logits, temperature, *, greedy, top_k, top_p) -> tuple[jax.Array, jax.Array]:
    """Ids and confidences ``[B, m]`` of ``[B, m, V]`` logits (spec 8.2); of ``[B, m, K, V]`` ids ``[B, m, K]``.

    The confidence of several codes is the logarithm of their probability: as a product of many it would be zero.
    """
    if logits.ndim == 4:
        b, m, k, v = logits.shape
        keys, logits = sampling.codebook_keys(keys, k).reshape(b, m * k), logits.reshape(b, m * k, v)
        ids, confidence = _sample(keys, logits, temperature, greedy=greedy, top_k=top_k, top_p=top_p)
        return ids.reshape(b, m, k), jnp.log(confidence).reshape(b, m, k).sum(-1)
    if greedy:
        return sampling.most_probable(logits)
    return sampling.draw(keys, sampling.filter_logits(logits, top_k, top_p), temperature)


def _most_confident(confidence: jax.Array, missing: jax.Array, count: jax.Array) -> jax.Array:
    """Mask ``[B, n]`` of the `count` most confident among the missing; ties go to the first."""
    order = jnp.argsort(jnp.where(missing, -confidence, jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1) < count


def _write(ids, written, positions, new, chosen) -> tuple[jax.Array, jax.Array]:
    """Puts `new` ``[B, m]`` or ``[B, m, K]`` at those `positions` ``[B, m]`` that are `chosen`."""
    positions = jnp.where(chosen, positions, ids.shape[1])  # outside: dropped

    def scatter(row, at, values):
        return row.at[at].set(values, mode="drop")

    return jax.vmap(scatter)(ids, positions, new), jax.vmap(scatter)(written, positions, chosen)


def _until_sentinel(ids: jax.Array) -> jax.Array:
    """What replaces [S_1]: the tokens ``[B, n]`` before the first sentinel, then padding (spec 8.4)."""
    ended = jnp.cumsum((ids >= coordinates.SENTINEL) & (ids <= LAST_SENTINEL), axis=1) > 0
    return jnp.where(ended, coordinates.PAD, ids)


# ---- images of another size ----


def _image_size(module: TerraMind, inputs: Mapping[str, jax.Array]) -> int:
    """Pixels along one side of the images, which must agree; without any the model's own."""
    images = [stream for stream in module.config.encoder if stream.key in inputs and stream.kind != "sequence"]
    sides = {stream.key: _side(stream, inputs[stream.key].shape, module.config.patch_size) for stream in images}
    if len(set(sides.values())) > 1:
        raise ValueError(f"The images must be of one size; their sides are {', '.join(f'{k} {n} pixels' for k, n in sides.items())}.")
    return next(iter(sides.values()), module.config.image_size)


def _side(stream: Stream, shape: tuple[int, ...], patch_size: int) -> int:
    """Pixels along one side of one image input."""
    if stream.kind == "pixels":
        if len(shape) == 4 and shape[1] == shape[2] and shape[1] % patch_size == 0 and shape[3] == stream.channels:
            return shape[1]
        expected = f"[B, S, S, {stream.channels}], S a multiple of the patch size {patch_size}"
        raise ValueError(f"Input {stream.key!r} has shape {list(shape)}; expected {expected}.")
    grid = stream.grid_shape(shape)
    side = math.isqrt(math.prod(grid))
    if grid not in ((side, side), (side**2,)):
        k = "".join(f", {n}" for n in stream.codes)
        expected = f"the ids of a square of tokens, [B, s, s{k}] or [B, s * s{k}]"
        raise ValueError(f"Input {stream.key!r} has shape {list(shape)}; expected {expected}.")
    return side * patch_size


# ---- arguments ----


def _option(value: PerTarget[T], target: str) -> T:
    if isinstance(value, Mapping) and target not in value:
        raise ValueError(f"A setting is given for {', '.join(value)} but not for the target {target!r}.")
    return value[target] if isinstance(value, Mapping) else value


def _check_schedule(schedule: str) -> str:
    if schedule not in ("roar", "maskgit"):
        raise ValueError(f"Unknown decoding schedule {schedule!r}; known schedules: roar, maskgit.")
    return schedule


def _check(inputs, targets, encoder, decoder, seed, finished, only) -> int:
    """Raises unless these streams can be generated from those; returns the batch size."""
    for role, keys, known in (("input", inputs, encoder), ("target", targets, decoder), ("target", finished, decoder)):
        unknown = [key for key in keys if key not in known]
        if unknown:
            raise ValueError(f"This model has no {role} stream {unknown[0]!r}; it has {', '.join(known)}.")
    both = [key for key in targets if key in inputs]
    if both:
        raise ValueError(f"Stream {both[0]!r} is both an input and a target; leave it out of one.")
    if len(set(targets)) != len(targets):
        raise ValueError(f"The targets {', '.join(targets)} name a stream twice.")
    if only is not None and only not in targets:
        raise ValueError(f"The option only is {only!r}, which is no target; targets: {', '.join(targets)}.")
    both = [key for key in finished if key in inputs or key == only]
    if both:
        raise ValueError(f"The known tokens are of {both[0]!r}, which is {'to be sampled' if both[0] == only else 'an input'}.")
    if not inputs | finished and targets and targets[0] not in encoder:
        raise ValueError(f"{targets[0]!r} needs at least one input: this model cannot encode it, so there is nothing to start from.")
    sizes = {key: value.shape[0] for key, value in (inputs | finished).items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The inputs differ in batch size: {', '.join(f'{key} {size}' for key, size in sizes.items())}.")
    return next(iter(sizes.values()), np.size(seed))
