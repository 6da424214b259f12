"""The image tokenizers against TerraTorch's: names, latents, tokens, features and decoded pixels (spec 6, 10.4, 10.5)."""

from types import SimpleNamespace
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
import torch
from terratorch.models.backbones.terramind.tokenizer.models.unet.unet import PatchedUNetCondCat
from terratorch.models.backbones.terramind.tokenizer.scheduling import diffusion_pipeline, scheduling_ddim, scheduling_ddpm

from terramind_jax import tokenizer
from terramind_jax.convert import rules as convert
from terramind_jax.convert import tokenizers
from terramind_jax.tokenizer import Tokenizer, TokenizerConfig, diffusion

CHANNELS = {"S2L2A": 12, "S1RTC": 2, "S1GRD": 2, "DEM": 1, "NDVI": 1}
RELEASED = {f"terramind_v1_tokenizer_{m.lower()}": TokenizerConfig(m, channels, decoder="unet") for m, channels in CHANNELS.items()}
RELEASED |= {f"terramind_v01_tokenizer_{m.lower()}": TokenizerConfig(m, CHANNELS[m], decoder="unet") for m in ("S2L2A", "S1GRD", "DEM")}
for version, classes in (("v1", 10), ("v01", 9)):
    RELEASED[f"terramind_{version}_tokenizer_lulc"] = TokenizerConfig("LULC", classes, levels=(7, 5, 5, 5, 5))
ENCODER = ("encoder/", "quant_proj/")  # what the reference's backbones consist of

SMALL = TokenizerConfig("S1GRD", 2, decoder="unet", model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def abstract(config):
    return nn.unbox(jax.eval_shape(lambda: tokenizer.init(Tokenizer(config), jax.random.key(0))))


def variables_of(model, config, parts=("",)):
    """The reference's weights as our variables, or those of the parts of a tokenizer that `model` has."""

    def wanted(path):
        return path.split("/", 1)[1].startswith(parts)

    shapes = convert.unflatten({path: x for path, x in convert.flatten(abstract(config)).items() if wanted(path)})
    rules = [rule for rule in tokenizers.rules(config) if wanted(rule.ours)]
    return jax.device_put(convert.from_torch(peer.numpy_state(model), rules, shapes))


def image(config, side, seed=0, batch=1):
    """Standardised images and what the reference takes, class maps for LULC."""
    rng = np.random.default_rng([seed, side])
    if config.modality == "LULC":
        classes = rng.integers(0, config.channels, (batch, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
        return classes, torch.from_numpy(classes)
    x = rng.normal(size=(batch, side, side, config.channels)).astype(np.float32)
    return x, peer.nchw(x)


def tokens_and_noise(config, height, width, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.codebook_size, (1, height // 16, width // 16)).astype(np.int32)
    return tokens, rng.normal(size=(1, height, width, config.channels)).astype(np.float32)


def decode_theirs(model, tokens, noise, timesteps):
    with mock.patch.object(diffusion_pipeline.torch, "randn", lambda *args, **kwargs: peer.nchw(noise)):
        return peer.nhwc(model.decode_tokens(torch.from_numpy(tokens), timesteps=timesteps, image_size=noise.shape[1:3]))


def encode_theirs(model, x):
    """Latents and tokens, of one run of the encoder."""
    latents = []
    hook = model.quant_proj.register_forward_hook(lambda module, x, y: latents.append(y))
    tokens = model.tokenize(x).numpy()
    hook.remove()
    return peer.nhwc(latents[0]), tokens


def check_encoding(model, config, variables):
    """Latents and tokens of 224 and 256 pixels; the reference's positions are resized for the first.

    3,616 tokens: rounding turns about one in ten thousand over, another one on another machine.
    """
    module = Tokenizer(config)
    encode = jax.jit(lambda v, x: (module.apply(v, x, method="latent"), module.apply(v, x, method="encode")))
    equal = []
    for side in (224, 256):
        ours, theirs = image(config, side, batch=8)
        latent, tokens = encode(variables, ours)
        latent_there, tokens_there = encode_theirs(model, theirs)
        assert peer.relative_error(latent, latent_there) <= 1e-4
        equal.append(np.asarray(tokens == tokens_there).ravel())
    share = np.concatenate(equal).mean()
    print(f"{share:.4%} of tokens equal")
    assert share >= 0.999


def check_small_encoding(model, config, variables):
    """Latents and tokens of four images of 64 pixels."""
    module = Tokenizer(config)
    x, given = image(config, 64, batch=4)
    latent, tokens = jax.jit(lambda v, x: (module.apply(v, x, method="latent"), module.apply(v, x, method="encode")))(variables, x)
    latent_there, tokens_there = encode_theirs(model, given)
    assert peer.relative_error(latent, latent_there) <= 1e-4
    assert np.mean(tokens == tokens_there) >= 0.98  # all of 64 but one


# ---- names ----


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_the_references(name):
    with peer._no_initialisation():  # memory that is never written is never taken
        theirs = {key: tuple(x.shape) for key, x in peer.build(name, seed=None).state_dict().items()}
    assert convert.shapes(abstract(RELEASED[name]), tokenizers.rules(RELEASED[name])) == theirs


# ---- released sizes ----


@pytest.fixture(scope="module")
def s2l2a():
    name = "terramind_v1_tokenizer_s2l2a"
    model = peer.build(name, seed=1)  # gives random values to what starts at zero, too
    return SimpleNamespace(config=RELEASED[name], model=model, variables=variables_of(model, RELEASED[name]))


def test_s2l2a_encoding(s2l2a):
    check_encoding(s2l2a.model, s2l2a.config, s2l2a.variables)


def test_s2l2a_weights_return_byte_for_byte(s2l2a):
    state, theirs = convert.to_torch(s2l2a.variables, tokenizers.rules(s2l2a.config)), peer.numpy_state(s2l2a.model)
    assert state.keys() == theirs.keys()
    assert all(state[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_s2l2a_decoding(s2l2a):
    """Other sides and more steps: `test_samplers`, on a small network."""
    tokens, noise = tokens_and_noise(s2l2a.config, 224, 224)
    theirs = decode_theirs(s2l2a.model, tokens, noise, timesteps=10)
    ours = tokenizer.decode(Tokenizer(s2l2a.config), s2l2a.variables, tokens, noise=noise, timesteps=10, sampler="ddim")
    assert 0.01 < np.mean(np.abs(theirs) == 1) < 0.5
    assert peer.relative_error(ours, theirs) <= 1e-3


def test_s2l2a_one_step_of_the_network(s2l2a):
    """Without Winograd's kernels, as on accelerators."""
    tokens, noise = tokens_and_noise(s2l2a.config, 64, 64, seed=1)
    module = Tokenizer(s2l2a.config)
    codes = module.apply({}, tokens, method="codes")
    ours = jax.jit(lambda v: module.apply(v, codes, noise, 459, method="predict"))(s2l2a.variables)
    theirs = s2l2a.model.decoder(peer.nchw(noise), torch.tensor(459), peer.nchw(codes))
    assert peer.relative_error(ours, peer.nhwc(theirs)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "check", "side"),
    [("terramind_v1_tokenizer_lulc", check_encoding, 224), ("terramind_v01_tokenizer_lulc", check_small_encoding, 64)],
)
def test_lulc_encoding_and_decoding(name, check, side):
    """The older one differs in its number of classes alone."""
    config = RELEASED[name]
    model = peer.build(name, seed=2)
    variables = variables_of(model, config)
    check(model, config, variables)
    tokens = tokens_and_noise(config, side, side)[0]
    ours = tokenizer.decode(Tokenizer(config), variables, tokens)
    assert peer.relative_error(ours, peer.nhwc(model.decode_tokens(torch.from_numpy(tokens)))) <= 1e-4


def test_dem_encoding_and_features():
    """Of the reference's backbone, which holds nothing but the encoder."""
    name = "terramind_v1_tokenizer_dem"
    config, model = RELEASED[name], peer.build(name, backbone=True, seed=3)
    variables = variables_of(model, config, ENCODER)
    check_encoding(model, config, variables)
    ours, theirs = image(config, 224, seed=1)
    kinds = ("embedding", "latent", "quantized")
    features = jax.jit(lambda v, x: {kind: Tokenizer(config).apply(v, x, kind, method="features") for kind in kinds})(variables, ours)
    for kind, got in features.items():
        model.return_type = kind
        expected = model(theirs)
        if kind != "embedding":
            expected, got = [expected], [got]
        assert len(got) == len(expected) == (12 if kind == "embedding" else 1)
        assert all(peer.relative_error(x, peer.nhwc(y)) <= 1e-4 for x, y in zip(got, expected, strict=True))


OTHERS = [f"terramind_v1_tokenizer_{m}" for m in ("s1rtc", "s1grd", "ndvi")] + [f"terramind_v01_tokenizer_{m}" for m in ("s2l2a", "s1grd")]


@pytest.mark.parametrize("name", OTHERS)
def test_encoding_of_the_others(name):
    """Of small images: their encoders differ in their channels alone from those that are compared at full size."""
    config, model = RELEASED[name], peer.build(name, seed=len(name))
    del model.decoder
    variables = variables_of(model, config, ENCODER)
    check_small_encoding(model, config, variables)


def test_v01_dem_encoding_and_one_step_of_the_network():
    name = "terramind_v01_tokenizer_dem"
    config, model = RELEASED[name], peer.build(name, seed=3)
    variables, module = variables_of(model, config), Tokenizer(config)
    check_small_encoding(model, config, variables)
    tokens, noise = tokens_and_noise(config, 32, 32)
    codes = module.apply({}, tokens, method="codes")
    ours = jax.jit(lambda v: module.apply(v, codes, noise, 459, method="predict"))(variables)
    assert peer.relative_error(ours, peer.nhwc(model.decoder(peer.nchw(noise), torch.tensor(459), peer.nchw(codes)))) <= 1e-4


# ---- samplers, on a small network ----


@pytest.fixture(scope="module")
def small():
    """A small U-Net of theirs as the decoder of an otherwise empty module, and ours with its weights."""
    model = torch.nn.Module()
    channels = dict(in_channels=2, out_channels=2, cond_channels=5, image_size=64)
    size = dict(patch_size=4, model_channels=32, num_res_blocks=2, attention_resolutions=[2, 4], channel_mult=(1, 2, 2))
    model.decoder = PatchedUNetCondCat(**channels, **size).eval()
    peer.randomize(model, seed=3)
    return SimpleNamespace(model=model, variables=variables_of(model, SMALL, ("decoder/",)))


@pytest.mark.parametrize(
    ("sampler", "timesteps", "spacing", "clip"),
    [
        ("ddim", 10, "trailing", "none"),
        ("ddim", 50, "trailing", "published"),
        ("ddim", 7, "trailing", "published"),
        ("ddim", 7, "leading", "none"),
        ("ddim", 7, "linspace", "published"),
        ("ddpm", 10, "trailing", "published"),
        ("ddpm", 10, "trailing", "none"),
    ],
)
def test_samplers(small, sampler, timesteps, spacing, clip):
    """The reference cannot lift the clip in a registered tokenizer; its schedulers can."""
    tokens, noise = tokens_and_noise(SMALL, 64, 32)
    table = np.random.default_rng(5).normal(size=(1000, *noise.shape)).astype(np.float32)
    module = Tokenizer(SMALL)
    codes = module.apply({}, tokens, method="codes")

    kind = scheduling_ddim.DDIMScheduler if sampler == "ddim" else scheduling_ddpm.DDPMScheduler
    theirs = kind(
        thresholding=clip == "published", clip_sample=False, beta_schedule="linear", prediction_type="sample", zero_terminal_snr=True
    )
    pipeline = diffusion_pipeline.PipelineCond(model=small.model.decoder, scheduler=theirs, n_channels=2)
    steps = iter(diffusion.spaced(timesteps, "leading"))
    with (
        mock.patch.object(diffusion_pipeline.torch, "randn", lambda *args, **kwargs: peer.nchw(noise)),
        mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: peer.nchw(table[next(steps)])),
    ):
        expected = pipeline(peer.nchw(codes), timesteps=timesteps, image_size=(64, 32), verbose=False, scheduler_timesteps_mode=spacing)

    def run(variables):
        return diffusion.sample(
            lambda x, t: module.apply(variables, codes, x, t, method="predict"),
            jnp.asarray(noise),
            diffusion.plan(timesteps, sampler, spacing),
            clip=clip,
            draw=(lambda t: jnp.asarray(table)[t]) if sampler == "ddpm" else None,
        )

    assert peer.relative_error(jax.jit(run)(small.variables), peer.nhwc(expected)) <= 1e-3
