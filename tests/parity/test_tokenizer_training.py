"""One step of tokenizer training against the reference's own modules: noise, loss and every gradient (spec 9.4, 9.5)."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
import tiny_run
import torch
from terratorch.models.backbones.terramind.tokenizer import vqvae
from terratorch.models.backbones.terramind.tokenizer.scheduling import diffusion_pipeline

from terramind_jax import cli, modalities, tokenizer
from terramind_jax.convert import rules, tokenizers
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.tokenizer import TokenizerConfig, diffusion
from terramind_jax.train import tokenizer as training

SIDE = 64
VIT = dict(dim=64, depth=2, num_heads=4, image_size=SIDE)
DIVAE = TokenizerConfig("S1GRD", 2, decoder="unet", model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, **VIT)
VQVAE = TokenizerConfig("LULC", 10, levels=(7, 5, 5, 5, 5), **VIT)


def build(config):
    """The reference's tokenizer of these sizes, and our variables of its weights."""
    model = peer.tokenizer(config, seed=1)
    table = tokenizers.rules(config)
    shapes = nn.unbox(jax.eval_shape(lambda: tokenizer.init(tokenizer.Tokenizer(config), jax.random.key(0))))
    state = {key: value.copy() for key, value in peer.numpy_state(model).items()}
    return SimpleNamespace(config=config, model=model.train(), table=table, variables=rules.from_torch(state, table, shapes))


def batch_of(config, n=3):
    """A batch as the pipeline gives it, the last image of which could not be read."""
    rng = np.random.default_rng(0)
    kind = dict(low=0, high=10, dtype=np.uint8) if config.is_class_map else dict(low=-25, high=0)
    image = rng.integers(size=(n, SIDE, SIDE, 1 if config.is_class_map else config.channels), **kind)
    image = image if config.is_class_map else image.astype(np.float16)
    position = np.stack([np.zeros(n), np.arange(n) + 5], -1).astype(np.uint32)
    return {"image": image, "bad": np.arange(n) == n - 1, "position": position}


def check(pair, batch, expected):
    """Our loss and gradients of `batch` against those of `expected`, a loss of the reference's that has been differentiated."""
    module, draws = tokenizer.Tokenizer(pair.config), training.Draws(seed=2)
    step = jax.jit(lambda v: training.value_and_grad(module, draws, v["params"], v["buffers"], batch))
    (loss, _), grads = step(pair.variables)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    ours = rules.to_torch({**pair.variables, "params": grads}, pair.table)
    names = {name for name, parameter in pair.model.named_parameters() if parameter.requires_grad}
    assert names == {name for name in ours if not name.endswith("pos_emb")}
    largest = max(float(p.grad.abs().max()) for p in pair.model.parameters() if p.grad is not None)
    for name, parameter in pair.model.named_parameters():
        if name in names:
            theirs = parameter.grad.numpy()
            error = np.linalg.norm(np.asarray(ours[name]) - theirs) / (np.linalg.norm(theirs) + 1e-4 * largest * theirs.size**0.5)
            assert error <= 2e-3, (name, error)


def test_a_step_of_diffusion():
    """Noise and timesteps are ours; the reference puts its own schedule on them."""
    pair, batch = build(DIVAE), batch_of(DIVAE)
    keys = training.Draws(seed=2).keys(batch["position"], "noise")
    zeros = jnp.zeros(batch["image"].shape)
    _, t = diffusion.noised(keys, zeros)
    noise = jax.vmap(lambda key: jax.random.normal(key, zeros.shape[1:]))(training.sampling.step_keys(keys, 1))
    clean = peer.nchw(modalities.standardize("S1GRD", batch["image"]))[:-1]
    t, noise = torch.from_numpy(np.array(t))[:-1].long(), peer.nchw(noise)[:-1]
    noised = pair.model.noise_scheduler.add_noise(clean, noise, t)
    prediction, code_loss = pair.model.train_forward(clean, noised, t)
    loss = torch.nn.functional.mse_loss(prediction, clean) + code_loss.mean()
    loss.backward()
    check(pair, batch, loss.detach())


def test_a_step_on_classes():
    pair, batch = build(VQVAE), batch_of(VQVAE)
    classes = torch.from_numpy(batch["image"][:-1, ..., 0].astype(np.int64))
    logits, code_loss = pair.model(classes)
    loss = torch.nn.functional.cross_entropy(logits, classes) + code_loss.mean()
    loss.backward()
    check(pair, batch, loss.detach())


@pytest.mark.usefixtures("compile_fast")
def test_a_trained_tokenizer_loads_strictly(tmp_path):
    """What `convert` writes of a work directory encodes and decodes there as it does here."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards", "train", "S1GRD", "x", 1) as shard:
        for i in range(4):
            shard.add(f"{i}", write_sample({"bands": rng.normal(-15, 5, (1, 2, SIDE, SIDE)).astype(np.float16)}))
    config = tiny_run.tokenizer_training(tmp_path / "shards", "S1GRD", steps=2)
    smaller = dict(channel_mult=(1, 2), num_res_blocks=1)  # it has to be compiled for training
    config.model.update(decoder="unet", levels=DIVAE.levels, model_channels=32, **smaller, **VIT)
    config.data.image_size, config.train.batch_size = SIDE, 2
    training.train(config, tmp_path / "run")
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "trained.pt")]) == 0

    theirs = build(dataclasses.replace(DIVAE, **smaller)).model.eval()
    theirs.load_state_dict(torch.load(tmp_path / "trained.pt", weights_only=True), strict=True)
    module, variables = training.load(tmp_path / "run")
    image, noise = rng.normal(size=(2, 4, SIDE, SIDE, 2)).astype(np.float32)
    tokens = np.array(module.apply(variables, image, method="encode"))
    made = tokenizer.decode(module, variables, tokens, noise=noise, timesteps=2, sampler="ddim")
    with torch.no_grad(), mock.patch.object(diffusion_pipeline.torch, "randn", lambda *args, **kwargs: peer.nchw(noise)):
        assert np.mean(tokens == theirs.tokenize(peer.nchw(image)).numpy()) >= 0.98  # all of 64 but one
        expected = theirs.decode_tokens(torch.from_numpy(tokens), timesteps=2, image_size=SIDE)
    assert peer.relative_error(made, peer.nhwc(expected)) <= 1e-3


def test_noise_at_every_timestep():
    """The reference's table is float32 all through, ours float64: where the least noise is added they differ by some 1e-6."""
    model = vqvae.DDIMScheduler(beta_schedule="linear", prediction_type="sample", zero_terminal_snr=True)
    rng = np.random.default_rng(3)
    image, noise = rng.normal(size=(2, 1000, 4, 4, 1)).astype(np.float32)
    theirs = peer.nhwc(model.add_noise(peer.nchw(image), peer.nchw(noise), torch.arange(1000)))
    ours = diffusion.add_noise(image, noise, jnp.arange(1000))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_array_equal(ours[999], noise[999])
