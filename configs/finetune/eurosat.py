"""Land use on EuroSAT, images of 64 pixels: the backbone as it is, a linear layer on the mean of its last layer.

    terramind-jax finetune --config=configs/finetune/eurosat.py --workdir=DIR --config.data.root=DATA

What is expected in DATA: terramind_jax/tasks/datasets/eurosat.py. Without data: `terramind-jax data sample eurosat --out=DATA`.

Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "identity"  # labels are a mean over the image
    config.model.layers = (11,)

    config.data.dataset = "eurosat"
    config.data.crop = 64

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"

    config.train.tune = "frozen"
    config.train.epochs = 50
    config.train.batch_size = 64
    config.train.monitor = "val/accuracy"
    return config
