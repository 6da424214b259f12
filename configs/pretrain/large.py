"""TerraMind large: 942 M parameters, of which 705 M in the blocks. What is known of the recipe stands in `tiny.py`.

    terramind-jax pretrain --config=configs/pretrain/large.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Machine: a pod slice; where a chip has 16 GB it fits with 1.4 GiB to spare, and `--config.mesh.fsdp=8` splits the 10.5 GiB of its state.
Expected for 500 B tokens, by `plan` and not yet measured: 1.22 days on v5e:16x16, 1.46 on v5p:4x4x4, 0.59 on v6e:16x16.
The original took about 15,000 GPU hours on A100 (reported second-hand).
"""

from pathlib import Path

from ml_collections import ConfigDict

from terramind_jax.config import read


def get_config() -> ConfigDict:
    config = read(Path(__file__).with_name("tiny.py"))

    config.model.dim = 1024  # width
    config.model.encoder_depth = 24
    config.model.decoder_depth = 24
    config.model.num_heads = 16  # of 64 channels
    config.model.gated_mlp = True  # SwiGLU
    config.model.use_bias = False
    config.model.remat = "full"  # what the backward pass recomputes

    config.data.view_window = 32768  # samples between the views of one: a batch for each of 8 workers; waiting views take 15 GB
    config.train.batch_size = 4096  # as in the original
    return config
