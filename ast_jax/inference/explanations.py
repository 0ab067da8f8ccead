"""Why a model names what it names: attention rollout, gradient saliency and occlusion of one sound."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.features import ASTFeatureExtractor
from ast_jax.audio.io import MIN_SECONDS, AudioError, decode, describe
from ast_jax.audio.streams import mono_blocks
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference import predict
from ast_jax.inference.embeddings import patch_extents
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.model.scores import scores as to_scores
from ast_jax.runtime.progress import track

KNOWN = 12  # labels that are named to one who asks for another
CELLS = (8, 16)  # of the spectrogram that occlusion takes out, one at a time: frequency, time


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What in a sound speaks for its labels. T frames and F mel bins are those that are sound, not padding.

    Attributes:
        source: the sound's name.
        labels: the K labels that are explained.
        scores: [K] of the sound.
        start: seconds in the source from which on the model heard it.
        duration: seconds that it heard.
        spec: [T, F], the log-mel features, not normalised.
        rollout: [F', T'], how much attention flows from each patch to what the classifier takes, for no label in
            particular; what is left of 1 stays with the class and the distillation token, or comes from the padding.
        saliency: [K, T, F], absolute gradient of the label's logit by the normalised features.
        occlusion: [K, F'', T''], how much the label's logit falls where a cell of the spectrogram is replaced by the
            features' mean; negative where it rises.
        patch_times: [T', 2] seconds from `start` on that the patches hear.
        patch_frequencies: [F', 2] Hz that they hear.
        cell_frames: [T'' + 1], the frames at which the cells of `occlusion` begin and end.
        cell_bins: [F'' + 1], the mel bins likewise.
        frontend: settings of the features.
    """

    source: str
    labels: tuple[str, ...]
    scores: np.ndarray
    start: float
    duration: float
    spec: np.ndarray
    rollout: np.ndarray
    saliency: np.ndarray
    occlusion: np.ndarray
    patch_times: np.ndarray
    patch_frequencies: np.ndarray
    cell_frames: np.ndarray
    cell_bins: np.ndarray
    frontend: FrontendConfig


def explain(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = predict.DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    labels: Sequence[str] | None = None,
    top_k: int = 3,
    start: float | None = None,
    cells: tuple[int, int] = CELLS,
) -> Explanation:
    """Say what in a sound speaks for its labels.

    One window of a sound, as long as the model's input, is explained: of a longer sound by default the one in which its
    best label (or the first of `labels`) has the highest score. The best labels are those of that window.

    Args:
        audio: path, encoded bytes, a file object that can be read again, or samples [S] (with `sampling_rate`).
        checkpoint: a loaded checkpoint, or what `load` takes.
        sampling_rate: Hz of samples.
        labels: to explain; None for the best ones.
        top_k: how many of the best.
        start: seconds at which the window begins.
        cells: into how many cells of frequency and time occlusion cuts the spectrogram; each is a run of the model.

    Raises:
        AudioError: a sound that cannot be used, or that ends before `start`.
        ValueError: a label that the model does not know, a model without a classifier, or samples without a rate.
    """
    checkpoint = loaded(checkpoint)
    params, config, frontend = checkpoint.params, checkpoint.config, checkpoint.frontend.replace(dither=0.0)
    predict.check_classifier(checkpoint)
    if isinstance(audio, list | tuple):
        raise ValueError(f"audio: expected one sound, got a {type(audio).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    if unknown := sorted(set(labels or ()) - set(config.labels)):
        known = f"{', '.join(config.labels[:KNOWN])}{', …' if len(config.labels) > KNOWN else ''}"
        raise ValueError(f"labels: expected the model's ({known}), got {', '.join(unknown)}")
    if min(cells) < 1:
        raise ValueError(f"cells: expected 1 or more, got {cells}")
    name = describe(audio)
    if start is None:
        found = predict.analyze(audio, checkpoint, sampling_rate=sampling_rate)
        first = config.labels.index(labels[0]) if labels else int(found.overall.argmax())
        start = float(found.times[found.scores[:, first].argmax(), 0])
    waveform = _samples(audio, frontend, sampling_rate, start, name)
    extractor = ASTFeatureExtractor(frontend)
    spec, (frames,) = extractor(waveform, frontend.sampling_rate, return_attention_mask=True)  # [1, T, F] with padding
    spec = jnp.asarray(spec[0])
    params = jax.device_put(params)
    outputs = _logits(params, spec, config)
    best = np.argsort(-np.asarray(outputs), kind="stable")[:top_k].tolist()
    wanted = [config.labels.index(label) for label in labels] if labels else best
    rollout, saliency = _looks(params, spec, np.asarray(wanted), config)
    patch_times, patch_frequencies = patch_extents(config, frontend)
    inside = np.flatnonzero(patch_times[:, 0] < len(waveform) / frontend.sampling_rate)
    time_edges = _edges(int(frames), cells[1])
    bin_edges = _edges(config.num_mel_bins, cells[0])
    mean = 0.0 if frontend.do_normalize else frontend.mean
    occlusion = _occlusion(params, spec, mean, outputs, wanted, bin_edges, time_edges, config)
    return Explanation(
        source=name,
        labels=tuple(config.labels[label] for label in wanted),
        scores=np.asarray(to_scores(outputs, config))[wanted],
        start=start,
        duration=len(waveform) / frontend.sampling_rate,
        spec=fbank.log_mel(waveform, frontend),
        rollout=np.asarray(rollout)[:, inside],
        saliency=np.asarray(saliency)[:, :frames],
        occlusion=occlusion,
        patch_times=patch_times[inside],
        patch_frequencies=patch_frequencies,
        cell_frames=time_edges,
        cell_bins=bin_edges,
        frontend=frontend,
    )


def _samples(audio: Any, frontend: FrontendConfig, rate: int | None, start: float, name: str) -> np.ndarray:
    """Return what the model hears of a sound from `start` on: [S], at least a frame."""
    if hasattr(audio, "__array__"):
        whole = np.concatenate(list(mono_blocks(audio, frontend.sampling_rate, rate)))
        samples = whole[round(start * frontend.sampling_rate) :] if start >= 0 else whole[:0]
        if len(samples) < MIN_SECONDS * frontend.sampling_rate:
            raise AudioError(f"{name}: expected sound from {start:g} s on, got {len(samples)} samples")
    else:
        if hasattr(audio, "seek"):
            audio.seek(0)
        samples = decode(audio, frontend.sampling_rate, frontend.max_seconds, start).samples
    return samples[: frontend.max_samples]


def _edges(size: int, parts: int) -> np.ndarray:
    """Return where `parts` nearly equal parts of a size begin and end, none of them empty."""
    return np.unique(np.linspace(0, size, min(parts, size) + 1).round().astype(int))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Any, spec: jax.Array, config: ASTConfig) -> jax.Array:
    """Return logits [C] of a normalised spectrogram [T, F]."""
    return model.apply(params, spec, config)


@functools.partial(jax.jit, static_argnames="config")
def _looks(params: Any, spec: jax.Array, wanted: jax.Array, config: ASTConfig) -> tuple[jax.Array, jax.Array]:
    """Return the rollout [F', T'] and the saliency [K, T, F] of a normalised spectrogram [T, F]."""

    def logit(spec: jax.Array, label: jax.Array) -> jax.Array:
        return model.apply(params, spec, config)[label]

    saliency = jax.lax.map(lambda label: jnp.abs(jax.grad(logit)(spec, label)), wanted)
    attentions = model.encode(params, spec, config, output_attentions=True).attentions
    assert attentions is not None
    return rollout(attentions)[2:].reshape(config.grid), saliency


def rollout(attentions: jax.Array) -> jax.Array:
    """Return how much of each token reaches the class and the distillation token through all layers: [N], sum 1.

    Attention rollout of Abnar and Zuidema (2020): the mean over heads, half of it the block's shortcut, multiplied
    through the layers.

    Args:
        attentions: [L, H, N, N] of one spectrogram, as `encode` returns them.
    """

    def back(flow: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return (flow + flow @ weights.mean(0)) / 2, None

    start = jnp.zeros(attentions.shape[-1], attentions.dtype).at[:2].set(0.5)
    return jax.lax.scan(back, start, attentions, reverse=True)[0]


def _occlusion(
    params: Any,
    spec: jax.Array,
    mean: float,
    outputs: jax.Array,
    wanted: Sequence[int],
    bin_edges: np.ndarray,
    time_edges: np.ndarray,
    config: ASTConfig,
) -> np.ndarray:
    """Return how much the logits [K] fall without each cell: [K, F'', T'']."""
    bins = list(itertools.pairwise(bin_edges))
    times = list(itertools.pairwise(time_edges))
    cells = [(*low_high, *begin_end) for low_high, begin_end in itertools.product(bins, times)]
    size = min(predict.default_batch_size(), len(cells))
    implementation = fastest_implementation(params["layernorm"]["scale"].dtype)
    drops = []
    for begin in track(range(0, len(cells), size), "occlusion", -(-len(cells) // size)):
        some = cells[begin : begin + size]
        some += [some[-1]] * (size - len(some))
        logits = _without(params, spec, mean, jnp.asarray(some), config, implementation)
        drops.append(np.asarray(outputs - logits)[: len(cells) - begin])
    return np.concatenate(drops)[:, list(wanted)].T.reshape(len(wanted), len(bins), len(times))


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _without(
    params: Any, spec: jax.Array, mean: float, cells: jax.Array, config: ASTConfig, implementation: str
) -> jax.Array:
    """Return the logits [B, C] of a spectrogram with the mean in place of each of some cells [B, 4]."""
    frames, bins = (jnp.arange(size) for size in spec.shape)

    def one(cell: jax.Array) -> jax.Array:
        low, high, begin, end = cell
        hidden = ((frames >= begin) & (frames < end))[:, None] & ((bins >= low) & (bins < high))
        return model.apply(params, jnp.where(hidden, mean, spec), config, attention_implementation=implementation)

    return jax.lax.map(one, cells, batch_size=None if jax.default_backend() == "cpu" else len(cells))
