"""The feature extractor beside TerraTorch's: every layer's output, merges, bands, new and tokenised modalities (spec 5)."""

from __future__ import annotations

import dataclasses
import gc
from collections import OrderedDict
from functools import partial

import jax
import numpy as np
import peer
import pytest
import torch
from flax.core import meta
from terratorch.models.utils import TemporalWrapper

from terramind_jax import model, sources, zoo
from terramind_jax.convert import rules
from terramind_jax.modalities import STREAMS, Stream, input_stream
from terramind_jax.model import backbone, temporal

BOUND, LARGE_BOUND = 1e-4, 2e-4
LULC, NDVI, COORDS, CAPTION = (STREAMS[key] for key in ("tok_lulc@224", "tok_ndvi@224", "coords", "caption"))


class Ids(torch.nn.Module):
    """Stands in for a tokenizer: what it is given are ids already, those of images perhaps enlarged to pixels ``[B, 1, H, W]``."""

    def __init__(self, pretrained=False, **options):
        super().__init__()

    def encode(self, x, device):
        x = x[:, 0, ::16, ::16] if x.ndim == 4 else x
        return (x,) if x.ndim == 3 else {"tensor": x}


def tokenizers(*streams):
    return {s.key: Ids for s in streams}


def streams_of(names):
    """User names and ``{name: channels}`` as the reference takes them -> streams."""
    for name in names:
        if isinstance(name, dict):
            yield from (Stream(key, key, "pixels", channels=channels) for key, channels in name.items())
        else:
            yield input_stream(name)


def build(size, names, seed=0, merge_method="mean", options=(), **reference):
    """The reference, and our module with its weights."""
    theirs = peer.build(f"terramind_v1_{size}", modalities=list(names), merge_method=merge_method, seed=seed, **dict(options), **reference)
    sizes = {k: v for k, v in zoo.SIZES[size].items() if k != "decoder_depth"}
    image_size = dict(options).get("img_size", 224)
    config = model.BackboneConfig(**sizes, streams=tuple(streams_of(names)), merge_method=merge_method, image_size=image_size)
    module = model.Backbone(config)
    return theirs, module, convert(theirs, module)


def convert(theirs, module, prefix=""):
    """The reference's weights as variables of `module`, which stands there under `prefix`."""
    state = {key.removeprefix(prefix): x for key, x in peer.numpy_state(theirs).items() if key.startswith(prefix)}
    abstract = meta.unbox(jax.eval_shape(partial(model.init, module), jax.random.key(0)))
    return rules.from_torch(state, sources.rules_of(module), abstract, ignore=["sampler.*", "tokenizer.*"])


def inputs(names, batch=2, size=224, seed=0):
    """Standardised pixels and ids by user name, channels last."""
    rng = np.random.default_rng(seed)
    arrays = OrderedDict()
    for stream, name in zip(streams_of(names), [n if isinstance(n, str) else next(iter(n)) for n in names], strict=True):
        if stream.kind == "pixels":
            arrays[name] = rng.normal(size=(batch, size, size, stream.channels)).astype(np.float32)
        else:
            shape = (batch, 3) if stream.kind == "sequence" else (batch, size // 16, size // 16)
            arrays[name] = rng.integers(0, stream.vocab_size, shape)
    return arrays


def compare(theirs, module, variables, arrays, bound=BOUND):
    """Runs both; every layer's output agrees to `bound` of its standard deviation. Returns the largest error."""
    names = list(arrays)
    given = {name: peer.nchw(x) if x.ndim == 4 else torch.from_numpy(x) for name, x in arrays.items()}
    with torch.no_grad():
        expected = theirs(given)
    streams = {name: stream.key for name, stream in zip(names, streams_of([n if n in KNOWN else {n: 1} for n in names]), strict=True)}
    got = backbone.features(module, variables, {streams[name]: x for name, x in arrays.items()})
    assert len(got) == len(expected) == module.config.encoder_depth
    errors = []
    for ours, reference in zip(got, expected, strict=True):
        if isinstance(reference, dict):
            assert set(ours) == {streams[name] for name in reference}
            errors += [peer.relative_error(ours[streams[name]], x) for name, x in reference.items()]
        else:
            errors.append(peer.relative_error(ours, reference))
    print(f"largest error {max(errors):.1e} of std")
    assert max(errors) <= bound
    return got


KNOWN = ("S2L2A", "S1GRD", "S2L1C", "RGB", "DEM", "LULC", "NDVI", "coords", "caption")


@pytest.mark.parametrize("size", zoo.SIZES)
def test_every_layer_of_every_size(size):
    names = ("S2L2A", "S1GRD")
    theirs, module, variables = build(size, names, seed=len(size))
    for batch, side in ((1, 224), (3, 224), (1, 256), (3, 256)) if size == "tiny" else ((1, 224), (2, 96)):
        compare(theirs, module, variables, inputs(names, batch, side, seed=batch), LARGE_BOUND if size == "large" else BOUND)
    returned = rules.to_torch(jax.device_get(variables), sources.rules_of(module))
    assert all(returned[key].tobytes() == x.tobytes() for key, x in peer.numpy_state(theirs).items())
    peer.load_state(theirs, returned)
    del theirs, variables
    gc.collect()


@pytest.fixture(scope="module")
def four_modalities():
    return build("tiny", ("S2L2A", "S1GRD", "DEM", "coords"), merge_method="concat", tokenizers=tokenizers(COORDS))


def merging(model_pair, merge_method):
    """The same weights under another merge method."""
    theirs, module, variables = model_pair
    theirs.merge_method = merge_method
    return theirs, model.Backbone(dataclasses.replace(module.config, merge_method=merge_method)), variables


@pytest.mark.parametrize("merge_method", ["mean", "max", "concat", "dict", None])
def test_each_merge_method(four_modalities, merge_method):
    theirs, module, variables = merging(four_modalities, merge_method)
    arrays = inputs(("S2L2A", "S1GRD", "DEM", "coords"), size=64)
    compare(theirs, module, variables, arrays)
    compare(theirs, module, variables, OrderedDict(reversed(arrays.items())))  # the caller's order
    got = compare(theirs, module, variables, {"DEM": arrays["DEM"], "S2L2A": arrays["S2L2A"]})  # an image and the coordinates missing
    if merge_method == "concat":
        assert list(module.out_channels) == theirs.out_channels == [x.shape[-1] for x in got]


def test_a_sequence_takes_no_fillers_place(four_modalities):
    """In the reference it does (spec 5.5); what comes before the missing filler is equal."""
    theirs, module, variables = merging(four_modalities, "concat")
    arrays = inputs(("S1GRD", "coords"), size=64)
    with torch.no_grad():
        narrow = theirs({"S1GRD": peer.nchw(arrays["S1GRD"]), "coords": torch.from_numpy(arrays["coords"])})[-1]
    got = np.asarray(backbone.features(module, variables, {input_stream(k).key: v for k, v in arrays.items()})[-1])
    assert narrow.shape[-1] == 2 * 192 and got.shape[-1] == 3 * 192
    assert peer.relative_error(got[..., : 2 * 192], narrow) <= BOUND
    np.testing.assert_array_equal(got[..., 2 * 192 :], np.broadcast_to(variables["params"]["missing_mod_token"], got[..., 2 * 192 :].shape))


def test_new_and_tokenised_modalities():
    names = ("S2L2A", "LULC", {"PLANET": 6}, "coords", "NDVI")
    theirs, module, variables = build("tiny", names, tokenizers=tokenizers(LULC, NDVI, COORDS), seed=5)
    compare(theirs, module, variables, inputs(names))
    compare(theirs, module, variables, inputs(names[1:], size=64))


def test_captions_and_their_padding():
    """The reference reads padding; ours hides it, so that a padded caption is what it is alone (spec 5.4)."""
    theirs, module, variables = build("tiny", ("S2L2A", "caption"), tokenizers=tokenizers(CAPTION), seed=6)
    arrays = inputs(("S2L2A", "caption"), batch=1, size=64)
    alone = compare(theirs, module, variables, arrays)
    padded = np.pad(arrays["caption"], ((0, 0), (0, 5)))
    got = backbone.features(module, variables, {"untok_sen2l2a@224": arrays["S2L2A"], "caption": padded})
    assert max(peer.relative_error(ours, x) for ours, x in zip(got, alone, strict=True)) <= BOUND


def test_sizes_both_ways():
    """Built for 224 and given another size interpolates; built for another size has a grid of its own (spec 5.6)."""
    names = ("S2L2A", "DEM")
    theirs, module, variables = build("tiny", names, merge_method=None)
    interpolated = compare(theirs, module, variables, inputs(names, size=96))
    theirs, module, variables = build("tiny", names, merge_method=None, options={"img_size": 96})
    own = compare(theirs, module, variables, inputs(names, size=96))
    assert np.abs(np.asarray(own[0]) - np.asarray(interpolated[0])).max() > 0.1
    compare(theirs, module, variables, inputs(names, size=64))


def test_a_new_modality_of_another_patch_size():
    theirs = peer.build("terramind_v1_tiny", modalities={"PLANET": 3}, patch_size=8, img_size=64)
    sizes = {k: v for k, v in zoo.SIZES["tiny"].items() if k != "decoder_depth"}
    config = model.BackboneConfig(**sizes, streams=(Stream("PLANET", "PLANET", "pixels", channels=3),), patch_size=8, image_size=64)
    module = model.Backbone(config)
    compare(theirs, module, convert(theirs, module), inputs([{"PLANET": 3}], size=64))


def test_band_subset():
    wanted = {"S2L2A": ["RED", "GREEN", "NIR_NARROW", "RED"], "S1GRD": ["VH"]}
    names = ("S2L2A", "S1GRD")
    theirs, module, variables = build("tiny", names)
    register = peer.register
    register.select_modality_patch_embed_weights(theirs, wanted, register.PRETRAINED_BANDS)
    bands = {input_stream(name).key: value for name, value in wanted.items()}
    config, variables = backbone.with_bands(module.config, bands), backbone.select_bands(variables, bands, jax.random.key(0))
    arrays = {name: x[..., : len(wanted[name])] for name, x in inputs(names, size=64).items()}
    compare(theirs, model.Backbone(config), variables, arrays)


def test_an_unknown_band_leaves_the_others_as_the_reference_does():
    theirs, module, variables = build("tiny", ("S2L2A",))
    register = peer.register
    register.select_modality_patch_embed_weights(theirs, {"S2L2A": ["MINE", "BLUE"]}, register.PRETRAINED_BANDS)
    expected = theirs.encoder_embeddings[input_stream("S2L2A").key].proj.weight.detach().numpy().T.reshape(256, 2, -1)
    bands = {"untok_sen2l2a@224": ["MINE", "BLUE"]}
    variables = backbone.select_bands(variables, bands, jax.random.key(0))
    got = np.asarray(variables["params"]["patch_proj"]["untok_sen2l2a@224"]).reshape(256, 2, -1)
    np.testing.assert_array_equal(got[:, 1], expected[:, 1])
    assert np.abs(got[:, 0]).max() <= 512**-0.5 and got[:, 0].std() == pytest.approx(expected[:, 0].std(), rel=0.02)


@pytest.mark.parametrize("pooling", ["keep", "concat", "mean", "max", "diff"])
def test_time_series(four_modalities, pooling):
    """TerraTorch's wrapper takes ``[B, C, T, H, W]``."""
    theirs, module, variables = merging(four_modalities, "dict")
    names = ("S1GRD", "DEM")
    steps = [inputs(names, size=64, seed=i) for i in range(3)]
    series = OrderedDict((name, np.stack([step[name] for step in steps], axis=1)) for name in names)
    lengths = [1, 2] if pooling == "diff" else None
    wrapper = TemporalWrapper(theirs, pooling=pooling, subset_lengths=lengths)
    with torch.no_grad():
        expected = wrapper({name: torch.from_numpy(np.moveaxis(x, -1, 1)) for name, x in series.items()})
    encode = partial(backbone.features, module, variables)
    got = temporal.over_time(encode, {input_stream(k).key: x for k, x in series.items()}, pooling, subset_lengths=lengths)
    for ours, reference in zip(got, expected, strict=True):
        assert max(peer.relative_error(ours[input_stream(name).key], reference[name]) for name in names) <= BOUND
