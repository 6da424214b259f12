"""Coordinates and captions against TerraTorch's tokenizers, with vocabulary files written here (spec 7)."""

from __future__ import annotations

import warnings

import numpy as np
import peer
import pytest
import torch

from terramind_jax import captions, coordinates


@pytest.fixture(scope="module")
def coords(tmp_path_factory):
    path = tmp_path_factory.mktemp("coords") / "config.json"
    tokenizer = peer.coords_tokenizer(path)()
    coordinates.check_vocabulary(path)  # what the library writes is what the check reads
    return tokenizer


def test_coordinates_have_the_same_ids(coords):
    rng = np.random.default_rng(0)
    lonlat = rng.uniform([-180, -90], [180, 90], (2000, 2))
    halves = rng.integers([-1440, -720], [1441, 721], (2000, 2)) / 8  # a half step rounds to the even one
    lonlat = np.concatenate([lonlat, halves, [[-180, -90], [180, 90], [0, 0]]]).astype(np.float32)
    lonlat = lonlat[~((lonlat < 0) & (lonlat >= -0.125)).any(1)]
    ids = coordinates.encode(lonlat)
    np.testing.assert_array_equal(ids, coords.encode(torch.from_numpy(lonlat))["tensor"].numpy())
    theirs = coords.decode_text({"coords": {"tensor": torch.from_numpy(ids)}})
    np.testing.assert_array_equal(np.stack(coordinates.decode(ids), axis=-1), theirs)


def test_ids_that_are_no_coordinates_decode_to_nan(coords):
    ids = np.array([[9, 4925, 3], [4204, 3, 3], [1, 1, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(coords.decode_text({"coords": {"tensor": torch.from_numpy(ids)}})).all()
    assert np.isnan(coordinates.decode(ids)).all()


def test_negative_zero_is_where_the_reference_is_wrong(coords):
    """It prints -0.00, which is no word of the vocabulary; ours is the id of 0.00."""
    lonlat = np.array([[-0.1, 46.25]], np.float32)
    theirs = coords.encode(torch.from_numpy(lonlat))["tensor"].tolist()
    assert theirs == [[4749, *[coordinates.UNK] * 6, coordinates.EOS]]
    zero = torch.tensor([[0.0, 46.25]])
    assert coordinates.encode(lonlat).tolist() == coords.encode(zero)["tensor"].tolist()
    with pytest.raises(ValueError, match="length"):
        coords.encode(torch.cat([torch.from_numpy(lonlat), zero]))


# ---- captions ----


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The reference's caption tokenizer and our vocabulary, of one small file."""
    path = tmp_path_factory.mktemp("captions") / "config.json"
    return peer.caption_tokenizer(path)(), captions.load(path)


TEXTS = ["A River with fields, and the sea. The city!", "the volcano", "", "a city. a sea. the fields"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_caption_has_the_same_ids_and_text(both, text):
    reference, vocabulary = both
    theirs = reference.encode([text], device="cpu")
    ids = captions.encode(vocabulary, [text])
    np.testing.assert_array_equal(ids, theirs["tensor"].numpy())
    assert captions.decode(vocabulary, ids) == reference.decode_text({"caption": theirs})


def test_in_a_batch_padding_follows_the_end_instead_of_preceding_it(both):
    reference, vocabulary = both
    theirs = reference.encode(TEXTS, device="cpu")["tensor"].numpy()
    ours = captions.encode(vocabulary, TEXTS)
    np.testing.assert_array_equal(np.sort(ours, axis=1), np.sort(theirs, axis=1))
    longest = 0
    np.testing.assert_array_equal(ours[longest], theirs[longest])
    assert theirs[2].tolist() == [5, *[0] * (theirs.shape[1] - 2), 3] and ours[2].tolist() == [5, 3, *[0] * (ours.shape[1] - 2)]
