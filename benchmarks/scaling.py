"""Weak scaling of the pretraining step: what one chip does and sends while chips are added, each with the same number of samples.

    python benchmarks/scaling.py --out=benchmarks/results/scaling.md          # needs the `tpu` extra, half an hour on 2 cores
    python benchmarks/scaling.py --tables=host                                # forced host devices alone: two minutes

Time on devices that share the cores of one machine says nothing, so the first table counts: the program of 1, 2, 4 and 8 forced host
devices, as compiled, with the bytes that a device sends and XLA's cost of what it computes. The second is `plan`'s: the same step
compiled for 4 to 512 chips of TPU v5e, the last two slices of 256.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import process

CONFIGS = Path(__file__).parent.parent / "configs" / "pretrain"
HOSTS = (1, 2, 4, 8)
EFFICIENCY = """\
Efficiency is tokens/s and chip over those of 4 chips. Up to a whole slice the chips do the same and only the sums of gradients differ:
the 16 x 16 slice alone wraps around, so there a sum goes out on four links instead of two and takes less time than among 4 chips, hence
more than 100 %. Between slices a gradient is summed within each, a part of it across, and put together again: nearly twice the bytes in
the slice, and by the compiler's estimate more work on the chip around the pieces that it cuts the sums into. The transfer across, beside
computation, costs nothing here."""
SLICES = (("v5e:2x2", 1), ("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:16x16", 2))


def host(size: str, layout: str, devices: int, rows: int) -> dict[str, float]:
    """The step of `size` with `rows` samples a device, compiled for forced host devices; `layout` is the mesh axis that they form."""
    import jax

    from terramind_jax import config as configuration
    from terramind_jax.plan import hlo, step, topology
    from terramind_jax.plan.collectives import collectives

    mesh = {"data": 1, "fsdp": 1, "tensor": 1} | {layout: devices}
    overrides = [f"--config.train.batch_size={rows * devices}", *(f"--config.mesh.{axis}={n}" for axis, n in mesh.items())]
    config = configuration.load(str(CONFIGS / f"{size}.py"), overrides)
    one = step.prepare(config, topology.parse("v5e:1x1"), devices=jax.devices()[:devices])
    compiled = step.lower(one).compile()
    program, cost = hlo.parse(compiled.as_text()), compiled.cost_analysis()
    return {
        "sent": sum(t.sent * t.times for t in collectives(program, devices)),
        "transfers": sum(t.times for t in collectives(program, devices)),
        "parameters": step.arguments(one)["parameters"],
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
    }


def slice_of(size: str, topology: str, slices: int, rows: int) -> dict[str, Any]:
    """`plan` of `size` with `rows` samples a chip."""
    from terramind_jax import config as configuration
    from terramind_jax import plan

    where = plan.parse(topology, slices)
    return plan.run(configuration.load(str(CONFIGS / f"{size}.py"), [f"--config.train.batch_size={rows * where.chips}"]), where)


def child(*flags: str) -> dict[str, Any]:
    print(" ".join(flags), file=sys.stderr, flush=True)
    return process.measure(__file__, *flags)


def host_table(size: str, rows: int) -> list[str]:
    lines = [
        f"## {size} on forced host devices, {rows} samples a device",
        "",
        "Bytes are a device's; XLA counts the body of a loop once, so that its cost compares only within a column.",
        "",
        "| devices | mesh axis | MB sent | transfers | MB of parameters | GFLOP, XLA | GB accessed, XLA |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout in ("data", "fsdp", "tensor"):
        for n in HOSTS:
            if layout != "data" and n == 1:
                continue
            f = child("--side=host", f"--size={size}", f"--layout={layout}", f"--devices={n}", f"--rows={rows}")
            sizes = f"{f['sent'] / 1e6:.1f} | {f['transfers']:.0f} | {f['parameters'] / 1e6:.1f}"
            lines.append(f"| {n} | {layout} | {sizes} | {f['flops'] / 1e9:.2f} | {f['bytes'] / 1e9:.2f} |")
    return lines


def slice_table(size: str, rows: int) -> list[str]:
    lines = [
        f"## {size} on TPU v5e, {rows} samples a chip, as `plan` predicts",
        "",
        EFFICIENCY,
        "",
        "| chips | slice | step ms | on the chip | waiting for transfers | MB sent in the slice | MB sent between | tokens/s | MFU "
        "| efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = None
    for topology, slices in SLICES:
        f = child("--side=slice", f"--size={size}", f"--topology={topology}", f"--slices={slices}", f"--rows={rows}")
        each, seconds = f["tokens_per_second"] / f["chips"], f["seconds"]
        first = first or each
        between = sum(t["sent"] for t in f["collectives"] if t["axes"] == "slices")
        within = sum(t["sent"] for t in f["collectives"]) - between
        lines.append(
            f"| {f['chips']} | {f'{slices} x ' if slices > 1 else ''}{topology} | {seconds['predicted'] * 1e3:.1f} | "
            f"{seconds['device'] * 1e3:.1f} | {seconds['exposed'] * 1e3:.1f} | {within / 1e6:.0f} | {between / 1e6:.0f} | "
            f"{f['tokens_per_second']:,.0f} | {f['mfu']:.1%} | {each / first:.1%} |"
        )
    return lines


def report(arguments: argparse.Namespace) -> str:
    libtpu = importlib.metadata.version("libtpu") if "slice" in arguments.tables else "not used"
    lines = [f"# Weak scaling of the pretraining step\n\nCompiled with JAX {importlib.metadata.version('jax')}, libtpu {libtpu}; not run."]
    if "host" in arguments.tables:
        lines += ["", *host_table(arguments.host_size, arguments.host_rows)]
    if "slice" in arguments.tables:
        from terramind_jax.plan import report as plans

        lines += ["", *slice_table(arguments.size, arguments.rows), "", " ".join(plans.ASSUMPTION)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="host,slice", help="which of the two")
    parser.add_argument("--host_size", default="tiny", help="model on forced host devices")
    parser.add_argument("--host_rows", type=int, default=4, help="samples a host device")
    parser.add_argument("--size", default="base", help="model on slices of v5e")
    parser.add_argument("--rows", type=int, default=64, help="samples a chip")
    parser.add_argument("--out", help="also write the tables to this file")
    for name in ("side", "layout", "topology"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("devices", "slices"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side == "host":
        print(json.dumps(host(a.size, a.layout, a.devices, a.rows)))
    elif a.side == "slice":
        print(json.dumps(slice_of(a.size, a.topology, a.slices, a.rows)))
    else:
        text = report(a)
        print(text)
        if a.out:
            Path(a.out).write_text(text + "\n")


if __name__ == "__main__":
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    main()
