"""Random crops of whole tiles, resized: what the original tokenizers were trained on (spec 9.4). On the device, static shapes.

A step draws one side for its whole batch, and each image a crop of its own. Mirroring is done by the data, in half of the tiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ASPECT = 4 / 3  # of a crop at most, and its inverse at least
TRIES = 10  # crops drawn, of which the first that fits is taken, else the whole tile


def draw_box(key: jax.Array, side: int, min_scale: float) -> tuple[jax.Array, jax.Array]:
    """Upper left corner and size ``[2]`` each, in pixels, of a crop of `min_scale` to 1 of the area of a tile of `side` x `side`."""
    area_key, aspect_key, corner_key = jax.random.split(key, 3)
    area = side**2 * jax.random.uniform(area_key, (TRIES,), minval=min_scale, maxval=1)
    aspect = jnp.exp(jnp.log(ASPECT) * jax.random.uniform(aspect_key, (TRIES,), minval=-1, maxval=1))
    sizes = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1)))  # [TRIES, 2] height and width
    fits = (sizes <= side).all(-1)
    size = jnp.where(fits.any(), sizes[fits.argmax()], side)
    corner = jnp.floor(jax.random.uniform(corner_key, (2,)) * (side - size + 1))
    return corner, size


def resample(image: jax.Array, corner: jax.Array, size: jax.Array, side: int, nearest: bool) -> jax.Array:
    """One crop of ``[H, W, C]`` -> ``[side, side, C]``, bilinear without smoothing, or nearest for classes."""
    scale = side / size
    if not nearest:
        shape = (side, side, image.shape[-1])
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, -corner * scale, "linear", antialias=False)
    at = (corner[:, None] + (jnp.arange(side) + 0.5) / scale[:, None]).astype(jnp.int32)  # [2, side]
    return image[at[0]][:, at[1]]


def random_crops(keys: jax.Array, images: jax.Array, side: int, min_scale: float, nearest: bool) -> jax.Array:
    """Square tiles ``[B, S, S, C]`` and a key each ``[B]`` -> a random crop of each, resized, ``[B, side, side, C]``."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        return resample(image, *draw_box(key, image.shape[0], min_scale), side, nearest)

    return jax.vmap(one)(keys, images)
