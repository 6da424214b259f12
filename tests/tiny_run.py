"""Shards, token shards and configurations of a run small enough for tests: 48-pixel tiles, 32-pixel crops, four patches."""

import io
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from terramind_jax import config as configuration
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
            with ShardWriter(root, split, f"{name}_tokens", "tiny", 1) as shard:
                for i in range(n):
                    buffer = io.BytesIO()
                    np.save(buffer, np.full((crops.VARIANTS, SIZE // 16, SIZE // 16), level[i] * 2, np.uint16))
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
    config.run.update(log_every=1, eval_every=0, eval_batches=2, checkpoint_every=16, progress=False, tensorboard=False)


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


def write_config(path: Path, config: ConfigDict) -> Path:
    """A configuration file that gives `config`."""
    text = configuration.to_json(config)
    path.write_text(f"from terramind_jax.config import from_json\n\n\ndef get_config():\n    return from_json({text!r})\n")
    return path
