"""`explain`: attention rollout, gradient saliency and occlusion for one window of a sound."""

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
from ast_jax.audio.streams import Audio, mono_blocks
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference import predict
from ast_jax.inference.embeddings import patch_extents
from ast_jax.inference.sliding_window import default_batch_size
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.model.scores import scores as to_scores

MAX_LABELS_SHOWN = 12  # in the message about an unknown label
CELLS = (8, 16)  # default grid of occlusion: cells along frequency, along time


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Evidence for labels in the spectrogram of one window. Frames T and mel bins F exclude padding.

    Attributes:
        source: name of the sound.
        labels: the K explained labels.
        scores: [K] of the window.
        start: seconds in the sound at which the window starts.
        duration: seconds of the window.
        spec: [T, F], log-mel features, not normalised.
        rollout: [F', T'], attention rollout: the share of attention that flows from each patch to the class and the
            distillation token, not specific to a label. The rest up to 1 comes from these tokens and from padding.
        saliency: [K, T, F], absolute gradient of each label's logit with respect to the normalised features.
        occlusion: [K, F'', T''], decrease of each label's logit when a cell of the spectrogram is replaced with the
            features' mean; negative where the logit increases.
        patch_times: [T', 2] seconds from `start`, start and end of each patch.
        patch_frequencies: [F', 2] Hz, lowest and highest of each patch.
        cell_frames: [T'' + 1] frame edges of the occlusion cells.
        cell_bins: [F'' + 1] mel bin edges of the occlusion cells.
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
    audio: Audio,
    checkpoint: Checkpoint | str | os.PathLike[str] = predict.DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    labels: Sequence[str] | None = None,
    top_k: int = 3,
    start: float | None = None,
    cells: tuple[int, int] = CELLS,
) -> Explanation:
    """Explain the labels of one window of a sound by rollout, saliency and occlusion.

    The window is as long as the model's input. By default it is the window in which the sound's best label, or the
    first of `labels`, has the highest score.

    Args:
        audio: path, encoded bytes, a seekable file object, or samples [S] (with `sampling_rate`).
        checkpoint: a loaded checkpoint, or the argument of `load`.
        sampling_rate: Hz of samples given as an array.
        labels: labels to explain; None for the `top_k` labels of the window.
        top_k: number of labels.
        start: seconds at which the window starts.
        cells: number of occlusion cells along frequency and time; each costs one forward pass.

    Raises:
        AudioError: an unusable sound, or one that ends before `start`.
        ValueError: an unknown label, a model without a classifier, or samples without a rate.
    """
    checkpoint = loaded(checkpoint)
    params, config, frontend = checkpoint.params, checkpoint.config, checkpoint.frontend.replace(dither=0.0)
    predict.check_classifier(checkpoint)
    if isinstance(audio, list | tuple):
        raise ValueError(f"audio: expected one sound, got a {type(audio).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    if unknown := sorted(set(labels or ()) - set(config.labels)):
        more = ", ..." if len(config.labels) > MAX_LABELS_SHOWN else ""
        known = f"{', '.join(config.labels[:MAX_LABELS_SHOWN])}{more}"
        raise ValueError(f"labels: expected the model's ({known}), got {', '.join(unknown)}")
    if min(cells) < 1:
        raise ValueError(f"cells: expected 1 or more, got {cells}")
    name = describe(audio)
    if start is None:
        found = predict.analyze(audio, checkpoint, sampling_rate=sampling_rate)
        first = config.labels.index(labels[0]) if labels else int(found.overall.argmax())
        start = float(found.times[found.scores[:, first].argmax(), 0])
    waveform = _window(audio, frontend, sampling_rate, start, name)
    extractor = ASTFeatureExtractor(frontend)
    padded, (frames,) = extractor(waveform, frontend.sampling_rate, return_attention_mask=True)  # [1, T, F]
    spec = jnp.asarray(padded[0])
    params = jax.device_put(params)
    logits = _logits(params, spec, config)
    best = np.argsort(-np.asarray(logits), kind="stable")[:top_k].tolist()
    explained = [config.labels.index(label) for label in labels] if labels else best
    rollout, saliency = _rollout_and_saliency(params, spec, np.asarray(explained), config)
    patch_times, patch_frequencies = patch_extents(config, frontend)
    inside = np.flatnonzero(patch_times[:, 0] < len(waveform) / frontend.sampling_rate)
    frame_edges, bin_edges = _edges(int(frames), cells[1]), _edges(config.num_mel_bins, cells[0])
    boxes = [
        (*bins, *times)
        for bins, times in itertools.product(itertools.pairwise(bin_edges), itertools.pairwise(frame_edges))
    ]
    mean = 0.0 if frontend.do_normalize else frontend.mean
    drops = np.asarray(logits) - _occluded_logits(params, spec, mean, np.asarray(boxes), config)  # [cells, C]
    return Explanation(
        source=name,
        labels=tuple(config.labels[label] for label in explained),
        scores=np.asarray(to_scores(logits, config))[explained],
        start=start,
        duration=len(waveform) / frontend.sampling_rate,
        spec=fbank.log_mel(waveform, frontend),
        rollout=np.asarray(rollout)[:, inside],
        saliency=np.asarray(saliency)[:, :frames],
        occlusion=drops[:, explained].T.reshape(-1, len(bin_edges) - 1, len(frame_edges) - 1),  # [K, F'', T'']
        patch_times=patch_times[inside],
        patch_frequencies=patch_frequencies,
        cell_frames=frame_edges,
        cell_bins=bin_edges,
        frontend=frontend,
    )


def _window(audio: Any, frontend: FrontendConfig, rate: int | None, start: float, name: str) -> np.ndarray:
    """Return the samples [S] from `start` on, at least one frame and at most the model's input."""
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
    """Return the edges of `parts` nearly equal, non-empty parts of a size; fewer parts if it is smaller."""
    return np.unique(np.linspace(0, size, min(parts, size) + 1).round().astype(int))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Any, spec: jax.Array, config: ASTConfig) -> jax.Array:
    """Return the logits [C] of a normalised spectrogram [T, F]."""
    return model.apply(params, spec, config)


@functools.partial(jax.jit, static_argnames="config")
def _rollout_and_saliency(
    params: Any, spec: jax.Array, labels: jax.Array, config: ASTConfig
) -> tuple[jax.Array, jax.Array]:
    """Return the rollout [F', T'] and the saliency [K, T, F] of a normalised spectrogram [T, F]; labels are indices."""

    def logit(spec: jax.Array, label: jax.Array) -> jax.Array:
        return model.apply(params, spec, config)[label]

    saliency = jax.lax.map(lambda label: jnp.abs(jax.grad(logit)(spec, label)), labels)
    attentions = model.encode(params, spec, config, output_attentions=True).attentions
    assert attentions is not None
    return rollout(attentions)[2:].reshape(config.grid), saliency  # [F', T']


def rollout(attentions: jax.Array) -> jax.Array:
    """Return the attention rollout of each token to the class and the distillation token: [N], sum 1.

    Abnar and Zuidema (2020): attention averaged over heads and, for the residual connection, with the identity,
    multiplied through the layers.

    Args:
        attentions: [L, H, N, N] of one spectrogram, as `encode` returns them.
    """

    def back(flow: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return (flow + flow @ weights.mean(0)) / 2, None

    start = jnp.zeros(attentions.shape[-1], attentions.dtype).at[:2].set(0.5)
    return jax.lax.scan(back, start, attentions, reverse=True)[0]


def _occluded_logits(params: Any, spec: jax.Array, fill: float, boxes: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return the logits [cells, C] with each box [cells, 4] (bins, then frames, from and to) replaced by `fill`."""
    size = min(default_batch_size(), len(boxes))
    implementation = fastest_implementation(params["layernorm"]["scale"].dtype)
    padded = np.concatenate([boxes, np.repeat(boxes[-1:], -len(boxes) % size, axis=0)])  # one shape to compile
    batches = [
        _occluded_batch(params, spec, fill, padded[begin : begin + size], config, implementation)
        for begin in range(0, len(padded), size)
    ]
    return np.concatenate([np.asarray(batch) for batch in batches])[: len(boxes)]


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _occluded_batch(
    params: Any, spec: jax.Array, fill: float, boxes: jax.Array, config: ASTConfig, implementation: str
) -> jax.Array:
    """Return the logits [B, C] of a spectrogram [T, F] with each of the boxes [B, 4] replaced by `fill`."""
    frames, bins = (jnp.arange(size) for size in spec.shape)

    def one_box(box: jax.Array) -> jax.Array:
        low, high, begin, end = box
        hidden = ((frames >= begin) & (frames < end))[:, None] & ((bins >= low) & (bins < high))[None]  # [T, F]
        return model.apply(params, jnp.where(hidden, fill, spec), config, attention_implementation=implementation)

    return jax.lax.map(one_box, boxes, batch_size=None if jax.default_backend() == "cpu" else len(boxes))
