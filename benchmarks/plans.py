"""The tables of `plan` in launch/README.md: every size on four machines, compiled for them.

    python benchmarks/plans.py                            # all of them into the README; needs the `tpu` extra, 40 minutes on 2 cores
    python benchmarks/plans.py --sizes=base --out=        # the rows of one size, printed only

A plan is a process of its own, so that none holds the memory of another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import process

from terramind_jax import config as configuration
from terramind_jax import plan

ROOT = Path(__file__).parent.parent
SIZES = ("tiny", "small", "base", "large", "xl")
MACHINES = (("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v6e:16x16", 1), ("v5e:16x16", 2))
BATCH, WINDOW = 4096, 32768
BEGIN, END = "<!-- plan tables: begin -->", "<!-- plan tables: end -->"
GIB = plan.topology.GIB

HEAD = """\
Batch {batch:,} samples of 128 + 128 tokens ({tokens:,} tokens a step), 500 B tokens, 4 views a sample, TerraMesh with all modalities;
the settings of `configs/pretrain/`, for tiny with `--config.train.batch_size={batch} --config.data.view_window={window}`. Compiled with
JAX {jax} and libtpu {libtpu} by `benchmarks/plans.py`; nothing was run on a TPU. Prediction: the compiler's cycle estimates of all
instructions added up, transfers as rings at the attainable rate of the links, those beside computation at no cost until they take
longer. `at least` is the roofline; `in line` is as if nothing overlapped."""
SPEED = (
    "| size | slice | mesh (data, fsdp, tensor) | remat | samples a chip | GiB a chip | at least ms (bound by) | predicted ms (in line) "
    "| tokens/s | MFU | days | chip-hours |"
)
INPUT = (
    "| size | slice | views/s a host | GB/s from storage a host, all hosts | MB/s to the chips of a host | reading cores a host "
    "| GB sent in the slice | MB sent between slices | compile s |"
)


def made(size: str, topology: str, slices: int) -> dict[str, Any]:
    """The plan of one size on one machine, with its seconds."""
    start = time.perf_counter()
    overrides = [f"--config.train.batch_size={BATCH}", f"--config.data.view_window={WINDOW}"]  # which only tiny lacks
    config = configuration.load(str(ROOT / "configs" / "pretrain" / f"{size}.py"), overrides)
    facts = plan.run(config, plan.parse(topology, slices))
    return {**facts, "took": time.perf_counter() - start}


def name(facts: dict[str, Any]) -> str:
    return f"{facts['slices']} x {facts['topology']}" if facts["slices"] > 1 else facts["topology"]


def speed_row(size: str, f: dict[str, Any]) -> str:
    s, memory, run = f["seconds"], f["memory"], f["run"]
    return (
        f"| {size} | {name(f)} | {', '.join(map(str, f['mesh'].values()))} | {f['remat']} | {f['rows_per_chip']} | "
        f"{memory['total'] / GIB:.1f} of {memory['available'] / GIB:.1f} | {s['roofline'] * 1e3:.1f} ({s['bound']}) | "
        f"{s['predicted'] * 1e3:.1f} ({s['in_line'] * 1e3:.1f}) | {f['tokens_per_second'] / 1e6:.2f} M | {f['mfu']:.1%} | "
        f"{run['days']:.2f} | {run['chip_hours']:,.0f} |"
    )


def input_row(size: str, f: dict[str, Any]) -> str:
    i, between = f["input"], sum(t["sent"] for t in f["collectives"] if t["axes"] == "slices")
    within = sum(t["sent"] for t in f["collectives"]) - between
    return (
        f"| {size} | {name(f)} | {i['views']:,.0f} | {i['storage'] / 1e9:.2f}, {i['storage'] * f['hosts'] / 1e9:.0f} | "
        f"{i['device'] / 1e6:,.0f} | {i['cores']:.1f} | {within / 1e9:.2f} | {between / 1e6:.0f} | {f['took']:.0f} |"
    )


def tables(plans: list[tuple[str, dict[str, Any]]]) -> str:
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    lines = [HEAD.format(batch=BATCH, window=WINDOW, tokens=plans[0][1]["tokens_per_step"], **versions), "", SPEED, "|---" * 12 + "|"]
    lines += [speed_row(size, facts) for size, facts in plans]
    lines += ["", "Input at that speed, and what a chip sends in a step:", "", INPUT, "|---" * 9 + "|"]
    return "\n".join([*lines, *(input_row(size, facts) for size, facts in plans)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="some of them")
    parser.add_argument("--out", default=str(ROOT / "launch" / "README.md"), help="file with the tables between its markers; empty: none")
    parser.add_argument("--one", nargs=3, metavar=("SIZE", "TOPOLOGY", "SLICES"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(made(a.one[0], a.one[1], int(a.one[2]))))
        return
    plans = []
    for size in a.sizes.split(","):
        for topology, slices in MACHINES:
            print(size, topology, slices, file=sys.stderr, flush=True)
            plans.append((size, process.measure(__file__, "--one", size, topology, str(slices))))
    text = tables(plans)
    print(text)
    if a.out:
        before, _, rest = Path(a.out).read_text().partition(BEGIN)
        Path(a.out).write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
