"""Pictures of recordings: contents of the figures, places of frequencies and times, spectrograms of long recordings."""

import subprocess
import sys

import librosa
import numpy as np
import pytest
import soundfile

import ast_jax
from ast_jax.audio import fbank
from ast_jax.inference import pictures
from ast_jax.inference.embeddings import patch_extents
from ast_jax.inference.explanations import Explanation
from ast_jax.inference.timeline import Analysis

FRONTEND = ast_jax.FrontendConfig(max_length=256)


def ticks(axis):
    """Return the labels of the ticks within the limits, by place."""
    low, high = axis.get_view_interval()
    labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return {place: label.get_text() for place, label in labels if low <= place <= high}


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


def test_a_timeline_has_a_row_for_each_detected_label():
    spec = np.random.default_rng(0).standard_normal((100, 128)).astype(np.float32)
    figure = pictures.timeline_figure(analysis(10), spec, FRONTEND, 0.5)
    figure.draw_without_rendering()
    top, bottom, _ = figure.axes
    assert [tick.get_text() for tick in bottom.get_yticklabels()] == ["Speech", "Music $5"]
    (first, second) = [collection.get_paths()[0].get_extents() for collection in bottom.collections]
    assert (first.x0, first.x1, second.x0, second.x1) == (0, 5, 5, 10)
    assert bottom.get_xlim() == top.get_xlim() == (0, 10)
    assert "a score of 0.5 or more" in bottom.get_xlabel()
    assert (bottom.get_xlabel().split(";")[0], top.get_ylabel(), top.get_xlabel()) == ("Time (seconds)", "Hz", "")
    assert ticks(top.yaxis) == {512: "512", 1024: "1024", 2048: "2048", 4096: "4096"}


def test_a_timeline_of_nothing_and_of_too_much():
    spec = np.zeros((100, 128), np.float32)
    figure = pictures.timeline_figure(analysis(10), spec, FRONTEND, 0.95)
    assert [tick.get_text() for tick in figure.axes[1].get_yticklabels()] == ["Speech"]  # 0.45 on the whole
    labels = tuple(f"label {number}" for number in range(20))
    found = Analysis("x", labels, np.array([[0.0, 1.0]]), np.ones((1, 20)), 1.0)
    figure = pictures.timeline_figure(found, spec, FRONTEND, 0.5)
    assert len(figure.axes[1].get_yticklabels()) == pictures.ROWS
    assert "5 more labels are not drawn" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize(
    ("seconds", "unit", "label"),
    [(12, "seconds", (10.5, "10.5")), (90, "minutes", (70, "1:10")), (4000, "hours", (3600, "1:00:00"))],
)
def test_times_are_seconds_or_a_clock(seconds, unit, label):
    figure = pictures.timeline_figure(analysis(seconds), np.zeros((100, 128), np.float32), FRONTEND, 0.5)
    figure.draw_without_rendering()
    assert figure.axes[1].get_xlabel().startswith(f"Time ({unit})")
    assert label in ticks(figure.axes[1].xaxis).items()


@pytest.mark.parametrize("frontend", [FRONTEND, FRONTEND.replace(num_mel_bins=40, low_freq=125.0, high_freq=-500.0)])
def test_bins_lie_between_their_edges(frontend):
    """Halfway in mel, which is HTK's in librosa: 2595 log10(1 + f / 700), Kaldi's 1127 ln(1 + f / 700)."""
    mel = librosa.hz_to_mel(pictures.bin_edges(frontend), htk=True)
    centres = librosa.hz_to_mel(fbank.mel_edges(frontend)[1:-1], htk=True)
    np.testing.assert_allclose((mel[1:] + mel[:-1]) / 2, centres, rtol=1e-12)  # roundings of float64
    np.testing.assert_allclose(np.diff(mel), (centres[-1] - centres[0]) / (len(centres) - 1), rtol=1e-9)


@pytest.mark.parametrize("hertz", [1000, 2500, 5000])  # centres of FFT bins
def test_a_tone_is_drawn_at_its_frequency(hertz):
    spec = fbank.log_mel(0.5 * np.sin(2 * np.pi * hertz * np.arange(16000) / 16000).astype(np.float32), FRONTEND)
    figure = pictures.timeline_figure(analysis(1), spec, FRONTEND, 0.5)
    (mesh,) = figure.axes[0].collections
    row = mesh.get_array().mean(1).argmax()
    low, high = mesh.get_coordinates()[row : row + 2, 0, 1]
    nearest = np.abs(fbank.mel_edges(FRONTEND)[1:-1] - hertz).argmin()
    assert row == nearest
    assert low < hertz < high
    assert mesh.get_coordinates()[0, [0, -1], 0].tolist() == [0, 1]


def test_cells_are_drawn_over_the_bins_and_frames_that_they_cover():
    """As are patches, whose edges are halfway between their centres."""
    frontend = ast_jax.FrontendConfig(max_length=48)
    config = ast_jax.PRESETS["tiny"](num_labels=2, max_length=48)
    times, frequencies = patch_extents(config, frontend)
    spec = np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32)
    found = Explanation(
        "a.wav", ("x",), np.ones(1), 0.0, 0.48, spec, np.random.default_rng(0).random(config.grid), np.abs(spec[None]),
        np.zeros((1, 2, 4)), times, frequencies, np.arange(0, 49, 12), np.array([0, 64, 128]), frontend,
    )  # fmt: skip
    figure = pictures.explanation_figure(found)
    figure.draw_without_rendering()
    spectrogram, rollout, saliency, occlusion = (axes.collections[0].get_coordinates() for axes in figure.axes[:4])
    np.testing.assert_array_equal(saliency, spectrogram)
    np.testing.assert_array_equal(occlusion, spectrogram[::64, ::12])
    np.testing.assert_allclose(rollout[[0, -1]][:, [0, -1]], spectrogram[[0, -1]][:, [0, -1]])
    stride = config.frequency_stride, config.time_stride
    inner = np.diff(librosa.hz_to_mel(rollout[1:-1, 0, 1], htk=True)), np.diff(rollout[0, 1:-1, 0])
    np.testing.assert_allclose(inner[1], stride[1] * 0.01)
    bins = librosa.hz_to_mel(pictures.bin_edges(frontend), htk=True)
    np.testing.assert_allclose(inner[0], stride[0] * (bins[1] - bins[0]), rtol=0.02)  # halfway in Hz


@pytest.mark.parametrize("missing", ["matplotlib", "librosa"])
def test_the_missing_package_and_the_command_that_installs_it_are_named(missing, tmp_path):
    code = (
        f"import pathlib, sys; sys.modules[{missing!r}] = None; from ast_jax.inference import pictures; "
        f"pictures.check_place(pathlib.Path({str(tmp_path / 'picture.png')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: pictures need {missing}; install it with: pip install 'ast-jax[plots]'"
    )
