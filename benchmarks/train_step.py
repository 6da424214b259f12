"""Times one pretraining step (forward, backward, AdamW) and sets the machine's floor, and the reference, beside it.

    python benchmarks/train_step.py                              # tiny and base, batch 8, 128 + 128 tokens, float32
    python benchmarks/train_step.py --peer --rounds 3            # the same beside TerraTorch, one process after the other
    python benchmarks/train_step.py --peer --sizes base,large --dtype bfloat16 --batch best --out benchmarks/results/train_step_h200.md

The modality set is the released one (13 inputs, 7 targets). Every measurement (one_step.py) has a process of its own and no two run at
once. `--batch best` doubles the batch, from 8 on a CPU and 64 on a GPU, until memory ends or two doublings bring less than 2 % more
tokens/s, and takes the fastest; where the first does not fit it halves. On a GPU the reference comes twice: as it is, and with
torch.compile from its best batch on. A GPU run ends after `--minutes`, 7.5: the searches share them, ours with twice the part of the
others, none begins a measurement for which its part does not suffice, and torch.compile takes block by block, which are all alike,
rather than the whole model (`--compile model`), for which a large one takes minutes at every batch size.

Tokens are those in filled slots, and MFU counts the operations over them alone, for both sides: of the data sheet's bfloat16 peak on a
GPU or TPU, on a CPU of the measured rate of a large product. The floor is the operations over that rate plus the optimiser's 28 bytes a
parameter over the measured memory rate. Any field of the configuration can be given, as in ``--config.model.unroll=2``. `--peer` needs
the `parity` extra.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import process
from best_batch import NO_TIME, OUT_OF_MEMORY, Result, fastest, search, speed, until
from etils import epath

from terramind_jax import files

SCRIPT = str(Path(__file__).with_name("one_step.py"))
NAMES = {"ours": "ours", "peer": "reference"}
SEES = {"ours": "JAX", "peer": "PyTorch"}
FIELDS = {"inputs": "mask.input_tokens", "targets": "mask.target_tokens"}
FIELDS |= {name: f"model.{name}" for name in ("dtype", "remat", "attention")}


# ---- where and what ----


def agreed_device(asked: str | None, seen: Mapping[str, Mapping[str, str]]) -> str:
    """The kind of device that all sides run on: the one asked for, else the one that the first side prefers of those that all see."""
    for side, kinds in seen.items():
        if asked and asked not in kinds:
            raise SystemExit(
                f"--device={asked}: {SEES[side]} sees only {' and '.join(kinds)}; install its build for a {asked} or leave --device out."
            )
    return asked or next(kind for kind in next(iter(seen.values())) if all(kind in kinds for kinds in seen.values()))


def variants(peer: bool, compiled: str) -> list[tuple[str, str]]:
    """Side and mode of torch.compile of each row."""
    return [("ours", "no"), *([("peer", "no")] if peer else []), *([("peer", compiled)] if peer and compiled != "no" else [])]


def name_of(side: str, compiled: str) -> str:
    return NAMES[side] + ("" if compiled == "no" else f", torch.compile ({compiled})")


def measurement(size: str, side: str, compiled: str, device: str, arguments: argparse.Namespace, end: float) -> Callable[[int], Result]:
    """The function of the batch size that measures a row; a process does not outlive `end`."""
    fields = [f"--config.{field}={getattr(arguments, name)}" for name, field in FIELDS.items()]
    flags = [side, f"--size={size}", f"--device={device}", f"--steps={arguments.steps}", f"--compile={compiled}"]

    def measure(batch: int) -> Result:
        left = end - time.monotonic()
        if left <= 0:
            return {"failed": NO_TIME}
        try:
            one = process.measure(
                SCRIPT, *flags, f"--batch={batch}", *fields, *arguments.overrides, timeout=None if math.isinf(left) else left
            )
        except TimeoutError:
            one = {"failed": NO_TIME}
        except MemoryError:
            one = {"failed": OUT_OF_MEMORY}
        except process.Failed as error:
            print(error, file=sys.stderr, flush=True)
            named = re.findall(r"^[\w.]+: .*", str(error), re.MULTILINE)  # the exception; JAX and torch.compile add advice below it
            one = {"failed": named[-1][:200] if named else "see the error above"}
        print(f"{size}, {name_of(side, compiled)}, batch {batch}: {told(one)}", file=sys.stderr, flush=True)
        return one

    return measure


def told(one: Result) -> str:
    return one.get("failed") or f"{speed(one):,.0f} tokens/s"


def measured(size: str, rows: Sequence[tuple[str, str]], device: str, arguments: argparse.Namespace, end: float, others: float) -> list:
    """For each row what was tried and the results of all rounds at its best batch; `others` is the part of the time that comes later."""
    found, given = [], arguments.batch != "best"
    first = int(arguments.batch) if given else arguments.first_batch or (8 if device == "cpu" else 64)
    largest = arguments.max_batch or (64 if device == "cpu" else math.inf)
    for i, (side, compiled) in enumerate(rows):
        measure = measurement(size, side, compiled, device, arguments, end)
        if given:
            tried = {first: measure(first)}
        else:
            now = time.monotonic()
            part = weight(rows[i]) / (sum(map(weight, rows[i:])) + others)
            start = min(largest, first if compiled == "no" else fastest(found[-1]["tried"]) or first)
            tried = search(until(now + part * (end - now), measure), start, largest)
        best = fastest(tried)
        found.append({"measure": measure, "tried": tried, "batch": best, "rounds": [] if best is None else [tried[best]]})
    for _ in range(arguments.rounds - 1):
        for row in found:
            one = row["measure"](row["batch"]) if row["batch"] is not None else {"failed": NO_TIME}
            if "failed" not in one:
                row["rounds"].append(one)
    return found


def weight(row: tuple[str, str]) -> float:
    """Part of the time: ours compiles for every batch, and the compiled reference begins where the reference was fastest."""
    return 2.0 if row[0] == "ours" else 1.0


# ---- the table ----


def peak_of(of_size: Mapping[str, list]) -> float:
    """FLOP/s of the device, the highest measured if it is measured; 0 if not known."""
    return max((one["peak"] for found in of_size.values() for one in found[0]["rounds"]), default=0.0)


def cells(size: str, name: str, row: Result, mine: Result, peak: float) -> str:
    """One line of the table; `mine` is the row of ours."""
    if not row["rounds"]:
        batch, one = next(reversed(row["tried"].items()))
        return f"| {size} | {name} | {batch} | {one['failed'].replace('|', '/')} | | | | | |"
    seconds = statistics.median(one["seconds"] for one in row["rounds"])
    one = row["rounds"][0]
    mfu = f"{one['flops'] / seconds / peak:.1%}" if peak else "-"
    memory = f"{one['memory'] / 2**30:.1f}" if one["memory"] else "-"
    floor, ratio = "", ""
    if row is mine and peak:
        parts = one["flops"] / peak, 28 * one["parameters"] / max(r["bytes_per_s"] for r in row["rounds"])
        floor = f"{sum(parts):.3g} ({parts[0]:.3g} + {parts[1]:.3g})"
    elif row is not mine and mine["rounds"]:
        ratio = f"{statistics.median(speed(a) / speed(b) for a, b in zip(mine['rounds'], row['rounds'], strict=False)):.2f}"
    return f"| {size} | {name} | {row['batch']} | {seconds:.3g} | {one['tokens'] / seconds:,.0f} | {mfu} | {memory} | {floor} | {ratio} |"


def report(arguments: argparse.Namespace, device: str, seen: Mapping[str, Mapping[str, str]], started: float) -> tuple[str, bool]:
    """The table, and whether every row but those of torch.compile has a number."""
    minutes = arguments.minutes or (math.inf if device == "cpu" else 7.5)
    compiled = arguments.compile or ("blocks" if device == "gpu" else "no")
    rows, sizes = variants(arguments.peer, compiled), arguments.sizes.split(",")
    of_size = {}
    for i, size in enumerate(sizes):
        others = (len(sizes) - 1 - i) * sum(map(weight, rows))
        of_size[size] = measured(size, rows, device, arguments, started + 60 * minutes, others)
    lines, complete = [], True
    for size, found in of_size.items():
        for variant, row in zip(rows, found, strict=True):
            lines.append(cells(size, name_of(*variant), row, found[0], peak_of(of_size)))
            complete &= bool(row["rounds"]) or variant[1] != "no"
    return "\n".join([*heading(arguments, device, seen, of_size), *lines, *tries(rows, of_size, arguments), ""]), complete


def heading(arguments: argparse.Namespace, device: str, seen: Mapping, of_size: Mapping[str, list]) -> list[str]:
    versions = f"; PyTorch {version('torch')}, TerraTorch {version('terratorch')}" if arguments.peer else ""
    where = process.where() if device == "cpu" else f"{seen['ours'][device]}, JAX {version('jax')}"
    one = next((row["rounds"][0] for found in of_size.values() for row in found if row["rounds"]), None)
    filled = f" ({one['inputs']:.0f} and {one['targets']:.0f} filled)" if one else ""
    peak = peak_of(of_size)
    against = "" if not peak else f"MFU is of {peak / 1e12:.3g} TFLOP/s, {'measured' if device == 'cpu' else 'the bfloat16 peak'}. "
    mode = f"remat {arguments.remat}, {arguments.attention} attention{''.join(' ' + o for o in arguments.overrides)}"
    return [
        f"Pretraining step on {where}{versions}. {arguments.dtype}, {arguments.inputs} input and {arguments.targets} target slots{filled}; "
        f"ours with {mode}; medians of {arguments.rounds} x {arguments.steps} steps, one process after the other. {against}"
        "The last column is our tokens/s over the row's.",
        "",
        "| size | side | batch | s a step | tokens/s | MFU | peak GiB | floor s (products + optimiser) | ours is ... times as fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def tries(rows: Sequence[tuple[str, str]], of_size: Mapping[str, list], arguments: argparse.Namespace) -> list[str]:
    """What a search for the best batch saw."""
    if arguments.batch != "best":
        return []
    return ["", "Batch sizes tried:", ""] + [
        f"- {size}, {name_of(*variant)}: " + "; ".join(f"{batch}: {told(one)}" for batch, one in row["tried"].items())
        for size, found in of_size.items()
        for variant, row in zip(rows, found, strict=True)
    ]


def version(package: str) -> str:
    return importlib.metadata.version(package)


# ---- command ----


def batch_size(text: str) -> str:
    if text != "best" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor best")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,base", help="comma-separated model sizes")
    parser.add_argument("--batch", type=batch_size, default="8", help="samples a step, or best")
    parser.add_argument("--first_batch", type=int, help="where best begins: 8 on a CPU, else 64")
    parser.add_argument("--max_batch", type=int, help="where best ends: 64 on a CPU, else where memory does")
    parser.add_argument("--inputs", type=int, default=128, help="input slots a sample")
    parser.add_argument("--targets", type=int, default=128, help="target slots a sample")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of products and activations")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best that every side sees")
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"), help="our kernel")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"), help="what our backward pass recomputes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round, after one that compiles")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each ours then the reference")
    parser.add_argument("--minutes", type=float, help="end in this time with what is there; 7.5 on a GPU, no limit on a CPU")
    parser.add_argument("--peer", action="store_true", help="time TerraTorch's step too")
    parser.add_argument(
        "--compile", nargs="?", const="blocks", choices=("no", "blocks", "model"), help="torch.compile; default: blocks on a GPU"
    )
    parser.add_argument("--out", help="also write the table to this file")
    arguments, arguments.overrides = parser.parse_known_args(argv)
    if stray := [flag for flag in arguments.overrides if not flag.startswith("--config.") or "=" not in flag]:
        parser.error(f"{stray[0]} is unknown; fields of the configuration are set with --config.FIELD=VALUE")
    if arguments.peer and importlib.util.find_spec("terratorch") is None:
        parser.error('--peer needs TerraTorch: pip install -e ".[parity]"')
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))  # as the Makefile
    started = time.monotonic()
    seen = {side: process.measure(SCRIPT, side, "--probe") for side in (("ours", "peer") if arguments.peer else ("ours",))}
    text, complete = report(arguments, agreed_device(arguments.device, seen), seen, started)
    print(text)
    if arguments.out:
        files.write_text(epath.Path(arguments.out), text)
    if not complete:
        raise SystemExit("Not every row has a number.")


if __name__ == "__main__":
    main()
