"""Decoders and heads against TerraTorch's (spec 5.7)."""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from terratorch.models import heads
    from terratorch.models.decoders import fcn_decoder, identity_decoder, linear_decoder, unet_decoder, upernet_decoder
    from terratorch.models.necks import LearnedInterpolateToPyramidal, ReshapeTokensToImage, SelectIndices

from terramind_jax.convert import rules
from terramind_jax.tasks import convert as table
from terramind_jax.tasks import decoders, layers
from terramind_jax.tasks.decoders import DecoderConfig

DIM, GRID, DEPTH = 32, 6, 12
CONFIGS = {
    "unet": DecoderConfig("segmentation", 5, channels=(16, 16, 8, 8), head_channels=(12, 6)),
    "unet without pyramid": DecoderConfig("regression", 1, channels=(16, 16, 8, 8), pyramid=False),
    "upernet": DecoderConfig("regression", 2, decoder="upernet", channels=(16,), head_channels=(8, 6)),
    "upernet of PANGAEA": DecoderConfig("regression", 2, pyramid=False, decoder="upernet_pangaea", channels=(16,)),
    "fcn": DecoderConfig("segmentation", 3, layers=(11,), pyramid=False, decoder="fcn", channels=(16,), num_convs=2),
    "linear": DecoderConfig("regression", 2, layers=(11,), pyramid=False, decoder="linear", upsampling=4),
    "labels": DecoderConfig("classification", 7, layers=(11,), pyramid=False, decoder="identity", head_channels=(12,)),
    "pooled": DecoderConfig("scalar_regression", 1, layers=(11,), pyramid=False, decoder="identity", linear_after_pool=True),
}


class Theirs(torch.nn.Module):
    """What TerraTorch's models hold beside the encoder, under the same names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        necks = [SelectIndices([DIM] * DEPTH, list(config.layers)), ReshapeTokensToImage([DIM], remove_cls_token=False)]
        widths = [DIM] * len(config.layers)
        if config.pyramid:
            necks.append(LearnedInterpolateToPyramidal(widths))
            widths = necks[-1].process_channel_list(widths)
        self.neck, self.decoder = torch.nn.Sequential(*necks), self._decoder(config, widths)
        hidden, width = list(config.head_channels) or None, self.decoder.out_channels
        self.head = torch.nn.Identity()
        if config.task == "segmentation" and not config.includes_head:
            self.head = heads.SegmentationHead(width, config.num_outputs, hidden)
        elif config.task == "regression" and not config.includes_head:
            self.head = heads.RegressionHead(width, config.num_outputs, channel_list=hidden)
        elif not config.includes_head:
            self.head = heads.ScalarHead(width, config.num_outputs, dim_list=hidden, linear_after_pool=config.linear_after_pool)

    @staticmethod
    def _decoder(config: DecoderConfig, widths: list[int]) -> torch.nn.Module:
        match config.decoder:
            case "unet":
                return unet_decoder.UNetDecoder(widths, list(config.widths))
            case "upernet" | "upernet_pangaea":
                return upernet_decoder.UperNetDecoder(widths, config.pool_scales, config.widths[0], align_corners=not config.is_pangaea)
            case "fcn":
                return fcn_decoder.FCNDecoder(widths, config.widths[0], config.num_convs)
            case "linear":
                return linear_decoder.LinearDecoder(widths, config.num_outputs, config.upsampling)
        return identity_decoder.IdentityDecoder(widths)

    def forward(self, features):
        return self.head(self.decoder(self.neck(features)))


class Ours(decoders.nn.Module):
    config: DecoderConfig

    @decoders.nn.compact
    def __call__(self, features, train=False):
        c = self.config
        x = [decoders.to_image(features[i], (GRID, GRID)) for i in c.layers]
        x = decoders.Pyramid(name="neck")(x, train) if c.pyramid else x
        x = decoders.decoder(c, name="decoder")(x, train)
        return x if c.includes_head else decoders.head(c, name="head")(x, train)


def randomize_statistics(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, x in model.named_buffers():
        if name.endswith("running_mean"):
            x.uniform_(-0.3, 0.3, generator=generator)
        elif name.endswith("running_var"):
            x.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("num_batches_tracked"):
            x.fill_(7)


def build(name: str) -> SimpleNamespace:
    config = CONFIGS[name]
    theirs, ours = Theirs(config), Ours(config)
    peer.randomize(theirs, seed=1)
    randomize_statistics(theirs)
    features = [np.random.default_rng(i).normal(size=(3, GRID * GRID, DIM)).astype(np.float32) for i in range(DEPTH)]
    abstract = jax.eval_shape(lambda: ours.init(jax.random.key(0), features))
    state = {key: value.copy() for key, value in peer.numpy_state(theirs).items()}
    variables = rules.from_torch(dict(state), table.rules(config), abstract)
    del variables["buffers"]
    return SimpleNamespace(config=config, theirs=theirs, ours=ours, features=features, variables=variables, state=state)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return peer.nhwc(x) if x.ndim == 4 else peer.array(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders_and_their_weights(name):
    """Strictly there and back, integers included; the same outputs, in training with the batch's statistics, and the same running ones."""
    pair = build(name)
    back = rules.to_torch(pair.variables, table.rules(pair.config))
    assert back.keys() == pair.state.keys()
    for key, value in pair.state.items():
        np.testing.assert_array_equal(back[key], value)
        assert back[key].dtype == value.dtype
    tensors = [torch.from_numpy(x) for x in pair.features]
    with torch.no_grad():
        theirs = channels_last(pair.theirs.eval()(tensors))
        assert peer.relative_error(jax.jit(pair.ours.apply)(pair.variables, pair.features), theirs) < 1e-5
        theirs = channels_last(pair.theirs.train()(tensors))
    train = jax.jit(lambda v, x: pair.ours.apply(v, x, train=True, mutable=[layers.STATISTICS]))
    ours, changed = train(pair.variables, pair.features)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    assert peer.relative_error(ours, theirs) < 5e-5  # of single pixels: the coarsest statistics are of 3 values
    after = rules.to_torch({**pair.variables, **jax.device_get(changed)}, table.rules(pair.config))
    for key, value in peer.numpy_state(pair.theirs).items():
        np.testing.assert_allclose(after[key], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["upernet"])
def test_gradients_through_a_decoder(name):
    pair = build(name)
    tensors = [torch.from_numpy(x).requires_grad_() for x in pair.features]
    output = pair.theirs.train()(tensors)
    weights = np.random.default_rng(9).normal(size=channels_last(output).shape).astype(np.float32)
    (output * peer.nchw(weights)).mean().backward()

    def loss(params, features):
        out, _ = pair.ours.apply({**pair.variables, "params": params}, features, train=True, mutable=[layers.STATISTICS])
        return (out * weights).mean()

    ours, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(pair.variables["params"], pair.features)
    ours = rules.to_torch({**pair.variables, "params": ours}, table.rules(pair.config))
    largest = max(np.abs(p.grad).max() for p in pair.theirs.parameters())
    for key, parameter in pair.theirs.named_parameters():
        np.testing.assert_allclose(ours[key], parameter.grad.numpy(), rtol=1e-4, atol=1e-5 * float(largest), err_msg=key)
    for i in pair.config.layers:
        theirs = tensors[i].grad.numpy()
        np.testing.assert_allclose(of_features[i], theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("size", [(9, 7), (12, 12), (5, 17), (1, 1)])
def test_resizing(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype(np.float32)
    interpolate = torch.nn.functional.interpolate
    for corners in (True, False):
        theirs = peer.nhwc(interpolate(peer.nchw(x), size, mode="bilinear", align_corners=corners))
        np.testing.assert_allclose(layers.resize(jnp.asarray(x), size, corners), theirs, atol=1e-6)
    np.testing.assert_array_equal(layers.nearest(jnp.asarray(x), size), peer.nhwc(interpolate(peer.nchw(x), size)))
    theirs = peer.nhwc(torch.nn.functional.adaptive_avg_pool2d(peer.nchw(x), size[0]))
    np.testing.assert_allclose(layers.adaptive_mean(jnp.asarray(x), size[0]), theirs, atol=1e-6)


def test_sizes_of_fresh_weights():
    """Means and spreads of our initialisation are those of theirs."""
    for name, widths in (("unet", (32, 32, 16, 8)), ("upernet", (32,)), ("fcn", (32,))):
        config = dataclasses.replace(CONFIGS[name], channels=widths)
        torch.manual_seed(0)
        theirs = {key: value.numpy() for key, value in Theirs(config).state_dict().items()}
        features = [np.zeros((1, GRID * GRID, DIM), np.float32)] * DEPTH
        init = jax.jit(Ours(config).init, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
        ours = rules.to_torch(init(jax.random.key(0), features), table.rules(config))
        for key, value in theirs.items():
            if value.size > 500:
                assert ours[key].std() == pytest.approx(value.std(), rel=0.1), key
            elif "norm" in key or "running" in key:
                np.testing.assert_array_equal(ours[key], value)
