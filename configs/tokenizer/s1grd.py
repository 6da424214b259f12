"""Tokenizer of S1GRD (VV and VH in dB): ViT-B encoder, FSQ with 15,360 codes, ViT-B decoder, squared error.

    terramind-jax train-tokenizer --config=configs/tokenizer/s1grd.py --workdir=TOKENIZERS/S1GRD --config.data.root=SHARDS

Hardware: accelerators; about 180 M parameters. Hours and errors to expect: not measured yet.

Known of the original: 100 epochs, batch 384 on 6 GPUs, SSL4EO-S12, AdamW (0.9, 0.99), peak learning rate 0.0001, weight decay
0.05, gradients clipped at 1, EMA 0.9999, one epoch of warm-up, and a diffusion UNet as decoder where this one has a ViT. Original
crops were 0.8 to 1 of a tile, resized; these are the fixed crops that tokens are stored for. Unknown: whether the released
weights are the averaged ones.

Every other field, with its meaning: `tokenizer_training` in terramind_jax/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.config import tokenizer_training


def get_config() -> ConfigDict:
    config = tokenizer_training()
    config.model.modality = "S1GRD"
    config.model.levels = (8, 8, 8, 6, 5)  # of the codebook
    config.optimizer.learning_rate = 1e-4  # peak
    config.optimizer.warmup_samples = 9e6  # an epoch of TerraMesh; at most a tenth of the run
    config.train.total_samples = 900e6  # or set train.steps
    config.train.batch_size = 384
    config.train.ema_decay = 0.9999
    return config
