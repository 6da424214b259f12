"""Shards, token shards and configurations of a run small enough for tests: 48-pixel tiles, 32-pixel crops, four patches."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax import sharding
from terramind_jax.data import crops
from terramind_jax.data.shards import ShardWriter, write_sample

SIZE, TILE = 32, 48
CODEBOOKS = {"DEM": 30, "LULC": 20, "S1GRD": 10}


def write_split(root: Path, split: str, n: int, *, tokens: bool = True, broken: int | None = None) -> None:
    """`n` samples of DEM and LULC whose tokens follow from their pixels; sample number `broken` has no readable DEM."""
    rng = np.random.default_rng(n)
    level = rng.integers(0, 10, n)
    for name, dtype in (("DEM", np.int16), ("LULC", np.uint8)):
        with ShardWriter(root, split, name, "tiny", 1) as shard:
            for i in range(n):
                bands = np.full((1, 1, TILE, TILE), level[i] * (100 if name == "DEM" else 1), dtype)
                arrays = {"bands": bands, "center_lon": np.float64(i), "center_lat": np.float64(-i)}
                shard.add(f"s{i:03d}", b"no zip" if (i == broken and name == "DEM") else write_sample(arrays))
        if tokens:
            write_tokens(root, split, name, level * 2)


def write_tokens(root: Path, split: str, name: str, ids: Sequence[int] | np.ndarray) -> None:
    """One token a sample, everywhere; of several codebooks ``[samples, K]``."""
    with ShardWriter(root, split, f"{name}_tokens", "tiny", 1) as shard:
        for i, token in enumerate(ids):
            buffer = io.BytesIO()
            np.save(buffer, np.full((crops.VARIANTS, SIZE // 16, SIZE // 16, *np.shape(token)), token, np.uint16))
            shard.add(f"s{i:03d}", buffer.getvalue(), ".npy")


def write_shards(root: Path, *, tokens: bool = True) -> Path:
    """12 training samples, one of them without a readable DEM, and 5 validation samples."""
    write_split(root, "train", 12, tokens=tokens, broken=3)
    write_split(root, "val", 5, tokens=tokens)
    return root


def _shorten(config: ConfigDict, root: Path, steps: int) -> None:
    config.data.root = str(root)
    config.optimizer.learning_rate = 3e-3
    config.train.steps = steps
    config.train.batch_size = 8
    config.run.update(log_every=1, eval_every=0, eval_batches=2, probe_scenes=0, checkpoint_every=16, progress=False, tensorboard=False)


def pretraining(root: Path, steps: int = 32) -> ConfigDict:
    config = configuration.pretraining()
    config.model.update(dim=64, encoder_depth=1, decoder_depth=1, num_heads=1, image_size=SIZE)
    with config.unlocked():
        config.model.codebooks = ConfigDict(CODEBOOKS)
    config.data.update(inputs=("DEM", "LULC", "S1GRD"), targets=("DEM", "LULC"))  # S1GRD is in no shard
    config.data.update(views_per_sample=2, view_window=8, patch_group=1)
    config.mask.update(input_tokens=6, target_tokens=5)
    _shorten(config, root, steps)
    return config


def tokenizer_training(root: Path, modality: str = "DEM", steps: int = 32) -> ConfigDict:
    config = configuration.tokenizer_training()
    config.model.update(modality=modality, levels=(4, 4), dim=32, depth=1, num_heads=2, image_size=SIZE)
    config.data.image_size = SIZE
    config.train.ema_decay = 0.5
    _shorten(config, root, steps)
    return config


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    """Training on one of the eight devices, where their number is not what is tested: it compiles in less time."""
    patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))


def write_config(path: Path, config: ConfigDict) -> Path:
    """A configuration file that gives `config`."""
    text = configuration.to_json(config)
    path.write_text(f"from terramind_jax.config import from_json\n\n\ndef get_config():\n    return from_json({text!r})\n")
    return path


class ObjectStore(type(epath.Path("/"))):
    """A local folder in which nothing can be appended to or renamed, as in an object store."""

    def open(self, mode: str = "r", *args, **options):
        assert not set(mode) & set("a+"), "object stores do not append"
        return super().open(mode, *args, **options)

    def rename(self, target):
        raise AssertionError("object stores do not rename")

    replace = rename


# ---- runs in processes of their own ----


def start(
    config: Path, workdir: Path, *arguments: str, processes: int = 1, devices: int = 2, command: str = "pretrain"
) -> list[subprocess.Popen]:
    """The command line on so many processes with as many devices each; what they say and sample goes to files beside `workdir`."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])}
    program = [sys.executable, str(Path(__file__).parent / "sampled_run.py"), f"{workdir}.list", command]
    command = [*program, f"--config={config}", f"--workdir={workdir}", *arguments]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"--coordinator=localhost:{free.getsockname()[1]}")
        environment["JAX_NUM_PROCESSES"] = str(processes)
    started = []
    for i in range(processes):
        own = {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}
        with open(f"{workdir}.out{i}", "a") as out:
            started.append(subprocess.Popen(command, env={**environment, **own}, stdout=out, stderr=out))
    return started


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen], seconds: float = 120) -> None:
    """Waits until `condition` holds; fails if one of `processes` ends before, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes) and time.monotonic() < end
        time.sleep(0.002)


def ended(processes: Sequence[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Exit codes of processes that end within so many seconds."""
    return [process.wait(seconds) for process in processes]


def samples(workdir: Path) -> dict[int, list[int]]:
    """The samples of each step in their order, however many processes made it; a step made again must have seen the same ones."""
    shares: dict[tuple[int, int], dict[int, list[int]]] = {}
    for line in Path(f"{workdir}.list").read_text().splitlines():
        step, processes, process, share = json.loads(line)
        assert shares.setdefault((step, processes), {}).setdefault(process, share) == share
    seen: dict[int, list[int]] = {}
    for (step, processes), parts in shares.items():
        if len(parts) == processes:  # else one was killed before
            batch = [s for row in zip(*(parts[i] for i in range(processes)), strict=True) for s in row]  # processes take turns
            assert seen.setdefault(step, batch) == batch
    return seen


def visits(workdir: Path) -> list[int]:
    """The steps that a single process made, in their order, those made again included."""
    path = Path(f"{workdir}.list")
    return [json.loads(line)[0] for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.is_file() else []


def said(workdir: Path, process: int) -> str:
    return Path(f"{workdir}.out{process}").read_text()


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are complete."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def damage(folder: Path, how: str) -> None:
    """Removes, cuts short or empties the file of an item that holds its values."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    path = max(files, key=lambda path: path.stat().st_size)
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "truncated" else 0)


def differences(a, b) -> list[float]:
    """Relative L2 difference by leaf. The key part of an attention bias is left out: its gradient is zero, and Adam divides noise by it."""

    def difference(path, x, y):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("qkv/bias", "kv/bias")):
            x, y = (np.delete(z, 1 if name.endswith("qkv/bias") else 0, axis=1) for z in (x, y))
        return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(difference, a, b))
