"""Sounds to labels: decode, features, batches of one size for the device, scores, the best first."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from . import model
from .audio import RESAMPLER_REACH, AudioError, Sound, decode, describe, to_mono
from .checkpoint import Checkpoint, load
from .config import ASTConfig
from .features import ASTFeatureExtractor

DEFAULT_MODEL = "sounds-tiny"
BATCH_SIZE = 8
CPU_TOKENS = 1300  # that go through the model together

Prediction = list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one sound: either predictions or an error.

    Attributes:
        source: its name.
        predictions: (label, score), the best first.
        used: seconds from the beginning that the model heard.
        duration: seconds in all.
        error: one line, or None.
    """

    source: str
    predictions: Prediction
    used: float = 0.0
    duration: float = 0.0
    error: str | None = None

    @property
    def cut(self) -> bool:
        """Whether the model heard only the beginning."""
        return self.duration - self.used > 0.01


def classify(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    top_k: int = 5,
) -> Any:
    """Name what is in a sound, or in each of a list of sounds.

    Args:
        audio: path, encoded bytes, file object, or samples [S] (with `sampling_rate`); or a list of any of these.
        checkpoint: a loaded checkpoint, or what `load` takes.
        sampling_rate: Hz of samples given as arrays, which are resampled where the model wants another rate.
        top_k: how many labels, at most as many as the model has.

    Returns:
        [(label, score), ...], the best first; a list of these for a list. Scores are probabilities: of each label for
        itself for a multi-label model (sigmoid), over all labels for a single-label one (softmax); for regression the
        outputs themselves.

    Raises:
        AudioError: a sound that cannot be used (see `read_audio`).
        ValueError: samples without a rate, or `top_k` below 1.

    Warns:
        UserWarning: a sound is longer than the model's input, and only its beginning was used.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load(checkpoint)
    several = isinstance(audio, list | tuple)
    results = []
    for result in classify_each(audio if several else [audio], checkpoint, sampling_rate=sampling_rate, top_k=top_k):
        if result.error:
            raise AudioError(result.error)
        if result.cut:
            warnings.warn(
                f"{result.source}: the model heard only the first {result.used:.2f} s of {result.duration:.2f} s",
                stacklevel=2,
            )
        results.append(result.predictions)
    return results if several else results[0]


def classify_each(
    sources: Iterable[Any],
    checkpoint: Checkpoint,
    *,
    sampling_rate: int | None = None,
    top_k: int = 5,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Result]:
    """Yield a `Result` for every source in order; one that cannot be used yields its error and the others go on.

    Sounds go through the model `batch_size` at a time (a single one alone), so that few shapes are compiled.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    if "classifier" not in checkpoint.params:
        raise ValueError("the model has no classifier and can name nothing; fine-tune it (`ast-jax finetune --init`)")
    params = jax.device_put(checkpoint.params)
    pending: list[tuple[str, Sound | str]] = []
    for source in sources:
        pending.append(_read(source, checkpoint, sampling_rate))
        if len(pending) == batch_size:
            yield from _predict(pending, params, checkpoint, top_k, batch_size)
            pending = []
    if pending:
        yield from _predict(pending, params, checkpoint, top_k, batch_size)


def _read(source: Any, checkpoint: Checkpoint, sampling_rate: int | None) -> tuple[str, Sound | str]:
    """Return a source's name, and its sound or what is wrong with it."""
    frontend, name = checkpoint.frontend, describe(source)
    try:
        if not (hasattr(source, "__array__") or isinstance(source, list)):
            return name, decode(source, frontend.sampling_rate, max_seconds=frontend.max_seconds)
        if sampling_rate is None:
            raise ValueError("samples: expected sampling_rate=… beside an array, got none")
        if not isinstance(sampling_rate, numbers.Real) or not 0 < sampling_rate < math.inf:
            raise ValueError(f"sampling_rate: expected a positive number of Hz, got {sampling_rate!r}")
        samples = np.asarray(source)
        if samples.ndim == 2 and samples.shape[0] == 1:
            samples = samples[0]
        if samples.ndim != 1 or samples.dtype.kind != "f":
            raise ValueError(
                f"samples: expected floating-point samples [S] in [-1, 1], got {samples.dtype} {samples.shape}"
            )
        duration = len(samples) / sampling_rate
        beginning = samples[: int(np.ceil((frontend.max_seconds + RESAMPLER_REACH) * sampling_rate))]
        return name, Sound(
            to_mono(beginning, sampling_rate, frontend.sampling_rate, name), frontend.sampling_rate, duration
        )
    except (AudioError, FileNotFoundError) as error:
        return name, str(error)


def _predict(
    pending: list[tuple[str, Sound | str]], params: Any, checkpoint: Checkpoint, top_k: int, batch_size: int
) -> Iterator[Result]:
    """Run one batch and yield its results in order."""
    config, frontend = checkpoint.config, checkpoint.frontend.replace(dither=0.0)  # dither is for training
    sounds = {index: sound for index, (_, sound) in enumerate(pending) if isinstance(sound, Sound)}
    scores: dict[int, np.ndarray] = {}
    if sounds:
        waveforms = [sound.samples[: frontend.max_samples] for sound in sounds.values()]  # the result says what was cut
        spec = ASTFeatureExtractor(frontend, return_attention_mask=False)(waveforms, frontend.sampling_rate)
        if len(spec) > 1:
            spec = np.pad(spec, ((0, batch_size - len(spec)), (0, 0), (0, 0)))
        values = np.asarray(_scores(logits(params, spec, config), config))
        scores = dict(zip(sounds, values, strict=False))
    for index, (name, sound) in enumerate(pending):
        if isinstance(sound, str):
            yield Result(name, [], error=sound)
            continue
        if not np.isfinite(scores[index]).all():
            reason = "the scores are not finite; the values of the sound or of the model are too large"
            yield Result(name, [], error=f"{name}: {reason}")
            continue
        best = np.argsort(-scores[index], kind="stable")[:top_k]
        predictions = [(config.labels[label], float(scores[index][label])) for label in best]
        used = min(len(sound.samples), frontend.max_samples) / frontend.sampling_rate
        yield Result(name, predictions, used, sound.duration)


def logits(params: Any, spec: Any, config: ASTConfig, *, dtype: Any = None) -> jax.Array:
    """Compute logits [B, C] of spectrograms [B, T, F], compiled, in pieces that suit the device.

    On a CPU as many go through the model at once as leave what lies between two layers in the cache.
    """
    piece = len(spec)
    if jax.default_backend() == "cpu":
        most = max(1, CPU_TOKENS // config.num_tokens)
        piece = max(size for size in range(1, min(most, piece) + 1) if piece % size == 0)
    return _logits(params, spec, config, piece, dtype)


@functools.partial(jax.jit, static_argnames=("config", "piece", "dtype"))
def _logits(params: Any, spec: jax.Array, config: ASTConfig, piece: int, dtype: Any) -> jax.Array:
    """Compute logits [B, C], `piece` spectrograms at a time."""
    if piece == len(spec):
        return model.apply(params, spec, config, dtype=dtype)
    pieces = spec.reshape(-1, piece, *spec.shape[1:])
    in_pieces = jax.lax.map(lambda some: model.apply(params, some, config, dtype=dtype), pieces)
    return in_pieces.reshape(len(spec), -1)


@functools.partial(jax.jit, static_argnames="config")
def _scores(outputs: jax.Array, config: ASTConfig) -> jax.Array:
    """Return scores [B, C] in the sense of the model's problem type."""
    kind = config.resolved_problem_type
    if kind == "multi_label_classification":
        return jax.nn.sigmoid(outputs)
    return jax.nn.softmax(outputs) if kind == "single_label_classification" else outputs
