"""Times one pretraining step (forward, backward, AdamW) and sets the machine's floor, and the reference, beside it.

    python benchmarks/train_step.py                              # tiny and base, batch 8, 128 + 128 tokens, float32
    python benchmarks/train_step.py --peer                       # the same beside TerraTorch, one process after the other
    python benchmarks/train_step.py --sizes base --dtype bfloat16 --batch 256 --out benchmarks/results/h200.md

The modality set is the released one (13 inputs, 7 targets). The floor is the step's floating-point operations over the measured
rate of a large matrix product, plus the optimiser's 28 bytes a parameter over the measured memory rate. `--peer` needs the
`parity` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import process

from terramind_jax import zoo

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))

import batches  # noqa: E402


def summary(times: list[float], loss: float, tokens: int) -> dict[str, float]:
    return {"seconds": statistics.median(times), "fastest": min(times), "tokens_per_s": tokens / statistics.median(times), "loss": loss}


def ours(size: str, batch: int, inputs: int, targets: int, dtype: str, remat: str, unroll: int, steps: int) -> dict[str, float]:
    """Median seconds of a compiled step of `terramind_jax`, compile time apart."""
    import jax
    from flax.core import meta

    from terramind_jax import config as configuration
    from terramind_jax import flops, model
    from terramind_jax.train import optimizer, pretrain, state

    config = model.TransformerConfig(**zoo.SIZES[size], dtype=dtype, remat=remat, unroll=unroll)
    module = model.TerraMind(config)
    settings = configuration.load(str(Path(__file__).parent.parent / f"configs/pretrain/{size}.py"), []).optimizer
    tx = optimizer.adamw(settings)
    variables = meta.unbox(jax.jit(partial(model.init, module))(jax.random.key(0)))
    run = jax.jit(partial(state.create, tx=tx))(variables["params"])
    loss = partial(pretrain.loss, module, "mod")
    update = partial(state.apply, tx=tx, config=settings, batch_size=batch, total=1e6, warmup=0.01)
    step = jax.jit(partial(pretrain.train_step, loss, update), donate_argnums=0)
    data = jax.device_put(batches.draw(batch, inputs, targets))
    begin = time.perf_counter()
    run, metrics = step(run, variables["buffers"], data)
    first = float(metrics["loss"])
    compiled = time.perf_counter() - begin
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        run, metrics = step(run, variables["buffers"], data)
        jax.block_until_ready((run, metrics))
        times.append(time.perf_counter() - begin)
    count = flops.transformer_step(config, batch, inputs, targets)
    parameters = sum(x.size for x in jax.tree.leaves(run.params))
    rate, memory = machine(dtype)
    floor = {"matmul_floor": count / rate, "optimizer_floor": 28 * parameters / memory}
    measured = {"compile_s": compiled, "flops": count, "machine_flops": rate, "machine_bytes": memory, **floor}
    return {**summary(times, first, batch * (inputs + targets)), **measured}


def machine(dtype: str) -> tuple[float, float]:
    """Measured FLOP/s of a 2048-wide product and bytes/s of a pass over 512 MiB, each the best of several."""
    import jax
    import jax.numpy as jnp

    def best(function, *arguments) -> float:
        jax.block_until_ready(function(*arguments))
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - begin)
        return min(times)

    a = jnp.ones((2048, 2048), dtype)
    long = jnp.ones((64 * 2**20,), jnp.float32)
    return 2 * 2048**3 / best(jax.jit(jnp.matmul), a, a), 2 * long.nbytes / best(jax.jit(lambda x: x * 1.5), long)


def peer(size: str, batch: int, inputs: int, targets: int, steps: int) -> dict[str, float]:
    """Median seconds of the reference's step: TerraTorch's encoder-decoder, its `mod` loss, torch's AdamW."""
    import peer as reference
    import torch

    torch.manual_seed(0)
    model = reference.encdec(size, seed=None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    mods = reference.tensors(batches.to_reference(batches.draw(batch, inputs, targets)))
    times, losses = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        loss, _ = model({k: dict(v) for k, v in mods.items()}, num_encoder_tokens=inputs, num_decoder_tokens=targets, loss_type="mod")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
        losses.append(float(loss))
    return summary(times[1:], losses[0], batch * (inputs + targets))


def child(side: str, size: str, arguments: argparse.Namespace) -> dict[str, float]:
    passed = [f"--{k}={v}" for k, v in vars(arguments).items() if k not in ("sizes", "peer", "side", "out", "rounds")]
    return process.measure(__file__, "--side", side, "--sizes", size, *passed)


def report(arguments: argparse.Namespace) -> str:
    lines = [
        f"Step time on {process.where()}: batch {arguments.batch}, "
        f"{arguments.inputs} input and {arguments.targets} target tokens, {arguments.dtype}; medians of {arguments.rounds} x "
        f"{arguments.steps} steps, one process after the other.",
        "",
        "| size | s a step | tokens/s | floor s (matmul + optimiser) | reference s | speed relative to the reference |",
        "|---|---|---|---|---|---|",
    ]
    for size in arguments.sizes.split(","):
        rounds = [
            (child("ours", size, arguments), child("peer", size, arguments) if arguments.peer else None) for _ in range(arguments.rounds)
        ]
        mine = statistics.median(a["seconds"] for a, _ in rounds)
        floor = min(a["matmul_floor"] for a, _ in rounds), min(a["optimizer_floor"] for a, _ in rounds)
        theirs = statistics.median(b["seconds"] for _, b in rounds) if arguments.peer else None
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in rounds) if arguments.peer else None
        tokens = arguments.batch * (arguments.inputs + arguments.targets)
        peer_cells = f"{theirs:.2f} | {ratio:.2f}" if arguments.peer else "not run | -"
        lines.append(f"| {size} | {mine:.2f} | {tokens / mine:.0f} | {sum(floor):.2f} ({floor[0]:.2f} + {floor[1]:.2f}) | {peer_cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,base", help="comma-separated model sizes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=128)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--dtype", default="float32", help="of products and activations")
    parser.add_argument("--remat", default="none", help="none, dots or full")
    parser.add_argument("--unroll", type=int, default=1, help="layers an iteration of the scan")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round, after one that compiles")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each ours then the reference")
    parser.add_argument("--peer", action="store_true", help="time TerraTorch's step too")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    a = arguments
    if a.side == "ours":
        print(json.dumps(ours(a.sizes, a.batch, a.inputs, a.targets, a.dtype, a.remat, a.unroll, a.steps)))
    elif a.side == "peer":
        print(json.dumps(peer(a.sizes, a.batch, a.inputs, a.targets, a.steps)))
    else:
        table = report(arguments)
        print(table)
        if a.out:
            Path(a.out).write_text(table + "\n")


if __name__ == "__main__":
    main()
