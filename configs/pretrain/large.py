"""TerraMind large: 942 M parameters, of which 705 M in the blocks. The recipe is that of `tiny.py`, whose notes apply.

    terramind-jax pretrain --config=configs/pretrain/large.py --workdir=DIR --config.data.root=SHARDS --config.run.workers=8

Hardware: a pod slice; `--config.mesh.fsdp=8` splits the 11.3 GB of state where a chip has 16 GB.
The original took about 15,000 GPU hours on A100 for 500 B tokens (reported second-hand). Hours here: not measured yet.
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
