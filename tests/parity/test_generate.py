"""Generated tokens against TerraTorch's: temperature 0, one step a modality, chained (spec 8.3-8.5).

Both sides take argmaxes, which rounding can turn over. So every output is compared twice: given the reference's tokens of those before
it, and given our own.
"""

from __future__ import annotations

import dataclasses
import warnings
from unittest import mock

import numpy as np
import peer
import pytest
import torch
from peer import register
from terratorch.models.backbones.terramind.tokenizer.scheduling import diffusion_pipeline

import terramind_jax as tm
from terramind_jax import coordinates, decoding, modalities, sampling
from terramind_jax.convert import files
from terramind_jax.modalities import input_stream, output_stream

CASES = [  # inputs, outputs, side in pixels; all models are built for 224
    (("S2L2A",), ("S1GRD", "LULC", "DEM", "NDVI", "coords"), 224),
    (("S2L2A", "LULC", "coords"), ("S1GRD", "NDVI"), 224),
    (("S1GRD", "DEM"), ("coords", "S2L2A"), 224),  # a sequence that conditions an image
    (("LULC",), ("S1RTC",), 224),
    (("S2L2A", "LULC"), ("DEM", "coords", "NDVI"), 256),
    (("S1GRD",), ("S2L2A", "LULC"), 112),
    (("S2L2A", "caption"), ("LULC",), 112),
    (("S2L2A",), ("caption", "LULC"), 112),
]
BATCH = 2
CAPTION_TOKENS = 32  # of 256, to save time: the reference computes every step from the first token on


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """What the reference is given for tokenizers: tokens pass as they are, sequences through vocabulary files."""
    streams = [s.key for s in modalities.DECODER_STREAMS if s.kind == "tokens"]
    folder = tmp_path_factory.mktemp("vocabularies")
    sequences = {"coords": peer.coords_tokenizer(folder / "coords.json"), "caption": peer.caption_tokenizer(folder / "caption.json")}
    return dict.fromkeys(streams, peer.PassTokens) | sequences


def make(inputs, outputs, tokenizers, seed: int = 0, **options):
    """The reference's generator, and our module and variables of the transformer in it."""
    model = peer.build(
        "terramind_v1_tiny_generate",
        modalities=list(inputs),
        output_modalities=list(outputs),
        tokenizers=tokenizers,
        temps=0.0,
        seed=seed,
        **options,
    )
    if "caption" in outputs:
        model.decoder_embeddings["caption"].max_length = CAPTION_TOKENS
    tell_apart(model, draw(inputs, seed)[0])
    read = [*map(input_stream, inputs), *map(output_stream, outputs[:-1])]
    encoder, decoder = (tuple(dict.fromkeys(map(shorten, streams))) for streams in (read, map(output_stream, outputs)))
    return model, *peer.converted(model, "tiny", encoder, decoder, prefix="sampler.model.")[:2]


def shorten(stream):
    return dataclasses.replace(stream, max_tokens=CAPTION_TOKENS) if stream.key == "caption" else stream


@torch.no_grad()
def tell_apart(model, inputs) -> None:
    """Makes random weights write different tokens in different places: input tokens weigh more, and what all outputs share is taken off.

    Sharper attention would do so, too, but then PyTorch in float32 and in float64 write different tokens as well.
    """
    for name, parameter in model.named_parameters():
        if "encoder_embeddings" in name and name.endswith("token_emb.weight"):
            parameter.mul_(10)
    norm, seen = model.sampler.model.decoder_norm, []
    hook = norm.register_forward_hook(lambda module, x, y: seen.append(y.flatten(0, 1)))
    reference_tokens(model, inputs)
    hook.remove()
    norm.bias -= torch.cat(seen).mean(0)


def draw(inputs, seed: int = 0, side: int = 224) -> tuple[dict, dict]:
    """The same inputs for the reference, by user name, and for ours, by stream."""
    rng = np.random.default_rng(seed)
    theirs, ours = {}, {}
    for name in inputs:
        stream = input_stream(name)
        if stream.kind == "pixels":
            ours[stream.key] = rng.standard_normal((BATCH, side, side, stream.channels), np.float32)
            theirs[name] = peer.nchw(ours[stream.key])
        elif stream.kind == "tokens":
            ours[stream.key] = rng.integers(0, stream.vocab_size, (BATCH, side // 16, side // 16))
            theirs[name] = torch.from_numpy(ours[stream.key]).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
        elif name == "caption":  # of one length: the reference pads before the end (`terramind_jax.captions`)
            theirs[name] = ["a river with field", "the sea and city"]
            ours[stream.key] = np.array([[*map(peer.WORDS.get, text.split()), decoding.START, coordinates.EOS] for text in theirs[name]])
        else:
            lonlat = rng.uniform([-180, -90], [180, 90], (BATCH, 2)).astype(np.float32)
            ours[stream.key], theirs[name] = coordinates.encode(lonlat), torch.from_numpy(lonlat)
    return theirs, ours


def reference_tokens(model, inputs) -> dict[str, np.ndarray]:
    """What the reference's sampler wrote, by stream; sequences right-padded with 0."""
    kept = {}

    def record(*args, **kwargs):
        kept.update(sample(*args, **kwargs))
        return kept

    sample = model.sampler.generate
    with mock.patch.object(model.sampler, "generate", record), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of coordinates: random weights write ids that are none
        model(dict(inputs))
    return {key: kept[key]["tensor"].numpy() for key in model.output_modalities}


@pytest.mark.parametrize("inputs, outputs, side", CASES, ids=lambda x: "+".join(x) if isinstance(x, tuple) else str(x))
def test_tokens(inputs, outputs, side, tokenizers):
    model, module, variables = make(inputs, outputs, tokenizers)
    given, known = draw(inputs, side=side)
    theirs = reference_tokens(model, given)
    targets = list(theirs)
    chain = written(module, variables, known, targets)
    for i, (key, expected) in enumerate(theirs.items()):
        ours = written(module, variables, known, targets[i:])[key]  # with the others: a sequence to come is seen as its start
        assert equal(ours, expected) >= 0.995, f"{key}, given the reference's tokens of what precedes it"
        assert equal(chain[key], expected) >= 0.99, f"{key}, given our own tokens"
        if key in ("coords", "caption"):
            known[key] = expected
        else:
            assert len(np.unique(expected)) >= 10, f"these weights write few different tokens of {key}"
            known[key] = expected.reshape(BATCH, side // 16, side // 16)


def written(module, variables, known, targets) -> dict[str, np.ndarray]:
    """Our tokens ``[B, n]`` of `targets`, each given `known` and those before it."""
    tokens = decoding.generate_tokens(module, variables, known, targets, seed=0, temperature=0.0)
    return {key: np.asarray(ids).reshape(BATCH, -1) for key, ids in tokens.items()}


def equal(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of equal tokens; the reference's sequences end with the longest of the batch."""
    share = float((ours[:, : theirs.shape[1]] == theirs).mean())
    print(f"{share:.2%} of tokens equal")
    return share


@torch.no_grad()
def test_pixels_by_name(tmp_path):
    """The public way from a file of the reference's to pixels in physical units: two diffusion steps, an offset, then LULC given that."""
    name, options = "terramind_v1_tiny_generate", dict(modalities=["S2L2A"], output_modalities=["DEM", "LULC"], standardize=True, temps=0.0)
    options |= dict(timesteps=2, offset={"S2L2A": 1000.0, "DEM": 100.0})
    with mock.patch.dict(register.v1_pretraining_mean):  # the reference adds offsets to it in place
        model = peer.build(name, seed=0, **options)
    files.write(tmp_path / "theirs.safetensors", peer.numpy_state(model))
    rng = np.random.default_rng(0)
    x = modalities.destandardize("S2L2A", rng.standard_normal((1, 64, 64, 12), np.float32), offset=1000.0)
    noise = rng.standard_normal((1, 64, 64, 1), np.float32)
    with mock.patch.object(diffusion_pipeline.torch, "randn", lambda *args, **kwargs: peer.nchw(noise)):
        theirs = model({"S2L2A": peer.nchw(x)})
    ours = tm.load(name, tmp_path / "theirs.safetensors", **options).generate({"S2L2A": x}, noise={"DEM": noise}, sampler="ddim")
    assert list(ours) == list(theirs)
    for key, made in ours.items():
        assert peer.relative_error(made, peer.nhwc(theirs[key])) <= 1e-3, key


def test_the_reference_fails_with_several_steps(tokenizers):
    """It decodes all tokens in the first and has none left for the second (spec 8.5); `generate` follows the schedule instead."""
    model = peer.build(
        "terramind_v1_tiny_generate", modalities=["LULC"], output_modalities=["DEM"], tokenizers=tokenizers, decoding_steps=2
    )
    with pytest.raises(RuntimeError, match="reshape"):
        model(draw(("LULC",))[0])


# ---- sampling ----


@pytest.mark.parametrize("top_k, top_p", [(0, 0.8), (50, 0.0), (0.01, 0.0), (200, 0.5), (0, 0.999)])
def test_filters_keep_the_same_tokens(top_k, top_p):
    from terratorch.models.backbones.terramind.model.generate import GenerationSampler

    logits = 3 * np.random.default_rng(0).standard_normal((40, 4375)).astype(np.float32)
    theirs = GenerationSampler(torch.nn.Identity()).top_k_top_p_filtering(torch.from_numpy(logits.copy()), top_k, top_p).numpy()
    ours = np.asarray(sampling.filter_logits(logits, top_k, top_p))
    differing = (np.isfinite(ours) != np.isfinite(theirs)).sum(-1)
    assert differing.max() <= 1 and differing.mean() < 0.1  # where a cumulative sum meets top_p within rounding


@pytest.mark.parametrize("steps, tokens", [(1, 196), (8, 196), (10, 196), (12, 256), (300, 196)])
def test_schedules(steps, tokens):
    from terratorch.models.backbones.terramind.model import generate as reference

    linear = reference.linear_schedule(steps, tokens)
    assert sampling.token_schedule("linear", steps, tokens) == tuple(linear)
    cosine = reference.cosine_schedule(steps, tokens)
    assert sampling.token_schedule("cosine", steps, tokens) == tuple(n for n in cosine if n) or steps > tokens
    theirs = reference.linear_temp_schedule(1.5, linear)
    np.testing.assert_allclose(sampling.temperature_schedule("linear", 1.5, tuple(linear)), theirs, rtol=1e-6, atol=1e-9)
