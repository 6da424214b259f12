"""Where windows of a scene lie, which of them decides, and how they are blended."""

from __future__ import annotations

import numpy as np
import pytest

from terramind_jax.scenes import windows

PATCH = 16


def all_live(c):
    return np.ones((len(c.rows), len(c.columns)), bool)


def blended(c, image, done=0, live=None):
    """An image ``[K, H, W, C]`` cut into windows and joined again, from the row of windows `done` on."""
    length, live = c.size * PATCH, all_live(c) if live is None else live

    def tiles(i):
        for k in range(len(image)):
            for j in np.flatnonzero(live[i]):
                top, left = c.rows[i] * PATCH, c.columns[j] * PATCH
                yield k, left, image[k, top : top + length, left : left + length]

    made = list(windows.joined(c, PATCH, tiles, (len(image), *image.shape[2:]), done))
    assert [(i, top) for i, top, _ in made] == [(i, c.rows[i] * PATCH) for i in range(done, len(c.rows))]
    return np.concatenate([x for _, _, x in made], axis=1)


@pytest.mark.parametrize("grid, overlap", [((3, 3), 16), ((7, 4), 16), ((9, 8), 32), ((6, 9), 0)])
def test_windows_cover_a_scene_and_share_the_overlap(grid, overlap):
    c = windows.cut(grid, 3, overlap)
    assert c.grid == grid
    for starts, count in zip((c.rows, c.columns), grid, strict=True):
        assert starts[0] == 0 and starts[-1] + 3 == count
        assert all(0 < b - a <= 3 - overlap // PATCH for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("overlap", [8, 48, -16])
def test_overlaps_that_cannot_be(overlap):
    with pytest.raises(ValueError, match=f"The overlap is {overlap} pixels; expected a multiple of 16 below the window's 48"):
        windows.cut((5, 5), 3, overlap)


def test_the_most_central_live_window_decides():
    c = windows.cut((8, 7), 4, 32)
    live = all_live(c)
    live[1, 1] = False
    owner = windows.owners(c, live)
    for y, x in np.ndindex(*c.grid):
        covering = {}
        for i, j in np.argwhere(live):
            dy, dx = y - c.rows[i], x - c.columns[j]
            if 0 <= dy < 4 and 0 <= dx < 4:
                covering[i * len(c.columns) + j] = np.hypot(dy - 1.5, dx - 1.5)
        assert owner[y, x] == (min(covering, key=covering.get) if covering else -1)
    assert (windows.owners(c, np.zeros_like(live)) == -1).all()


@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_windows_that_agree_are_blended_to_the_image_itself(overlap):
    c = windows.cut((8, 7), 3, overlap)
    image = np.random.default_rng(0).normal(size=(2, 8 * PATCH, 7 * PATCH, 2)).astype(np.float32)
    np.testing.assert_allclose(blended(c, image), image, rtol=1e-5, atol=1e-6)


def test_weights_fall_to_nothing_at_the_edge_and_add_up():
    c = windows.cut((9, 9), 4, 32)
    weight = windows.weights(64, 32)
    assert weight[32, 32] > 0.99 and weight[0, 0] < 1e-5 and weight[0, 32] < 1e-2
    total = np.zeros((9 * PATCH, 9 * PATCH))
    for row in c.rows:
        for column in c.columns:
            total[row * PATCH :, column * PATCH :][:64, :64] += weight
    np.testing.assert_allclose(total[32:80, 32:80], 1, rtol=1e-5)  # regular windows: without any division


def test_a_jump_between_windows_becomes_a_ramp():
    c = windows.cut((3, 5), 3, 16)
    tiles = [(0, 0, np.zeros((48, 48, 1))), (0, 32, np.ones((48, 48, 1)))]
    ((top, made),) = windows.blend([(0, 48, tiles)], windows.weights(48, 16), (1, c.grid[1] * PATCH, 1))
    row = made[0, 20, :, 0]
    assert top == 0 and row[0] == 0 and row[-1] == 1
    assert (np.diff(row) >= 0).all() and np.diff(row).max() < 0.11


@pytest.mark.parametrize("done", [1, 2, 4])
def test_going_on_gives_the_same_bits(done):
    c = windows.cut((11, 5), 4, 32)
    image = np.random.default_rng(0).normal(size=(1, 11 * PATCH, 5 * PATCH, 2)).astype(np.float32)
    whole = blended(c, image)
    np.testing.assert_array_equal(blended(c, image, done), whole[:, c.rows[done] * PATCH :])


def test_no_window_no_data():
    c = windows.cut((3, 9), 3, 0)
    live = np.array([[True, False, True]])
    made = blended(c, np.ones((1, 48, 144, 1), np.float32), live=live)
    assert np.isnan(made[0, :, 48:96]).all() and (made[0, :, :48] == 1).all() and (made[0, :, 96:] == 1).all()
