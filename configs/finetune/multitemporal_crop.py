"""Crops on HLS Multi-Temporal Crop Classification, three images of a season, whose features are concatenated: base with a U-Net.

    terramind-jax finetune --config=configs/finetune/multitemporal_crop.py --workdir=DIR --config.data.root=DATA
    terramind-jax data sample multitemporal_crop --out=DATA   # to try it without data

What is expected in DATA: the heading of terramind_jax/tasks/datasets/multitemporal_crop.py. These are the settings of the TerraMind
repository's terramind_v1_base_multitemporal_crop.yaml, which --config takes, too. Every other field: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import multitemporal_crop


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.time = "concat"
    config.model.times = multitemporal_crop.TIMES
    config.model.decoder = "unet"

    config.data.dataset = "generic"
    config.data.statistics = "dataset"
    config.data.options = ConfigDict(multitemporal_crop.options())

    config.optimizer.decay_norms = True

    config.train.loss = "ce"
    config.train.epochs = 100
    config.train.seed = 42
    return config
