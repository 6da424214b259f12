"""Coordinates as tokens: the rule of spec 7.1."""

from __future__ import annotations

import numpy as np
import pytest

from terramind_jax import coordinates


def test_order_and_known_ids():
    assert coordinates.encode(0.0, 0.0).tolist() == [4204 + 360, 4925 + 720, coordinates.EOS]  # latitude first
    assert coordinates.encode(180.0, 90.0).tolist() == [4924, 6365, 3]  # 6365 is the last entry of the published vocabulary
    assert coordinates.encode(-180.0, -90.0).tolist() == [4204, 4925, 3]
    assert coordinates.encode(0.0, 0.0).dtype == np.int32


def test_every_quarter_degree_returns_and_ids_are_2162():
    lon, lat = np.arange(-180, 180.25, 0.25), np.arange(-90, 90.25, 0.25)
    by_lon = coordinates.encode(lon, np.zeros_like(lon))
    by_lat = coordinates.encode(np.zeros_like(lat), lat)
    assert len(set(by_lon[:, 1]) | set(by_lat[:, 0])) == 1441 + 721  # and 7 special tokens: the 2169 entries of the vocabulary
    np.testing.assert_array_equal(coordinates.decode(by_lon)[0], lon)
    np.testing.assert_array_equal(coordinates.decode(by_lat)[1], lat)


def test_snaps_to_a_quarter_half_to_even():
    # 4 * 0.125 = 0.5 -> 0 and 4 * 0.375 = 1.5 -> 2: ties go to the even step.
    assert coordinates.decode(coordinates.encode(0.125, 0.375)) == (0.0, 0.5)
    assert coordinates.decode(coordinates.encode(9.13, 47.37)) == (9.25, 47.25)


def test_negative_zero_is_zero():
    np.testing.assert_array_equal(coordinates.encode(-0.1, -0.12), coordinates.encode(0.0, 0.0))
    assert not np.signbit(coordinates.decode(coordinates.encode(-0.1, -0.12))).any()


def test_pairs_and_separate_arrays_agree():
    pairs = np.array([[7.5, 46.25], [-3.0, 40.5]])
    np.testing.assert_array_equal(coordinates.encode(pairs), coordinates.encode(pairs[:, 0], pairs[:, 1]))
    np.testing.assert_array_equal(coordinates.encode(pairs)[0], coordinates.encode(7.5, 46.25))


@pytest.mark.parametrize("ids", [[4925, 4204, 3], [4204, 1, 3], [0, 4925, 3], [4204, 6366, 3]])
def test_decode_gives_nan_where_either_id_is_no_coordinate(ids):
    assert np.isnan(coordinates.decode(ids)).all()


@pytest.mark.parametrize(("lon", "lat", "name"), [(181.0, 0.0, "Longitude"), (0.0, -90.5, "Latitude"), (np.nan, 0.0, "Longitude")])
def test_off_the_globe_is_refused(lon, lat, name):
    with pytest.raises(ValueError, match=f"{name} is .*expected degrees"):
        coordinates.encode(lon, lat)


def test_one_array_must_hold_pairs():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(lon, lat\) pairs"):
        coordinates.encode(np.zeros(3))
