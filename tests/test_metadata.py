"""The published list of all samples beside a copy: what no shard has fails the check, whatever the list's columns are called."""

import sys

import numpy as np
import object_store
import pyarrow as pa
import pytest
from pyarrow import parquet

from terramind_jax import cli
from terramind_jax.data import check, metadata, storage
from terramind_jax.data.shards import ShardWriter, write_sample

KEYS = [f"ssl4eos12_val_{i}" for i in range(8)]
RAW = np.array(KEYS, "S")
LIST = "val_metadata.parquet"


def write_list(root, names):
    """As one column of four: a number, one that holds a few of the keys, and one of other text. Two rows lack a name."""
    columns = {"lat": np.zeros(len(names) + 2), "near": pa.array([*KEYS[:3], *["?"] * (len(names) - 1)]).dictionary_encode()}
    columns |= {"names": [None, *names, None], "product": ["S2A_MSIL2A.zip"] * (len(names) + 2)}
    parquet.write_table(pa.table(columns), root / LIST, row_group_size=3)


@pytest.fixture
def root(tmp_path):
    with ShardWriter(tmp_path, "val", "DEM", "x", 1) as shard:
        for key in KEYS:
            shard.add(key, write_sample({"bands": np.ones((1, 1, 2, 2), np.int16)}))
    return tmp_path


def test_samples_that_no_shard_has_fail_the_check(root, tmp_path, monkeypatch, capsys):
    """On the disk and in a store, which is only told of when it is indexed."""
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "cache"))
    write_list(root, [*KEYS, "lost"])
    sentence = f"- {LIST} lists 1 samples that no shard has, 'lost'; copy their shards, or delete the list from a part of them."
    with object_store.serve(root) as (address, _):
        for where in (str(root), address):
            assert cli.main(["data", "index", where]) == 0
            assert sentence in capsys.readouterr().out.splitlines()
            assert cli.main(["data", "check", where, "--workers=1"]) == 1
            assert sentence in capsys.readouterr().out.splitlines()
    write_list(root, KEYS)
    report = check.check(root, "val", workers=1)
    assert report.ok and f"All 8 samples that {LIST} lists are here." in report.notes


@pytest.mark.parametrize("form", ["{}", "{}.zarr.zip", "val/S2L2A/{}.zip", "x/val_S1RTC_{}"])
def test_names_are_found_in_whatever_form_they_have(tmp_path, form):
    write_list(tmp_path, [form.format(key) for key in [*KEYS[1:], "ssl4eos12_val_9", "ssl4eos12_val_8", "ssl4eos12_val_9"]])
    (problem,), notes = metadata.compare(tmp_path, "val", RAW)
    assert problem.startswith(f"{LIST} lists 2 samples that no shard has, 'ssl4eos12_val_8', 'ssl4eos12_val_9'; ")
    assert notes == [f"{LIST} does not list 1 samples of the shards, 'ssl4eos12_val_0'."]


def test_a_list_that_cannot_be_compared_is_told_of_and_no_failure(tmp_path, monkeypatch):
    assert metadata.compare(tmp_path, "val", RAW) == ([], [])
    write_list(tmp_path, [*KEYS[:4], "a", "b"])  # not more than half
    sentence = f"{LIST} is not compared: the names of these samples are in none of its columns of text (near, names, product)."
    assert metadata.compare(tmp_path, "val", RAW) == ([], [sentence])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence = f"{LIST} is not compared, for pyarrow is not installed: pip install 'terramind-jax[geo]'."
    assert metadata.compare(tmp_path, "val", RAW) == ([], [sentence])


@pytest.mark.parametrize("fault", ["forbidden", "errors"])
def test_a_list_that_the_store_does_not_send_is_no_damaged_one(root, monkeypatch, fault):
    write_list(root, KEYS)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with object_store.serve(root) as (address, faults):
        found = metadata._open(address, LIST)
        setattr(faults, fault, True)
        monkeypatch.setattr(metadata, "_open", lambda *_: found)
        problems, (note,) = metadata.compare(address, "val", RAW)
    assert note.startswith(f"{LIST} is not compared: {address}/{LIST} ") and not problems


def test_a_damaged_list_is_a_problem(tmp_path):
    write_list(tmp_path, KEYS)
    whole = (tmp_path / LIST).read_bytes()
    for damaged in (b"", b"junk", whole[:-9], bytes(len(whole) // 3) + whole[len(whole) // 3 :]):
        (tmp_path / LIST).write_bytes(damaged)
        (problem,), notes = metadata.compare(tmp_path, "val", RAW)
        assert problem.startswith(f"{LIST} cannot be read (") and problem.endswith("); copy it again, or delete it.") and not notes
