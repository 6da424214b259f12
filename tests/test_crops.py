"""Crops: fixed, unresized, views; patches in (row, column, channel) order."""

import numpy as np
import pytest

from terramind_jax.data import crops


def test_variants_are_centre_and_corners_each_with_its_mirror():
    tile = np.arange(264 * 264).reshape(264, 264, 1)
    boxes = [tile[20:244, 20:244], tile[:224, :224], tile[:224, 40:], tile[40:, :224], tile[40:, 40:]]
    for i, box in enumerate(boxes):
        np.testing.assert_array_equal(crops.crop(tile, 2 * i), box)
        np.testing.assert_array_equal(crops.crop(tile, 2 * i + 1), box[:, ::-1])
    assert len(boxes) * 2 == crops.VARIANTS == 10


@pytest.mark.parametrize("height, width, size, count", [(224, 224, 224, 2), (264, 264, 224, 10), (225, 225, 224, 8), (264, 224, 224, 6)])
def test_unique_variants_reproduce_every_variant(height, width, size, count):
    tile = np.arange(height * width).reshape(height, width)
    variants, inverse = crops.unique_variants(height, width, size)
    assert len(variants) == count and variants[0] == 0
    for v in range(crops.VARIANTS):
        np.testing.assert_array_equal(crops.crop(tile, v, size), crops.crop(tile, variants[inverse[v]], size))


@pytest.mark.parametrize("variant", [0, 3, 9])
def test_patches_equal_a_naive_crop_and_reshape(variant):
    channel_major = np.arange(5 * 40 * 44, dtype=np.uint16).reshape(5, 40, 44)
    image = crops.crop(channel_major.transpose(1, 2, 0), variant, 32)
    assert np.shares_memory(image, channel_major)
    patches = crops.select_patches(image, np.array([3, 0, 13]), 8)
    naive = np.stack([image[0:8, 24:32], image[0:8, 0:8], image[24:32, 8:16]]).reshape(3, -1)
    np.testing.assert_array_equal(patches, naive)
    assert patches.dtype == np.uint16 and patches[0, 1] == image[0, 24, 1]


def test_wrong_requests_say_what_would_be_right():
    with pytest.raises(ValueError, match="variant 10 does not exist; expected 0 to 9"):
        crops.crop(np.zeros((264, 264)), 10)
    with pytest.raises(ValueError, match="200x264 pixels, smaller than the crop of 224x224"):
        crops.crop(np.zeros((200, 264)), 0)
