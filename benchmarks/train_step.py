"""Times one pretraining step (forward, backward, AdamW) and sets the machine's floor, and the reference, beside it.

    python benchmarks/train_step.py                              # tiny and base, batch 8, 128 + 128 tokens, float32
    python benchmarks/train_step.py --peer                       # the same beside TerraTorch, one process after the other
    python benchmarks/train_step.py --sizes base --dtype bfloat16 --batch 256 --out benchmarks/results/h200.md

The modality set is the released one (13 inputs, 7 targets). The floor is the step's floating-point operations over the measured
rate of a large matrix product, plus the optimiser's 28 bytes a parameter over the measured memory rate. `--peer` needs the
`parity` extra; where torchvision's operators do not load, put a module `torchvision_stub` that declares them on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from terramind_jax import modalities, zoo
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS, PATCH_SIZE

PADDING = 255
GRID = (modalities.IMAGE_SIZE // PATCH_SIZE) ** 2


def draw(batch: int, inputs: int, targets: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Slots with the streams drawn evenly, disjoint positions, and pixels of the stored types: the batch of `data.pipeline`."""
    rng = np.random.default_rng(seed)
    out = {f"{side}_{name}": [] for side in ("input", "target") for name in ("modality", "position", "id")} | {"target_input": []}
    capacity = int(2 * batch * inputs / len(ENCODER_STREAMS)) + 16
    used = dict.fromkeys((s.key for s in ENCODER_STREAMS), 0)
    for _ in range(batch):
        permutation = {s.modality: rng.permutation(GRID) for s in ENCODER_STREAMS}
        taken = dict.fromkeys(permutation, 0)
        for side, streams, budget in (("input", ENCODER_STREAMS, inputs), ("target", DECODER_STREAMS, targets)):
            counts = np.bincount(rng.integers(0, len(streams), budget), minlength=len(streams))
            rows = {"modality": [], "position": [], "id": [], "input": []}
            for m, (stream, n) in enumerate(zip(streams, counts, strict=True)):
                n = min(n, 2) if stream.kind == "sequence" else min(n, GRID // 3)
                first = taken[stream.modality] if stream.kind != "pixels" else 0
                positions = np.arange(n) if stream.kind == "sequence" else np.sort(permutation[stream.modality][first : first + n])
                taken[stream.modality] += n if stream.kind == "tokens" else 0
                ids = rng.integers(7, stream.vocab_size or 8, n)
                if stream.kind == "pixels":
                    ids = np.minimum(used[stream.key] + np.arange(n), capacity - 1)
                    used[stream.key] += n
                rows["modality"] += [m] * n
                rows["position"] += positions.tolist()
                rows["id"] += ids.tolist()
                rows["input"] += ([5, *ids[:-1]] if n else []) if stream.kind == "sequence" else [0] * n
            missing = budget - len(rows["modality"])
            out[f"{side}_modality"].append(rows["modality"] + [PADDING] * missing)
            for name in ("position", "id") + (("input",) if side == "target" else ()):
                out[f"{side}_{name}"].append(rows[name] + [0] * missing)
    types = {"modality": np.uint8, "position": np.uint16, "id": np.int32, "input": np.int32}
    slots = {k: np.asarray(v, types[k.rsplit("_", 1)[1]]) for k, v in out.items()}
    patches = {
        s.key: rng.normal(1000, 300, (1, capacity, PATCH_SIZE**2 * s.channels)).astype(modalities.get(s.modality).dtype)
        for s in ENCODER_STREAMS
        if s.kind == "pixels"
    }
    nothing = {"bad": np.zeros(batch, bool), "overflow": np.zeros(batch, np.int32)}
    return {**slots, **nothing, "patches": patches}


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
    data = jax.device_put(draw(batch, inputs, targets))
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


def to_reference(batch: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The same slots as the reference's dict of whole modalities with masks (True = hidden), spec 4."""
    size = batch["input_modality"].shape[0]
    mods = {}
    for side, streams in (("input", ENCODER_STREAMS), ("target", DECODER_STREAMS)):
        for m, stream in enumerate(streams):
            length = GRID if stream.kind != "sequence" else 16
            mod = mods.setdefault(
                stream.key,
                {
                    "tensor": np.zeros((size, length), np.int64),
                    "input_mask": np.ones((size, length), bool),
                    "target_mask": np.ones((size, length), bool),
                    "decoder_attention_mask": np.zeros((size, length), np.int64),
                },
            )
            for b in range(size):
                rows = np.flatnonzero(batch[f"{side}_modality"][b] == m)
                where, ids = batch[f"{side}_position"][b, rows].astype(int), batch[f"{side}_id"][b, rows]
                if stream.kind == "sequence" and side == "target" and len(rows):
                    ids = np.append(batch["target_input"][b, rows[:1]], ids)
                    where = 8 + np.arange(len(ids))
                mod[f"{side}_mask"][b, where] = False
                mod["tensor"][b, where] = ids
                if side == "target" and len(where):
                    mod["decoder_attention_mask"][b, where if stream.kind == "sequence" else where.min()] = (
                        1 if stream.kind == "sequence" else len(where)
                    )
    for stream in ENCODER_STREAMS:
        if stream.kind == "pixels":
            side = modalities.IMAGE_SIZE
            mods[stream.key]["tensor"] = np.random.default_rng(0).normal(size=(size, stream.channels, side, side)).astype(np.float32)
    return mods


def peer(size: str, batch: int, inputs: int, targets: int, steps: int) -> dict[str, float]:
    """Median seconds of the reference's step: TerraTorch's encoder-decoder, its `mod` loss, torch's AdamW."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if importlib.util.find_spec("torchvision_stub"):
        importlib.import_module("torchvision_stub")
    import torch
    from terratorch.models.backbones.terramind.model.modality_info import MODALITY_INFO
    from terratorch.models.backbones.terramind.model.terramind import TerraMind
    from terratorch.models.backbones.terramind.model.tm_utils import LayerNorm

    sizes = zoo.SIZES[size]
    dim, bias = sizes["dim"], sizes["use_bias"]

    def embeddings(streams, kind: str) -> dict:
        return {s.key: MODALITY_INFO[s.key][kind](image_size=224, dim_tokens=dim, **MODALITY_INFO[s.key]) for s in streams}

    torch.manual_seed(0)
    model = TerraMind(  # the registered `_encdec` builders of 1.2.11 pass an argument that the class refuses
        **{k: sizes[k] for k in ("dim", "encoder_depth", "decoder_depth", "num_heads")},
        mlp_ratio=4,
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
        norm_layer=partial(LayerNorm, eps=1e-6, bias=False),
        act_layer=torch.nn.SiLU if sizes["gated_mlp"] else torch.nn.GELU,
        gated_mlp=sizes["gated_mlp"],
        encoder_embeddings=embeddings(ENCODER_STREAMS, "encoder_embedding"),
        decoder_embeddings=embeddings(DECODER_STREAMS, "decoder_embedding"),
        modality_info={s.key: MODALITY_INFO[s.key] for s in ENCODER_STREAMS},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    mods = {k: {n: torch.from_numpy(x) for n, x in v.items()} for k, v in to_reference(draw(batch, inputs, targets)).items()}
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
    """Runs one side in a process of its own, so that the two never share threads or memory."""
    passed = [f"--{k}={v}" for k, v in vars(arguments).items() if k not in ("sizes", "peer", "side", "out", "rounds")]
    command = [sys.executable, __file__, "--side", side, "--sizes", size, *passed]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}  # as the Makefile sets it; both sides gain
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed for {size}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(arguments: argparse.Namespace) -> str:
    lines = [
        f"Step time on {platform.processor() or platform.machine()}: batch {arguments.batch}, {arguments.inputs} input and "
        f"{arguments.targets} target tokens, {arguments.dtype}; medians of {arguments.rounds} x {arguments.steps} steps.",
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
