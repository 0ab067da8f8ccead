"""`classify` in Python: every kind of input, batching, what was cut, and the shipped model on shipped recordings."""

import io
import json
import pathlib

import numpy as np
import pytest
import soundfile

import ast_jax
from ast_jax import predict
from ast_jax.checkpoint import shipped_models

PACKAGE = pathlib.Path(ast_jax.__file__).parent
SOUNDS = PACKAGE / "sounds"
# The labels that a listener would give and the model gives first; all recordings are from packages that training never
# touched.
HEARD = {
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
    """Return as much of a shipped recording as the model hears."""
    return ast_jax.read_audio(SOUNDS / name)[: model.frontend.max_samples]


@pytest.mark.parametrize("name", HEARD)
def test_shipped_model_names_shipped_recordings(name, model):
    predictions = ast_jax.classify(beginning(name, model), model, sampling_rate=16000, top_k=len(HEARD[name]))
    assert {label for label, _ in predictions} == HEARD[name]


def test_every_shipped_recording_is_licensed():
    names = {path.name for path in SOUNDS.glob("*.flac")}
    assert names == set(HEARD)
    licences = (SOUNDS / "LICENSES.md").read_text()
    assert all(f"`{name}`" in licences for name in names)


def test_shipped_model_knows_silence_and_noise(model):
    rng = np.random.default_rng(0)
    silence = np.zeros(model.frontend.max_samples, np.float32)
    noise = 0.1 * rng.standard_normal(model.frontend.max_samples).astype(np.float32)
    results = ast_jax.classify([silence, noise], model, sampling_rate=16000)
    assert [predictions[0][0] for predictions in results] == ["Silence", "Noise"]


def test_shipped_model_is_small_and_says_where_it_came_from(model):
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


def test_shipped_model_is_right_about_packages_that_training_never_touched(model):
    """What tools/ship_sounds_tiny.py measured on the test split and wrote beside the weights."""
    for figures in map(model.metadata["test"].get, ("clean", "noisy")):
        assert figures["mAP"] >= 0.90
        assert min(figures["classes"][name]["average_precision"] for name in ("Speech", "Music")) >= 0.97


def test_readme_states_the_measured_figures(model):
    """Each row of the README's table is what the checkpoint's metadata holds."""
    readme = (PACKAGE.parent / "README.md").read_text()
    names = [*model.config.labels, "**macro mAP**"]
    for name in names:
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| {name} |")]
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
    want = ast_jax.classify(beginning("telephone.flac", model), model, sampling_rate=16000)
    with pytest.warns(UserWarning, match=r"heard only the first 2.58 s of 2.82 s"):
        results = ast_jax.classify([path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())], model)
    for result in results:
        assert [label for label, _ in result] == [label for label, _ in want]
        np.testing.assert_allclose([score for _, score in result], [score for _, score in want], atol=1e-5)


def test_other_rates_and_channels(model, tmp_path):
    """A tone at 44.1 kHz in stereo is the tone at 16 kHz."""
    time = np.arange(2 * 44100) / 44100
    tone = 0.3 * np.sin(2 * np.pi * 1000 * time)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, tone], 1), 44100)
    from_file = dict(ast_jax.classify(tmp_path / "tone.wav", model, top_k=8))
    at_rate = dict(
        ast_jax.classify(0.3 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000), model, sampling_rate=16000, top_k=8)
    )
    for label, score in from_file.items():
        assert abs(score - at_rate[label]) < 0.05  # 16-bit quantisation and the resampler's edges


def test_batches_give_what_single_sounds_give(model):
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


def test_results_come_as_they_are_ready(model):
    """The first batch is out before the fifth is read, so that memory does not grow with the number of sounds."""
    read = []

    def sources():
        for index in range(99):
            read.append(index)
            yield np.zeros(4000, np.float32)

    results = predict.classify_each(sources(), model, sampling_rate=16000, batch_size=4)
    next(results)
    assert 4 <= len(read) <= (predict.AHEAD + 2) * 4
    assert len(list(results)) == 98


def test_scores_that_are_not_finite_are_an_error(model):
    norm = {**model.params["layernorm"], "bias": np.full(model.config.hidden_size, np.nan, np.float32)}
    broken = model.replace(params={**model.params, "layernorm": norm})
    with pytest.raises(ast_jax.AudioError, match="the scores are not finite"):
        ast_jax.classify(np.zeros(16000, np.float32), broken, sampling_rate=16000)


def test_dither_is_for_training(model):
    dithered = model.replace(frontend=model.frontend.replace(dither=0.01))
    samples = beginning("speech.flac", model)
    want, got = (ast_jax.classify(samples, each, sampling_rate=16000) for each in (model, dithered))
    assert got == want


@pytest.mark.parametrize("rate", [0, -1, "16000", float("nan")])
def test_rates_that_are_none(model, rate):
    with pytest.raises(ValueError, match="sampling_rate: expected a positive number of Hz"):
        ast_jax.classify(np.zeros(16000, np.float32), model, sampling_rate=rate)


def test_a_file_named_as_the_standard_input(model, tmp_path, monkeypatch):
    (tmp_path / "-").write_bytes((SOUNDS / "siren.flac").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert ast_jax.classify("-", model)[0][0] in HEARD["siren.flac"]


def test_a_model_without_a_classifier_says_so():
    model = ast_jax.load("sounds-tiny")
    body = model.replace(params={name: part for name, part in model.params.items() if name != "classifier"})
    with pytest.raises(ValueError, match="the model has no classifier and can name nothing"):
        ast_jax.classify(np.zeros(16000, np.float32), body, sampling_rate=16000)
