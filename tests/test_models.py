"""What models by name do with captions, time series, images of other sizes and vocabularies; networks are shrunk."""

from __future__ import annotations

import dataclasses
import json
import shutil

import nano_models
import numpy as np
import pytest
from test_captions import write as write_captions

import terramind_jax as tm
from terramind_jax import captions, coordinates, hub

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

    monkeypatch.setattr(hub, "weights", lambda entry: state)
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
    with pytest.raises(ValueError, match=r"Input 'S2L2A' has shape \[2, 64\]; a time series is \[B, T, ...\]"):
        model.over_time({"S2L2A": series["S2L2A"][:, 0, :, 0, 0]})


def test_time_series_of_thinking_in_modalities():
    model = tm.load("terramind_v1_tiny_tim", "random", modalities=["S2L2A"], tim_modalities=["LULC"], merge_method="concat")
    series = {"S2L2A": np.stack([pixels(1, seed=i)["S2L2A"] for i in range(2)], axis=1)}
    kept = model.over_time(series, "keep", seed=np.array([7, 8]))[0]
    assert kept.shape == (1, 2, 16, 128)
    for i, seed in enumerate((7, 8)):
        alone = model({"S2L2A": series["S2L2A"][:, i]}, seed=np.array([seed]))[0]
        np.testing.assert_allclose(kept[:, i], alone, rtol=1e-4, atol=1e-5)


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
