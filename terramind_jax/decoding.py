"""The decoding of tokens: streams of a transformer, sampled from other streams (spec 8.1-8.4).

What the network sees in a step is the reference's; three things are not: the schedule is followed (the reference decodes everything in
the first step and fails in the second), random orders belong to a sample rather than to the batch, and guidance works for every kind of
condition.

What is generated has the size of the images that are given, whatever the model was built for: positions of encoder and decoder are
interpolated, as in the reference (spec 5.6). There the last image decides and another size fails later; here all must agree. Without an
image the size is the model's own, there 224 pixels.

Targets that do not depend on each other are one program, others one each, compiled once for the number of steps: these are a scan over
padded counts, and a target's own tokens have encoder slots from the start, hidden until they are written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
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
    chained: bool = True,
    visible: Mapping[str, jax.Array] | None = None,
    known_tokens: Mapping[str, jax.Array] | None = None,
    only: str | None = None,
    at: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """Samples the streams `targets` in their order (spec 8.1-8.4).

    Args:
      inputs: arrays by encoder stream: pixels ``[B, S, S, C]`` standardised, image tokens ``[B, s, s]`` or ``[B, s * s]``, of K codebooks
        ``[..., K]``, sequences ``[B, L]`` right-padded with 0. Images are of one size, any multiple of the patch size. May be empty.
      targets: decoder streams. One that also is an encoder stream conditions those after it; if it is a sequence, those before it read
        its start token, as in the reference. One of which `inputs` hold tokens is in-painted: those that are `visible` stay, and the
        others are drawn; targets before it see those that stay.
      seed: one integer, or ``[B]``, one a sample. A sample's draws depend on it and on the sample alone, whatever batch it is in; but
        products round differently with the size of a batch and the number of devices, so that near-ties may fall otherwise. Images that
        diffusion decoders make of equal tokens agree to 1e-5 standard deviations in float32, and to some 0.04 in bfloat16.
      steps: decoding steps of an image. Sequences are written token by token. The codes of a patch are drawn in one step, each by itself.
      schedule: ``roar`` writes a random subset in each step; ``maskgit`` draws all that is missing and keeps the most probable.
      token_schedule: ``linear`` or ``cosine``, how many tokens each step writes.
      temperature: 0 takes the most probable token.
      top_k, top_p: filters of `sampling.filter_logits`.
      guidance_scale: ``u + (c - u) * scale`` of the logits with (c) and without (u) the inputs and the finished targets; 1 is off.
      chained: whether a target conditions those after it. Without, they depend on the inputs alone. Images of equal settings that do not
        depend on each other are written together, in one pass a step, with the same result.
      visible: bool ``[B, s, s]`` by image input, which of its patches or tokens the model sees; the others are as if they were not given.
        Shapes do not depend on it, so that one program serves all masks. Inputs without one are seen whole; a target needs one.
      known_tokens: ids of targets that are finished, ``{target: [B, s, s]}``; they condition as if they had been sampled here, so only if
        `chained`.
      only: the one target to sample now. Target after target, each with `known_tokens` of those before, gives what one call gives.
      at: ``[B, 2]``, row and column of an image's first token on the grid of its scene. Windows of a scene with one seed share the random
        material of each token there. None: zeros.

    Returns:
      ``{target: ids}`` of what was sampled, int32: ``[B, s, s]`` or ``[B, s, s, K]`` for images, ``[B, L]``, right-padded with 0, for
      sequences.

    Raises:
      ValueError: a stream that the model lacks, or that is both input and target without a mask of what stays, wrong shapes, images of
        different sizes, settings out of range.
    """
    encoder, decoder = ({s.key: s for s in streams} for streams in (module.config.encoder, module.config.decoder))
    finished = {key: jnp.asarray(value) for key, value in (known_tokens or {}).items()}
    known, masks, batch_size = check(module, inputs, targets, np.size(seed), visible, finished, only)
    conditions = {key: value for key, value in finished.items() if chained and key in encoder}
    known, masks = known | conditions, {key: mask for key, mask in masks.items() if key not in conditions}
    module, variables = at_inputs(module, variables, known)
    words, at = jnp.asarray(sampling.seed_words(seed, batch_size)), jnp.asarray(sampling.corners(at, batch_size))
    given = dict(steps=steps, schedule=schedule, token_schedule=token_schedule, temperature=temperature)
    given |= dict(temperature_schedule=temperature_schedule, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)
    missing = [target for target in targets if target not in finished and only in (None, target)]
    plans = {target: _plan(module, decoder[target], **{k: _option(v, target) for k, v in given.items()}) for target in missing}
    outputs = {}
    for group in _groups(plans, {*encoder} if chained else {*known}):
        later = [key for key in targets[targets.index(group[-1]) + 1 :] if key not in finished and key in encoder]
        starts = [key for key in later if chained and encoder[key].kind == "sequence"]
        others, hiding = ({key: x for key, x in of.items() if key != group[0]} for of in (known, masks))
        seen = others | {key: jnp.full((batch_size, 1), START) for key in starts}
        plan = plans[group[0]]
        values = jnp.asarray(plan.counts), jnp.asarray(plan.temperatures, jnp.float32), jnp.float32(plan.guidance_scale)
        if plan.is_sequence:
            made = [_write_sequence(variables, seen, hiding, words, values, module=module, target=group[0], **dict(plan.settings))]
        else:
            stay = (known[group[0]], masks[group[0]]) if group[0] in known else None
            what = dict(module=module, targets=tuple(group), **dict(plan.settings))
            made = _write_images(variables, seen, hiding, words, at, values, stay, **what)
        outputs |= zip(group, made, strict=True)
        if chained:
            known, masks = known | {target: outputs[target] for target in group if target in encoder}, hiding
    return outputs


def one_role(stream: Stream) -> str:
    """What to do about a stream that is both an input and a target."""
    return "leave it out of one" + ("" if stream.kind == "sequence" else ", or say what of it stays with `visible`")


def target_passes(
    module: TerraMind, stream: Stream, *, steps: PerTarget[int] = 1, token_schedule: PerTarget[sampling.TokenSchedule] = "linear", **others
) -> int:
    """How often `generate_tokens` asks the network for one target at the model's own size, given the same options."""
    if stream.kind == "sequence":
        return stream.max_tokens - 1  # the first is the start token
    return len(_counts(module, _option(steps, stream.key), _option(token_schedule, stream.key)))


# ---- what is done when ----


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one target is written. Those with equal plans can be written together."""

    is_sequence: bool
    is_input: bool  # whether the encoder can see what has been written of it
    codes: tuple[int, ...]  # of a patch, see `Stream.codes`
    counts: tuple[int, ...]  # tokens a step
    temperatures: tuple[float, ...]
    guidance_scale: float
    settings: tuple[tuple[str, Any], ...]  # of the program


def _plan(
    module: TerraMind,
    stream: Stream,
    *,
    steps: int,
    schedule: Schedule,
    token_schedule: sampling.TokenSchedule,
    temperature: float,
    temperature_schedule: sampling.TemperatureSchedule,
    top_k: int | float,
    top_p: float,
    guidance_scale: float,
) -> _Plan:
    """Of one target; see `generate_tokens`."""
    sampling.check_filters(top_k, top_p)
    settings = dict(top_k=top_k, top_p=float(top_p), guided=guidance_scale != 1, greedy=temperature <= sampling.GREEDY_TEMPERATURE)
    counts, is_sequence = (1,), stream.kind == "sequence"
    if not is_sequence:
        counts = _counts(module, steps, token_schedule)
        settings |= dict(schedule=_check_schedule(schedule), width=max(counts), even=len(set(counts)) == 1)
    temperatures = tuple(sampling.temperature_schedule(temperature_schedule, temperature, counts).tolist())
    return _Plan(is_sequence, stream in module.config.encoder, stream.codes, counts, temperatures, guidance_scale, tuple(settings.items()))


def _counts(module: TerraMind, steps: int, token_schedule: sampling.TokenSchedule) -> tuple[int, ...]:
    """Tokens of an image at the model's own size that are written in each step."""
    return sampling.token_schedule(token_schedule, steps, module.config.grid**2)


def _groups(plans: Mapping[str, _Plan], alone: set[str]) -> list[list[str]]:
    """Targets, in their order, that are written together: images with one plan, none of them `alone`, as is what conditions others."""
    groups: list[list[str]] = []
    for target, plan in plans.items():
        last = groups[-1] if groups else []
        if last and not plan.is_sequence and plan == plans[last[0]] and alone.isdisjoint([*last, target]):
            last.append(target)
        else:
            groups.append([target])
    return groups


# ---- one group, one program ----

_STATIC = ("module", "target", "top_k", "top_p", "guided", "greedy")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "targets", "schedule", "width", "even"))
def _write_images(
    variables, inputs, visible, words, at, plan, stay, *, module, targets, schedule, width, even, guided, **settings
) -> list[jax.Array]:
    """All steps of image streams that do not depend on each other -> ids ``[B, h, w]`` or ``[B, h, w, K]`` of each.

    `plan` holds counts and temperatures ``[steps]`` and the guidance scale; `width` is the largest count. Arrays are ``[T * B, ...]``, one
    target after the other. `stay`, of one target, is its ids and which of them are not drawn anew.
    """
    counts, temperatures, guidance_scale = plan
    b, grid, length = words.shape[0], module.config.grid, module.config.grid**2

    def each(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """A function of a target and its parts of arrays, for all targets."""
        parts = zip(*(x.reshape(len(targets), b, *x.shape[1:]) for x in arrays), strict=True)
        made = [function(target, *part) for target, part in zip(targets, parts, strict=True)]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *made)

    def repeat(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.concatenate([x] * len(targets)), tree)

    keys = jnp.concatenate([sampling.sample_keys(words, target) for target in targets])
    places = repeat(sampling.places(at, grid, grid))
    order = jnp.pad(sampling.random_orders(keys, places), ((0, 0), (0, width)))
    slots = _embed(module, variables, inputs, visible)
    sees_itself = targets[0] in {s.key for s in module.config.encoder} and (counts.shape[0] > 1 or not inputs or stay is not None)
    slots, fixed = (repeat(slots), None) if sees_itself else (slots, repeat(_encode(module, variables, slots, None, guided)))

    def body(state, plan):
        ids, written = state
        step, start, count, temperature = plan
        contexts = fixed
        if sees_itself:
            content, emb = each(lambda target, ids: module.apply(variables, target, ids, method="embed"), ids)
            contexts = _encode(module, variables, slots, _hide(content, emb, ~written), guided)
        if schedule == "roar":
            positions = jax.lax.dynamic_slice_in_dim(order, start, width, axis=1)
            missing = jnp.arange(width) < count
            missing &= ~jnp.take_along_axis(written, positions, axis=1)  # those that stay
        else:
            positions, missing = jnp.broadcast_to(jnp.arange(length), written.shape), ~written
        # Slots that need no token are hidden keys, so that the decoder works as if they were not there (spec 8.3 has no other mask).
        needs_mask = stay is not None or (not even if schedule == "roar" else counts.shape[0] > 1)
        self_mask = jnp.broadcast_to(~missing[:, None, :], (*missing.shape, missing.shape[1])) if needs_mask else None
        queries = each(lambda target, positions: module.apply(variables, target, positions, method="queries"), positions)
        y = [module.apply(variables, queries, *context, self_mask, method="decode") for context in contexts]
        # A step that draws each token once needs no number: windows of a scene may come to a token in different steps.
        drawn = sampling.step_keys(keys, step if schedule == "maskgit" else 0)
        drawn = sampling.place_keys(drawn, jnp.take_along_axis(places, positions, axis=1))

        def draw(target: str, keys: jax.Array, *y: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _sample(keys, _logits(module, variables, target, y, guidance_scale), temperature, **settings)

        new, confidence = each(draw, drawn, *y)
        chosen = missing if schedule == "roar" else missing & _most_confident(confidence, missing, count)
        return _write(ids, written, positions, new, chosen), None

    codes = next(s.codes for s in module.config.decoder if s.key == targets[0])
    state = (jnp.zeros((len(targets) * b, length, *codes), jnp.int32), jnp.zeros((len(targets) * b, length), bool))
    if stay is not None:
        state = tuple(x.reshape(empty.shape).astype(empty.dtype) for x, empty in zip(stay, state, strict=True))
    steps = (jnp.arange(counts.shape[0]), jnp.cumsum(counts) - counts, counts, temperatures)
    (ids, _), _ = jax.lax.scan(body, state, steps)
    return list(ids.reshape(len(targets), b, grid, grid, *codes))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _write_sequence(variables, inputs, visible, words, plan, *, module, target, guided, **settings) -> jax.Array:
    """One sequence stream, token after token -> ids ``[B, L]`` (spec 8.4). Ends at the first sentinel; the rest is padding."""
    _, temperatures, guidance_scale = plan
    b = words.shape[0]
    total = next(s.max_tokens for s in module.config.decoder if s.key == target)
    length = total - 1  # the first place is the input's [S_1]
    keys = sampling.sample_keys(words, target)
    contexts = sequence_contexts(module, variables, inputs, visible, target, b, guided)
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


def sequence_contexts(module, variables, inputs, visible, target: str, batch_size: int, guided: bool = False) -> list[tuple]:
    """`_encode` for a sequence that is to be written, which the encoder sees as its start token (spec 8.4)."""
    own = None
    if target in {s.key for s in module.config.encoder}:
        start = jnp.full((batch_size, 1), START)
        own = _hide(*module.apply(variables, target, start, method="embed"), jnp.zeros(start.shape, bool))
    return _encode(module, variables, _embed(module, variables, inputs, visible), own, guided)


def _embed(module: TerraMind, variables: Variables, inputs: Mapping[str, jax.Array], visible: Mapping[str, jax.Array]) -> list[tuple]:
    """Encoder slots ``(content, emb, hidden)`` of each input; what is not visible and the padding of sequences are hidden."""
    slots = []
    for stream in module.config.encoder:  # in the model's order, so that the caller's does not matter
        if stream.key in inputs:
            value = inputs[stream.key]
            content, emb = module.apply(variables, stream.key, value, method="embed")
            hidden = value == coordinates.PAD if stream.kind == "sequence" else jnp.zeros(content.shape[:2], bool)
            if stream.key in visible:
                hidden = ~visible[stream.key].reshape(hidden.shape)
            slots.append(_hide(content, emb, hidden))
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


def _logits(module: TerraMind, variables: Variables, target: str, y: Sequence[jax.Array], guidance_scale: jax.Array) -> jax.Array:
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


def at_inputs(module: TerraMind, variables: Variables, inputs: Mapping[str, jax.Array]) -> tuple[TerraMind, Variables]:
    """The network for images of the size of these inputs; a ValueError if that is not one."""
    return transformer.at_size(module, variables, _image_size(module, inputs))


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


def _check_visible(visible: Mapping[str, Any], inputs: Mapping[str, jax.Array], encoder: Mapping[str, Stream], patch_size: int) -> dict:
    """`visible` as arrays; a ValueError for one that is no mask of an image input."""
    masks = {key: jnp.asarray(mask) for key, mask in visible.items()}
    for key, mask in masks.items():
        if key not in inputs or encoder[key].kind == "sequence":
            raise ValueError(f"The option visible is given for {key!r}, which is no image among the inputs.")
        side = _side(encoder[key], inputs[key].shape, patch_size) // patch_size
        if mask.dtype != bool or mask.shape != (inputs[key].shape[0], side, side):
            expected = f"bool [{inputs[key].shape[0]}, {side}, {side}], one a patch"
            raise ValueError(f"The option visible of {key!r} is {mask.dtype} of shape {list(mask.shape)}; expected {expected}.")
    return masks


def check(
    module: TerraMind,
    inputs: Mapping[str, Any],
    targets: Sequence[str],
    batch_size: int = 1,
    visible: Mapping[str, Any] | None = None,
    finished: Mapping[str, jax.Array] | None = None,
    only: str | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], int]:
    """Inputs and masks as arrays, and their batch size, `batch_size` where there are none; a ValueError if they do not fit."""
    encoder, decoder = ({s.key: s for s in streams} for streams in (module.config.encoder, module.config.decoder))
    inputs, finished = {key: jnp.asarray(value) for key, value in inputs.items()}, finished or {}
    for role, keys, known in (("input", inputs, encoder), ("target", targets, decoder), ("target", finished, decoder)):
        unknown = [key for key in keys if key not in known]
        if unknown:
            raise ValueError(f"This model has no {role} stream {unknown[0]!r}; it has {', '.join(known)}.")
    both = [key for key in targets if key in inputs and key not in (visible or {})]
    if both:
        raise ValueError(f"Stream {both[0]!r} is both an input and a target; {one_role(encoder[both[0]])}.")
    if len(set(targets)) != len(targets):
        raise ValueError(f"The targets {', '.join(targets)} name a stream twice.")
    if only is not None and only not in targets:
        raise ValueError(f"The option only is {only!r}, which is no target; targets: {', '.join(targets)}.")
    both = [key for key in finished if key in inputs and key not in targets or key == only]
    if both:
        raise ValueError(f"The known tokens are of {both[0]!r}, which is {'to be sampled' if both[0] == only else 'an input'}.")
    if not inputs | finished and targets and targets[0] not in encoder:
        raise ValueError(f"{targets[0]!r} needs at least one input: this model cannot encode it, so there is nothing to start from.")
    sizes = {key: value.shape[0] for key, value in (inputs | finished).items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The inputs differ in batch size: {', '.join(f'{key} {size}' for key, size in sizes.items())}.")
    return inputs, _check_visible(visible or {}, inputs, encoder, module.config.patch_size), next(iter(sizes.values()), batch_size)
