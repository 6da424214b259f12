"""What a run of validations says."""

import math

import pytest

from terramind_jax.tasks import plateau


def test_the_best_is_the_first_of_equals_and_finite():
    assert plateau.is_best([2.0, 1.0], larger=False) and not plateau.is_best([2.0, 1.0], larger=True)
    assert plateau.is_best([1.0], False) and not plateau.is_best([1.0, 1.0], False)
    assert not plateau.is_best([math.nan], False) and plateau.is_best([math.nan, 3.0], False)
    assert plateau.since_best([3.0, 1.0, 2.0, 2.0], larger=False) == 2
    assert plateau.since_best([], larger=False) == 0 and plateau.since_best([math.nan, math.nan], False) == 2


def test_losses_shall_be_small_and_scores_large():
    assert [plateau.is_larger_better(f"val/{name}") for name in ("loss", "rmse", "mae", "mIoU", "F1")] == [False, False, False, True, True]


def test_every_plateau_lowers_the_rate_once():
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    scales = [plateau.scale(values[: i + 1], False, 0.5, 2) for i in range(len(values))]
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert plateau.scale([-v for v in values], True, 0.5, 2) == pytest.approx(0.25)
    assert plateau.scale([1.0, 0.99995, 0.9999], False, 0.5, 1) == 0.5  # better by too little
