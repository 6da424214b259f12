"""Any modality's tokenizer at a size that learns in minutes on a CPU: what benchmarks/reconstruction.py trains on the embedded world.

    terramind-jax train-tokenizer --config=configs/tokenizer/small.py --workdir=DIR --config.data.root=SHARDS --config.model.modality=DEM

Hardware: two CPU cores, a few minutes. Numbers: configs/tokenizer/README.md. Random crops are left out: a few hundred tiles at this
size gain nothing from them. Every other field, with its meaning: `tokenizer_training` in terramind_jax/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.quickstart import tokenizer


def get_config() -> ConfigDict:
    config = tokenizer.get_config()  # the quickstart's network; trained longer, and with a U-Net where that is asked for

    config.model.model_channels = 32  # of the U-Net: --config.model.decoder=unet
    config.model.channel_mult = (1, 2, 2)
    config.model.num_res_blocks = 1

    config.optimizer.warmup_samples = 400

    config.train.batch_size = 8
    config.train.steps = 1500
    config.train.ema_decay = 0.99

    config.run.eval_batches = 8
    config.run.checkpoint_every = 1500
    return config
