"""GeoTIFFs to shards and back, splits by location, declared land-cover codes, and everything that is refused."""

import json
import os
import pathlib

import numpy as np
import pytest
import rasterio

from terramind_jax import cli, geo
from terramind_jax.data import check, stats
from terramind_jax.data.index import open_index
from terramind_jax.data.pack import find_scenes, is_packed, pack
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.data.stored import LULC_CODES, to_stored
from terramind_jax.geo import Place
from terramind_jax.modalities import LULC_CLASSES, MODALITIES

TILES = pathlib.Path(os.environ.get("TERRAMIND_JAX_TILES") or pathlib.Path(__file__).parents[2] / "shared/data/terramesh_examples")


def _place(x=0.0, height=224, width=224, crs="EPSG:32632"):
    return Place(crs, (10.0, 0.0, 500000.0 + x, 0.0, -10.0, 5000000.0), height, width)


def _write(root, modality, name, place, pixels=None, **options):
    if pixels is None:
        low, high = {"DEM": (0, 900), "S1RTC": (-30, 0), "LULC": (1, 9), "NDVI": (-1, 1)}.get(modality, (0, 9000))
        noise = np.random.default_rng(len(name)).random((place.height, place.width, len(MODALITIES[modality].bands)))
        pixels = (low + noise * (high - low)).astype({"S1RTC": "float64", "NDVI": "float64", "LULC": "uint8"}.get(modality, "int16"))
    geo.write(root / modality / f"{name}.tif", pixels, place, **options)


@pytest.fixture
def src(tmp_path):
    for i in range(2):
        _write(tmp_path / "src", "DEM", f"n{i}", _place(i * 9000))
    return tmp_path / "src"


def _pixels(out):
    """Every packed (key, modality) -> pixels, over both splits."""
    found = {}
    for split in check.splits(out):
        index = open_index(out, split)
        for i, key in enumerate(index.keys):
            for m, modality in enumerate(index.modalities):
                if index.available[i, m]:
                    found[key, modality] = index.read(i, modality)
    return found


def test_pixels_places_and_missing_modalities_survive(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(3):
        for modality in ("DEM", "S1RTC")[: 1 + (i != 1)]:
            _write(src, modality, f"n{i}", _place(i * 9000))
    info = pack(str(src), str(out))
    assert json.loads((out / "dataset_info.json").read_text()) == info
    assert info["splits"]["val"]["locations"] == 1 and info["splits"]["train"]["locations"] == 2
    found = _pixels(out)
    assert len(found) == 5 and ("n1", "S1RTC") not in found
    for (key, modality), pixels in found.items():
        assert pixels.dtype == MODALITIES[modality].dtype
        np.testing.assert_array_equal(pixels, geo.read(src / modality / f"{key}.tif").astype(pixels.dtype))
    index = open_index(out, "train")
    for i, key in enumerate(index.keys):
        place = geo.place(src / "DEM" / f"{key}.tif")
        assert geo.same_grid(index.place(i), place) and index.coordinates(i) == geo.lonlat(place)


def test_large_files_are_cut_without_losing_pixels(tmp_path):
    place = _place(height=300, width=600)
    _write(tmp_path / "src", "DEM", "big.v1", place)
    _write(tmp_path / "src", "DEM", "n", _place(30000))
    info = pack(str(tmp_path / "src"), str(tmp_path / "out"), shard_size=4, val_fraction=0.5)
    assert sorted(s["locations"] for s in info["splits"].values()) == [1, 6]
    whole, seen = geo.read(tmp_path / "src" / "DEM" / "big.v1.tif"), np.zeros((300, 600), bool)
    for split in ("train", "val"):
        index = open_index(tmp_path / "out", split)
        assert len({k[:3] for k in index.keys}) == 1  # tiles of one file stay together
        for i in (i for i, k in enumerate(index.keys) if k.startswith("big_v1")):
            x, y = index.place(i).xy(0, 0)
            row, column = round((5000000 - y) / 10), round((x - 500000) / 10)
            np.testing.assert_array_equal(index.read(i, "DEM"), whole[row : row + 264, column : column + 264])
            seen[row : row + 264, column : column + 264] = True
            assert index.keys[i].endswith(f"_r{row:05d}_c{column:05d}")
    assert seen.all() and len(list(tmp_path.glob("out/*/DEM/packed_shard_*.tar"))) == 3


def test_packing_twice_gives_the_same_bytes(src, tmp_path):
    for name in "ab":
        pack(str(src), str(tmp_path / name))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_shards_of_other_files_are_never_taken_for_these(src, tmp_path):
    out = str(tmp_path / "out")
    assert not is_packed(str(src), out)
    pack(str(src), out)
    assert is_packed(str(src), out)
    with pytest.raises(ValueError, match="or with other LULC codes"):
        is_packed(str(src), out, lulc_codes="esri")
    _write(src, "DEM", "added", _place(9000))
    with pytest.raises(ValueError, match="choose another --out, or delete it"):
        is_packed(str(src), out)


def test_files_of_one_place_stay_in_one_split(tmp_path):
    for i in range(4):  # two dates at each of four places that touch their neighbours
        for date in ("x", "y"):
            _write(tmp_path / "src", "DEM", f"n{i}{date}", _place(i * 2240))
    for seed in range(3):
        pack(str(tmp_path / "src"), str(tmp_path / str(seed)), seed=seed, val_fraction=0.3)
        held_out = list(open_index(tmp_path / str(seed), "val").keys)
        assert len(held_out) == 2 and held_out[0][:2] == held_out[1][:2]


def test_one_location_cannot_be_split(tmp_path):
    _write(tmp_path / "src", "DEM", "a", _place())
    _write(tmp_path / "src", "DEM", "b", _place(30))
    with pytest.raises(ValueError, match="one location, and two are needed"):
        pack(str(tmp_path / "src"), str(tmp_path / "out"))
    info = pack(str(tmp_path / "src"), str(tmp_path / "out"), val_fraction=0)
    assert info["splits"] == {"train": {"locations": 2, "DEM": 2}, "val": {"locations": 0}}


@pytest.mark.parametrize("codes", LULC_CODES)
def test_declared_codes_become_the_ten_classes(codes):
    table = LULC_CODES[codes]
    values = np.array(sorted(table), np.uint8).reshape(1, -1, 1)
    assert to_stored(values, "LULC", "x.tif", lulc_codes=codes).ravel().tolist() == [table[v] for v in sorted(table)]
    assert set(table.values()) <= set(range(len(LULC_CLASSES)))
    with pytest.raises(ValueError, match=f"x.tif holds the value 99, which is not among the declared {codes} codes"):
        to_stored(np.full((2, 2, 1), 99, np.uint8), "LULC", "x.tif", lulc_codes=codes)


def test_the_command_line_knows_the_same_codes():
    assert cli.LULC_CODES == tuple(LULC_CODES)


def test_codes_by_name():
    names = {
        "esri": {2: "trees", 7: "built area", 10: "clouds", 11: "rangeland"},
        "dynamicworld": {0: "water", 2: "rangeland", 6: "built area"},
    }
    for codes, expected in names.items():
        assert {v: LULC_CLASSES[LULC_CODES[codes][v]] for v in expected} == expected


def test_codes_must_be_declared(src, tmp_path):
    _write(src, "LULC", "n0", _place())
    with pytest.raises(ValueError, match=r"LULC/n0.tif is a land-cover map .* not declared; .* terramesh, esri, dynamicworld"):
        pack(str(src), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="Unknown LULC codes 'corine'"):
        pack(str(src), str(tmp_path / "out"), lulc_codes="corine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("modality", "value", "options", "message"),
    [
        ("NDVI", np.float64(np.nan), {}, "x.tif has 4 NaN or infinite pixel values"),
        ("S1GRD", np.float32(np.inf), {}, "x.tif has 4 NaN or infinite"),
        ("DEM", np.int16(-9999), {"nodata": -9999.0}, r"4 pixel values without data \(-9999\)"),
        ("DEM", np.int16(-9999), {}, "values from -9999 to -9999; DEM is stored as m, int16 from -500 to 9000"),
        ("S2L2A", np.int16(-1), {}, "values from -1 to -1; S2L2A is stored as reflectance x 10000, uint16"),
        ("S2L2A", np.float32(0.3), {}, "x.tif holds fractions"),
        ("S1RTC", np.float32(0.02), {}, "looks like linear power; S1RTC is stored as dB"),
        ("NDVI", np.int16(4000), {}, "values from 4000 to 4000; NDVI"),
    ],
)
def test_values_that_cannot_be_stored(modality, value, options, message):
    with pytest.raises(ValueError, match=message):
        to_stored(np.full((2, 2, 1), value), modality, "x.tif", **options)


@pytest.mark.parametrize("offset", [0, 1000])
def test_sentinel2_is_never_shifted(offset):
    pixels = np.arange(16).reshape(4, 4, 1) + offset
    for dtype in (np.int16, np.float32, np.uint16):
        stored = to_stored(pixels.astype(dtype), "S2L2A", "x.tif")
        np.testing.assert_array_equal(stored, pixels)
        assert stored.dtype == np.uint16


def test_acquisition_time_comes_from_the_tags(src, tmp_path):
    with rasterio.open(src / "DEM" / "n0.tif", "r+") as file:
        file.update_tags(datetime="2021-07-23T13:22:41.000000000")
    pack(str(src), str(tmp_path / "out"), val_fraction=0)
    index = open_index(tmp_path / "out", "train")
    times = [index.read_all(i, "DEM", ("time",))["time"].item() for i in range(2)]
    assert times == [int(np.datetime64("2021-07-23T13:22:41", "ns").astype(np.int64)), 0]
    assert index.attributes(0, "DEM") == {"source": "DEM/n0.tif"}


def test_elevation_in_fractions_of_a_metre_is_rounded():
    np.testing.assert_array_equal(to_stored(np.float32([[[-3.6, 2.4]]]), "DEM", "x.tif"), [[[-4, 2]]])


def test_files_of_a_name_must_overlap(src, tmp_path):
    _write(src, "NDVI", "n0", _place(1e-9))
    assert len(find_scenes(str(src))) == 2
    _write(src, "NDVI", "n0", _place(4000.0))
    with pytest.raises(ValueError, match="share a name but do not overlap"):
        pack(str(src), str(tmp_path / "out"))


def test_folders_and_files_that_cannot_be_packed(src, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*absent"):
        pack(str(tmp_path / "absent"), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="No GeoTIFFs in .*; expected MODALITY/NAME.tif"):
        pack(str(src / "DEM"), str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="is not empty"):
        pack(str(src), str(src))
    with pytest.raises(ValueError, match="val_fraction is 1, expected"):
        pack(str(src), str(tmp_path / "out"), val_fraction=1)
    _write(src, "DEM", "small", _place(90000, height=223))
    with pytest.raises(ValueError, match="small.tif is 223x224 pixels; at least 224x224"):
        pack(str(src), str(tmp_path / "out"))
    os.remove(src / "DEM" / "small.tif")
    geo.write(src / "S2L2A" / "n0.tif", np.zeros((224, 224, 3), np.uint16), _place())
    with pytest.raises(ValueError, match="S2L2A/n0.tif has 3 bands, expected 12"):
        pack(str(src), str(tmp_path / "out"))
    (src / "S2L2A").rename(src / "s2-l2a")
    with pytest.raises(ValueError, match="s2-l2a is no modality; rename it to S2L2A"):
        pack(str(src), str(tmp_path / "out"))
    (src / "s2-l2a").rename(src / "Sentinel2")
    with pytest.warns(UserWarning, match="Sentinel2 in .* hold GeoTIFFs and are left out; folders are named after .*S2L2A"):
        find_scenes(str(src))


def test_a_failed_pack_leaves_nothing_and_can_be_repeated(src, tmp_path):
    _write(src, "NDVI", "n1", _place(9000), np.full((224, 224, 1), np.nan))
    with pytest.raises(ValueError, match="n1.tif has 50176 NaN"):
        pack(str(src), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["src"]
    os.remove(src / "NDVI" / "n1.tif")
    assert pack(str(src), str(tmp_path / "out"))["files"] == 2


def test_check_and_stats(src, tmp_path):
    out = tmp_path / "out"
    pack(str(src), str(out), val_fraction=0)
    report = check.check(out, "train", workers=1)
    assert report.ok and report.modalities["DEM"].present == 2 and "No problems" in check.format_check(report)
    values = np.concatenate([geo.read(src / "DEM" / f"n{i}.tif").ravel() for i in range(2)]).astype(float)
    found = stats.stats(out, "train")["DEM"]
    assert found.mean[0] == pytest.approx(values.mean()) and found.std[0] == pytest.approx(values.std())
    assert "951.272" in stats.format_stats({"DEM": found})
    assert check.format_index(check.index(out)).startswith("train: 2 locations")


@pytest.mark.parametrize("workers", [1, 3])
def test_stats_are_those_of_all_pixels_together(tmp_path, monkeypatch, workers):
    """With any number of processes, the same to the last bit; pixels without data are left out."""
    monkeypatch.setattr(stats, "PIECE", 2)
    rng, stored = np.random.default_rng(0), {"S2L2A": [], "NDVI": []}
    for number in range(3):
        for modality in stored:
            with ShardWriter(tmp_path, "train", modality, "x", number) as shard:
                for i in range(3):
                    bands = rng.integers(0, 9000, (1, 12, 8, 8)) if modality == "S2L2A" else 1e3 + rng.random((1, 1, 8, 8))
                    bands[..., :2, i] = 0 if modality == "S2L2A" else np.nan
                    bands = bands.astype({"S2L2A": np.uint16, "NDVI": np.float32}[modality])
                    stored[modality].append(bands[0])
                    shard.add(f"{number}{i}", write_sample({"bands": bands}))
    found = stats.stats(tmp_path, "train", workers=workers)
    for modality, arrays in stored.items():
        values = np.stack(arrays).astype(np.float64).swapaxes(0, 1).reshape(len(arrays[0]), -1)
        values = values[:, ~np.isnan(values).any(0) & (values != 0).any(0)]
        np.testing.assert_allclose(found[modality].mean, values.mean(1), rtol=1e-12)
        np.testing.assert_allclose(found[modality].std, values.std(1), rtol=1e-9)
        assert found[modality].samples == 9
    assert stats.as_json(found) == stats.as_json(stats.stats(tmp_path, "train", workers=1))


def test_stats_can_be_pasted_into_a_declaration(tmp_path, capsys):
    from terramind_jax import declarations

    fields = {"bands": ["RAIN"], "unit": "mm"}
    (tmp_path / "modalities.json").write_text(json.dumps({"RAIN": fields}))
    with ShardWriter(tmp_path, "train", "RAIN", "x", 1) as shard:
        shard.add("a", write_sample({"bands": np.float32([[[[1, 2], [3, 4]]]])}))
    assert cli.main(["data", "stats", str(tmp_path), "--modality=RAIN", "--workers=1"]) == 0
    _, _, pasted = capsys.readouterr().out.partition("For modalities.json:")
    (tmp_path / "modalities.json").write_text("{" + pasted.strip() + "}")
    open_index(tmp_path, "train")
    assert declarations.of(["RAIN"])["RAIN"]["mean"] == [2.5]
    assert cli.main(["data", "stats", str(tmp_path), "--json", "--split=train"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["RAIN"]["std"] == [np.float64([1, 2, 3, 4]).std()]


def test_check_counts_what_is_wrong(tmp_path):
    def ndvi(value):
        return write_sample({"bands": np.full((1, 1, 4, 4), value, np.float16)})

    with ShardWriter(tmp_path, "val", "NDVI", "x", 0) as shard:
        for key, payload in {"a": ndvi(0.5), "b": ndvi(np.nan), "c": ndvi(9), "d": b"junk"}.items():
            shard.add(key, payload)
    with ShardWriter(tmp_path, "val", "LULC", "x", 0) as shard:
        shard.add("a", write_sample({"bands": np.array([0, 3, 3, 9], np.uint8).reshape(1, 1, 2, 2)}))
    with ShardWriter(tmp_path, "val", "S1GRD", "x", 0) as shard:
        shard.add("a", write_sample({"bands": np.array([-12, -20], np.float16).reshape(1, 2, 1, 1).repeat(4, 2).repeat(4, 3)}))
    report = check.check(tmp_path, "val", workers=1)
    assert report.modalities["S1GRD"].constant == 1 and report.modalities["NDVI"].constant == 0
    row = report.modalities["NDVI"]
    assert not report.ok and (row.present, row.corrupt, row.nan, row.out_of_range) == (4, 1, 1, 1)
    assert report.modalities["LULC"].missing == 3 and len(report.problems) == 4
    assert "sample 'd' is no zip file" in check.format_check(report)
    shares = stats.stats(tmp_path, "val", ["LULC"])["LULC"].classes
    np.testing.assert_allclose(shares, np.isin(np.arange(10), (0, 9)) * 0.25 + (np.arange(10) == 3) * 0.5)
    with pytest.raises(FileNotFoundError, match="No splits in"):
        check.splits(tmp_path / "val")


@pytest.mark.skipif(not TILES.is_dir(), reason="needs TerraMesh's example tiles: set TERRAMIND_JAX_TILES")
def test_real_tiles(tmp_path):
    info = pack(str(TILES), str(tmp_path / "out"), lulc_codes="terramesh")
    assert info["splits"]["train"]["locations"] == 3 and info["splits"]["val"]["locations"] == 1
    found = _pixels(tmp_path / "out")
    assert len(found) == 28
    for (key, modality), pixels in found.items():
        np.testing.assert_array_equal(
            pixels, geo.read(TILES / modality / f"{key}.tif", modality)
        )  # float16 holds the float64 files exactly
    assert all(check.check(tmp_path / "out", split, workers=1).ok for split in ("train", "val"))
