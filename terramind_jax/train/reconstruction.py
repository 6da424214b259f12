"""What an evaluation of a tokenizer measures: its reconstructions beside the images, band by band, and how it uses its codebook.

Sums are made on the devices, and figures and a picture of them on the host. Every error is given for a reconstruction of the block
mean, too (of classes, the most common one of the block): what one value a band and token could tell.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax import metrics, modalities
from terramind_jax import tokenizer as networks
from terramind_jax.tokenizer import fsq

SHOWN = 8  # images in a picture

Figures = dict[str, float]


# ---- one batch, on the devices ----


def prepare(config: networks.TokenizerConfig, image: jax.Array) -> jax.Array:
    """Stored values -> what the tokenizer reads: standardised floats, or class maps as they are."""
    return image if config.is_class_map else modalities.standardize(config.modality, image)


def usage(config: networks.TokenizerConfig, codes: jax.Array, weight: jax.Array) -> jax.Array:
    """How often each token occurs in codes ``[B, h, w, latent_dim]`` of images with weight 1: ``[num_codebooks, codebook_size]`` int32."""
    k = config.num_codebooks
    tokens = fsq.codes_to_tokens(codes.reshape(-1, k, len(config.levels)), config.levels)  # [B * h * w, K]
    weight = jnp.broadcast_to(weight[:, None, None], codes.shape[:3]).reshape(-1, 1)
    return jnp.zeros((k, config.codebook_size), jnp.int32).at[jnp.arange(k), tokens].add(weight.astype(jnp.int32))


def measure(
    module: networks.Tokenizer, timesteps: int, params: Any, buffers: Any, batch: Mapping[str, jax.Array], keys: jax.Array
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Sums over the readable images of a batch, and the first images with their reconstructions, ``[n, S, S, C]`` in the modality's unit.

    A diffusion decoder takes `timesteps` from noise that follows from `keys` ``[B]``, and its predictions are not limited to one
    standard deviation. Its loss is that of training.
    """
    config, weight, variables = module.config, ~batch["bad"], {"params": params, "buffers": buffers}
    image = prepare(config, batch["image"])
    noised = networks.noised(keys, image) if config.decoder == "unet" else ()
    made, codes = module.apply(variables, image, *noised)
    loss = networks.reconstruction_loss(config, made, image)
    if config.decoder == "unet":
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, networks.TRAIN_STEPS), image.shape[1:]))(keys)
        made = networks.denoise(module, variables, codes, noise, networks.plan(timesteps, "ddim"), clip="none")
    sums = {"images": weight.sum(), "loss": (loss * weight).sum(), "codes": usage(config, codes, weight)}
    compare = partial(_classes if config.is_class_map else _bands, config, weight, image)
    blocks = block_mean(config, image)
    sums |= {"made": compare(made), "blocks": compare(blocks)}
    if "clear" in batch:
        over_clear = partial(_clear_pixels, config, batch["clear"] & weight[:, None, None], image)
        sums |= {"made_clear": over_clear(made), "blocks_clear": over_clear(blocks)}
    shown = (
        (image, made.argmax(-1)[..., None])
        if config.is_class_map
        else map(partial(modalities.destandardize, config.modality), (image, made))
    )
    return sums, tuple(x[:SHOWN] for x in shown)


def block_mean(config: networks.TokenizerConfig, image: jax.Array) -> jax.Array:
    """Each token's patch of an image ``[B, H, W, C]`` filled with its mean, of class maps with the classes' shares ``[B, H, W, K]``."""
    image = networks.prepare(config, image)
    batch, height, width, channels = image.shape
    p = config.patch_size
    blocks = image.reshape(batch, height // p, p, width // p, p, channels)
    return jnp.broadcast_to(blocks.mean((2, 4), keepdims=True), blocks.shape).reshape(image.shape)


def _classes(config: networks.TokenizerConfig, weight: jax.Array, image: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """Confusion matrix, row = true class, int32: exact where float32 would not be."""
    truth, made = (jax.nn.one_hot(x, config.channels) for x in (image[..., 0], made.argmax(-1)))
    confusion = jnp.einsum("bhwi,bhwj->bij", truth, made).astype(jnp.int32)
    return {"confusion": (confusion * weight[:, None, None]).sum(0)}


def _bands(config: networks.TokenizerConfig, weight: jax.Array, image: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """By band ``[C]``: absolute and squared error in the modality's unit, and SSIM, each a mean over an image's pixels."""
    mean, std = modalities.statistics(config.modality)
    difference = (made - image) * std
    by_image = {
        "absolute": jnp.abs(difference).mean((1, 2)),
        "squared": jnp.square(difference).mean((1, 2)),
        "ssim": ssim(made, image, mean / std, data_range(config.modality) / std),
    }
    return {name: (x * weight[:, None]).sum(0) for name, x in by_image.items()}


def _clear_pixels(config: networks.TokenizerConfig, clear: jax.Array, image: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """By band ``[C]``: sums of absolute and squared error over the `clear` pixels ``[B, H, W]``; how many these are, and images' shares."""
    _, std = modalities.statistics(config.modality)
    difference = (made - image) * std * clear[..., None]
    errors = {"absolute": jnp.abs(difference).sum((0, 1, 2)), "squared": jnp.square(difference).sum((0, 1, 2))}
    return {**errors, "pixels": clear.sum(), "share": clear.mean((1, 2)).sum()}


def data_range(modality: str) -> np.ndarray:
    """What counts as full scale for PSNR and SSIM, by band ``[C]``, in the modality's unit; six standard deviations if nothing is set."""
    _, std = modalities.statistics(modality)
    return np.full_like(std, metrics.DATA_RANGE[modality]) if modality in metrics.DATA_RANGE else 6 * std


def ssim(prediction: jax.Array, truth: jax.Array, zero: np.ndarray, full_scale: np.ndarray) -> jax.Array:
    """`metrics.ssim` of standardised images ``[B, H, W, C]`` on the device, by image and band ``[B, C]``.

    Variances are of the standardised values, so that float32 suffices; means are those of the values with `zero` ``[C]`` added.
    """
    rows, columns = (_windows(side, metrics.gaussian()) for side in truth.shape[1:3])
    blur = partial(jnp.einsum, "yh,xw,bhwc->byxc", rows, columns, precision="highest")
    c1, c2 = jnp.square(metrics.SSIM_K1 * full_scale), jnp.square(metrics.SSIM_K2 * full_scale)
    p, t = blur(prediction), blur(truth)
    var_p, var_t = blur(prediction**2) - p**2, blur(truth**2) - t**2
    covariance = blur(prediction * truth) - p * t
    p, t = p + zero, t + zero
    return ((2 * p * t + c1) * (2 * covariance + c2) / ((p**2 + t**2 + c1) * (var_p + var_t + c2))).mean((1, 2))


def _windows(side: int, weights: np.ndarray) -> np.ndarray:
    """Weighted sums over the windows that lie inside, as a matrix ``[side - 10, side]``."""
    return np.array([np.pad(weights, (i, side - len(weights) - i)) for i in range(side - len(weights) + 1)], np.float32)


# ---- all batches, on the host ----


def summarize(config: networks.TokenizerConfig, batches: Iterable[Mapping[str, Any]]) -> Figures:
    """The figures of an evaluation from the sums of its batches.

    ``val/mae``, ``rmse`` (in the modality's unit), ``psnr`` and ``ssim``, over all bands and, where there are several, ``/BAND``; for
    class maps ``val/accuracy``, ``miou`` and ``iou/CLASS`` of the classes that occur. ``val/block_mean/...`` is what the block mean has.
    ``val/clear/mae``, ``rmse`` and ``psnr`` are over the pixels that are clear of clouds, where samples carry a cloud mask, and
    ``val/clear/share`` is how many of all these are. ``val/codes`` is the share of the codebook that occurs and ``val/perplexity`` how
    many equally frequent codes would tell as much, means over the codebooks.
    """
    total: Any = None
    for one in batches:
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), one)
        total = one if total is None else jax.tree.map(np.add, total, one)
    images = max(float(total["images"]), 1.0)
    figures = partial(class_figures, config.modality) if config.is_class_map else partial(band_figures, config.modality, images)
    quality = {f"val/{name}": x for name, x in figures(total["made"]).items()}
    blocks = {f"val/block_mean/{name}": x for name, x in figures(total["blocks"]).items() if "/" not in name}
    clear = clear_figures(config.modality, images, total) if total.get("made_clear", {}).get("pixels") else {}
    share = total["codes"] / np.maximum(total["codes"].sum(1, keepdims=True), 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    codes = {"val/codes": float((share > 0).mean()), "val/perplexity": float(np.exp(entropy).mean())}
    return {"val/loss": float(total["loss"]) / images, **quality, **blocks, **clear, **codes}


def class_figures(modality: str, sums: Mapping[str, np.ndarray]) -> Figures:
    confusion = sums["confusion"]
    by_class = zip(modalities.get(modality).classes, metrics.intersection_over_union(confusion), strict=False)
    iou = {f"iou/{name}": float(x) for name, x in by_class if not math.isnan(x)}
    return {"accuracy": metrics.accuracy(confusion), "miou": metrics.mean_iou(confusion), **iou}


def band_figures(modality: str, images: float, sums: Mapping[str, np.ndarray]) -> Figures:
    scale, names = data_range(modality), modalities.get(modality).bands

    def figures(absolute: np.ndarray, squared: np.ndarray, similarity: np.ndarray, full: float) -> Figures:
        rmse = math.sqrt(squared.mean() / images)
        own = {"mae": absolute.mean() / images, "rmse": rmse, "psnr": metrics.psnr(rmse, full), "ssim": similarity.mean() / images}
        return {name: float(x) for name, x in own.items()}

    parts = sums["absolute"], sums["squared"], sums["ssim"]
    found = figures(*parts, float(scale.max()))
    for c, band in enumerate(names if len(names) > 1 else ()):
        found |= {f"{name}/{band}": x for name, x in figures(*(x[c] for x in parts), float(scale[c])).items()}
    return found


def clear_figures(modality: str, images: float, total: Mapping[str, Any]) -> Figures:
    found = {"val/clear/share": float(total["made_clear"]["share"]) / images}
    for prefix, sums in (("val/clear/", total["made_clear"]), ("val/clear/block_mean/", total["blocks_clear"])):
        mae, mse = (sums[name].mean() / sums["pixels"] for name in ("absolute", "squared"))
        own = {"mae": mae, "rmse": math.sqrt(mse), "psnr": metrics.psnr(math.sqrt(mse), float(data_range(modality).max()))}
        found |= {prefix + name: float(x) for name, x in own.items()}
    return found


# ---- picture ----


def draw(path: str | os.PathLike, modality: str, images: Sequence[np.ndarray], made: Sequence[np.ndarray], title: str) -> None:
    """A PNG of images ``[S, S, C]`` and their reconstructions below them, in the modality's unit and the colour limits of the image."""
    from terramind_jax import plot

    side = plot.TILE + plot.GAP
    sheet = plot.Sheet(2 * plot.GAP + side * len(images), 0.3 + 2 * side)
    sheet.text(plot.GAP, 0.15, f"{title}: above the image, below its reconstruction", size=8, ha="left")
    for i, (truth, reconstruction) in enumerate(zip(images, made, strict=True)):
        for row, image in enumerate((truth, reconstruction)):
            sheet.image(plot.GAP + i * side, 0.3 + row * side, plot.render(modality, image, plot.limits(modality, truth)))
    sheet.save(path, dpi=120)
