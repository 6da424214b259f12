"""TerraMind small: 124 M parameters, of which 35 M in the blocks. What is known of the recipe stands in `tiny.py`.

    terramind-jax pretrain --config=configs/pretrain/small.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Machine: one accelerator of 16 GB with a smaller batch, or eight and more.
Expected for 500 B tokens, by `plan` and not yet measured: 0.18 days on v5e:16x16, 0.21 on v5p:4x4x4, 0.08 on v6e:16x16.
The original's hours are not public.
"""

from pathlib import Path

from ml_collections import ConfigDict

from terramind_jax.config import read


def get_config() -> ConfigDict:
    config = read(Path(__file__).with_name("tiny.py"))

    config.model.dim = 384  # width
    config.model.encoder_depth = 12
    config.model.decoder_depth = 6
    config.model.num_heads = 6  # of 64 channels
    config.model.gated_mlp = False  # GELU
    config.model.use_bias = True
    config.model.remat = "none"  # what the backward pass recomputes

    config.data.view_window = 32768  # samples between the views of one: a batch for each of 8 workers; waiting views take 15 GB
    config.train.batch_size = 4096  # as in the original
    return config
