"""Biomass of Finnish forests on BioMassters (Nascetti et al. 2023) from Sentinel-2 and Sentinel-1 of one month: base with a U-Net.

    terramind-jax finetune --config=configs/finetune/biomassters.py --workdir=DIR --config.data.root=DATA

Without data: `terramind-jax data sample biomassters --out=DATA`. What is expected in DATA: the files as published
(https://huggingface.co/datasets/nascetti-a/BioMassters), and lists of chips, as not every chip has every month and the publishers keep none
for validation:

    {train,test}_features/CHIP_S2_09.tif     10 bands, reflectance x 10000, and the probability of clouds; months count from September
    {train,test}_features/CHIP_S1_09.tif     VV and VH in dB of ascending, then of descending orbits, -9999: no data
    {train,test}_agbm/CHIP_agbm.tif          tonnes a hectare
    {train,val,test}.txt                     a CHIP a line; train and val are of train_features

Every other field, with its meaning: terramind_jax/tasks/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.tasks.config import finetuning

MONTH = 9  # June
PARTS = {"train": "train", "val": "train", "test": "test"}
S2 = ("BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD", "NIR_NARROW", "SWIR_1", "SWIR_2")


def get_config() -> ConfigDict:
    config = finetuning()

    config.model.name = "terramind_v1_base"
    config.model.decoder = "unet"

    config.data.dataset = "generic"
    features = {split: f"{part}_features" for split, part in PARTS.items()}
    optical = {"bands": (*S2, "CLOUDS"), "use": S2}
    radar = {"bands": ("VV", "VH", "VV descending", "VH descending"), "use": ("VV", "VH"), "missing": (-9999.0,)}
    config.data.options = ConfigDict(
        dict(
            title="BioMassters",
            source="https://huggingface.co/datasets/nascetti-a/BioMassters; the lists are your own, see configs/finetune/biomassters.py",
            task="regression",
            images={
                "S2L2A": {"folder": features, "pattern": f"*_S2_{MONTH:02d}.tif", **optical},
                "S1GRD": {"folder": features, "pattern": f"*_S1_{MONTH:02d}.tif", **radar},
            },
            labels={"folder": {split: f"{part}_agbm" for split, part in PARTS.items()}, "pattern": "*_agbm.tif", "scale": 0.01},  # 100 t/ha
            splits={split: f"{split}.txt" for split in PARTS},
        )
    )

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"

    config.train.epochs = 50
    config.train.monitor = "val/rmse"
    return config
