"""Batches of downstream data sets: what a position holds, that windows cover every pixel once, and that turning turns all alike."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from terramind_jax.tasks import batches
from terramind_jax.tasks.datasets import Dataset, Facts, Sample

SIZE, CROP = (40, 56), 32
SCALE = {"S1GRD": (np.float32([1, 2]), np.float32([2, 4]))}


def read_inputs(sample):
    """Two bands that tell where a pixel is, of a time series at each time."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    image = np.stack([y * 100 + x + 10_000 * sample.inputs, x], -1).astype(np.float32)
    return {"S1GRD": image if sample.dates is None else np.stack([image, image + 1])}


def read_target(sample):
    target = read_inputs(sample)["S1GRD"]
    target = (target if target.ndim == 3 else target[0])[..., 0].astype(np.int32) % 3
    return np.where(np.arange(SIZE[1]) < 2, -1, target)


def dataset(samples=5, times=False):
    facts = Facts("places", "segmentation", {"S1GRD": ("VV", "VH")}, ("a", "b", "c"), -1)
    dates = {"S1GRD": np.int32([3, 9])} if times else None
    return Dataset(facts, "train", tuple(Sample(str(i), i, None, dates) for i in range(samples)), read_inputs, read_target)


def first(n, stream):
    return list(itertools.islice(stream, n))


def test_positions_hold_the_same_for_any_hosts_and_batches():
    make = functools.partial(batches.training, dataset(), SCALE, crop=CROP, d4=True, seed=3)
    whole = np.concatenate([b["inputs"]["S1GRD"] for b in first(4, make(batch_size=4))])
    later = np.concatenate([b["inputs"]["S1GRD"] for b in first(2, make(batch_size=4, consumed=8))])
    np.testing.assert_array_equal(later, whole[8:])
    hosts = [first(2, make(batch_size=8, host=h, hosts=2)) for h in (0, 1)]
    for h, own in enumerate(hosts):
        np.testing.assert_array_equal(np.concatenate([b["inputs"]["S1GRD"] for b in own]), whole[h::2])
    other = first(1, make(batch_size=4))[0]["inputs"]["S1GRD"]
    assert not np.array_equal(other, first(1, batches.training(dataset(), SCALE, crop=CROP, batch_size=4, seed=4))[0]["inputs"]["S1GRD"])


def test_targets_are_cut_and_turned_with_their_images():
    for times in (False, True):
        for batch in first(6, batches.training(dataset(times=times), SCALE, crop=CROP, batch_size=4, d4=True)):
            image = batch["inputs"]["S1GRD"]
            image = image[:, 0] if times else image
            value, column = (np.round(image * [2, 4] + [1, 2])[..., i].astype(int) for i in (0, 1))
            np.testing.assert_array_equal(batch["valid"], column >= 2)
            np.testing.assert_array_equal(batch["target"], np.where(batch["valid"], value % 3, 0))
            assert not times or batch["days"].tolist() == [[3, 9]] * 4


def read_few_labels(sample):
    """Labels in opposite corners of sample 0, one of them in sample 1, none in sample 2."""
    target = np.full(SIZE, -1)
    target[[0, -1], [0, -1]] = [(1, 2), (2, -1), (-1, -1)][sample.inputs]
    return target


def test_crops_around_few_labels():
    """Each holds one where there is any, every label has its turn, and without any the crop may lie anywhere."""
    few = dataclasses.replace(dataset(samples=3), read_target=read_few_labels)
    labels, corners = {0: [], 1: [], 2: []}, set()
    for batch in first(20, batches.training(few, SCALE, crop=CROP, batch_size=3, focus=True)):
        for image, target, valid, view in zip(batch["inputs"]["S1GRD"], batch["target"], batch["valid"], batch["view"], strict=True):
            labels[view].append(target[valid].tolist())
            corners |= {tuple(image[0, 0])} if view == 2 else set()
    assert sorted(set(map(tuple, labels[0]))) == [(1,), (2,)] and labels[1] == [[2]] * 20 and labels[2] == [[]] * 20
    assert len(corners) > 15


def test_the_eight_ways_differ_and_keep_their_pixels():
    image = np.arange(9.0).reshape(3, 3)
    whole = {"inputs": {"a": image[..., None]}, "target": image, "valid": image > 2}
    made = [batches.turned(whole, way) for way in range(8)]
    assert len({m["target"].tobytes() for m in made}) == 8
    for m in made:
        np.testing.assert_array_equal(m["inputs"]["a"][..., 0], m["target"])
        np.testing.assert_array_equal(m["valid"], m["target"] > 2)
    label = batches.turned({"inputs": {"a": image[..., None]}, "target": np.int32(3), "valid": np.bool_(True)}, 5)
    assert label["target"] == 3


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (70, 33)])
def test_windows_cover_every_pixel_once(size):
    seen = np.zeros(size, int)
    for window in batches.windows(size, CROP):
        assert window.own.shape == (CROP, CROP)
        seen[window.rows, window.columns] += window.own
    assert (seen == 1).all()


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_validation_counts_every_known_pixel_once(hosts):
    """The last batch is filled up with what does not count."""
    parts = [list(batches.covering(dataset(3), SCALE, crop=CROP, batch_size=8, host=h, hosts=hosts)) for h in range(hosts)]
    assert len({len(part) for part in parts}) == 1
    counted = sum(int(batch["valid"].sum()) for part in parts for batch in part)
    assert counted == 3 * SIZE[0] * (SIZE[1] - 2)


def test_images_of_several_sizes_or_too_small_for_a_crop():
    with pytest.raises(ValueError, match="The images of places are 40x56 pixels; data.crop=48 can be at most 32"):
        next(batches.training(dataset(), SCALE, crop=48, batch_size=2))
    mixed = dataset(2)
    object.__setattr__(mixed, "read_inputs", lambda s: {"S1GRD": read_inputs(s)["S1GRD"][: 40 - 8 * s.inputs]})
    object.__setattr__(mixed, "read_target", lambda s: read_target(s)[: 40 - 8 * s.inputs])
    with pytest.raises(ValueError, match="1 is 32x56 pixels, the first of its split 40x56: 2 and 4 windows of 32 cover them; choose"):
        list(batches.covering(mixed, SCALE, crop=CROP, batch_size=2))
    with pytest.raises(ValueError, match="are 32x56 pixels; data.crop=40 can be at most 32"):
        list(batches.covering(mixed, SCALE, crop=40, batch_size=2))


def test_images_that_differ_a_little_in_size():
    """Those that as many windows cover are validated to their own edges."""
    few = dataset(3)
    object.__setattr__(few, "read_inputs", lambda s: {"S1GRD": read_inputs(s)["S1GRD"][: 40 - 3 * s.inputs]})
    object.__setattr__(few, "read_target", lambda s: read_target(s)[: 40 - 3 * s.inputs])
    seen = [
        tuple(np.round(pixel * [2, 4] + [1, 2]).astype(int))
        for batch in batches.covering(few, SCALE, crop=CROP, batch_size=2)
        for pixel in batch["inputs"]["S1GRD"][batch["valid"]]
    ]
    assert len(seen) == len(set(seen)) == (40 + 37 + 34) * (SIZE[1] - 2)
