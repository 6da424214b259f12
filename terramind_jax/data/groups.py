"""Masked views, assembled in groups whose selected patches share one buffer a pixel stream.

Everything about a group follows from the position of its first view: which samples, which views, which crops, which masks.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terramind_jax.data import crops, masks, order, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index
from terramind_jax.modalities import IMAGE_SIZE, MODALITIES, PATCH_SIZE, Stream

PADDING = 255  # stream index of an empty slot
FAULT = "S32"  # holds any modality and reason
_INPUTS = ("input_modality", "input_position", "input_id")
_TARGETS = ("target_modality", "target_position", "target_input", "target_id")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How samples become batches.

    ``views_per_sample = k`` masks each loaded sample k times; the views of one sample are `view_window` samples apart. The window must be
    at least the global batch; where it is a multiple of batch size times workers, later views are at hand without reading again, else
    they fall to another worker. They wait in memory, at 128 tokens about 0.15 MB each, never more than ``(k - 1) * view_window`` of them
    over all hosts and workers together.

    The selected patches of `patch_group` consecutive samples share one buffer a pixel stream: larger groups waste less of it. Its rows
    are ``capacity[stream key]`` or, where not given, the expected number plus `capacity_sigmas` standard deviations under the mask config
    and the index's availability, and at least one sample's budget: groups of one never overflow. Patches without room become padding.
    With 128 tokens of 12 streams and alpha 0.5, a view uses 58 rows; groups of 8 declare 136 and drop 0.2 % of the patches, groups of 32
    declare 98 and drop almost none.

    Without `subset_weights` an epoch visits every sample once, so subsets have their natural shares. With them only the subsets named are
    visited: each in epochs of its own, every sample once in each, taking turns in proportion to the weights.
    """

    image_size: int = IMAGE_SIZE
    views_per_sample: int = 1
    view_window: int = 256
    patch_group: int = 1
    capacity: Mapping[str, int] = dataclasses.field(default_factory=dict)
    capacity_sigmas: float = 3.0
    threads: int = 2  # reading at once, in each process
    online_tokens: bool = False  # the device makes the tokens, of whole crops that travel in ``images``; token shards are not looked at
    shuffle_window: int = 0  # 0: any order; else neighbours in the shards are visited together, so many at a time, for remote stores
    subset_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


# ---- what the samples have --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Availability:
    """Which streams each sample has, looked up in the index's own tables so that nothing of its length is copied."""

    index: Index
    inputs: np.ndarray  # [E] columns of (available, has_tokens, never, always)
    targets: np.ndarray  # [T]

    def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        row = np.concatenate([self.index.available[i], self.index.has_tokens[i], [False, True]])
        return row[self.inputs], row[self.targets]

    def patterns(self) -> tuple[np.ndarray, np.ndarray]:
        """One sample of each distinct pattern [P], and the pattern of every sample [n]."""
        codes = np.zeros(len(self.index), np.int64)
        for column in (*self.index.available.T, *self.index.has_tokens.T):
            codes = 2 * codes + column
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        return first, inverse.reshape(-1)


def availability_of(index: Index, encoder: Sequence[Stream], decoder: Sequence[Stream], online_tokens: bool = False) -> Availability:
    """`online_tokens`: what has pixels has tokens."""
    names = list(index.modalities)

    def column(stream: Stream) -> int:
        if stream.kind == "sequence":
            return 2 * len(names) + 1  # every sample is asked for its coordinates when it is read
        if stream.modality not in names:
            return 2 * len(names)
        return names.index(stream.modality) + len(names) * (stream.kind == "tokens" and not online_tokens)

    return Availability(index, np.array([column(s) for s in encoder], int), np.array([column(s) for s in decoder], int))


@dataclasses.dataclass(frozen=True, eq=False)
class Usable:
    """The `samples` [n] that have an input and a target, those of the first subset first; without weights there is one subset, of all.

    `patterns` are (available inputs, available targets, how often they are met), for each pattern of availability.
    """

    samples: np.ndarray
    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    patterns: list


def usable_samples(
    availability: Availability,
    plan: masks.Plan,
    encoder: Sequence[Stream],
    decoder: Sequence[Stream],
    subset_weights: Mapping[str, float] | None = None,
) -> Usable:
    """What a run visits; a ValueError if that is nothing, or a weight is of no use."""
    first, pattern = availability.patterns()
    has = [availability(int(i)) for i in first]
    is_image = np.array([s.kind != "sequence" for s in (*encoder, *decoder)])
    good = np.array([masks.is_possible(plan, *flags) and bool((np.concatenate(flags) & is_image).any()) for flags in has], bool)
    if not good.any():
        inputs, targets = ", ".join(s.key for s in encoder), ", ".join(s.key for s in decoder)
        raise ValueError(
            f"None of the {len(pattern)} samples has both an input among {inputs} and a target among {targets}; token streams need token "
            "shards, made by `tokenize`."
        )
    samples, counts = np.flatnonzero(good[pattern]).astype(np.uint32), np.bincount(pattern, minlength=len(first))
    sizes, weights = (len(samples),), (1,)
    if subset_weights:
        parts = _by_subset(availability.index, samples, subset_weights)
        samples, sizes = np.concatenate(parts), tuple(map(len, parts))
        weights = order.whole_weights([subset_weights[name] for name in sorted(subset_weights)])
        counts = sum(w / len(part) * np.bincount(pattern[part], minlength=len(first)) for w, part in zip(weights, parts, strict=True))
    return Usable(samples, sizes, weights, [(*has[p], counts[p]) for p in np.flatnonzero(good & (counts > 0))])


def _by_subset(index: Index, samples: np.ndarray, weights: Mapping[str, float]) -> list[np.ndarray]:
    """`samples` of each subset that has a weight, the subsets by name."""
    for name in weights:
        if name not in index.subsets:
            raise ValueError(
                f"subset_weights names {name!r}, which is no subset of the shards; expected some of {', '.join(index.subsets)}."
            )
    if left := [name for name in index.subsets if name not in weights]:
        views.warn_once(f"Not visited, as subset_weights does not name them: {', '.join(left)}.")
    parts = [samples[index.subset[samples] == index.subsets.index(name)] for name in sorted(weights)]
    for name, part in zip(sorted(weights), parts, strict=True):
        if not len(part):
            raise ValueError(f"subset_weights names {name!r}, but none of its samples has both an input and a target; leave it out.")
    return parts


def patch_capacity(
    encoder: Sequence[Stream], plan: masks.Plan, patterns: Sequence[tuple[np.ndarray, np.ndarray, float]], config: DataConfig
) -> dict[str, int]:
    """Rows of each pixel stream's buffer for one group, by the rule that `DataConfig` states, rounded up to a multiple of 8.

    `patterns` are those of `Usable`.
    """
    unknown = sorted(set(config.capacity) - {s.key for s in encoder if s.kind == "pixels"})
    if unknown:
        raise ValueError(f"capacity names {unknown[0]!r}, which is no pixel stream of the encoder; expected stream keys.")
    moments = [masks.budget_moments(plan, inputs, targets) for inputs, targets, _ in patterns]
    weights = np.array([count for *_, count in patterns], float)
    mean, square = (np.average([m[j] for m in moments], axis=0, weights=weights) for j in (0, 1))
    group, limit = config.patch_group, min(plan.input_tokens, plan.positions)
    rows = np.ceil(group * mean + config.capacity_sigmas * np.sqrt(group * np.maximum(square - mean**2, 0)))
    rows = np.where(mean > 0, np.clip(rows, limit, group * limit), 1)
    return {s.key: int(config.capacity.get(s.key, -(-rows[e] // 8) * 8)) for e, s in enumerate(encoder) if s.kind == "pixels"}


# ---- masked views in groups -------------------------------------------------------------------------------------------------


def tokenized(streams: Sequence[Stream], index: Index | None) -> tuple[str, ...]:
    """The modalities of which tokens are made, where they are made online: those of token streams, as far as the index has pixels."""
    names = {s.modality: None for s in streams if s.kind == "tokens"}
    if index is None:
        return tuple(sorted(names))
    there = {m for m, some in zip(index.modalities, index.available.any(0), strict=True) if some}
    return tuple(sorted(there & set(names)))


def empty_images(names: Sequence[str], image_size: int, size: int) -> dict[str, dict[str, np.ndarray]]:
    """What `empty_group` lacks for tokens made online: a group's whole crops."""
    shapes = {m: (size, image_size, image_size, len(MODALITIES[m].bands)) for m in names}
    return {"images": {m: np.zeros(shape, views.stored_dtype(m)) for m, shape in shapes.items()}} if names else {}


def empty_group(
    encoder: Sequence[Stream], decoder: Sequence[Stream], plan: masks.Plan, capacity: Mapping[str, int], size: int
) -> dict[str, Any]:
    """The arrays of a group of `size` views before anything is put in: shapes and types of all that travels to a device."""
    n, m = plan.input_tokens, plan.target_tokens
    pixels = [s for s in encoder if s.kind == "pixels"]
    shapes = {s.key: (1, capacity[s.key], PATCH_SIZE**2 * s.channels) for s in pixels}
    return {
        "input_modality": np.full((size, n), PADDING, np.uint8),
        "input_position": np.zeros((size, n), np.uint16),
        "input_id": np.zeros((size, n), np.int32),
        "patches": {s.key: np.zeros(shapes[s.key], views.stored_dtype(s.modality)) for s in pixels},
        "target_modality": np.full((size, m), PADDING, np.uint8),
        "target_position": np.zeros((size, m), np.uint16),
        "target_input": np.zeros((size, m), np.int32),
        "target_id": np.zeros((size, m), np.int32),
        "sample": np.full(size, -1, np.int64),
        "overflow": np.zeros(size, np.int32),
        "bad": np.ones(size, bool),
        "fault": np.zeros(size, FAULT),
        **views.empty_codes(encoder, decoder, (size, n), (size, m)),
    }


def template(
    encoder: Sequence[Stream], decoder: Sequence[Stream], config: DataConfig, mask_config: masks.MaskConfig, index: Index | None = None
) -> dict[str, Any]:
    """An empty group of the batches that these settings give; without an `index`, as if every sample had every stream."""
    plan, patterns = _plan_and_patterns(encoder, decoder, config, mask_config, index)
    group = empty_group(encoder, decoder, plan, patch_capacity(encoder, plan, patterns, config), config.patch_group)
    names = tokenized((*encoder, *decoder), index) if config.online_tokens else ()
    return group | empty_images(names, config.image_size, config.patch_group)


def filled_slots(
    encoder: Sequence[Stream], decoder: Sequence[Stream], config: DataConfig, mask_config: masks.MaskConfig, index: Index | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean number of a view's slots that hold a token, by stream: ``(inputs, targets)``. Arguments as `template`."""
    plan, patterns = _plan_and_patterns(encoder, decoder, config, mask_config, index)
    counts = [masks.mean_counts(plan, inputs, targets) for inputs, targets, _ in patterns]
    weights = [samples for *_, samples in patterns]
    inputs, targets = (np.average([pair[j] for pair in counts], axis=0, weights=weights).tolist() for j in (0, 1))
    return {s.key: n for s, n in zip(encoder, inputs, strict=True)}, {s.key: n for s, n in zip(decoder, targets, strict=True)}


def _plan_and_patterns(
    encoder: Sequence[Stream], decoder: Sequence[Stream], config: DataConfig, mask_config: masks.MaskConfig, index: Index | None
) -> tuple[masks.Plan, list]:
    """How views are masked, and the patterns of availability as `usable_samples` gives them; without an `index`, all of everything."""
    encoder, decoder = (_at_size(streams, config.image_size) for streams in (encoder, decoder))
    plan = masks.plan_masks(encoder, decoder, mask_config)
    if index is None:
        return plan, [(np.ones(len(encoder), bool), np.ones(len(decoder), bool), 1)]
    available = availability_of(index, encoder, decoder, config.online_tokens)
    return plan, usable_samples(available, plan, encoder, decoder, config.subset_weights).patterns


class _Memo:
    """Later views of samples already read, until they are asked for. A miss only means reading again."""

    def __init__(self, limit: int):
        self.limit, self.views, self.lock = limit, collections.OrderedDict(), threading.Lock()

    def __reduce__(self):
        return _Memo, (self.limit,)  # workers begin with an empty one

    def pop(self, key: tuple[int, int]) -> views.View | None:
        with self.lock:
            return self.views.pop(key, None)

    def put(self, key: tuple[int, int], view: views.View) -> None:
        with self.lock:
            self.views[key] = view
            while len(self.views) > self.limit:
                self.views.popitem(last=False)


class ViewGroups:
    """Maps the first position of a group to the group's arrays: what Grain calls, in threads and in workers."""

    def __init__(
        self,
        index: Index,
        encoder: Sequence[Stream],
        decoder: Sequence[Stream],
        config: DataConfig,
        mask_config: masks.MaskConfig,
        *,
        seed: int,
        train: bool,
        readers: int = 1,
    ):
        """`readers` is how many processes, over all hosts, share the views among them."""
        self.index, self.config, self.seed, self.train = index, config, seed, train
        self.encoder, self.decoder = (_at_size(streams, config.image_size) for streams in (encoder, decoder))
        self.plan = masks.plan_masks(self.encoder, self.decoder, mask_config)
        self.available = availability_of(index, self.encoder, self.decoder, config.online_tokens)
        self.tokenized = tokenized((*encoder, *decoder), index) if config.online_tokens else ()
        usable = usable_samples(self.available, self.plan, self.encoder, self.decoder, config.subset_weights if train else None)
        self.samples, self.sizes, self.weights = usable.samples, usable.sizes, usable.weights
        if not train:
            self.samples = _mixed(self.samples, index.subset[self.samples])
        if train and config.shuffle_window:
            parts = np.split(self.samples, np.cumsum(self.sizes)[:-1])
            self.samples = np.concatenate([index.in_storage_order(part) for part in parts])
            index.read_nearby(config.shuffle_window, readers)
        self.capacity = patch_capacity(self.encoder, self.plan, usable.patterns, config)
        self.views = config.views_per_sample if train else 1
        self.memo = _Memo(-(-(self.views - 1) * config.view_window // readers))

    def __call__(self, position: int) -> dict[str, Any]:
        places = [self._place(position + g) for g in range(self.config.patch_group)]
        group = empty_group(self.encoder, self.decoder, self.plan, self.capacity, self.config.patch_group)
        group |= empty_images(self.tokenized, self.config.image_size, self.config.patch_group)
        used = collections.Counter()
        for g, place in enumerate(places):
            if place is not None:
                group["sample"][g] = self.samples[place.rank]
                self._put(group, g, self._view(place), used)
        return group

    def _place(self, position: int) -> order.Place | None:
        if self.train:
            window, near = self.config.view_window, self.config.shuffle_window
            return order.place(position, self.sizes, self.seed, self.views, window, near, self.weights)
        return order.Place(position, 0, position, 0) if position < len(self.samples) else None

    def _view(self, place: order.Place) -> views.View:
        found = self.memo.pop((place.slot, place.view))
        if found is None:
            found, *later = self._load(place)
            for view, value in enumerate(later, place.view + 1):
                self.memo.put((place.slot, view), value)
        return found

    def _load(self, place: order.Place) -> list[views.View]:
        """The view at `place` and all later ones of its sample. All masks are drawn before anything is read."""
        i = int(self.samples[place.rank])
        has = self.available(i)
        drawn = [masks.draw(self.plan, *has, order.generator("mask", self.seed, place.epoch, i, v)) for v in range(place.view, self.views)]
        variant = variant_of(self.seed, place.epoch, i, self.train)
        sample = views.Sample(self.index, i, variant, self.config.image_size, self.config.online_tokens)
        return [self._fill(sample, mask) for mask in drawn]

    def _fill(self, sample: views.Sample, mask: masks.Masks) -> views.View:
        """Each view is good or bad by itself: it must not matter whether the one before it was made in the same go."""
        try:
            return views.fill(sample, mask, self.encoder, self.decoder)
        except (DataError, OSError) as error:
            views.warn_once(f"Skipped: {error}")
            return views.bad(error)

    def _put(self, group: dict[str, Any], g: int, view: views.View, used: collections.Counter) -> None:
        """Writes one view into row `g`. Patches go behind those of earlier rows; what no longer fits, the last ones, is dropped."""
        inputs, keep = view.inputs.copy(), np.ones(view.inputs.shape[1], bool)
        for e, stream in enumerate(self.encoder):
            if stream.key not in view.patches:
                continue
            at = np.flatnonzero(inputs[0] == e)
            begin = used[stream.key]
            end = min(begin + len(at), self.capacity[stream.key])
            group["patches"][stream.key][0, begin:end] = view.patches[stream.key][: end - begin]
            inputs[2, at[: end - begin]] = np.arange(begin, end)
            keep[at[end - begin :]] = False
            used[stream.key] = end
        for name, image in view.images.items():
            group["images"][name][g] = image
        group["bad"][g], group["fault"][g], group["overflow"][g] = bool(view.fault), view.fault, np.count_nonzero(~keep)
        for names, columns in ((_INPUTS, inputs[:, keep]), (_TARGETS, view.targets)):
            for name, column in zip(names, columns, strict=True):
                group[name][g, : len(column)] = column
        for name, codes in view.codes.items():
            codes = codes[keep] if name == "input_codes" else codes
            group[name][g, : len(codes)] = codes


def _mixed(samples: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """`samples` of several subsets, evenly mixed, those of each in their order.

    The first of each come first, so that an evaluation that stops early has seen some of all.
    """
    turn = np.empty(len(samples))
    for one in np.unique(subset):
        at = np.flatnonzero(subset == one)
        turn[at] = np.arange(len(at)) / len(at)
    return samples[np.argsort(turn, kind="stable")]


def _at_size(streams: Sequence[Stream], image_size: int) -> tuple[Stream, ...]:
    patches = (image_size // PATCH_SIZE) ** 2
    return tuple(s if s.kind == "sequence" else dataclasses.replace(s, max_tokens=patches) for s in streams)


def variant_of(seed: int, epoch: int, sample: int, train: bool) -> int:
    """The crop of a sample: pixels and tokens, transformer and tokenizer, all views of an epoch share it."""
    return int(order.generator("crop", seed, epoch, sample).integers(crops.VARIANTS)) if train else 0
