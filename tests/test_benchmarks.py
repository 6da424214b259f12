"""The benchmarks are run as scripts, whose folder comes first where Python looks for modules."""

import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import object_store
import pytest
import random_networks
import tiny_run

from terramind_jax import geo, modalities
from terramind_jax.modalities import STREAMS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_hides_a_module(script):
    assert importlib.util.find_spec(script.stem) is None


@pytest.fixture
def scripts(monkeypatch):
    """Imports scripts by name, as they import one another."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    yield importlib.import_module
    for script in SCRIPTS:
        sys.modules.pop(script.stem, None)


# ---- seams ----


def test_a_row_of_seams_compares_lines_of_one_grid(scripts):
    row = np.arange(64)[:, None, None]
    image = np.broadcast_to(row // 16 + 2.0 * (row >= 32), (64, 64, 1))  # steps of 1, and of 3 at line 32; none between columns
    assert scripts("seams").seam_row("DEM", "the truth", image, {0, 32, 64}, 0) == "| DEM | the truth | 1.5 | 0.5 | 3.000 |  |"


# ---- the reader ----


def test_least_is_read_of_what_is_mapped(scripts, tmp_path, monkeypatch):
    loader = scripts("loader")
    monkeypatch.setattr(loader, "SCENES", 2)
    loader.with_tokens(str(tmp_path))
    rows = [line.split("|") for line in loader.ways(str(tmp_path)).splitlines()[-3:]]
    assert [row[1].strip() for row in rows] == ["shards", "records", "mapped"]
    read = [float(row[3].replace(",", "")) for row in rows]
    assert 0 < read[2] < min(read[:2])


# ---- the best batch ----


def measuring(rates, memory=math.inf):
    """A fake measurement: tokens/s by batch size, the last one also beyond; nothing larger than `memory` fits."""

    def measure(batch):
        rate = rates.get(batch, list(rates.values())[-1])
        return {"failed": "out of memory"} if batch > memory else {"tokens": batch * 10, "seconds": batch * 10 / rate}

    return measure


@pytest.mark.parametrize(
    ("rates", "memory", "largest", "tried", "best"),
    [
        ({8: 100, 16: 150, 32: 200}, math.inf, 32, [8, 16, 32], 32),  # rises to the end
        ({8: 100, 16: 150, 32: 151, 64: 152, 128: 300}, math.inf, 512, [8, 16, 32, 64], 64),  # two steps of less than 2 %
        ({8: 100, 16: 101, 32: 150, 64: 140, 128: 140}, math.inf, 512, [8, 16, 32, 64, 128], 32),  # one such step is no end
        ({8: 100, 16: 150, 32: 200}, 16, 512, [8, 16, 32], 16),  # memory ends
        ({2: 80, 4: 90, 8: 100}, 3, 512, [8, 4, 2], 2),  # the first does not fit, nor does its double
        ({8: 100}, 0, 512, [8, 4, 2, 1], None),  # nothing fits
    ],
)
def test_search_for_the_best_batch(scripts, rates, memory, largest, tried, best):
    found = scripts("best_batch").search(measuring(rates, memory), 8, largest)
    assert (list(found), scripts("best_batch").fastest(found)) == (tried, best)


def test_a_search_ends_at_another_failure_with_what_it_has(scripts):
    results = {8: {"tokens": 8, "seconds": 1.0}, 16: {"failed": "ValueError: no"}}
    assert scripts("best_batch").search(results.__getitem__, 8, 512) == results


def test_a_search_begins_no_measurement_that_would_end_too_late(scripts):
    now = [0.0]

    def measure(batch):
        now[0] += batch
        return {"tokens": batch**2, "seconds": 1.0}

    found = scripts("best_batch").search(scripts("best_batch").until(30.0, measure, clock=lambda: now[0]), 8, 512)
    assert list(found) == [8, 16, 32] and found[32] == {"failed": "no time left"} and now == [24.0]


# ---- inference ----


def test_a_section_replaces_itself_alone(scripts, tmp_path):
    write, path = scripts("inference").write_section, tmp_path / "table.md"
    for title, body in (("Speed", "old\n\n| a |\n"), ("Samplers", "one"), ("Speed", "new\n\n| b |\n")):
        write(path, title, body)
    assert path.read_text() == "# Inference\n\n## Speed\n\nnew\n\n| b |\n\n## Samplers\n\none\n"


# ---- samplers ----


def test_the_reference_decodes_in_turn_with_ours(scripts, tmp_path, monkeypatch):
    """Rows of medians; DPM-Solver++ takes as few steps as reach the error of the published ones."""
    script, asked = scripts("samplers"), []

    def measure(_, *flags):
        side, sampler, steps = (flag_of(flags, name) for name in ("side", "sampler", "steps"))
        asked.append((side, sampler, int(steps)))
        seconds = int(steps) * (0.02 if side == "peer" else 0.01) * (1 if len(asked) <= 6 else 100)  # the last round is disturbed
        return {"limit": 0.2 if sampler == "ddim" else 0.1, "image": 1.0, "seconds": seconds}

    monkeypatch.setattr(scripts("process"), "measure", measure)
    errors = {("ddim", 50): 0.2} | {("dpmpp", n): 2 / n for n in script.STEPS["dpmpp"]}
    enough = script.enough_steps({case: {"limit": error} for case, error in errors.items()})
    assert enough == 10
    assert script.beside("DEM", tmp_path, enough, rounds=3) == [
        "| DEM | reference, ddim | 50 | 0.2000 | 1.000 | 1.0 |",
        "| DEM | ddim | 50 | 0.2000 | 0.500 | 2.0 |",
        "| DEM | dpmpp | 10 | 0.1000 | 0.100 | 10.0 |",
    ]
    assert asked == [("peer", "ddim", 50), ("ours", "ddim", 50), ("ours", "dpmpp", 10)] * 3


def test_decoders_take_turns(scripts):
    script, calls = scripts("samplers"), []
    image = np.ones((script.CROPS, 2, 2, 1), np.float32)
    decoders = {name: lambda name=name, x=x: calls.append(name) or x * image for name, x in (("a", 1), ("b", 3))}
    found = script.timed(decoders, {"limit": 2 * image, "images": image})
    assert calls == ["a", "b"] * (1 + script.REPEATS)
    assert {name: (x["limit"], x["image"]) for name, x in found.items()} == {"a": (1, 0), "b": (1, 2)}


# ---- missing bands ----


def test_errors_of_missing_bands(scripts):
    image = np.zeros((2, 3, 12), np.float32)
    image[..., 0], image[..., 8] = 3, 1  # what nothing tells of B01, and B8A, which stands for B09
    found = {
        how: scripts("missing_bands").errors("S2L2A", [image, 0 * image], ["COASTAL_AEROSOL", "WATER_VAPOR"], how)
        for how in ("neighbours", "zeros")
    }
    assert found["neighbours"] == pytest.approx({"COASTAL_AEROSOL": 4.5**0.5, "WATER_VAPOR": 0.5**0.5})
    assert found["zeros"] == pytest.approx({"COASTAL_AEROSOL": 4.5**0.5, "WATER_VAPOR": 0})


@pytest.mark.usefixtures("compile_fast")
def test_what_missing_bands_do_to_what_is_generated(scripts, tmp_path, monkeypatch):
    """Nothing where the bands are what they are filled with; the mean is further off than a neighbour that is alike."""
    script, image = scripts("missing_bands"), np.repeat(np.random.default_rng(0).normal(size=(1, 50, 52, 1)), 12, axis=-1)
    encoder = STREAMS["untok_sen2l2a@224"], STREAMS["tok_lulc@224"], STREAMS["tok_dem@224"]
    network, tokenizers = random_networks.build(encoder, encoder[1:]), random_networks.build_tokenizers("LULC", "DEM", image_size=48)
    run = random_networks.as_workdir(monkeypatch, tmp_path / "run", network, tokenizers)
    found = script.distances(run, "S2L2A", image.astype(np.float32), ["COASTAL_AEROSOL", "WATER_VAPOR"])
    assert list(found) == ["LULC", "DEM"]
    for name, of in found.items():
        assert of["neighbours"] == 0 < of["zeros"] and of[script.OTHER_SEED] > 0
        assert script.figure(name, 0.123) == ("12%" if name == "LULC" else "0.12")


# ---- any to any ----


@pytest.mark.usefixtures("compile_fast")
def test_a_row_for_each_input_and_a_column_for_each_output(scripts, tmp_path, monkeypatch):
    """Of shards in a store, and of the same tile as GeoTIFFs; from LULC, the only output, nothing is made."""
    script, side, drawn = scripts("any_to_any"), tiny_run.SIZE, []
    encoder = tuple(STREAMS[key] for key in ("untok_dem@224", "untok_sen1grd@224", "tok_lulc@224"))
    module, variables = random_networks.build(encoder, encoder[2:], side)
    tokenizers = random_networks.build_tokenizers("LULC", image_size=side)
    run = random_networks.as_workdir(monkeypatch, tmp_path / "run", (module, variables), tokenizers)
    root = tiny_run.write_shards(tmp_path / "shards", tokens=False)
    config = types.SimpleNamespace(data=types.SimpleNamespace(root=root))
    monkeypatch.setattr(script.pretrain, "load", lambda workdir: (module, variables, config))
    monkeypatch.setattr(script.plot, "images", lambda shown, **options: drawn.append((shown, options)))
    index = script.open_index(root, "val")
    with object_store.serve(root) as (config.data.root, _):
        script.main([str(run), "--tile=s002"])
    config.data.root = root
    tile = {m: script.generation.center(index, 2, m, side) for m in ("DEM", "LULC")}
    place = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), side, side)
    for name, image in tile.items():
        (tmp_path / "tiles" / name).mkdir(parents=True)
        image = image.reshape(side, side, 1).astype(modalities.get(name).dtype)
        geo.write(tmp_path / "tiles" / name / "a.tif", image, like=place, modality=name)
    script.main([str(run), f"--data={tmp_path / 'tiles'}", f"--out={tmp_path / 'b.png'}"])
    for shown, options in drawn:
        assert list(shown) == ["corner", "LULC (true)", "DEM (input)", "LULC from DEM"]
        assert options["columns"] == 2 and shown["corner"] is None
        np.testing.assert_array_equal(shown["LULC (true)"], tile["LULC"])
        np.testing.assert_array_equal(shown["DEM (input)"], tile["DEM"])
        assert shown["LULC from DEM"].shape == (side, side, 10)
    np.testing.assert_array_equal(drawn[0][0]["LULC from DEM"], drawn[1][0]["LULC from DEM"])
    with pytest.raises(SystemExit, match="no held-out sample nowhere"):
        script.main([str(run), "--tile=nowhere"])


def test_elevations_have_the_span_of_the_true_one_about_their_own_level(scripts):
    script, truth = scripts("any_to_any"), np.linspace(500, 700, 64**2).reshape(64, 64, 1)
    shown = {"corner": None, "DEM (true)": truth, "NDVI (true)": 0 * truth, "DEM from S2L2A": truth / 2 + 1000, "DEM from NDVI": None}
    found = script.elevation_limits(shown, {"DEM": truth})
    assert list(found) == ["DEM (true)", "DEM from S2L2A"]
    np.testing.assert_allclose(found["DEM (true)"], script.plot.limits("DEM", truth))
    np.testing.assert_allclose(found["DEM from S2L2A"], np.add(found["DEM (true)"], 700))
    np.testing.assert_allclose(script.elevation_limits(shown, {})["DEM from S2L2A"], (1251, 1349), atol=0.1)


# ---- one training step, beside the reference's ----

NANO = {"model.dim": 64, "model.num_heads": 1, "model.encoder_depth": 1, "model.decoder_depth": 1}
FLAGS = [f"--config.{field}={value}" for field, value in NANO.items()]
PROBES = {"ours": {"gpu": "NVIDIA H200", "cpu": "cpu"}, "peer": {"gpu": "NVIDIA H200", "cpu": "cpu"}}


def flag_of(flags, name):
    return next(flag.partition("=")[2] for flag in flags if flag.startswith(f"--{name}="))


@pytest.fixture
def command(scripts, monkeypatch):
    """Runs train_step.py with fake measurements: ours 3 and the reference 1 token a millisecond; what is asked for is recorded."""
    asked, script = [], scripts("train_step")

    def measure(_, side, *flags, timeout=None):
        if "--probe" in flags:
            return PROBES[side]
        batch, compiled = int(flag_of(flags, "batch")), flag_of(flags, "compile")
        asked.append((side, compiled, batch))
        if compiled == "model":
            raise scripts("process").Failed("one_step.py failed:\nTraceback\nInductorError: no | compiler\n\nSet a variable for more.")
        if batch > 128:
            return {"failed": "out of memory"}
        one = {"tokens": 240 * batch, "seconds": 0.24 * batch / (3 if side == "ours" else 1), "flops": 9e12 * batch, "memory": 2**30}
        return one | {"inputs": 119.0, "targets": 110.0, "peak": 989e12, "bytes_per_s": 4e12, "parameters": 10**9}

    monkeypatch.setattr(scripts("process"), "measure", measure)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(script, "version", lambda package: "1.0")
    return script.main, asked


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| base")]


def test_best_batch_of_each_side_with_ratio_and_utilisation(command, tmp_path, capsys):
    run, asked = command
    run(["--peer", "--sizes=base", "--dtype=bfloat16", "--batch=best", f"--out={tmp_path / 'table.md'}"])
    ours, theirs, compiled = rows_of((tmp_path / "table.md").read_text())
    assert ours[:6] == ["base", "ours", "64", "5.12", "3,000", f"{9e12 * 64 / 5.12 / 989e12:.1%}"]
    assert theirs[:5] == ["base", "reference", "64", "15.4", "1,000"] and theirs[-1] == "3.00"
    assert compiled[1] == "reference, torch.compile (blocks)" and compiled[-1] == "3.00"
    assert [batch for side, compiled, batch in asked if (side, compiled) == ("ours", "no")] == [64, 128, 256]
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out.removesuffix("\n")


def test_rounds_alternate_the_sides(command):
    run, asked = command
    run(["--peer", "--sizes=base", "--batch=4", "--device=cpu", "--rounds=2"])
    assert asked == [("ours", "no", 4), ("peer", "no", 4)] * 2


def test_a_compiler_that_fails_has_a_row_that_says_so(command, capsys):
    run, _ = command
    run(["--peer", "--sizes=base", "--batch=4", "--compile=model"])
    ours, theirs, compiled = rows_of(capsys.readouterr().out)
    assert compiled[2:4] == ["4", "InductorError: no / compiler"] and theirs[-1] == "3.00"


def test_a_batch_that_does_not_fit_has_a_row_that_says_so(command, capsys):
    run, _ = command
    with pytest.raises(SystemExit, match="Not every row has a number"):
        run(["--sizes=base", "--batch=512"])
    assert [row[1:4] for row in rows_of(capsys.readouterr().out)] == [["ours", "512", "out of memory"]]


def test_a_run_ends_in_its_time_with_what_is_there(command, capsys):
    run, asked = command
    with pytest.raises(SystemExit, match="Not every row has a number"):
        run(["--peer", "--sizes=base", "--batch=best", "--minutes=1e-9"])
    assert not asked and [row[3] for row in rows_of(capsys.readouterr().out)] == ["no time left"] * 3


def test_both_sides_run_on_one_kind_of_device(scripts):
    agreed, cpu, both = scripts("train_step").agreed_device, {"cpu": "cpu"}, {"gpu": "NVIDIA H200", "cpu": "cpu"}
    assert agreed(None, {"ours": both, "peer": both}) == "gpu"
    assert agreed(None, {"ours": both, "peer": cpu}) == agreed("cpu", {"ours": both, "peer": both}) == "cpu"
    with pytest.raises(SystemExit, match="--device=gpu: PyTorch sees only cpu; install its build for a gpu"):
        agreed("gpu", {"ours": both, "peer": cpu})


def test_what_counts_as_out_of_memory(scripts):
    found = scripts("one_step").out_of_memory
    for text in ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.", "CUDA out of memory. Tried to allocate 2 GiB"):
        assert found(RuntimeError(text))
    assert not found(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not found(ValueError("out of memory"))


def test_our_step_counts_what_its_batch_holds(scripts, compile_fast, monkeypatch):
    from terramind_jax import flops
    from terramind_jax.train import pretrain

    script = scripts("one_step")
    monkeypatch.setattr(script, "machine", lambda dtype: {"peak": 1.0})
    budgets = ["--config.mask.input_tokens=16", "--config.mask.target_tokens=80", "--config.model.dtype=float32"]
    config = script.configured("tiny", 8, [*FLAGS, *budgets])
    config.data.inputs, config.data.targets = ("DEM",), ("LULC",)  # few streams compile in seconds
    model = pretrain.transformer_config(config)
    slots = [np.concatenate([group[f"{side}_modality"] for group in script.draw_groups(config)]) for side in ("input", "target")]
    inputs, targets = ((x != 255).sum() / 8 for x in slots)
    assert inputs <= 16 and targets < 80  # a third of an image's positions at most
    found = script.ours(config, steps=1)
    assert found["tokens"] == 8 * (inputs + targets) and found["seconds"] > 0 and found["memory"] is None
    assert found["loss"] == pytest.approx(np.log(4375), rel=0.2)
    patches = (slots[0] == [s.kind for s in model.encoder].index("pixels")).sum() / 8
    assert found["flops"] == flops.transformer_step(model, 8, inputs, targets, patches={"untok_dem@224": patches})


@pytest.mark.slow
def test_the_command_as_typed(tmp_path):
    budgets = ["--inputs=16", "--targets=16", "--batch=best", "--first_batch=4", "--max_batch=4", "--steps=1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--sizes=tiny", "--device=cpu", *budgets, *FLAGS]
    done = subprocess.run([*command, f"--out={tmp_path / 'table.md'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| tiny | ours |" in done.stdout and "- tiny, ours: 4: " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


@pytest.mark.parametrize("flags", [["--batch=0"], ["--batch=many"], ["--atention=cudnn"], ["--dtype=float16"]])
def test_wrong_flags_are_named(scripts, flags, capsys):
    with pytest.raises(SystemExit):
        scripts("train_step").main(flags)
    assert flags[0].partition("=")[0] in capsys.readouterr().err


# ---- fine-tuning on the embedded world ----


def test_what_needs_no_image_has_a_score(scripts, tmp_path, monkeypatch):
    """The mean of the labels that are known, and the most common class, of which the ignored one is none."""
    script = scripts("finetune_world")
    monkeypatch.setattr(script.weights, "saved_options", lambda *_: {"sizes": {}, "codebooks": {}})
    heights = {"train": [0.0, 2.0, np.nan, np.nan], "val": [3.0, np.nan, 1.0, 1.0]}  # km
    covers = {"train": [0, 0, 0, 2], "val": [0, 2, 2, 5]}
    for split in heights:
        for folder, array in (("S2L2A", np.ones((12, 16, 16))), ("DEM", heights[split]), ("LULC", covers[split])):
            (tmp_path / folder).mkdir(exist_ok=True)
            array = np.repeat(np.reshape(array, (4, 1)), 64, 0).reshape(16, 16) if folder != "S2L2A" else array
            np.save(tmp_path / folder / f"{split}0000.npy", array.astype(np.float32 if folder != "LULC" else np.uint8))
        (tmp_path / f"{split}.txt").write_text(f"{split}0000")

    def score(task):
        config = script.settings(tmp_path, tmp_path, task, "random", 1.0, 0, 1)
        config.data.crop = 16
        return script.constant(config)

    assert score("DEM") == pytest.approx(math.sqrt(4 / 3))
    with pytest.warns(UserWarning, match="No sample of the val split"):
        assert score("LULC") == pytest.approx((2 / 3 + 0) / 2)


def test_few_seeds_make_few_differences_clear(scripts, capsys):
    """The mean of three must be 4.3 standard errors from zero; of one nothing is told."""
    script = scripts("finetune_world")
    error = 1 / math.sqrt(3)
    assert script.is_clear((-4.31 * error, 1.0), 3) and not script.is_clear((4.29 * error, 1.0), 3)
    assert not script.is_clear((12.7 / math.sqrt(2), 1.0), 2) and script.is_clear((2.1, 1.0), 5)
    with pytest.raises(SystemExit):
        script.main(["--quickstart=none", "--seeds=1"])
    assert "--seeds is 1; of fewer than 2" in capsys.readouterr().err


def test_differences_of_fine_tunings_are_told_by_seed(scripts):
    """Scores that scatter by 10 with the labels, the pretrained ones always 2 to 4 better."""
    script, scores = scripts("finetune_world"), {}
    for task, sign in script.SIGNS.items():
        for share in script.SHARES:
            scores[task, script.CONSTANTS[task], share] = [15.0, 25.0, 35.0]
            random = scores[task, "random", share] = [20.0, 30.0, 40.0]
            better = scores[task, "pretrained", share] = [x + sign * gain for x, gain in zip(random, (2, 3, 4), strict=True)]
            scores[task, script.PAIRS[1][0], share] = [x + off for x, off in zip(better, (-1, 0, 1), strict=True)]
    text = script.report(scores, 60, {"train": 160, "val": 32}, 1.0, "python")
    assert "| random | 30.0 ± 10.0 |" in text and "| pretrained minus random, by seed | -3.0 ± 1.0 |" in text
    assert text.count("pretrained against random: better at 5%, better at 20%, better at 100%") == 2
    assert text.count("TiM of LULC and DEM against pretrained: nothing clear at 5%") == 2
    assert "- pretrained against random: better in 18 of 18 pairs" in text and "against pretrained: better in 6 of 18 pairs" in text
    assert (
        "random against the mean, everywhere: worse at 5%" in text
        and "random against the most common class, everywhere: better at 5%" in text
    )
