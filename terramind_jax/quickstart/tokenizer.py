"""Configuration of the quickstart's tokenizers: small enough to train in about a minute each on one core.

terramind-jax train-tokenizer --config=FILE --workdir=DIR --config.model.modality=DEM --config.data.root=SHARDS
"""

import math

import jax
from ml_collections import ConfigDict

from terramind_jax.config import tokenizer_training

STEPS = 600


def get_config() -> ConfigDict:
    config = tokenizer_training()

    config.model.levels = (8, 5, 5, 5)  # 1,000 codes: a few hundred scenes cannot fill the released 15,360
    config.model.dim = 96
    config.model.depth = 0  # no attention: each token describes its own 16 x 16 pixels, which is learned soonest
    config.model.num_heads = 3
    config.model.image_size = 224

    config.optimizer.learning_rate = 2e-3  # peak
    config.optimizer.warmup_samples = 200
    config.optimizer.weight_decay = 0.01

    config.train.batch_size = math.lcm(8, jax.device_count())
    config.train.steps = STEPS
    config.train.ema_decay = 0.98

    config.run.eval_every = 0  # only at the end
    config.run.eval_batches = 4
    config.run.checkpoint_every = 1000
    config.run.tensorboard = False
    return config
