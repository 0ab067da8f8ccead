"""Explanations: of a model trained to detect a tone burst, and each method against plain NumPy or JAX."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ast_jax
from ast_jax.audio import fbank
from ast_jax.inference import explanations

SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"
RATE = 16000
LENGTH = 0.1  # seconds of a burst
GRIDS = {  # square patches without overlap; rectangular ones with overlap
    "8x8": {"patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    "12x6 at 10, 5": {"patch_size": (12, 6), "frequency_stride": 10, "time_stride": 5},
}


def sounds(rng, count, frontend):
    """Return noise [B, S], whether it contains a burst [B], and the burst's start in seconds and frequency in Hz."""
    time = np.arange(frontend.max_samples) / RATE
    begins = rng.uniform(0, time[-1] - LENGTH, count)
    hertz = np.exp(rng.uniform(np.log(400), np.log(5000), count))
    inside = (time >= begins[:, None]) & (time < begins[:, None] + LENGTH)
    burst = 0.3 * np.sin(2 * np.pi * hertz[:, None] * time) * inside
    has = rng.random(count) < 0.5
    noise = 0.05 * rng.standard_normal((count, len(time)))
    return (noise + burst * has[:, None]).astype(np.float32), has, begins, hertz


@pytest.fixture(scope="module", params=GRIDS)
def finder(request):
    """A small model that detects a tone burst in noise."""
    config = ast_jax.ASTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, max_length=64,
        num_mel_bins=32, num_labels=2, id2label=("noise", "burst"), **GRIDS[request.param],
    )  # fmt: skip
    frontend = ast_jax.FrontendConfig(num_mel_bins=32, max_length=64, mean=-0.5, std=1.5)
    params = ast_jax.init(jax.random.key(0), config)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, waveforms, has):
        def loss(params):
            return ast_jax.loss(ast_jax.wave_to_logits(params, config, frontend)(waveforms), has, config)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    rng, state = np.random.default_rng(0), optimizer.init(params)
    for _ in range(200):
        waveforms, has, *_ = sounds(rng, 32, frontend)
        params, state, _ = step(params, state, waveforms, has.astype(np.int32))
    checkpoint = ast_jax.Checkpoint(params, config, frontend)
    waveforms, has, *_ = sounds(np.random.default_rng(1), 200, frontend)
    logits = ast_jax.wave_to_logits(*checkpoint)(waveforms)
    assert (np.asarray(logits).argmax(1) == has).mean() > 0.95
    return checkpoint


@pytest.mark.slow
def test_explanations_locate_the_burst(finder):
    """Over forty sounds, each explanation is concentrated on the burst, compared with the burst's area."""
    waveforms, has, begins, hertz = sounds(np.random.default_rng(2), 80, finder.frontend)
    shares, areas, highest = ({name: [] for name in ("rollout", "saliency", "occlusion")} for _ in range(3))
    for waveform, begin, tone in zip(waveforms[has], begins[has], hertz[has], strict=True):
        found = ast_jax.explain(waveform, finder, sampling_rate=RATE, labels=["burst"])
        place = np.interp(tone, fbank.mel_edges(finder.frontend), np.arange(-1, 33))  # among the mel bins
        frame = np.arange(len(found.spec)) * 0.01
        in_time = (frame + 0.025 > begin) & (frame < begin + LENGTH)
        in_bins = np.abs(np.arange(32) - place) < 2
        hit = {
            "saliency": in_time[:, None] & in_bins,
            "rollout": _overlap(found.patch_frequencies, tone, tone)[:, None]
            & _overlap(found.patch_times, begin, begin + LENGTH),
            "occlusion": np.array([in_bins[low:high].any() for low, high in _pairs(found.cell_bins)])[:, None]
            & np.array([in_time[first:last].any() for first, last in _pairs(found.cell_frames)]),
        }
        for name, where in hit.items():
            values = np.maximum(getattr(found, name).reshape(-1, *where.shape)[0], 0)
            shares[name].append(values[where].sum() / values.sum())
            areas[name].append(where.mean())
            highest[name].append(where.flat[values.argmax()])
    found = {name: (np.mean(shares[name]), np.mean(areas[name]), np.mean(highest[name])) for name in shares}
    print(found)
    for name, (share, area, best) in found.items():
        assert share > 2 * area, found
        assert best > 5 * area or name == "rollout", found


def _overlap(extents, low, high):
    return (extents[:, 0] <= high) & (extents[:, 1] >= low)


def _pairs(edges):
    return list(itertools.pairwise(edges))


def test_rollout_is_the_product_of_layers():
    """Against matrix products in NumPy."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 9, 9))
    attentions = jax.nn.softmax(logits, axis=-1)
    product = np.eye(9)
    for layer in np.asarray(attentions):
        product = (0.5 * np.eye(9) + 0.5 * layer.mean(0)) @ product
    got = explanations.rollout(attentions)
    np.testing.assert_allclose(got, product[:2].mean(0), atol=1e-6)
    assert float(got.sum()) == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def shipped():
    return ast_jax.load("sounds-tiny")


def test_shapes_and_numbers_of_a_short_sound(shipped):
    """Saliency equals the gradient; occlusion equals the difference of logits with a cell replaced."""
    sound = ast_jax.read_audio(SOUNDS / "telephone.flac")[:16_000]
    found = ast_jax.explain(sound, shipped, sampling_rate=RATE, top_k=2, cells=(2, 3))
    frames = 98
    assert found.labels == tuple(label for label, _ in ast_jax.classify(sound, shipped, sampling_rate=RATE, top_k=2))
    assert found.spec.shape == (frames, 128)
    assert found.saliency.shape == (2, frames, 128)
    assert found.occlusion.shape == (2, 2, 3)
    assert found.cell_bins.tolist() == [0, 64, 128]
    assert found.cell_frames.tolist() == [0, 33, 65, 98]
    assert found.rollout.shape == (1, 25)
    assert 0.1 < found.rollout.sum() < 1
    assert (found.start, found.duration) == (0, 1)
    spec = ast_jax.ASTFeatureExtractor(shipped.frontend)(sound, RATE)[0]
    apply = functools.partial(ast_jax.apply, shipped.params, config=shipped.config)
    wanted = [shipped.config.labels.index(label) for label in found.labels]
    gradient = jax.grad(lambda spec: apply(spec)[wanted[1]])(jnp.asarray(spec))
    np.testing.assert_allclose(found.saliency[1], np.abs(gradient)[:frames], atol=1e-4)  # roundings of other programs
    hidden = spec.copy()
    hidden[33:65, 64:] = 0
    drop = (apply(jnp.asarray(spec)) - apply(jnp.asarray(hidden)))[jnp.asarray(wanted)]
    np.testing.assert_allclose(found.occlusion[:, 1, 1], drop, atol=1e-4)
    np.testing.assert_allclose(
        found.scores, 1 / (1 + np.exp(-apply(jnp.asarray(spec))[jnp.asarray(wanted)])), atol=1e-5
    )


def test_the_best_window_of_a_long_sound(shipped):
    speech, music = (ast_jax.read_audio(SOUNDS / f"{name}.flac") for name in ("speech", "music"))
    sound = np.concatenate([music, speech])
    found = ast_jax.explain(sound, shipped, sampling_rate=RATE, labels=["Speech"], cells=(1, 1))
    analysis = ast_jax.analyze(sound, shipped, sampling_rate=RATE)
    column = shipped.config.labels.index("Speech")
    assert found.start == analysis.times[analysis.scores[:, column].argmax(), 0] > 4
    assert found.scores[0] == pytest.approx(analysis.scores[:, column].max(), abs=1e-4)
    assert found.duration == shipped.frontend.max_seconds
    there = ast_jax.explain(sound, shipped, sampling_rate=RATE, labels=["Speech"], cells=(1, 1), start=0.5)
    assert there.start == 0.5
    assert there.scores[0] < 0.5


def test_files_and_samples_have_equal_explanations(shipped):
    path = SOUNDS / "speech.flac"
    from_file, from_samples = (
        ast_jax.explain(audio, shipped, sampling_rate=RATE, cells=(1, 2), start=1.0)
        for audio in (path, ast_jax.read_audio(path))
    )
    assert from_file.source == str(path)
    np.testing.assert_allclose(from_file.saliency, from_samples.saliency, atol=1e-5)
    np.testing.assert_allclose(from_file.occlusion, from_samples.occlusion, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["Yodel"]}, r"labels: expected the model's \(Alarm, .*Speech\), got Yodel"),
        ({"cells": (0, 4)}, "cells: expected 1 or more"),
        ({"start": 9.0}, "expected sound from 9 s on"),
        ({"top_k": 0}, "top_k: expected 1 or more, got 0"),
    ],
)
def test_invalid_options(shipped, options, message):
    with pytest.raises(ValueError, match=message):
        ast_jax.explain(np.zeros(16000, np.float32), shipped, sampling_rate=RATE, **options)
