"""``evaluate zeroshot``: water on Sen1Floods11 without training, as the class of that name in the land cover that a model generates.

Chips are seen through windows of the model's size, side by side; of a pixel in two the first counts. Pixels without a label do not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, generate_scenes, metrics, plot, sources
from terramind_jax.evaluation import results
from terramind_jax.evaluation.generation import alone
from terramind_jax.modalities import LULC_CLASSES
from terramind_jax.scenes.feeding import Network, padded
from terramind_jax.tasks import batches, datasets

DATASET, COVER = "sen1floods11", "LULC"
WATER = LULC_CLASSES.index("water")


def run(
    *,
    weights: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    inputs: Sequence[str] = ("S2L1C",),
    model: str | None = None,
    tokenizers: str | os.PathLike | None = None,
    split: str = "test",
    limit: int | None = None,
    pictures: int = 4,
    batch_size: int = generate_scenes.BATCH_SIZE,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Writes ``{out}/report.md``, ``scores.csv`` of every chip and ``samples.png``, and returns the scores of all, see `water_scores`.

    Args:
      weights, model, tokenizers, seed: as of `generate_scenes.run`.
      data: folder of Sen1Floods11. inputs: S2L1C, S1GRD, or both. split: train, val, test or bolivia.
      limit: the first so many chips; None: all.
      **options: of the generation, also `offset`, ``{modality: value}``, where reflectance is not as in pretraining.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no model, or data that are not complete.
      ValueError: inputs that the data or the model lack, or a model that makes no land cover.
    """
    sources.declare(generate_scenes.workdir(weights))
    dataset = datasets.load(DATASET, data, split).only(inputs)
    with results.folder(out) as partial:
        network = generate_scenes.load_network(weights, model, inputs, [COVER], tokenizers)
        generate.check_names(network.module, inputs, [COVER], network.tokenizers)
        batches.check_crop(dataset, network.module.config.image_size, dataset.image_size())
        total, each, shown = np.zeros((2, 2), np.int64), [], []
        for i in tqdm(range(len(dataset))[:limit], split, unit="chip", dynamic_ncols=True):
            chip = dataset[i]
            cover = land_cover(network, chip["inputs"], batch_size, seed=seed, **options)
            confusion = metrics.confusion_matrix((cover == WATER).astype(int), chip["target"], 2, ignore=dataset.ignore_index)
            each.append({"sample": chip["name"], **water_scores(confusion)})
            total += confusion
            if len(shown) < pictures:
                truth = np.where(chip["target"] == 1, WATER, 0)
                shown.append(plot.Scene(chip["name"], chip["inputs"], {COVER: cover}, {COVER: truth}))
        scores, told = water_scores(total), model or str(weights)
        if shown:
            title = f"Land cover from {', '.join(inputs)}; the truth is water alone"
            plot.contact_sheet(partial / "samples.png", shown, title=title)
        results.write_csv(partial / "scores.csv", [*each, {"sample": "all", **scores}])
        row = {"model": told, "setting": "zero-shot", "input": " + ".join(inputs), **{name: 100 * x for name, x in scores.items()}}
        text = results.write_report(
            partial / "report.md",
            "Zero-shot water mapping",
            f"Water in land cover that was generated from {' + '.join(inputs)} of {len(each)} chips of Sen1Floods11 ({split}).",
            results.compared("zeroshot", [row], "finetuned"),
        )
    print("\n" + text)
    return scores


def land_cover(network: Network, inputs: Mapping[str, np.ndarray], batch_size: int, **options: Any) -> np.ndarray:
    """The classes ``[H, W]`` of one image ``[H, W, C]`` by modality; one shape of a batch for all images of a size."""
    size, side = next(iter(inputs.values())).shape[:2], network.module.config.image_size
    parts, made = batches.windows(size, side), np.zeros(size, np.uint8)
    count = -(-len(parts) // -(-len(parts) // batch_size))  # as many batches, but even ones
    for start in range(0, len(parts), count):
        some = parts[start : start + count]
        images = {name: np.stack([x[part.rows, part.columns] for part in padded(some, count)]) for name, x in inputs.items()}
        for part, cover in zip(some, alone(network, images, COVER, **options), strict=False):
            made[part.rows, part.columns][part.own] = cover[part.own]
    return made


def water_scores(confusion: np.ndarray) -> dict[str, float]:
    """Of land and water, ``[2, 2]``: IoU of water, mean of both, and share of right pixels; NaN of what does not occur."""
    iou = metrics.intersection_over_union(confusion)
    return {"water IoU": float(iou[1]), "mIoU": metrics.mean_iou(confusion), "accuracy": metrics.accuracy(confusion)}
