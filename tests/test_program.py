"""Generation as one program, compiled ahead of time or exported."""

import json
import os
import subprocess
import sys

import nano_models
import numpy as np
import pytest

import terramind_jax as tm
from terramind_jax import coordinates


@pytest.fixture(autouse=True)
def small(monkeypatch, compile_fast):
    nano_models.shrink(monkeypatch, "tiny")


def load(inputs, outputs, **options):
    return tm.load("terramind_v1_tiny_generate", "random", modalities=inputs, output_modalities=outputs, timesteps=2, **options)


def scene(batch=2):
    rng = np.random.default_rng(0)
    places = np.array([[11.5, 48.25], [-70.0, -33.5]])[:batch]
    return {
        "S2L2A": rng.integers(1, 6000, (batch, 32, 32, 12)).astype(np.uint16),
        "LULC": rng.integers(0, 10, (batch, 32, 32)),
        "coords": places,
    }


def same(made, expected):
    assert list(made) == list(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(made[name], x, atol=1e-4 * np.abs(x).max())


def test_a_compiled_program_is_generate():
    model, options, seeds = (
        load(["S2L2A"], ["coords", "LULC"], offset={"S2L2A": 1000}),
        dict(standardize=True, steps=2),
        np.array([3, 2**32 - 1]),
    )
    inputs = {"S2L2A": scene()["S2L2A"]}
    run = model.compile(2, 32, **options)
    made, expected = run(inputs, seed=seeds), model.generate(inputs, seed=seeds, **options)
    np.testing.assert_array_equal(made.pop("coords"), expected.pop("coords"))
    same(made, expected)
    same({"LULC": run(inputs, seed=5)["LULC"]}, {"LULC": model.generate(inputs, seed=5, **options)["LULC"]})
    with pytest.raises(ValueError, match=r"S2L2A has shape \[1, 32, 32, 12\]; this program was compiled for \[2, 32, 32, 12\]"):
        run({"S2L2A": inputs["S2L2A"][:1]})
    with pytest.raises(ValueError, match="The inputs are DEM; this program was compiled for S2L2A"):
        run({"DEM": 0})
    with pytest.raises(ValueError, match="The seed is -1; a compiled program takes"):
        run(inputs, seed=-1)
    with pytest.raises(ValueError, match="takes no visible; use generate"):
        model.compile(2, 32, visible={"S2L2A": np.ones((2, 2, 2), bool)})


def test_a_compiled_program_objects_to_what_generate_objects_to():
    model, inputs = load(["S2L2A", "LULC"], ["coords"]), {name: scene()[name] for name in ("S2L2A", "LULC")}
    run = model.compile(2, 32, standardize=True)
    for wrong, message in (
        ({"S2L2A": np.where(inputs["S2L2A"] > 5990, np.nan, inputs["S2L2A"])}, "S2L2A has [0-9]+ NaN pixels"),
        ({"LULC": inputs["LULC"] + 1}, "LULC holds int64 values from 1 to 10; expected integer classes 0-9"),
        ({"LULC": inputs["LULC"].astype(np.float32)}, "LULC holds float32 values"),
    ):
        for make in (run, lambda given: model.generate(given, standardize=True)):
            with pytest.raises(ValueError, match=message):
                make(inputs | wrong)
    with pytest.warns(UserWarning, match="S2L2A looks like reflectance of 0-1"):
        run(inputs | {"S2L2A": inputs["S2L2A"] / 10000})


ALONE = """
import pathlib, sys
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file

program = export.deserialize(bytearray(pathlib.Path("made/program.stablehlo").read_bytes()))
assert program.platforms == ("cpu", "cuda", "tpu")
weights, call = load_file("made/weights.safetensors"), jax.jit(program.call)
for batch in (1, 2):
    made = call(weights, dict(np.load(f"given_{batch}.npz")), np.arange(batch, dtype=np.uint32))
    np.savez(f"made_{batch}.npz", **made)
assert "terramind_jax" not in sys.modules
"""


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(["S2L2A"], ["LULC"]), pytest.param(["S2L2A", "LULC", "coords"], ["DEM", "NDVI"], marks=pytest.mark.slow)]
)
def test_an_exported_program_runs_without_this_package_at_any_batch_size(inputs, outputs, tmp_path):
    pytest.importorskip("flatbuffers")
    model, options = load(inputs, outputs), dict(standardize=True, sampler="ddim", clip="none")
    model.export(tmp_path / "made", image_size=32, **options)
    tiles = {batch: {name: x for name, x in scene(batch).items() if name in inputs} for batch in (1, 2)}
    for batch, given in tiles.items():
        arrays = {"S2L2A": given["S2L2A"].astype(np.float32)}
        if "LULC" in inputs:
            arrays |= {"LULC": given["LULC"].astype(np.int32), "coords": coordinates.encode(given["coords"])}
        np.savez(tmp_path / f"given_{batch}.npz", **arrays)
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, check=True)
    for batch, given in tiles.items():
        made = dict(np.load(tmp_path / f"made_{batch}.npz"))
        same(made, model.generate(given, seed=np.arange(batch), **options))
    interface = json.loads((tmp_path / "made" / "interface.json").read_text())
    assert interface["platforms"] == ["cpu", "cuda", "tpu"]
    assert interface["inputs"]["S2L2A"] == {"shape": ["batch", 32, 32, 12], "dtype": "float32"} and [*interface["outputs"]] == outputs
    with pytest.raises(FileExistsError):
        model.export(tmp_path / "made")
