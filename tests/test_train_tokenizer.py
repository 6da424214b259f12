"""The tokenizer loop: it learns, keeps an average, measures itself in physical units, and continues with the same numbers."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import tiny_run

from terramind_jax import checkpoint, sampling
from terramind_jax import tokenizer as networks
from terramind_jax.convert import rules as convert
from terramind_jax.convert import tokenizers as rules
from terramind_jax.train import logging, meter, pretrain, tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"), tokens=False)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The work directory of a finished run on DEM."""
    workdir = tmp_path_factory.mktemp("finished")
    tokenizer.train(tiny_run.tokenizer_training(root), workdir)
    return workdir


def losses(workdir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in logging.read(workdir) if "loss" in line]


def test_a_run_learns_and_reports(finished):
    lines = logging.read(finished)
    assert losses(finished)[-1][1] < 0.7 * losses(finished)[0][1]
    assert {"images_per_second", "mfu", "codes_in_batch"} <= lines[-2].keys()
    assert 0 < lines[-1]["val/codes"] <= 1
    assert 1 <= lines[-1]["val/perplexity"] <= 16
    assert lines[-1]["val/rmse"] < 1000
    assert lines[-1]["val/block_mean/rmse"] < 0.01  # its tiles are flat


def test_what_needs_a_pretrained_model_is_told_what_this_is(finished):
    with pytest.raises(ValueError, match="is the work directory of train-tokenizer; expected that of a pretraining"):
        pretrain.load(finished)


def test_load_gives_the_averaged_weights(finished):
    module, variables = tokenizer.load(finished)
    assert module.apply(variables, np.zeros((2, 32, 32, 1), np.float32), method="encode").shape == (2, 2, 2)
    trees = checkpoint.Checkpoints(finished)
    assert trees.items() == {"params", "buffers", "opt_state", "ema"}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables["params"])
    saved, _ = trees.restore({"params": shapes, "ema": shapes})
    trees.close()
    jax.tree.map(np.testing.assert_array_equal, variables["params"], saved["ema"])
    assert not np.array_equal(saved["ema"]["quant_proj"]["kernel"], saved["params"]["quant_proj"]["kernel"])


def test_class_maps(root, tmp_path, monkeypatch):
    tiny_run.on_one_device(monkeypatch)
    config = tiny_run.tokenizer_training(root, "LULC")
    config.train.zero_output = True
    last = tokenizer.train(config, tmp_path)
    assert losses(tmp_path)[-1][1] < losses(tmp_path)[0][1] == pytest.approx(np.log(10))  # no class is likelier than another at first
    assert 0 <= last["val/accuracy"] <= 1 and 0 <= last["val/miou"] <= 1
    module, variables = tokenizer.load(tmp_path)
    assert module.apply(variables, np.zeros((2, 32, 32), np.uint8), method="encode").shape == (2, 2, 2)


def stepper(module, variables, draws=None):
    """Batch -> (loss, counts of tokens), compiled once."""
    fn = partial(tokenizer.value_and_grad, module, draws or tokenizer.Draws(), variables["params"], variables["buffers"])
    compiled = jax.jit(lambda batch: fn(batch)[0])
    return lambda batch: jax.device_get(compiled(batch))


def batch_of(*images, bad=()):
    position = sampling.seed_words(np.arange(len(images)) + 7, len(images))
    return {"image": np.stack(images), "bad": np.isin(np.arange(len(images)), bad), "position": position}


def test_unreadable_images_weigh_nothing(finished):
    module, variables = tokenizer.load(finished)
    image = np.random.default_rng(0).integers(0, 3000, (2, 32, 32, 1)).astype(np.int16)
    step = stepper(module, variables)
    kept, counts = step(batch_of(*image, bad=[1]))
    assert kept == pytest.approx(step(batch_of(image[0], 0 * image[1], bad=[1]))[0], rel=1e-6)
    assert counts.shape == (1, 16) and counts.sum() == 4  # the tokens of one image
    assert step(batch_of(*image, bad=[0, 1]))[0] == 0


# ---- diffusion ----


def unet_training(root, modality="DEM", **options):
    config = tiny_run.tokenizer_training(root, modality, **options)
    config.model.update(decoder="unet", model_channels=32, channel_mult=(1,), num_res_blocks=1)
    config.run.timesteps = 2
    return config


@pytest.mark.slow
def test_diffusion_on_several_devices_is_as_on_one(root, tmp_path, monkeypatch):
    config = unet_training(root, steps=2)
    config.model.channel_mult = (1, 1)  # of two levels, as all that are released
    tokenizer.train(config, tmp_path / "several")
    tiny_run.on_one_device(monkeypatch)
    tokenizer.train(config, tmp_path / "one")
    several, one = ([line["loss"] for line in logging.read(tmp_path / run) if "loss" in line] for run in ("several", "one"))
    np.testing.assert_allclose(several, one, rtol=1e-4)
    assert len(one) == 2


@pytest.fixture(scope="module")
def diffused(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("diffused")
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.on_one_device(patch)
        tokenizer.train(unet_training(root), workdir)
    return workdir


def test_a_diffusion_decoder_learns(diffused):
    assert np.mean([x for _, x in losses(diffused)[-8:]]) < 0.7 * np.mean([x for _, x in losses(diffused)[:8]])
    last = logging.read(diffused)[-1]
    assert {"val/loss", "val/rmse", "val/ssim", "val/psnr", "val/mae", "val/codes", "val/perplexity", "val/block_mean/rmse"} <= last.keys()
    assert last["val/rmse"] < 951  # one standard deviation
    (picture,) = (diffused / "pictures").iterdir()
    assert picture.name == "step_000000032.png" and picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_diffusion_continues_with_the_same_numbers(root, diffused, tmp_path, monkeypatch):
    """Noise and timesteps follow from a sample's place in the data, not from how often the run was started."""
    tiny_run.on_one_device(monkeypatch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 16)
        tokenizer.train(unet_training(root), tmp_path)
    tokenizer.train(unet_training(root), tmp_path)
    assert losses(tmp_path) == losses(diffused)
    jax.tree.map(np.testing.assert_array_equal, tokenizer.load(tmp_path)[1], tokenizer.load(diffused)[1])


def test_a_diffused_tokenizer_encodes_decodes_and_returns(diffused, tmp_path):
    """`tokenize` needs the encoder alone; the export and its return give the same arrays."""
    module, variables = tokenizer.load(diffused)
    tokens = module.apply(variables, np.zeros((2, 32, 32, 1), np.float32), method="encode")
    assert tokens.shape == (2, 2, 2)
    assert networks.decode(module, variables, tokens, timesteps=2).shape == (2, 32, 32, 1)
    table = rules.rules(module.config)
    state = convert.to_torch(variables, table)
    assert "decoder.input_blocks.0.0.weight" in state
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(state, table, variables), variables)


def test_noise_does_not_depend_on_the_batch_around(diffused):
    module, variables = tokenizer.load(diffused)
    image = np.random.default_rng(0).integers(0, 3000, (2, 32, 32, 1)).astype(np.int16)
    batch = batch_of(*image)
    step, other = stepper(module, variables, tokenizer.Draws(seed=3)), stepper(module, variables, tokenizer.Draws(seed=4))
    assert step(batch)[0] == pytest.approx(step(jax.tree.map(lambda x: x[::-1], batch))[0], rel=1e-5)
    assert other(batch)[0] != pytest.approx(step(batch)[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["finished", "diffused"])
def test_a_step_in_bfloat16_is_nearly_that_in_float32(run, request):
    """With parameters and gradients in float32."""
    module, variables = tokenizer.load(request.getfixturevalue(run))
    batch = batch_of(*np.random.default_rng(0).integers(0, 3000, (2, 32, 32, 1)).astype(np.int16))
    found = {}
    for dtype in ("float32", "bfloat16"):
        cast = networks.Tokenizer(dataclasses.replace(module.config, dtype=dtype))
        step = jax.jit(partial(tokenizer.value_and_grad, cast, tokenizer.Draws()))
        (value, _), gradients = step(variables["params"], variables["buffers"], batch)
        assert {x.dtype for x in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}
        found[dtype] = float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients)])
    (value, gradients), (other, others) = found.values()
    assert other == pytest.approx(value, rel=0.05) and other != value
    assert np.linalg.norm(gradients - others) < 0.2 * np.linalg.norm(gradients)


# ---- random crops, several codebooks ----


@pytest.mark.parametrize("modality", ["DEM", "LULC"])
def test_random_crops_of_several_sizes_in_one_program(root, tmp_path, modality, monkeypatch):
    """The loop refuses a second compilation, and the tiles of 48 pixels are larger than the images of 32."""
    tiny_run.on_one_device(monkeypatch)
    config = tiny_run.tokenizer_training(root, modality)
    config.data.sizes = (16, 48)
    tokenizer.train(config, tmp_path)
    assert np.mean([x for _, x in losses(tmp_path)[-8:]]) < np.mean([x for _, x in losses(tmp_path)[:8]])


def test_a_batch_takes_one_of_the_sizes(finished):
    module, variables = tokenizer.load(finished)
    tile = np.random.default_rng(0).integers(0, 3000, (48, 48, 1)).astype(np.int16)
    step, batch = stepper(module, variables, tokenizer.Draws(sizes=(16, 32))), batch_of(tile, tile)
    positions = [sampling.seed_words(np.arange(2) + first, 2) for first in range(12)]
    assert {int(step({**batch, "position": position})[1].sum()) for position in positions} == {2 * 1, 2 * 4}


@pytest.mark.slow
def test_128_codebooks_of_8_codes_in_bfloat16(root, tmp_path):
    config = tiny_run.tokenizer_training(root)
    config.model.update(levels=(8,), num_codebooks=128, dtype="bfloat16")
    last = tokenizer.train(config, tmp_path)
    assert losses(tmp_path)[-1][1] < 0.7 * losses(tmp_path)[0][1]
    assert 0 < last["val/codes"] <= 1 and 1 <= last["val/perplexity"] <= 8
    module, variables = tokenizer.load(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    tokens = module.apply(variables, np.zeros((2, 32, 32, 1), np.float32), method="encode")
    assert tokens.shape == (2, 2, 2, 128) and tokens.max() < 8
    assert module.apply(variables, tokens, method="decode").shape == (2, 32, 32, 1)


def stop_at(monkeypatch, last):
    add = meter.Meter.add

    def failing(self, step, metrics, waited):
        add(self, step, metrics, waited)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(meter.Meter, "add", failing)


def test_a_killed_run_continues_with_the_same_numbers(root, finished, tmp_path, monkeypatch):
    """Where tokens were made in between, too."""
    workdir = tmp_path / "run"
    stop_at(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train(tiny_run.tokenizer_training(root), workdir)
    monkeypatch.undo()
    tokenizer.train(tiny_run.tokenizer_training(tiny_run.write_shards(tmp_path / "tokenized")), workdir)
    jax.tree.map(np.testing.assert_array_equal, tokenizer.load(workdir)[1], tokenizer.load(finished)[1])
    assert losses(workdir) == losses(finished)


def test_what_cannot_work_is_one_sentence(root, tmp_path):
    with pytest.raises(ValueError, match="model_channels 40 must be a multiple of 32"):
        config = unet_training(root)
        config.model.model_channels = 40
        tokenizer.train(config, tmp_path)
    with pytest.raises(ValueError, match=r"train\.zero_output is of the decoder vit; model\.decoder is unet"):
        config = unet_training(root)
        config.train.zero_output = True
        tokenizer.train(config, tmp_path)
    with pytest.raises(ValueError, match="S2RGB has no tokenizer, as it has no levels; tokenizers exist for S2L2A"):
        tokenizer.train(tiny_run.tokenizer_training(root, "S2RGB"), tmp_path)
    with pytest.raises(FileNotFoundError, match="No samples"):
        tokenizer.train(tiny_run.tokenizer_training(root, "NDVI"), tmp_path)
    with pytest.raises(ValueError, match="one of pretrain; train-tokenizer takes those in configs/tokenizer"):
        tokenizer.train(tiny_run.pretraining(root), tmp_path)
    config = tiny_run.tokenizer_training(root)
    config.train.batch_size = 9
    with pytest.raises(ValueError, match=r"train\.batch_size=9 must be a multiple of the 8 devices"):
        tokenizer.train(config, tmp_path)
    for field, value, message in (
        ("run.keep", 0, r"run\.keep=0; expected at least 1"),
        ("model.dtype", "float17", r"model\.dtype='float17'; expected one of auto"),
        ("data.image_size", 64, "Tiles of DEM are 48x48 pixels, smaller than image_size 64"),
        ("data.image_size", 40, r"data\.image_size has 40; a tokenizer with the decoder 'vit' needs multiples of 16"),
        ("data.sizes", (32, 40), r"data\.sizes has 40; a tokenizer with the decoder 'vit' needs multiples of 16"),
        ("data.min_crop_scale", 0.0, r"data\.min_crop_scale=0\.0; expected a part of the tile's area"),
        ("model.decoder", "gan", r"model\.decoder='gan'; expected one of vit, unet"),
        ("run.timesteps", 0, r"run\.timesteps=0; expected at least 1"),
    ):
        config = tiny_run.tokenizer_training(root)
        group, name = field.split(".")
        config[group][name] = value
        with pytest.raises(ValueError, match=message):
            tokenizer.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
