"""Tokens to images by diffusion: noise schedule, DDIM and DDPM, and one scan over their steps (spec 6.6, 6.7); noise in training (9.4).

A step is ``x <- a * clip(x0) + b * x + c * x0 + d * noise``, x0 being the network's prediction from x, so a scheduler is a table of a, b,
c and d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import sampling
from terramind_jax.tokenizer import conv
from terramind_jax.tokenizer.vqvae import Tokenizer, apply

Scheduler = Literal["ddim", "ddpm"]
Spacing = Literal["trailing", "leading", "linspace"]

TRAIN_STEPS = 1000


def decode(
    module: Tokenizer,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    *,
    seed: int | np.ndarray = 0,
    noise: jax.Array | None = None,
    timesteps: int = 50,
    scheduler: Scheduler = "ddim",
    spacing: Spacing = "trailing",
    clip: bool = True,
    at: np.ndarray | None = None,
) -> jax.Array:
    """Tokens as `Tokenizer.encode` gives them -> standardised image, or logits, ``[B, H, W, C]`` float32 (spec 6.7).

    A decoder that needs one pass ("vit") ignores all options.

    Args:
      seed: of the noise: one integer for all samples, or ``[B]``. A sample's noise does not depend on the batch around it.
      noise: ``[B, H, W, C]``, the noise to start from, instead of drawing it. DDPM draws that of its steps from `seed` all the same.
      timesteps: how many. "trailing" takes more where 1000 is no multiple of them.
      scheduler: "ddim", deterministic after the first noise, or "ddpm".
      spacing: which of the 1000 timesteps are taken. DDPM always takes "leading", as the reference does.
      clip: limits each prediction to -1 ... 1, as published. Images then stay within one standard deviation of the mean: elevation
        between -281 and 1622 m. False lifts the limit; the reference cannot.
      at: ``[B, 2]``, row and column of an image's first token on the grid of its scene. Windows of a scene with one seed share the noise of
        each patch there. None: zeros.

    Raises:
      ValueError: tokens whose image the decoder cannot halve often enough, noise of another shape, an unknown scheduler or spacing.
    """
    if module.config.decoder == "vit":
        return apply(module, variables, tokens, "decode")
    shape = image_shape(module, tokens.shape)
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"The starting noise has shape {list(noise.shape)}; these tokens decode to {list(shape)}.")
    words, at = jnp.asarray(sampling.seed_words(seed, shape[0])), jnp.asarray(sampling.corners(at, shape[0]))
    steps = plan(timesteps, scheduler, spacing)
    return _denoise(variables, tokens, words, at, noise, steps, module=module, clip=clip, noisy=scheduler == "ddpm")


def image_shape(module: Tokenizer, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Shape of the image that tokens ``[B, h, w]`` decode to; a ValueError if the U-Net cannot halve its sides."""
    c = module.config
    height, width = shape[1] * c.patch_size, shape[2] * c.patch_size
    if height % c.decoder_multiple or width % c.decoder_multiple:
        sides = f"the diffusion decoder needs sides that are multiples of {c.decoder_multiple}"
        raise ValueError(f"{c.modality} tokens of shape {list(shape)} are an image of {height}x{width} pixels; {sides}.")
    return shape[0], height, width, c.channels


@functools.partial(jax.jit, static_argnames=("module", "clip", "noisy"))
def _denoise(variables, tokens, words, at, noise, steps, *, module, clip, noisy) -> jax.Array:
    """All steps in one program."""
    c = module.config
    keys = sampling.sample_keys(words, f"{c.modality} pixels")

    def draw(t: jax.Array) -> jax.Array:
        return sampling.normal(sampling.step_keys(keys, t), at, tokens.shape[1:3], c.patch_size, c.channels)

    codes = module.apply(variables, tokens, method="codes")
    start = draw(TRAIN_STEPS) if noise is None else noise
    return denoise(module, variables, codes, start, steps, clip=clip, draw=draw if noisy else None)


def denoise(
    module: Tokenizer,
    variables: Mapping[str, Any],
    codes: jax.Array,
    noise: jax.Array,
    steps: tuple[jax.Array, jax.Array],
    *,
    clip: bool = True,
    draw: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Codes ``[B, h, w, latent_dim]`` and the noise to start from ``[B, H, W, C]`` -> image: `sample` with a tokenizer's U-Net."""
    # Made here, not in the loop, from which XLA would not take them.
    kernels = {conv.COLLECTION: conv.transform_kernels(variables["params"])}

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        return module.apply({**variables, **kernels}, codes, x, t, method="predict")

    return sample(predict, noise, steps, clip=clip, draw=draw)


def sample(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    steps: tuple[jax.Array, jax.Array],
    *,
    clip: bool = True,
    draw: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Denoises `x` by ``predict(x, t)``, the clean image, over the steps of a `plan`; ``draw(t)`` is a step's noise, None for none."""

    def body(x, step):
        t, (clipped, noisy, clean, random) = step
        x0 = predict(x, t)
        new = clipped * (jnp.clip(x0, -1, 1) if clip else x0) + noisy * x + clean * x0
        return new if draw is None else new + random * draw(t), None

    return jax.lax.scan(body, x.astype(jnp.float32), steps)[0]


def noised(keys: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the decoder sees in training (spec 9.4): images ``[B, H, W, C]`` under noise, each at a timestep of its own, ``[B]`` int32.

    `keys` ``[B]`` are one a sample, which then does not depend on the batch around it.
    """
    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, TRAIN_STEPS))(sampling.step_keys(keys, 0))
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(sampling.step_keys(keys, 1))
    return add_noise(image, noise, t), t


def add_noise(image: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """``sqrt(a) image + sqrt(1 - a) noise`` at timesteps `t` ``[B]``; at the last one nothing is left of the image."""
    a = alphas_cumprod()
    kept, added = (jnp.asarray(x, jnp.float32)[t][:, None, None, None] for x in (np.sqrt(a), np.sqrt(1 - a)))
    return kept * image + added * noise


# ---- schedule ----


@functools.cache
def alphas_cumprod() -> np.ndarray:
    """``[1000]`` float64: how much of the image's variance is left at each timestep. Linear, rescaled to none at the last (spec 6.6)."""
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_STEPS)))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def spaced(timesteps: int, spacing: Spacing) -> np.ndarray:
    """The timesteps that are taken, descending, int32 (spec 6.7)."""
    if not 1 <= timesteps <= TRAIN_STEPS:
        raise ValueError(f"The number of timesteps is {timesteps}; it must be between 1 and {TRAIN_STEPS}.")
    ratio = TRAIN_STEPS // timesteps
    if spacing == "trailing":
        return np.arange(TRAIN_STEPS, 0, -ratio, dtype=np.int32) - 1
    if spacing == "leading":
        return np.arange(timesteps, dtype=np.int32)[::-1] * ratio
    if spacing == "linspace":
        return np.linspace(TRAIN_STEPS, 1, timesteps).round().astype(np.int32) - 1
    raise ValueError(f"Unknown spacing {spacing!r} of timesteps; known spacings: trailing, leading, linspace.")


def plan(timesteps: int, scheduler: Scheduler, spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps ``[S]`` int32 and their factors ``[S, 4]`` float32 of (clipped x0, x, x0, noise).

    The step before `t` is ``t - 1000 // timesteps``, also where another is taken ("linspace", "trailing"); before 0 nothing is noise.
    """
    if scheduler not in ("ddim", "ddpm"):
        raise ValueError(f"Unknown scheduler {scheduler!r}; known schedulers: ddim, ddpm.")
    t = spaced(timesteps, spacing if scheduler == "ddim" else "leading")
    before = t - TRAIN_STEPS // timesteps
    a, previous = alphas_cumprod()[t], np.where(before < 0, 1, alphas_cumprod()[before])
    factors = _ddim(a, previous) if scheduler == "ddim" else _ddpm(a, previous, t)
    return t, np.stack(factors, axis=-1).astype(np.float32)


def _ddim(a: np.ndarray, previous: np.ndarray) -> tuple[np.ndarray, ...]:
    """``sqrt(previous) clip(x0) + sqrt(1 - previous) eps``, the noise eps from the prediction before it is clipped."""
    eps = np.sqrt((1 - previous) / (1 - a))
    return np.sqrt(previous), eps, -eps * np.sqrt(a), np.zeros_like(a)


def _ddpm(a: np.ndarray, previous: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean and deviation of the posterior; the last step draws none."""
    alpha = a / previous
    variance = np.maximum((1 - previous) / (1 - a) * (1 - alpha), 1e-20)
    clipped, noisy = np.sqrt(previous) * (1 - alpha) / (1 - a), np.sqrt(alpha) * (1 - previous) / (1 - a)
    return clipped, noisy, np.zeros_like(a), np.where(t > 0, np.sqrt(variance), 0)
