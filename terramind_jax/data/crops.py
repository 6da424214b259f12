"""The fixed crops of a tile: its centre and four corners, each as it is and mirrored left-right, never resized.

Tokens are stored for exactly these, so the pixels and the tokens of one variant always show the same ground. Variant 0 is the centre,
as it is: validation and generation use it. Odd variants are mirrored.
"""

from __future__ import annotations

import numpy as np

from terramind_jax.modalities import IMAGE_SIZE

_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # (down, right), as parts of the free margin
VARIANTS = 2 * len(_PLACES)


def offsets(height: int, width: int, variant: int, size: int = IMAGE_SIZE) -> tuple[int, int, bool]:
    """Top row, left column and whether to mirror, of one variant in a tile of `height` x `width` pixels."""
    if not 0 <= variant < VARIANTS:
        raise ValueError(f"Crop variant {variant} does not exist; expected 0 to {VARIANTS - 1}.")
    if min(height, width) < size:
        raise ValueError(f"The tile is {height}x{width} pixels, smaller than the crop of {size}x{size}.")
    down, right = _PLACES[variant // 2]
    return int((height - size) * down), int((width - size) * right), bool(variant % 2)


def crop(array: np.ndarray, variant: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """One variant of ``[H, W, ...]``: a view ``[size, size, ...]``. A tile smaller than `size` is a ValueError."""
    top, left, mirror = offsets(array.shape[0], array.shape[1], variant, size)
    view = array[top : top + size, left : left + size]
    return view[:, ::-1] if mirror else view


def unique_variants(height: int, width: int, size: int = IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Which variants of such a tile differ, and which of those each variant equals.

    Returns `variants` [U] and `inverse` [VARIANTS] with ``crop(x, v) == crop(x, variants[inverse[v]])``: a tile of exactly `size` has two
    (as it is, mirrored), so tokens of all variants are ``tokens_of_unique[inverse]``.
    """
    boxes = np.array([offsets(height, width, v, size) for v in range(VARIANTS)])
    _, first, inverse = np.unique(boxes, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[inverse.reshape(-1)]


def select_patches(image: np.ndarray, positions: np.ndarray, patch_size: int) -> np.ndarray:
    """The patches of ``[S, S, C]`` at `positions` [n] (row-major) -> ``[n, patch_size * patch_size * C]``, channel fastest.

    Only the selected pixels are copied, whatever the strides of `image`.
    """
    side, channels = image.shape[0] // patch_size, image.shape[2]
    grid = image.reshape(side, patch_size, side, patch_size, channels)  # splitting axes never copies
    row, column = np.divmod(positions, side)
    return grid[row, :, column].reshape(len(positions), -1)
