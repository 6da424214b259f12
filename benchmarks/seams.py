"""Seams in large generated scenes: windows that share their noise and tokens, against naive tiles and the reference's blending.

    python benchmarks/seams.py --out=DIR [--to=S1GRD,DEM,LULC] [--side=1024] [--steps=500] [--batch_size=2] [--results=FILE]

Trains diffusion tokenizers and a small transformer on the embedded world in DIR (what is there already is kept), makes one scene of the
world, and generates it from Sentinel-2 in three ways: by `generate` of this package; as naive tiles, side by side, each drawn by itself;
and with windows as TerraTorch 1.2.11 cuts and blends them (`terratorch/tasks/tiled_inference.py` at its defaults: 224 pixels every 192,
reflected by 8 that are cut off again, cosine ramps), each drawn by itself. A line of the table has the mean absolute jump across the
borders of windows and across all other borders of tokens, as tokens of 16 x 16 pixels have edges everywhere. The scene itself, at the
lines of our windows, stands above each.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from process import measure, where

from terramind_jax import cli, draws, generate, generate_scenes, geo, metrics
from terramind_jax.data import world
from terramind_jax.scenes import reading
from terramind_jax.scenes.feeding import Network
from terramind_jax.train import pretrain

ROOT = Path(__file__).parents[1]
SCENES, VAL_SCENES = 512, 64
DECODERS = {"S1GRD": "unet", "DEM": "unet", "LULC": "vit"}  # classes have no diffusion decoder
LEVELS = {"S1GRD": 12}  # as the quickstart has it
PRETRAINING = 800  # steps
WINDOW, STRIDE, DELTA = 224, 192, 8  # TerraTorch's; the first is the models'
PATCH, BATCH = reading.PATCH, 8
DIFFUSION = dict(timesteps=10, sampler="ddim")  # TerraTorch's sampler
OURS = "overlapping, shared noise and tokens"
PLACE = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_300_000.0)
HEAD = "| modality | windows | jump at borders of windows | at others of tokens | ratio | seconds |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--to", default=",".join(DECODERS), help="what to generate, in this order")
    parser.add_argument("--side", type=int, default=1024, help="pixels along the scene")
    parser.add_argument("--steps", type=int, default=500, help="of training a tokenizer")
    parser.add_argument("--batch_size", type=int, default=2, help="in that training")
    parser.add_argument("--sides", default="512,1024,1536", help="pixels along the scenes whose memory and time are measured")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one generation in a process of its own
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments.out, arguments.side, arguments.to.split(","))
    to = arguments.to.split(",")
    train(arguments.out, to, arguments.steps, arguments.batch_size)
    trained = f"tokenizers trained for {arguments.steps} steps of {arguments.batch_size} tiles"
    text = [f"Scene of {arguments.side} x {arguments.side} pixels, {DIFFUSION['timesteps']} steps of DDIM, {trained}; {where()}.", "", HEAD]
    for line in seams(arguments.out, arguments.side, to):
        print(line, flush=True)
        text.append(line)
    text += ["", "| pixels | megapixels/s | peak memory MiB | of which before the scene |", "|---|---|---|---|"]
    for side in map(int, filter(None, arguments.sides.split(","))):
        make_scene(arguments.out, side)
        text.append(memory_row(side, measure(__file__, "--alone", f"--out={arguments.out}", f"--side={side}", f"--to={arguments.to}")))
    print("\n".join(text))
    if arguments.results:
        arguments.results.write_text(f"# Seams, speed and memory of large scenes\n\n{HOW}\n" + "\n".join(text) + "\n")


HOW = """`python benchmarks/seams.py --out=DIR --results=benchmarks/results/seams.md`; its first lines say what is compared.

A jump is the mean absolute difference across a line of pixels, in the unit of the modality; of LULC the share of pixels that differ.
"At borders of windows" are the lines where a window begins or ends. "At others of tokens" are all other lines between tokens of 16 x 16
pixels: a decoded image has edges there, too, so windows leave no seam where the ratio of the two is 1.

TerraTorch's ratios are lower as its windows begin and end elsewhere in the image, not because they fit each other better. It cuts 8 pixels
off each window, so that those lines run through the middle of tokens, where images are smooth, and are compared with edges of tokens; and
its ramps give a window hardly any weight where it begins or ends. What overlaps is a mean of draws that know nothing of each other, and is
blurred: that does not show as a jump.

"The truth" is the scene itself, at the lines of our windows. Those are few, and what crosses them differs from what crosses others: a
ratio may be 1.08 or 1.09 without any window. Only S1GRD carries the claim, within 5 % of 1: of DEM and LULC, networks as briefly trained as
these make images some 20 times as rough as the truth at any line, and in that a slight seam would not show.

Peak memory is that of a process, and reached while programs are compiled: the 54 MB of all pixels of 1024 x 1024 (2 + 1 + 10 float32) would
hide in it. That memory does not grow with the height of a scene is a test (`test_memory_does_not_grow_with_the_height`, which counts
what Python and NumPy allocate): one row of windows is held, so that it grows with the width alone.
"""


# ---- what generates ----


def train(out: Path, to: Sequence[str], steps: int, batch_size: int) -> None:
    shards = out / "shards"
    if not shards.is_dir():
        cli.main(["data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}"])
    for modality in to:
        own = {"model.modality": modality, "model.decoder": DECODERS[modality], "train.steps": steps, "train.batch_size": batch_size}
        own |= {"run.eval_batches": 2} | ({"model.levels": LEVELS[modality]} if modality in LEVELS else {})
        command("train-tokenizer", "configs/tokenizer/small.py", out / "tokenizers" / modality, shards, own)
    if not all((shards / "train" / f"{modality}_tokens").is_dir() for modality in to):
        cli.main(["tokenize", f"--data={shards}", f"--weights={out / 'tokenizers'}", f"--out={shards}"])
    own = {"data.inputs": f"S2L2A,{','.join(to)}", "data.targets": ",".join(to), "train.steps": PRETRAINING}
    command("pretrain", "terramind_jax/quickstart/pretrain.py", out / "model", shards, own)


def command(name: str, config: str, workdir: Path, shards: Path, fields: dict[str, object]) -> None:
    if (workdir / "done").exists():
        return
    given = [f"--config.{key}={value}" for key, value in {"data.root": shards, **fields}.items()]
    if cli.main([name, f"--config={ROOT / config}", f"--workdir={workdir}", *given]):
        raise SystemExit(f"{name} of {workdir} failed.")
    (workdir / "done").touch()


def make_scene(out: Path, side: int) -> Path:
    """Sentinel-2 of a scene of the world as a GeoTIFF."""
    path = out / f"scene_{side}.tif"
    if not path.exists():
        geo.write(path, truth(side)["S2L2A"], like=geo.Place("EPSG:32633", PLACE, side, side), modality="S2L2A")
    return path


def truth(side: int) -> dict[str, np.ndarray]:
    """All modalities of the scene, ``[side, side, C]``; one of more than 1024 pixels repeats it mirrored."""
    size = min(side, 1024)
    arrays = world.scene(0, 1, "val", -(-size // 6) * 6).arrays
    more = [(0, side - size), (0, side - size), (0, 0)]
    return {name: np.pad(x[:size, :size], more, "symmetric") for name, x in arrays.items()}


# ---- seams ----


def seams(out: Path, side: int, to: Sequence[str]) -> list[str]:
    path = make_scene(out, side)
    module, variables, _ = pretrain.load(out / "model")
    network = Network(module, variables, generate_scenes.load_tokenizers(module, ["S2L2A"], to, out / "tokenizers"))
    stored = geo.read(path, "S2L2A").astype(np.float32)
    own, tiled = starts(side, WINDOW // 2), starts(side, WINDOW)
    cut = starts(side + 2 * DELTA, STRIDE)  # of the visible parts of windows
    ways = {  # how to make it, lines where windows begin or end, and on which the grid of tokens begins
        OURS: (lambda: ours(out, path, to), {*own, *(x + WINDOW for x in own)}, 0),
        "naive tiles": (lambda: tiles(network, stored, to), {*tiled}, 0),
        "as TerraTorch blends": (lambda: terratorch(network, stored, to), {*cut, *(x + WINDOW - 2 * DELTA for x in cut)}, -DELTA % PATCH),
    }
    measured = truth(side)
    lines = {name: [seam_row(name, "the truth", measured[name], *ways[OURS][1:])] for name in to}
    for way, (run, borders, grid) in ways.items():
        begun = time.monotonic()
        made = run()
        seconds = time.monotonic() - begun
        for name, image in made.items():
            lines[name].append(seam_row(name, way, image, borders, grid, f"{seconds:.0f}"))
    return [row for found in lines.values() for row in found]


def seam_row(name: str, way: str, image: np.ndarray, borders: set[int], grid: int, seconds: str = "") -> str:
    """A line of the table: jumps across `borders` and across all other lines of the grid of tokens, which begins at `grid`."""
    side, image = len(image), image[..., 0] if name == "LULC" and image.ndim == 3 else image
    borders = sorted(borders & set(range(1, side)))
    others = sorted({*range(grid or PATCH, side, PATCH)} - {*borders})
    at, elsewhere = (metrics.jump(image, x, x) for x in (borders, others))
    return f"| {name} | {way} | {at:.4g} | {elsewhere:.4g} | {at / elsewhere:.3f} | {seconds} |"


def starts(side: int, stride: int) -> list[int]:
    """First pixels of windows; the last is shifted back to the edge."""
    return [*range(0, side - WINDOW, stride), side - WINDOW]


def ours(out: Path, path: Path, to: Sequence[str]) -> dict[str, np.ndarray]:
    call = dict(weights=out / "model", tokenizers=out / "tokenizers", inputs={"S2L2A": path}, to=to, **DIFFUSION)
    folder = out / f"ours_{time.time_ns()}"
    written = generate_scenes.run(**call, out=folder)
    return {name: np.asarray(geo.read(p)) for name, p in zip(to, written, strict=True)}


def tiles(network: Network, stored: np.ndarray, to: Sequence[str]) -> dict[str, np.ndarray]:
    """Side by side; the last ones, which reach over others, are laid on top."""
    return joined(network, stored, to, WINDOW, None)


def terratorch(network: Network, stored: np.ndarray, to: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each window the edge is cut off; ramps of cosines weight what overlaps."""
    length, ramp = WINDOW - 2 * DELTA, min(WINDOW // 2, WINDOW - STRIDE) - DELTA
    rise = np.cos(np.pi * (np.arange(ramp)[::-1] + 1) / (ramp + 1)) / 2 + 0.5
    weight = np.concatenate([rise, np.ones(length - 2 * ramp), rise[::-1]])
    weight = np.pad(weight[:, None] * weight + 1e-6, DELTA)
    made = joined(network, np.pad(stored, [(DELTA, DELTA), (DELTA, DELTA), (0, 0)], "reflect"), to, STRIDE, weight)
    return {name: image[DELTA:-DELTA, DELTA:-DELTA] for name, image in made.items()}


def joined(network: Network, stored: np.ndarray, to: Sequence[str], stride: int, weight: np.ndarray | None) -> dict[str, np.ndarray]:
    """Windows of a scene, each drawn with a seed of its own, in a weighted mean, or laid over each other; classes by probabilities."""
    side = len(stored)
    corners = [(r, c) for r in starts(side, stride) for c in starts(side, stride)]
    sums, weights = {}, np.full((side, side, 1), 1e-12)
    for begin in range(0, len(corners), BATCH):
        batch = corners[begin : begin + BATCH]
        images = np.stack([stored[r : r + WINDOW, c : c + WINDOW] for r, c in batch + batch[-1:] * (BATCH - len(batch))])
        seeds = np.arange(begin, begin + BATCH)
        what = (network.module, network.variables, network.tokenizers, {"S2L2A": images}, to)
        made = generate.generate(*what, seed=seeds, **DIFFUSION)
        for i, (r, c) in enumerate(batch):
            part = np.s_[r : r + WINDOW, c : c + WINDOW]
            weights[part] = 1 if weight is None else weights[part] + weight[..., None]
            for name, windows in made.items():
                window = draws.probabilities(windows[i]) if name == "LULC" else windows[i]
                total = sums.setdefault(name, np.zeros((side, side, window.shape[-1])))
                total[part] = window if weight is None else total[part] + weight[..., None] * window
    means = {name: total / weights for name, total in sums.items()}
    return {name: x.argmax(-1) if name == "LULC" else x for name, x in means.items()}


# ---- memory and speed ----


def alone(out: Path, side: int, to: Sequence[str]) -> None:
    """Generates one scene and prints what that took, as JSON."""
    warm = make_scene(out, 2 * WINDOW)
    ours(out, warm, to)  # compiles
    before, begun = peak(), time.monotonic()
    ours(out, make_scene(out, side), to)
    print(json.dumps({"seconds": time.monotonic() - begun, "before": before, "peak": peak()}))


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_row(side: int, found: dict[str, float]) -> str:
    return f"| {side} x {side} | {side**2 / 1e6 / found['seconds']:.4f} | {found['peak']:.0f} | {found['before']:.0f} |"


if __name__ == "__main__":
    main()
