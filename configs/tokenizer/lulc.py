"""Tokenizer of LULC (ten classes): ViT-B encoder, FSQ with 4,375 codes, ViT-B decoder, cross-entropy.

    terramind-jax train-tokenizer --config=configs/tokenizer/lulc.py --workdir=TOKENIZERS/LULC --config.data.root=SHARDS

Hardware: accelerators; about 180 M parameters. Hours and errors to expect: not measured yet.

Known of the original: 20 epochs of TerraMesh, batch 2048 on 16 GPUs, AdamW (0.9, 0.99), peak learning rate 3.53553e-5, weight
decay 0.05, gradients clipped at 1, EMA 0.99, one epoch of warm-up. Original crops were 0.8 to 1 of a tile, resized; these are the
fixed crops that tokens are stored for. Unknown: whether the released weights are the averaged ones.

Every other field, with its meaning: `tokenizer_training` in terramind_jax/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.config import tokenizer_training


def get_config() -> ConfigDict:
    config = tokenizer_training()
    config.model.modality = "LULC"
    config.model.levels = (7, 5, 5, 5, 5)  # of the codebook
    config.optimizer.learning_rate = 3.53553e-5  # peak
    config.optimizer.warmup_samples = 9e6  # an epoch of TerraMesh; at most a tenth of the run
    config.train.total_samples = 180e6  # or set train.steps
    config.train.batch_size = 2048
    config.train.ema_decay = 0.99
    return config
