"""Times what users of the released models do, and TerraTorch beside it.

    python benchmarks/inference.py                          # base features, S2L2A tokenizer, S2L2A to four modalities; float32
    python benchmarks/inference.py --peer --rounds 3 --out benchmarks/results/inference.md
    python benchmarks/inference.py --batches 1,8,32 --repeats 1 --out benchmarks/results/inference.md
    python benchmarks/inference.py --samplers DIR --out benchmarks/results/inference.md    # trains small tokenizers in DIR

Each of these is a section of the file, which replaces that section alone. Every case runs in a process of its own, ours and the reference's
one after the other; compile time is apart. Weights are random, but for the samplers: they do not change the work. `--peer` needs the
`parity` extra, or the environment that `make test-parity` uses.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import process

PARITY = Path(__file__).parent.parent / "tests" / "parity"
TARGETS = ["S1GRD", "LULC", "DEM", "NDVI"]
THOUGHTS = ["LULC", "NDVI"]
STEPS = 10  # of a diffusion decoder

CASES = {
    "features, batch 1": ("features", 1),
    "features, batch 8": ("features", 8),
    "S2L2A encode": ("encode", 1),
    f"S2L2A decode, {STEPS} steps": ("decode", 1),
    f"S2L2A to {', '.join(TARGETS)}, {STEPS} steps": ("generate", 1),
    f"TiM: features of S2L2A and generated {', '.join(THOUGHTS)}": ("think", 1),
    f"TiM: features of S2L2A and generated {', '.join(THOUGHTS)}, batch 8": ("think", 8),
}


def images(batch: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(batch, size, size, c)).astype(np.float32) for name, c in (("S2L2A", 12), ("S1GRD", 2))}


def ours(work: str, batch: int, size: int) -> Callable[[], object]:
    import terramind_jax as tm

    x = images(batch, size)
    if work == "features":
        model = tm.load("terramind_v1_base", "random", modalities=list(x))
        return lambda: model(x)
    if work == "generate":
        model = tm.load("terramind_v1_base_generate", "random", modalities=["S2L2A"], output_modalities=TARGETS)
        return lambda: model.generate({"S2L2A": x["S2L2A"]}, timesteps=STEPS)
    if work == "think":
        model = tm.load("terramind_v1_base_tim", "random", modalities=["S2L2A"], tim_modalities=THOUGHTS)
        return lambda: model({"S2L2A": x["S2L2A"]})
    model = tm.load("terramind_v1_tokenizer_s2l2a", "random")
    tokens = np.random.default_rng(1).integers(0, model.module.config.codebook_size, (batch, size // 16, size // 16))
    return (lambda: model.encode(x["S2L2A"])) if work == "encode" else (lambda: model.decode(tokens, timesteps=STEPS))


def peers(work: str, batch: int, size: int) -> Callable[[], object]:
    sys.path.insert(0, str(PARITY))
    import peer
    import torch

    torch.set_grad_enabled(False)
    x = {name: peer.nchw(value) for name, value in images(batch, size).items()}
    if work == "features":
        model = peer.build("terramind_v1_base", backbone=True, modalities=list(x))
        return lambda: model(dict(x))
    if work == "generate":
        model = peer.build("terramind_v1_base_generate", modalities=["S2L2A"], output_modalities=TARGETS, timesteps=STEPS)
        return lambda: model({"S2L2A": x["S2L2A"]})
    if work == "think":
        model = peer.build("terramind_v1_base_tim", modalities=["S2L2A"], tim_modalities=THOUGHTS)
        return lambda: model({"S2L2A": x["S2L2A"]})
    model = peer.build("terramind_v1_tokenizer_s2l2a")
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 15360, (batch, size // 16, size // 16)))
    return (lambda: model.tokenize(x["S2L2A"])) if work == "encode" else (lambda: model.decode_tokens(tokens, timesteps=STEPS))


def measure(side: str, case: str, size: int, repeats: int) -> dict[str, float]:
    """Seconds of the first call and the median of those after it."""
    work, batch = CASES.get(case) or (case.split()[0], int(case.split()[1]))
    run = {"ours": ours, "peer": peers}[side](work, batch, size)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        out = run()
        if side == "ours":
            import jax

            jax.block_until_ready(out)
        times.append(time.perf_counter() - begin)
    return {"first": times[0], "seconds": statistics.median(times[1:])}


def child(side: str, case: str, arguments: argparse.Namespace) -> dict[str, float]:
    return process.measure(__file__, "--side", side, "--case", case, f"--size={arguments.size}", f"--repeats={arguments.repeats}")


def report(arguments: argparse.Namespace) -> str:
    lines = [
        f"Inference on {process.where()}, float32, {arguments.size} px; "
        f"medians of {arguments.rounds} x {arguments.repeats} calls, one process after the other.",
        "",
        "| case | s | first call s | reference s | speed relative to the reference |",
        "|---|---|---|---|---|",
    ]
    for case in [c for c in CASES if arguments.only in c]:
        rounds = [
            (child("ours", case, arguments), child("peer", case, arguments) if arguments.peer else None) for _ in range(arguments.rounds)
        ]
        mine, first = (statistics.median(a[key] for a, _ in rounds) for key in ("seconds", "first"))
        theirs = statistics.median(b["seconds"] for _, b in rounds) if arguments.peer else None
        beside = f"{theirs:.2f} | {theirs / mine:.2f}" if theirs else "- | -"
        lines.append(f"| {case} | {mine:.2f} | {first:.1f} | {beside} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def batches(arguments: argparse.Namespace) -> str:
    """Generation of all targets at several batch sizes."""
    what = f"S2L2A to {', '.join(TARGETS)}, {STEPS} steps, base, on {process.where()}, float32, {arguments.size} px"
    lines = [f"{what}; medians of {arguments.repeats} calls.", "", "| batch | s | s a tile | first call s |", "|---|---|---|---|"]
    for batch in map(int, arguments.batches.split(",")):
        try:
            one = child("ours", f"generate {batch}", arguments)
            lines.append(f"| {batch} | {one['seconds']:.1f} | {one['seconds'] / batch:.2f} | {one['first']:.1f} |")
        except MemoryError:
            lines.append(f"| {batch} | out of memory | | |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def write_section(path: Path, title: str, body: str) -> None:
    """Puts ``## title`` and `body` into a Markdown file, in the place of the section that has that title."""
    sections = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=^## |\Z)", path.read_text(), re.M | re.S)) if path.exists() else {}
    sections[title] = f"{body.rstrip()}\n\n"
    text = "".join(f"## {name}\n\n{text}" for name, text in sections.items())
    path.write_text(f"# Inference\n\n{text.rstrip()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="time TerraTorch, too")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls a process")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each ours then the reference")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--batches", metavar="N,N", help="instead: generation at these batch sizes")
    parser.add_argument("--samplers", type=Path, metavar="DIR", help="instead: steps and error of samplers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.case, arguments.size, arguments.repeats)))
        return
    if arguments.samplers:
        import samplers

        title, text = "Samplers", samplers.section(arguments.samplers)
    elif arguments.batches:
        title, text = "Batches", batches(arguments)
    else:
        title, text = "Speed", report(arguments)
    print("\n" + text)
    if arguments.out:
        write_section(arguments.out, title, text)


if __name__ == "__main__":
    main()
