"""Water on Sen1Floods11 from Sentinel-2 L1C and Sentinel-1: base with a U-Net, all of it trained.

    terramind-jax finetune --config=configs/finetune/sen1floods11.py --workdir=DIR --config.data.root=DATA
    terramind-jax predict --weights=DIR --input S2L1C=chip_S2.tif --input S1GRD=chip_S1.tif --out=maps

What is expected in DATA: terramind_jax/tasks/datasets/sen1floods11.py. Without data: `terramind-jax data sample sen1floods11 --out=DATA`.
Layers, decoder, loss, rate and schedule are those of the TerraMind repository's configuration. The backbone as it is, or few parameters
more: --config.train.tune=frozen or lora, with a higher rate, such as --config.optimizer.learning_rate=1e-4. Thinking in Modalities:
--config.model.name=terramind_v1_base_tim.

Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "unet"  # of 512, 256, 128, 64 channels, on layers 2, 5, 8, 11

    config.data.dataset = "sen1floods11"
    config.data.crop = 224

    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "plateau"

    config.train.loss = "dice"
    config.train.epochs = 50
    config.train.batch_size = 8
    return config
