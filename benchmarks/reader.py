"""Processor time of the reader of pretraining: what `plan` reckons the cores with that a host needs.

    python benchmarks/reader.py     # a minute; writes 48 scenes of the embedded world, 264 pixels a side, to a temporary folder

One thread reads, masks and fills groups of views as a data worker does, for several numbers of views a sample; a straight line through
the times of a sample gives those of reading it and of one view. Tokens are random: reading them costs the same.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import process
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax.data import crops
from terramind_jax.data.groups import ViewGroups
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.shards import ShardWriter
from terramind_jax.data.synthesize import synthesize
from terramind_jax.train import pretrain

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain" / "base.py"
VIEWS = (1, 2, 4, 8, 16)
SCENES, SAMPLES = 48, 32


def write_tokens(root: Path, index: Index, modality: str) -> None:
    """Random ids for every crop, in shards beside those of the pixels."""
    rng = np.random.default_rng(0)
    for name, rows in index.shards(modality).items():
        subset, _, number = Path(name).stem.partition("_shard_")
        with ShardWriter(root, "train", f"{modality}_tokens", subset, int(number)) as shard:
            for i in rows:
                buffer = io.BytesIO()
                np.save(buffer, rng.integers(0, 4000, (crops.VARIANTS, 14, 14)).astype(np.uint16))
                shard.add(index.keys[int(i)], buffer.getvalue(), ".npy")


def seconds(config: ConfigDict, index: Index, views: int) -> float:
    """Of processor time for a sample and all its views, the best of three."""
    config.data.update(views_per_sample=views, view_window=SAMPLES)
    encoder, decoder, data, mask = pretrain.data_settings(config)
    groups = ViewGroups(index, encoder, decoder, data, mask, seed=0, train=True, readers=1)

    def epoch(n: int) -> float:
        start = time.process_time()
        for position in range(n * SAMPLES * views, (n + 1) * SAMPLES * views, data.patch_group):
            groups(position)
        return (time.process_time() - start) / SAMPLES

    return min(epoch(n) for n in range(4))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        synthesize(str(root), scenes=SCENES, val_scenes=0)
        config = configuration.load(str(CONFIG), [f"--config.data.root={root}"])
        for modality in config.data.targets:
            index = open_index(str(root), "train", list(config.data.inputs))
            if modality in index.modalities and modality != "coords":
                write_tokens(root, index, modality)
        index = open_index(str(root), "train", list(config.data.inputs))
        times = [seconds(config, index, views) for views in VIEWS]
        view, read = np.polyfit(VIEWS, times, 1)
        print(f"{process.where()}; {index.stored_bytes() / len(index) / 1e6:.2f} MB a sample")
        print(
            "\n".join(
                f"{views:3d} views a sample: {1e3 * t:6.2f} ms a sample, {1e3 * t / views:5.2f} ms a view"
                for views, t in zip(VIEWS, times, strict=True)
            )
        )
        print(f"{1e3 * read:.2f} ms to read a sample, {1e3 * view:.2f} ms a view")


if __name__ == "__main__":
    main()
