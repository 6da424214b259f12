"""Trains small tokenizers on the embedded world and compares their reconstructions with the block mean, in minutes a modality on a CPU.

    python benchmarks/reconstruction.py --out=DIR [--only=DEM,LULC] [--decoder=unet] [--steps=1500] [--config.FIELD=VALUE ...]

The block mean fills each token's 16 x 16 pixels with their mean, one unquantized number a band, or for classes with the most common
one. Prints one row a modality, the table of configs/tokenizer/README.md; work directories in DIR hold pictures and all figures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from terramind_jax import cli, config
from terramind_jax.train import logging

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "small.py"
MODALITIES = ("S2L2A", "S1GRD", "S1RTC", "DEM", "LULC", "NDVI")
SCENES, VAL_SCENES = 512, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default=",".join(MODALITIES))
    parser.add_argument("--decoder", default="vit", choices=("vit", "unet"))
    parser.add_argument("--steps", type=int, default=config.read(CONFIG).train.steps)
    arguments, fields = parser.parse_known_args()
    shards = arguments.out / "shards"
    if not shards.is_dir():
        cli.main(["data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}"])
    rows = []
    for modality in arguments.only.split(","):
        workdir, start = arguments.out / f"{modality}_{arguments.decoder}", time.monotonic()
        own = {"model.modality": modality, "model.decoder": arguments.decoder, "data.root": shards, "train.steps": arguments.steps}
        given = [f"--config.{name}={value}" for name, value in own.items()]
        cli.main(["train-tokenizer", f"--config={CONFIG}", f"--workdir={workdir}", *given, *fields])
        rows.append(row(modality, arguments.decoder, logging.read(workdir)[-1], (time.monotonic() - start) / 60))
        print("\n".join([HEAD, *rows]), flush=True)


COLUMNS = ("modality", "decoder", *("RMSE or error rate", "of block mean", "PSNR or mIoU", "of block mean", "SSIM", "of block mean"))
COLUMNS += ("codes used", "perplexity", "minutes")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(modality: str, decoder: str, line: dict[str, float], minutes: float) -> str:
    """One line of the table from the last evaluation of a run."""
    if modality == "LULC":
        pairs = [(f"{1 - line[p + 'accuracy']:.4f}", f"{line[p + 'miou']:.3f}", "") for p in ("val/", "val/block_mean/")]
    else:
        pairs = [(f"{line[p + 'rmse']:.4g}", f"{line[p + 'psnr']:.2f}", f"{line[p + 'ssim']:.3f}") for p in ("val/", "val/block_mean/")]
    figures = [x for pair in zip(*pairs, strict=True) for x in pair]
    return f"| {' | '.join([modality, decoder, *figures])} | {line['val/codes']:.0%} | {line['val/perplexity']:.0f} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
