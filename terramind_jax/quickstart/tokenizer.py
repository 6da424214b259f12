"""Configuration of the quickstart's tokenizers: small enough to train in about a minute each on one core.

terramind-jax train-tokenizer --config=terramind_jax/quickstart/tokenizer.py --workdir=DIR --config.model.modality=DEM --config.data.root=SHARDS
"""

from ml_collections import ConfigDict

from terramind_jax.config import tokenizer_training


def get_config() -> ConfigDict:
    config = tokenizer_training()

    config.model.levels = (8, 5, 5, 5)  # 1,000 codes: a few hundred scenes cannot fill the released 15,360
    config.model.dim = 128
    config.model.depth = 2
    config.model.num_heads = 4
    config.model.image_size = 224

    config.optimizer.learning_rate = 2e-3  # peak
    config.optimizer.warmup_samples = 500
    config.optimizer.weight_decay = 0.01

    config.train.batch_size = 16
    config.train.steps = 300
    config.train.ema_decay = 0.98

    config.run.eval_every = 0  # only at the end
    config.run.eval_batches = 2
    config.run.checkpoint_every = 1000
    config.run.tensorboard = False
    return config
