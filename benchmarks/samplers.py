"""Steps of a diffusion decoder against its error, for DDIM as published and for DPM-Solver++: ``inference.py --samplers=DIR``.

Small diffusion tokenizers are trained on the embedded world in DIR (what is there already is kept). Crops of held-out scenes are encoded,
and decoded from one noise without a clip. The error of a sampler is its distance from where DDIM arrives with all 1000 steps; beside it is
the distance from the image itself, which has the loss of the tokens in it. Both are root mean squares in standard deviations.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from seams import command

from terramind_jax import cli, modalities, tokenizer
from terramind_jax.data import world
from terramind_jax.train import tokenizer as training

STEPS_TRAINED = {"S2L2A": 2400, "S1GRD": 800}  # by modality
SCENES, VAL_SCENES = 512, 64
TRAINING = {"train.batch_size": 2, "run.eval_batches": 2}
CROPS, SIDE = 4, 128
STEPS = {"ddim": (5, 10, 20, 25, 50, 100), "dpmpp": (5, 8, 10, 12, 16, 25)}
LIMIT, PUBLISHED = 1000, 50
COMPARED = "That is beside our own DDIM, and of decoders alone, without a clip; what the reference takes is in the table of speed above."
HEAD = "| modality | sampler | steps | from 1000 steps | from the image | s an image |\n|---|---|---|---|---|---|"


def section(out: Path) -> str:
    """The table, and below it how much faster DPM-Solver++ is at the error of the published steps."""
    rows, verdicts = [HEAD], []
    for modality in STEPS_TRAINED:
        found = measure(*training.load(train(out, modality))[:2], modality)
        rows += [
            f"| {modality} | {name} | {n} | {x['limit']:.4f} | {x['image']:.4f} | {x['seconds']:.3f} |" for (name, n), x in found.items()
        ]
        verdicts.append(verdict(modality, found))
    steps = " and ".join(f"{steps} ({modality})" for modality, steps in STEPS_TRAINED.items())
    trained = f"{steps} steps of {TRAINING['train.batch_size']} tiles"
    about = (
        f"Samplers of diffusion decoders: tokenizers trained for {trained} of the embedded world, {CROPS} held-out crops of {SIDE} px, in"
    )
    return "\n".join([f"{about} standard deviations.", "", *rows, "", *verdicts, "", COMPARED]) + "\n"


def train(out: Path, modality: str) -> Path:
    shards, workdir = out / "shards", out / "tokenizers" / modality
    if not shards.is_dir():
        cli.main(["data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}"])
    fields = {"model.modality": modality, "model.decoder": "unet", "train.steps": STEPS_TRAINED[modality], **TRAINING}
    command("train-tokenizer", "configs/tokenizer/small.py", workdir, shards, fields)
    return workdir


def measure(module: tokenizer.Tokenizer, variables: dict, modality: str) -> dict[tuple[str, int], dict[str, float]]:
    """Distances and seconds an image of each sampler and number of steps."""
    scenes = (world.scene(0, i, "val", -(-SIDE // 6) * 6).arrays for i in itertools.count())
    crops = [arrays[modality][:SIDE, :SIDE] for arrays in itertools.islice((a for a in scenes if modality in a), CROPS)]
    images = modalities.standardize(modality, np.stack(crops))
    tokens = tokenizer.apply(module, variables, images, "encode")

    def decode(sampler: str, steps: int) -> np.ndarray:
        seeds = np.arange(CROPS)
        made = tokenizer.decode(module, variables, tokens, seed=seeds, timesteps=steps, sampler=sampler, clip="none")
        return np.asarray(jax.block_until_ready(made))

    limit, found = decode("ddim", LIMIT), {}
    for sampler, numbers in STEPS.items():
        for steps in numbers:
            made, times = decode(sampler, steps), []
            for _ in range(3):
                begun = time.perf_counter()
                decode(sampler, steps)
                times.append(time.perf_counter() - begun)
            distances = {"limit": rms(made - limit), "image": rms(made - images)}
            found[sampler, steps] = distances | {"seconds": statistics.median(times) / CROPS}
    return found


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def verdict(modality: str, found: dict[tuple[str, int], dict[str, float]]) -> str:
    published = found["ddim", PUBLISHED]
    enough = [n for n in STEPS["dpmpp"] if found["dpmpp", n]["limit"] <= published["limit"]]
    if not enough:
        return f"{modality}: dpmpp does not reach the error of {PUBLISHED} steps of ddim."
    faster = published["seconds"] / found["dpmpp", enough[0]]["seconds"]
    return f"{modality}: dpmpp reaches the error of {PUBLISHED} steps of ddim with {enough[0]}, {faster:.1f} times as fast."
