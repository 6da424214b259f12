"""Models by name: built, filled from every source, called, saved and exported. Networks are shrunk; names and options are the real ones."""

import contextlib
import dataclasses
import json
import shutil

import jax
import ml_dtypes
import nano_models
import numpy as np
import pytest

import terramind_jax as tm
from terramind_jax import build, cli, weights, zoo
from terramind_jax.convert import files


@pytest.fixture(autouse=True)
def shrunk(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


def images(batch=1, size=224, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "S2L2A": rng.normal(size=(batch, size, size, 12)).astype(np.float32),
        "S1GRD": rng.normal(size=(batch, size, size, 2)).astype(np.float32),
        "LULC": rng.integers(0, 10, (batch, size, size)),
        "coords": np.tile([[11.5, 48.25]], (batch, 1)),
    }


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_every_released_model_is_listed_and_described():
    names = tm.list_models()
    assert len(names) == 4 * 4 + 6 + 3 + 4 and "terramind_v1_base_generate" in names and "terramind_v01_tokenizer_lulc" in names
    with pytest.raises(ValueError, match="Unknown model 'terramind_v1_bsae'; did you mean 'terramind_v1_base'"):
        tm.load("terramind_v1_bsae", "random")


def test_a_feature_extractor_takes_all_kinds_of_inputs():
    model = tm.load("terramind_v1_tiny", "random", modalities=["S2L2A", "LULC", "coords", {"PLANET": 3}], merge_method="dict")
    inputs = {k: x for k, x in images(2).items() if k != "S1GRD"} | {"PLANET": images(2)["S2L2A"][..., :3]}
    out = model(inputs)
    assert len(out) == 2 and {k: x.shape for k, x in out[-1].items()} == {
        "S2L2A": (2, 196, 64), "LULC": (2, 196, 64), "coords": (2, 3, 64), "PLANET": (2, 196, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match="This model has no input 'S1GRD'; it was built with S2L2A, LULC, coords, PLANET"):
        model({"S1GRD": images()["S1GRD"]})


def test_without_modalities_it_takes_every_released_one():
    model = build.model("terramind_v1_tiny")
    assert len(model.streams) == 13 and {"S2L2A", "tok_sen2l2a@224", "LULC", "coords"} <= set(model.streams)
    assert "caption" in build.model("terramind_v01_base").streams


def test_options_are_checked():
    with pytest.raises(ValueError, match="terramind_v1_tiny has no option 'merge_metod'; did you mean 'merge_method'"):
        tm.load("terramind_v1_tiny", "random", merge_metod="max")
    with pytest.raises(ValueError, match="needs the options modalities and output_modalities"):
        tm.load("terramind_v1_tiny_generate", "random")
    with pytest.raises(ValueError, match="bands are given for 'S1', which is no input of this model; it has S2L2A"):
        tm.load("terramind_v1_tiny", "random", modalities=["S2L2A"], bands={"S1": ["VV"]})


def test_statistics_follow_version_bands_and_offset():
    x = {"S2L2A": np.full((1, 16, 16, 12), 2000.0), "LULC": np.ones((1, 16, 16), int)}
    v1, v01 = (build.model(name, modalities=["S2L2A", "LULC"]) for name in ("terramind_v1_tiny", "terramind_v01_base"))
    assert v1.standardize(x)["S2L2A"][0, 0, 0, 0] == pytest.approx((2000 - 1390.458) / 2106.761, rel=1e-6)
    assert v01.standardize(x)["S2L2A"][0, 0, 0, 0] == pytest.approx((2000 - 794.311) / 1164.883, rel=1e-6)
    assert v1.standardize(x)["LULC"] is x["LULC"]
    np.testing.assert_allclose(v1.destandardize(v1.standardize(x))["S2L2A"], 2000, rtol=1e-5)
    rgb = build.model("terramind_v1_tiny", modalities=["S2L2A"], bands={"S2L2A": ["RED", "GREEN", "BLUE"]})
    assert rgb.standardize({"S2L2A": x["S2L2A"][..., :3]})["S2L2A"][0, 0, 0, 0] == pytest.approx((2000 - 1853.91) / 2134.138, rel=1e-6)
    shifted = build.model("terramind_v1_tiny_generate", modalities=["S2L2A"], output_modalities=["coords"], offset={"S2L2A": 1000})
    np.testing.assert_allclose(shifted.standardize({"S2L2A": x["S2L2A"] + 1000})["S2L2A"], v1.standardize(x)["S2L2A"], rtol=1e-5, atol=1e-6)


def test_generation_is_seeded_and_in_physical_units():
    model = tm.load("terramind_v1_tiny_generate", "random", modalities=["S2L2A"], output_modalities=["DEM", "LULC", "coords"], timesteps=2)
    x = {"S2L2A": images(2)["S2L2A"] * 500 + 1500}
    made = model.generate(x, seed=3, standardize=True)
    assert {k: v.shape for k, v in made.items()} == {"DEM": (2, 224, 224, 1), "LULC": (2, 224, 224, 10), "coords": (2, 2)}
    assert abs(made["DEM"].mean() - 670.665) < 951.272  # the published clip: within one standard deviation
    tokens, again, other = (model.generate_tokens(x, seed=seed, standardize=True)["DEM"] for seed in (3, 3, 4))
    assert tokens.shape == (2, 14, 14) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, again)
    assert not np.array_equal(tokens, other)


def test_thinking_adds_what_is_missing():
    model = tm.load("terramind_v1_tiny_tim", "random", modalities=["S2L2A"], tim_modalities=["LULC"], merge_method=None)
    assert model({"S2L2A": images()["S2L2A"]}, seed=1)[-1].shape == (1, 2 * 196, 64)
    assert list(model.think({"S2L2A": images()["S2L2A"]}, seed=1)) == ["untok_sen2l2a@224", "tok_lulc@224"]


def test_tokenizers_go_there_and_back():
    model = tm.load("terramind_v1_tokenizer_dem", "random")
    tokens = model.encode(images(size=64)["S1GRD"][..., :1])
    assert tokens.shape == (1, 4, 4) and tokens.dtype == np.int32
    noise = np.zeros((1, 64, 64, 1), np.float32)
    np.testing.assert_array_equal(model.decode(tokens, timesteps=2, noise=noise), model.decode(tokens, seed=9, timesteps=2, noise=noise))


# ---- weights from everywhere ----

GENERATE = dict(modalities=["LULC", "S2L2A"], output_modalities=["DEM"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("terramind_v1_tiny", dict(modalities=["S2L2A", "NDVI", {"PLANET": 6}], merge_method="concat", num_register_tokens=2)),
        ("terramind_v1_tiny", dict(modalities=["S2L2A", "DEM"], bands={"S2L2A": ["RED", "MINE", "BLUE"]})),
        ("terramind_v1_tiny_generate", GENERATE),
        ("terramind_v1_tiny_tim", dict(modalities=["S2L2A", "NDVI"], tim_modalities=["DEM"])),
        ("terramind_v1_tiny_encdec", {}),
        ("terramind_v1_tokenizer_lulc", {}),
        ("terramind_v1_tokenizer_s1rtc", {}),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_saved_and_loaded_models_are_equal(tmp_path, name, options, suffix):
    model = tm.load(name, "random", seed=5, **options)
    path = tmp_path / f"saved{suffix}"
    tm.save(model, path)
    loaded = tm.load(name, path, **options)
    assert {k: equal(v, weights.networks_of(loaded)[k][1]) for k, (_, v) in weights.networks_of(model).items()} == dict.fromkeys(
        weights.networks_of(model), True
    )
    with pytest.raises(FileExistsError, match="exists already"):
        tm.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tokenizers_of_their_own_size(tmp_path, monkeypatch):
    model = tm.load("terramind_v1_tokenizer_dem", "random", seed=4)
    tm.save(model, tmp_path / "tokenizers" / "DEM")
    generator = tm.load("terramind_v1_tiny_generate", "random", tokenizers=tmp_path, modalities=["S2L2A"], output_modalities=["DEM"])
    tm.save(generator, tmp_path / "generator")
    monkeypatch.undo()  # the released sizes are others now
    monkeypatch.setitem(zoo.SIZES, "tiny", nano_models.NANO)
    loaded = tm.load("terramind_v1_tiny_generate", tmp_path / "generator", modalities=["S2L2A"], output_modalities=["DEM"])
    again = tm.load("terramind_v1_tokenizer_dem", tmp_path / "tokenizers" / "DEM", dtype="bfloat16")
    assert equal(loaded.tokenizers["DEM"][1], model.variables) and equal(again.variables, model.variables)
    assert loaded.tokenizers["DEM"][0] == model.module and again.module.config == dataclasses.replace(model.module.config, dtype="bfloat16")
    cli.main(["convert", str(tmp_path / "generator"), str(tmp_path / "generator.safetensors")])
    assert {k: x.shape for k, x in files.read(tmp_path / "generator.safetensors").items()} == {
        k: x.shape for k, x in tm.to_torch(generator).items()
    }
    with pytest.raises(ValueError, match="DEM holds a tokenizer of DEM, not of NDVI"):
        tm.load("terramind_v1_tokenizer_ndvi", tmp_path / "tokenizers" / "DEM")


@pytest.mark.parametrize(
    ("name", "options"),
    [("terramind_v1_tiny", {}), ("terramind_v1_tiny_generate", dict(output_modalities=["DEM", "NDVI"]))],
)
def test_transformers_of_their_own_size(tmp_path, monkeypatch, name, options):
    own = dict(sizes=nano_models.NANO, codebooks={"LULC": 12, "DEM": 9})
    monkeypatch.setitem(zoo.SIZES, "tiny", nano_models.NANO | dict(dim=32, encoder_depth=1))
    model = tm.load(name, "random", seed=4, modalities=["S2L2A", "LULC"], **own, **options)
    found = model.variables["params"]["encoder_token_emb"]
    assert found["tok_lulc@224"].shape == (12, 64) and (
        "decoder_token_emb" not in model.variables["params"] or found["tok_dem@224"].shape == (9, 64)
    )
    tm.save(model, tmp_path / "own")
    loaded = tm.load(name, tmp_path / "own")
    assert loaded.module.config == model.module.config and equal(loaded.variables, model.variables)
    assert cli.main(["convert", str(tmp_path / "own"), str(tmp_path / "own.safetensors")]) == 0
    with pytest.raises(ValueError, match="There is no size 'depth'; known are dim, "):
        tm.load(name, "random", modalities=["S2L2A"], sizes={"depth": 3}, **options)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_every_model_of_a_size_reads_the_whole(tmp_path, suffix):
    whole = tm.load("terramind_v1_tiny_encdec", "random", seed=1)
    state = tm.to_torch(whole)
    tm.save(whole, path := tmp_path / f"whole{suffix}")
    params = whole.variables["params"]
    for name, options in (
        ("terramind_v1_tiny", dict(modalities=["S2L2A", {"PLANET": 4}])),
        ("terramind_v1_tiny_generate", GENERATE | {"tokenizers": "random"}),
        ("terramind_v1_tiny_tim", dict(modalities=["S2L2A"])),
    ):
        with pytest.warns(UserWarning, match="LULC .* only decoding needs it") if name.endswith("_tim") else contextlib.nullcontext():
            model = tm.load(name, path, **options)
        found = model.variables["params"]
        np.testing.assert_array_equal(found["patch_proj"]["untok_sen2l2a@224"], params["patch_proj"]["untok_sen2l2a@224"])
        np.testing.assert_array_equal(found["encoder"]["mlp"]["fc1"]["kernel"], params["encoder"]["mlp"]["fc1"]["kernel"])
    variables = tm.from_torch(state, "terramind_v1_tiny", modalities=["S2L2A"])
    np.testing.assert_array_equal(variables["params"]["encoder"]["attn"]["qkv"]["kernel"], params["encoder"]["attn"]["qkv"]["kernel"])
    assert len(state) == len(tm.to_torch(whole)) and "mask_token" in state  # the caller's dict is whole


def test_bands_are_taken_from_files_of_all_bands(tmp_path):
    bands = {"S2L2A": ["RED", "GREEN", "BLUE"]}
    whole = tm.load("terramind_v1_tiny_encdec", "random")
    all_bands = tm.load("terramind_v1_tiny", "random", seed=2, modalities=["S2L2A"])
    for i, source in enumerate((whole, all_bands)):
        kernel = source.variables["params"]["patch_proj"]["untok_sen2l2a@224"].reshape(256, 12, 64)
        for suffix in ("", ".safetensors"):
            tm.save(source, tmp_path / f"{i}{suffix}")
            model = tm.load("terramind_v1_tiny", tmp_path / f"{i}{suffix}", modalities=["S2L2A"], bands=bands)
            got = model.variables["params"]["patch_proj"]["untok_sen2l2a@224"].reshape(256, 3, 64)
            np.testing.assert_array_equal(got, kernel[:, [3, 2, 1]])
    variables = tm.from_torch(tm.to_torch(model), "terramind_v1_tiny", modalities=["S2L2A"], bands=bands)
    assert equal(variables, model.variables)
    with pytest.raises(ValueError, match=r"'LULC' is not a pixel stream|'tok_lulc@224' is not a pixel stream"):
        tm.load("terramind_v1_tiny", "random", modalities=["LULC"], bands={"LULC": ["LULC"]})


def test_a_band_that_a_modality_lacks_is_fresh_and_said_so(tmp_path):
    tm.save(tm.load("terramind_v1_tiny", "random", modalities=["S2L2A"]), tmp_path / "all.safetensors")
    with pytest.warns(UserWarning, match="S2L2A has no band B02, MINE: embedded by fresh random weights. Its bands: COASTAL_AEROSOL, BLUE"):
        tm.load("terramind_v1_tiny", tmp_path / "all.safetensors", modalities=["S2L2A"], bands={"S2L2A": ["RED", "B02", "MINE"]})


def test_the_order_of_all_bands_is_kept_or_asked_for(tmp_path):
    turned = dict(modalities=["S1GRD"], bands={"S1GRD": ["VH", "VV"]})
    model = tm.load("terramind_v1_tiny", "random", modalities=["S1GRD"])
    tm.save(model, tmp_path / "all")
    swapped = tm.load("terramind_v1_tiny", tmp_path / "all", **turned)
    kernel, got = (m.variables["params"]["patch_proj"]["untok_sen1grd@224"].reshape(256, 2, 64) for m in (model, swapped))
    np.testing.assert_array_equal(got, kernel[:, ::-1])
    tm.save(swapped, tmp_path / "swapped")
    assert equal(tm.load("terramind_v1_tiny", tmp_path / "swapped", **turned).variables, swapped.variables)
    tm.save(swapped, tmp_path / "swapped.safetensors")
    with pytest.raises(ValueError, match="swapped.safetensors does not tell the order of its bands"):
        tm.load("terramind_v1_tiny", tmp_path / "swapped.safetensors", **turned)


def test_a_directory_knows_its_model(tmp_path):
    tm.save(tm.load("terramind_v1_tiny", "random", modalities=["S1GRD"], merge_method="max"), tmp_path / "saved")
    assert tm.load("terramind_v1_tiny", tmp_path / "saved").options["merge_method"] == "max"
    assert tm.load("terramind_v1_tiny", tmp_path / "saved", merge_method="mean").options["merge_method"] == "mean"
    with pytest.raises(ValueError, match="saved holds terramind_v1_tiny, which is no terramind_v01_base"):
        tm.load("terramind_v01_base", tmp_path / "saved")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_new_modality_of_another_shape_is_an_error(tmp_path, suffix):
    tm.save(tm.load("terramind_v1_tiny", "random", modalities=[{"PLANET": 6}], num_register_tokens=4), tmp_path / f"saved{suffix}")
    with pytest.raises(ValueError, match=r"saved.*(of another shape|expected)"):
        tm.load("terramind_v1_tiny", tmp_path / f"saved{suffix}", modalities=[{"PLANET": 4}], num_register_tokens=4)
    with pytest.raises(ValueError, match=r"saved.*(of another shape|expected)"):
        tm.load("terramind_v1_tiny", tmp_path / f"saved{suffix}", modalities=[{"PLANET": 6}], num_register_tokens=2)


def test_damaged_directories(tmp_path):
    tm.save(tm.load("terramind_v1_tokenizer_dem", "random"), tmp_path / "saved")
    for name, damage in (
        ("no_arrays", lambda path: shutil.rmtree(path / "arrays")),
        ("text", lambda path: (path / "model.json").write_text("{")),
        ("nameless", lambda path: (path / "model.json").write_text("{}")),
        ("short", lambda path: [p.write_bytes(p.read_bytes()[:-40]) for p in path.glob("arrays/**/d/*")]),
    ):
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.* (is no complete directory of weights|does not describe a model)"):
            tm.load("terramind_v1_tokenizer_dem", tmp_path / name)


def test_tensors_of_pytorch_are_taken(tmp_path):
    torch = pytest.importorskip("torch")
    model = tm.load("terramind_v1_tokenizer_lulc", "random")
    state = {name: torch.nn.Parameter(torch.from_numpy(np.array(x)).bfloat16()) for name, x in tm.to_torch(model).items()}
    with pytest.warns(UserWarning, match="bfloat16"):
        variables = tm.from_torch(state, "terramind_v1_tokenizer_lulc")
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-2), variables, model.variables))


def test_other_image_sizes_have_fresh_positions(tmp_path):
    whole = tm.load("terramind_v1_tiny_encdec", "random")
    tm.save(whole, tmp_path / "whole")
    model = tm.load("terramind_v1_tiny", tmp_path / "whole", modalities=["S2L2A"], img_size=256)
    assert model.variables["buffers"]["encoder_pos_emb"]["untok_sen2l2a@224"].shape == (256, 64)


def test_a_wrong_size_a_wrong_file_and_half_precision(tmp_path):
    tm.save(tm.load("terramind_v1_tiny_encdec", "random"), tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"whole.safetensors: The weights do not fit this model: .* of another shape") as error:
        tm.load("terramind_v1_small", tmp_path / "whole.safetensors")
    assert "64" in str(error.value) and len(str(error.value)) < 700
    with pytest.raises(FileNotFoundError, match="There are no weights .*none.pt; expected 'hub', 'random', or the path"):
        tm.load("terramind_v1_tiny", tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no tokenizer of LULC in .*; give tokenizers= .*finetune: --config.model.tokenizers;"):
        tm.load("terramind_v1_tiny", tmp_path / "whole.safetensors", modalities=["LULC"])
    half = {k: np.asarray(x).astype(ml_dtypes.bfloat16) for k, x in files.read(tmp_path / "whole.safetensors").items()}
    files.write(tmp_path / "half.safetensors", half)
    with pytest.warns(UserWarning, match="half.safetensors holds bfloat16 weights; they become float32"):
        model = tm.load("terramind_v1_tiny", tmp_path / "half.safetensors", modalities=["S2L2A"])
    assert model.variables["params"]["encoder_norm"]["scale"].dtype == np.float32


def test_replacing_the_variables_gives_the_same_model_retrained():
    model = tm.load("terramind_v1_tiny", "random", modalities=["S2L2A"])
    zeros = jax.tree.map(np.zeros_like, model.variables)
    out = dataclasses.replace(model, variables=zeros)({"S2L2A": images()["S2L2A"]})
    assert not np.any(out[-1])


# ---- convert ----


def test_convert_keeps_every_byte(tmp_path, capsys):
    whole = tm.load("terramind_v1_tiny_encdec", "random", seed=2)
    tm.save(whole, tmp_path / "a.safetensors")
    for source, target in (("a.safetensors", "b"), ("b", "c.safetensors"), ("c.safetensors", "d.safetensors")):
        model = ["--model=terramind_v1_tiny_encdec"] if target == "b" else []
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target), *model]) == 0
    assert "Writing" in capsys.readouterr().out
    a, d = (files.read(tmp_path / f"{x}.safetensors") for x in "ad")
    assert set(a) == set(d) and all(np.asarray(a[k]).tobytes() == np.asarray(d[k]).tobytes() for k in a)
    assert json.loads((tmp_path / "b" / "model.json").read_text())["name"] == "terramind_v1_tiny_encdec"


def test_convert_makes_a_directory_of_any_model_that_is_named(tmp_path):
    tm.save(tm.load("terramind_v1_tiny_encdec", "random"), tmp_path / "whole.safetensors")
    arguments = [str(tmp_path / "whole.safetensors"), str(tmp_path / "backbone"), "--model=terramind_v1_tiny"]
    assert cli.main(["convert", *arguments]) == 0
    loaded = tm.load("terramind_v1_tiny", tmp_path / "backbone", tokenizers="random")
    expected = tm.load("terramind_v1_tiny", tmp_path / "whole.safetensors", tokenizers="random")
    assert equal(loaded.variables, expected.variables)


def test_convert_refuses_in_one_sentence(tmp_path, capsys):
    tm.save(tm.load("terramind_v1_tokenizer_s1grd", "random"), tmp_path / "weights.safetensors")
    (tmp_path / "taken.pt").write_text("")

    def refused(*arguments):
        assert cli.main(["convert", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "exists already; choose another name" in refused(tmp_path / "weights.safetensors", tmp_path / "taken.pt")
    several = refused(tmp_path / "weights.safetensors", tmp_path / "new")
    assert "of 2 channels, of which there are several; say which with --model" in several
    assert "unknown suffix" in refused(tmp_path / "weights.safetensors", tmp_path / "new.onnx")
    assert "There is no file" in refused(tmp_path / "none.safetensors", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.pt", "weights.safetensors"]
