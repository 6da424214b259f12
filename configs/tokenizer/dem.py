"""Tokenizer of DEM (elevation in metres): ViT-B encoder, FSQ with 15,360 codes, diffusion U-Net decoder, squared error.

    terramind-jax train-tokenizer --config=configs/tokenizer/dem.py --workdir=TOKENIZERS/DEM --config.data.root=SHARDS

Hardware: accelerators; about 286 M parameters. Hours and errors to expect: not measured yet. The same at a small size, in minutes
on a CPU, and what differs from the original: configs/tokenizer/README.md.

Known of the original, and so here: crops of 0.8 to 1 of a tile, mirrored in half of the cases and resized to 256 pixels, AdamW
(0.9, 0.99), the peak learning rate, weight decay 0.05, gradients clipped at 1, the averages' decay, one epoch of warm-up. It was
trained for 20 epochs of TerraMesh, batch 2048 on 16 GPUs, resumed at epoch 13, float16. Unknown: whether the released weights are
the averaged ones.

Every other field, with its meaning: `tokenizer_training` in terramind_jax/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.config import tokenizer_training


def get_config() -> ConfigDict:
    config = tokenizer_training()
    config.model.modality = "DEM"
    config.model.levels = (8, 8, 8, 6, 5)  # of the codebook
    config.model.decoder = "unet"  # vit: one pass, no diffusion

    config.data.sizes = (256,)  # of random crops, one a step

    config.optimizer.learning_rate = 1.41421e-4  # peak
    config.optimizer.warmup_samples = 9e6  # an epoch of TerraMesh; at most a tenth of the run

    config.train.total_samples = 180e6  # 20 epochs of TerraMesh; or set train.steps
    config.train.batch_size = 2048
    config.train.ema_decay = 0.9999

    config.run.eval_batches = 1  # 50 timesteps of diffusion for each image
    return config
