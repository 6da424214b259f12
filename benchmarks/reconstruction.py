"""Trains small tokenizers on the embedded world and compares their reconstructions with the block mean, in minutes a modality on a CPU.

    python benchmarks/reconstruction.py --out=DIR [--only=DEM,LULC] [--decoder=unet] [--results=TABLE.md] [--config.FIELD=VALUE ...]

The block mean fills each token's 16 x 16 pixels with their mean, one unquantized number a band, or for classes with the most common
one. At the tokens' rate it is the nearest of as many means as the codebook has codes, found by k-means on the training scenes. Prints
and, with --results, writes one row a modality, the table of configs/tokenizer/README.md; work directories in DIR hold pictures and all
figures. Modalities that are done in DIR are not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from scipy.cluster import vq

from terramind_jax import cli, config, files, modalities
from terramind_jax.data.index import open_index
from terramind_jax.data.pipeline import image_batches
from terramind_jax.train import logging

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "small.py"
MODALITIES = ("S2L2A", "S1GRD", "S1RTC", "DEM", "LULC", "NDVI")
SCENES, VAL_SCENES = 512, 64
OWN = {  # what is set besides small.py
    "S2L2A": {"train.data_init": False, "train.steps": 3000},  # after 1500 its error was smaller by 1 to 4 % so, and its codes fewer
    # One long level tells heights finely; attention draws the slopes between them.
    "DEM": {
        "model.levels": "(1000,)",
        "model.depth": 1,
        "model.dim": 64,
        "model.num_heads": 4,
        "train.batch_size": 4,
        "train.steps": 12000,
        "train.ema_decay": 0.999,
        "run.eval_batches": 16,
        "run.checkpoint_every": 2000,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default=",".join(MODALITIES))
    parser.add_argument("--decoder", default="vit", choices=("vit", "unet"))
    parser.add_argument("--results", type=Path, help="a Markdown file for the table")
    arguments, fields = parser.parse_known_args()
    shards = arguments.out / "shards"
    if not shards.is_dir():
        cli.main(["data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}"])
    rows = []
    for modality in arguments.only.split(","):
        workdir = arguments.out / f"{modality}_{arguments.decoder}"
        own = {"model.modality": modality, "model.decoder": arguments.decoder, "data.root": shards, **OWN.get(modality, {})}
        given = [f"--config.{name}={value}" for name, value in own.items()]
        if cli.main(["train-tokenizer", f"--config={CONFIG}", f"--workdir={workdir}", *given, *fields]):
            raise SystemExit(1)
        rows.append(row(config.of_workdir(workdir), logging.read(workdir)))
        print("\n".join([HEAD, *rows]), flush=True)
    if arguments.results:
        files.write_text(arguments.results, "\n".join([HEAD, *rows]) + "\n")


COLUMNS = ("modality", "decoder", "steps", "RMSE or error rate", "of block mean", "at this rate", "PSNR or mIoU", "of block mean")
COLUMNS += ("SSIM", "of block mean", "codes used", "perplexity", "minutes")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(run: ConfigDict, lines: list[dict[str, float]]) -> str:
    """One line of the table from the log of a run; the last line holds the evaluation."""
    line, modality = lines[-1], run.model.modality
    if modalities.get(modality).kind == "classes":
        pairs = [(f"{1 - line[p + 'accuracy']:.4f}", f"{line[p + 'miou']:.3f}", "") for p in ("val/", "val/block_mean/")]
        at_rate = pairs[1][0]  # the most common class needs no more codes than there are classes
    else:
        pairs = [(f"{line[p + 'rmse']:.4g}", f"{line[p + 'psnr']:.2f}", f"{line[p + 'ssim']:.3f}") for p in ("val/", "val/block_mean/")]
        at_rate = f"{rmse_at_rate(run):.4g}"
    error, quality, similarity = zip(*pairs, strict=True)
    figures = [*error, at_rate, *quality, *similarity, f"{line['val/codes']:.0%}", f"{line['val/perplexity']:.0f}"]
    minutes = np.mean([line["step_seconds"] for line in lines if "step_seconds" in line]) * run.train.steps / 60
    return f"| {' | '.join([modality, run.model.decoder, str(run.train.steps), *figures])} | {minutes:.1f} |"


def rmse_at_rate(run: ConfigDict) -> float:
    """RMSE in the modality's unit of block means rounded to as many vectors as the tokenizer has codes."""
    std = modalities.statistics(run.model.modality)[1]
    p, codes = run.model.get("patch_size", 16), int(np.prod(run.model.levels))
    train = np.concatenate([block_means(x, p)[0] for x in images(run, run.data.train_split)])
    book = vq.kmeans2(train, min(codes, len(train)), iter=20, minit="points", seed=0)[0]
    squared, count = 0.0, 0
    for x in images(run, run.data.val_split):
        means, blocks = block_means(x, p)
        rounded = book[vq.vq(means, book)[0]]
        squared += float(np.square((blocks - rounded[:, None]) * std).sum())
        count += blocks.size
    return (squared / count) ** 0.5


def images(run: ConfigDict, split: str) -> Iterator[np.ndarray]:
    """The standardised centre crops ``[B, S, S, C]`` of a split, as evaluations take them."""
    modality = run.model.modality
    index = open_index(run.data.root, split, [modality])
    for batch in image_batches(index, modality, batch_size=run.train.batch_size, image_size=run.data.image_size, train=False):
        yield np.asarray(modalities.standardize(modality, batch["image"][~batch["bad"]]), np.float32)


def block_means(image: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[B, S, S, C]`` -> means of their blocks ``[N, C]`` and the blocks ``[N, p * p, C]``."""
    batch, height, width, channels = image.shape
    blocks = image.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p, channels)
    return blocks.mean(1), blocks


if __name__ == "__main__":
    main()
