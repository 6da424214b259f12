"""Tokens beside the shards: keyed like the pixels, right for every crop, written once, never of two tokenizers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_run

from terramind_jax import cli, modalities, tokenize, tokenizer
from terramind_jax.data import check, crops, prepare, records, storage, terramesh
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import pretrain

SIZE = 32


def tile(number, side=48, dtype=np.int16):
    return np.random.default_rng(number).integers(0, 3000, (1, 1, side, side)).astype(dtype)


def write_shard(root, number, tiles, modality="DEM", split="train"):
    with ShardWriter(root, split, modality, "world", number) as writer:
        for key, bands in tiles.items():
            writer.add(key, b"damaged" if bands is None else write_sample({"bands": bands}))


@pytest.fixture
def root(tmp_path):
    """Two shards; sample b is as small as a crop, sample d cannot be read."""
    write_shard(tmp_path / "data", 1, {"a": tile(1), "b": tile(2, SIZE)})
    write_shard(tmp_path / "data", 7, {"d": None, "c": tile(3)})
    return tmp_path / "data"


def random_tokenizer(modality, folder, **options):
    """In the place of `tokenize.load`: other weights for each number in the file `seed`."""
    channels, workdir = modalities.get(modality).channels, Path(folder) / modality
    module = tokenizer.Tokenizer(tokenizer.TokenizerConfig(modality, channels, dim=8, depth=1, num_heads=1, image_size=SIZE, **options))
    shapes = nn.unbox(jax.eval_shape(lambda: tokenizer.init(module, jax.random.key(0))))
    rng = np.random.default_rng(int((workdir / "seed").read_text()))
    return module, jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of tokenizers DEM and LULC."""
    monkeypatch.setattr(tokenize, "load", random_tokenizer)
    for name in ("DEM", "LULC"):
        (tmp_path / "tokenizers" / name).mkdir(parents=True)
        (tmp_path / "tokenizers" / name / "seed").write_text("0")
    return tmp_path / "tokenizers"


@pytest.fixture
def quick(monkeypatch):
    """Instead of encoding, tokens that differ from image to image: nothing is compiled where only files matter."""
    monkeypatch.setattr(tokenize, "encoder", lambda *_: lambda images: (np.full((2, 2), image.sum() % 15360) for image in images))


def run(root, weights, **options):
    tokenize.tokenize(root, weights, image_size=SIZE, **{"batch_size": 4, **options})


def encoded(weights, modality, images):
    module, variables = tokenize.load(modality, weights)
    images = images if modality == "LULC" else modalities.standardize(modality, images)
    return np.asarray(jax.jit(lambda v, x: module.apply(v, x, method="encode"))(variables, images))


def test_tokens_are_those_of_each_crop(root, weights, capsys):
    run(root, weights)
    index = open_index(root, "train", ["DEM"])
    assert index.has_tokens[:, 0].tolist() == [True, True, True, False]  # a, b, c, and d that cannot be read
    assert "train/DEM: 1 samples cannot be read" in capsys.readouterr().out
    for i in range(3):
        tokens = index.tokens(i, "DEM")
        assert tokens.shape == (crops.VARIANTS, 2, 2) and tokens.dtype == np.uint16
        images = np.stack([crops.crop(index.read(i, "DEM"), v, SIZE) for v in range(crops.VARIANTS)])
        np.testing.assert_array_equal(tokens, encoded(weights, "DEM", images))
    assert len(np.unique(index.tokens(0, "DEM"))) > 4


def test_shards_are_named_and_filled_like_the_pixels(root, weights, quick, capsys):
    run(root, weights)
    assert f"Tokenizers: {weights / 'DEM'}\n" in capsys.readouterr().out
    folder = root / "train" / "DEM_tokens"
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "world_shard_000001.tar", "world_shard_000007.tar"]
    record = json.loads((folder / "tokenizer.json").read_text())
    assert record["name"] == "tokenizers/DEM" and record["codebook_size"] == 15360 and len(record["weights_sha256"]) == 64


def test_batches_do_not_matter(root, weights, tmp_path):
    for size in (3, 16):
        run(root, weights, out=tmp_path / str(size), batch_size=size)
    few, many = (open_index(root, "train", ["DEM"], tokens_root=tmp_path / str(size)) for size in (3, 16))
    for i in range(3):
        np.testing.assert_array_equal(few.tokens(i, "DEM"), many.tokens(i, "DEM"))


def test_shards_that_are_there_are_kept(root, weights, quick):
    run(root, weights)
    first, second = sorted((root / "train" / "DEM_tokens").glob("*.tar"))
    kept = first.stat().st_mtime_ns
    second.unlink()
    run(root, weights)
    assert first.stat().st_mtime_ns == kept
    assert open_index(root, "train", ["DEM"]).has_tokens.sum() == 3


def test_tokens_follow_pixels_that_were_replaced(root, weights, quick):
    run(root, weights)
    first, second = sorted((root / "train" / "DEM_tokens").glob("*.tar"))
    kept, before = second.stat().st_mtime_ns, open_index(root, "train", ["DEM"]).tokens(0, "DEM")
    write_shard(root, 1, {"a": tile(9), "b": tile(2, SIZE)})
    run(root, weights)
    after = open_index(root, "train", ["DEM"])
    assert not np.array_equal(after.tokens(0, "DEM"), before) and second.stat().st_mtime_ns == kept
    done = first.stat().st_mtime_ns
    for path in (root / "train" / "DEM").glob("*.tar"):
        os.utime(path, (1, 1))  # a copy has other times and the same pixels
    run(root, weights)
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == (done, kept)


def test_tokens_that_do_not_say_what_they_were_made_from_are_made_again(root, weights, quick):
    run(root, weights)
    write_shard(root, 1, {"a": None}, "DEM_tokens")
    run(root, weights)
    assert open_index(root, "train", ["DEM"]).has_tokens.sum() == 3


def test_class_maps_are_tokenized_as_they_are(root, weights):
    classes = np.random.default_rng(0).integers(0, 10, (1, 1, SIZE, SIZE)).astype(np.uint8)
    write_shard(root, 1, {"a": classes}, "LULC", "val")
    run(root, weights)
    index = open_index(root, "val", ["LULC"])
    expected = encoded(weights, "LULC", np.stack([classes[0, 0], classes[0, 0, :, ::-1]]))
    np.testing.assert_array_equal(index.tokens(0, "LULC"), np.tile(expected, (5, 1, 1)))


def test_another_tokenizer_is_refused(root, weights, quick):
    run(root, weights)
    (weights / "DEM" / "seed").write_text("1")
    with pytest.raises(ValueError, match="DEM_tokens holds tokens of another tokenizer, tokenizers/DEM with weights .* choose another"):
        run(root, weights)


def test_a_renamed_folder_of_tokenizers_is_the_same_tokenizer(root, weights, quick):
    run(root, weights)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*_tokens/*.tar"))
    run(root, weights.rename(weights.with_name("renamed")))
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*_tokens/*.tar"))


def test_tokens_of_unknown_origin_are_refused(root, weights, quick):
    run(root, weights)
    (root / "train" / "DEM_tokens" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="an unknown tokenizer, for it has no tokenizer.json"):
        run(root, weights)


def test_what_is_missing_is_said(root, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer NDVI; expected a work directory like"):
        run(root, weights, modalities=["NDVI"])
    with pytest.raises(FileNotFoundError, match="has no tokenizer at all"):
        run(root, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no folder train or val"):
        run(tmp_path / "nowhere", weights)
    with pytest.raises(FileNotFoundError, match="No samples in"):
        run(root, weights, splits=["test"], modalities=["DEM"])
    (weights / "DEM").rename(tmp_path / "DEM")
    with pytest.raises(FileNotFoundError, match="has no shards of LULC, which .*tokenizers has tokenizers of; expected .*data/train/LULC"):
        run(root, weights)
    (root / "train" / records.NAME).touch()
    with pytest.raises(ValueError, match="data is prepared data; tokenize the shards that it was made from"):
        run(root, weights)


def test_a_shard_of_another_name_is_refused(root, weights, quick):
    (root / "train" / "DEM" / "world_shard_000001.tar").rename(root / "train" / "DEM" / "world.tar")
    with pytest.raises(ValueError, match="world.tar is not named like a shard"):
        run(root, weights)


def test_large_codebooks_are_stored_in_32_bits_and_several_as_an_axis(root, weights, monkeypatch):
    load = tokenize.load

    def wide(modality, folder):
        module, variables = load(modality, folder)
        config = tokenizer.TokenizerConfig("DEM", 1, levels=(300, 300), dim=8, depth=1, num_heads=1, num_codebooks=2, image_size=SIZE)
        bias, kernel = np.zeros(4, np.float32), np.ones((8, 4), np.float32)
        variables["params"]["quant_proj"] = {"kernel": kernel, "bias": bias}
        variables["params"]["decoder"]["post_quant_proj"]["kernel"] = np.ones((4, 8), np.float32)
        return tokenizer.Tokenizer(config), variables

    monkeypatch.setattr(tokenize, "load", wide)
    run(root, weights, modalities=["DEM"])
    tokens = open_index(root, "train", ["DEM"]).tokens(0, "DEM")
    assert tokens.shape == (crops.VARIANTS, 2, 2, 2) and tokens.dtype == np.int32


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


KILLED = """
import sys, time
from pathlib import Path
import test_tokenize as t

add = t.ShardWriter.add
t.ShardWriter.add = lambda *arguments: (time.sleep(0.3), add(*arguments))
t.tokenize.load = t.random_tokenizer
t.run(*map(Path, sys.argv[1:3]), out=sys.argv[3])
"""


def test_a_run_that_was_killed_writes_the_same_files(root, weights, tmp_path):
    for number in range(8, 12):
        write_shard(root, number, {f"{number}{k}": tile(100 * number + k) for k in range(3)})
    run(root, weights, out=tmp_path / "whole")
    out, paths = tmp_path / "killed", os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILLED, str(root), str(weights), str(out)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}) as process:
        tiny_run.wait_for(lambda: len(list(out.rglob("*.tar"))) > 1 and list(out.rglob("*.tmp")), [process])
        process.kill()
    before = contents(out)
    assert 0 < len([name for name in before if name.endswith(".tar")]) < 6
    run(root, weights, out=out)
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: before[name] for name in before if name.endswith(".tar")}.items() <= contents(out).items()


def test_hosts_share_the_shards_and_each_is_done_once(root, weights, tmp_path):
    write_shard(root, 8, {"e": tile(5)})
    for hosts in (1, 2, 5):
        seen = []
        for host in reversed(range(hosts)):
            before = set(contents(tmp_path / str(hosts)))
            run(root, weights, out=tmp_path / str(hosts), host=host, hosts=hosts)
            seen.append(len(set(contents(tmp_path / str(hosts))) - before - {"train/DEM_tokens/tokenizer.json"}))
        assert sum(seen) == 3 and max(seen) == -(-3 // hosts)
        assert contents(tmp_path / str(hosts)) == contents(tmp_path / "1")
    with pytest.raises(ValueError, match="host is 2 of 2; hosts are numbered from 0"):
        run(root, weights, host=2, hosts=2)


# ---- tokens as a TFDS data set ------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(root):
    """Three locations more of class maps, two of them without a DEM that can be read, and a split to validate on."""
    write_shard(root, 1, {key: tile(n, dtype=np.uint8) % 10 for n, key in enumerate("adx")}, "LULC")
    write_shard(root, 1, {"v": tile(5)}, split="val")
    return root


@pytest.fixture
def small_files(monkeypatch):
    """Two locations a file, which is what larger tokens would make of it."""
    monkeypatch.setattr(terramesh, "even_ends", lambda count, largest, most: [*range(0, count, 2), count])


def test_records_hold_the_tokens_of_token_shards(shards, weights, small_files, tmp_path, capsys):
    run(shards, weights, out=tmp_path / "tars")
    run(shards, weights, out=tmp_path / "records", array_record=True)
    assert "1 samples of DEM cannot be read and have no tokens" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "records", "tars", "tokenizers"]
    for split in ("train", "val"):
        expected, joined = (open_index(shards, split, tokens_root=tmp_path / form) for form in ("tars", "records"))
        for found in (joined, pickle.loads(pickle.dumps(joined))):
            assert (list(found.keys), found.modalities) == (list(expected.keys), expected.modalities)
            np.testing.assert_array_equal(found.available, expected.available)
            np.testing.assert_array_equal(found.has_tokens, expected.has_tokens)
            for i, m in zip(*np.nonzero(found.has_tokens), strict=True):
                name = found.modalities[m]
                np.testing.assert_array_equal(found.tokens(i, name), expected.tokens(i, name), strict=True)
    record = Path("train", "DEM_tokens", tokenize.RECORD)
    assert (tmp_path / "records" / record).read_text() == (tmp_path / "tars" / record).read_text()
    with pytest.raises(DataError, match="'c' has no tokens of LULC"):
        index = open_index(shards, "train", tokens_root=tmp_path / "records")
        index.tokens(index.keys.find("c"), "LULC")


def test_any_program_reads_records_of_tokens(shards, weights, quick, tmp_path):
    run(shards, weights, out=tmp_path / "out", array_record=True)
    source = tfds.data_source("terramesh", split="train", data_dir=tmp_path / "out")
    crops_of = {found["key"].decode(): {m: len(grid) for m, grid in found["tokens"].items()} for found in source}
    assert crops_of == {key: {"DEM": 10 * (key in "abc"), "LULC": 10 * (key in "adx")} for key in "abcdx"}
    assert not source[0].get("pixels")


def test_records_of_a_run_that_was_killed_are_the_same_files(shards, weights, quick, small_files, tmp_path, monkeypatch):
    run(shards, weights, out=tmp_path / "whole", array_record=True)
    out, parts, record, made = tmp_path / "out", tmp_path / "out.parts", terramesh.record, []

    def killed(index, form, i):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(i)
        return record(index, form, i)

    monkeypatch.setattr(terramesh, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        run(shards, weights, out=out, array_record=True)
    assert len(list(parts.glob("*-of-00003"))) == 1 and not out.exists()
    monkeypatch.setattr(terramesh, "record", lambda index, form, i: made.append(i) or record(index, form, i))
    run(shards, weights, out=out, array_record=True)
    assert made[3:] == [2, 3, 4, 0] and not parts.exists()
    assert contents(out) == contents(tmp_path / "whole")


def test_hosts_share_the_files_of_records_and_the_last_one_joins_them(shards, weights, quick, small_files, tmp_path, monkeypatch, capsys):
    run(shards, weights, out=tmp_path / "1", array_record=True)
    for hosts in (2, 5):
        out = tmp_path / str(hosts)
        for host in reversed(range(hosts)):
            assert not out.exists()
            run(shards, weights, out=out, array_record=True, host=host, hosts=hosts)
        assert contents(out) == contents(tmp_path / "1")
    capsys.readouterr()
    run(shards, weights, out=out, array_record=True, host=1, hosts=3)
    assert f"{out} holds the tokens of these shards already; nothing to do." in capsys.readouterr().out
    out, assemble = tmp_path / "race", terramesh.assemble

    def beaten(*arguments):
        assemble(*arguments)
        assemble(*arguments)

    monkeypatch.setattr(terramesh, "assemble", beaten)
    run(shards, weights, out=out, array_record=True)
    assert contents(out) == contents(tmp_path / "1")


def test_what_fails_while_files_are_joined_loses_none(shards, weights, quick, small_files, tmp_path, monkeypatch):
    """On a disk where files have no second names, and with what a claim that is being written leaves."""
    run(shards, weights, out=tmp_path / "whole", array_record=True)
    out, parts = tmp_path / "out", tmp_path / "out.parts"
    parts.mkdir()
    (parts / f"{terramesh.CLAIM}.0123.tmp").write_text("{")

    def impossible(*_):
        raise OSError("no links, or a full disk")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a full disk"):
        patch.setattr(os, "link", impossible)
        patch.setattr(terramesh.tfds.core.splits, "SplitDict", impossible)
        run(shards, weights, out=out, array_record=True)
    assert len(list(parts.glob("*-of-00003"))) == 3 and not out.exists()
    monkeypatch.setattr(terramesh, "record", None)  # none is made again
    run(shards, weights, out=out, array_record=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_prepared_data_follows_the_tokenizers(shards, weights, quick, tmp_path):
    ids = []
    for seed in "01":
        (weights / "DEM" / "seed").write_text(seed)
        run(shards, weights, out=tmp_path / seed, array_record=True)
        ids.append(open_index(shards, "train", tokens_root=tmp_path / seed).version)
    assert ids[0] != ids[1]
    prepare.prepare(shards, tmp_path / "out", tokens=tmp_path / "0")
    with pytest.raises(FileExistsError, match="out was made of other shards or tokenizers"):
        prepare.prepare(shards, tmp_path / "out", tokens=tmp_path / "1")


@pytest.mark.parametrize("array_record", [False, True])
def test_a_store_that_is_out_of_reach_ends_it(shards, weights, quick, tmp_path, monkeypatch, array_record):
    """What cannot be read for a while has no tokens for ever, once the files are there."""
    read = storage.LocalStore.read

    def unreachable(store, path, *arguments):
        if "world_shard_000007" in path and len(arguments) > 1 and arguments[1] > 4096:
            raise ConnectionError("8 attempts failed")
        return read(store, path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="cannot be read .8 attempts failed"):
        patch.setattr(storage.LocalStore, "read", unreachable)
        run(shards, weights, out=tmp_path / "out", array_record=array_record)
    run(shards, weights, out=tmp_path / "out", array_record=array_record)
    assert open_index(shards, "train", ["DEM"], tokens_root=tmp_path / "out").has_tokens.sum() == 3


def test_records_of_other_shards_or_tokenizers_are_refused(shards, weights, quick, small_files, tmp_path):
    out = tmp_path / "out"
    run(shards, weights, out=out, array_record=True, host=1, hosts=2)
    (weights / "DEM" / "seed").write_text("1")
    with pytest.raises(FileExistsError, match="out.parts holds tokens of other shards, or by other tokenizers; give --out another folder"):
        run(shards, weights, out=out, array_record=True)
    (weights / "DEM" / "seed").write_text("0")
    run(shards, weights, out=out, array_record=True)
    before = contents(out)
    write_shard(shards, 9, {"new": tile(9)})
    with pytest.raises(FileExistsError, match="out was made of other shards or tokenizers, or the shards have changed; give"):
        run(shards, weights, out=out, array_record=True)
    assert contents(out) == before
    run(shards, weights, out=tmp_path / "half", array_record=True, host=0, hosts=2)
    half = contents(tmp_path / "half.parts")
    with pytest.raises(FileExistsError, match="half.parts holds files of an unfinished tokenize; finish it, give --out another folder"):
        prepare.prepare(shards, tmp_path / "half")
    assert contents(tmp_path / "half.parts") == half
    for same in (None, shards):
        with pytest.raises(ValueError, match="do not lie beside the pixels; give --out a new folder, for data.tokens of a pretraining"):
            run(shards, weights, out=same, array_record=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pretraining_joins_pixels_and_records_of_tokens(tmp_path, workers):
    """The same batches as with token shards, whose samples are some of the pixels'; tokens of other samples are refused."""
    tiny_run.write_split(tmp_path / "pixels", "train", 12, tokens=False, broken=3)
    tiny_run.write_split(tmp_path / "tars", "train", 9)
    prepare.prepare(tmp_path / "tars", tmp_path / "records")

    def batches(tokens):
        config = tiny_run.pretraining(tmp_path / "pixels")
        config.data.tokens = str(tmp_path / tokens)
        index = pretrain.open_tokenized(config, "train")
        found = pretrain.batches(index, *pretrain.data_settings(config), batch_size=4, workers=workers, seed=1)
        return [next(found) for _ in range(4)]

    for a, b in zip(batches("tars"), batches("records"), strict=True):
        np.testing.assert_equal(a, b)
    tiny_run.write_split(tmp_path / "pixels", "val", 3, tokens=False)
    with ShardWriter(tmp_path / "others", "val", "DEM", "tiny", 1) as shard:
        shard.add("other", write_sample({"bands": tile(1)}))
    with ShardWriter(tmp_path / "others", "val", "DEM_tokens", "tiny", 1) as shard:
        shard.add("other", tokenize._npy(np.zeros((10, 2, 2), np.uint16)), ".npy")
    prepare.prepare(tmp_path / "others", tmp_path / "other")
    with pytest.raises(ValueError, match="None of the 1 tokens in .*other has the key of a sample with pixels, such as 's000'"):
        open_index(tmp_path / "pixels", "val", tokens_root=tmp_path / "other").check_tokens()


def test_tokens_of_other_places_and_shards_in_a_data_set_are_refused(weights, quick, tmp_path):
    """The keys may be the same where other rasters were packed under the same names."""
    for name, east in (("one", 10.0), ("other", 20.0)):
        with ShardWriter(tmp_path / name, "train", "DEM", "world", 1) as writer:
            for n, key in enumerate("abc"):
                writer.add(key, write_sample({"bands": tile(n), "center_lon": np.float64(east + n), "center_lat": np.float64(40)}))
    run(tmp_path / "one", weights, out=tmp_path / "tokens", array_record=True)
    open_index(tmp_path / "one", "train", tokens_root=tmp_path / "tokens").check_tokens()
    with pytest.raises(ValueError, match="Sample 'a' lies at 20.0000, 40.0000, and its tokens in .*tokens were made of one at 10.0000, 40"):
        open_index(tmp_path / "other", "train", tokens_root=tmp_path / "tokens").check_tokens()
    before = contents(tmp_path / "tokens")
    with pytest.raises(ValueError, match="tokens is a data set of records, beside which token shards would be lost; give --out another"):
        run(tmp_path / "one", weights, out=tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == before


def test_the_command_writes_records(weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tokenize, "encoder", lambda *_: lambda images: (np.full((14, 14), 7) for _ in images))
    write_shard(tmp_path / "data", 1, {"a": tile(1, modalities.IMAGE_SIZE)})
    command = ["tokenize", f"--data={tmp_path / 'data'}", f"--weights={weights}", "--array_record"]
    assert cli.main(command) == 2
    assert "give --out a new folder" in capsys.readouterr().err
    assert cli.main([*command, f"--out={tmp_path / 'out'}"]) == 0
    assert records.is_prepared(tmp_path / "out", "train")


def test_tokens_of_other_pixels_under_the_same_keys_are_refused(root, weights, quick, tmp_path):
    run(root, weights, out=tmp_path / "tokens")
    write_shard(root, 1, {"0": tile(4), "a": tile(4)}, "LULC")  # joined with another modality, whose keys come first
    open_index(root, "train", tokens_root=tmp_path / "tokens").check_tokens()
    write_shard(tmp_path / "other", 1, {"a": tile(5), "b": tile(6, SIZE)})
    with pytest.raises(ValueError, match="DEM_tokens/world_shard_000001.tar holds tokens of other pixels than those of .*other"):
        open_index(tmp_path / "other", "train", tokens_root=tmp_path / "tokens").check_tokens()
    shutil.copytree(tmp_path / "tokens" / "train" / "DEM_tokens", tmp_path / "other" / "train" / "DEM_tokens")
    report = check.check(tmp_path / "other", "train", workers=1)
    assert not report.ok and any("holds tokens of other pixels" in problem for problem in report.problems)
