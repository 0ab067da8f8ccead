"""Scores of windows to the aggregate, the curve and the segments."""

import numpy as np
import pytest

from ast_jax.inference.timeline import Analysis, Segment


def analysis(scores, window=2.0, hop=1.0, aggregate="mean"):
    scores = np.asarray(scores, np.float32)
    starts = hop * np.arange(len(scores))
    times = np.stack([starts, starts + window], 1)
    labels = tuple(
        f"{index}" if index > 25 else "abcdefghijklmnopqrstuvwxyz"[index] for index in range(scores.shape[1])
    )
    return Analysis("sound.wav", labels, times, scores, float(times[-1, 1]), aggregate)


def test_aggregates_are_mean_or_maximum():
    scores = [[0.1, 0.9], [0.3, 0.0]]
    assert analysis(scores).best() == [("b", pytest.approx(0.45)), ("a", pytest.approx(0.2))]
    assert analysis(scores, aggregate="max").best(1) == [("b", pytest.approx(0.9))]


def test_overlapping_windows_are_aggregated():
    edges, scores = analysis([[0.2], [0.6], [1.0]]).curve()
    assert edges.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scores[:, 0], [0.2, 0.4, 0.8, 1.0])
    _, scores = analysis([[0.2], [0.6], [1.0]], aggregate="max").curve()
    np.testing.assert_allclose(scores[:, 0], [0.2, 0.6, 1.0, 1.0])


def test_the_final_window_ends_with_the_sound():
    times = np.array([[0, 2], [1, 3], [1.5, 3.5]])
    found = Analysis("sound.wav", ("a",), times, np.array([[0.0], [0.3], [0.9]]), 3.5)
    edges, scores = found.curve()
    assert edges.tolist() == [0, 1, 1.5, 2, 3, 3.5]
    np.testing.assert_allclose(scores[:, 0], [0, 0.15, 0.4, 0.6, 0.9])


def test_hysteresis():
    """A segment reaches the upper threshold, 0.5, and extends down to the lower one, 0.3."""
    found = analysis([[0.4], [0.6], [0.35], [0.7], [0.1], [0.4], [0.1], [0.5]], window=1.0)
    assert found.timeline(0.5, 0.3) == [
        Segment(0.0, 4.0, "a", pytest.approx(0.7)),
        Segment(7.0, 8.0, "a", pytest.approx(0.5)),
    ]
    assert [(each.start, each.end) for each in found.timeline(0.5, 0.5)] == [(1, 2), (3, 4), (7, 8)]
    assert found.timeline(0.8) == []


def test_segments_are_sorted_by_start_and_score():
    found = analysis([[0.6, 0.9], [0.0, 0.0], [0.9, 0.6]], window=1.0)
    assert [(each.start, each.label) for each in found.timeline()] == [(0, "b"), (0, "a"), (2, "a"), (2, "b")]


def test_an_unusable_sound_has_no_timeline():
    assert Analysis("sound.wav", error="sound.wav: no such file").timeline() == []


def test_negative_thresholds():
    """For regression; the default lower threshold is below the upper one."""
    assert [(each.start, each.end) for each in analysis([[-2.0], [-1.0], [-1.3]], window=1.0).timeline(-1.0)] == [
        (1, 3)
    ]


def test_a_lower_threshold_above_the_upper_one():
    with pytest.raises(ValueError, match=r"low: expected at most the threshold 0\.5, got 0\.6"):
        analysis([[0.5]]).timeline(0.5, 0.6)


def test_ten_thousand_windows():
    """Three hours at a hop of a second."""
    scores = np.random.default_rng(0).random((10000, 50))
    edges, curve = analysis(scores, window=10.0, hop=1.0).curve()
    assert curve.shape == (10009, 50)
    np.testing.assert_allclose(curve[20], scores[11:21].mean(0))
    assert edges[-1] == 10009
