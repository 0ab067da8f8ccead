"""`classify` and `analyze`: kinds of input, batching, windows, padding; the shipped model on shipped recordings."""

import io
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from command_line import ONE_DEVICE

import ast_jax
from ast_jax.checkpoints.locate import shipped_models
from ast_jax.inference import sliding_window
from ast_jax.inference.sliding_window import PADDING

PACKAGE = pathlib.Path(ast_jax.__file__).parent
SOUNDS = PACKAGE / "sounds"
# Labels by a listener, which are also the model's best ones; none of the recordings is in the training data.
LABELS = {
    "speech.flac": {"Speech"},
    "music.flac": {"Music"},
    "speech_over_music.flac": {"Speech", "Music"},
    "telephone.flac": {"Alarm"},
    "siren.flac": {"Siren", "Alarm"},
}


@pytest.fixture(scope="module")
def model():
    return ast_jax.load("sounds-tiny")


def beginning(name, model):
    """Return the start of a shipped recording, as long as the model's input."""
    return ast_jax.read_audio(SOUNDS / name)[: model.frontend.max_samples]


@pytest.mark.parametrize("name", LABELS)
def test_shipped_model_classifies_shipped_recordings(name, model):
    predictions = ast_jax.classify(beginning(name, model), model, sampling_rate=16000, top_k=len(LABELS[name]))
    assert {label for label, _ in predictions} == LABELS[name]


def test_every_shipped_recording_is_licensed():
    names = {path.name for path in SOUNDS.glob("*.flac")}
    assert names == set(LABELS)
    licences = (SOUNDS / "LICENSES.md").read_text()
    assert all(f"`{name}`" in licences for name in names)


def test_shipped_model_classifies_silence_and_noise(model):
    rng = np.random.default_rng(0)
    silence = np.zeros(model.frontend.max_samples, np.float32)
    noise = 0.1 * rng.standard_normal(model.frontend.max_samples).astype(np.float32)
    results = ast_jax.classify([silence, noise], model, sampling_rate=16000)
    assert [predictions[0][0] for predictions in results] == ["Silence", "Noise"]


def test_shipped_model_is_small_and_has_its_provenance(model):
    assert shipped_models() == ["sounds-tiny"]
    size = sum(path.stat().st_size for path in (PACKAGE / "models" / "sounds-tiny").rglob("*") if path.is_file())
    assert size < 8_000_000
    assert len(model.config.labels) >= 8
    assert {"Speech", "Music", "Silence", "Noise"} <= set(model.config.labels)
    assert model.config.resolved_problem_type == "multi_label_classification"
    assert all(
        leaf.dtype == np.float32 for leaf in (model.params["layernorm"]["scale"], model.params["layernorm"]["bias"])
    )
    assert all(entry["package"] for entry in model.metadata["sources"])
    assert json.dumps(model.metadata["training"])


def test_shipped_model_on_held_out_packages(model):
    """The metrics of tools/ship_sounds_tiny.py on the test split, stored with the weights."""
    for figures in map(model.metadata["test"].get, ("clean", "noisy")):
        assert figures["mAP"] >= 0.90
        assert min(figures["classes"][name]["average_precision"] for name in ("Speech", "Music")) >= 0.97


def test_page_states_the_measured_figures(model):
    """Each row of the table in docs/sounds-tiny.md is what the checkpoint's metadata holds."""
    page = (PACKAGE.parent / "docs" / "sounds-tiny.md").read_text()
    names = [*model.config.labels, "**macro mAP**"]
    for name in names:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert len(cells) == 2
        for cell, condition in zip(cells, ("clean", "noisy"), strict=True):
            figures = model.metadata["test"][condition]
            if name == "**macro mAP**":
                assert cell == f"{figures['mAP']:.3f}"
            elif entry := figures["classes"].get(name):
                assert cell == f"{entry['average_precision']:.3f} ({entry['positives']})"
            else:
                assert cell == ""


def test_path_bytes_file_object_and_samples_agree(model):
    path = SOUNDS / "telephone.flac"
    want = ast_jax.classify(ast_jax.read_audio(path), model, sampling_rate=16000)
    results = ast_jax.classify([path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())], model)
    for result in results:
        assert [label for label, _ in result] == [label for label, _ in want]
        np.testing.assert_allclose([score for _, score in result], [score for _, score in want], atol=1e-5)


def test_other_rates_and_channels(model, tmp_path):
    """A stereo tone at 44.1 kHz has the scores of the tone at 16 kHz."""
    time = np.arange(2 * 44100) / 44100
    tone = 0.3 * np.sin(2 * np.pi * 1000 * time)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, tone], 1), 44100)
    from_file = dict(ast_jax.classify(tmp_path / "tone.wav", model, top_k=8))
    at_rate = dict(
        ast_jax.classify(0.3 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000), model, sampling_rate=16000, top_k=8)
    )
    for label, score in from_file.items():
        assert abs(score - at_rate[label]) < 0.05  # 16-bit quantisation and the resampler's edges


def test_batches_equal_single_sounds(model):
    rng = np.random.default_rng(1)
    sounds = [0.1 * rng.standard_normal(rng.integers(400, 41000)) for _ in range(11)]
    together = ast_jax.classify(sounds, model, sampling_rate=16000, top_k=8)
    for sound, result in zip(sounds, together, strict=True):
        alone = dict(ast_jax.classify(sound, model, sampling_rate=16000, top_k=8))
        for label, score in result:
            assert abs(score - alone[label]) < 1e-5  # float32 roundings of other batch shapes


def test_scores_follow_the_problem_type(model):
    sound = beginning("speech.flac", model)
    spec = ast_jax.ASTFeatureExtractor(model.frontend)(sound, sampling_rate=16000)
    logits = np.asarray(ast_jax.apply(model.params, spec, model.config))[0].astype(np.float64)
    want = {
        "multi_label_classification": 1 / (1 + np.exp(-logits)),
        "single_label_classification": np.exp(logits) / np.exp(logits).sum(),
        "regression": logits,
    }
    for kind, values in want.items():
        other = model.replace(config=model.config.replace(problem_type=kind))
        scores = dict(ast_jax.classify(sound, other, sampling_rate=16000, top_k=99))
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        np.testing.assert_allclose([scores[label] for label in model.config.labels], values, atol=1e-5)


def test_errors_name_the_sound(model, tmp_path):
    with pytest.raises(ast_jax.AudioError, match=r"none\.wav: no such file"):
        ast_jax.classify(tmp_path / "none.wav", model)
    with pytest.raises(ValueError, match="sampling_rate"):
        ast_jax.classify(np.zeros(16000, np.float32), model)
    with pytest.raises(ValueError, match="int16"):
        ast_jax.classify(np.zeros(16000, np.int16), model, sampling_rate=16000)
    bad = np.zeros(16000, np.float32)
    bad[[3, 5]] = np.nan, np.inf
    with pytest.raises(ast_jax.AudioError, match="2 of 16000 samples are NaN or Inf"):
        ast_jax.classify(bad, model, sampling_rate=16000)
    with pytest.raises(ValueError, match="top_k: expected 1 or more"):
        ast_jax.classify(SOUNDS / "speech.flac", model, top_k=0)


def test_results_are_streamed(model):
    """The first batch is yielded before the fifth is read, so memory is independent of the number of sounds."""
    read = []

    def sources():
        for index in range(99):
            read.append(index)
            yield np.zeros(4000, np.float32)

    results = ast_jax.analyze_each(sources(), model, sampling_rate=16000, batch_size=4)
    next(results)
    assert 4 <= len(read) <= (sliding_window.AHEAD + 2) * 4
    assert len(list(results)) == 98


def test_scores_that_are_not_finite_are_an_error(model):
    norm = {**model.params["layernorm"], "bias": np.full(model.config.hidden_size, np.nan, np.float32)}
    broken = model.replace(params={**model.params, "layernorm": norm})
    with pytest.raises(ast_jax.AudioError, match="the model's output is not finite"):
        ast_jax.classify(np.zeros(16000, np.float32), broken, sampling_rate=16000)


def test_dither_is_switched_off(model):
    dithered = model.replace(frontend=model.frontend.replace(dither=0.01))
    samples = beginning("speech.flac", model)
    want, got = (ast_jax.classify(samples, each, sampling_rate=16000) for each in (model, dithered))
    assert got == want


@pytest.mark.parametrize("rate", [0, -1, "16000", float("nan")])
def test_invalid_rates(model, rate):
    with pytest.raises(ValueError, match="sampling_rate: expected a positive number of Hz"):
        ast_jax.classify(np.zeros(16000, np.float32), model, sampling_rate=rate)


def test_a_file_named_like_the_standard_input(model, tmp_path, monkeypatch):
    (tmp_path / "-").write_bytes((SOUNDS / "siren.flac").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert ast_jax.classify("-", model)[0][0] in LABELS["siren.flac"]


def test_a_model_without_a_classifier():
    model = ast_jax.load("sounds-tiny")
    body = model.replace(params={name: part for name, part in model.params.items() if name != "classifier"})
    with pytest.raises(ValueError, match="the model has no classifier; fine-tune it first"):
        ast_jax.classify(np.zeros(16000, np.float32), body, sampling_rate=16000)


def scores_of(samples, model, **options):
    """Return the scores [C] of one clip, by the extractor and `apply`."""
    spec, lengths = ast_jax.ASTFeatureExtractor(model.frontend)(samples, 16000, return_attention_mask=True)
    options = {"lengths": lengths} if options.get("masked") else {}
    logits = np.asarray(ast_jax.apply(model.params, spec, model.config, **options))[0].astype(np.float64)
    return 1 / (1 + np.exp(-logits))


def test_sliding_windows_of_a_long_sound(model):
    """Scores of each window equal those of the window alone; the result is their mean."""
    sound = np.concatenate([ast_jax.read_audio(SOUNDS / name) for name in ("speech.flac", "music.flac")])
    found = ast_jax.analyze(sound, model, sampling_rate=16000)
    size = model.frontend.max_samples
    starts = [*range(0, len(sound) - size + 1, size // 2), len(sound) - size]
    np.testing.assert_allclose(found.times, np.array([[start, start + size] for start in starts]) / 16000)
    want = np.array([scores_of(sound[start : start + size], model) for start in starts])
    np.testing.assert_allclose(found.scores, want, atol=1e-5)  # float32 roundings of other batch shapes
    np.testing.assert_allclose(found.overall, want.mean(0), atol=1e-5)
    assert found.duration == len(sound) / 16000
    segments = {segment.label: segment for segment in found.timeline()}
    assert segments["Speech"].start == 0
    assert 4 < segments["Speech"].end < 8
    assert 3 < segments["Music"].start < 6
    assert segments["Music"].end == found.duration
    loudest = ast_jax.analyze(sound, model, sampling_rate=16000, aggregate="max")
    np.testing.assert_allclose(loudest.overall, want.max(0), atol=1e-5)


def test_windows_longer_than_the_input_are_run_in_clips(model):
    sound = ast_jax.read_audio(SOUNDS / "music.flac")  # 5 s
    found = ast_jax.analyze(sound, model, sampling_rate=16000, window=4.0, hop=1.0)
    assert found.times.tolist() == [[0, 4], [1, 5]]
    size = model.frontend.max_samples
    pieces = [scores_of(sound[start : start + size], model) for start in (16000, 5 * 16000 - size)]
    np.testing.assert_allclose(found.scores[1], np.mean(pieces, axis=0), atol=1e-5)


def test_short_and_long_sounds_in_one_batch(model):
    """The result of a sound does not depend on its neighbours or on the batch boundaries."""
    rng = np.random.default_rng(2)
    sounds = [0.1 * rng.standard_normal(size).astype(np.float32) for size in (4000, 100_000, 41_000, 300_000, 20_000)]
    alone = [ast_jax.analyze(sound, model, sampling_rate=16000) for sound in sounds]
    for batch_size in (1, 3, 8):
        together = ast_jax.analyze(sounds, model, sampling_rate=16000, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert one.times.tolist() == other.times.tolist()
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)  # float32 roundings of other shapes


def test_an_error_late_in_a_sound_affects_that_sound_only(model):
    bad = np.zeros(200_000, np.float32)
    bad[-1] = np.nan
    good = np.zeros(20_000, np.float32)
    first, second, third = ast_jax.analyze_each([good, bad, good], model, sampling_rate=16000, batch_size=2)
    assert first.error is None
    assert second.error == "<ndarray>: 1 of 8000 samples from 12.00 s on are NaN or Inf"
    np.testing.assert_allclose(third.scores, first.scores, atol=1e-6)


def test_padding_modes(model):
    """Each against an explicit computation: zeros, the repeated clip, `lengths`, and a model of the clip's length."""
    sound = beginning("speech.flac", model)[:20_000]  # 123 frames, whole patches up to 120
    found = {kind: ast_jax.analyze(sound, model, sampling_rate=16000, padding=kind).scores[0] for kind in PADDING}
    full = np.tile(sound, 3)[: model.frontend.max_samples]
    frames = 1 + (20_000 - 400) // 160
    cut = ast_jax.resize(model, max_length=frames // 4 * 4)
    want = {
        "zero": scores_of(sound, model),
        "repeat": scores_of(full, model),
        "mask": scores_of(sound, model, masked=True),
        "own-length": scores_of(sound[: cut.frontend.max_samples], cut),
    }
    for kind, scores in want.items():
        np.testing.assert_allclose(found[kind], scores, atol=1e-5, err_msg=kind)  # float32 roundings
    for one, other in itertools.combinations(want, 2):
        assert np.abs(want[one] - want[other]).max() > 1e-3, (one, other)


@pytest.mark.parametrize("kind", PADDING)
def test_batches_of_mixed_lengths_equal_single_clips(model, kind):
    rng = np.random.default_rng(3)
    sounds = [0.1 * rng.standard_normal(size).astype(np.float32) for size in (400, 9000, 9100, 41_000)]
    together = ast_jax.analyze(sounds, model, sampling_rate=16000, padding=kind)
    in_another_batch = ast_jax.analyze(sounds[::-1] + sounds, model, sampling_rate=16000, padding=kind, batch_size=4)
    for index, sound in enumerate(sounds):
        alone = ast_jax.analyze(sound, model, sampling_rate=16000, padding=kind).scores
        np.testing.assert_allclose(together[index].scores, alone, atol=1e-5)  # float32 roundings of other batch shapes
        np.testing.assert_allclose(in_another_batch[len(sounds) + index].scores, alone, atol=1e-5)


def test_own_length_compiles_one_program_per_number_of_patches(model):
    windows = sliding_window.SlidingWindow(model, ast_jax.apply, padding="own-length")
    sounds = [np.zeros(size, np.float32) for size in (400, 1000, 1040, 20_000, 19_800, 41_200)]
    assert all(found.outputs.shape == (1, 8) for found in windows.run(sounds, 16000))
    assert sorted(windows.models) == [4, 120, 256]  # frames: one patch, thirty, all


def test_invalid_options(model):
    sound = np.zeros(16000, np.float32)
    for options, message in (
        ({"padding": "reflect"}, "padding: expected one of zero, repeat, mask, own-length, got 'reflect'"),
        ({"aggregate": "sum"}, "aggregate: expected one of mean, max, got 'sum'"),
        ({"window": -1}, "window: expected a positive number of seconds, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ast_jax.classify(sound, model, sampling_rate=16000, **options)


def test_an_unfinished_iterator_at_exit():
    """The interpreter exits without an error although threads still decode."""
    code = (
        "import ast_jax, sys\n"
        "each = ast_jax.analyze_each(40 * sys.argv[1:], 'sounds-tiny')\n"
        "print(next(each).best(1)[0][0])\n"
    )
    command = [sys.executable, "-c", code, SOUNDS / "siren.flac"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ONE_DEVICE})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["Alarm"], "")
