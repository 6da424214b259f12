"""The command line: help without imports, one-sentence errors, arguments that reach their functions."""

import argparse
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest
import tiny_run

from terramind_jax import cli, decoding, generate_scenes
from terramind_jax.cli import arguments, evaluate
from terramind_jax.tokenizer import diffusion

REPOSITORY = Path(__file__).parents[1]


def test_help_imports_nothing_heavy():
    code = """
import sys, terramind_jax.cli
try:
    terramind_jax.cli.main(["--help"])
except SystemExit:
    assert not {"jax", "numpy", "orbax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("pretrain", "train-tokenizer", "tokenize", "generate", "embed", "quickstart", "data", "info"):
        assert command in done.stdout


def test_errors_of_the_system_and_warnings_are_sentences(monkeypatch, capsys):
    texts, usual = [], warnings.formatwarning

    def open_a_file(parsed):
        for category, filename in ((UserWarning, cli.__file__), (UserWarning, "a.py"), (DeprecationWarning, cli.__file__)):
            texts.append(warnings.formatwarning("It is late.", category, filename, 1, line="x"))
        raise NotADirectoryError(20, "Not a directory", "a.txt/x")

    monkeypatch.setattr(cli, "_info", open_a_file)
    assert cli.main(["info"]) == 2 and capsys.readouterr().err == "error: a.txt/x: Not a directory.\n"
    assert texts[0] == "warning: It is late.\n" and texts[1] == "a.py:1: UserWarning: It is late.\n  x\n"
    assert "1: DeprecationWarning: It is late." in texts[2] and warnings.formatwarning is usual


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["pretrain", "--config=c.py", "--workdir=runs/x"], "The last checkpoint, if there is one yet, stays in runs/x"),
        (["tokenize", "--data=d", "--weights=w"], "Shards that are done stay"),
        (["evaluate", "pangaea", "--weights=w", "--dataset=mados", "--data=d", "--out=o"], "The training so far stays in o"),
        (["info"], ""),
    ],
)
def test_a_command_that_goes_on_says_so_when_it_is_stopped(arguments, kept, monkeypatch, capsys):
    def stop(parsed):
        raise KeyboardInterrupt

    for name in ("_pretrain", "_tokenize", "_info"):
        monkeypatch.setattr(cli, name, stop)
    monkeypatch.setattr(evaluate, "_pangaea", stop)
    assert cli.main(arguments) == cli.STOPPED
    assert capsys.readouterr().err == (f"\nStopped. {kept}; the same command goes on from there.\n" if kept else "")


def test_a_stopped_command_leaves_at_once_whatever_its_threads_do():
    program = (
        "import threading, time\n"
        "from terramind_jax import __main__, cli\n"
        "def stop(parsed):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "cli._info = stop\n"
        "print('so far')\n"
        "__main__.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (cli.STOPPED, "so far\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--config=none.py", "--workdir=x"], "error: No configuration file none.py."),
        (["pretrain", "--config=configs/pretrain/tiny.py", "--workdir=x", "--config.modle.dim=3"], "did you mean 'model'?"),
        (["pretrain", "--config=configs/pretrain/tiny.py", "--workdir=x", "--nonsense=3"], "Unknown argument '--nonsense'"),
        (["generate", "--weights=w", "--input=S2L2A", "--to=DEM", "--out=o"], "--input takes MODALITY=PATH"),
        (["data", "pack", "tests", "o", "--offset=5"], "--offset takes MODALITY=VALUE"),
        (["generate", "--weights=w", "--input=S2L2A=nowhere.tif", "--to=DEM", "--out=o"], "there is no file or folder nowhere.tif"),
    ],
)
def test_errors_of_use_are_one_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["pretrain", "--config=none.py", "--workdir=x"])


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(parsed):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "_info", fail)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_compiled_programs_are_kept_where_that_can_be(monkeypatch, tmp_path):
    def kept(cache, given=None):
        monkeypatch.delenv(cli.PROGRAMS)
        monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(cache))
        if given is not None:
            monkeypatch.setenv(cli.PROGRAMS, given)
        assert cli.main(["info"]) == 0
        return os.environ.get(cli.PROGRAMS)

    (tmp_path / "file").touch()
    folder = Path(kept(tmp_path / "cache"))
    assert folder.is_relative_to(tmp_path / "cache") and folder.is_dir()
    assert kept(tmp_path / "cache", given="elsewhere") == "elsewhere" and kept(tmp_path / "cache", given="") == ""
    assert kept(tmp_path / "file") is None


def test_stray_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--config.model.dim=3"])
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


LINE = "generate --model=terramind_v1_base_generate --weights=W --input S2L2A=scene.tif --to S1GRD,LULC --seed=0 --timesteps=10 --out=DIR"


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ("", {}),
        (
            "--samples=3 --overlap=32 --clip=none --sampler=ddim --temperature=0 --top_p=0.5 --guidance_scale=2 --bands S2L2A=B02,B03",
            dict(
                bands={"S2L2A": ["B02", "B03"]},
                samples=3,
                overlap=32,
                clip="none",
                sampler="ddim",
                temperature=0.0,
                top_p=0.5,
                guidance_scale=2.0,
            ),
        ),
    ],
)
def test_generate_passes_its_arguments_on(more, changes, monkeypatch, tmp_path):
    """The line as users type it; what it does not name is left to the function, or has the function's own default."""
    parameters = {**inspect.signature(decoding.generate_tokens).parameters, **inspect.signature(generate_scenes.run).parameters}
    seen, defaults = {}, {name: parameter.default for name, parameter in parameters.items()}
    monkeypatch.setattr(generate_scenes, "run", lambda **arguments: seen.update(arguments))
    monkeypatch.chdir(tmp_path)
    Path("scene.tif").touch()
    assert cli.main(f"{LINE} {more}".split()) == 0
    asked = dict(model="terramind_v1_base_generate", weights="W", inputs={"S2L2A": "scene.tif"}, to=["S1GRD", "LULC"], out="DIR")
    asked |= dict(seed=0, timesteps=10, bands={}) | changes
    assert {name: seen[name] for name in asked} == asked
    assert {name: value for name, value in seen.items() if name not in asked and value != defaults[name]} == {}
    with pytest.raises(ValueError, match="twice"):
        arguments.read_inputs(["DEM=scene.tif", "DEM=scene.tif"])
    for pairs, message in ((["S2L2A"], "--bands takes MODALITY=A,B"), (["S2L2A=,"], "--bands takes"), (["S2L2A=B02"] * 2, "twice")):
        with pytest.raises(ValueError, match=message):
            arguments.read_bands(pairs)


def test_what_the_command_line_says_of_samplers_is_so():
    assert set(arguments.SAMPLERS) == set(get_args(diffusion.Sampler)) and set(arguments.CLIPS) == set(get_args(diffusion.Clip))
    parser = argparse.ArgumentParser()
    arguments.add_diffusion(parser)
    steps = next(action.help for action in parser._actions if action.dest == "timesteps")
    assert f"{diffusion.STEPS['dpmpp']} of dpmpp" in steps and f"{diffusion.STEPS['ddim']} of ddim" in steps
    assert f"{diffusion.STEPS['ddpm']} of ddpm" in steps


def test_info_names_devices_and_models(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "terramind_v1_tiny" in text
    assert "devices" in text


def test_data_commands_reach_the_shards(tmp_path, capsys):
    root = str(tiny_run.write_shards(tmp_path))
    assert cli.main(["data", "index", root]) == 0
    assert "train: 12 locations" in capsys.readouterr().out
    assert cli.main(["data", "check", root, "--workers=1"]) == 1
    assert "'s003'" in capsys.readouterr().out
    assert cli.main(["data", "stats", root, "--workers=1"]) == 2
    assert "error: " in (text := capsys.readouterr().err) and "'s003'" in text
    assert cli.main(["data", "check", str(tmp_path / "train")]) == 2
    assert "No splits in" in capsys.readouterr().err
