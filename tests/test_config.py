"""Configuration files, overrides and work directories."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax.model import layers
from terramind_jax.tasks.config import finetuning

REPOSITORY = Path(__file__).parents[1]
FILES = ("pretrain/tiny", "pretrain/small", "pretrain/base", "pretrain/large", "pretrain/xl") + tuple(
    f"tokenizer/{name}" for name in ("s2l2a", "s1grd", "s1rtc", "dem", "lulc", "ndvi")
)


@pytest.fixture
def config() -> ConfigDict:
    return configuration.pretraining()


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_loads_and_survives_json(name):
    config = configuration.read(REPOSITORY / "configs" / f"{name}.py")
    defaults = configuration.pretraining() if name.startswith("pretrain") else configuration.tokenizer_training()
    configuration.check(config, "pretrain" if name.startswith("pretrain") else "train-tokenizer")
    assert configuration._flat(config).keys() == configuration._flat(defaults).keys()
    assert configuration.from_json(configuration.to_json(config)) == config


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("model.dim", "256", 256),
        ("run.log_every", "1e3", 1000),
        ("model.gated_mlp", "true", True),
        ("train.total_tokens", "5e9", 5e9),
        ("train.loss", "token", "token"),
        ("data.root", "", ""),
        ("optimizer.betas", "(0.9, 0.99)", (0.9, 0.99)),
        ("optimizer.betas", "0.9,0.99", (0.9, 0.99)),
        ("data.inputs", "S2L2A,DEM", ("S2L2A", "DEM")),
        ("data.inputs", "S2L2A", ("S2L2A",)),
        ("mask.input_alphas", "({'pixels': 1.0}, 0.5)", ({"pixels": 1.0}, 0.5)),
    ],
)
def test_overrides_take_the_type_of_the_field(config, field, text, value):
    configuration.override(config, field, text)
    group, name = field.split(".")
    assert config[group][name] == value
    assert type(config[group][name]) is type(value)


def test_names_are_taken_where_there_were_none():
    config = finetuning()
    configuration.override(config, "model.modalities", "S1GRD,S2L1C")
    assert config.model.modalities == ("S1GRD", "S2L1C")
    with pytest.raises(ValueError, match="'model.layers' takes a value of type tuple"):
        configuration.override(config, "model.layers", "last")


def test_an_open_dict_is_replaced(config):
    configuration.override(config, "model.codebooks", '{"DEM": 512, "NDVI": (8, 128)}')
    assert config.model.codebooks.to_dict() == {"DEM": 512, "NDVI": (8, 128)}
    assert configuration.from_json(configuration.to_json(config)) == config


def test_an_open_dict_takes_names_one_by_one(config):
    configuration.override(config, "data.subset_weights.majortom", "0.8")
    configuration.override(config, "data.subset_weights.ssl4eos12", "1")
    configuration.override(config, "data.subset_weights.majortom", "2.5")
    assert config.data.subset_weights.to_dict() == {"majortom": 2.5, "ssl4eos12": 1}
    assert configuration.from_json(configuration.to_json(config)) == config


@pytest.mark.parametrize("text", ["8", "8,", "(8,)"])
def test_a_tuple_of_one(config, text):
    configuration.override(config, "mask.target_alphas", text)
    assert config.mask.target_alphas == (8,)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("model.dims", "1", "Config field 'model.dims' does not exist; did you mean 'model.dim'?"),
        ("modle.dim", "1", "Config field 'modle' does not exist; did you mean 'model'?"),
        ("model.dim.x", "1", "Config field 'model.dim' is a value"),
        ("model.dim", "1.5", "Config field 'model.dim' takes a value of type int such as 192, not '1.5'."),
        ("model.gated_mlp", "maybe", "takes a value of type bool"),
        ("optimizer.betas", "(a", "takes a value of type tuple"),
        ("data.inputs", "(1, 2)", "takes a value of type tuple"),
        ("model.codebooks", "[1]", "takes a value of type dict"),
        ("data.subset_weights.majortom", "much", "'data.subset_weights.majortom' takes a number, not 'much'"),
    ],
)
def test_a_wrong_override_is_one_sentence(config, field, text, message):
    with pytest.raises(ValueError, match=".") as error:
        configuration.override(config, field, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_load_reads_both_spellings_of_an_override():
    path = REPOSITORY / "configs/pretrain/tiny.py"
    config = configuration.load(path, ["--config.train.steps=20", "--config.train.batch_size", "8"])
    assert (config.train.steps, config.train.batch_size) == (20, 8)
    with pytest.raises(ValueError, match="Unknown argument '--steps'"):
        configuration.load(path, ["--steps=20"])
    with pytest.raises(ValueError, match="has no value"):
        configuration.load(path, ["--config.train.steps"])


def test_a_file_that_is_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="No configuration file"):
        configuration.read(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="does not define get_config"):
        configuration.read(tmp_path / "empty.py")
    (tmp_path / "wrong.py").write_text("\ndef get_config(:\n")
    with pytest.raises(ValueError, match=r"wrong.py is no Python that can be read: invalid syntax in line 2\."):
        configuration.read(tmp_path / "wrong.py")
    (tmp_path / "number.py").write_text("get_config = lambda: 5\n")
    with pytest.raises(ValueError, match=r"get_config\(\) of .*number.py returns a int; expected a ConfigDict"):
        configuration.read(tmp_path / "number.py")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("pretrain")])
def test_documented_workers_find_later_views_in_memory(name):
    path = REPOSITORY / "configs" / f"{name}.py"
    config = configuration.read(path)
    workers = max(map(int, re.findall(r"--config\.run\.workers=(\d+)", path.read_text())), default=1)
    assert config.data.view_window % (config.train.batch_size * workers) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run.keep", 0, "run.keep=0; expected at least 1."),
        ("run.log_every", 0, "run.log_every=0; expected at least 1."),
        ("run.checkpoint_every", 0, "run.checkpoint_every=0; expected at least 1."),
        ("train.batch_size", 0, "train.batch_size=0; expected at least 1."),
        ("model.remat", "foo", "model.remat='foo'; expected one of none, dots, full."),
        ("model.dtype", "float17", "model.dtype='float17'; expected one of auto, float32, bfloat16."),
        ("model.num_heads", 0, "model.num_heads=0; expected at least 1."),
        ("model.num_heads", 5, "model.dim=192 must be a multiple of 4, for the positions, and of model.num_heads=5."),
        ("model.dim", 66, "model.dim=66 must be a multiple of 4"),
        ("train.loss", "sum", "train.loss='sum'; expected one of mod, token."),
        ("data.inputs", "DEM,LULC,DEM", "data.inputs names DEM twice; name each modality once."),
        ("data.targets", "DEM,DEM", "data.targets names DEM twice; name each modality once."),
        ("data.subset_weights.majortom", 0, "data.subset_weights.majortom=0; expected a number above 0"),
        ("data.subset_weights", {"majortom": "a"}, "data.subset_weights.majortom='a'; expected a number above 0"),
        (
            "model.codebooks",
            {"DEM": (8, 0)},
            "model.codebooks.DEM=(8, 0); expected a vocabulary such as 512, or with it codebooks, (8, 128).",
        ),
    ],
)
def test_a_value_that_cannot_work_is_one_sentence(config, field, value, message):
    configuration.check(config, "pretrain")
    configuration.override(config, field, str(value))
    with pytest.raises(ValueError, match=re.escape(message)):
        configuration.check(config, "pretrain")


def test_every_known_way_to_save_memory_is_allowed():
    assert configuration._ONE_OF["model.remat"] == tuple(layers.REMAT_POLICIES)


def test_a_workdir_belongs_to_one_configuration(config, tmp_path):
    configuration.bind_workdir(config, tmp_path)
    assert configuration.of_workdir(tmp_path) == config
    with config.unlocked():
        config.run.log_every = 1
        config.data.root = "elsewhere"
        config.mesh.fsdp = 2
    configuration.bind_workdir(config, tmp_path)
    assert configuration.of_workdir(tmp_path).data.root == "elsewhere"
    config.optimizer.learning_rate = 1.0
    with pytest.raises(ValueError, match=r"holds a run with optimizer\.learning_rate=0\.000\d+, not 1\.0"):
        configuration.bind_workdir(config, tmp_path)
    assert configuration.of_workdir(tmp_path).optimizer.learning_rate < 1
    with pytest.raises(ValueError, match="is the work directory of pretrain, not of train-tokenizer; choose another --workdir"):
        configuration.bind_workdir(configuration.tokenizer_training(), tmp_path)


@pytest.mark.parametrize("command", ["pretrain", "train-tokenizer", "finetune"])
def test_a_run_that_is_older_than_a_field_goes_on_with_its_default(command, tmp_path):
    config = configuration.defaults(command)
    assert configuration.command_of(config) == command
    old = config.to_dict()
    del old["optimizer"]["weight_decay"]
    (tmp_path / "config.json").write_text(configuration.to_json(ConfigDict(old)))
    usual, config.optimizer.weight_decay = config.optimizer.weight_decay, 0.5
    with pytest.raises(ValueError, match=rf"holds a run with optimizer\.weight_decay={usual}, not 0\.5"):
        configuration.bind_workdir(config, tmp_path)
    config.optimizer.weight_decay = usual
    configuration.bind_workdir(config, tmp_path)
    assert configuration.of_workdir(tmp_path) == config


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the work directory"):
        configuration.of_workdir(tmp_path)
