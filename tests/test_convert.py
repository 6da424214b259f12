"""Weights in and out: rules and files round-trip, and whatever is wrong with either is said in one sentence."""

import dataclasses
import json
import pickle
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import nano_models
import numpy as np
import pytest

import terramind_jax as tm
from terramind_jax import build, cli, weights
from terramind_jax.convert import files, rules
from terramind_jax.convert.rules import Rule
from terramind_jax.modalities import STREAMS
from terramind_jax.model import TerraMind, TransformerConfig
from terramind_jax.sources import rules_of

CONFIG = TransformerConfig(
    dim=64,
    encoder_depth=2,
    decoder_depth=1,
    num_heads=1,
    gated_mlp=False,
    use_bias=True,
    encoder=(STREAMS["untok_dem@224"], STREAMS["tok_lulc@224"]),
    decoder=(STREAMS["tok_lulc@224"],),
)
TIED = ("decoder_embeddings.tok_lulc@224.token_emb.weight", "decoder_embeddings.tok_lulc@224.to_logits.weight")


@pytest.fixture(scope="module")
def network():
    module = TerraMind(CONFIG)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), build.abstract(module))
    return rules_of(module), build.abstract(module), variables


@pytest.fixture
def state(network):
    return rules.to_torch(network[2], network[0])


def test_there_and_back_is_the_identity(network, state):
    table, abstract, variables = network
    assert rules.shapes(abstract, table) == {name: x.shape for name, x in state.items()}
    assert state[TIED[0]] is state[TIED[1]]
    back = rules.from_torch(dict(state), table, abstract)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, back))


def test_heads_layers_and_patches_land_where_the_reference_has_them(network, state):
    params = network[2]["params"]
    qkv = params["encoder"]["attn"]["qkv"]["kernel"][1]  # [D, 3, h, d] of the second layer
    np.testing.assert_array_equal(state["encoder.1.attn.qkv.weight"][64 + 5], qkv[:, 1, 0, 5])  # fifth channel of k
    np.testing.assert_array_equal(
        state["decoder.0.cross_attn.proj.weight"][7], params["decoder"]["cross_attn"]["proj"]["kernel"][0, 0, :, 7]
    )
    np.testing.assert_array_equal(state["encoder_embeddings.untok_dem@224.proj.weight"], params["patch_proj"]["untok_dem@224"].T)
    assert state["encoder_embeddings.tok_lulc@224.pos_emb"].shape == (1, 196, 64)


@pytest.mark.parametrize(
    ("layout", "ours", "torch"),
    [
        (Rule("x", ("x",), "conv"), (3, 3, 4, 5), (5, 4, 3, 3)),
        (Rule("x", ("x",), "conv1d"), (4, 5), (5, 4, 1)),
        (Rule("x", ("x",), "conv1x1"), (4, 5), (5, 4, 1, 1)),
        (Rule("x", ("x",), "chw"), (2, 3, 4), (1, 4, 2, 3)),
        (Rule("x", ("x",), "linear", inputs=2), (2, 3, 4), (4, 6)),
        (Rule("x", ("x",), "ones", shape=(1, -1)), (2, 3), (1, 6)),
    ],
)
def test_layouts_have_inverses(layout, ours, torch):
    x = np.arange(np.prod(ours)).reshape(ours)
    there = rules.to_torch_layout(layout, x)
    assert there.shape == torch
    np.testing.assert_array_equal(rules.to_our_layout(layout, there, ours), x)


def test_everything_wrong_is_said_at_once(network, state):
    table, abstract, _ = network
    broken = dict(state)
    del broken["mask_token"]
    broken["extra"] = np.zeros(1, np.float32)
    broken["encoder_norm.weight"] = np.zeros(32, np.float32)
    broken["decoder_norm.weight"] = np.zeros(64, np.int32)
    broken[TIED[1]] = broken[TIED[1]] + 1
    before = set(broken)
    with pytest.raises(ValueError, match="do not fit") as error:
        rules.from_torch(broken, table, abstract)
    for text in ("1 missing (mask_token)", "1 unexpected (extra)", "(32,) instead of (64,)", "decoder_norm.weight int32", "differs from"):
        assert text in str(error.value)
    assert set(broken) == before  # nothing was taken out


def test_what_is_optional_or_ignored_may_differ(network, state):
    table, abstract, _ = network
    state = {name: x for name, x in state.items() if name != "mask_token"} | {"tokenizer.x": np.zeros(1)}
    found = rules.from_torch(state, table, abstract, optional=lambda path: path.endswith("mask_token"), ignore=("tokenizer.*",))
    assert "mask_token" not in found["params"] and "encoder" in found["params"]


def test_halves_become_float32(network, state):
    table, abstract, variables = network
    halves = {name: x.astype(ml_dtypes.bfloat16) for name, x in state.items()}
    back = rules.from_torch(halves, table, abstract)
    assert back["params"]["mask_token"].dtype == np.float32
    np.testing.assert_allclose(back["params"]["mask_token"], variables["params"]["mask_token"], rtol=1e-2)


# ---- files ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_safetensors_keep_every_bit(tmp_path, dtype):
    from safetensors.numpy import load_file

    state = {"a.b@224": np.arange(6).reshape(2, 3).astype(dtype), "scalar": np.array(3).astype(dtype), "empty": np.zeros((0, 2), dtype)}
    files.write(tmp_path / "x.safetensors", state)
    library, ours = load_file(tmp_path / "x.safetensors"), files.read(tmp_path / "x.safetensors")
    for name, x in state.items():
        assert library[name].dtype == ours[name].dtype == x.dtype and ours[name].shape == x.shape
        assert np.asarray(ours[name]).tobytes() == library[name].tobytes() == x.tobytes()


def test_damaged_and_foreign_files(tmp_path, state):
    path = tmp_path / "x.safetensors"
    files.write(path, state)
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-1])
    (tmp_path / "foreign.safetensors").write_bytes(b"hello, this is no tensor")
    for name in ("short", "foreign"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is no complete safetensors file"):
            files.read(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file .*none.pt"):
        files.read(tmp_path / "none.pt")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown suffix; expected .pt, .pth, .bin, .ckpt or .safetensors"):
        files.read(tmp_path / "x.npz")


def test_nothing_is_replaced_and_nothing_half_written(tmp_path, state):
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; choose another name"):
        files.write(path, state)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="a is complex64, which .safetensors files"):
        files.write(tmp_path / "y.safetensors", {"a": np.zeros(1, np.complex64)})
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "half").write_text("")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').write_text('')",)


def test_pytorch_files(tmp_path, monkeypatch, state):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    files.write(tmp_path / "x.pt", state)
    back = files.read(tmp_path / "x.pt")
    assert back[TIED[0]] is back[TIED[1]] and list(back) == list(state)
    assert all(np.asarray(back[name]).tobytes() == x.tobytes() for name, x in state.items())
    (tmp_path / "short.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-1000])
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "photo.pt").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "zipped.pt", "w", zipfile.ZIP_DEFLATED) as zipped:
        for member in plain.namelist():
            zipped.writestr(member, plain.read(member))
    again = files.read(tmp_path / "zipped.pt")
    assert all(np.asarray(again[name]).tobytes() == x.tobytes() for name, x in state.items())
    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    torch.save({"a": half, "view": half[1], "turned": half.T}, tmp_path / "half.pt")
    torch.save({"a": half[:, :2].contiguous(), "view": half[1]}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name, message in (
        ("short.pt", "truncated or no PyTorch file"),
        ("evil.pt", "Python objects beside its tensors; it was not loaded"),
        ("evil.bin", "Python objects beside its tensors; it was not loaded"),
        ("empty.pt", "truncated or no PyTorch file"),
        ("photo.pt", "truncated or no PyTorch file .it starts with b'.xff.xd8'."),
        ("nested.pt", "no flat dictionary of dense tensors"),
        ("numbered.pt", "no flat dictionary of dense tensors"),
        ("sparse.pt", "no flat dictionary of dense tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            files.read(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": half, "view": half[1]}, tmp_path / "views.pt")
    for name, n in (("half.pt", 3), ("legacy.pt", 2), ("views.pt", 3)):
        back = files.read(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(back["a"], np.float32), half.float()[:, :n])
        np.testing.assert_array_equal(np.asarray(back["view"], np.float32), [3, 4, 5])
        assert back["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(files.read(tmp_path / "half.pt")["turned"], np.float32), half.float().T)


def test_ties_survive_safetensors_and_pytorch(tmp_path, state):
    files.write(tmp_path / "a.safetensors", state)
    back = files.read(tmp_path / "a.safetensors")
    assert back[TIED[0]] is back[TIED[1]] and len({id(x) for x in back.values()}) == len({id(x) for x in state.values()})
    pytest.importorskip("torch")
    files.write(tmp_path / "a.pt", back)
    again = files.read(tmp_path / "a.pt")
    assert again[TIED[0]] is again[TIED[1]]
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[TIED[1]]["data_offsets"][0]] ^= 1
    (tmp_path / "b.safetensors").write_bytes(data)
    changed = files.read(tmp_path / "b.safetensors")
    assert changed[TIED[0]] is not changed[TIED[1]]  # so that a load says that they are not tied


def test_ties_of_another_program_are_ignored(tmp_path):
    from safetensors.numpy import save_file

    for i, text in enumerate(("yes", "[1]", '{"a": ["b"]}')):
        save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / f"{i}.safetensors", metadata={"tied": text})
        back = files.read(tmp_path / f"{i}.safetensors")
        assert back["a"] is not back["b"]


@pytest.mark.slow
def test_convert_takes_little_more_memory_than_the_weights(tmp_path):
    """Peak memory beyond what the same command takes for a small file, over the size of a large one."""
    pytest.importorskip("torch")
    model = build.model("terramind_v1_tokenizer_dem")  # 676 MB
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.standard_normal(x.shape, dtype=np.float32), model.variables)
    files.write(tmp_path / "large_dem.pt", weights.to_torch(dataclasses.replace(model, variables=variables)))
    size = (tmp_path / "large_dem.pt").stat().st_size
    small = {name: np.zeros(1, np.float32) for name in "ab"}
    files.write(tmp_path / "small.pt", small)

    def peak(*arguments):
        code = (
            f"import resource; from terramind_jax import cli; assert cli.main(['convert', *{[str(tmp_path / a) for a in arguments]}]) == 0"
        )
        code += "; print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1]) * 1024

    base = peak("small.pt", "small.safetensors")
    routes = [("large_dem.pt", "dem.safetensors"), ("dem.safetensors", "dem"), ("dem", "back.pt")]
    ratios = {route: (peak(*route) - base) / size for route in routes}
    assert max(ratios.values()) <= 1.3, ratios


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'terramind-jax\[torch\]', or use .safetensors"):
        files.read(tmp_path / "x.pt")


def test_between_pytorch_and_orbax(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    nano_models.shrink(monkeypatch)
    model = tm.load("terramind_v1_tokenizer_dem", "random")
    tm.save(model, tmp_path / "dem.pt")
    assert cli.main(["convert", str(tmp_path / "dem.pt"), str(tmp_path / "dem"), "--model=terramind_v1_tokenizer_dem"]) == 0
    assert cli.main(["convert", str(tmp_path / "dem"), str(tmp_path / "again.pt")]) == 0
    first, second = (files.read(tmp_path / name) for name in ("dem.pt", "again.pt"))
    assert list(first) == list(second) and all(np.array_equal(x, second[name]) for name, x in first.items())
    (tmp_path / "short.pt").write_bytes((tmp_path / "dem.pt").read_bytes()[:-1000])
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "short.pt"), str(tmp_path / "short")]) == 2
    assert "short.pt is truncated or no PyTorch file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pt", "dem", "dem.pt", "short.pt"]
