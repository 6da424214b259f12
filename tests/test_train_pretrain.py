"""The pretraining loop: it learns, stops, continues with the same numbers, and refuses what cannot work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

import terramind_jax as tm
from terramind_jax import build, checkpoint, modalities, sharding, weights
from terramind_jax import config as configuration
from terramind_jax.train import logging, pretrain

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> Path:
    """The work directory of a finished run of 32 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_run.pretraining(root)
    config.run.update(eval_every=16, probe_scenes=8, tensorboard=True)
    pretrain.train(config, workdir)
    return workdir


def parameters(workdir) -> dict:
    return pretrain.load(workdir)[1]["params"]


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(workdir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in logging.read(workdir) if "loss" in line]


def test_what_was_trained_is_loaded_as_a_model(finished, tmp_path):
    """With its own sizes and codebooks; also from the folder that the quickstart makes."""
    (tmp_path / "model").symlink_to(finished)
    for where in (finished, tmp_path):
        model = tm.load("terramind_v1_base", where, modalities=["DEM"])
        assert (model.module.config.dim, model.module.config.image_size) == (64, tiny_run.SIZE)
        assert_equal(model.variables["params"]["encoder"], parameters(finished)["encoder"])
    told = weights.saved_options("terramind_v1_base_generate", tmp_path)
    generator = build.model("terramind_v1_base_generate", modalities=["DEM"], output_modalities=["LULC"], **told)
    assert generator.module.config.decoder[0].vocab_size == tiny_run.CODEBOOKS["LULC"]


def test_a_run_tells_how_many_samples_have_tokens(tmp_path):
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path))
    config.data.targets = ("DEM", "LULC", "NDVI")
    tiny_run.write_tokens(tmp_path, "train", "LULC", [3])
    index = pretrain.open_tokenized(config, "train")
    assert pretrain.tokens_told(config, index) == " with tokens of DEM (12), LULC (1), NDVI (0)"
    config.data.online_tokens = True
    assert pretrain.tokens_told(config, index) == ""


def test_a_run_learns_and_reports(finished):
    lines = logging.read(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 33))
    assert np.mean([line["loss"] for line in steps[-5:]]) < 0.8 * steps[0]["loss"]
    assert steps[0]["learning_rate"] == 0
    assert {"loss/DEM", "loss/LULC", "tokens_per_second", "mfu", "data_wait", "checkpoint_block", "goodput"} <= steps[-1].keys()
    assert {"overflow", "rewinds", "samples", "learning_rate"} <= steps[-1].keys()
    norms = [steps[-1][f"grad_norm/{part}"] for part in ("embeddings", "encoder", "decoder")]
    assert steps[-1]["grad_norm"] == pytest.approx(np.linalg.norm(norms))
    assert steps[-1]["bad"] > 0  # the unreadable sample keeps its slot and is trained around
    assert steps[-1]["skipped"] == 0
    assert list((finished / "tensorboard").iterdir())


def test_validation_has_fixed_masks_every_modality_and_whole_scenes(finished):
    validations = [line for line in logging.read(finished) if "val/loss" in line]
    assert [line["step"] for line in validations] == [16, 32]
    scenes = {"val/generated/LULC", "val/knn", "val/knn_majority"}
    assert validations[0].keys() == {"step", "val/loss", "val/loss/DEM", "val/loss/LULC"} | scenes
    assert validations[1]["val/loss/LULC"] < validations[0]["val/loss/LULC"]


def test_load_gives_module_and_variables(finished):
    module, variables, config = pretrain.load(finished)
    assert config.train.steps == 32
    assert {s.key: s.vocab_size for s in module.config.decoder} == {"tok_dem@224": 30, "tok_lulc@224": 20}
    ids = np.zeros((1, 4), np.int32)
    content, _ = module.apply(variables, "tok_lulc@224", ids, method="embed")
    assert content.shape == (1, 4, 64)


def test_a_finished_run_is_left_alone(root, finished):
    before = (finished / "metrics.jsonl").read_text()
    assert pretrain.train(tiny_run.pretraining(root), finished)["step"] == 32
    assert (finished / "metrics.jsonl").read_text() == before


def test_sigterm_saves_and_the_same_command_goes_on(root, finished, tmp_path, monkeypatch):
    write = logging.Writer.write

    def interrupting(self, step, scalars):
        write(self, step, scalars)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logging.Writer, "write", interrupting)
    with pytest.raises(checkpoint.Terminated, match=r"Stopped by SIGTERM at step 6 of 32; the checkpoint is saved"):
        pretrain.train(tiny_run.pretraining(root), tmp_path)
    monkeypatch.undo()
    pretrain.train(tiny_run.pretraining(root), tmp_path)
    assert_equal(parameters(tmp_path), parameters(finished))
    assert losses(tmp_path) == losses(finished)


def test_a_batch_that_is_not_on_the_devices_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "to_global", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        pretrain.train(tiny_run.pretraining(root), tmp_path)


def test_microbatches_are_whole_groups_on_every_device(root):
    config = tiny_run.pretraining(root)
    config.train.update(batch_size=16, accumulate=2)
    pretrain.check_mesh(config, sharding.make_mesh())
    config.data.patch_group = 2
    message = r"train\.batch_size=16 must be a multiple of 32: data\.patch_group=2 for each of 8 devices, train\.accumulate=2 times\."
    with pytest.raises(ValueError, match=message):
        pretrain.check_mesh(config, sharding.make_mesh())


def test_fsdp_wider_than_pays_is_warned_of(root):
    config = tiny_run.pretraining(root)
    with pytest.warns(UserWarning, match=r"mesh\.fsdp=2 leaves 32 rows of model\.dim=64 on a device; below 96 it moves more bytes"):
        pretrain.check_mesh(config, sharding.make_mesh(fsdp=2))


@pytest.mark.parametrize(
    ("platform", "changes", "need"),
    [
        ("cpu", {}, "an NVIDIA GPU, not a cpu"),
        ("tpu", {}, "an NVIDIA GPU, not a tpu"),
        ("gpu", {"model.dtype": "float32"}, "model.dtype bfloat16, not float32"),
        ("gpu", {"model.num_heads": 16}, "a multiple of 8 up to 128, not 4"),
        ("gpu", {"mask.input_tokens": 7}, "even budgets, not mask.input_tokens=7 and mask.target_tokens=128"),
    ],
)
def test_cudnn_where_it_cannot_run_is_refused(platform, changes, need):
    config = configuration.pretraining()
    config.model.update(attention="cudnn", dim=64, num_heads=1)
    pretrain.check_attention(config, "gpu")
    for field, value in changes.items():
        group, name = field.split(".")
        config[group][name] = value
    with pytest.raises(ValueError, match=f"^model.attention='cudnn' needs .*{need}; or set it to 'xla'.$"):
        pretrain.check_attention(config, platform)


def test_auto_is_bfloat16_on_accelerators():
    config = configuration.pretraining()
    assert [pretrain.transformer_config(config, platform).dtype for platform in ("cpu", "gpu", "tpu")] == ["float32", *["bfloat16"] * 2]


def test_streams_of_the_released_model():
    encoder, decoder = pretrain.streams(configuration.pretraining())
    assert (encoder, decoder) == (modalities.ENCODER_STREAMS, modalities.DECODER_STREAMS)


def record(root: Path, **facts) -> None:
    folder = root / "train" / "DEM_tokens"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(facts))


def test_vocabularies_are_read_beside_the_tokens(tmp_path):
    record(tmp_path, codebook_size=64)
    config = configuration.pretraining()
    config.data.tokens = str(tmp_path)
    _, decoder = pretrain.streams(pretrain.with_codebooks(config))
    assert {s.modality: s.vocab_size for s in decoder}["DEM"] == 64
    assert not config.model.codebooks
    configuration.override(config, "model.codebooks", "{'DEM': 512}")
    with pytest.raises(ValueError, match=r"model\.codebooks\.DEM=512, but the tokens in .* come from a codebook of 64"):
        pretrain.with_codebooks(config)
    record(tmp_path, codebook_size=512, num_codebooks=2)
    with pytest.raises(ValueError, match=r"model\.codebooks\.DEM=512, but the tokens in .* come from 2 codebooks of 512"):
        pretrain.with_codebooks(config)


def test_what_cannot_work_is_one_sentence(root, finished, tmp_path):
    untokenized = tiny_run.write_shards(tmp_path / "shards", tokens=False)
    with pytest.raises(ValueError, match=r"There are no token shards under .*train; make them with terramind-jax tokenize"):
        pretrain.train(tiny_run.pretraining(untokenized), tmp_path / "a")
    with pytest.raises(ValueError, match=r"config\.data\.root is empty"):
        pretrain.train(tiny_run.pretraining(""), tmp_path / "b")
    config = tiny_run.pretraining(root)
    config.train.batch_size = 4
    with pytest.raises(ValueError, match=r"train\.batch_size=4 must be a multiple of 8"):
        pretrain.train(config, tmp_path / "c")
    config = tiny_run.pretraining(root)
    config.model.dim = 128
    with pytest.raises(ValueError, match=r"holds a run with model\.dim=64, not 128"):
        pretrain.train(config, finished)


def test_a_run_goes_on_with_its_own_samples_only(root, finished, tmp_path):
    """As many of them with other keys, too; whoever wants others says so."""
    workdir, other = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(finished, workdir)
    shutil.copytree(root, other)
    for folder in ("DEM", "LULC", "DEM_tokens", "LULC_tokens"):
        path = other / "train" / folder / "tiny_shard_000001.tar"
        with tarfile.open(path, "w") as tar, tarfile.open(root / "train" / folder / path.name) as old:
            for member in old:
                content = old.extractfile(member)
                member.name = member.name.replace("s011", "s111")
                tar.addfile(member, content)
    config = tiny_run.pretraining(other)
    with pytest.raises(
        ValueError, match=r"is trained on 12 samples, and the 12 of config.data.root differ from them in keys, .* delete .*data.json"
    ):
        pretrain.train(config, workdir)
    (workdir / "data.json").unlink()
    pretrain.train(config, workdir)


def test_a_refused_start_leaves_the_workdir_free(root, tmp_path, monkeypatch):
    """Whatever is wrong, it is said before anything is written, so that the corrected command may use the same folder."""
    wrong = {
        "model.dtype": "float17",
        "run.keep": 0,
        "mesh.data": 3,
        "train.batch_size": 4,
        "data.view_window": 7,
        "mask.input_tokens": 0,
        "model.image_size": 64,
        "data.targets": ("S1GRD",),
    }
    for field, value in wrong.items():
        config = tiny_run.pretraining(root)
        group, name = field.split(".")
        config[group][name] = value
        with pytest.raises(ValueError, match=r"^[^\n]*[.]$"):
            pretrain.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists(), field
    monkeypatch.setattr(tiny_run, "CODEBOOKS", {"DEM": 1, "LULC": 1})
    with pytest.raises(ValueError, match="its vocabulary has 1; tokenize again, or correct tokenizer.json"):
        pretrain.train(tiny_run.pretraining(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_no_model_generates_is_no_target(tmp_path):
    config = tiny_run.pretraining(tmp_path)
    config.data.targets = ("DEM", "S2RGB")
    with pytest.raises(ValueError, match="No model generates S2RGB; S2L2A is the nearest"):
        pretrain.streams(config)


def test_validation_data_that_cannot_work_is_said_at_the_start(tmp_path):
    root = tiny_run.write_shards(tmp_path / "shards")
    for path in (root / "val").glob("DEM_tokens/*.tar"):
        path.unlink()
    config = tiny_run.pretraining(root)
    config.data.update(inputs=("LULC",), targets=("DEM",))
    with pytest.raises(ValueError, match="None of the 5 samples has both an input|There are no token shards under .*val"):
        pretrain.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def command(config: Path, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "terramind_jax", "pretrain", f"--config={config}", f"--workdir={workdir}"]


@pytest.mark.parametrize(("devices", "workers"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 2)])
def test_fewer_devices_and_more_workers_give_the_same_losses(root, finished, tmp_path, devices, workers):
    path = tiny_run.write_config(tmp_path / "config.py", tiny_run.pretraining(root))
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command(path, tmp_path / "run"), f"--config.run.workers={workers}"], env=environment, check=True, capture_output=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished), rtol=1e-5)
