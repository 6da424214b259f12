"""TerraMind base: 376 M parameters, of which 198 M in the blocks. What is known of the recipe stands in `tiny.py`.

    terramind-jax pretrain --config=configs/pretrain/base.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Machine: a few accelerators, or a pod slice as in launch/README.md; data parallelism alone.
Expected for 500 B tokens, by `plan` and not yet measured: 0.49 days on v5e:16x16, 0.55 on v5p:4x4x4, 0.24 on v6e:16x16.
The original took 12 days on 32 A100, 9,216 GPU hours (reported second-hand).
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
