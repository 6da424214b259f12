"""Bands that an image lacks."""

import numpy as np
import pytest

from terramind_jax import bands, modalities

NAMES = modalities.S2L2A_BANDS
GIVEN = [name for name in reversed(NAMES) if name not in ("COASTAL_AEROSOL", "WATER_VAPOR")]  # in an order of its own


def image():
    return np.random.default_rng(0).integers(0, 9000, (2, 4, 4, 12)).astype(np.uint16)


def some(x):
    return x[..., [NAMES.index(name) for name in GIVEN]]


def test_missing_bands_take_their_neighbours_standardised_values():
    full = bands.fill_missing("S2L2A", some(image()), GIVEN)
    for j, name in enumerate(NAMES):
        if name in GIVEN:
            np.testing.assert_array_equal(full[..., j], image()[..., j])
    z = modalities.standardize("S2L2A", full)
    np.testing.assert_allclose(z[..., 0], z[..., NAMES.index("BLUE")], atol=1e-5)
    np.testing.assert_allclose(z[..., 9], z[..., NAMES.index("NIR_NARROW")], atol=1e-5)
    np.testing.assert_allclose(bands.fill_missing("S2L2A", some(z), GIVEN, standardised=True), z, atol=1e-5)


def test_zeros_are_the_mean_and_so_is_what_has_no_neighbour():
    z = modalities.standardize("S2L2A", bands.fill_missing("S2L2A", some(image()), GIVEN, "zeros", offset=1000), offset=1000)
    np.testing.assert_allclose(z[..., [0, 9]], 0, atol=1e-6)
    radar = bands.fill_missing("S1GRD", np.full((1, 2, 2, 1), -11.0), ["VV"])
    np.testing.assert_allclose(radar[0, 0, 0], [-11, -20.293])
    cirrus = bands.fill_missing("S2L1C", np.full((1, 2, 2, 1), 5000.0), ["SWIR_1"])
    np.testing.assert_allclose(cirrus[..., 10], 506.07)


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        (["B1"] * 10, "zeros", "The bands given for S2L2A are B1, B1.*expected some of COASTAL_AEROSOL"),
        (["RED"] * 10, "zeros", "each once"),
        (["RED"], "zeros", r"S2L2A has shape \(2, 4, 4, 10\); expected 1 bands last, RED"),
        (GIVEN, "mean", "Unknown fill_bands 'mean'; known ways: neighbours, zeros"),
    ],
)
def test_errors_say_what_is_wrong(given, how, message):
    with pytest.raises(ValueError, match=message):
        bands.fill_missing("S2L2A", some(image()), given, how)
