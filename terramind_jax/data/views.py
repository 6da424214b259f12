"""From one sample and its masks to one training view: only what the masks select is kept.

Reads each array of a sample at most once, however many views are made of it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from terramind_jax import coordinates
from terramind_jax.data import clouds, crops, masks
from terramind_jax.data.errors import DataError, fault, reading
from terramind_jax.modalities import MODALITIES, PATCH_SIZE, RELEASED, Stream

if TYPE_CHECKING:
    from terramind_jax.data.index import Index

NEVER_CONSTANT = ("S1", "S2")  # land cover and elevation may be: a forest, the sea


class Sample:
    """One sample seen through one crop variant; every array is read at most once. Raises `DataError` for what is not as it should be."""

    def __init__(self, index: Index, i: int, variant: int, image_size: int, online_tokens: bool = False):
        self.index, self.i, self.variant, self.image_size, self.online_tokens = index, i, variant, image_size, online_tokens
        self.side = image_size // PATCH_SIZE
        self._images: dict[str, np.ndarray] = {}
        self._whole: dict[str, np.ndarray] = {}
        self._tokens: dict[str, np.ndarray] = {}

    def patches(self, stream: Stream, positions: np.ndarray) -> np.ndarray:
        """Selected patches ``[n, 16 * 16 * C]`` of a pixel stream."""
        name = stream.modality
        found = self.index.patches(self.i, name, self.variant, self.image_size, positions)
        found = crops.select_patches(self._crop(name), positions, PATCH_SIZE) if found is None else found
        if (channels := found.shape[-1] // PATCH_SIZE**2) != stream.channels:
            raise DataError(f"Sample {self._key}: {name} has {channels} bands, expected {stream.channels}.", "shape")
        return _stored(found, name, self._key)

    def image(self, name: str) -> np.ndarray:
        """The whole crop ``[S, S, C]`` of a modality, in the type that travels."""
        if name not in self._whole:
            self._whole[name] = _stored(np.ascontiguousarray(self._crop(name)), name, self._key)
        return self._whole[name]

    def _crop(self, name: str) -> np.ndarray:
        if name not in self._images:
            self._images[name] = crops.crop(read_tile(self.index, self.i, name, self.image_size), self.variant, self.image_size)
        return self._images[name]

    def ids(self, stream: Stream, source: np.ndarray) -> np.ndarray | None:
        """Token ids ``[n]``, of K codebooks ``[n, K]``, of a stream from the masks' sources; None if the sample has no such sequence.

        With `online_tokens` those of token streams are zeros, as the device makes them.
        """
        if stream.kind == "sequence":
            return None if self._place is None else masks.resolve(source, self._place)
        if self.online_tokens:
            return np.zeros((len(source), *stream.codes), int)
        name = stream.modality
        if name not in self._tokens:
            grid, expected = self.index.tokens(self.i, name), tokens_shape(stream, self.image_size)
            if grid.shape != expected:
                raise DataError(
                    f"Sample {self._key}: tokens of {name} have shape {grid.shape}, expected {expected}; "
                    f"tokenize for image size {self.image_size}.",
                    "shape",
                )
            check_ids(grid, stream, f"Sample {self._key}")
            self._tokens[name] = grid[self.variant].reshape(-1, *stream.codes)
        return self._tokens[name][source]

    @functools.cached_property
    def _place(self) -> np.ndarray | None:
        place = self.index.coordinates(self.i)
        try:
            return None if place is None else coordinates.encode(*place)
        except ValueError as error:
            raise DataError(f"Sample {self._key}: {error}", "value") from error

    @property
    def _key(self) -> str:
        return repr(self.index.keys[self.i])


def read_tile(index: Index, i: int, modality: str, image_size: int) -> np.ndarray:
    """One modality ``[H, W, C]`` of sample `i`; a tile smaller than the crop is a `DataError`."""
    tile = index.read(i, modality)
    if min(tile.shape[:2]) < image_size:
        size = f"{tile.shape[0]}x{tile.shape[1]} pixels"
        raise DataError(f"Sample {index.keys[i]!r}: {modality} is {size}, smaller than {image_size}.", "shape")
    if is_empty(tile, modality):
        raise DataError(f"Sample {index.keys[i]!r}: {modality} has one value everywhere, as where nothing was measured.", "constant")
    return tile


def is_empty(tile: np.ndarray, modality: str) -> bool:
    """Whether each band of an S1 or S2 tile has one value. Looks at few pixels first: hardly any tile is."""
    if modality not in RELEASED or not modality.startswith(NEVER_CONSTANT):
        return False
    return bool((tile[::37, ::37] == tile[0, 0]).all() and (tile == tile[0, 0]).all())


def read_variant(index: Index, i: int, modality: str, variant: int, image_size: int) -> np.ndarray:
    """One whole crop ``[S, S, C]`` of sample `i` in the stored dtype; pixels that are not finite are a `DataError`."""
    image = crops.crop(read_tile(index, i, modality, image_size), variant, image_size)
    return _stored(np.ascontiguousarray(image), modality, repr(index.keys[i]))


def read_clear(index: Index, i: int, variant: int, image_size: int) -> np.ndarray | None:
    """Which pixels of a crop are clear of clouds, bool ``[S, S]``; None if sample `i` has no cloud mask."""
    mask = index.cloud_mask(i)
    if mask is None:
        return None
    if min(mask.shape) < image_size:
        raise DataError(f"Sample {index.keys[i]!r}: {clouds.NAME} is {mask.shape[0]}x{mask.shape[1]}, smaller than {image_size}.", "shape")
    return clouds.clear(crops.crop(mask[..., None], variant, image_size)[..., 0])


def read_variants(index: Index, i: int, modality: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All distinct crops ``[U, S, S, C]`` of sample `i`, and which of them each variant is, ``[VARIANTS]``."""
    tile = read_tile(index, i, modality, image_size)
    variants, inverse = crops.unique_variants(*tile.shape[:2], image_size)
    images = np.stack([crops.crop(tile, int(v), image_size) for v in variants])
    return _stored(images, modality, repr(index.keys[i])), inverse


def _stored(x: np.ndarray, modality: str, key: str) -> np.ndarray:
    """Pixels in the type that travels; a `DataError` for values that are not finite and for classes that do not exist."""
    classes = MODALITIES[modality].classes if modality in MODALITIES else ()
    if classes and not ((x >= 0) & (x < len(classes))).all():
        raise DataError(f"Sample {key}: {modality} holds classes outside 0..{len(classes) - 1}.", "value")
    x = cast(x, stored_dtype(modality))
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"Sample {key}: {modality} has values that are not finite.", "nan")
    return x


def tokens_shape(stream: Stream, image_size: int) -> tuple[int, ...]:
    """Of the stored tokens of one sample."""
    return crops.VARIANTS, image_size // PATCH_SIZE, image_size // PATCH_SIZE, *stream.codes


def check_ids(grid: np.ndarray, stream: Stream, what: str) -> None:
    """A `DataError` if stored ids are none of the stream's vocabulary: they would index past its tables, and the loss be NaN."""
    if grid.size and not 0 <= grid.min() <= grid.max() < stream.vocab_size:
        raise DataError(
            f"{what}: tokens of {stream.modality} go from {grid.min()} to {grid.max()}, but its vocabulary has {stream.vocab_size}; "
            "tokenize again, or correct tokenizer.json beside the tokens or model.codebooks.",
            "value",
        )


@functools.lru_cache(maxsize=1 << 16)
def warn_once(message: str) -> None:
    """Logs a warning the first time that this process has it: a bad sample is met again in every epoch and view."""
    logging.warning(message)


def stored_dtype(modality: str) -> np.dtype:
    return np.dtype(MODALITIES[modality].dtype if modality in MODALITIES else np.float32)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To the type that travels; what an integer type cannot hold is clipped, never wrapped."""
    if x.dtype != dtype and dtype.kind in "iu":
        x = np.clip(x, np.iinfo(dtype).min, np.iinfo(dtype).max)
    return x.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class View:
    """One masked view: columns of its slots, and the patches that pixel slots point to, in the order of the slots.

    Slots of streams with several codebooks have the id 0, and their ids in `codes`, as `empty_codes` has them. `fault` tells why it could
    not be read: modality and reason (`errors.fault`). `images` are the whole crops ``[S, S, C]`` by modality of which the device makes the
    tokens of its slots, if it does.
    """

    inputs: np.ndarray  # [3, <=N] stream, position, id
    targets: np.ndarray  # [4, <=M] stream, position, given id, id
    patches: dict[str, np.ndarray]
    fault: str = ""
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    codes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def empty_codes(
    encoder: Sequence[Stream], decoder: Sequence[Stream], inputs: tuple[int, ...], targets: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Zeros ``input_codes`` ``[*inputs, K]`` and ``target_codes`` ``[*targets, K]``, if a stream there has several codebooks.

    K is the greatest number of codebooks, the type the smallest that holds all ids.
    """
    found = {}
    for name, streams, slots in (("input_codes", encoder, inputs), ("target_codes", decoder, targets)):
        if several := [s for s in streams if s.codes]:
            dtype = np.min_scalar_type(max(s.vocab_size for s in several) - 1)
            found[name] = np.zeros((*slots, max(s.num_codebooks for s in several)), dtype)
    return found


def bad(error: DataError | OSError) -> View:
    """The view of a sample that cannot be read: no slots."""
    return View(np.zeros((3, 0), int), np.zeros((4, 0), int), {}, fault(error))


def fill(sample: Sample, mask: masks.Masks, encoder: Sequence[Stream], decoder: Sequence[Stream]) -> View:
    """Puts the sample's ids and patches where the mask points. A sequence that does not exist leaves no slots."""
    inputs = np.stack([mask.input_stream, mask.input_position, np.zeros_like(mask.input_source)])
    targets = np.stack([mask.target_stream, mask.target_position, np.zeros_like(mask.target_source), np.zeros_like(mask.target_source)])
    patches, codes = {}, empty_codes(encoder, decoder, inputs.shape[1:], targets.shape[1:])
    for e in np.unique(mask.input_stream):
        at = mask.input_stream == e
        with reading(encoder[e].modality):
            if encoder[e].kind == "pixels":
                patches[encoder[e].key] = sample.patches(encoder[e], mask.input_position[at])
            elif (found := sample.ids(encoder[e], mask.input_source[at])) is None:
                inputs[0, at] = -1
            elif encoder[e].codes:
                codes["input_codes"][at, : found.shape[1]] = found
            else:
                inputs[2, at] = found
    for t in np.unique(mask.target_stream):
        at = mask.target_stream == t
        with reading(decoder[t].modality):
            if (found := sample.ids(decoder[t], mask.target_source[at])) is None:
                targets[0, at] = -1
                continue
            if decoder[t].codes:
                codes["target_codes"][at, : found.shape[1]] = found
            else:
                targets[3, at] = found
            if decoder[t].kind == "sequence":
                targets[2, at] = sample.ids(decoder[t], mask.target_previous[at])
    used = [*(encoder[e] for e in np.unique(mask.input_stream)), *(decoder[t] for t in np.unique(mask.target_stream))]
    images = {}
    for name in {s.modality for s in used if s.kind == "tokens"} if sample.online_tokens else ():
        with reading(name):
            images[name] = sample.image(name)
    kept = {"input_codes": inputs[0] >= 0, "target_codes": targets[0] >= 0}
    codes = {name: x[kept[name]] for name, x in codes.items()}
    return View(inputs[:, inputs[0] >= 0], targets[:, targets[0] >= 0], patches, images=images, codes=codes)
