"""Configuration of the quickstart's transformer: the released architecture, narrower and shallower, for minutes on two cores.

terramind-jax pretrain --config=terramind_jax/quickstart/pretrain.py --workdir=DIR --config.data.root=SHARDS
"""

import jax
from ml_collections import ConfigDict

from terramind_jax.config import pretraining

STEPS = 3000


def get_config() -> ConfigDict:
    config = pretraining()

    config.model.dim = 128
    config.model.encoder_depth = 1  # in minutes, more steps teach more than more layers
    config.model.decoder_depth = 1
    config.model.num_heads = 4

    config.data.views_per_sample = 4
    config.data.view_window = 512
    config.data.patch_group = 8

    # Eight views in nine see pixels of the evaluation's input alone; the ninth sees any mix, so that the model stays any-to-any.
    config.mask.input_tokens = 128
    config.mask.target_tokens = 128
    config.mask.input_alphas = ({"untok_sen2l2a@224": 1000.0}, 0.5)
    config.mask.target_alphas = (20.0,)  # nearly even
    config.mask.mixture_weights = (8.0, 1.0)

    config.optimizer.learning_rate = 2e-3  # peak
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.warmup_tokens = 200_000
    config.optimizer.clip_norm = 1.0

    config.train.batch_size = 8 * jax.device_count()  # a group of samples a device
    config.train.steps = STEPS
    config.train.loss = "mod"

    config.run.eval_every = 0  # only at the end
    config.run.eval_batches = 4  # all held-out scenes of the embedded world
    config.run.probe_scenes = 0
    config.run.checkpoint_every = 500
    config.run.tensorboard = False
    return config
