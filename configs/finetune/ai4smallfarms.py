"""Fields on AI4SmallFarms (Persello et al. 2023), Sentinel-2 of Vietnam and Cambodia: frozen base with an UPerNet, as PANGAEA has it.

    terramind-jax finetune --config=configs/finetune/ai4smallfarms.py --workdir=DIR --config.data.root=DATA/sentinel-2-asia

What is expected in the root, as published (https://doi.org/10.17026/dans-xy6-ngg6):

    {train,validate,test}/images/TILE.tif     4 bands of 10 m, reflectance x 10000
    {train,validate,test}/masks/TILE.tif      0: other, 255: field

Statistics are PANGAEA's (its configs/dataset/ai4smallfarms.yaml). Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning

FOLDERS = {"train": "train", "val": "validate", "test": "test"}


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "upernet"

    config.data.dataset = "generic"
    config.data.statistics = "dataset"
    config.data.options = ConfigDict(
        dict(
            title="AI4SmallFarms",
            images={
                "S2L2A": {
                    "folder": {split: f"{folder}/images" for split, folder in FOLDERS.items()},
                    "pattern": "*.tif",
                    "bands": ("BLUE", "GREEN", "RED", "NIR_BROAD"),
                    "mean": (750.21, 1032.73, 1165.13, 2416.04),
                    "std": (283.38, 332.73, 518.90, 702.38),
                }
            },
            labels={"folder": {split: f"{folder}/masks" for split, folder in FOLDERS.items()}, "pattern": "*.tif", "codes": (0, 255)},
            class_names=("other", "field"),
            ignore_index=-1,
        )
    )

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "steps"
    config.optimizer.weight_decay = 0.05

    config.train.tune = "frozen"
    config.train.epochs = 80
    config.train.monitor = "val/mIoU"
    return config
