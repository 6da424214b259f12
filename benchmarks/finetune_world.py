"""Fine-tunes the quickstart's model on the embedded world with few labels, from its weights and from random ones, in an hour on a core.

    terramind-jax quickstart --out=quickstart
    python benchmarks/finetune_world.py --quickstart=quickstart --steps=200 --out=benchmarks/results/finetune_world.md

Land cover, and elevation where there is no water, from Sentinel-2 of the quickstart's own scenes; scores are of its held-out scenes. Its
pretraining has seen both as targets on the same training scenes: what is asked is what its weights save in labels, not more. Each case
takes the same number of steps on 5, 20 or 100 % of the labels, from three seeds, which also choose the labels: all cases of a seed
have the same, so that their differences are told by seed. Beside them stands what needs no image, a constant of the training labels.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import process
from ml_collections import ConfigDict
from scipy import stats

from terramind_jax import metrics, modalities, weights
from terramind_jax.data import crops
from terramind_jax.data.index import Index, open_index
from terramind_jax.tasks import datasets, finetune
from terramind_jax.tasks.config import finetuning

SHARES = (0.05, 0.2, 1.0)
ARMS = {"random": ("", "random"), "pretrained": ("", "model"), "pretrained, TiM of LULC and DEM": ("_tim", "model")}
WATER = 1  # LULC code
SCENES, BATCH_SIZE = 160, 4
KILOMETRE = 1000.0
TASKS = {
    "LULC": dict(task="segmentation", ignore_index=0, class_names=modalities.get("LULC").classes),
    "DEM": dict(task="regression"),
}
METRICS = {"LULC": ("val/mIoU", 100, "mIoU, %"), "DEM": ("val/rmse", KILOMETRE, "RMSE, m")}
SIGNS = {"LULC": 1, "DEM": -1}  # whether more is better
CONSTANTS = {"LULC": "the most common class, everywhere", "DEM": "the mean, everywhere"}  # of the training labels; no network
PAIRS = (("pretrained", "random"), ("pretrained, TiM of LULC and DEM", "pretrained"))
Spread = tuple[float, float]  # mean and standard deviation over seeds, the latter that of a sample


def write(index: Index, split: str, scenes: int, root: Path) -> int:
    """The centre crops of a split as ``.npy``, and its list of names; returns how many there are."""
    names = []
    for i in range(min(len(index), scenes)):
        image, cover, height = (np.ascontiguousarray(crops.crop(index.read(i, m), 0)) for m in ("S2L2A", "LULC", "DEM"))
        above = np.where(cover[..., 0] == WATER, np.nan, height[..., 0].astype(np.float32) / KILOMETRE)
        names.append(f"{split}{i:04d}")
        for folder, array in (("S2L2A", np.moveaxis(image, -1, 0)), ("LULC", cover[..., 0]), ("DEM", above)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / folder / f"{names[-1]}.npy", array)
    (root / f"{split}.txt").write_text("\n".join(names))
    return len(names)


def settings(root: Path, quickstart: Path, task: str, arm: str, share: float, seed: int, steps: int) -> ConfigDict:
    suffix, source = ARMS[arm]
    found = weights.saved_options("terramind_v1_tiny", quickstart / "model")
    config = finetuning()
    config.model.update(name=f"terramind_v1_tiny{suffix}", weights=str(quickstart / source) if source == "model" else source)
    config.model.sizes, config.model.codebooks = ConfigDict(found["sizes"]), ConfigDict(found["codebooks"])
    config.model.update(tim_modalities=("LULC", "DEM"), tim_temperature=0.0, layers=(0,) * 4, channels=(64, 32, 32, 16))
    own = dict(images={"S2L2A": {"folder": "S2L2A", "pattern": "*.npy"}}, labels={"folder": task, "pattern": "*.npy"})
    own["splits"] = {split: f"{split}.txt" for split in ("train", "val")}
    config.data.update(dataset="generic", root=str(root), d4=False, labels=share)
    config.data.options = ConfigDict({**own, **TASKS[task]})
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup=0.05, clip_norm=1.0)
    config.train.update(batch_size=BATCH_SIZE, steps=steps, seed=seed)
    config.run.update(eval_every=steps, checkpoint_every=steps, log_every=steps, progress=False, tensorboard=False)
    return config


def constant(config: ConfigDict) -> float:
    """The score on the validation split of what stands in `CONSTANTS`, with the labels that `config` draws."""
    train, held_out = (finetune.open_split(config, split) for split in ("train", "val"))
    if train.num_classes:
        seen, true = datasets.class_counts(train), datasets.class_counts(held_out)
        confusion = np.zeros((len(true), len(true)), np.int64)
        confusion[:, seen.argmax()] = true
        return metrics.class_scores(confusion, held_out.ignore_index)["mIoU"]
    labels, truth = (np.concatenate([split.target(i).ravel() for i in range(len(split))]) for split in (train, held_out))
    return float(np.sqrt(np.nanmean(np.square(truth - np.nanmean(labels, dtype=np.float64)))))


def spread(values: list[float]) -> Spread:
    return statistics.mean(values), statistics.stdev(values)


def is_clear(difference: Spread, seeds: int) -> bool:
    """Whether a mean over seeds is other than zero by a two-sided t-test at 5 %: of three by more than 4.3 standard errors."""
    mean, deviation = difference
    return abs(mean) > stats.t.ppf(0.975, seeds - 1) * deviation / math.sqrt(seeds)


def pairs(task: str) -> list[tuple[str, str]]:
    """What is compared: every arm with the constant, and `PAIRS`."""
    return [*((arm, CONSTANTS[task]) for arm in ARMS), *PAIRS]


def differences(scores: dict[tuple, list[float]]) -> dict[tuple, Spread]:
    """Of the pairs, seed by seed, by task, pair and share."""
    cases = [(task, pair, share) for task in TASKS for pair in pairs(task) for share in SHARES]
    both = {(task, pair, share): [scores[task, name, share] for name in pair] for task, pair, share in cases}
    return {case: spread([x - y for x, y in zip(a, b, strict=True)]) for case, (a, b) in both.items()}


def table(task: str, found: dict[tuple, Spread], paired: dict[tuple, Spread]) -> str:
    """Scores of the arms and of a constant, and the differences of pairs; `found` is by task, arm or constant, and share."""
    lines = [["backbone", *(f"{share:.0%} of the labels" for share in SHARES)], ["---"] * (1 + len(SHARES))]
    lines += [[name, *(_text(found[task, name, share]) for share in SHARES)] for name in (CONSTANTS[task], *ARMS)]
    lines += [[f"{a} minus {b}, by seed", *(_text(paired[task, (a, b), share], "+") for share in SHARES)] for a, b in PAIRS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def findings(task: str, paired: dict[tuple, Spread], seeds: int) -> str:
    """Which differences are clear, as far as so few seeds can tell."""
    lines = [f"Clear is a difference by seed that a t-test of {seeds} seeds tells from none (two-sided, 5 %; each case for itself):", ""]
    for pair in pairs(task):
        words = []
        for share in SHARES:
            difference = paired[task, pair, share]
            word = "better" if SIGNS[task] * difference[0] > 0 else "worse"
            words.append(f"{word if is_clear(difference, seeds) else 'nothing clear'} at {share:.0%}")
        lines.append(f"- {' against '.join(pair)}: {', '.join(words)}")
    return "\n".join(lines)


def tally(scores: dict[tuple, list[float]]) -> str:
    """In how many pairs of runs of one seed, task and share of the labels each of `PAIRS` is the better."""
    lines = []
    for a, b in PAIRS:
        gains = [
            SIGNS[task] * (x - y)
            for task, share in itertools.product(TASKS, SHARES)
            for x, y in zip(scores[task, a, share], scores[task, b, share], strict=True)
        ]
        lines.append(f"- {a} against {b}: better in {sum(gain > 0 for gain in gains)} of {len(gains)} pairs")
    return "\n".join(["All seeds, tasks and shares together, of which those of one seed have labels in common:", "", *lines])


def _text(value: Spread, sign: str = "") -> str:
    mean, deviation = value
    return f"{mean:{sign}.1f} ± {deviation:.1f}"


def report(scores: dict[tuple, list[float]], steps: int, counts: dict[str, int], minutes: float, command: str) -> str:
    seeds = len(next(iter(scores.values())))
    found, paired = {case: spread(values) for case, values in scores.items()}, differences(scores)
    text = (
        f"Fine-tuning the quickstart's model on the embedded world, on {process.where()}: {counts['train']} scenes of 224 pixels, {steps} "
        f"steps of {BATCH_SIZE}, all of the backbone and a U-Net trained; mean and standard deviation of {seeds} seeds on {counts['val']} "
        f"held-out scenes; {minutes:.0f} minutes in all. Command: `{command}`.\n"
    )
    for task, (_, _, title) in METRICS.items():
        text += f"\n{task} from Sentinel-2 ({title}):\n\n{table(task, found, paired)}\n\n{findings(task, paired, seeds)}\n"
    return f"{text}\n{tally(scores)}\n"


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", required=True, type=Path, metavar="DIR", help="what `terramind-jax quickstart` made")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="two at least, of which differences have a standard deviation")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes that are all of the labels")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="also write the tables there, after every seed but the first"
    )
    arguments = parser.parse_args(flags)
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; of fewer than 2 nothing is known of chance.")
    start, scores, counts = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            index = open_index(arguments.quickstart / "shards", split)
            counts[split] = write(index, split, arguments.scenes, root)
        for seed in range(arguments.seeds):
            for task, share in itertools.product(TASKS, SHARES):
                found = constant(settings(root, arguments.quickstart, task, "random", share, seed, arguments.steps)) * METRICS[task][1]
                scores.setdefault((task, CONSTANTS[task], share), []).append(found)
            for number, case in enumerate(itertools.product(TASKS, ARMS, SHARES)):
                name, factor, _ = METRICS[case[0]]
                config = settings(root, arguments.quickstart, *case, seed, arguments.steps)
                found = finetune.train(config, root / f"run_{seed}_{number}")[name] * factor
                scores.setdefault(case, []).append(found)
                print(seed, *case, f"{found:.1f}, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
            if not seed:
                continue
            command = shlex.join(["python", "benchmarks/finetune_world.py", *sys.argv[1:]])
            text = report(scores, arguments.steps, counts, (time.monotonic() - start) / 60, command)
            if arguments.out:
                arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
