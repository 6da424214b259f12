"""The measurements of `first_hour.sh`; each leaves a JSON file in the folder ``--out``, and `compare` sets them beside the plan."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

PIECE = 8 << 20  # bytes of one read


# ---- devices ----


def devices(out: Path, topology: str, num_slices: int) -> None:
    """Are all there, does each answer, and is none slow. A ValueError if their number is not that of `topology`."""
    import jax

    from terramind_jax import flops, processes

    processes.join()
    expected = math.prod(map(int, topology.partition(":")[2].split("x"))) * num_slices if topology else jax.device_count()
    if jax.device_count() != expected:
        raise ValueError(f"The machine has {jax.device_count()} devices; {num_slices} x {topology} has {expected}.")
    rates = [_matmul_rate(device) for device in jax.local_devices()]
    answered = _count_answers()
    result = {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "kind": jax.devices()[0].device_kind,
        "flops": min(rates),
        "peak": flops.peak() or None,
    }
    _write(out, "devices", result)
    print(
        f"process {result['process']} of {result['processes']}: {answered} x {result['kind']} answer; "
        f"{min(rates) / 1e12:.3g} to {max(rates) / 1e12:.3g} TFLOP/s in products on each here"
    )


def _matmul_rate(device: Any) -> float:
    """FLOP/s of one device in products of bfloat16 matrices."""
    import jax
    import jax.numpy as jnp

    n, repeats = (512, 2) if device.platform == "cpu" else (8192, 20)
    x = jax.device_put(jnp.full((n, n), 1 / n, jnp.bfloat16), device)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: x @ y, x))
    chain(x).block_until_ready()
    start = time.perf_counter()
    chain(x).block_until_ready()
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def _count_answers() -> int:
    """The number of devices, each of which adds one: a sum over all links."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=NamedSharding(mesh, PartitionSpec("all")))()
    return int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))


# ---- storage ----


def storage(out: Path, root: str, seconds: float, threads: int) -> None:
    """Bytes a second that this host reads from its share of the shards, all hosts at once. The shares are disjoint."""
    known = _read(out, "devices")
    shards = sorted(epath.Path(root).glob("*/*/*.tar"))[known["process"] :: known["processes"]]
    if not shards:
        raise FileNotFoundError(f"There are no shards {root}/SPLIT/MODALITY/*.tar for this host.")
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(lambda shard: sum(_pieces(shard, start + seconds)), shards))
    rate = total / (time.perf_counter() - start)
    _write(out, "storage", {"bytes_per_second": rate})
    print(f"process {known['process']}: {total / 1e6:,.0f} MB from {len(shards)} shards at {rate / 1e6:,.0f} MB/s")


def _pieces(shard: epath.Path, end: float) -> Iterator[int]:
    """Sizes of what is read of a shard until the time `end`."""
    if time.perf_counter() < end:
        with shard.open("rb") as f:
            while time.perf_counter() < end and (piece := f.read(PIECE)):
                yield len(piece)


# ---- plan and measurement ----


def compare(out: Path, workdir: str) -> None:
    """Prints the plan beside what was measured, from the JSON files and the metrics of the run in `workdir`."""
    from terramind_jax import watch

    snapshot = watch.read(workdir)
    if snapshot is None:
        raise FileNotFoundError(f"{workdir} has no metrics; the run did not reach a line of its log.")
    print(table(_read(out, "plan"), _read(out, "devices"), _read(out, "storage"), snapshot.metrics))


def table(plan: dict[str, Any], machine: dict[str, Any], disk: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Rows of (what, planned, measured, measured / planned); what is not known is left open, as all is of a plan that does not fit.

    Args:
      plan: what ``plan --json`` prints.
      machine, disk: what `devices` and `storage` left.
      metrics: of the run, newest by name.
    """
    seconds, needed = plan.get("seconds", {}), plan.get("input", {})
    rows = [
        ("devices", plan.get("chips"), machine.get("devices"), 1, "d"),
        ("TFLOP/s a device in products", machine.get("peak"), machine.get("flops"), 1e12, ".4g"),
        ("seconds a step", seconds.get("predicted"), metrics.get("step_seconds"), 1, ".4g"),
        ("tokens a second", plan.get("tokens_per_second"), metrics.get("tokens_per_second"), 1, ",.0f"),
        ("MFU, %", plan.get("mfu"), metrics.get("mfu"), 0.01, ".3g"),
        ("waiting for data, %", 0.0 if seconds else None, metrics.get("data_wait"), 0.01, ".3g"),
        ("MB/s a host needs and has", needed.get("storage"), disk.get("bytes_per_second"), 1e6, ",.0f"),
    ]
    head = f"{'':<32s}{'plan':>14s}{'measured':>14s}{'ratio':>9s}"
    return "\n".join([head, *(_row(*row) for row in rows)])


def _row(name: str, planned: float | None, measured: float | None, unit: float, form: str) -> str:
    cells = ["-" if value is None else format(value if form == "d" else value / unit, form) for value in (planned, measured)]
    ratio = f"{measured / planned:.2f}" if planned and measured is not None else "-"
    return f"{name:<32s}{cells[0]:>14s}{cells[1]:>14s}{ratio:>9s}"


# ---- files and arguments ----


def _write(out: Path, name: str, value: dict[str, Any]) -> None:
    (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def _read(out: Path, name: str) -> dict[str, Any]:
    """What a step left; nothing if it was left out."""
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("devices")
    action.add_argument("--topology", default="")
    action.add_argument("--num_slices", type=int, default=1)
    action.set_defaults(action=devices)
    action = actions.add_parser("storage")
    action.add_argument("--root", required=True)
    action.add_argument("--seconds", type=float, default=20)
    action.add_argument("--threads", type=int, default=32)
    action.set_defaults(action=storage)
    action = actions.add_parser("compare")
    action.add_argument("--workdir", required=True)
    action.set_defaults(action=compare)
    options = vars(parser.parse_args())
    options.pop("action")(**options)


if __name__ == "__main__":
    main()
