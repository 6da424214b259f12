"""Batches: from an index of shards to the arrays of a training step, in an order that one integer describes.

`batches` feeds the transformer: masked views, of which only the selected patches and ids travel, in stored 8- and 16-bit types.
`image_batches` feeds a tokenizer with whole crops, `variant_images` the tokenizing of a split. A sample that cannot be read keeps its
slot, empty and marked ``bad``; shapes never change. Grain reads ahead, in threads of this process or in `workers` processes.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from terramind_jax import modalities
from terramind_jax.data import crops, masks, order, views
from terramind_jax.data.errors import DataError, fault, reading
from terramind_jax.data.groups import FAULT, PADDING, DataConfig, ViewGroups, variant_of
from terramind_jax.data.index import Index
from terramind_jax.modalities import IMAGE_SIZE, PATCH_SIZE, Stream

__all__ = ["PADDING", "DataConfig", "batches", "image_batches", "iterate", "make_dataset", "variant_images"]

_ENDLESS = 2**48


# ---- masked views for the transformer ---------------------------------------------------------------------------------------


def make_dataset(
    index: Index,
    encoder: Sequence[Stream],
    decoder: Sequence[Stream],
    data_config: DataConfig,
    mask_config: masks.MaskConfig,
    *,
    batch_size: int,
    consumed: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    seed: int = 0,
    train: bool = True,
) -> grain.MapDataset:
    """The batches of `batches` by number: ``dataset[0]`` is the one at position `consumed`."""
    check_sizes(data_config, batch_size, consumed, host, hosts, train)
    _check_samples(index, (*encoder, *decoder), data_config)
    readers = hosts * max(workers, 1)
    groups = ViewGroups(index, encoder, decoder, data_config, mask_config, seed=seed, train=train, readers=readers)
    length = _length(len(groups.samples), batch_size, consumed, train)
    starts = grain.MapDataset.range(consumed, consumed + length, data_config.patch_group)
    return starts[host::hosts].map(groups).batch(batch_size // hosts // data_config.patch_group, batch_fn=_concatenate)


def batches(
    index: Index,
    encoder: Sequence[Stream],
    decoder: Sequence[Stream],
    data_config: DataConfig,
    mask_config: masks.MaskConfig,
    *,
    batch_size: int,
    consumed: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    seed: int = 0,
    train: bool = True,
) -> Iterator[dict[str, Any]]:
    """This host's share of global batches of `batch_size` masked views, beginning at position `consumed`; endless when `train`.

    Each batch is a dict of NumPy arrays, with B views of this host, N input and M target slots, groups of G views:

    - ``input_modality`` uint8 [B, N] index into `encoder`, 255 in padding; ``input_position`` uint16 patch index (row-major), or place
      in the kept sequence; ``input_id`` int32 token id, or for pixels the row in the patch buffer of the view's group
    - ``patches`` {stream key: stored dtype [B / G, capacity, 16 * 16 * C]}, in (row, column, channel) order
    - ``target_modality``, ``target_position``, ``target_id`` [B, M] likewise for `decoder`; ``target_input`` the id before, sequences only
    - ``input_codes``, ``target_codes`` unsigned [B, N or M, K], only where a stream has several codebooks, K in the one that has most: the
      codes of slots of such streams, whose ids are zeros
    - ``images`` {modality: stored dtype [B, S, S, C]} whole crops, only with ``online_tokens``; the ids of token streams are zero then
    - ``sample`` int64 [B] position in the index; ``overflow`` int32 [B] patches that found no room; ``bad`` bool [B] could not be read
    - ``fault`` bytes [B] why: modality and reason, as `errors.fault` has them; empty where nothing is wrong

    ``train=False`` passes once over the samples in the index's order, subsets evenly mixed, with the centre crop and one fixed mask each;
    the last batch is filled up with slots of ``sample`` -1, ``bad``. Samples without any input or target are not visited. Raises
    ValueError for sizes that do not fit together, tiles smaller than the crop, and an index without inputs or targets.
    """
    step = batch_size * max(workers, 1)
    if train and data_config.views_per_sample > 1 and data_config.view_window % step:
        views.warn_once(
            f"view_window {data_config.view_window} is no multiple of batch_size x workers = {step}: a sample is read again for later "
            "views, so change one of the three."
        )
    position = {"batch_size": batch_size, "consumed": consumed, "host": host, "hosts": hosts, "workers": workers}
    dataset = make_dataset(index, encoder, decoder, data_config, mask_config, **position, seed=seed, train=train)
    return iterate(dataset, workers, data_config.threads)


def check_sizes(config: DataConfig, batch_size: int, consumed: int, host: int, hosts: int, train: bool) -> None:
    """A ValueError for sizes of which no batches can be made."""
    if config.image_size < PATCH_SIZE or config.image_size % PATCH_SIZE:
        raise ValueError(f"image_size is {config.image_size}; expected a multiple of the patch size {PATCH_SIZE}.")
    if min(config.views_per_sample, config.patch_group, batch_size) < 1 or consumed < 0 or not 0 <= host < hosts:
        raise ValueError(
            f"views_per_sample {config.views_per_sample}, patch_group {config.patch_group} and batch_size {batch_size} must be at least 1, "
            f"consumed {consumed} at least 0, and host {host} one of {hosts}."
        )
    if batch_size % (hosts * config.patch_group):
        raise ValueError(f"batch_size {batch_size} is no multiple of hosts x patch_group = {hosts} x {config.patch_group}.")
    if train and config.views_per_sample > 1 and config.view_window < batch_size:
        raise ValueError(
            f"view_window {config.view_window} is smaller than batch_size {batch_size}: two views of a sample would meet in one batch."
        )


def _check_samples(index: Index, streams: Sequence[Stream], config: DataConfig) -> None:
    """Reads the first sample of each modality, so that what is wrong with all of them is said at once and not skipped for ever."""
    for stream in sorted({s for s in streams if s.modality in index.modalities}, key=lambda s: (s.kind, s.modality)):
        pixels = stream.kind == "pixels" or config.online_tokens
        table = index.available if pixels else index.has_tokens
        there = table[:, index.modalities.index(stream.modality)]
        if not there.any():
            continue
        if pixels:
            _check_tile(index, int(there.argmax()), stream.modality, config.image_size)
        else:
            _check_tokens(index, int(there.argmax()), stream, config.image_size)


def _check_tile(index: Index, i: int, modality: str, image_size: int) -> None:
    try:
        height, width, _ = index.read(i, modality).shape
    except (DataError, OSError):
        return  # one sample that cannot be read is met again, and skipped, in training
    if min(height, width) < image_size:
        raise ValueError(f"Tiles of {modality} are {height}x{width} pixels, smaller than image_size {image_size}.")


def _check_tokens(index: Index, i: int, stream: Stream, image_size: int) -> None:
    try:
        grid = index.tokens(i, stream.modality)
    except (DataError, OSError):
        return
    expected = views.tokens_shape(stream, image_size)
    if grid.shape != expected:
        raise ValueError(f"Tokens of {stream.modality} have shape {grid.shape}, expected {expected}; tokenize for image_size {image_size}.")
    try:
        views.check_ids(grid, stream, f"Sample {index.keys[i]!r}")
    except DataError as error:
        raise ValueError(str(error)) from error


def _length(samples: int, batch_size: int, consumed: int, train: bool) -> int:
    remaining = _ENDLESS if train else max(samples - consumed, 0)
    return -(-remaining // batch_size) * batch_size


def _concatenate(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [group[name] for group in groups] for name in groups[0]}
    return {name: _concatenate(column) if isinstance(column[0], dict) else np.concatenate(column) for name, column in columns.items()}


def iterate(dataset: grain.MapDataset, workers: int, threads: int) -> Iterator[dict[str, Any]]:
    """The elements in order, read ahead by `workers` processes (0: this one) with so many threads each."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
    elements = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain 0.2.18 looks at flags that only an absl program has parsed
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        elements = elements.mp_prefetch(processes, worker_init_fn=_outlive_sigterm)
    return iter(elements)


def _outlive_sigterm(worker: int, workers: int) -> None:
    """SIGTERM may go to all processes of a job, but the run needs its data workers until it has saved; Grain ends them otherwise."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: None if os.getppid() == parent else os._exit(1))


# ---- whole crops for tokenizers ---------------------------------------------------------------------------------------------


def image_batches(
    index: Index,
    modality: str,
    *,
    batch_size: int,
    seed: int = 0,
    consumed: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    image_size: int = IMAGE_SIZE,
    train: bool = True,
    threads: int = 2,
    clear: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of whole crops: ``{"image": [B, S, S, C] stored dtype, "bad": bool [B], "fault": bytes [B], "sample": int64 [B]}``.

    Only samples that have the modality are visited. Order, position, crops (any of the ten, one a sample and epoch) and ``train=False``
    are as in `batches`, but that subsets are not mixed; unreadable images are zeros, marked bad. With `clear` there is
    ``"clear": bool [B, S, S]`` besides, which pixels are clear of clouds: none of a sample that has no cloud mask.
    """
    check_sizes(DataConfig(), batch_size, consumed, host, hosts, train)  # whole crops may have any side
    images = _Images(index, modality, _having(index, modality, image_size), seed, image_size, train, clear)
    positions = grain.MapDataset.range(consumed, consumed + _length(len(images.samples), batch_size, consumed, train))
    return iterate(positions[host::hosts].map(images).batch(batch_size // hosts), workers, threads)


def variant_images(
    index: Index, modality: str, *, image_size: int = IMAGE_SIZE, samples: Sequence[int] | None = None, workers: int = 0, threads: int = 2
) -> Iterator[dict[str, Any]]:
    """Every crop variant of every sample that has `modality`, in the index's order, or of `samples` in theirs: what tokenizing needs.

    Yields ``{"sample": int, "images": [U, S, S, C] stored dtype, "inverse": int [10], "bad": bool}``: variant v is
    ``images[inverse[v]]``, so each distinct crop is there once (two in a tile that is no larger than the crop). Bad samples have U = 0.
    """
    having = _having(index, modality, image_size)
    wanted = having if samples is None else np.asarray(samples, int)
    if len(absent := np.setdiff1d(wanted, having)):
        raise ValueError(f"Sample {index.keys[int(absent[0])]!r} has no {modality}.")
    return iterate(grain.MapDataset.source(_Variants(index, modality, wanted, image_size)), workers, threads)


def _having(index: Index, modality: str, image_size: int) -> np.ndarray:
    """The samples that have `modality`; a ValueError if there are none or their tiles are too small."""
    modalities.get(modality)
    there = index.available[:, index.modalities.index(modality)] if modality in index.modalities else np.zeros(0, bool)
    if not there.any():
        raise ValueError(f"No sample of the index has {modality}; it holds {', '.join(index.modalities)}.")
    _check_tile(index, int(there.argmax()), modality, image_size)
    return np.flatnonzero(there).astype(np.uint32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Images:
    """Maps a position to one crop of one sample."""

    index: Index
    modality: str
    samples: np.ndarray
    seed: int
    image_size: int
    train: bool
    clear: bool

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        place = order.place(position, len(self.samples), self.seed) if self.train else order.Place(position, 0, position, 0)
        i = int(self.samples[place.rank]) if place.rank < len(self.samples) else -1
        bands = len(modalities.get(self.modality).bands)
        blank = np.zeros((self.image_size, self.image_size, bands), views.stored_dtype(self.modality))
        found, wrong = self._read(i, place.epoch) if i >= 0 else ({}, "")
        found = found or {"image": blank, **({"clear": np.zeros(blank.shape[:2], bool)} if self.clear else {})}
        return {**found, "bad": np.bool_(found["image"] is blank), "fault": np.array(wrong, FAULT), "sample": np.int64(i)}

    def _read(self, i: int, epoch: int) -> tuple[dict[str, np.ndarray], str]:
        """The crop and what is clear of it, or nothing and what is wrong."""
        variant = variant_of(self.seed, epoch, i, self.train)
        try:
            with reading(self.modality):
                found = {"image": views.read_variant(self.index, i, self.modality, variant, self.image_size)}
                if self.clear:
                    clear = views.read_clear(self.index, i, variant, self.image_size)
                    found["clear"] = np.zeros(found["image"].shape[:2], bool) if clear is None else clear
                return found, ""
        except (DataError, OSError) as error:
            views.warn_once(f"Skipped: {error}")
            return {}, fault(error)


@dataclasses.dataclass(frozen=True, eq=False)
class _Variants:
    """A Grain source of all distinct crops of each sample."""

    index: Index
    modality: str
    samples: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = int(self.samples[position])
        try:
            images, inverse = views.read_variants(self.index, i, self.modality, self.image_size)
        except (DataError, OSError) as error:
            if isinstance(error.__cause__, ConnectionError | PermissionError):
                raise  # for a while nothing can be read, and what is left out here is left out for good
            views.warn_once(f"Skipped: {error}")
            bands = len(modalities.get(self.modality).bands)
            images = np.zeros((0, self.image_size, self.image_size, bands), views.stored_dtype(self.modality))
            return {"sample": i, "images": images, "inverse": np.zeros(crops.VARIANTS, int), "bad": True}
        return {"sample": i, "images": images, "inverse": inverse, "bad": False}
