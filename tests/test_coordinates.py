"""Coordinates as tokens: the rule of spec 7.1."""

from __future__ import annotations

import json

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


# ---- the published vocabulary file ----


@pytest.fixture
def write(tmp_path):
    """Writes a vocabulary as the tokenizers library does: words in the model, and those of them that are never split beside it."""

    def _write(vocabulary: dict[str, int]):
        added = [{"id": i, "content": text, "special": text.startswith("[")} for text, i in vocabulary.items()]
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": {"type": "WordPiece", "vocab": vocabulary}}))
        return path

    return _write


def test_vocabulary_has_the_published_size_and_agrees_with_encode(write):
    vocabulary = coordinates.vocabulary()
    assert len(vocabulary) == 2169 and max(vocabulary.values()) == vocabulary["lon=180.00"] == 6365
    assert [vocabulary["lat=46.25"], vocabulary["lon=-7.50"], vocabulary["[EOS]"]] == coordinates.encode(-7.5, 46.25).tolist()
    coordinates.check_vocabulary(write(vocabulary))


def test_tokens_that_do_not_concern_coordinates_are_let_be(write):
    coordinates.check_vocabulary(write(coordinates.vocabulary() | {"[S_3]": 7, "v0=0": 204}))


def test_every_difference_is_named_at_once(write):
    vocabulary = coordinates.vocabulary() | {"lat=0.00": 9, "lon=-0.00": 7000, "cat": 4205}
    del vocabulary["lon=180.00"], vocabulary["[EOS]"]
    with pytest.raises(ValueError) as error:
        coordinates.check_vocabulary(write(vocabulary))
    for text in ("2 missing ([EOS], lon=180.00)", "1 with another id (lat=0.00 9, not 4564)", "2 unknown (lon=-0.00 7000, cat 4205)"):
        assert text in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": {}}', b"\xff\xfe\x00"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json is no vocabulary"):
        coordinates.check_vocabulary(path)
