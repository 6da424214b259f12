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
from terramind_jax import plan, sharding

ROOT = Path(__file__).parent.parent
SIZES = ("tiny", "small", "base", "large", "xl")
MACHINES = (("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v6e:16x16", 1), ("v5e:16x16", 2))
BATCH, WINDOW = 4096, 32768
MESHES = (  # of xl: batch size and (data, fsdp, tensor)
    (4096, (256, 1, 1)),
    (4096, (16, 16, 1)),
    (4096, (16, 8, 2)),
    (1024, (16, 16, 1)),
    (1024, (16, 8, 2)),
    (512, (8, 16, 2)),
    (512, (8, 8, 4)),
)
BEGIN, END = "<!-- plan tables: begin -->", "<!-- plan tables: end -->"
GIB = plan.topology.GIB

HEAD = """\
Batch {batch:,} samples of 128 + 128 tokens ({tokens:,} tokens a step), 500 B tokens, 4 views a sample, TerraMesh with all modalities;
the settings of `configs/pretrain/`, for tiny with `--config.train.batch_size={batch} --config.data.view_window={window}`. Compiled with
JAX {jax} and libtpu {libtpu} by `benchmarks/plans.py`; nothing was run on a TPU. Prediction: the compiler's cycle estimates of all
instructions added up, transfers as rings at the attainable rate of the links, those beside computation at no cost until they take
longer. `at least` is the roofline; `in line` is as if nothing overlapped. MFU counts the slots that hold a token: {inputs:.1f} of 128
inputs and {targets:.1f} of 128 targets, for coordinates seldom use up their share."""
MESHES_HEAD = "Where FSDP and tensor parallelism matter: xl on {topology}, by mesh and batch size."
SPEED = (
    "| size | slice | mesh (data, fsdp, tensor) | remat | samples a chip | GiB a chip | at least ms (bound by) | predicted ms (in line) "
    "| tokens/s | MFU | days | chip-hours |"
)
MESH = (
    "| batch | mesh (data, fsdp, tensor) | samples a chip | GiB a chip | at least ms (bound by) | predicted ms (in line) | MFU | GB sent |"
)
INPUT = (
    "| size | slice | views/s a host | GB/s from storage a host, all hosts | MB/s to the chips of a host | reading cores a host "
    "| GB sent in the slice | MB sent between slices | compile s |"
)


def made(size: str, topology: str, slices: int, batch: int, mesh: tuple[int, ...] = ()) -> dict[str, Any]:
    """The plan of one size on one machine, with its seconds; without a `mesh`, on that of its configuration."""
    start = time.perf_counter()
    overrides = [f"--config.train.batch_size={batch}", f"--config.data.view_window={WINDOW}"]  # which only tiny lacks
    overrides += [f"--config.mesh.{axis}={n}" for axis, n in zip(sharding.AXES, mesh, strict=False)]
    config = configuration.load(str(ROOT / "configs" / "pretrain" / f"{size}.py"), overrides)
    facts = plan.run(config, plan.parse(topology, slices))
    return {**facts, "took": time.perf_counter() - start}


def name(facts: dict[str, Any]) -> str:
    return f"{facts['slices']} x {facts['topology']}" if facts["slices"] > 1 else facts["topology"]


def speed_row(size: str, f: dict[str, Any]) -> str:
    run = f["run"]
    return (
        f"| {size} | {name(f)} | {mesh_of(f)} | {f['remat']} | {f['rows_per_chip']} | {gib(f)} | {milliseconds(f)} | "
        f"{f['tokens_per_second'] / 1e6:.2f} M | {f['mfu']:.1%} | {run['days']:.2f} | {run['chip_hours']:,.0f} |"
    )


def mesh_row(f: dict[str, Any]) -> str:
    speed = "does not fit | - | - | -"
    if "seconds" in f:
        speed = f"{milliseconds(f)} | {f['mfu']:.1%} | {sum(t['sent'] for t in f['collectives']) / 1e9:.1f}"
    return f"| {f['batch_size']} | {mesh_of(f)} | {f['rows_per_chip']} | {gib(f)} | {speed} |"


def mesh_of(f: dict[str, Any]) -> str:
    return ", ".join(map(str, f["mesh"].values()))


def gib(f: dict[str, Any]) -> str:
    return f"{f['memory']['total'] / GIB:.1f} of {f['memory']['available'] / GIB:.1f}"


def milliseconds(f: dict[str, Any]) -> str:
    s = {name: value * 1e3 for name, value in f["seconds"].items() if name in ("roofline", "predicted", "in_line")}
    return f"{s['roofline']:.1f} ({f['seconds']['bound']}) | {s['predicted']:.1f} ({s['in_line']:.1f})"


def input_row(size: str, f: dict[str, Any]) -> str:
    i, between = f["input"], sum(t["sent"] for t in f["collectives"] if t["axes"] == "slices")
    within = sum(t["sent"] for t in f["collectives"]) - between
    return (
        f"| {size} | {name(f)} | {i['views']:,.0f} | {i['storage'] / 1e9:.2f}, {i['storage'] * f['hosts'] / 1e9:.0f} | "
        f"{i['device'] / 1e6:,.0f} | {i['cores']:.1f} | {within / 1e9:.2f} | {between / 1e6:.0f} | {f['took']:.0f} |"
    )


def tables(plans: list[tuple[str, dict[str, Any]]], meshes: list[dict[str, Any]]) -> str:
    versions, first = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}, plans[0][1]
    head = HEAD.format(batch=BATCH, window=WINDOW, tokens=first["tokens_per_step"], **first["filled"], **versions)
    lines = [head, "", SPEED, "|---" * 12 + "|"]
    lines += [speed_row(size, facts) for size, facts in plans]
    lines += ["", "Input at that speed, and what a chip sends in a step:", "", INPUT, "|---" * 9 + "|"]
    lines += [input_row(size, facts) for size, facts in plans]
    if meshes:
        lines += ["", MESHES_HEAD.format(topology=MACHINES[0][0]), "", MESH, "|---" * 8 + "|", *map(mesh_row, meshes)]
    return "\n".join(lines)


def child(*one: str | int) -> dict[str, Any]:
    print(*one, file=sys.stderr, flush=True)
    return process.measure(__file__, "--one", *map(str, one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="some of them")
    parser.add_argument("--out", default=str(ROOT / "launch" / "README.md"), help="file with the tables between its markers; empty: none")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # SIZE TOPOLOGY SLICES BATCH, and sizes of the mesh
    a = parser.parse_args()
    if a.one:
        size, topology, slices, batch, *mesh = a.one
        print(json.dumps(made(size, topology, int(slices), int(batch), tuple(map(int, mesh)))))
        return
    sizes = a.sizes.split(",")
    plans = [(size, child(size, topology, slices, BATCH)) for size in sizes for topology, slices in MACHINES]
    meshes = [child("xl", *MACHINES[0], batch, *mesh) for batch, mesh in MESHES] if "xl" in sizes else []
    text = tables(plans, meshes)
    print(text)
    if a.out:
        before, _, rest = Path(a.out).read_text().partition(BEGIN)
        Path(a.out).write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
