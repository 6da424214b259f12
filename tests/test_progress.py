"""What a bar tells of a scene that an earlier run had begun."""

from __future__ import annotations

import io

import pytest
import tqdm

from terramind_jax.scenes import progress


def test_what_an_earlier_run_did_does_not_enter_the_rate():
    now = [0.0]
    bar = tqdm.tqdm(total=100, file=io.StringIO(), mininterval=0)
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
    for done, seconds in ((40, 10), (50, 20)):
        progress.resume(bar, done)
        now[0] += seconds
        bar.update(seconds // 10)
    found = bar.format_dict
    assert (found["n"], found["initial"], found["total"]) == (93, 90, 100)
    assert found["rate"] == pytest.approx(0.1)
    assert (found["n"] - found["initial"]) / found["elapsed"] == pytest.approx(0.1)


def test_a_bar_that_is_not_shown():
    bar = tqdm.tqdm(total=100, disable=True)
    progress.resume(bar, 40)
    assert bar.n == 0
