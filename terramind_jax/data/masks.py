"""Which tokens a training view shows and which it must predict: multimodal masking after 4M (spec 9.2).

Masks are drawn in NumPy, before anything is read, from what a sample has. They travel as index arrays. One difference from 4M: a
sequence's target budget counts predictions, not ids, so a budget of four teaches all of latitude, longitude, EOS and the closing sentinel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax import coordinates
from terramind_jax.modalities import MODALITIES, STREAMS, Stream

_ALPHA_OFF = 1e-9  # 4M clamps alphas to this; here a stream at or below it is left out exactly
_SEQUENCE_LENGTHS = {"coords": 3}  # latitude, longitude, EOS
_BITS = 16  # a slot while drawing: (stream << 16) + position
_KEEP = ("random", "all", "binary")


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """How budgets are drawn. Budgets count tokens of one view; the defaults are 4M's.

    `input_alphas` and `target_alphas` hold one entry a mixture; a single entry serves all and need not stand in a tuple. An entry is one
    Dirichlet alpha for every stream, or a mapping from stream key, modality name, kind ("pixels", "tokens", "sequence") or "default" to
    alpha, the first that applies; what is not named has alpha 0 and is never drawn. `mixture_weights` need not sum to one; empty means
    uniform. `sequence_keep` says how much of a sequence its input keeps, for all mixtures or one each: "random" (a uniform share), "all"
    or "binary".

    Budgets are clipped to what a stream holds, as in 4M: with even alphas `coords`, of four tokens, leaves an eighth of the target
    slots empty; a small alpha for it, ``{"default": 0.5, "coords": 0.05}``, fills them.
    """

    input_tokens: int = 128
    target_tokens: int = 128
    input_alphas: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] = (0.5,)
    target_alphas: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] = (0.5,)
    mixture_weights: Sequence[float] = ()
    sequence_keep: str | Sequence[str] = "random"


@dataclasses.dataclass(frozen=True)
class Masks:
    """One view's tokens, sorted by stream, then position; at most the budgets, never padded.

    `*_stream` uint8 indexes the encoder's or decoder's streams. `*_source` says where the id comes from: images, the patch index;
    sequences, an index into the sample's ids, or -i for sentinel [S_i] (`resolve` turns them into ids). `target_previous` is the source of
    the teacher-forced id, sequences only.
    """

    input_stream: np.ndarray
    input_position: np.ndarray
    input_source: np.ndarray
    target_stream: np.ndarray
    target_position: np.ndarray
    target_source: np.ndarray
    target_previous: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a set of streams and a `MaskConfig` that does not change from draw to draw."""

    input_tokens: int
    target_tokens: int
    input_alphas: np.ndarray  # [K, E]
    target_alphas: np.ndarray  # [K, T]
    weights: np.ndarray  # [K]
    keep: tuple[str, ...]  # [K]
    input_limit: np.ndarray  # [E] max_tokens
    target_limit: np.ndarray  # [T]
    positions: int  # patches of an image stream
    raster: np.ndarray  # [rows, positions] each row 0, 1, 2, ...
    input_of_row: np.ndarray  # [rows] the image streams of encoder and decoder together; -1 where the encoder lacks one
    target_of_row: np.ndarray  # [rows]
    sequences: tuple[tuple[int, int, int], ...]  # (encoder index or -1, decoder index or -1, length)


# ---- preparing --------------------------------------------------------------------------------------------------------------


def plan_masks(encoder: Sequence[Stream], decoder: Sequence[Stream], config: MaskConfig) -> Plan:
    """Checks `config` against the streams and lays it out as arrays. Raises ValueError for a config that cannot work."""
    if config.input_tokens < 1 or config.target_tokens < 1:
        raise ValueError(f"Budgets are {config.input_tokens} input and {config.target_tokens} target tokens; both must be at least 1.")
    given_in, given_out, keep = _listed(config.input_alphas), _listed(config.target_alphas), _listed(config.sequence_keep)
    mixtures = max(len(given_in), len(given_out), len(config.mixture_weights), len(keep))
    if unknown := set(keep) - set(_KEEP):
        raise ValueError(f"sequence_keep holds {unknown.pop()!r}; expected one of {', '.join(_KEEP)}.")
    images = list(dict.fromkeys(s.key for s in (*encoder, *decoder) if s.kind != "sequence"))
    sizes = {s.max_tokens for s in (*encoder, *decoder) if s.kind != "sequence"}
    if len(sizes) > 1:
        raise ValueError(f"Image streams have {sorted(sizes)} positions; all must have the same number.")
    encoder_keys, decoder_keys = [s.key for s in encoder], [s.key for s in decoder]
    return Plan(
        input_tokens=config.input_tokens,
        target_tokens=config.target_tokens,
        input_alphas=_alphas("input_alphas", given_in, encoder, mixtures),
        target_alphas=_alphas("target_alphas", given_out, decoder, mixtures),
        weights=_weights(config.mixture_weights, mixtures),
        keep=_one_each("sequence_keep", keep, mixtures),
        input_limit=np.array([s.max_tokens for s in encoder]),
        target_limit=np.array([s.max_tokens for s in decoder]),
        positions=(positions := max(sizes, default=0)),
        raster=np.tile(np.arange(positions), (max(len(images), 1), 1)),
        input_of_row=_lookup(images, encoder_keys),
        target_of_row=_lookup(images, decoder_keys),
        sequences=_sequences(encoder, decoder),
    )


def _listed(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int | float | str) or hasattr(value, "items") else tuple(value)


def _lookup(keys: list[str], table: list[str]) -> np.ndarray:
    return np.array([table.index(k) if k in table else -1 for k in keys], int)


def _one_each(name: str, values: Sequence[Any], mixtures: int) -> tuple[Any, ...]:
    if len(values) not in {1, mixtures}:
        raise ValueError(f"{name} has {len(values)} entries; expected 1 or one for each of the {mixtures} mixtures.")
    return tuple(values) * (mixtures // len(values))


def _weights(weights: Sequence[float], mixtures: int) -> np.ndarray:
    array = np.asarray(_one_each("mixture_weights", weights or (1.0,), mixtures), float)
    if (array < 0).any() or not array.sum() > 0:
        raise ValueError(f"mixture_weights are {tuple(weights)}; expected none negative and a positive sum.")
    return array


def _alphas(name: str, mixtures: Sequence[Any], streams: Sequence[Stream], count: int) -> np.ndarray:
    known = {"default", "pixels", "tokens", "sequence", *STREAMS, *MODALITIES} | {s.key for s in streams} | {s.modality for s in streams}
    rows = []
    for mixture in _one_each(name, mixtures, count):
        table = {"default": float(mixture)} if isinstance(mixture, int | float) else dict(mixture.items())
        if unknown := sorted(set(table) - known):
            raise ValueError(f"{name} names {unknown[0]!r}, which is no stream, modality or kind; known: {', '.join(sorted(known))}.")
        order = [(s.key, s.modality, s.kind, "default") for s in streams]
        rows.append([next((float(table[n]) for n in names if n in table), 0.0) for names in order])
    array = np.array(rows)
    if not (array > _ALPHA_OFF).any(axis=1).all():
        raise ValueError(f"{name} has a mixture without a positive alpha for any of the streams; give at least one.")
    return np.where(array > _ALPHA_OFF, array, 0.0)


def _sequences(encoder: Sequence[Stream], decoder: Sequence[Stream]) -> tuple[tuple[int, int, int], ...]:
    found = []
    for key in dict.fromkeys(s.key for s in (*encoder, *decoder) if s.kind == "sequence"):
        if key not in _SEQUENCE_LENGTHS:
            raise ValueError(f"Sequence stream {key!r} cannot be masked; known sequences: {', '.join(_SEQUENCE_LENGTHS)}.")
        at = [next((i for i, s in enumerate(streams) if s.key == key), -1) for streams in (encoder, decoder)]
        found.append((at[0], at[1], _SEQUENCE_LENGTHS[key]))
    return tuple(found)


# ---- drawing ----------------------------------------------------------------------------------------------------------------


def draw(plan: Plan, available_inputs: np.ndarray, available_targets: np.ndarray, rng: np.random.Generator) -> Masks:
    """One view's masks. Empty when no mixture has both an input and a target among the sample's streams."""
    cumulative, mixtures = _mixtures(plan, available_inputs.tobytes(), available_targets.tobytes())
    k = int((cumulative > rng.random() * cumulative[-1]).argmax())
    input_alphas, target_alphas = mixtures[k]
    input_budget = np.minimum(_budget(input_alphas, plan.input_tokens, rng), plan.input_limit)
    target_budget = np.minimum(_budget(target_alphas, plan.target_tokens, rng), plan.target_limit)
    image_inputs, image_targets = _image_slots(plan, input_budget, target_budget, rng)
    inputs, targets, sequences = [image_inputs], [image_targets], []
    for e, t, length in plan.sequences:
        budgets = [int(budget[i]) if i >= 0 else 0 for budget, i in ((input_budget, e), (target_budget, t))]
        kept, predicted = span_mask(length, *budgets, plan.keep[k], rng)
        sequences.append((e, kept, t, predicted[1:], predicted[:-1]))  # the decoder sees one id and predicts the next (4.2.3)
        inputs.append((e << _BITS) + np.arange(len(kept)))
        targets.append((t << _BITS) + np.arange(max(len(predicted) - 1, 0)))
    return _masks(np.sort(np.concatenate(inputs)), np.sort(np.concatenate(targets)), sequences)


@functools.lru_cache(maxsize=4096)  # a data set has a handful of patterns of availability
def _mixtures(plan: Plan, inputs: bytes, targets: bytes) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Cumulative weights [K] of the mixtures that are possible for a sample, and the alphas of what it has, per mixture."""
    input_alphas = plan.input_alphas * np.frombuffer(inputs, bool)
    target_alphas = plan.target_alphas * np.frombuffer(targets, bool)
    possible = input_alphas.any(axis=1) & target_alphas.any(axis=1)
    alphas = [(i * p, t * p) for i, t, p in zip(input_alphas, target_alphas, possible, strict=True)]
    return (plan.weights * possible).cumsum(), alphas


def is_possible(plan: Plan, available_inputs: np.ndarray, available_targets: np.ndarray) -> bool:
    """Whether any mixture finds both an input and a target."""
    return bool(_mixtures(plan, available_inputs.tobytes(), available_targets.tobytes())[0][-1] > 0)


def budget_moments(plan: Plan, available_inputs: np.ndarray, available_targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square [E] of the input budgets of such a sample, for sizing buffers.

    A Dirichlet share has mean p = a / A and variance p (1 - p) / (A + 1), with A the sum of alphas.
    """
    cumulative, mixtures = _mixtures(plan, available_inputs.tobytes(), available_targets.tobytes())
    chance = np.diff(cumulative, prepend=0) / cumulative[-1]
    alphas = np.stack([inputs for inputs, _ in mixtures])
    total = np.maximum(alphas.sum(axis=1, keepdims=True), _ALPHA_OFF)
    share = alphas / total
    mean = plan.input_tokens * share
    square = mean**2 + plan.input_tokens**2 * share * (1 - share) / (total + 1)
    return chance @ mean, chance @ square


def mean_counts(plan: Plan, available_inputs: np.ndarray, available_targets: np.ndarray, draws: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Mean number of inputs [E] and of targets [T] that a view of such a sample really has, over `draws` of them.

    Fewer than the budgets: a short sequence seldom uses up its share, and inputs and targets of one stream exclude each other.
    """
    rng = np.random.default_rng(0)
    views = [draw(plan, available_inputs, available_targets, rng) for _ in range(draws)]
    inputs, targets = (np.concatenate([getattr(view, name) for view in views]) for name in ("input_stream", "target_stream"))
    return np.bincount(inputs, minlength=len(available_inputs)) / draws, np.bincount(targets, minlength=len(available_targets)) / draws


def _budget(alphas: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """`total` tokens over the streams with a positive alpha: floor of one Dirichlet draw, the rest by argmax of fresh ones (9.2.3)."""
    budget = np.zeros(len(alphas), int)
    active = alphas.nonzero()[0]
    if not len(active):
        return budget
    counts = (rng.dirichlet(alphas[active]) * total).astype(int)
    rest = total - int(counts.sum())
    if rest > 0:
        counts += np.bincount(rng.dirichlet(alphas[active], rest).argmax(axis=1), minlength=len(active))
    budget[active] = counts
    return budget


def _image_slots(plan: Plan, inputs: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Codes (stream << 16) + position of the image inputs and targets, from budgets a stream.

    One permutation a stream: its first ranks are inputs, the next targets, so the two are disjoint (9.2.5).
    """
    end = np.where(plan.input_of_row >= 0, inputs[plan.input_of_row], 0)
    stop = np.minimum(end + np.where(plan.target_of_row >= 0, targets[plan.target_of_row], 0), plan.positions)
    active = stop.nonzero()[0]
    position, rank = plan.raster[: len(active)].copy(), plan.raster[0]
    rng.permuted(position, axis=1, out=position)
    is_input = rank < end[active, None]
    is_target = (rank < stop[active, None]) & ~is_input
    codes_in, codes_out = position + (plan.input_of_row << _BITS)[active, None], position + (plan.target_of_row << _BITS)[active, None]
    return codes_in[is_input], codes_out[is_target]


def _masks(inputs: np.ndarray, targets: np.ndarray, sequences: list[tuple]) -> Masks:
    """Sorted codes -> arrays; the sources of images are their positions, those of sequences are filled in."""
    streams = [(codes >> _BITS).astype(np.uint8) for codes in (inputs, targets)]
    positions = [codes & (2**_BITS - 1) for codes in (inputs, targets)]
    source, target, previous = positions[0].copy(), positions[1].copy(), np.zeros(len(targets), int)
    for e, kept, t, predicted, given in sequences:
        if kept:
            source[streams[0] == e] = kept
        if predicted:
            target[streams[1] == t], previous[streams[1] == t] = predicted, given
    return Masks(streams[0], positions[0], source, streams[1], positions[1], target, previous)


# ---- sequences --------------------------------------------------------------------------------------------------------------


def span_mask(length: int, input_budget: int, target_budget: int, keep: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Span masking with sentinels (9.2.6): sources of the input and of the target of a sequence of `length` ids.

    Every maximal run of dropped ids becomes one sentinel in the input and follows the same sentinel in the target, which ends with one
    more. The input fits its budget by dropping more; the target fits by starting at a later sentinel or ending early. The target has one
    id more than it has predictions.
    """
    chance = rng.random()
    probability = {"random": chance, "all": 1.0, "binary": float(chance < 0.5)}[keep] if input_budget else 0.0
    inputs, targets = _split(rng.random(length) < probability)
    while len(inputs) > input_budget > 0:
        probability *= 0.9
        inputs, targets = _split(rng.random(length) < probability)
    return inputs if input_budget else [], _fit(targets, target_budget, rng)


def _split(kept: np.ndarray) -> tuple[list[int], list[int]]:
    inputs, targets, sentinel, inside = [], [], 0, False
    for i, keep in enumerate(kept.tolist()):
        if keep:
            inputs.append(i)
        else:
            if not inside:
                sentinel += 1
                inputs.append(-sentinel)
                targets.append(-sentinel)
            targets.append(i)
        inside = not keep
    return inputs, [*targets, -sentinel - 1]


def _fit(targets: list[int], budget: int, rng: np.random.Generator) -> list[int]:
    """At most `budget` predictions, that is `budget` + 1 ids, beginning at a sentinel."""
    if budget == 0 or len(targets) <= budget + 1:
        return targets if budget else []
    starts = [i for i, source in enumerate(targets) if source < 0][:-1]
    start = starts[int(rng.integers(len(starts)))]
    if len(targets) - start <= budget:  # a short tail: take the longest that fits
        start = next(s for s in starts if len(targets) - s <= budget + 1)
    return targets[start : start + budget + 1]


def resolve(source: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Sources of a sequence -> token ids: an index into `ids`, or -i for the sentinel [S_i]."""
    return np.where(source >= 0, np.asarray(ids)[np.maximum(source, 0)], coordinates.SENTINEL - source)
