"""Tokens to images by diffusion: noise schedule, samplers, and one scan over their steps (spec 6.6, 6.7); noise in training (9.4).

A step is ``x <- a * clip(x0) + b * x + c * x0 + d * noise``. Of first order, x0 is the network's prediction from x; of second order it is
moved by e times its change since the step before. So a sampler is a table of a, b, c, d and e.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import sampling
from terramind_jax.tokenizer import conv
from terramind_jax.tokenizer.vqvae import Tokenizer, apply

Sampler = Literal["ddim", "ddpm", "dpmpp"]
Spacing = Literal["trailing", "leading", "linspace", "quadratic"]
Clip = Literal["published", "none", "dynamic"]

TRAIN_STEPS = 1000
SPACING: Mapping[str, Spacing] = {"ddim": "trailing", "dpmpp": "quadratic"}  # unless another is asked for
# Steps unless a number is asked for. DDIM's are published. The error of DPM-Solver++ is at most that of those from 8 steps on with two
# trained tokenizers (benchmarks/results/inference.md), and from 12 on with the best predictions for pixels of two kinds, which
# tests/test_diffusion.py computes; both without a clip. The published clip pulls at every step, so that results depend on their number in
# itself; with it those tokenizers' images are as far from the truth after 12 steps as after 50 of DDIM, to 1 % (S1GRD), or nearer (S2L2A).
# DDPM is defined by all.
STEPS: Mapping[str, int] = {"ddim": 50, "dpmpp": 12, "ddpm": TRAIN_STEPS}
DYNAMIC_QUANTILE = 0.995  # of absolute values, as the reference computes it before it limits the result to 1


def decode(
    module: Tokenizer,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    *,
    seed: int | np.ndarray = 0,
    noise: jax.Array | None = None,
    timesteps: int | None = None,
    sampler: Sampler = "dpmpp",
    spacing: Spacing | None = None,
    clip: Clip = "published",
    at: np.ndarray | None = None,
) -> jax.Array:
    """Tokens as `Tokenizer.encode` gives them -> standardised image, or logits, ``[B, H, W, C]`` float32 (spec 6.7).

    A decoder that needs one pass ("vit") ignores all options.

    Args:
      seed: of the noise: one integer for all samples, or ``[B]``. A sample's noise does not depend on the batch around it.
      noise: ``[B, H, W, C]``, the noise to start from, instead of drawing it. DDPM draws that of its steps from `seed` all the same.
      timesteps: how many; None: those of `STEPS`, 12 of DPM-Solver++, whose error without a clip is at most that of the 50 of DDIM.
        "trailing" takes more where 1000 is no multiple of them, "quadratic" fewer where steps fall together.
      sampler: "dpmpp", DPM-Solver++ of second order, deterministic after the first noise; "ddim", as published and in TerraTorch, which
        goes the same way from the same noise and needs several times the steps; or "ddpm", which draws noise in every step.
      spacing: which of the 1000 timesteps are taken; None: "trailing" for DDIM, as published, "quadratic" for DPM-Solver++. DDPM always
        takes "leading", as the reference does.
      clip: limits each predicted image. "published" to -1 ... 1, so that images stay within one standard deviation of the mean: elevation
        between -281 and 1622 m. "none" lifts the limit; the reference cannot. "dynamic" takes the 0.995 quantile of a band's absolute
        values, at least 1, so that few pixels are cut off; it differs from window to window of a scene.
      at: ``[B, 2]``, row and column of an image's first token on the grid of its scene. Windows of a scene with one seed share the noise of
        each patch there. None: zeros.

    Raises:
      ValueError: tokens whose image the decoder cannot halve often enough, noise of another shape, an unknown sampler, spacing or clip.
    """
    if module.config.decoder == "vit":
        return apply(module, variables, tokens, "decode")
    shape = image_shape(module, tokens.shape)
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"The starting noise has shape {list(noise.shape)}; these tokens decode to {list(shape)}.")
    words, at = jnp.asarray(sampling.seed_words(seed, shape[0])), jnp.asarray(sampling.corners(at, shape[0]))
    steps = plan(timesteps, sampler, spacing)
    return _denoise(variables, tokens, words, at, noise, steps, module=module, clip=check_clip(clip), noisy=sampler == "ddpm")


def passes(module: Tokenizer, timesteps: int, sampler: Sampler) -> int:
    """How often `decode` asks the network for an image, given the same options."""
    return 1 if module.config.decoder == "vit" else len(plan(timesteps, sampler)[0])


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
    clip: Clip = "published",
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
    clip: Clip = "published",
    draw: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Denoises `x` by ``predict(x, t)``, the clean image, over the steps of a `plan`; ``draw(t)`` is a step's noise, None for none."""

    def body(state, step):
        (x, before), (t, (clipped, noisy, clean, random, change)) = state, step
        prediction = predict(x, t)
        x0 = prediction + change * (prediction - before)
        new = clipped * limit(x0, clip) + noisy * x + clean * x0
        return (new if draw is None else new + random * draw(t), prediction), None

    x = x.astype(jnp.float32)
    return jax.lax.scan(body, (x, jnp.zeros_like(x)), steps)[0][0]


def limit(x0: jax.Array, clip: Clip) -> jax.Array:
    """A predicted image ``[B, H, W, C]`` within its limits, see `decode`."""
    if clip == "none":
        return x0
    if clip == "published":
        return jnp.clip(x0, -1, 1)
    bound = jnp.maximum(jnp.quantile(jnp.abs(x0), DYNAMIC_QUANTILE, axis=(1, 2), keepdims=True), 1)
    return jnp.clip(x0, -bound, bound)


def check_clip(clip: str) -> Clip:
    """`clip`, or a ValueError if there is no such limit."""
    if clip not in get_args(Clip):
        raise ValueError(f"Unknown clip {clip!r}; known limits: {', '.join(get_args(Clip))}.")
    return clip


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
    if spacing == "quadratic":
        squares = (TRAIN_STEPS * (np.arange(1, timesteps + 1) / timesteps) ** 2).round().astype(np.int32)
        return np.unique(np.maximum(squares - 1, 0))[::-1]
    raise ValueError(f"Unknown spacing {spacing!r} of timesteps; known spacings: {', '.join(get_args(Spacing))}.")


def steps_of(sampler: Sampler, timesteps: int | None = None) -> int:
    """`timesteps`, or the sampler's own where none are asked for; a ValueError if there is no such sampler."""
    if sampler not in get_args(Sampler):
        raise ValueError(f"Unknown sampler {sampler!r}; known samplers: {', '.join(get_args(Sampler))}.")
    return STEPS[sampler] if timesteps is None else timesteps


def plan(timesteps: int | None, sampler: Sampler, spacing: Spacing | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps ``[S]`` int32 and their factors ``[S, 5]`` float32 of (clipped x0, x, x0, noise, change of x0).

    As in the reference, the step before `t` is ``t - 1000 // timesteps``, also where another is taken ("linspace", "trailing"); those that
    it lacks, "dpmpp" and "quadratic", go on where the last one ended. Before 0 nothing is noise.
    """
    timesteps = steps_of(sampler, timesteps)
    t = spaced(timesteps, "leading" if sampler == "ddpm" else spacing or SPACING[sampler])
    chained = sampler == "dpmpp" or spacing == "quadratic"
    before = np.append(t[1:], -1) if chained else t - TRAIN_STEPS // timesteps
    a, previous = alphas_cumprod()[t], np.where(before < 0, 1, alphas_cumprod()[before])
    factors = _ddpm(a, previous, t) if sampler == "ddpm" else _ddim(a, previous)
    change = _second_order(a, previous) if sampler == "dpmpp" else np.zeros_like(a)
    return t, np.stack([*factors, change], axis=-1).astype(np.float32)


def _ddim(a: np.ndarray, previous: np.ndarray) -> tuple[np.ndarray, ...]:
    """``sqrt(previous) clip(x0) + sqrt(1 - previous) eps``, the noise eps from the prediction before it is clipped."""
    eps = np.sqrt((1 - previous) / (1 - a))
    return np.sqrt(previous), eps, -eps * np.sqrt(a), np.zeros_like(a)


def _second_order(a: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """How far DPM-Solver++ (2M) extrapolates the prediction: half the ratio of this step and the last (arXiv 2211.01095, algorithm 2).

    Its first-order step is DDIM's. Steps are measured in half the logarithm of the signal-to-noise ratio, which is infinite at both ends:
    there the steps stay of first order.
    """
    with np.errstate(divide="ignore"):
        h = (np.log(previous / (1 - previous)) - np.log(a / (1 - a))) / 2
    change = np.zeros_like(h)
    inner = np.flatnonzero(np.isfinite(h[1:]) & np.isfinite(h[:-1])) + 1
    change[inner] = h[inner] / h[inner - 1] / 2
    return change


def _ddpm(a: np.ndarray, previous: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean and deviation of the posterior; the last step draws none."""
    alpha = a / previous
    variance = np.maximum((1 - previous) / (1 - a) * (1 - alpha), 1e-20)
    clipped, noisy = np.sqrt(previous) * (1 - alpha) / (1 - a), np.sqrt(alpha) * (1 - previous) / (1 - a)
    return clipped, noisy, np.zeros_like(a), np.where(t > 0, np.sqrt(variance), 0)
