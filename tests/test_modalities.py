"""The registry: the reference's identifiers, names, shapes and statistics (spec section 1)."""

import re

import numpy as np
import pytest

from terramind_jax import modalities
from terramind_jax.modalities import DECODER_STREAMS, ENCODER_STREAMS, MODALITIES, STREAMS

IDS = {
    "untok_sen2l2a@224": 421,
    "untok_sen2l1c@224": 27295,
    "untok_sen2rgb@224": 16849,
    "untok_sen1grd@224": 12002,
    "untok_sen1rtc@224": 26488,
    "untok_dem@224": 21202,
    "tok_sen2l2a@224": 32014,
    "tok_sen1grd@224": 20262,
    "tok_sen1rtc@224": 11360,
    "tok_dem@224": 19072,
    "tok_lulc@224": 24055,
    "tok_ndvi@224": 1959,
    "coords": 30432,
    "caption": 32652,
}


def test_streams_are_the_released_ones_with_the_references_ids():
    assert {key: modalities.stream_id(key) for key in STREAMS} == IDS
    assert [s.key for s in ENCODER_STREAMS] == sorted(set(IDS) - {"caption"})  # v0.1 alone has captions
    assert sorted(s.vocab_size for s in DECODER_STREAMS) == [4375, 15360, 15360, 15360, 15360, 15360, 30000]


def test_v01_has_its_own_statistics_and_classes():
    assert modalities.get("LULC", "v01").channels == 9 and modalities.get("LULC").channels == 10
    assert modalities.statistics("DEM", "v01")[0] == np.float32(435.726) and modalities.statistics("DEM")[0] == np.float32(670.665)
    np.testing.assert_array_equal(modalities.statistics("S1GRD", "v01"), modalities.statistics("S1GRD"))


def test_every_band_has_a_statistic():
    for m in MODALITIES.values():
        assert len(m.bands) == len(m.mean) == len(m.std), m.name
    assert len(MODALITIES["S2L2A"].bands) == 12 and MODALITIES["S2L1C"].bands.index("CIRRUS") == 10


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("S2L2A", "untok_sen2l2a@224"),
        ("S2L1C_L8", "untok_sen2l1c@224"),
        ("S1", "untok_sen1grd@224"),
        ("s1rtc", "untok_sen1rtc@224"),
        ("RGB", "untok_sen2rgb@224"),
        ("LULC", "tok_lulc@224"),
        ("NDVI", "tok_ndvi@224"),
        ("location", "coords"),
        ("tok_dem@224", "tok_dem@224"),
    ],
)
def test_input_names_follow_the_references_rules(name, key):
    assert modalities.input_stream(name).key == key


@pytest.mark.parametrize(("name", "key"), [("S2L1C", "tok_sen2l2a@224"), ("S1RTC", "tok_sen1rtc@224"), ("DEM", "tok_dem@224")])
def test_output_names_follow_the_references_rules(name, key):
    assert modalities.output_stream(name).key == key


def test_destandardize_inverts_standardize():
    x = np.random.default_rng(0).uniform(0, 4000, (5, 6, 12)).astype(np.uint16)
    standardised = modalities.standardize("S2L2A", x)
    assert standardised.dtype == np.float32
    np.testing.assert_allclose(standardised[0, 0, 1], (x[0, 0, 1] - 1503.317) / 2141.107, rtol=1e-6)
    np.testing.assert_allclose(modalities.destandardize("S2L2A", standardised), x, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12, 224, 224), "channels-first"),
        ((224, 224, 4), "has 4 bands, expected 12"),
        ((230, 224, 12), "multiples of the patch size 16"),
        ((224, 12), "expected"),
    ],
)
def test_a_wrong_array_is_refused_with_the_reason(shape, message):
    with pytest.raises(ValueError, match=message):
        modalities.check_image("S2L2A", np.zeros(shape, np.float32))


def test_nan_pixels_are_refused_and_counted():
    image = np.zeros((32, 32, 1), np.float32)
    image[3, 4] = np.nan
    with pytest.raises(ValueError, match="1 NaN pixels"):
        modalities.check_image("DEM", image)


@pytest.mark.parametrize(
    ("name", "low", "high", "standardised", "message"),
    [
        ("S2L2A", 200, 3000, True, r"S2L2A looks unstandardised \(its mean is 1\d{3}\); standardise it: standardised values are expected"),
        ("S1GRD", -25, -5, True, "S1GRD looks unstandardised"),
        ("S1GRD", 0.001, 0.3, True, "S1GRD has no negative value, like linear power"),
        ("S1RTC", 0.001, 0.3, False, "S1RTC has no negative value, like linear power; take 10 log10 of it first: dB are expected"),
        ("S2L1C", 0.0, 0.9, False, "S2L1C looks like reflectance of 0-1; multiply it by 10000 first: reflectance x 10000 are expected"),
        ("S2L2A", 0.0, 0.9, True, "S2L2A looks like reflectance of 0-1"),
        ("S2L2A", 200, 3000, False, ""),
        ("S2L2A", -1, 3, True, ""),
        ("S1GRD", -25, 5, False, ""),
        ("DEM", 0, 900, False, ""),
        ("LULC", 0, 9, True, ""),
    ],
)
def test_values_on_another_scale_are_said(recwarn, name, low, high, standardised, message):
    image = np.random.default_rng(0).uniform(low, high, (8, 8, len(MODALITIES[name].bands))).astype(np.float32)
    modalities.check_scale(name, image, standardised=standardised)
    assert len(recwarn) == bool(message) and all(re.search(message, str(w.message)) for w in recwarn)


def test_an_unknown_modality_names_the_known_ones():
    with pytest.raises(ValueError, match="Unknown modality 'S2L2B'; did you mean S2L2A.*S1GRD"):
        modalities.get("S2L2B")
    with pytest.raises(ValueError, match="Unknown output modality"):
        modalities.output_stream("soil")
