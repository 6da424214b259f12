"""One measurement of train_step.py: our training step, or the reference's, at one batch size. Prints a line of JSON.

    python benchmarks/one_step.py ours --size=base --batch=8 --device=cpu --config.model.dtype=float32
    python benchmarks/one_step.py peer --size=base --batch=8 --device=gpu --config.model.dtype=bfloat16 --compile=blocks

Both take the same slots, as many samples as `--batch` says, and the same streams and sizes, those of configs/pretrain. Where memory does
not suffice the line is ``{"failed": "out of memory"}``. `--probe` prints the devices that the side sees, the one it prefers first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from best_batch import OUT_OF_MEMORY
from process import TOO_LITTLE_MEMORY

ROOT = Path(__file__).parent.parent
DISTINCT = 16  # groups of samples that are drawn; larger batches repeat them

sys.path.insert(0, str(ROOT / "tests" / "parity"))


# ---- what both sides are given ----


def configured(size: str, batch: int, overrides: Sequence[str]) -> Any:
    """The configuration of a training of `size` with `batch` samples a step."""
    from terramind_jax import config as configuration

    config = configuration.load(str(ROOT / f"configs/pretrain/{size}.py"), [f"--config.train.batch_size={batch}", *overrides])
    config.data.patch_group = math.gcd(batch // config.train.accumulate, config.data.patch_group)
    configuration.check(config, "pretrain")
    return config


def draw_groups(config: Any) -> list[dict[str, Any]]:
    """The groups of samples of one batch, each with patch buffers of its own."""
    import batches

    from terramind_jax.train import pretrain

    encoder, decoder = pretrain.streams(config)
    group, budgets = config.data.patch_group, (config.mask.input_tokens, config.mask.target_tokens)
    count = config.train.batch_size // group
    drawn = [batches.draw(group, *budgets, seed, encoder=encoder, decoder=decoder) for seed in range(min(count, DISTINCT))]
    return [drawn[i % DISTINCT] for i in range(count)]


def work(config: Any, groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens of the batch, without empty slots, and the floating-point operations of a step over them."""
    import numpy as np

    from terramind_jax import flops
    from terramind_jax.train import pretrain

    model, size = pretrain.transformer_config(config), config.train.batch_size
    of_stream = {}
    for side, streams in (("input", model.encoder), ("target", model.decoder)):
        slots = np.concatenate([group[f"{side}_modality"].ravel() for group in groups])
        of_stream[side] = {s.key: float((slots == m).sum() / size) for m, s in enumerate(streams)}
    patches = {s.key: of_stream["input"][s.key] for s in model.encoder if s.kind == "pixels"}
    inputs, targets = (sum(counts.values()) for counts in of_stream.values())
    count = flops.transformer_step(model, size, inputs, targets, patches=patches, heads=of_stream["target"])
    return {"inputs": inputs, "targets": targets, "tokens": size * (inputs + targets), "flops": count}


def timed(run: Callable[[], float], steps: int) -> dict[str, float]:
    """Median seconds of `run`, which returns a loss once all is computed, after a first call that compiles."""
    begin = time.perf_counter()
    loss = run()
    first, times = time.perf_counter() - begin, []
    for _ in range(steps):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times), "fastest": min(times), "first": first, "loss": loss}


# ---- ours ----


def ours(config: Any, steps: int) -> dict[str, Any]:
    """The step that `pretrain.train` calls, on the first device."""
    import flax.linen as nn
    import jax

    from terramind_jax import checkpoint, sharding
    from terramind_jax import model as networks
    from terramind_jax.train import optimizer, pretrain, state

    rates = machine(config.model.dtype)  # while there is room
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    pretrain.check_mesh(config, mesh)
    module, tx = networks.TerraMind(pretrain.transformer_config(config)), optimizer.adamw(config.optimizer)
    with tempfile.TemporaryDirectory() as empty, contextlib.closing(checkpoint.Checkpoints(empty, 1)) as none:
        train_state, buffers, layout, _ = state.start(partial(networks.init, module), tx, mesh, config.train.seed, none)
    parameters = sum(x.size for x in jax.tree.leaves(train_state.params))
    step = pretrain.make_step(config, module, tx, mesh, layout)
    groups = draw_groups(config)
    batch = sharding.to_global(jax_batch(config, mesh, groups), mesh)

    def run() -> float:
        nonlocal train_state
        train_state, metrics = step(train_state, buffers, batch)
        jax.block_until_ready((train_state, metrics))
        return float(metrics["loss"])

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        found = timed(run, steps)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {**found, **work(config, groups), "memory": memory, "parameters": parameters, **rates}


def jax_batch(config: Any, mesh: Any, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The groups as one batch, patch buffers filled up to the size that the training declares."""
    import jax
    import numpy as np

    from terramind_jax.train import pretrain

    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *groups)
    rows = {key: x.shape[1] for key, x in pretrain.abstract_batch(config, mesh)["patches"].items()}
    batch["patches"] = {k: np.pad(x, ((0, 0), (0, max(0, rows[k] - x.shape[1])), (0, 0))) for k, x in batch["patches"].items()}
    return batch


def machine(dtype: str) -> dict[str, float]:
    """The device's peak FLOP/s, on a CPU measured, 0 if it is not known, and the measured bytes/s of a pass over 512 MiB."""
    import jax
    import jax.numpy as jnp

    from terramind_jax import flops

    def best(function: Callable, *arguments: Any) -> float:
        jax.block_until_ready(function(*arguments))
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - begin)
        return min(times)

    long = jnp.ones((64 * 2**20,), jnp.float32)
    bytes_per_s = 2 * long.nbytes / best(jax.jit(lambda x: x * 1.5), long)
    if jax.default_backend() != "cpu":
        return {"peak": flops.peak(), "bytes_per_s": bytes_per_s}
    a = jnp.ones((2048, 2048), dtype)
    return {"peak": 2 * 2048**3 / best(jax.jit(jnp.matmul), a, a), "bytes_per_s": bytes_per_s}


# ---- the reference ----


def peer(config: Any, steps: int, device: str, compiled: str) -> dict[str, Any]:
    """TerraTorch's encoder-decoder, its `mod` loss and PyTorch's fused AdamW.

    Parameters and moments are float32, products those of `model.dtype`, by autocast; TF32 is allowed, as XLA does.
    """
    import batches
    import peer as reference
    import torch

    from terramind_jax import zoo
    from terramind_jax.train import pretrain

    where = {"gpu": "cuda"}.get(device, device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    streams = pretrain.streams(config)
    model = reference.encdec("tiny", *streams, seed=None, **{name: config.model[name] for name in zoo.SIZES["tiny"]})
    model = model.train().to(where)
    if compiled == "blocks":
        for block in (*model.encoder, *model.decoder):
            block.compile()
    elif compiled == "model":
        model.compile()
    settings = config.optimizer
    adamw = partial(torch.optim.AdamW, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
    optimizer = adamw(model.parameters())
    groups = draw_groups(config)
    parts = [reference.tensors(batches.to_reference(group, *streams)) for group in groups[:DISTINCT]]
    parts = [{key: {name: x.to(where) for name, x in mod.items()} for key, mod in part.items()} for part in parts]
    mods = {
        key: {name: torch.cat([parts[i % DISTINCT][key][name] for i in range(len(groups))]) for name in mod}
        for key, mod in parts[0].items()
    }
    del parts
    budgets = {"num_encoder_tokens": config.mask.input_tokens, "num_decoder_tokens": config.mask.target_tokens}

    def run() -> float:
        with torch.autocast(where, dtype=torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            loss, _ = model({key: dict(mod) for key, mod in mods.items()}, **budgets, loss_type=config.train.loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if where == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    found = timed(run, steps)
    return {**found, **work(config, groups), "memory": torch.cuda.max_memory_allocated() if where == "cuda" else None}


# ---- devices, memory, command ----


def devices(side: str) -> dict[str, str]:
    """Kinds of devices that a side can run on, the preferred one first, each with its name."""
    if side == "ours":
        import jax

        found = {jax.default_backend(): jax.devices()[0].device_kind}
    else:
        import torch

        found = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**found, "cpu": found.get("cpu", "cpu")}


def out_of_memory(error: Exception) -> bool:
    """Whether JAX or PyTorch, or a library of theirs, had too little memory."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in TOO_LITTLE_MEMORY)
    return said or isinstance(error, MemoryError)


def set_environment(side: str, device: str | None) -> None:
    """What has to be set before JAX starts.

    In the reference's process it must not take the GPU's memory, of which in ours it may take what CUDA's libraries leave.
    """
    if side == "peer" or device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "peer"))
    parser.add_argument("--probe", action="store_true", help="print the devices instead")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"))
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that compiles")
    parser.add_argument("--compile", default="no", choices=("no", "blocks", "model"), help="torch.compile")
    a, overrides = parser.parse_known_args()
    set_environment(a.side, a.device)
    if a.probe:
        print(json.dumps(devices(a.side)))
        return
    config = configured(a.size, a.batch, overrides)
    try:
        found = ours(config, a.steps) if a.side == "ours" else peer(config, a.steps, a.device, a.compile)
    except Exception as error:
        if not out_of_memory(error):
            raise
        found = {"failed": OUT_OF_MEMORY}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
