"""benchmarks/train_step.py with the reference beside ours, on a small model."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NANO = {"model.dim": 64, "model.num_heads": 1, "model.encoder_depth": 1, "model.decoder_depth": 1}
FLAGS = [f"--config.{field}={value}" for field, value in NANO.items()]


@pytest.mark.parametrize(("dtype", "compiled"), [("float32", "blocks"), ("bfloat16", "model")])
def test_the_references_step_compiled_or_not(monkeypatch, dtype, compiled):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import one_step

    # Traced and guarded as by default, but not made into machine code, which takes a minute.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    budgets = ["--config.mask.input_tokens=16", "--config.mask.target_tokens=16", f"--config.model.dtype={dtype}"]
    config = one_step.configured("tiny", 8, [*FLAGS, *budgets])
    eager, found = (one_step.peer(config, 1, "cpu", mode) for mode in ("no", compiled))
    assert found["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    assert eager["tokens"] == one_step.work(config, one_step.draw_groups(config))["tokens"]


def test_both_sides_in_one_run(tmp_path):
    flags = ["--peer", "--sizes=tiny", "--device=cpu", "--batch=4", "--inputs=16", "--targets=16", "--steps=1", *FLAGS]
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *flags, f"--out={tmp_path / 'table.md'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (line.split("|") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| tiny"))
    assert ours[2].strip() == "ours" and theirs[2].strip() == "reference" and float(theirs[-2]) > 0


def test_a_gpu_that_pytorch_does_not_see_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("PyTorch sees a GPU")
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--peer", "--device=gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "--device=gpu: " in done.stderr and done.stderr.count("\n") == 1
