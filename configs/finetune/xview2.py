"""Damage to buildings on xView2 (xBD, Gupta et al. 2019), an image before and one after a disaster: base with a U-Net, all of it trained.

    terramind-jax finetune --config=configs/finetune/xview2.py --workdir=DIR --config.data.root=DATA

Without data: `terramind-jax data sample xview2 --out=DATA`. What is expected in DATA, as published (https://xview2.org/dataset: train,
hold and test); ``tier3``, more to train on, is not read:

    {train,hold,test}/images/NAME_{pre,post}_disaster.png           uint8, red, green, blue, 1024 pixels
    {train,hold,test}/targets/NAME_post_disaster_target.png         0: no building, 1-4: no, minor and major damage, destroyed

The two images are modalities of their own, which TerraMind learns here. Statistics are PANGAEA's (its configs/dataset/xview2.yaml), which
stand there from blue to red, as its reader has the bands. Every other field: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning

FOLDERS = {"train": "train", "val": "hold", "test": "test"}
RGB = {"bands": ("RED", "GREEN", "BLUE"), "mean": (85.1047, 88.4452, 66.7703), "std": (62.7612, 51.9129, 48.3066)}


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
            source="https://xview2.org/dataset",
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
