"""24 classes of land cover on Five-Billion-Pixels, Gaofen-2 at 4 m: frozen base with an UPerNet.

    terramind-jax finetune --config=configs/finetune/fivebillionpixels.py --workdir=DIR --config.data.root=DATA

What is expected in DATA: terramind_jax/tasks/datasets/fivebillionpixels.py. Without data:
`terramind-jax data sample fivebillionpixels --out=DATA`. The rate, its steps and the epochs are PANGAEA's, as are the statistics; its whole
protocol, with a test, is another command: `terramind-jax evaluate pangaea --dataset=fivebillionpixels`.

Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import fivebillionpixels


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "upernet"

    config.data.dataset = "generic"
    config.data.options = ConfigDict(fivebillionpixels.FIELDS)
    config.data.statistics = "dataset"

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "steps"
    config.optimizer.weight_decay = 0.05

    config.train.tune = "frozen"
    config.train.epochs = 80
    config.train.monitor = "val/mIoU"
    return config
