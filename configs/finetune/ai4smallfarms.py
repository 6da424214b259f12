"""Fields of small farms on AI4SmallFarms, Sentinel-2 of Vietnam and Cambodia: frozen base with an UPerNet.

    terramind-jax finetune --config=configs/finetune/ai4smallfarms.py --workdir=DIR --config.data.root=DATA

What is expected in DATA: terramind_jax/tasks/datasets/ai4smallfarms.py. Without data: `terramind-jax data sample ai4smallfarms --out=DATA`.
The rate, its steps and the epochs are PANGAEA's, as are the statistics; its whole protocol, with a test, is another command:
`terramind-jax evaluate pangaea --dataset=ai4smallfarms`.

Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "upernet"

    config.data.dataset = "ai4smallfarms"
    config.data.statistics = "dataset"

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "steps"
    config.optimizer.weight_decay = 0.05

    config.train.tune = "frozen"
    config.train.epochs = 80
    config.train.monitor = "val/mIoU"
    return config
