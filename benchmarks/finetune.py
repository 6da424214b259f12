"""Times a step of fine-tuning, a backbone with a U-Net on S2L1C and S1GRD, and TerraTorch beside it.

    python benchmarks/finetune.py                           # base, 224 pixels, batch 8, frozen and full; float32
    python benchmarks/finetune.py --peer --rounds 3 --out benchmarks/results/finetune.md

Every case runs in a process of its own, ours and the reference's one after the other; compile time is apart. Weights are random: they
do not change the work. `--peer` needs the `parity` extra, or the environment that `make test-parity` uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import process

PARITY = Path(__file__).parent.parent / "tests" / "parity"
CHANNELS = {"S2L1C": 13, "S1GRD": 2}
CLASSES = 2
TUNES = ("frozen", "full")
DTYPES = ("float32", "bfloat16")


def samples(batch: int, side: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    images = {name: rng.normal(size=(batch, side, side, c)).astype(np.float32) for name, c in CHANNELS.items()}
    return images, rng.integers(0, CLASSES, (batch, side, side)).astype(np.int32)


def ours(tune: str, size: str, side: int, batch: int, dtype: str) -> tuple[Callable[[], object], int]:
    """One step, and how many parameters it trains."""
    import jax
    from flax.core import meta

    from terramind_jax.tasks import finetune, losses
    from terramind_jax.tasks import model as networks
    from terramind_jax.tasks.config import finetuning
    from terramind_jax.tasks.datasets import sen1floods11
    from terramind_jax.train import optimizer, state

    config = finetuning()
    config.model.update(name=f"terramind_v1_{size}", dtype=dtype)
    facts = sen1floods11.FACTS
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    parted = jax.jit(lambda key: meta.unbox(networks.init(module, key, tune)))(jax.random.key(0))
    tx = optimizer.adamw(config.optimizer)
    loss_fn = partial(finetune.loss, module, losses.dice, 1.0)
    update = partial(state.apply, tx=tx, config=config.optimizer, batch_size=batch, total=1e6, warmup=0.0)
    step = jax.jit(partial(finetune.train_step, loss_fn, update, 0), donate_argnums=0)
    images, target = samples(batch, side)
    put = jax.device_put({"inputs": images, "target": target, "valid": target >= 0, "rate": np.float32(1)})
    held = [state.create(parted["params"], tx, batch_stats=parted["batch_stats"])]

    def run() -> object:
        held[0], metrics = step(held[0], parted["buffers"], put)
        return jax.block_until_ready(metrics["loss"])

    return run, sum(x.size for x in jax.tree.leaves(parted["params"]))


def peers(tune: str, size: str, side: int, batch: int, dtype: str) -> tuple[Callable[[], object], int]:
    """The same of TerraTorch's model, with PyTorch's AdamW; on a GPU TF32 is allowed, as XLA does."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # its inputs come from this package, which must leave the GPU alone
    sys.path.insert(0, str(PARITY))
    import peer
    import torch
    from terratorch.models import EncoderDecoderFactory
    from terratorch.tasks import segmentation_tasks

    last = 23 if size == "large" else 11
    layers = [(last + 1) * (i + 1) // 4 - 1 for i in range(4)]
    necks = [{"name": "SelectIndices", "indices": layers}, {"name": "ReshapeTokensToImage", "remove_cls_token": False}]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    model = (
        EncoderDecoderFactory()
        .build_model(
            task="segmentation",
            backbone=f"terramind_v1_{size}",
            backbone_pretrained=False,
            backbone_modalities=list(CHANNELS),
            necks=[*necks, {"name": "LearnedInterpolateToPyramidal"}],
            decoder="UNetDecoder",
            decoder_channels=[512, 256, 128, 64],
            head_dropout=0.1,
            num_classes=CLASSES,
        )
        .to(device)
    )
    if tune == "frozen":
        model.freeze_encoder()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True)
    criterion = segmentation_tasks.init_loss("dice", ignore_index=-1)
    images, target = samples(batch, side)
    images = {name: peer.nchw(x).to(device) for name, x in images.items()}
    target = torch.from_numpy(target).long().to(device)
    model.train()

    def run() -> float:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = criterion(model(dict(images)).output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run, sum(p.numel() for p in trained)


def measure(kind: str, tune: str, size: str, side: int, batch: int, repeats: int, dtype: str = "float32") -> dict[str, float]:
    """Seconds of the first step and the median of those after it, and the parameters that are trained."""
    run, trained = {"ours": ours, "peer": peers}[kind](tune, size, side, batch, dtype)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"first": times[0], "seconds": statistics.median(times[1:]), "trained": trained}


def child(kind: str, tune: str, arguments: argparse.Namespace) -> dict[str, float]:
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("size", "side", "batch", "repeats", "dtype")]
    return process.measure(__file__, "--kind", kind, "--tune", tune, *flags)


def report(arguments: argparse.Namespace) -> str:
    lines = [
        f"Fine-tuning on {process.where()}: {arguments.size} with a U-Net on {' and '.join(CHANNELS)}, {arguments.side} px, "
        f"batch {arguments.batch}, {arguments.dtype}, dice; medians of {arguments.rounds} x {arguments.repeats} steps, "
        "one process after the other.",
        "",
        "| backbone | trained parameters | images/s | first step s | reference images/s | speed relative to the reference |",
        "|---|---|---|---|---|---|",
    ]
    for tune in TUNES:
        rounds = [
            (child("ours", tune, arguments), child("peer", tune, arguments) if arguments.peer else None) for _ in range(arguments.rounds)
        ]
        mine, first = (statistics.median(a[key] for a, _ in rounds) for key in ("seconds", "first"))
        theirs = statistics.median(b["seconds"] for _, b in rounds) if arguments.peer else None
        beside = f"{arguments.batch / theirs:.2f} | {theirs / mine:.2f}" if theirs else "- | -"
        lines.append(f"| {tune} | {rounds[0][0]['trained'] / 1e6:.1f} M | {arguments.batch / mine:.2f} | {first:.1f} | {beside} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="time TerraTorch, too")
    parser.add_argument("--size", default="base", help="of the backbone")
    parser.add_argument("--side", type=int, default=224, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of products and activations")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each ours then the reference")
    parser.add_argument("--out", default=None, metavar="FILE", help="also write the table there")
    parser.add_argument("--kind", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--tune", choices=TUNES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        own = {name: getattr(arguments, name) for name in ("size", "side", "batch", "repeats", "dtype")}
        print(json.dumps(measure(arguments.kind, arguments.tune, **own)))
        return
    text = report(arguments)
    print("\n" + text)
    if arguments.out:
        Path(arguments.out).write_text(text)


if __name__ == "__main__":
    main()
