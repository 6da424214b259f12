"""Damage to buildings on xView2 (xBD, Gupta et al. 2019), an image before and one after a disaster: base with a U-Net, all of it trained.

    terramind-jax finetune --config=configs/finetune/xview2.py --workdir=DIR --config.data.root=DATA

What is expected in DATA, as published (https://xview2.org/dataset: train, hold and test); ``tier3``, more to train on, is not read:

    {train,hold,test}/images/NAME_{pre,post}_disaster.png           uint8, red, green, blue, 1024 pixels
    {train,hold,test}/targets/NAME_post_disaster_target.png         0: no building, 1-4: no, minor and major damage, destroyed

The two images are modalities of their own, which TerraMind learns here, standardised with ImageNet's statistics. Every other field:
terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning

FOLDERS = {"train": "train", "val": "hold", "test": "test"}
RGB = {"bands": ("RED", "GREEN", "BLUE"), "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.merge_method = "concat"
    config.model.decoder = "unet"

    config.data.dataset = "generic"
    config.data.statistics = "dataset"
    images = {split: f"{folder}/images" for split, folder in FOLDERS.items()}
    targets = {split: f"{folder}/targets" for split, folder in FOLDERS.items()}
    config.data.options = ConfigDict(
        dict(
            title="xView2",
            images={when: {"folder": images, "pattern": f"*_{when}_disaster.png", **RGB} for when in ("pre", "post")},
            labels={"folder": targets, "pattern": "*_post_disaster_target.png"},
            class_names=("no building", "no damage", "minor damage", "major damage", "destroyed"),
            ignore_index=None,
        )
    )

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"

    config.train.loss = "focal"  # most pixels are no building
    config.train.epochs = 50
    config.train.monitor = "val/mIoU"
    return config
