"""Validation tiles: whole cells, no neighbours among those that are trained on, repeat dates together, the same in any order."""

import numpy as np
import pytest

from terramind_jax import geo
from terramind_jax.data import splits
from terramind_jax.data.splits import DROPPED, assign

SIDE = 264


def place(column, row=0, height=SIDE, width=SIDE):
    """A tile of a mosaic, counted from its corner."""
    return geo.Place("EPSG:32632", (10.0, 0.0, 400_000 + 2640.0 * column, 0.0, -10.0, 5_400_000 - 2640.0 * row), height, width)


def assign_scenes(scenes, val_fraction=0.1, seed=0):
    names = [f"n{i:04d}" for i in range(len(scenes))]
    return [own for (own,) in assign(names, scenes, [[s] for s in scenes], val_fraction, seed)]


def middles(scenes, found, split):
    return np.array([geo.lonlat(s) for s, own in zip(scenes, found, strict=True) if own == split]) * (111_195 * 0.66, 111_195)


@pytest.mark.parametrize("seed", range(3))
def test_no_tile_of_a_mosaic_touches_a_held_out_one(seed):
    mosaic = [place(c, r) for r in range(20) for c in range(20)]
    found = assign_scenes(mosaic, seed=seed)
    val, train = middles(mosaic, found, "val"), middles(mosaic, found, "train")
    apart = np.abs(val[:, None] - train[None]).max(-1)
    assert apart.min() > 2640 * 1.3  # a tile and more between middles: none touches
    counts = {split: found.count(split) for split in set(found)}
    assert 0.03 < counts["val"] / 400 < 0.25 and counts["train"] > 0.5 * 400 and counts[DROPPED] < 0.3 * 400


def test_a_large_scene_is_split_into_cells():
    scene = place(0, height=41 * SIDE, width=41 * SIDE)  # 108 km, as of Sentinel-2
    tiles = [scene.window(r * SIDE, c * SIDE, SIDE, SIDE) for r in range(41) for c in range(41)]
    (found,) = assign(["s"], [scene], [tiles], 0.1, 0)
    assert 0.03 < found.count("val") / len(found) < 0.3 and found.count("train") > 0.5 * len(found)
    assert middles(tiles, found, "val").shape[0] == found.count("val")


def test_dates_of_a_place_stay_together():
    scenes = [place(4 * (i // 3), 7 * (i % 2 == 0) * 0) for i in range(60)]  # three dates each, apart
    found = np.array(assign_scenes(scenes)).reshape(-1, 3)
    assert (found == found[:, :1]).all() and (found == "val").any() and (found == "train").any()


def test_adding_files_moves_few_others():
    scenes = [place(12 * i) for i in range(24)]
    before, after = assign_scenes(scenes), assign_scenes([*scenes, place(12 * 30), place(12 * 31)])
    assert sum(a != b for a, b in zip(before, after, strict=False)) <= 3


def test_files_without_a_place_are_locations_of_their_own():
    nowhere = geo.Place("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), SIDE, SIDE)
    found = assign_scenes([nowhere] * 8, val_fraction=0.25)
    assert found.count("val") == 2 and found.count("train") == 6


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match="touch these, so that none is left for training"):
        assign_scenes([place(0), place(1)])
    with pytest.raises(ValueError, match="one location, and two are needed"):
        assign_scenes([place(0), place(0.1)])
    assert assign_scenes([place(0), place(1)], val_fraction=0) == ["train", "train"]


def test_cells_are_about_as_wide_as_high():
    for latitude in (0.0, 40.0, -70.0):
        names = {splits._cell(lon, latitude, 50_000) for lon in np.linspace(10, 20, 2000)}
        assert len(names) == pytest.approx(10 * 111.2 * np.cos(np.radians(latitude)) / 50, abs=2)
