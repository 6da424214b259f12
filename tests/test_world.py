"""The embedded world: statistics, physics, determinism, and the shards that `data synthesize` writes."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from terramind_jax import geo
from terramind_jax.data import clouds, world
from terramind_jax.data.index import open_index
from terramind_jax.data.synthesize import synthesize, write_tiles
from terramind_jax.data.world import draws, landcover, optics, people, place, radar, spectra, terrain
from terramind_jax.modalities import LULC_CLASSES, MODALITIES

SIZE = 120
DTYPES = {name: m.dtype for name, m in MODALITIES.items() if m.dtype}


@pytest.fixture(scope="module")
def scenes():
    return [world.scene(0, i, "train", SIZE) for i in range(48)]


def parts(index, seed=0, size=SIZE, **changes):
    """Place, terrain and cover of a scene, with some of the place's latents replaced."""
    here = dataclasses.replace(place.draw(seed, "train", index), **changes)
    ground = terrain.make(draws.stream(seed, "train", index, "terrain"), here, size)
    return here, ground, landcover.make(draws.stream(seed, "train", index, "cover"), here, ground, size)


# ---- formats ----------------------------------------------------------------------------------------------------------------


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    world.scene(0, 7, "train", 48)
    a, b = world.scene(3, 5, "train", 48), world.scene(3, 5, "train", 48)
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
    for other in (world.scene(4, 5, "train", 48), world.scene(3, 6, "train", 48), world.scene(3, 5, "val", 48)):
        assert not np.array_equal(a.arrays["S2L2A"], other.arrays["S2L2A"])


def test_dtypes_shapes_and_subsets_are_the_published_ones(scenes):
    for scene in scenes:
        both = {"S2L1C", "S2L2A", "S2RGB", "DEM", "LULC", "NDVI"}
        assert set(scene.arrays) == both | {"S1GRD" if scene.subset == "ssl4eos12" else "S1RTC"}
        for name, array in scene.arrays.items():
            assert array.dtype == DTYPES[name] and array.shape == (SIZE, SIZE, len(MODALITIES[name].bands)), name
            assert np.isfinite(array.astype(np.float32)).all()
        assert set(scene.truth) == set(scene.arrays) - {"DEM", "LULC"}
        assert all(scene.truth[n].dtype == scene.arrays[n].dtype and scene.truth[n].shape == scene.arrays[n].shape for n in scene.truth)
        assert scene.cloud_mask.shape == (SIZE, SIZE) and scene.cloud_mask.dtype == np.uint8
        assert scene.times["DEM"] == 0 and 0 < abs(scene.times["S2L2A"] - scene.times.get("S1RTC", scene.times.get("S1GRD"))) < 9e14
    assert {s.subset for s in scenes} == {"majortom", "ssl4eos12"}


@pytest.mark.parametrize("size", [100, 42])
def test_a_size_that_60_m_bands_do_not_tile_is_refused(size):
    with pytest.raises(ValueError, match=f"Scene size {size} is not a multiple of 6"):
        world.scene(0, 0, "train", size)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        world.scene(0, 0, "test", 48)


def test_native_resolutions_are_repeats(scenes):
    for band, step in enumerate(spectra.NATIVE):
        x = scenes[1].arrays["S2L1C"][..., band]
        np.testing.assert_array_equal(x, np.kron(x[::step, ::step], np.ones((step, step), x.dtype)))
        if step < 6:
            assert (x[:, step::step] != x[:, :-step:step]).any()


def test_offsets_shift_stored_values(scenes):
    assert {s.offsets["S2L1C"] for s in scenes} == {s.offsets["S2L2A"] for s in scenes} == {0, 1000}
    for s in scenes:
        cirrus = s.truth["S2L1C"][..., spectra.CIRRUS_BAND]
        assert cirrus.min() >= s.offsets["S2L1C"] and np.quantile(cirrus, 0.02) < s.offsets["S2L1C"] + 400


def test_ndvi_comes_from_the_stored_l2a(scenes):
    for s in scenes[:4]:
        red, nir = (s.arrays["S2L2A"][..., b].astype(np.float32) for b in (3, 7))
        np.testing.assert_array_equal(s.arrays["NDVI"][..., 0], ((nir - red) / (nir + red)).astype(np.float16))


def test_s2rgb_is_one_stretch_a_scene(scenes):
    for s in scenes[:6]:
        x, y = s.arrays["S2L2A"][..., [3, 2, 1]].astype(float), s.arrays["S2RGB"].astype(float)
        inside = (y > 0) & (y < 255)
        slope, intercept = np.polyfit(x[inside], y[inside], 1)
        assert np.abs(slope * x + intercept - y)[inside].max() < 1.01


# ---- statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in DTYPES if n != "LULC"])
def test_means_and_spreads_are_within_30_percent_of_the_released_ones(scenes, name):
    values = np.concatenate([s.arrays[name].reshape(-1, len(MODALITIES[name].bands)) for s in scenes if name in s.arrays]).astype(
        np.float64
    )
    np.testing.assert_allclose(values.mean(axis=0) / MODALITIES[name].mean, 1, atol=0.3)
    np.testing.assert_allclose(values.std(axis=0) / MODALITIES[name].std, 1, atol=0.3)


def test_all_ten_classes_occur(scenes):
    assert set(np.unique(np.concatenate([s.arrays["LULC"].ravel() for s in scenes]))) == set(range(10))


def test_most_of_the_ground_belongs_to_objects_of_16_pixels_and_more(scenes):
    """In an object of that size most 16-pixel windows around its pixels hold mainly its class."""
    shares = []
    for s in scenes[:16]:
        lulc = np.where(s.cloud_mask == clouds.THICK_CLOUD, 99, s.arrays["LULC"][..., 0])
        for code in set(np.unique(lulc)) - {99}:
            shares.append(terrain.box_blur((lulc == code).astype(np.float32), 8)[lulc == code])
    assert np.median(np.concatenate(shares)) > 0.7


def test_elevation_can_be_learned_from_the_colours_of_a_scene():
    many = [world.scene(1, i, "train", 48) for i in range(160)]
    x = np.log(np.array([np.r_[s.arrays["S2L2A"].mean((0, 1)), s.arrays["S2L2A"].std((0, 1))] for s in many]) + 1)
    x = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    y = np.array([s.arrays["DEM"].mean() for s in many])
    predicted = np.zeros(len(y))
    for fold in range(8):
        test = np.arange(len(y)) % 8 == fold
        gram = x[~test].T @ x[~test] + 0.5 * np.eye(x.shape[1])
        predicted[test] = x[test] @ np.linalg.solve(gram, x[~test].T @ y[~test])
    assert 1 - ((predicted - y) ** 2).mean() / y.var() > 0.35


@pytest.mark.parametrize("pair", [("water", "shadow"), ("bare ground", "built area"), ("crops", "rangeland")])
def test_some_pairs_are_separated_by_context_only(scenes, pair):
    """A nearest-mean rule on a pixel's visible bands confuses the two often, though their means differ."""
    groups = []
    for name in pair:
        pixels = []
        for s in scenes:
            light = s.arrays["S2L2A"].astype(np.float32) - s.offsets["S2L2A"]
            shadow = s.cloud_mask == clouds.CLOUD_SHADOW
            where = (
                shadow & (s.arrays["LULC"][..., 0] != 1)
                if name == "shadow"
                else (s.arrays["LULC"][..., 0] == LULC_CLASSES.index(name)) & ~shadow
            )
            pixels.append(light[where][::7])
        groups.append(np.log(np.maximum(np.concatenate(pixels)[:, [1, 2, 3]], 10)))
    means = [g.mean(0) for g in groups]
    wrong = [(((g - means[1 - k]) ** 2).sum(1) < ((g - means[k]) ** 2).sum(1)).mean() for k, g in enumerate(groups)]
    assert 0.08 < np.mean(wrong) < 0.5, wrong


# ---- physics ----------------------------------------------------------------------------------------------------------------


def test_water_flows_down_and_rivers_lie_low():
    rng = np.random.default_rng(0)
    z = draws.fractal(rng, 40, 2.0) * 50
    filled, parent, order = terrain.flood(z, np.array([0, 1, 2]), np.full(1600, 0.01))
    assert sorted(order) == list(range(1600)) and (filled >= z.ravel() - 1e-4).all()
    up = np.array(parent)
    assert set(np.flatnonzero(up < 0)) == {0, 1, 2} and (filled[up >= 0] > filled[up[up >= 0]] - 1e-3).all()
    lower = []
    for i in range(12):
        _, ground, _ = parts(i)
        if ground.river.sum() > 50:
            lower.append(np.median(ground.elevation[ground.river]) < np.median(ground.elevation[~ground.river]))
    assert np.mean(lower) > 0.75


def test_snow_lies_where_it_is_cold(scenes):
    snow = np.array([(s.cloud_mask == clouds.SNOW).mean() for s in scenes])
    cold = np.array([s.place.today - place.LAPSE * s.arrays["DEM"].mean() for s in scenes])
    assert snow[cold > 8].max() < 0.05 and snow[cold < -3].mean() > 0.2


def test_height_alone_changes_the_cover():
    lush = dict(lat=45.0, moisture=0.6, annual=10.0, warmest=19.0, today=18.0, relief=40.0, humans=0.0, coastal=False)
    low, high = parts(3, elevation=200.0, **lush)[2], parts(3, elevation=3300.0, **lush)[2]
    assert low.trees.mean() > 0.3 > 0.05 > high.trees.mean()
    assert (high.classes == landcover.BARE).mean() + (high.classes == landcover.SNOW).mean() > 0.7


def test_clouds_are_seen_by_sentinel_2_only(monkeypatch):
    index, draw = 3, place.draw
    results = []
    for share in (0.0, 0.4):
        monkeypatch.setattr(place, "draw", lambda *a, share=share: dataclasses.replace(draw(*a), cloudiness=share))
        results.append(world.scene(0, index, "train", SIZE))
    clear, cloudy = results
    for name in ("S1GRD", "DEM"):
        np.testing.assert_array_equal(clear.arrays[name], cloudy.arrays[name])
    thick, shadow = (cloudy.cloud_mask == code for code in (clouds.THICK_CLOUD, clouds.CLOUD_SHADOW))
    assert 0.2 < thick.mean() < 0.6 and shadow.any()
    np.testing.assert_array_equal(cloudy.arrays["LULC"][..., 0] == landcover.CLOUDS, thick)
    assert not (clear.arrays["LULC"] == landcover.CLOUDS).any()
    for name in ("S2L1C", "S2L2A"):
        before, after = (s.truth[name][..., 2].astype(float) for s in results)
        assert after[thick].mean() > 2 * before[thick].mean() and after[shadow].mean() < before[shadow].mean()


def test_shadows_fall_away_from_the_sun():
    here = dataclasses.replace(place.draw(0, "train", 1), cloudiness=0.3, sun_azimuth=np.radians(135.0), sun_zenith=np.radians(45.0))
    sky = optics.sky(draws.stream(0, "train", 1, "clouds"), here, SIZE)
    best = max(
        ((r, c) for r in range(-27, 28) for c in range(-27, 28)),
        key=lambda d: (
            np.roll(sky.cloud, d, (0, 1))[28:-28, 28:-28] * sky.shadow[28:-28, 28:-28]
            - (np.roll(sky.cloud, d, (0, 1))[28:-28, 28:-28] - sky.shadow[28:-28, 28:-28]) ** 2
        ).sum(),
    )
    assert best[0] < 0 and abs(best[0] - best[1]) <= 1  # the sun stands in the south-east: shadows lie to the north-west


def test_speckle_is_gamma_in_linear_power(scenes):
    for s in scenes[:4]:
        for name in {"S1GRD", "S1RTC"} & set(s.arrays):
            ratio = 10 ** ((s.arrays[name].astype(float) - s.truth[name].astype(float)) / 10)
            assert abs(ratio.mean() - 1) < 0.02 and abs(ratio.var() * radar.LOOKS - 1) < 0.1


def test_incidence_shows_in_grd_and_is_removed_in_rtc():
    here, ground, cover = parts(3, relief=250.0, elevation=2000.0)
    images = {}
    for grd in (True, False):
        images[grd] = radar.product(draws.stream(0, "train", 3, "radar"), here, ground, cover, SIZE, grd=grd)[1].astype(float)
    rng = draws.stream(0, "train", 3, "radar")
    radar.gamma_nought(rng, here, ground, cover, SIZE)
    effect = 10 * np.log10(radar.slope_effect(rng, ground))
    assert effect.std() > 1
    bright = ~cover.water & (effect > -6)  # elsewhere thermal noise hides it
    np.testing.assert_allclose((images[True] - images[False])[0][bright], effect[bright], atol=1.0)
    assert abs(np.corrcoef(images[False][0].ravel(), effect.ravel())[0, 1]) < 0.25


def test_fields_change_between_the_optical_and_the_radar_date():
    for i in range(20):
        _, _, cover = parts(i, radar_days=8, humans=0.9, elevation=100.0, moisture=0.55, warmest=24.0, relief=10.0)
        crops = cover.classes == landcover.CROPS
        if crops.mean() > 0.1:
            assert 0.005 < np.abs(cover.green - cover.green_radar)[crops].mean() < 0.3
            return
    pytest.fail("No scene with crops.")


def test_parcels_are_uniform_inside():
    here, ground, _ = parts(3, humans=1.0, relief=5.0, moisture=0.6)
    ones = np.ones((SIZE, SIZE), np.float32)
    f = people.fields(draws.stream(0, "train", 3, "cover"), here, ground, SIZE, 22 * ones, 0.6 * ones, ones > 0)
    assert f.crops.mean() > 0.2
    assert (f.peak[:, 1:] == f.peak[:, :-1]).mean() > 0.9


def test_truth_is_the_expected_value(scenes):
    for name in ("S2L1C", "S2L2A"):
        error = np.concatenate([(s.arrays[name].astype(float) - s.truth[name]).reshape(-1, s.arrays[name].shape[-1]) for s in scenes])
        assert (error.std(axis=0) > 2).all() and (np.abs(error.mean(axis=0)) < 6).all()


def test_places_are_consistent_with_the_climate_and_splits_do_not_share_blocks():
    many = {split: [place.draw(0, split, i) for i in range(200)] for split in draws.SPLITS}
    blocks = {split: {place.block(p.lon, p.lat) for p in v} for split, v in many.items()}
    assert not blocks["train"] & blocks["val"] and min(map(len, blocks.values())) > 15
    latitude, annual = np.array([(abs(p.lat), p.annual) for p in many["train"]]).T
    assert np.corrcoef(latitude, annual)[0, 1] < -0.9
    assert all(-180 <= p.lon <= 180 and -56 <= p.lat <= 74 and p.sun_zenith < np.radians(70) for v in many.values() for p in v)


# ---- shards -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("world") / "synthetic")
    synthesize(out, scenes=6, val_scenes=4, seed=5, size=48, workers=1, shard_size=2)
    return out


def files(root):
    return {
        os.path.relpath(os.path.join(d, f), root): open(os.path.join(d, f), "rb").read() for d, _, names in os.walk(root) for f in names
    }


def test_shards_lie_as_published_and_read_back(root):
    tars = {name for name in files(root) if name.endswith(".tar")}
    assert {
        "train/S2L2A/majortom_shard_000001.tar",
        "train/S2L2A/majortom_shard_000002.tar",
        "train/S1GRD/ssl4eos12_shard_000003.tar",
    } <= tars
    assert "train/S1RTC/ssl4eos12_shard_000003.tar" not in tars and "train/S1GRD/majortom_shard_000001.tar" not in tars
    index = open_index(root, "train")
    assert len(index) == 6
    for i, key in enumerate(index.keys):
        scene = world.scene(5, int(key[-7:]), "train", 48)
        assert scene.key == key and index.coordinates(i) == (scene.lon, scene.lat)
        for name in index.modalities:
            if name in scene.arrays:
                stored = index.read_all(i, name)
                np.testing.assert_array_equal(index.read(i, name), scene.arrays[name])
                assert stored["time"].tolist() == [scene.times[name]] and ("cloud_mask" in stored) == name.startswith("S2")
                if name in scene.truth:
                    np.testing.assert_array_equal(np.moveaxis(stored["truth"][0], 0, -1), scene.truth[name])


def test_shards_say_where_they_lie_and_which_offset_they_carry(root):
    index = open_index(root, "val")
    from terramind_jax import geo

    for i in range(len(index)):
        where = index.place(i)
        assert np.allclose(geo.lonlat(where), index.coordinates(i), atol=2e-4)
        assert index.attributes(i, "S2L2A")["offset"] in (0, 1000)


def test_workers_do_not_change_a_byte(root, tmp_path):
    other = str(tmp_path / "again")
    synthesize(other, scenes=6, val_scenes=4, seed=5, size=48, workers=2, shard_size=2)
    a, b = files(root), files(other)
    written = {name for name in a if name.endswith((".tar", ".json"))}
    assert written == set(b) and all(a[name] == b[name] for name in written)


def test_a_finished_synthesis_is_left_alone_and_anything_else_refused(root, tmp_path, capsys):
    with open(os.path.join(root, "dataset_info.json"), encoding="utf-8") as f:
        assert json.load(f)["scenes"] == {"train": {"majortom": 3, "ssl4eos12": 3}, "val": {"majortom": 2, "ssl4eos12": 2}}
    synthesize(root, scenes=6, val_scenes=4, seed=5, size=48, workers=1, shard_size=2)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="choose another folder"):
        synthesize(root, scenes=7, val_scenes=4, seed=5, size=48, workers=1, shard_size=2)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no dataset_info.json"):
        synthesize(str(tmp_path), scenes=1, val_scenes=0, size=48)
    with pytest.raises(ValueError, match="scenes and shard_size are at least 1"):
        synthesize(str(tmp_path / "none"), scenes=0)


def test_the_world_needs_no_jax():
    code = "import sys, terramind_jax.data.world, terramind_jax.data.synthesize; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiles_are_geotiffs_of_one_grid(tmp_path):
    names = write_tiles(tmp_path / "tiles", count=2, size=48)
    for name, index in zip(names, (1, 3), strict=True):
        scene = world.scene(0, index, "val", 48)
        assert scene.key == name
        read = {m: geo.read(tmp_path / "tiles" / m / f"{name}.tif", m) for m in scene.arrays}
        for m, array in scene.arrays.items():
            np.testing.assert_array_equal(read[m], array.astype(np.float32) if array.dtype == np.float16 else array)
            assert geo.is_metric(read[m].place) and read[m].place == read["S1GRD"].place
        np.testing.assert_allclose(geo.lonlat(read["DEM"].place), (scene.lon, scene.lat), atol=1e-3)
    with pytest.raises(FileExistsError):
        write_tiles(tmp_path / "tiles", count=2, size=48)
    for wrong in (dict(count=0), dict(size=50)):
        with pytest.raises(ValueError):
            write_tiles(tmp_path / "others", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["tiles"]
