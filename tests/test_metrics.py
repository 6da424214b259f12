"""Metrics against direct implementations of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from terramind_jax import metrics


def images(seed=0, shape=(20, 24, 2)):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=shape).cumsum(0).cumsum(1)
    return truth + rng.normal(size=shape), truth


def direct_ssim(prediction, truth, data_range):
    """Wang et al. 2004, window by window."""
    r = np.arange(11) - 5
    window = np.exp(-(r[:, None] ** 2 + r[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for c in range(truth.shape[2]):
        for i in range(truth.shape[0] - 10):
            for j in range(truth.shape[1] - 10):
                x, y = (a[i : i + 11, j : j + 11, c] for a in (prediction, truth))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_is_the_mean_over_windows():
    prediction, truth = images()
    assert metrics.ssim(prediction, truth, data_range=30.0) == pytest.approx(direct_ssim(prediction, truth, 30.0), abs=1e-10)
    assert metrics.ssim(truth, truth, data_range=30.0) == pytest.approx(1)


def test_ssim_skips_windows_with_invalid_pixels():
    prediction, truth = images()
    valid = np.ones(truth.shape[:2], bool)
    valid[:, :6] = False
    spoiled = np.where(valid[..., None], prediction, np.nan)
    expected = metrics.ssim(prediction[:, 6:], truth[:, 6:], data_range=30.0)
    assert metrics.ssim(spoiled, truth, data_range=30.0, valid=valid) == pytest.approx(expected)
    assert math.isnan(metrics.ssim(prediction, truth, data_range=30.0, valid=np.zeros_like(valid)))


def test_errors_stream_over_pixels_not_images():
    prediction, truth = images(shape=(3, 20, 24, 2))
    valid = np.random.default_rng(1).random(truth.shape[:3]) < 0.7
    valid[0] = True
    errors = metrics.Errors(data_range=50.0)
    errors.add(prediction[:1], truth[:1], valid[:1]).add(prediction[1], truth[1], valid[1]).add(prediction[2:], truth[2:], valid[2:])
    difference = (prediction - truth)[valid]
    assert errors.mae == pytest.approx(np.abs(difference).mean()) == pytest.approx(metrics.mae(prediction, truth, valid))
    assert errors.rmse == pytest.approx(np.sqrt(np.square(difference).mean())) == pytest.approx(metrics.rmse(prediction, truth, valid))
    assert errors.psnr == pytest.approx(10 * np.log10(50.0**2 / np.square(difference).mean()))
    assert errors.ssim == pytest.approx(metrics.ssim(prediction[0], truth[0], data_range=50.0))


def test_perfect_and_empty():
    _, truth = images()
    assert metrics.Errors(1.0).add(truth, truth).psnr == math.inf
    assert math.isnan(metrics.Errors(1.0).rmse)
    assert math.isnan(metrics.mean_iou(np.zeros((3, 3), int)))


def test_integer_images_do_not_wrap():
    dark, bright = np.zeros((12, 12, 1), np.uint8), np.full((12, 12, 1), 200, np.uint8)
    assert metrics.mae(dark, bright) == metrics.rmse(dark, bright) == 200


def test_confusion_and_iou():
    truth = np.array([[0, 0, 1, 1], [2, 2, 2, 9]])
    prediction = np.array([[0, 1, 1, 1], [2, 2, 3, 3]])
    matrix = metrics.confusion_matrix(prediction, truth, 4, ignore=9)
    assert matrix.sum() == 7 and matrix[0, 1] == 1 and matrix[2, 3] == 1
    iou = metrics.intersection_over_union(matrix)
    np.testing.assert_allclose(iou[:3], [1 / 2, 2 / 3, 2 / 3])
    assert np.isnan(iou[3])  # only predicted
    assert metrics.mean_iou(matrix) == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert metrics.accuracy(matrix) == pytest.approx(5 / 7)


def test_confusion_matrices_add():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 5, (2, 4, 30, 30))
    total = sum(metrics.confusion_matrix(p, t, 5) for p, t in zip(prediction, truth, strict=True))
    np.testing.assert_array_equal(total, metrics.confusion_matrix(prediction, truth, 5))


def test_errors_say_what_is_wrong():
    _, truth = images()
    with pytest.raises(ValueError, match=r"shape \(20, 24, 1\) but the truth \(20, 24, 2\)"):
        metrics.rmse(truth[..., :1], truth)
    with pytest.raises(ValueError, match="data_range is 0"):
        metrics.Errors(data_range=0)
    with pytest.raises(ValueError, match="at least 11x11"):
        metrics.ssim(truth[:8], truth[:8], data_range=1.0)
    with pytest.raises(ValueError, match=r"classes from 0 to 4; expected 0-3"):
        metrics.confusion_matrix(np.array([4, 0]), np.array([0, 0]), 4)
    with pytest.raises(ValueError, match=r"mask of valid pixels has shape \(20,\)"):
        metrics.mae(truth, truth, np.ones(20))


def test_nearest_neighbours_vote_and_a_sample_has_no_voice_of_its_own():
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 7], 20)
    features = rng.normal(size=(40, 8)) * 0.1 + np.eye(8)[labels // 4]
    assert metrics.knn_accuracy(features, labels) == 1
    alone = np.where(np.arange(40) == 5, 9, labels)  # nobody else has its label
    assert metrics.knn_accuracy(features, alone) == 39 / 40
    assert metrics.knn_accuracy(rng.normal(size=(400, 8)), rng.integers(0, 4, 400)) < 0.4
    with pytest.raises(ValueError, match="There are 1 samples; nearest neighbours need two"):
        metrics.knn_accuracy(features[:1], labels[:1])


def test_a_seam_is_a_larger_jump_than_elsewhere():
    image = np.random.default_rng(0).normal(size=(64, 96, 2))
    borders, others = ([32], [32, 64]), ([16, 48], [16, 48, 80])
    assert metrics.seam_score(image, borders, others) == pytest.approx(1, abs=0.15)
    tiled = image + 3.0 * (np.arange(96)[:, None] // 32)  # each window on a level of its own
    across = [np.abs(np.diff(tiled, axis=0))[31], np.abs(np.diff(tiled, axis=1))[:, [31, 63]]]
    expected = np.concatenate([x.ravel() for x in across]).mean()
    assert metrics.jump(tiled, *borders) == pytest.approx(expected)
    assert metrics.seam_score(tiled, borders, others) > 1.5


def test_a_jump_of_classes_is_their_change():
    classes = np.zeros((32, 32), np.uint8)
    classes[:, 16:] = 200
    assert metrics.jump(classes, [], [16]) == 1 and metrics.jump(classes, [16], []) == 0 and np.isnan(metrics.jump(classes, [], []))


def test_scores_of_classes_leave_out_what_is_nowhere():
    """Of four classes one is neither true nor predicted, and one is only predicted."""
    truth, prediction = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
    scores = metrics.class_scores(metrics.confusion_matrix(prediction, truth, 4))
    assert scores["mIoU"] == pytest.approx(np.mean([1 / 2, 1 / 3, 0]))
    assert scores["F1"] == pytest.approx(np.mean([2 / 3, 2 / 4, 0]))
    assert scores["accuracy"] == pytest.approx(np.mean([1 / 2, 1 / 2, 0]))
    assert scores["pixel_accuracy"] == 0.5
    assert metrics.class_scores(metrics.confusion_matrix(prediction, truth, 4), 2, absent=True)["mIoU"] == pytest.approx(
        (1 / 2 + 1 / 3) / 3
    )
    assert math.isnan(metrics.class_scores(np.zeros((3, 3), int))["mIoU"])
