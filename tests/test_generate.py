"""Generation between arrays in physical units (spec 8.5)."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks

from terramind_jax import coordinates, decoding, draws, generate, modalities, sampling, tokenizer
from terramind_jax.modalities import STREAMS

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def system():
    names = ("untok_dem@224", "tok_lulc@224", "tok_ndvi@224", "coords")
    streams = tuple(STREAMS[name] for name in names)
    tokenizers = {}
    for name in ("DEM", "LULC", "NDVI"):
        facts = modalities.get(name)
        config = tokenizer.TokenizerConfig(name, facts.channels, facts.levels, dim=16, depth=1, num_heads=2, image_size=48)
        module = tokenizer.Tokenizer(config)
        tokenizers[name] = module, random_networks.random_variables(tokenizer.init, module, scale=0.6)
    return *random_networks.build(streams, (*streams[1:], STREAMS["tok_dem@224"])), tokenizers


def scene(batch=2):
    rng = np.random.default_rng(0)
    return {"DEM": rng.integers(0, 3000, (batch, 48, 48, 1)).astype(np.int16)}


def test_generates_every_modality_in_its_unit(system):
    result = generate.generate(*system, scene(), ["NDVI", "LULC", "coords"], seed=0, temperature=0)
    assert {name: x.shape for name, x in result.items()} == {"NDVI": (2, 48, 48, 1), "LULC": (2, 48, 48, 10), "coords": (2, 2)}
    inputs = {"DEM": modalities.standardize("DEM", scene()["DEM"])}
    standardized = generate.generate(*system, inputs, ["NDVI", "LULC", "coords"], seed=0, temperature=0, standardize=False)
    np.testing.assert_allclose(modalities.destandardize("NDVI", standardized["NDVI"]), result["NDVI"], rtol=1e-5)


def test_several_draws_give_the_spread_of_each_pixel(system):
    names, seeds = ["NDVI", "LULC", "coords"], np.array([4, 5])
    made = generate.generate_draws(*system, scene(), names, seed=seeds, num_samples=3)
    ndvi, lulc = made["NDVI"], made["LULC"]
    for k, one in enumerate(sampling.draw_seeds(seeds, 3)):
        alone = generate.generate(*system, scene(), names, seed=one)
        np.testing.assert_array_equal(ndvi.values[k], alone["NDVI"])
        np.testing.assert_array_equal(made["coords"][k], alone["coords"])
    assert ndvi.mean.shape == ndvi.std.shape == (2, 48, 48, 1) and ndvi.std.max() > 0
    low, middle, high = ndvi.quantiles([0, 0.5, 1])
    np.testing.assert_array_equal((low, high), (ndvi.values.min(0), ndvi.values.max(0)))
    np.testing.assert_array_equal(middle, ndvi.quantiles(0.5))
    assert lulc.probabilities.shape == (2, 48, 48, 10) and lulc.entropy.shape == (2, 48, 48)
    np.testing.assert_allclose(lulc.probabilities.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(draws.ClassDraws(np.zeros((2, 1, 1, 1, 10))).entropy, np.log(10))
    assert (lulc.entropy > 0).all() and lulc.entropy.max() <= np.log(10) + 1e-6


@pytest.mark.parametrize("at_once", [3, 8])  # images: of two a draw one draw and four, of one a draw three and all five
def test_draws_are_those_that_are_made_one_by_one(system, monkeypatch, at_once):
    def drawn(together, inputs, **options):
        monkeypatch.setattr(generate, "_together", lambda: together)
        made = generate.generate_draws(*system, inputs, ["LULC", "NDVI", "coords"], num_samples=5, **options)
        return {name: getattr(x, "values", x) for name, x in made.items()}

    inputs, visible = scene(), {"DEM": np.arange(18).reshape(2, 3, 3) % 4 > 0}
    two = dict(inputs=inputs, seed=np.array([4, 5]), visible=visible, known_tokens={"LULC": np.arange(18).reshape(2, 3, 3)})
    for call in (two, dict(inputs={"DEM": inputs["DEM"][:1]}, seed=7, at=[[2, 3]])):
        one_by_one, several = drawn(1, **call), drawn(at_once, **call)
        assert one_by_one.keys() == several.keys()
        for name, x in one_by_one.items():
            np.testing.assert_allclose(several[name], x, atol=1e-4)
    with pytest.raises(ValueError, match=r"The seed has shape \(3,\); expected one integer or \[2\]"):
        drawn(at_once, inputs, seed=np.arange(3))


def test_batches_are_filled_up_on_accelerators_and_results_are_of_the_batch_alone(system, monkeypatch):
    inputs = {name: np.concatenate([x, x[:1]]) for name, x in scene().items()}  # three samples
    inputs["coords"] = tuple((x, 40.0) for x in (2.5, 10.0, 20.0))
    call = dict(seed=np.array([4, 5, 6]), visible={"DEM": np.arange(27).reshape(3, 3, 3) % 4 > 0}, at=np.array([[0, 0], [2, 3], [1, 1]]))
    for make in (generate.generate, generate.output_tokens):
        seen = []

        def counted(*arguments, make=make, seen=seen, **options):
            seen.append((len(arguments[3]["coords"]), np.size(options["seed"])))
            return make(*arguments, **options)

        options = call if make is generate.generate else {"seed": call["seed"], "visible": call["visible"]}
        expected = generate.in_buckets(counted, *system, inputs, ["LULC", "NDVI"], **options)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            found = generate.in_buckets(counted, *system, inputs, ["LULC", "NDVI"], **options)
        assert seen == [(3, 3), (4, 4)]
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, atol=1e-4)
    assert [generate._bucket(n) for n in (1, 3, 8, 9, 16, 17, 33)] == [1, 4, 8, 16, 16, 32, 48]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"The seed has shape \(2,\); expected one integer or \[3\]"):
        patch.setattr(jax, "default_backend", lambda: "gpu")
        generate.in_buckets(generate.generate, *system, inputs, ["LULC"], seed=np.arange(2))


def test_draws_encode_their_inputs_once_and_hold_what_was_made(system, monkeypatch):
    calls, encode = [], generate.encode_input
    monkeypatch.setattr(
        generate, "encode_input", lambda stream, *args, **options: calls.append(stream.key) or encode(stream, *args, **options)
    )
    inputs, names = scene() | {"LULC": np.zeros((2, 48, 48), int)}, ["NDVI", "coords"]
    one = generate.generate_draws(*system, inputs, names, seed=4, num_samples=2, only="NDVI")
    assert calls == ["untok_dem@224", "tok_lulc@224"] and [*one] == ["NDVI"]
    known = {"known_tokens": {"NDVI": np.zeros((2, 3, 3), int)}}
    assert [*generate.generate_draws(*system, inputs, names, seed=4, num_samples=2, **known)] == ["coords"]
    with pytest.raises(ValueError, match="This model makes no S1GRD"):
        generate.generate_draws(*system, inputs, ["S1GRD"], seed=4, num_samples=2)


def test_images_of_another_size_return_at_that_size(system):
    dem = np.tile(scene()["DEM"], (1, 2, 2, 1))[:, :80, :80]
    lulc = np.random.default_rng(3).integers(0, 10, (2, 80, 80))
    result = generate.generate(*system, {"DEM": dem, "LULC": lulc}, ["NDVI", "coords"], seed=0)
    assert result["NDVI"].shape == (2, 80, 80, 1) and result["coords"].shape == (2, 2)
    with pytest.raises(ValueError, match="must be of one size; theirs are DEM 48x48, LULC 80x80 pixels"):
        generate.generate(*system, scene() | {"LULC": lulc}, ["NDVI"], seed=0)


def test_diffusion_decoders_take_seeds_and_timesteps(system, monkeypatch):
    """Each sample's noise follows its own seed, as its tokens do."""
    calls = []
    monkeypatch.setattr(generate, "decode", lambda module, variables, tokens, **options: calls.append(options) or np.zeros((2, 48, 48, 1)))
    generate.generate(*system, scene(), ["NDVI"], seed=np.array([4, 5]), temperature=0)
    generate.generate(*system, scene(), ["NDVI"], seed=6, timesteps=3, sampler="ddim", clip="none", temperature=0)
    assert calls[0]["seed"].tolist() == [4, 5] and calls[0]["timesteps"] is None
    assert (calls[0]["sampler"], calls[0]["clip"]) == ("dpmpp", "published")
    assert calls[1] == {"seed": 6, "timesteps": 3, "sampler": "ddim", "clip": "none", "noise": None, "at": None}


def test_a_sample_follows_its_own_seed_alone(system):
    """Whatever the others of its batch are, where it lies among them, and on how many devices; with a diffusion decoder."""
    module, variables, tokenizers = system
    unet = dict(decoder="unet", model_channels=32, channel_mult=(1,), num_res_blocks=1)
    diffusion = tokenizer.Tokenizer(dataclasses.replace(tokenizers["NDVI"][0].config, image_size=64, **unet))
    decoders = {"NDVI": (diffusion, random_networks.random_variables(tokenizer.init, diffusion, scale=0.1))}
    dem, seeds = np.random.default_rng(1).normal(size=(4, 32, 32, 1)).astype(np.float32), np.array([3, 1, 4, 1])

    def run(dem, seeds):
        how = dict(seed=seeds, standardize=False, steps=2, timesteps=2, clip="none")
        return generate.generate(module, variables, decoders, {"DEM": dem}, ["NDVI"], **how)["NDVI"]

    together, devices = run(dem, seeds), jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5 * together.std())
    np.testing.assert_array_equal(run(dem, seeds), together)
    np.testing.assert_array_equal(run(dem, np.array([9, 1, 8, 7]))[1], together[1])
    close(run(dem[::-1], seeds[::-1])[::-1], together)
    spread = run(jax.device_put(dem, jax.NamedSharding(devices, jax.P("data"))), seeds)
    close(spread, together)
    assert np.abs(run(dem, seeds + 1) - together).max((1, 2, 3)).min() > 0.1 * together.std()


PROCESS = """
import hashlib
import numpy as np, random_networks
from terramind_jax import generate, modalities, tokenizer

streams = tuple(modalities.STREAMS[name] for name in ("untok_dem@224", "tok_lulc@224", "tok_ndvi@224", "coords"))
unet = dict(decoder="unet", model_channels=32, channel_mult=(1,), num_res_blocks=1)
ndvi = tokenizer.Tokenizer(tokenizer.TokenizerConfig("NDVI", 1, modalities.get("NDVI").levels, 16, 1, 2, image_size=64, **unet))
decoders = random_networks.build_tokenizers("LULC") | {"NDVI": (ndvi, random_networks.random_variables(tokenizer.init, ndvi, 0.1))}
dem, how = np.random.default_rng(1).normal(size=(2, 32, 32, 1)).astype(np.float32), dict(seed=np.array([3, 4]), steps=2, timesteps=2)
network, outputs = random_networks.build(streams, streams[1:]), ["LULC", "NDVI"]
for name, x in generate.generate(*network, decoders, {"DEM": dem}, outputs, standardize=False, **how).items():
    print(name, x.std(), hashlib.sha256(x.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_generate_the_same_bytes():
    """Each compiles anew, and goes through sets in an order of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True)
    both = [start(env=environment | {"PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    (first, _), (second, _) = (process.communicate() for process in both)
    assert first.count("\n") == 2 and first == second


def test_output_after_output_equals_one_call(system):
    outputs, options = ["NDVI", "coords", "LULC"], dict(seed=np.array([4, 5]), at=np.array([[0, 3], [2, 1]]))
    together, known = generate.output_tokens(*system, scene(), outputs, **options), {}
    for name in outputs:
        known |= generate.output_tokens(*system, scene(), outputs, known_tokens=known, only=name, **options)
    for name in outputs:
        np.testing.assert_array_equal(known[name], together[name])


def test_tokenised_inputs_and_coordinates_condition(system):
    lulc = np.random.default_rng(3).integers(0, 10, (2, 48, 48))
    where = np.array([[11.5, 48.25], [-70.0, -33.5]])
    flat = generate.generate(*system, {"LULC": lulc, "coords": where}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    square = generate.generate(*system, {"coords": where, "LULC": lulc[..., None]}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    np.testing.assert_array_equal(flat, square)
    elsewhere = generate.generate(*system, {"LULC": lulc, "coords": where[::-1]}, ["NDVI"], seed=0, temperature=0)["NDVI"]
    assert (flat != elsewhere).any()


def test_hidden_patches_may_hold_anything(system):
    """Clouds: the elevation itself is painted anew from what is seen of it, and of land cover, which enters as tokens."""
    dem, lulc = scene()["DEM"].astype(np.float32), np.random.default_rng(3).integers(0, 10, (2, 48, 48))
    visible = np.random.default_rng(4).random((2, 3, 3)) < 0.5
    hidden = ~np.kron(visible, np.ones((1, 16, 16), bool))
    masks = {"visible": {"DEM": visible, "LULC": visible}}

    def tokens(dem, lulc, **options):
        return np.asarray(generate.output_tokens(*system, {"DEM": dem, "LULC": lulc}, ["DEM"], seed=0, temperature=0, **options)["DEM"])

    painted = tokens(dem, lulc, **masks)
    clouded = np.where(hidden[..., None], np.nan, dem), np.where(hidden, 200, lulc)
    np.testing.assert_array_equal(painted, tokens(*clouded, **masks))
    assert (painted != tokens(dem, lulc)).any()
    np.testing.assert_array_equal(tokens(dem, lulc), tokens(dem, lulc, visible={"DEM": np.ones((2, 3, 3), bool)}))


def test_land_cover_is_in_painted(system):
    """Tokens that are seen stay; of what is not seen nothing is told."""
    lulc, visible = np.random.default_rng(3).integers(0, 10, (2, 48, 48)), np.random.default_rng(4).random((2, 3, 3)) < 0.5
    options = dict(seed=0, temperature=0, visible={"LULC": visible})
    clouded = scene() | {"LULC": np.where(np.kron(visible, np.ones((1, 16, 16), bool)), lulc, 200)}
    painted = generate.output_tokens(*system, clouded, ["NDVI", "LULC"], **options)
    given, _ = generate.encode_inputs(system[0], system[2], clouded, visible={"LULC": visible})
    own, made = np.asarray(given["tok_lulc@224"]), np.asarray(painted["LULC"])
    np.testing.assert_array_equal(made[visible], own[visible])
    assert (made[~visible] != own[~visible]).any()
    image = generate.generate(*system, clouded, ["NDVI", "LULC"], **options)["LULC"]
    np.testing.assert_array_equal(image, generate.decode_output(STREAMS["tok_lulc@224"], painted["LULC"], system[2]))


def test_a_density_over_the_earth(system):
    """A row against the plain pass that writes its latitude and then looks for the longitude."""
    module, variables, _ = system
    density = generate.locate(*system, scene())
    assert density.shape == (2, 721, 1440)
    np.testing.assert_allclose(density.sum((1, 2)), 1, rtol=1e-4)
    lons, lats = coordinates.grid()
    assert lats[173] == 46.75 and lons[766] == 11.5
    latitude, longitude, _ = coordinates.encode(11.5, 46.75)
    apply = functools.partial(module.apply, variables)
    values, _ = generate.encode_inputs(module, {}, scene())
    slots = [apply(key, value, method="embed") for key, value in values.items()]
    slots.append(apply("coords", jnp.full((2, 1), decoding.START), method="embed"))
    context = apply(*(jnp.concatenate(parts, axis=1) for parts in zip(*slots, strict=True)), method="encode")
    ids, places = jnp.array([[decoding.START, latitude]] * 2), jnp.array([[0, 1]] * 2)
    y = apply(apply("coords", places, ids, method="queries"), context, None, jnp.array([[[0, 1], [0, 0]]] * 2, bool), method="decode")
    logits = apply("coords", y, method="logits")
    of_latitude = jax.nn.softmax(logits[:, 0, slice(*coordinates.LATITUDES)])[:, latitude - coordinates.LATITUDES[0]]
    of_longitude = jax.nn.softmax(logits[:, 1, slice(*coordinates.LONGITUDES)])[:, longitude - coordinates.LONGITUDES[0]]
    np.testing.assert_allclose(density[:, 173, 766], of_latitude * of_longitude, rtol=1e-3)
    sharp = generate.locate(*system, scene(), temperature=0.5)
    assert (sharp.max((1, 2)) > density.max((1, 2))).all() and (density[0] != density[1]).any()
    with pytest.raises(ValueError, match="temperature is 0; a density needs a positive one"):
        generate.locate(*system, scene(), temperature=0)


def test_unwritten_coordinates_are_nan(system):
    ids = np.array([[coordinates.EOS, 0, 0, 0], [*coordinates.encode(11.5, 48.25), 0]])
    decoded = generate.decode_output(STREAMS["coords"], jnp.asarray(ids), {})
    np.testing.assert_array_equal(decoded, [[np.nan, np.nan], [11.5, 48.25]])


@pytest.mark.parametrize(
    "inputs, outputs, options, message",
    [
        ({"S3": np.zeros((1, 48, 48, 1))}, ["NDVI"], {}, "Unknown input modality 'S3'"),
        (scene(), ["S3"], {}, "Unknown output modality 'S3'"),
        ({"S2L2A": np.zeros((1, 48, 48, 12))}, ["NDVI"], {}, "takes no S2L2A; it takes DEM, LULC, NDVI, coords"),
        (scene(), ["S1GRD"], {}, "makes no S1GRD; it makes LULC, NDVI, coords, DEM"),
        ({"LULC": np.zeros((1, 48, 48), int)}, ["LULC"], {}, "LULC is both an input and an output"),
        ({"DEM": np.zeros((1, 1, 48, 48))}, ["NDVI"], {}, "channels-first"),
        ({"DEM": np.full((1, 48, 48, 1), np.nan)}, ["NDVI"], {}, "NaN"),
        ({"LULC": np.full((1, 48, 48), 10)}, ["NDVI"], {}, "from 10 to 10; expected integer classes 0-9"),
        (scene(), ["NDVI"], {"steps": {"S1GRD": 2}}, "S1GRD, which is no output; outputs: NDVI"),
        (scene(), ["NDVI"], {"only": "DEM"}, "The option only is given for DEM, which is no output; outputs: NDVI"),
        (scene(), ["NDVI"], {"known_tokens": {"DEM": np.zeros((2, 3, 3), int)}}, "known_tokens is given for DEM, which is no output"),
        (scene(), ["NDVI"], {"known_tokens": {"NDVI": np.full((2, 3, 3), 10**6)}}, "known_tokens of NDVI holds .* integer tokens 0-"),
        (scene(), ["NDVI"], {"visible": {"NDVI": True}}, "Visible patches are given for NDVI, which is no input; inputs: DEM"),
        (
            scene(),
            ["NDVI"],
            {"visible": {"DEM": np.ones((2, 48, 48), bool)}},
            r"of DEM are bool of shape \[2, 48, 48\]; expected bool, one",
        ),
        (scene(), ["NDVI"], {"noise": {"DEM": 0}}, "Noise is given for DEM, which is no output; outputs: NDVI"),
        (scene() | {"tok_ndvi@224": 0, "NDVI": 0}, ["LULC"], {}, "The inputs tok_ndvi@224 and NDVI are one stream"),
        (scene() | {"coords": np.zeros((1, 2))}, ["NDVI"], {}, "differ in batch size: DEM 2, coords 1"),
    ],
)
def test_errors_name_the_users_modalities(system, inputs, outputs, options, message):
    with pytest.raises(ValueError, match=message):
        generate.generate(*system, inputs, outputs, seed=0, **options)


def test_a_missing_tokenizer_is_named(system):
    module, variables, tokenizers = system
    with pytest.raises(ValueError, match="output LULC needs a tokenizer of LULC; given: NDVI"):
        generate.generate(module, variables, {"NDVI": tokenizers["NDVI"]}, scene(), ["LULC"], seed=0)
    with pytest.raises(ValueError, match="input NDVI needs a tokenizer of NDVI; given: none"):
        generate.generate(module, variables, {}, {"NDVI": np.zeros((1, 48, 48, 1))}, ["coords"], seed=0)
