"""Properties of the order: over any hosts, batches, resume points and windows, an epoch is every sample once."""

import collections

import numpy as np
import pytest

from terramind_jax.data import order

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**32)


@st.composite
def runs(draw):
    """(n, seed, shuffle_window, views, window, [(batch, hosts)] of the stretches between resumes)."""
    stretches = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=4))
    views = draw(st.integers(1, 3))
    return draw(sizes), draw(seeds), draw(st.integers(0, 70)), views, draw(st.integers(1, 8)), stretches


def stream(n, seed, shuffle_window, views, window, stretches, batches):
    """What all hosts together are given, in order, when the run is resumed after each stretch with other hosts and batches."""
    found, consumed = [], 0
    for number, (per_host, hosts) in enumerate(stretches):
        size, last = per_host * hosts, number == len(stretches) - 1
        for _ in range(batches if last else 1 + number):
            shares = [range(consumed + host, consumed + size, hosts) for host in range(hosts)]
            merged = sorted(p for share in shares for p in share)
            found += [order.place(p, n, seed, views, window, shuffle_window) for p in merged]
            consumed += size
    return found


@settings(max_examples=60, deadline=None)
@given(runs())
def test_the_order_does_not_depend_on_hosts_batches_or_resumes(run):
    *what, stretches = run
    found = stream(*what, stretches, batches=4)
    assert found == [order.place(p, *what[:2], *what[3:], what[2]) for p in range(len(found))]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_an_epoch_is_every_sample_and_view_once(run):
    n, seed, shuffle_window, views, window, _ = run
    blocks = -(-2 * n // window)
    places = [order.place(p, n, seed, views, window, shuffle_window) for p in range(blocks * window * views)]
    for epoch in (0, 1):
        seen = collections.Counter((p.rank, p.view) for p in places if p.epoch == epoch)
        assert seen == {(i, v): 1 for i in range(n) for v in range(views)}


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.integers(1, 20))
def test_a_shuffle_window_keeps_neighbours_together(n, seed, window):
    blocks = order.permutation(n, seed, 0, window) // window
    assert np.count_nonzero(np.diff(blocks)) == len(np.unique(blocks)) - 1
    assert sorted(order.permutation(n, seed, 0, window)) == list(range(n))


# ---- subsets that take turns ----

mixtures = st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 100)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(mixtures, seeds, st.integers(0, 2**40), st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_each_subset_goes_through_epochs_of_its_own_wherever_a_run_is_resumed(mixture, seed, start, views, window, stretches):
    """Stretches are batches on so many hosts, each resumed where the one before it stopped."""
    sizes, given = zip(*mixture, strict=True)
    weights, ends = order.whole_weights(given), np.cumsum(sizes)
    consumed, found = start * views * window, []
    for hosts in stretches:
        shares = [range(consumed + host, consumed + views * window * hosts, hosts) for host in range(hosts)]
        found += [order.place(p, sizes, seed, views, window, 0, weights) for p in sorted(p for share in shares for p in share)]
        consumed += views * window * hosts
    seen = collections.defaultdict(list)
    for place in sorted(p for p in found if p.view == 0):
        subset = int(np.searchsorted(ends, place.rank, "right"))
        assert order.turn(place.slot, weights)[0] == subset
        seen[subset].append((place.epoch, place.rank - (ends[subset] - sizes[subset])))
    for subset, visits in seen.items():
        epochs = {epoch: order.permutation(sizes[subset], seed, epoch, 0, subset).tolist() for epoch, _ in visits}
        assert all(sorted(one) == list(range(sizes[subset])) for one in epochs.values())
        numbers = [epoch * sizes[subset] + epochs[epoch].index(rank) for epoch, rank in visits]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert collections.Counter((p.slot, p.rank) for p in found) == {(p.slot, p.rank): views for p in found}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_any_first_slots_hold_the_shares_of_the_weights(given):
    weights = order.whole_weights(given)
    np.testing.assert_allclose(np.array(weights, float) / sum(weights), np.array(given) / sum(given), rtol=1e-12)
    turns = [order.turn(slot, weights) for slot in range(200)]
    counts = collections.Counter()
    for slot, (subset, before) in enumerate(turns):
        assert before == counts[subset]
        counts[subset] += 1
        for s, w in enumerate(weights):
            assert abs(counts[s] - (slot + 1) * w / sum(weights)) <= 1 + 1e-9


def test_weights_are_the_smallest_integers():
    assert order.whole_weights([0.8, 0.2]) == (4, 1) and order.whole_weights([3, 1e-05]) == (300000, 1)


def test_a_window_shuffles_windows_and_within_them():
    found = order.permutation(1000, 0, 0, 100)
    assert (found[:100] // 100 == found[0] // 100).all() and (np.diff(found[:100].astype(int)) < 0).any()
    assert list(found[::100] // 100) != sorted(found[::100] // 100)
    assert not np.array_equal(found, order.permutation(1000, 0, 1, 100))
