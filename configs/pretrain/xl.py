"""TerraMind xl: 3.3 B parameters, of which 2.8 B in the blocks. What is known of the recipe stands in `tiny.py`.

    terramind-jax pretrain --config=configs/pretrain/xl.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Machine: a pod slice of a multiple of 16 chips; each holds a sixteenth of parameters and moments, 2.3 GiB.
Expected for 500 B tokens, by `plan` and not yet measured: 2.94 days on v5e:16x16, 4.15 on v5p:4x4x4, 1.51 on v6e:16x16.
There is no original of this size, and so no recipe: it is 4M's XL, to show where FSDP and tensor parallelism matter.
"""

from pathlib import Path

from ml_collections import ConfigDict

from terramind_jax.config import read


def get_config() -> ConfigDict:
    config = read(Path(__file__).with_name("tiny.py"))

    config.model.dim = 2048  # width
    config.model.encoder_depth = 24
    config.model.decoder_depth = 24
    config.model.num_heads = 32  # of 64 channels
    config.model.gated_mlp = True  # SwiGLU
    config.model.use_bias = False
    config.model.mlp_ratio = 4.03125  # 5,504 channels inside a SwiGLU; a ratio of 4 gives 5,461, which no mesh divides
    config.model.remat = "full"  # what the backward pass recomputes

    config.data.view_window = 32768  # samples between the views of one: a batch for each of 8 workers; waiting views take 15 GB
    config.train.batch_size = 4096  # as in the original
    config.mesh.fsdp = 16  # 128 rows of the width a device
    return config
