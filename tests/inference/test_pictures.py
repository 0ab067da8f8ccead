"""Pictures of sounds: what is in the figures, and that the spectrogram of a long sound is that of its frames."""

import numpy as np
import pytest
import soundfile

import ast_jax
from ast_jax.audio import fbank
from ast_jax.inference import pictures
from ast_jax.inference.timeline import Analysis

FRONTEND = ast_jax.FrontendConfig(max_length=256)


def analysis(seconds, labels=("Speech", "Music $5", "Silence")):
    """Return windows of a second, of which the first label has the first half and the second the rest."""
    starts = np.arange(seconds)
    scores = np.zeros((seconds, len(labels)))
    scores[: seconds // 2, 0] = 0.9
    scores[seconds // 2 :, 1] = 0.7
    return Analysis("a b.wav", labels, np.stack([starts, starts + 1], 1).astype(float), scores, float(seconds))


@pytest.mark.parametrize("columns", [2, 50, 10_000])
def test_the_spectrogram_of_a_long_sound(tmp_path, columns):
    """Frame for frame that of the whole, or means of as many frames as fit a column."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(7 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", samples, 16000, subtype="FLOAT")
    whole = fbank.log_mel(samples, FRONTEND)  # [698, F]
    share = -(-len(whole) // columns)
    got = pictures.overview(tmp_path / "noise.wav", FRONTEND, 7.0, columns)
    want = [whole[start : start + share].mean(0) for start in range(0, len(whole), share)]
    assert len(got) <= columns
    np.testing.assert_allclose(got, want, atol=1e-4)  # float32 roundings of means


def test_a_timeline_has_a_row_for_each_label_that_is_heard():
    spec = np.random.default_rng(0).standard_normal((100, 128)).astype(np.float32)
    figure = pictures.timeline_figure(analysis(10), spec, FRONTEND, 0.5)
    figure.draw_without_rendering()
    top, bottom, _ = figure.axes
    assert [tick.get_text() for tick in bottom.get_yticklabels()] == ["Speech", "Music $5"]
    (first, second) = [collection.get_paths()[0].get_extents() for collection in bottom.collections]
    assert (first.x0, first.x1, second.x0, second.x1) == (0, 5, 5, 10)
    assert bottom.get_xlim() == top.get_xlim() == (0, 10)
    assert "a score of 0.5 or more" in bottom.get_xlabel()
    assert [tick.get_text() for tick in top.get_yticklabels()] == ["50", "200", "500", "1,000", "2,000", "4,000"]


def test_a_timeline_of_nothing_and_of_too_much():
    spec = np.zeros((100, 128), np.float32)
    figure = pictures.timeline_figure(analysis(10), spec, FRONTEND, 0.95)
    assert [tick.get_text() for tick in figure.axes[1].get_yticklabels()] == ["Speech"]  # 0.45 on the whole
    labels = tuple(f"label {number}" for number in range(20))
    found = Analysis("x", labels, np.array([[0.0, 1.0]]), np.ones((1, 20)), 1.0)
    figure = pictures.timeline_figure(found, spec, FRONTEND, 0.5)
    assert len(figure.axes[1].get_yticklabels()) == pictures.ROWS
    assert "5 more labels are not drawn" in figure.axes[1].get_xlabel()


def test_hours_are_written_as_a_clock():
    figure = pictures.timeline_figure(analysis(4000), np.zeros((100, 128), np.float32), FRONTEND, 0.5)
    figure.draw_without_rendering()
    assert "1:00:00" in [tick.get_text() for tick in figure.axes[1].get_xticklabels()]


def test_where_a_frequency_lies():
    """The centre of every mel filter lies at its number."""
    edges = fbank.mel_edges(FRONTEND)
    places = [pictures.mel_place(hertz, FRONTEND) for hertz in edges]
    np.testing.assert_allclose(places, np.arange(-1, 129), atol=1e-9)
