"""TerraMind tiny: 52 M parameters, of which 8 M in the blocks; all 13 input and 7 target streams of the released model.

    terramind-jax pretrain --config=configs/pretrain/tiny.py --workdir=DIR --config.data.root=SHARDS

Machine: the batch of 32 fits a laptop, where a step takes several seconds: good for some thousand steps. For a real run, on accelerators,
add `--config.train.batch_size=4096 --config.data.view_window=32768 --config.run.workers=8`.
Expected for 500 B tokens, by `plan` and not yet measured: 0.09 days on v5e:16x16, 0.11 on v5p:4x4x4, 0.04 on v6e:16x16; all read faster
than most storage (launch/README.md). Expect a loss near ln(15360) = 9.6 per image modality at the start; the published validation losses
of base are S2L2A 5.7, S1GRD 7.8, DEM 2.2, NDVI 6.4.

The original recipe, of all four sizes:
- known: 500 B tokens, about 9 M samples of TerraMesh, cross-entropy of masked target tokens.
- reported second-hand: batch 4096, chosen among 2048, 4096 and 8192; learning rate 2e-4 with a cosine; budgets drawn as in 4M.
- taken from 4M, on which it builds: AdamW (0.9, 0.95), weight decay 0.05, warm-up over 10 B tokens, 128 + 128 tokens, alphas 0.5.
- not known: TerraMind's own budgets, alphas and mixtures, clipping, precision, the hours of tiny and small.

Every other field, with its meaning: `pretraining` in terramind_jax/config.py.
"""

from ml_collections import ConfigDict

from terramind_jax.config import pretraining


def get_config() -> ConfigDict:
    config = pretraining()

    config.model.dim = 192  # width
    config.model.encoder_depth = 12
    config.model.decoder_depth = 4
    config.model.num_heads = 3  # of 64 channels
    config.model.gated_mlp = False  # GELU
    config.model.use_bias = True

    config.data.views_per_sample = 4  # masks drawn for a sample once it is read
    config.data.view_window = 1024  # samples between the views of one

    config.mask.input_tokens = 128
    config.mask.target_tokens = 128
    config.mask.input_alphas = (0.5,)  # 4M's; one mixture over pixels, tokens and coordinates
    config.mask.target_alphas = (0.5,)

    config.optimizer.learning_rate = 2e-4  # peak
    config.optimizer.warmup_tokens = 10e9  # at most a tenth of the run
    config.optimizer.weight_decay = 0.05

    config.train.total_tokens = 500e9  # input and target tokens; or set train.steps
    config.train.batch_size = 32  # samples; 4096 in the original
    config.train.loss = "mod"
    config.train.seed = 0

    config.run.checkpoint_every = 1000  # steps
    config.run.eval_every = 1000  # steps
    return config
