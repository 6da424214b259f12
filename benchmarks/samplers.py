"""Steps of a diffusion decoder against its error, for DDIM as published and for DPM-Solver++: ``inference.py --samplers=DIR``.

Small diffusion tokenizers are trained on the embedded world in DIR (what is there already is kept). Crops of held-out scenes are encoded,
and decoded from one noise without a clip. The error of a sampler is its distance from where DDIM arrives with all 1000 steps; beside it is
the distance from the image itself, which has the loss of the tokens in it. Both are root mean squares in standard deviations. A second
table has distances under the published clip, which is the default, also from where DDIM arrives with it: each step clips what it predicts,
so that the result depends on their number in itself.

With ``--peer`` TerraTorch's DiVAE of the same sizes, which has loaded our weights, decodes the same tokens from the same noise, without a
clip, too. That and our decoders are timed in processes of their own, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import process
from seams import command

from terramind_jax import cli, modalities, tokenizer
from terramind_jax.convert import rules, tokenizers
from terramind_jax.data import world
from terramind_jax.train import tokenizer as training

PARITY = Path(__file__).parent.parent / "tests" / "parity"
STEPS_TRAINED = {"S2L2A": 2400, "S1GRD": 800}  # by modality
SCENES, VAL_SCENES = 512, 64
TRAINING = {"train.batch_size": 2, "run.eval_batches": 2}
CROPS, SIDE = 4, 128
STEPS = {"ddim": (5, 10, 20, 25, 50, 100), "dpmpp": (5, 8, 10, 12, 16, 25)}
CLIPPED_STEPS = {"ddim": (25, 50, 100), "dpmpp": (8, 10, 12, 16)}
LIMIT, PUBLISHED = 1000, 50
REPEATS = 3  # timed calls a process
GIVEN = "given.npz"  # in the work directory
HEAD = "| modality | sampler | steps | from 1000 steps | from the image | s an image |\n|---|---|---|---|---|---|"
CLIPPED_HEAD = "| modality | sampler | steps | from 1000 steps | from the image |\n|---|---|---|---|---|"
PEER_HEAD = "| modality | decoder | steps | from 1000 steps | s an image | times as fast |\n|---|---|---|---|---|---|"
COMPARED = "That is beside our own DDIM, and of decoders alone, without a clip; what the reference takes is in the table of speed above."
PEER_COMPARED = """Beside the reference: TerraTorch's own DiVAE of these sizes, strictly loaded with the weights of each tokenizer, the same
tokens and noise, no clip; medians of {rounds} x {repeats} calls for all {crops} crops, one process after the other, on {where}."""


def section(out: Path, rounds: int = 0) -> str:
    """The table, and below it how much faster DPM-Solver++ is at the error of the published steps; with `rounds` the reference, too."""
    rows, clipped_rows, verdicts, peer_rows = [HEAD], [CLIPPED_HEAD], [], [PEER_HEAD]
    for modality in STEPS_TRAINED:
        workdir = train(out, modality)
        module, variables = training.load(workdir)
        given = prepare(module, variables, modality, workdir)
        found = measure(module, variables, given)
        rows += [
            f"| {modality} | {name} | {n} | {x['limit']:.4f} | {x['image']:.4f} | {x['seconds']:.3f} |" for (name, n), x in found.items()
        ]
        for name, n in cases(CLIPPED_STEPS):
            made = ours(module, variables, given, name, n, "published")()
            clipped_rows.append(f"| {modality} | {name} | {n} | {rms(made - given['clipped']):.4f} | {rms(made - given['images']):.4f} |")
        enough = enough_steps(found)
        verdicts.append(verdict(modality, found, enough))
        if rounds and enough:
            peer_rows += beside(modality, workdir, enough, rounds)
        jax.clear_caches()  # a process may hold the programs of some fifty numbers of steps on Linux (vm.max_map_count), and no more
    steps = " and ".join(f"{steps} ({modality})" for modality, steps in STEPS_TRAINED.items())
    trained = f"{steps} steps of {TRAINING['train.batch_size']} tiles"
    about = (
        f"Samplers of diffusion decoders: tokenizers trained for {trained} of the embedded world, {CROPS} held-out crops of {SIDE} px, in"
    )
    facts = dict(rounds=rounds, repeats=REPEATS, crops=CROPS, where=process.where())
    below = [PEER_COMPARED.replace("\n", " ").format(**facts), "", *peer_rows] if rounds else [COMPARED]
    clipped = ["Under the published clip, which is the default:", "", *clipped_rows]
    return "\n".join([f"{about} standard deviations.", "", *rows, "", *verdicts, "", *clipped, "", *below]) + "\n"


def train(out: Path, modality: str) -> Path:
    shards, workdir = out / "shards", out / "tokenizers" / modality
    if not shards.is_dir():
        cli.main(["data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}"])
    fields = {"model.modality": modality, "model.decoder": "unet", "train.steps": STEPS_TRAINED[modality], **TRAINING}
    command("train-tokenizer", "configs/tokenizer/small.py", workdir, shards, fields)
    return workdir


def prepare(module: tokenizer.Tokenizer, variables: dict, modality: str, workdir: Path) -> dict[str, np.ndarray]:
    """What all decoders are given, and what their images are measured by; also written to `workdir`, for other processes."""
    scenes = (world.scene(0, i, "val", -(-SIDE // 6) * 6).arrays for i in itertools.count())
    crops = [arrays[modality][:SIDE, :SIDE] for arrays in itertools.islice((a for a in scenes if modality in a), CROPS)]
    images = np.asarray(modalities.standardize(modality, np.stack(crops)))
    tokens = np.asarray(tokenizer.apply(module, variables, images, "encode"))
    noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    given = {"images": images, "tokens": tokens, "noise": noise}
    given |= {name: ours(module, variables, given, "ddim", LIMIT, clip)() for name, clip in (("limit", "none"), ("clipped", "published"))}
    np.savez(workdir / "partial.npz", **given)
    (workdir / "partial.npz").rename(workdir / GIVEN)
    return given


def ours(
    module: tokenizer.Tokenizer, variables: dict, given: dict[str, np.ndarray], sampler: str, steps: int, clip: str = "none"
) -> Callable[[], np.ndarray]:
    """Decodes all crops."""
    how = dict(noise=given["noise"], timesteps=steps, sampler=sampler, clip=clip)
    return lambda: np.asarray(tokenizer.decode(module, variables, given["tokens"], **how))


def measure(module: tokenizer.Tokenizer, variables: dict, given: dict[str, np.ndarray]) -> dict[tuple[str, int], dict[str, float]]:
    """Distances and seconds an image of each sampler and number of steps."""
    return timed({key: ours(module, variables, given, *key) for key in cases(STEPS)}, given)


def cases(steps: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """Each sampler with each of its numbers of steps."""
    return [(sampler, n) for sampler, numbers in steps.items() for n in numbers]


def timed(decoders: dict[Any, Callable[[], np.ndarray]], given: dict[str, np.ndarray]) -> dict[Any, dict[str, float]]:
    """Distances and seconds an image of each decoder; they take turns, as a machine is not always equally fast."""
    found, times = {}, {key: [] for key in decoders}
    for key, decode in decoders.items():
        made = decode()
        found[key] = {"limit": rms(made - given["limit"]), "image": rms(made - given["images"])}
    for _ in range(REPEATS):
        for key, decode in decoders.items():
            begun = time.perf_counter()
            decode()
            times[key].append(time.perf_counter() - begun)
    return {key: x | {"seconds": statistics.median(times[key]) / CROPS} for key, x in found.items()}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def enough_steps(found: dict[tuple[str, int], dict[str, float]]) -> int | None:
    """The fewest steps of DPM-Solver++ whose error is at most that of the published ones."""
    return next((n for n in STEPS["dpmpp"] if found["dpmpp", n]["limit"] <= found["ddim", PUBLISHED]["limit"]), None)


def verdict(modality: str, found: dict[tuple[str, int], dict[str, float]], enough: int | None) -> str:
    if not enough:
        return f"{modality}: dpmpp does not reach the error of {PUBLISHED} steps of ddim."
    faster = found["ddim", PUBLISHED]["seconds"] / found["dpmpp", enough]["seconds"]
    return f"{modality}: dpmpp reaches the error of {PUBLISHED} steps of ddim with {enough}, {faster:.1f} times as fast."


# ---- beside the reference ----


def beside(modality: str, workdir: Path, enough: int, rounds: int) -> list[str]:
    """Lines of the reference's published steps, ours, and as many of DPM-Solver++ as reach their error."""
    decoders = {"reference, ddim": ("peer", "ddim", PUBLISHED), "ddim": ("ours", "ddim", PUBLISHED), "dpmpp": ("ours", "dpmpp", enough)}
    measured = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, (side, sampler, steps) in decoders.items():
            flags = [f"--side={side}", f"--sampler={sampler}", f"--steps={steps}", f"--workdir={workdir}"]
            measured[name].append(process.measure(__file__, *flags))
    found = {name: {key: statistics.median(one[key] for one in many) for key in many[0]} for name, many in measured.items()}
    theirs = found["reference, ddim"]["seconds"]
    return [
        f"| {modality} | {name} | {decoders[name][2]} | {x['limit']:.4f} | {x['seconds']:.3f} | {theirs / x['seconds']:.1f} |"
        for name, x in found.items()
    ]


def peers(module: tokenizer.Tokenizer, variables: dict, given: dict[str, np.ndarray], steps: int) -> Callable[[], np.ndarray]:
    """TerraTorch decodes all crops with DDIM."""
    sys.path.insert(0, str(PARITY))
    import peer
    import torch

    model = peer.tokenizer(module.config, seed=None, thresholding=False)
    peer.load_state(model, rules.to_torch(variables, tokenizers.rules(module.config)))
    tokens, noise = torch.from_numpy(given["tokens"]), peer.nchw(given["noise"])

    def decode() -> np.ndarray:
        with mock.patch("torch.randn", lambda *args, **kwargs: noise):
            return peer.nhwc(model.decode_tokens(tokens, timesteps=steps, image_size=SIDE))

    return torch.no_grad()(decode)


def main() -> None:
    """One decoder in a process of its own; prints what `timed` gives, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "peer"))
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workdir", type=Path)
    arguments = parser.parse_args()
    network = training.load(arguments.workdir)
    given = dict(np.load(arguments.workdir / GIVEN))
    if arguments.side == "peer":
        decode = peers(*network, given, arguments.steps)
    else:
        decode = ours(*network, given, arguments.sampler, arguments.steps)
    print(json.dumps(timed({"": decode}, given)[""]))


if __name__ == "__main__":
    main()
