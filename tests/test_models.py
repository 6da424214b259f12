"""What models by name do with captions, time series, images of other sizes and vocabularies; networks are shrunk."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import nano_models
import numpy as np
import pytest
from test_captions import write as write_captions

import terramind_jax as tm
from terramind_jax import bands, build, captions, coordinates, generate, hub, modalities, tokenizer

TEXTS = ["a river with fields", "city"]


@pytest.fixture(autouse=True)
def shrunk(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny", "base")


@pytest.fixture
def folder(tmp_path):
    """A folder as users of captions make it: weights and tokenizers of any kind, and the vocabulary."""
    folder = tmp_path / "tokenizers"
    folder.mkdir()
    write_captions(folder / "caption.json")
    return folder


def pixels(batch=2, size=64, seed=0):
    return {"S2L2A": np.random.default_rng(seed).normal(size=(batch, size, size, 12)).astype(np.float32)}


def with_vocabulary(model, folder):
    return dataclasses.replace(model, vocabulary=captions.load(folder / "caption.json"))


# ---- captions ----


def test_captions_condition_and_are_generated(folder):
    built = tm.load("terramind_v01_base_generate", "random", modalities=["S2L2A", "caption"], output_modalities=["LULC"])
    model = with_vocabulary(built, folder)
    of_text = model.generate_tokens(pixels() | {"caption": TEXTS}, temperature=0)["LULC"]
    of_ids = model.generate_tokens(pixels() | {"caption": captions.encode(model.vocabulary, TEXTS)}, temperature=0)["LULC"]
    np.testing.assert_array_equal(of_text, of_ids)
    assert (of_text != model.generate_tokens(pixels() | {"caption": TEXTS[::-1]}, temperature=0)["LULC"]).any()
    assert model.generate(pixels() | {"caption": TEXTS}, standardize=True)["LULC"].shape == (2, 64, 64, 9)


def test_generated_captions_are_text_or_ids(folder):
    model = tm.load("terramind_v01_base_generate", "random", modalities=["S2L2A"], output_modalities=["caption"])
    ids = model.generate(pixels(), seed=1)["caption"]
    assert ids.shape == (2, 256) and ids.dtype == np.int32
    model = with_vocabulary(model, folder)
    assert model.generate(pixels(), seed=1, standardize=True)["caption"] == captions.decode(model.vocabulary, ids)


def test_captions_without_a_vocabulary_are_ids(tmp_path):
    model = tm.load("terramind_v01_base", "random", modalities=["S2L2A", "caption"])
    assert model.vocabulary is None and model(pixels() | {"caption": np.array([[300, 5, 3], [301, 5, 3]])})[-1].shape == (2, 16, 64)
    with pytest.raises(ValueError, match="no caption vocabulary.*TerraMind-v0.1-Tokenizer-Text/config.json .* as FOLDER/caption.json"):
        model(pixels() | {"caption": TEXTS})


@pytest.mark.parametrize("where", ["in", "beside"])
def test_the_vocabulary_is_found_where_tokenizers_are(folder, where):
    options = dict(modalities=["S2L2A", "caption"], merge_method="dict")
    saved = folder / "model" if where == "in" else folder.parent / "model"
    tm.save(tm.load("terramind_v01_base", "random", **options), saved)
    if where == "in":
        shutil.move(folder / "caption.json", saved / "caption.json")
    model = tm.load("terramind_v01_base", saved, **options)
    alone = model(pixels(1) | {"caption": TEXTS[1:]})[-1]
    assert alone["caption"].shape == (1, 3, 64)
    together = model({"S2L2A": np.repeat(pixels(1)["S2L2A"], 2, axis=0), "caption": TEXTS})[-1]
    np.testing.assert_allclose(together["S2L2A"][1], alone["S2L2A"][0], rtol=1e-4, atol=1e-5)  # whatever caption is beside it
    assert np.abs(together["S2L2A"][0] - together["S2L2A"][1]).max() > 1e-3


def test_the_hubs_vocabulary(folder, monkeypatch):
    name, options = "terramind_v01_base_generate", dict(modalities=["S2L2A"], output_modalities=["caption"])
    tm.save(tm.load(name, "random", **options), folder.parent / "saved")
    monkeypatch.setattr(hub, "vocabulary", lambda name, fetch=True: folder / f"{name}.json")
    assert tm.load(name, folder.parent / "saved", tokenizers="hub", **options).vocabulary.token_to_id("river") == 301

    def unreachable(name, fetch=True):
        raise ConnectionError(f"{name} could not be downloaded.")

    monkeypatch.setattr(hub, "vocabulary", unreachable)
    with pytest.warns(UserWarning, match="no vocabulary of caption: caption could not be downloaded"):
        assert tm.load(name, folder.parent / "saved", tokenizers="hub", **options).vocabulary is None


# ---- coordinates ----


def write_coordinates(path, vocabulary):
    path.write_text(json.dumps({"model": {"vocab": vocabulary}}))


def test_a_vocabulary_of_coordinates_is_compared_where_they_are_read(tmp_path):
    whole = tmp_path / "whole.safetensors"
    tm.save(tm.load("terramind_v1_tiny_encdec", "random"), whole)
    write_coordinates(tmp_path / "coords.json", coordinates.vocabulary())
    tm.load("terramind_v1_tiny", whole, modalities=["S2L2A", "coords"])
    write_coordinates(tmp_path / "coords.json", coordinates.vocabulary() | {"lat=0.00": 9})
    tm.load("terramind_v1_tiny", whole, modalities=["S2L2A"])
    with pytest.raises(ValueError, match=r"coords.json differs from the rule .*1 with another id \(lat=0.00 9, not 4564\)"):
        tm.load("terramind_v1_tiny", whole, modalities=["S2L2A", "coords"])


def test_the_hub_is_asked_for_it_only_when_it_was_reached(tmp_path, monkeypatch):
    state = tm.to_torch(tm.load("terramind_v1_tiny_encdec", "random"))
    asked, cached = [], []

    def vocabulary(name, fetch=True):
        asked.append((name, fetch))
        if fetch:
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "weights", lambda entry, revision=None: state)
    monkeypatch.setattr(hub, "has_weights", lambda entry: bool(cached))
    monkeypatch.setattr(hub, "vocabulary", vocabulary)
    with pytest.warns(UserWarning, match="no vocabulary of coords: no network"):
        tm.load("terramind_v1_tiny", modalities=["S2L2A", "coords"])
    cached.append(True)
    tm.load("terramind_v1_tiny", modalities=["S2L2A", "coords"])
    tm.load("terramind_v1_tiny", modalities=["S2L2A"])
    assert asked == [("coords", True), ("coords", False)]


# ---- sizes and time ----


def test_generation_at_the_size_of_the_images():
    model = tm.load("terramind_v1_tiny_generate", "random", modalities=["S2L2A"], output_modalities=["DEM"], timesteps=1)
    assert model.generate(pixels(size=96))["DEM"].shape == (2, 96, 96, 1)
    assert model.generate_tokens(pixels(size=112))["DEM"].shape == (2, 7, 7)


def test_time_series_by_user_name():
    steps = [{"S2L2A": pixels(seed=i)["S2L2A"], "coords": np.array([[10.0 + i, 50.0], [-70.0, -30.0]])} for i in range(3)]
    series = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    model = tm.load("terramind_v1_tiny", "random", modalities=["S2L2A", "coords"])
    kept = model.over_time(series, "keep")[-1]
    for i, step in enumerate(steps):
        np.testing.assert_allclose(kept[:, i], model(step)[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.over_time(series)[-1], kept.mean(1), rtol=1e-4, atol=1e-5)
    pooled = model.over_time({k: x.tolist() for k, x in series.items()}, "diff", subset_lengths=[1, 2])[-1]
    np.testing.assert_allclose(pooled, kept[:, 0] - kept[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"S2L2A has shape \[2, 64\]; a time series is \[B, T, H, W, C\]"):
        model.over_time({"S2L2A": series["S2L2A"][:, 0, :, 0, 0]})


def test_time_series_of_thinking_in_modalities():
    model = tm.load("terramind_v1_tiny_tim", "random", modalities=["S2L2A"], tim_modalities=["LULC"], merge_method="concat")
    series = {"S2L2A": np.stack([pixels(1, seed=i)["S2L2A"] for i in range(2)], axis=1)}
    kept = model.over_time(series, "keep", seed=np.array([7, 8]))[0]
    assert kept.shape == (1, 2, 16, 128)
    for i, seed in enumerate((7, 8)):
        alone = model({"S2L2A": series["S2L2A"][:, i]}, seed=np.array([seed]))[0]
        np.testing.assert_allclose(kept[:, i], alone, rtol=1e-4, atol=1e-5)


# ---- attention ----


def test_attention_by_user_name():
    model = tm.load("terramind_v1_tiny", "random", modalities=["S2L2A", "coords"])
    given = pixels() | {"coords": np.array([[10.0, 50.0], [-70.0, -30.0]])}
    found = model.attention(given)
    assert [*found] == [*found["coords"]] == ["S2L2A", "coords"]
    assert found["coords"]["S2L2A"].shape == (2, 2, 1, 3, 16)  # layers, samples, heads, tokens that look, tokens looked at


def test_attention_to_thoughts():
    model = tm.load("terramind_v1_tiny_tim", "random", modalities=["S2L2A"], tim_modalities=["LULC"])
    found = model.attention(pixels(), seed=3)
    assert [*found] == ["S2L2A", "tok_lulc@224"]
    np.testing.assert_allclose(sum(w.sum(-1) for w in found["S2L2A"].values()), 1, rtol=1e-5)


# ---- generators by user name ----


def generator(outputs, inputs=("DEM",), **options):
    options = {"timesteps": 1} | options
    return tm.load("terramind_v1_tiny_generate", "random", modalities=list(inputs), output_modalities=list(outputs), **options)


def elevation(size=32):
    return {"DEM": np.random.default_rng(0).normal(size=(1, size, size, 1)).astype(np.float32)}


@pytest.mark.parametrize("name", ["S2", "S2L1C", "S2RGB", "Sentinel1 s1"])
def test_every_name_of_an_output_is_in_physical_units(name):
    model = generator([name])
    physical = model.generate(elevation(), standardize=True)[name]
    standard = model.generate(model.standardize(elevation()))[name]
    expected = modalities.destandardize("S1GRD" if "s1" in name else "S2L2A", standard)
    np.testing.assert_allclose(physical, expected, rtol=1e-5)
    np.testing.assert_array_equal(model.destandardize({name: standard})[name], expected)


def test_two_names_of_one_output():
    model = generator(["S2L2A", "S2L1C"])
    tokens, made = model.generate_tokens(elevation()), model.generate(elevation())
    for of_name in (tokens, made):
        assert list(of_name) == ["S2L2A", "S2L1C"]
        np.testing.assert_array_equal(of_name["S2L2A"], of_name["S2L1C"])


def test_an_offset_moves_inputs_and_outputs():
    plain, moved = generator(["DEM"], ["S2L2A"], offset=None), generator(["DEM"], ["S2L2A"], offset={"DEM": 100, "S2L2A": 1000})
    x = pixels(1, 32)["S2L2A"] * 500 + 1500
    expected = plain.generate({"S2L2A": x}, standardize=True)["DEM"] + 100
    np.testing.assert_allclose(moved.generate({"S2L2A": x + 1000}, standardize=True)["DEM"], expected, rtol=1e-4, atol=0.5)
    with pytest.raises(ValueError, match="offset is given for 'S1GRD', which is no input and no output of this model; it has S2L2A, DEM"):
        generator(["DEM"], ["S2L2A"], offset={"S1GRD": 1})


def test_bands_that_an_input_lacks_are_filled():
    names = modalities.S2L2A_BANDS[1:9] + modalities.S2L2A_BANDS[10:]
    model = generator(["LULC", "S2L2A"], ["S2L2A"], bands={"S2L2A": names})
    x = np.random.default_rng(0).integers(1, 6000, (1, 32, 32, 10)).astype(np.uint16)

    standard = model.standardize({"S2L2A": x})["S2L2A"]

    def tokens(x, **options):
        return np.asarray(model.generate_tokens({"S2L2A": x}, only="LULC", temps=0.0, **options)["LULC"])

    for how in ("neighbours", "zeros"):
        full = bands.fill_missing("S2L2A", x, names, how)
        np.testing.assert_array_equal(tokens(x, standardize=True, fill_bands=how), tokens(full, standardize=True, bands={}))
        np.testing.assert_array_equal(tokens(x, standardize=True, fill_bands=how), tokens(standard, fill_bands=how))
    assert model.destandardize({"S2L2A": np.zeros((1, 32, 32, 12))})["S2L2A"][0, 0, 0, 0] == np.float32(1390.458)  # outputs have all
    with pytest.raises(ValueError, match="Bands are given for S1GRD, which is no input; inputs: S2L2A"):
        model.generate_tokens({"S2L2A": full}, standardize=True, bands={"S1GRD": ["VV"]})


def test_timesteps_of_a_call_of_the_model_and_of_its_sampler(monkeypatch):
    asked = []

    def decode(module, variables, tokens, *, timesteps, sampler, **options):
        asked.append((timesteps, sampler))
        return np.zeros((1, 32, 32, 1), np.float32)

    monkeypatch.setattr(generate, "decode", decode)
    built, plain = generator(["DEM"], ["S2L2A"]), generator(["DEM"], ["S2L2A"], timesteps=None)
    for model, options in ((built, {}), (built, {"timesteps": 3, "sampler": "ddim"}), (plain, {}), (plain, {"num_samples": 1})):
        model.generate(pixels(1, 32), **options)
    assert asked == [(1, "dpmpp"), (3, "ddim"), (None, "dpmpp"), (None, "dpmpp")]


def test_settings_of_each_output_noise_and_clip():
    model = generator(["DEM", "LULC"], ["S2L2A"])
    x = pixels(1, 32)
    by_name = dict(temps={"DEM": 0.0, "LULC": 0.0}, decoding_steps={"DEM": 1, "LULC": 2})
    ours = dict(temperature=0.0, steps={"DEM": 1, "LULC": 2})
    tokens = model.generate_tokens(x, **ours)
    for name, ids in model.generate_tokens(x, **by_name).items():
        np.testing.assert_array_equal(ids, tokens[name])
    noise = np.random.default_rng(1).normal(size=(1, 32, 32, 1)).astype(np.float32)
    made = model.generate(x, seed=5, noise={"DEM": noise}, clip="none", **by_name)["DEM"]
    module, variables = model.tokenizers["DEM"]
    np.testing.assert_array_equal(made, tokenizer.decode(module, variables, tokens["DEM"], noise=noise, timesteps=1, clip="none"))
    several = model.generate(x, seed=5, noise={"DEM": noise}, clip="none", num_samples=2, **by_name)
    np.testing.assert_array_equal(several["DEM"].values[0], made)
    assert several["LULC"].entropy.shape == (1, 32, 32)
    for outputs in (dict(noise={"S1GRD": noise}), dict(temps={"S1GRD": 0.0})):
        with pytest.raises(ValueError, match="is given for S1GRD, which is no output; outputs: DEM, LULC"):
            model.generate(x, **outputs)


def test_inputs_are_checked_by_their_names():
    model = generator(["DEM", "LULC"], ["S2L2A"])
    with pytest.raises(ValueError, match="This model takes no NDVI; it takes S2L2A, DEM"):
        model.generate(pixels() | {"NDVI": np.zeros((2, 64, 64, 1))}, standardize=True)
    with pytest.raises(ValueError, match="looks channels-first"):
        model.generate({"S2L2A": np.zeros((1, 12, 64, 64))}, standardize=True)
    twice = {"S2L1C": np.zeros((1, 32, 32, 13)), "S2L1C_L8": np.ones((1, 32, 32, 13))}
    for make in (lambda: generator(["DEM"], twice).generate, lambda: tm.load("terramind_v1_tiny", "random", modalities=list(twice))):
        with pytest.raises(ValueError, match="The inputs S2L1C and S2L1C_L8 are one stream, untok_sen2l1c@224; give one of them"):
            make()(twice)


def test_a_feature_extractor_knows_its_inputs_by_the_users_names():
    model = tm.load("terramind_v1_tiny", "random", modalities=["S2L2A", "NDVI"])
    for inputs, message in (
        ({"S2L2A": np.zeros((1, 12, 64, 64))}, r"^Input 'S2L2A' has shape \[1, 12, 64, 64\], which looks channels-first"),
        (pixels(2) | {"NDVI": np.zeros((1, 64, 64, 1))}, "^The inputs differ in batch size: S2L2A 2, NDVI 1"),
        ({}, "^There is no input; this model takes S2L2A, NDVI"),
        (pixels()["S2L2A"], "^The inputs are of type ndarray; expected a dict by modality, such as {'S2L2A': array}"),
        ({"S2L2A": np.full((1, 64, 64, 12), np.nan)}, "^S2L2A has 49152 NaN pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            model(inputs)


def test_what_is_no_input_and_no_option_of_generation():
    model = generator(["DEM"], ["S2L2A"])
    with pytest.raises(ValueError, match="Unknown option 'standardise' of generation; did you mean 'standardize'"):
        model.generate(pixels(), standardise=True)
    with pytest.raises(ValueError, match="The inputs are of type ndarray"):
        model.generate(pixels()["S2L2A"])
    with pytest.raises(ValueError, match="The batch has no 'input_modality'; a pretraining model takes batches of slots"):
        tm.load("terramind_v1_tiny_encdec", "random")(pixels())


def test_a_model_prints_without_its_weights():
    text = repr(generator(["DEM"], ["S2L2A"]))
    assert text.startswith("<Generator terramind_v1_tiny_generate, ") and " M parameters, modalities=['S2L2A']" in text and len(text) < 500


def test_a_new_modality_conditions_generation():
    model = generator(["LULC"], ["DEM", {"PLANET": 3}])
    ids = [model.generate_tokens(elevation() | {"PLANET": np.full((1, 32, 32, 3), x)}, temps=0.0)["LULC"] for x in (-9.0, 9.0)]
    assert ids[0].shape == (1, 2, 2) and (ids[0] != ids[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(modalities=[{"a/b": 3}]), "new modality 'a/b' needs a name without"),
        (dict(modalities=[{"S2L2A": 6}]), "new modality 'S2L2A' has the name of a released one"),
        (dict(modalities=[{"P": 0}]), "'P' has 0 channels; expected a positive integer"),
        (dict(img_size=230), "img_size is 230; expected a multiple of 16"),
        (dict(dtype="float33"), "The dtype is 'float33'; known dtypes: auto, float32"),
        (dict(output_modalities=["untok_sen2l2a@224"]), "'untok_sen2l2a@224' is a stream of pixels, which is never generated"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        generator(**{"outputs": options.pop("output_modalities", ["LULC"]), "inputs": options.pop("modalities", ["DEM"])}, **options)


@pytest.mark.parametrize("platform, given, dtype", [("gpu", {}, "bfloat16"), ("gpu", {"dtype": "float32"}, "float32")])
def test_all_networks_of_a_model_compute_in_one_dtype(monkeypatch, platform, given, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for name, options in (
        ("terramind_v1_tiny", dict(modalities=["LULC"])),
        ("terramind_v1_tiny_tim", dict(modalities=["S2L2A"])),
        ("terramind_v1_tiny_generate", dict(modalities=["LULC"], output_modalities=["DEM"])),
        ("terramind_v1_tiny_encdec", {}),
        ("terramind_v1_tokenizer_dem", {}),
    ):
        model = build.model(name, **options, **given)
        networks = [model.module, *(network for network, _ in model.tokenizers.values())]
        networks += [model.generator[0]] if name.endswith("_tim") else []
        assert {network.config.dtype for network in networks} == {dtype}, name
        assert model.options["dtype"] == given.get("dtype", "auto")  # so that what is saved holds on any machine


def test_none_is_a_default_and_defaults_are_copied():
    model = tm.load("terramind_v1_tiny", "random", modalities="S2L2A", bands=None)
    assert model.options["bands"] == {} and list(model.streams) == ["S2L2A"]
    model.options["bands"]["S2L2A"] = ["RED"]
    assert tm.load("terramind_v1_tiny", "random", modalities=["S2L2A"]).options["bands"] == {}


def test_tokenizers_refuse_classes_and_tokens_out_of_range():
    lulc, dem = (tm.load(f"terramind_v1_tokenizer_{m}", "random") for m in ("lulc", "dem"))
    for wrong in (lulc.encode, lulc.features):
        with pytest.raises(ValueError, match="LULC holds int64 values from 10 to 10; expected integer classes 0-9"):
            wrong(np.full((1, 32, 32), 10))
    assert lulc.encode(np.full((1, 32, 32, 10), 0.1, np.float32)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="tokens holds int64 values from 15360 to 15360; expected integer tokens 0-15359"):
        dem.decode(np.full((1, 2, 2), 15360))


# ---- chained Thinking in Modalities ----


def test_a_chained_backbone_with_embeddings_of_its_own_is_not_exported(tmp_path):
    """TerraTorch has one set of embeddings for both; a directory holds two."""
    options = dict(modalities=["S2L2A"], tim_modalities=["LULC"])
    model = tm.load("terramind_v1_tiny_tim", "random", **options)
    tm.to_torch(model)
    params = model.variables["params"]
    blocks = {**params, "encoder_norm": {"scale": params["encoder_norm"]["scale"] + 1}}
    tm.to_torch(dataclasses.replace(model, variables={**model.variables, "params": blocks}))
    moved = {**params, "patch_proj": {k: x + 1 for k, x in params["patch_proj"].items()}}
    tuned = dataclasses.replace(model, variables={**model.variables, "params": moved})
    with pytest.raises(ValueError, match="differ from the generator's .patch_proj/untok_sen2l2a@224.; .* or save to a directory"):
        tm.save(tuned, tmp_path / "tuned.safetensors")
    tm.save(tuned, tmp_path / "tuned")
    again = tm.load("terramind_v1_tiny_tim", tmp_path / "tuned", **options)
    for ours, loaded in ((tuned.variables, again.variables), (tuned.generator[1], again.generator[1])):
        key = "untok_sen2l2a@224"
        np.testing.assert_array_equal(ours["params"]["patch_proj"][key], loaded["params"]["patch_proj"][key])
    with pytest.raises(ValueError, match="differ from the generator's"):
        tm.to_torch(again)
    apart = tm.load("terramind_v1_tiny_tim", "random", tim_chained_generations=False, **options)
    tm.to_torch(dataclasses.replace(apart, variables={**apart.variables, "params": {**apart.variables["params"], **moved}}))
