"""Diffusion decoding: schedule and timesteps (spec 6.6, 6.7), the scan against written-out loops, what a sample may depend on."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_unet

from terramind_jax import sampling, tokenizer
from terramind_jax.tokenizer import diffusion

FAST = {"xla_backend_optimization_level": 0}
SMALL = tokenizer.TokenizerConfig(
    "DEM", 1, dim=32, depth=1, num_heads=2, image_size=64, decoder="unet", model_channels=32, channel_mult=(1, 1), num_res_blocks=1
)
normal = test_unet.normal


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def decode():
    """Four steps of a small network that saturates some pixels."""
    variables = test_unet.build(SMALL, scale=0.15)
    return functools.partial(tokenizer.decode, tokenizer.Tokenizer(SMALL), variables, timesteps=4)


def tokens(batch=2, height=2, width=2):
    return np.random.default_rng(3).integers(0, SMALL.codebook_size, (batch, height, width)).astype(np.int32)


# ---- schedule ----


def test_schedule_is_the_references():
    got = diffusion.alphas_cumprod()
    expected = {0: 0.99989998, 1: 0.99977934, 2: 0.99963862, 10: 0.99779314, 19: 0.99419469, 39: 0.98052371, 99: 0.89637816}
    expected |= {499: 0.07602873, 500: 0.07524620, 979: 2.0058392e-06, 998: 4.2132733e-09}
    np.testing.assert_allclose(got[list(expected)], list(expected.values()), rtol=1e-5)
    assert got[999] == 0 and (np.diff(got) < 0).all()


def test_noise_leaves_the_first_image_and_hides_the_last():
    image, noise = normal(0, (3, 8, 8, 1)), normal(1, (3, 8, 8, 1))
    made = np.asarray(diffusion.add_noise(image, noise, jnp.array([0, 500, 999])))
    np.testing.assert_allclose(made[0], image[0], atol=0.05)
    np.testing.assert_allclose(made[1], 0.0752462**0.5 * image[1] + (1 - 0.0752462) ** 0.5 * noise[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(made[2], noise[2])


def test_noise_in_training_is_normal_and_at_every_timestep():
    x, t = diffusion.noised(jax.random.split(jax.random.key(0), 4000), jnp.zeros((4000, 8, 8, 1)))
    assert t.min() < 5 and t.max() > 994 and abs(float(t.mean()) - 499.5) < 20
    late = np.asarray(x)[np.asarray(t) > 900]
    assert abs(late.std() - 1) < 0.02 and abs(late.mean()) < 0.02
    assert len(np.unique(late[:, 0, 0, 0])) == len(late)


@pytest.mark.parametrize(
    ("timesteps", "spacing", "expected"),
    [
        (10, "trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (3, "trailing", [999, 666, 333, 0]),
        (4, "leading", [750, 500, 250, 0]),
        (3, "linspace", [999, 499, 0]),
        (1, "trailing", [999]),
        (1, "linspace", [999]),
    ],
)
def test_timesteps_are_the_references(timesteps, spacing, expected):
    assert diffusion.spaced(timesteps, spacing).tolist() == expected


def test_quadratic_timesteps_grow_dense_towards_the_image():
    assert diffusion.spaced(5, "quadratic").tolist() == [999, 639, 359, 159, 39]
    many = diffusion.spaced(1000, "quadratic")
    assert many[0] == 999 and many[-1] == 0 and (np.diff(many) < 0).all()


def test_timesteps_that_do_not_divide_1000_are_more():
    assert len(diffusion.spaced(30, "trailing")) == 31
    assert diffusion.spaced(50, "trailing")[[0, 1, -1]].tolist() == [999, 979, 19] and len(diffusion.spaced(50, "trailing")) == 50


# ---- steps ----


def predict(x, t):
    """Some network; its predictions go beyond -1 ... 1."""
    return 1.5 * jnp.tanh(x + t / 1000)


def loop(x, timesteps, sampler, spacing, clip, noise):
    """The formulas of spec 6.7 one after another, in float64."""
    a = diffusion.alphas_cumprod()
    for t in diffusion.spaced(timesteps, "leading" if sampler == "ddpm" else spacing):
        before = t - 1000 // timesteps
        previous = a[before] if before >= 0 else 1.0
        x0 = 1.5 * np.tanh(x + t / 1000)
        limited = np.clip(x0, -1, 1) if clip == "published" else x0
        if sampler == "ddim":
            eps = (x - np.sqrt(a[t]) * x0) / np.sqrt(1 - a[t])
            x = np.sqrt(previous) * limited + np.sqrt(1 - previous) * eps
        else:
            alpha = a[t] / previous
            mean = np.sqrt(previous) * (1 - alpha) / (1 - a[t]) * limited + np.sqrt(alpha) * (1 - previous) / (1 - a[t]) * x
            x = mean + (np.sqrt((1 - previous) / (1 - a[t]) * (1 - alpha)) * noise(t) if t > 0 else 0)
    return x


@pytest.mark.parametrize("clip", ["published", "none"])
@pytest.mark.parametrize(
    ("sampler", "timesteps", "spacing"),
    [
        ("ddim", 10, "trailing"),
        ("ddim", 7, "trailing"),
        ("ddim", 6, "leading"),
        ("ddim", 6, "linspace"),
        ("ddpm", 5, "trailing"),
        ("ddpm", 1000, "leading"),
    ],
)
def test_the_scan_is_the_written_out_loop(sampler, timesteps, spacing, clip):
    start, table = normal(0, (2, 4, 4, 1)), normal(1, (1000, 2, 4, 4, 1))
    draw = (lambda t: jnp.asarray(table)[t]) if sampler == "ddpm" else None
    got = diffusion.sample(predict, start, diffusion.plan(timesteps, sampler, spacing), clip=clip, draw=draw)
    expected = loop(start.astype(np.float64), timesteps, sampler, spacing, clip, lambda t: table[t])
    np.testing.assert_allclose(got, expected, atol=2e-4 if timesteps == 1000 else 1e-5)
    assert (np.abs(got) <= 1).all() == (clip == "published")


def published(x, timesteps, spacing):
    """DPM-Solver++ (2M) as arXiv 2211.01095 writes its algorithm 2, in float64; first order where its steps are infinite."""
    a, t = diffusion.alphas_cumprod(), diffusion.spaced(timesteps, spacing)
    alpha, sigma = np.append(np.sqrt(a[t]), 1.0), np.append(np.sqrt(1 - a[t]), 0.0)
    with np.errstate(divide="ignore"):
        logsnr, before = np.log(alpha / sigma), None
    for i in range(len(t)):
        h, x0 = logsnr[i + 1] - logsnr[i], 1.5 * np.tanh(x + t[i] / 1000)
        ratio = np.inf if i == 0 or h == np.inf else (logsnr[i] - logsnr[i - 1]) / h
        d = x0 if ratio == np.inf else (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * d, x0
    return x


@pytest.mark.parametrize(("timesteps", "spacing"), [(1, "trailing"), (6, "trailing"), (10, "quadratic")])
def test_second_order_is_the_published_algorithm(timesteps, spacing):
    start = normal(0, (2, 4, 4, 1))
    got = diffusion.sample(predict, start, diffusion.plan(timesteps, "dpmpp", spacing), clip="none")
    np.testing.assert_allclose(got, published(start.astype(np.float64), timesteps, spacing), atol=1e-5)
    assert (np.abs(got) > 1).any()
    limited = diffusion.sample(predict, start, diffusion.plan(timesteps, "dpmpp", spacing))
    assert (np.abs(limited) <= 1).all()


def of_two_peaks(x, t):
    """The best prediction for pixels that are -1 or 1.2, and vary around either by 0.2: what a network learns."""
    a = jnp.asarray(diffusion.alphas_cumprod(), jnp.float32)[t]
    peaks, spread = jnp.array([-1.0, 1.2]), a * 0.04 + 1 - a
    distance = x[..., None] - jnp.sqrt(a) * peaks
    chance = jax.nn.softmax(-(distance**2) / (2 * spread))
    return (chance * (peaks + jnp.sqrt(a) * 0.04 / spread * distance)).sum(-1)


def test_second_order_needs_a_quarter_of_the_steps():
    start = normal(0, (1, 32, 32, 1))
    run = lambda *plan: diffusion.sample(of_two_peaks, start, diffusion.plan(*plan), clip="none")  # noqa: E731
    exact = run(1000, "ddim", "trailing")
    error = lambda *plan: np.sqrt(np.square(run(*plan) - exact).mean())  # noqa: E731
    assert error(12, "dpmpp") < error(50, "ddim") < error(20, "ddim")
    assert error(20, "dpmpp") < error(10, "dpmpp") / 2
    assert error(None, "dpmpp") <= error(None, "ddim") == error(50, "ddim")  # the steps that are taken unless a number is asked for


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_a_perfect_network_is_believed(sampler):
    image = np.clip(normal(5, (1, 4, 4, 1)), -1, 1)
    keys = sampling.sample_keys(jnp.asarray(sampling.seed_words(0, 1)), "x")
    draw = lambda t: jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(sampling.step_keys(keys, t))  # noqa: E731
    got = diffusion.sample(lambda x, t: jnp.asarray(image), normal(6, image.shape), diffusion.plan(8, sampler, "leading"), draw=draw)
    np.testing.assert_allclose(got, image, atol=1e-6)


# ---- decoding ----


def test_a_sample_does_not_depend_on_its_batch(decode):
    ids = tokens()
    for options in ({}, {"sampler": "ddpm", "clip": "none"}, {"sampler": "dpmpp", "clip": "dynamic"}):
        both, second = decode(ids, seed=[5, 6], **options), decode(ids[1:], seed=6, **options)
        assert both.shape == (2, 32, 32, 1) and both.dtype == jnp.float32 and np.isfinite(both).all()
        np.testing.assert_allclose(both[1], second[0], atol=1e-4)
        assert np.abs(both - decode(ids, seed=[5, 7], **options)).max((1, 2, 3))[1] > 1e-2


def test_one_seed_gives_every_sample_the_same_noise(decode):
    one = decode(tokens(1), seed=3)
    np.testing.assert_allclose(decode(np.repeat(tokens(1), 2, axis=0), seed=3)[1], one[0], atol=1e-4)


def test_given_noise_replaces_the_seed(decode):
    noise = normal(4, (2, 32, 32, 1))
    np.testing.assert_array_equal(decode(tokens(), noise=noise, seed=1), decode(tokens(), noise=noise, seed=2))
    assert np.abs(decode(tokens(), noise=noise) - decode(tokens())).max() > 1e-2


def test_steps_that_nobody_asked_for(decode):
    """Few of DPM-Solver++; of DDIM as many as are published."""
    ids = tokens(1)
    np.testing.assert_array_equal(decode(ids, timesteps=None), decode(ids, sampler="dpmpp", timesteps=12))
    np.testing.assert_array_equal(decode(ids, timesteps=None, sampler="ddim"), decode(ids, sampler="ddim", timesteps=50))
    for sampler, steps in {"dpmpp": 12, "ddim": 50, "ddpm": 1000}.items():
        for ours, expected in zip(diffusion.plan(None, sampler), diffusion.plan(steps, sampler), strict=True):
            np.testing.assert_array_equal(ours, expected)
            assert len(ours) == steps


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_windows_of_a_scene_share_its_noise(sampler, monkeypatch):
    """That of the start, and of DDPM also that of a step."""

    def noise_itself(module, variables, codes, noise, steps, *, clip, draw):
        return noise if draw is None else noise + draw(5)

    monkeypatch.setattr(diffusion, "denoise", noise_itself)
    monkeypatch.setattr(diffusion, "_denoise", diffusion._denoise.__wrapped__)  # not the compiled one, which has the true network
    decode = functools.partial(tokenizer.decode, tokenizer.Tokenizer(SMALL), {}, seed=3, sampler=sampler)
    whole = decode(tokens(1, 4, 6), at=np.array([[10, 5]]))
    np.testing.assert_allclose(whole[:, 16:48, 32:], decode(tokens(1, 2, 4), at=np.array([[11, 7]])), atol=1e-6)
    assert np.abs(whole - decode(tokens(1, 4, 6))).max() > 0.1


def test_images_are_clipped_unless_asked_otherwise(decode):
    assert np.abs(decode(tokens())).max() == 1
    assert np.abs(decode(tokens(), clip="none")).max() > 1.05


def test_the_dynamic_limit_is_each_bands_own():
    x0 = np.stack([np.linspace(-0.5, 0.5, 1024), np.linspace(-4, 4, 1024)], -1).reshape(1, 32, 32, 2).astype(np.float32)
    got = np.asarray(diffusion.limit(jnp.asarray(x0), "dynamic"))
    np.testing.assert_array_equal(got[..., 0], x0[..., 0])
    assert 3.9 < got[..., 1].max() < 4 and (got[..., 1] != x0[..., 1]).sum() < 10


def test_images_need_not_be_square(decode):
    assert decode(tokens(1, 4, 2)).shape == (1, 64, 32, 1)


def test_decoding_can_be_part_of_a_larger_program(decode):
    inside = jax.jit(lambda ids: decode(ids) + 1)(tokens())
    np.testing.assert_allclose(inside, decode(tokens()) + 1, atol=1e-4)


def test_a_decoder_of_one_pass_ignores_the_options():
    config = tokenizer.TokenizerConfig("LULC", 9, levels=(7, 5, 5, 5, 5), dim=32, depth=1, num_heads=2, image_size=64)
    module, variables = tokenizer.Tokenizer(config), test_unet.build(config)
    ids = tokens() % config.codebook_size
    got = tokenizer.decode(module, variables, ids, seed=[1, 2], timesteps=3, clip="dynamic")
    np.testing.assert_allclose(got, jax.jit(lambda v: module.apply(v, ids, method="decode"))(variables), atol=1e-5)
    assert got.shape == (2, 32, 32, 9)


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": normal(0, (2, 32, 32, 2))}, r"noise has shape \[2, 32, 32, 2\]; these tokens decode to \[2, 32, 32, 1\]"),
        ({"sampler": "euler"}, "Unknown sampler 'euler'; known samplers: ddim, ddpm, dpmpp"),
        ({"clip": True}, "Unknown clip True; known limits: published, none, dynamic"),
        ({"spacing": "karras"}, "Unknown spacing 'karras' of timesteps; known spacings: trailing, leading, linspace, quadratic"),
        ({"timesteps": 0}, "number of timesteps is 0; it must be between 1 and 1000"),
        ({"timesteps": 1001}, "number of timesteps is 1001"),
        ({"at": [[0, 0]]}, r"option at is int64 of shape \[1, 2\]; expected integers \[2, 2\]"),
        ({"seed": [1, 2, 3]}, r"seed has shape \(3,\)"),
    ],
)
def test_wrong_options_are_one_sentence(decode, options, message):
    with pytest.raises(ValueError, match=message):
        decode(tokens(), **options)


def test_sides_that_cannot_be_halved_are_one_sentence():
    module = tokenizer.Tokenizer(tokenizer.TokenizerConfig("S1GRD", 2, decoder="unet"))
    with pytest.raises(ValueError, match=r"S1GRD tokens of shape \[1, 15, 14\] are an image of 240x224 pixels; .* multiples of 32"):
        tokenizer.decode(module, {}, np.zeros((1, 15, 14), np.int32))
