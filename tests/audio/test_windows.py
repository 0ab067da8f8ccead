"""Sliding windows: their grid, that they cover the sound, and that the size of the blocks does not matter."""

import numpy as np
import pytest

from ast_jax.audio.windows import Grid, clip_starts, cut, window_grid
from ast_jax.config import FrontendConfig

FRONTEND = FrontendConfig(max_length=100)  # 400 + 99 * 160 = 16,240 samples


def windows(size, grid, block):
    """Return (start, length) of the windows of a ramp, whose samples are their own indices."""
    sound = np.arange(size, dtype=np.float32)
    found = list(cut((sound[begin : begin + block] for begin in range(0, size, block)), grid))
    for start, samples in found:
        np.testing.assert_array_equal(samples, sound[start : start + len(samples)])
    return [(start, len(samples)) for start, samples in found]


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
@pytest.mark.parametrize(
    ("size", "want"),
    [
        (60, [(0, 60)]),
        (100, [(0, 100)]),
        (109, [(0, 100)]),  # the remainder is shorter than a frame
        (110, [(0, 100), (10, 100)]),
        (130, [(0, 100), (30, 100)]),
        (160, [(0, 100), (50, 100), (60, 100)]),
        (200, [(0, 100), (50, 100), (100, 100)]),
    ],
)
def test_windows_end_where_the_sound_ends(size, want, block):
    assert windows(size, Grid(100, 50, 100, 10), block) == want


@pytest.mark.parametrize("hop", [1, 3, 50, 99, 100])
def test_no_sample_is_skipped(hop):
    covered = np.zeros(777, bool)
    for start, length in windows(777, Grid(100, hop, 100, 1), 13):
        assert length == 100
        covered[start : start + length] = True
    assert covered.all()


def test_a_window_comes_with_its_last_sample():
    taken = []

    def blocks():
        for index in range(30):
            taken.append(index)
            yield np.zeros(10, np.float32)

    found = cut(blocks(), Grid(100, 50, 100, 10))
    assert [(next(found).start, len(taken)) for _ in range(3)] == [(0, 10), (50, 15), (100, 20)]


def test_the_grid_in_seconds():
    assert window_grid(FRONTEND) == (16240, 8120, 16240, 160)
    assert window_grid(FRONTEND, 0.5, 0.1) == (8000, 1600, 16240, 160)
    assert window_grid(FRONTEND, 1.02) == window_grid(FRONTEND, 1.0)  # rounds to the model's input length
    assert window_grid(FRONTEND, 1.02, 1.02) == window_grid(FRONTEND, hop=1.02) == (16240, 16240, 16240, 160)
    assert window_grid(FRONTEND, 10.0, 5.0).length == 160000


@pytest.mark.parametrize(
    ("window", "hop", "message"),
    [
        (0.02, None, "window: expected 25 ms or more, got 20 ms"),
        (0, None, "window: expected a positive number of seconds, got 0"),
        (float("nan"), None, "window: expected a positive number"),
        (0.5, 0.75, "hop: expected more than 0 s and at most the window's 0.5 s.* got 0.75 s"),
        (1.0, -1, "hop: expected a positive number of seconds"),
        (1.0, 1e-9, "hop: expected more than 0 s"),
    ],
)
def test_invalid_windows(window, hop, message):
    with pytest.raises(ValueError, match=message):
        window_grid(FRONTEND, window, hop)


@pytest.mark.parametrize("length", [1, 99, 100, 101, 150, 200, 201, 1000])
def test_clips_cover_a_window(length):
    starts = clip_starts(length, 100)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - 100)
    assert max(np.diff(starts), default=0) <= 100
    assert len(starts) == max(1, -(-length // 100))
