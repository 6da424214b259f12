"""Thinking in Modalities beside TerraTorch's, at temperature 0 and in one step (spec 8.6)."""

from __future__ import annotations

import dataclasses

import numpy as np
import peer
import pytest
import torch
from test_backbone import COORDS, convert, inputs, tokenizers

from terramind_jax import model, tim, zoo
from terramind_jax.modalities import input_stream, output_stream

BOUND = 1e-3
NAMES = ("S2L2A", "S1GRD")


def build(size, names, targets, seed=0, **options):
    """The reference with its weights in our backbone and our generator."""
    replaced = tokenizers(*(output_stream(t) for t in targets), COORDS)
    theirs = peer.build(
        f"terramind_v1_{size}_tim",
        modalities=list(names),
        tim_modalities=list(targets),
        tim_temps=0.0,
        tokenizers=replaced,
        seed=seed,
        **options,
    )
    for block in theirs.sampler.model.decoder:  # sharper, or every place would read the same average and become the same token
        block.cross_attn.q.weight.data *= 6
        block.cross_attn.proj.weight.data *= 2
    sizes = {k: v for k, v in zoo.SIZES[size].items() if k != "decoder_depth"}
    read, made = tuple(map(input_stream, names)), tuple(map(output_stream, targets))
    streams = tuple({s.key: s for s in (*read, *made)}.values())
    config = model.BackboneConfig(**sizes, streams=streams, merge_method=options.get("merge_method", "mean"))
    seen = streams if options.get("tim_chained_generations", True) else read
    generator = tim.generator(dataclasses.replace(config, streams=seen), made, zoo.SIZES[size]["decoder_depth"])
    return theirs, (
        model.Backbone(config),
        convert(theirs, model.Backbone(config)),
        generator,
        convert(theirs, generator, "sampler.model."),
    )


def theirs_of(x):
    """Pixels, ids of images as pixels of the size that the reference expects, or ids of sequences."""
    if x.ndim == 2:
        return torch.from_numpy(x)
    return peer.nchw(x if x.ndim == 4 else x.repeat(16, axis=1).repeat(16, axis=2)[..., None])


def compare(theirs, ours, arrays, targets, **options):
    """Tokens and every layer's features agree."""
    given = {name: theirs_of(x) for name, x in arrays.items()}
    with torch.no_grad():
        expected = theirs(given)  # adds what it generates to its argument
    streams = {input_stream(name).key: x for name, x in arrays.items()}
    keys = [output_stream(name).key for name in targets]
    thought = tim.think(*ours[2:], streams, keys, seed=0, temperature=0.0, **options)
    assert list(thought) == [*streams, *(key for key in keys if key not in streams)]
    for name, key in zip(targets, keys, strict=True):
        np.testing.assert_array_equal(np.asarray(thought[key]).reshape(len(thought[key]), -1), given[name].reshape(len(given[name]), -1))
    got = tim.features(*ours, streams, keys, seed=0, temperature=0.0, **options)
    errors = []
    for layer, reference in zip(got, expected, strict=True):
        if isinstance(reference, dict):
            assert set(layer) == {input_stream(name).key for name in reference}
            errors += [peer.relative_error(layer[input_stream(name).key], x) for name, x in reference.items()]
        else:
            errors.append(peer.relative_error(layer, reference))
    print(f"largest error {max(errors):.1e} of std")
    assert max(errors) <= BOUND
    return thought


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_lulc(size):
    theirs, ours = build(size, NAMES, ("LULC",), seed=3)
    tokens = compare(theirs, ours, inputs(NAMES), ("LULC",))["tok_lulc@224"]
    assert len(np.unique(tokens)) > 3 and (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize("chained", [True, False])
def test_lulc_and_dem(chained):
    theirs, ours = build("tiny", NAMES, ("LULC", "DEM"), seed=1, tim_chained_generations=chained)
    first = compare(theirs, ours, inputs(NAMES, size=224 if chained else 64), ("LULC", "DEM"), chained=chained)
    if chained:
        arrays, targets = {k: first[k] for k in list(first)[:2]}, list(first)[2:]
        apart = tim.think(*ours[2:], arrays, targets, seed=0, temperature=0.0, chained=False)
        assert (first["tok_dem@224"] != apart["tok_dem@224"]).any()


@pytest.mark.parametrize("merge_method", ["concat", "dict"])
def test_merges(merge_method):
    theirs, ours = build("tiny", NAMES, ("LULC", "NDVI"), seed=2, merge_method=merge_method)
    compare(theirs, ours, inputs(NAMES, size=64), ("LULC", "NDVI"))


def test_images_of_another_size_and_coordinates():
    names = ("S2L2A", "coords")
    theirs, ours = build("tiny", names, ("LULC", "NDVI"), seed=4)
    arrays = inputs(names, size=256)
    arrays["coords"] = np.array([[4204, 6000, 3], [4500, 5000, 3]])  # latitude, longitude, end
    compare(theirs, ours, arrays, ("LULC", "NDVI"))


def test_a_target_that_is_an_input_is_skipped():
    names = ("S2L2A", "LULC")
    theirs, ours = build("tiny", names, ("LULC", "NDVI"), seed=5)
    compare(theirs, ours, inputs(names, size=64), ("LULC", "NDVI"))


def test_the_reference_fails_where_we_do_not():
    """If one of these passes some day, `terramind_jax.tim` should say so."""
    theirs, ours = build("tiny", NAMES, ("LULC",), tim_decoding_steps=4)
    arrays = inputs(NAMES, batch=1, size=64)
    with pytest.raises(RuntimeError), torch.no_grad():
        theirs({name: peer.nchw(x) for name, x in arrays.items()})
    streams = {input_stream(name).key: x for name, x in arrays.items()}
    assert tim.think(*ours[2:], streams, ["tok_lulc@224"], seed=0, steps=4)["tok_lulc@224"].shape == (1, 4, 4)
    theirs, _ = build("tiny", NAMES, ("LULC", "DEM"), modality_drop_rate=0.5)
    with pytest.raises(ValueError), torch.no_grad():
        theirs.train()({name: peer.nchw(x) for name, x in arrays.items()})
