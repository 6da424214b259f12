"""TerraMind base: 376 M parameters, of which 198 M in the blocks. The recipe is that of `tiny.py`, whose notes apply.

    terramind-jax pretrain --config=configs/pretrain/base.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Hardware: a few accelerators; data parallelism alone.
The original took 12 days on 32 A100 (9,216 GPU hours) for 500 B tokens. Hours here: not measured yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from terramind_jax.config import read


def get_config() -> ConfigDict:
    config = read(Path(__file__).with_name("tiny.py"))

    config.model.dim = 768  # width
    config.model.encoder_depth = 12
    config.model.decoder_depth = 12
    config.model.num_heads = 12  # of 64 channels
    config.model.gated_mlp = True  # SwiGLU
    config.model.use_bias = False
    config.model.remat = "dots"  # what the backward pass recomputes

    config.data.view_window = 32768  # samples between the views of one: a batch for each of 8 workers; waiting views take 15 GB
    config.train.batch_size = 4096  # as in the original
    return config
