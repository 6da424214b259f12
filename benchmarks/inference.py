"""Times what users of the released models do, and TerraTorch beside it.

    python benchmarks/inference.py                          # base features, S2L2A tokenizer, S2L2A to four modalities
    python benchmarks/inference.py --peer --rounds 3 --out benchmarks/results/inference.md
    python benchmarks/inference.py --batches 1,8 --peer --repeats 1 --out benchmarks/results/inference.md
    python benchmarks/inference.py --batches 32 --peer --repeats 0 --out benchmarks/results/inference.md    # 13 minutes a call on 2 cores
    python benchmarks/inference.py --samplers DIR --peer --rounds 3 --out benchmarks/results/inference.md    # trains small ones in DIR

Each of these is a section of the file, which replaces that section alone. Every case runs in a process of its own, ours and the reference's
one after the other; compile time is apart. Weights are random, but for the samplers: they do not change the work. On a GPU ours is in
bfloat16, as it is there by itself (`--dtype`), and the reference as its users run it, eager in float32 (`--peer_dtype`). `--peer` needs
the `parity` extra, or the environment that `make test-parity` uses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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
DIFFUSION = dict(timesteps=STEPS, sampler="ddim")  # TerraTorch has no other sampler
DTYPES = ("auto", "float32", "bfloat16")

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


def ours(work: str, batch: int, size: int, dtype: str) -> Callable[[], object]:
    """One call, which returns once all is computed."""
    import jax

    run = called(work, batch, size, dtype)
    return lambda: jax.block_until_ready(run())


def called(work: str, batch: int, size: int, dtype: str) -> Callable[[], object]:
    import terramind_jax as tm

    x = images(batch, size)
    if work == "features":
        model = tm.load("terramind_v1_base", "random", dtype=dtype, modalities=list(x))
        return lambda: model(x)
    if work == "generate":
        model = tm.load("terramind_v1_base_generate", "random", dtype=dtype, modalities=["S2L2A"], output_modalities=TARGETS)
        return lambda: model.generate({"S2L2A": x["S2L2A"]}, **DIFFUSION)
    if work == "think":
        model = tm.load("terramind_v1_base_tim", "random", dtype=dtype, modalities=["S2L2A"], tim_modalities=THOUGHTS)
        return lambda: model({"S2L2A": x["S2L2A"]})
    model = tm.load("terramind_v1_tokenizer_s2l2a", "random", dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, model.module.config.codebook_size, (batch, size // 16, size // 16))
    return (lambda: model.encode(x["S2L2A"])) if work == "encode" else (lambda: model.decode(tokens, **DIFFUSION))


def peers(work: str, batch: int, size: int, dtype: str) -> Callable[[], object]:
    """The same of TerraTorch."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # its inputs come from this package, which must leave the GPU alone
    sys.path.insert(0, str(PARITY))
    import torch

    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = peers_called(work, batch, size, device)

    def finished() -> object:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return finished


def peers_called(work: str, batch: int, size: int, device: str) -> Callable[[], object]:
    import peer
    import torch

    x = {name: peer.nchw(value).to(device) for name, value in images(batch, size).items()}
    if work == "features":
        model = peer.build("terramind_v1_base", backbone=True, modalities=list(x)).to(device)
        return lambda: model(dict(x))
    if work == "generate":
        model = peer.build("terramind_v1_base_generate", modalities=["S2L2A"], output_modalities=TARGETS, timesteps=STEPS).to(device)
        return lambda: model({"S2L2A": x["S2L2A"]})
    if work == "think":
        model = peer.build("terramind_v1_base_tim", modalities=["S2L2A"], tim_modalities=THOUGHTS).to(device)
        return lambda: model({"S2L2A": x["S2L2A"]})
    model = peer.build("terramind_v1_tokenizer_s2l2a").to(device)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 15360, (batch, size // 16, size // 16))).to(device)
    return (lambda: model.tokenize(x["S2L2A"])) if work == "encode" else (lambda: model.decode_tokens(tokens, timesteps=STEPS))


def measure(side: str, case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first call and the median of those after it; without any, of the first."""
    work, batch = CASES.get(case) or (case.split()[0], int(case.split()[1]))
    prepare, dtype = (ours, arguments.dtype) if side == "ours" else (peers, arguments.peer_dtype)
    run = prepare(work, batch, arguments.size, dtype)
    times = []
    for _ in range(arguments.repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"first": times[0], "seconds": statistics.median(times[1:] or times)}


def child(side: str, case: str, arguments: argparse.Namespace) -> dict[str, float]:
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("size", "repeats", "dtype", "peer_dtype")]
    return process.measure(__file__, "--side", side, "--case", case, *flags)


def figures(seconds: float) -> str:
    """Three significant figures, at least the whole seconds."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def beside(mine: float | None, theirs: float | None) -> str:
    """The reference's seconds and how many times as fast ours is."""
    return f"{figures(theirs)} | {f'{theirs / mine:.2f}' if mine else '-'}" if theirs else "- | -"


def on(arguments: argparse.Namespace) -> str:
    peer = f", the reference's {arguments.peer_dtype}" if arguments.peer else ""
    return f"{process.where()}, dtype {arguments.dtype}{peer}, {arguments.size} px"


def report(arguments: argparse.Namespace) -> str:
    lines = [
        f"Inference on {on(arguments)}; medians of {arguments.rounds} x {arguments.repeats} calls, one process after the other.",
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
        lines.append(f"| {case} | {figures(mine)} | {first:.1f} | {beside(mine, theirs)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def batches(arguments: argparse.Namespace) -> str:
    """Generation of all targets at several batch sizes."""
    what = f"S2L2A to {', '.join(TARGETS)}, {STEPS} steps, base, on {on(arguments)}"
    columns = ["batch", "s", "s a tile", "first call s", "reference s", "speed relative to the reference"]
    calls = f"medians of {arguments.repeats} calls" if arguments.repeats else "first calls, ours with its compile time"
    lines = [f"{what}; {calls}.", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for batch in map(int, arguments.batches.split(",")):
        sides = {}
        for side in ("ours", "peer") if arguments.peer else ("ours",):
            with contextlib.suppress(MemoryError):
                sides[side] = child(side, f"generate {batch}", arguments)
        mine, theirs = (sides.get(side, {}).get("seconds") for side in ("ours", "peer"))
        own = f"{figures(mine)} | {figures(mine / batch)} | {sides['ours']['first']:.1f}" if mine else "out of memory | - | -"
        lines.append(f"| {batch} | {own} | {beside(mine, theirs)} |")
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
    parser.add_argument("--repeats", type=int, default=3, help="timed calls a process, after the first; 0: the first, for large batches")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each ours then the reference")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="ours; auto is bfloat16 on an accelerator, float32 on a CPU")
    parser.add_argument("--peer_dtype", default="float32", choices=DTYPES[1:], help="the reference's, by autocast")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--batches", metavar="N,N", help="instead: generation at these batch sizes")
    parser.add_argument("--samplers", type=Path, metavar="DIR", help="instead: steps and error of samplers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.case, arguments)))
        return
    if arguments.samplers:
        import samplers

        title, text = "Samplers", samplers.section(arguments.samplers, arguments.rounds if arguments.peer else 0)
    elif arguments.batches:
        title, text = f"Batches of {arguments.batches}", batches(arguments)
    else:
        title, text = "Speed", report(arguments)
    print("\n" + text)
    if arguments.out:
        write_section(arguments.out, title, text)


if __name__ == "__main__":
    main()
