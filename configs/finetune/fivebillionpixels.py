"""24 classes of land cover on Five-Billion-Pixels (Tong et al. 2023), Gaofen-2 at 4 m: frozen base with an UPerNet, as PANGAEA has it.

    terramind-jax finetune --config=configs/finetune/fivebillionpixels.py --workdir=DIR --config.data.root=DATA

What is expected in DATA: scenes of https://x-ytong.github.io/project/Five-Billion-Pixels.html cut into tiles of 520 pixels and parted,
as PANGAEA reads them (its pangaea/datasets/fivebillionpixels.py):

    {train,val,test}/images/TILE.tif     uint8, near infrared, red, green, blue
    {train,val,test}/labels/TILE.tif     0: no label, 1-24: classes

Statistics and classes are PANGAEA's (its configs/dataset/fivebillionpixels.yaml). Every other field: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning

SPLITS = ("train", "val", "test")
CLASSES = (
    *("industrial area", "paddy field", "irrigated field", "dry cropland", "garden land", "arbor forest", "shrub forest", "park"),
    *("natural meadow", "artificial meadow", "river", "urban residential", "lake", "pond", "fish pond", "snow", "bareland"),
    *("rural residential", "stadium", "square", "road", "overpass", "railway station", "airport"),
)


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "upernet"

    config.data.dataset = "generic"
    config.data.statistics = "dataset"
    config.data.options = ConfigDict(
        dict(
            title="Five-Billion-Pixels",
            images={
                "S2L2A": {
                    "folder": {split: f"{split}/images" for split in SPLITS},
                    "pattern": "*.tif",
                    "bands": ("NIR_BROAD", "RED", "GREEN", "BLUE"),
                    "mean": (92.6, 124.3, 94.2, 98.0),
                    "std": (44.5, 51.0, 50.0, 47.1),
                }
            },
            labels={"folder": {split: f"{split}/labels" for split in SPLITS}, "pattern": "*.tif", "zero_is_none": True},
            class_names=CLASSES,
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
