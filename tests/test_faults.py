"""Samples that cannot be read: which they were and why, in a list and, when somebody asks, in full."""

import itertools
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from terramind_jax import files, modalities, sharding
from terramind_jax.data import masks, pipeline
from terramind_jax.data.errors import REASONS, DataError
from terramind_jax.data.faults import SHOWN, Faults, counts, listed, read_streams
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import pretrain


@pytest.fixture
def config(tmp_path):
    return tiny_run.pretraining(tiny_run.write_shards(tmp_path))


def faults_of(config) -> Faults:
    index = pretrain.open_tokenized(config, "train")
    encoder, decoder = pretrain.streams(pretrain.with_codebooks(config))
    return Faults(index, partial(read_streams, index, (*encoder, *decoder), config.model.image_size))


def run(config, faults: Faults, batches: int):
    index = pretrain.open_tokenized(config, "train")
    return list(itertools.islice(pretrain.device_batches(config, index, sharding.make_mesh(), faults=faults), batches))


def test_the_bad_samples_are_named_with_their_reasons(config):
    faults = faults_of(config)
    assert faults.reasons() == "those of this host are none of them."
    batches = run(config, faults, 8)
    assert sum(int(batch["bad"].sum()) for batch in batches) > 0
    assert faults.reasons() == f"{config.data.root}/train/DEM/tiny_shard_000001.tar: sample 's003' is no zip file (File is not a zip file)."


def test_only_the_last_few_are_named():
    faults = Faults(None, lambda i: (_ for _ in ()).throw(OSError(f"Sample {i} is gone.")))
    batch = {"sample": np.arange(-1, 9), "bad": np.ones(10, bool), "fault": np.full(10, b"DEM missing")}
    assert len(list(faults.following(iter([batch, batch])))) == 2
    assert faults.reasons() == " ".join(f"Sample {i} is gone." for i in range(9 - SHOWN, 9))


def test_one_that_can_be_read_again_is_said(config):
    faults = faults_of(config)
    batch = {"sample": np.array([5]), "bad": np.array([True]), "fault": np.array([b"DEM unreachable"])}
    list(faults.following(iter([batch])))
    assert faults.reasons() == "Sample 's005' can be read now."


def test_a_token_shard_that_went_bad_is_found(config):
    faults = faults_of(config)
    for path in (Path(config.data.root) / "train" / "LULC_tokens").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"NUMPY", b"numpy"))
    assert int(run(config, faults, 4)[0]["bad"].sum()) > 0
    assert "LULC" in faults.reasons() and "can be read now" not in faults.reasons()


def test_a_run_with_too_many_stops_and_names_them(config, tmp_path):
    config.run.max_bad_fraction = 0.005
    with pytest.raises(
        ValueError, match=r"more than run\.max_bad_fraction=0\.005: 1 corrupt, listed in [^\n]*sample 's003' is no zip file"
    ):
        pretrain.train(config, tmp_path / "run")
    assert listed(tmp_path / "run") == [{"key": "s003", "modality": "DEM", "reason": "corrupt"}]


# ---- reasons ----

TILE = 48
GOOD = {"S2L2A": (12, np.uint16), "S1GRD": (2, np.float16), "DEM": (1, np.int16), "LULC": (1, np.uint8)}


def tile(modality: str, seed: int) -> np.ndarray:
    bands, dtype = GOOD[modality]
    return np.random.default_rng(seed).integers(0, 10, (1, bands, TILE, TILE)).astype(dtype)


def constant(modality: str, *values: float) -> np.ndarray:
    bands, dtype = GOOD[modality]
    return np.broadcast_to(np.resize(values, bands).astype(dtype)[None, :, None, None], (1, bands, TILE, TILE))


def write(root, modality: str, payload: bytes | None) -> None:
    """Four samples of all modalities; k2 has `payload` for `modality`, None: nothing at all."""
    for name in GOOD:
        with ShardWriter(root, "train", name, "x", 1) as shard:
            for i in range(4):
                wrong = (name, i) == (modality, 2)
                if not wrong or payload is not None:
                    shard.add(f"k{i}", payload if wrong else write_sample({"bands": tile(name, i)}))


def spoiled(payload: bytes) -> bytes:
    """With a byte changed amid its pixels."""
    at = payload.rindex(b"bands/0.0.0.0", 0, len(payload) // 2) + 200
    return payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]


def nan_in(modality: str) -> np.ndarray:
    bands = tile(modality, 2)
    bands[0, -1] = np.nan
    return bands


WRONG = {
    "no zip": ("S2L2A", b"PK" + bytes(40), "corrupt"),
    "a changed byte": ("S2L2A", spoiled(write_sample({"bands": tile("S2L2A", 2)})), "corrupt"),
    "a zip cut short": ("DEM", write_sample({"bands": tile("DEM", 2)})[:-100], "corrupt"),
    "too few bands": ("S2L2A", write_sample({"bands": tile("S2L2A", 2)[:, :10]}), "shape"),
    "too small": ("DEM", write_sample({"bands": tile("DEM", 2)[..., :20]}), "shape"),
    "NaN": ("S1GRD", write_sample({"bands": nan_in("S1GRD")}), "nan"),
    "one value": ("S2L2A", write_sample({"bands": constant("S2L2A", 0)}), "constant"),
    "one value a band": ("S1GRD", write_sample({"bands": constant("S1GRD", -12, -20)}), "constant"),
    "no such class": ("LULC", write_sample({"bands": constant("LULC", 10)}), "value"),
    "no bands": ("S1GRD", write_sample({"other": tile("S1GRD", 2)}), "missing"),
}
RIGHT = {
    "one class": ("LULC", write_sample({"bands": constant("LULC", 5)})),
    "the sea": ("DEM", write_sample({"bands": constant("DEM", 0)})),
    "one band constant": ("S1GRD", write_sample({"bands": np.concatenate([constant("S1GRD", 1)[:, :1], tile("S1GRD", 2)[:, 1:]], 1)})),
    "a key that one modality lacks": ("S1GRD", None),
}


def crops_of(root, modality: str) -> dict[str, str]:
    """What is wrong with the crops of each sample that has the modality, as a tokenizer reads them."""
    index = open_index(root, "train")
    batches = pipeline.image_batches(index, modality, batch_size=1, image_size=32, train=False, threads=0)
    return {index.keys[int(b["sample"][0])]: b["fault"][0].decode() for b in batches if b["bad"][0] == bool(b["fault"][0])}


def views_of(root) -> dict[str, str]:
    """What is wrong with the view of each sample in an epoch whose views have pixels of all modalities that enter as pixels."""
    encoder = [s for s in modalities.ENCODER_STREAMS if s.kind == "pixels" and s.modality in GOOD]
    decoder = [s for s in modalities.DECODER_STREAMS if s.modality == "LULC"]
    mask = masks.MaskConfig(input_tokens=12, target_tokens=4, input_alphas=({"default": 1e4},), target_alphas=(1.0,))
    index = open_index(root, "train")
    index.has_tokens = index.available
    index.tokens = lambda i, m: np.zeros((10, 2, 2), np.uint16)
    data = pipeline.DataConfig(image_size=32, threads=0)
    batch = next(pipeline.batches(index, encoder, decoder, data, mask, batch_size=4))
    assert all((batch["target_modality"][b] == pipeline.PADDING).all() == bad for b, bad in enumerate(batch["bad"]))
    return {index.keys[int(i)]: fault.decode() for i, fault in zip(batch["sample"], batch["fault"], strict=True)}


@pytest.mark.parametrize("what", WRONG)
def test_every_way_to_be_bad_has_its_reason_and_keeps_its_slot(what, tmp_path):
    modality, payload, reason = WRONG[what]
    write(tmp_path, modality, payload)
    expected = {"k0": "", "k1": "", "k2": f"{modality} {reason}", "k3": ""}
    assert crops_of(tmp_path, modality) == expected and reason in REASONS
    assert modality == "LULC" or views_of(tmp_path) == expected


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_odd_but_right_is_read(what, tmp_path):
    write(tmp_path, *RIGHT[what])
    assert views_of(tmp_path) == dict.fromkeys(["k0", "k1", "k2", "k3"], "")
    assert set(crops_of(tmp_path, RIGHT[what][0]).values()) == {""}


def test_a_shard_that_is_gone_is_missing_and_one_cut_short_is_corrupt(tmp_path):
    write(tmp_path, "LULC", None)
    for reason in ("corrupt", "missing"):
        index = open_index(tmp_path, "train")
        path = tmp_path / "train" / "DEM" / "x_shard_000001.tar"
        os.truncate(path, 600) if reason == "corrupt" else path.unlink()
        with pytest.raises(DataError) as error:
            index.read(3, "DEM")
        assert error.value.reason == reason
        write(tmp_path, "LULC", None)


# ---- the list ----


def listing(workdir, index, host: int, *faults: tuple[int, str]) -> Faults:
    """What a host that starts or goes on in `workdir` has met."""
    found = Faults(index, lambda i: None, workdir, host)
    samples, what = zip(*faults, strict=True)
    batch = {"sample": np.array(samples), "bad": np.ones(len(samples), bool), "fault": np.array(what, "S32")}
    list(found.following(iter([batch, batch])))
    found.flush()
    return found


@pytest.mark.parametrize("store", ["disk", "objects"])
def test_the_list_has_each_once_whatever_hosts_and_restarts(store, tmp_path, monkeypatch):
    if store == "objects":
        monkeypatch.setattr(files, "folder", tiny_run.ObjectStore)
        monkeypatch.setattr(files, "is_remote", lambda path: True)
    index = type("Index", (), {"keys": [f"s{i}" for i in range(9)]})
    assert listed(tmp_path) == [] and counts(tmp_path) == {}
    listing(tmp_path, index, 0, (1, "DEM corrupt"), (2, "S2L2A nan"), (1, "S2L2A constant"))
    listing(tmp_path, index, 1, (7, "DEM corrupt"))
    listing(tmp_path, index, 0, (3, "S1GRD constant"), (7, "DEM corrupt"), (2, "S2L2A nan"))  # one host goes on alone
    found = [(line["key"], line["modality"], line["reason"]) for line in listed(tmp_path)]
    assert found == [
        ("s1", "DEM", "corrupt"),
        ("s2", "S2L2A", "nan"),
        ("s1", "S2L2A", "constant"),
        ("s3", "S1GRD", "constant"),
        ("s7", "DEM", "corrupt"),
    ]
    assert counts(tmp_path) == {"corrupt": 2, "constant": 2, "nan": 1}
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "bad_samples").iterdir()) == len(found)


def test_a_list_that_cannot_be_written_does_not_end_a_run(tmp_path):
    (tmp_path / "bad_samples").write_text("in its place")
    with pytest.warns(UserWarning, match="could not be written"):
        listing(tmp_path, type("Index", (), {"keys": ["s0"]}), 0, (0, "DEM corrupt"))
