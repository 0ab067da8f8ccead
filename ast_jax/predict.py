"""Sounds to labels: threads decode, the device computes features and scores of a batch, the best come first."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from . import model
from .attention import fastest_implementation
from .audio import RESAMPLER_REACH, AudioError, Sound, decode, describe, to_mono
from .checkpoint import Checkpoint, load
from .config import ASTConfig, FrontendConfig
from .features import normalize, padded_log_mel
from .threads import in_order

DEFAULT_MODEL = "sounds-tiny"
BATCH_SIZES = {"cpu": 8}  # by platform
BATCH_SIZE = 64  # elsewhere
AHEAD = 3  # batches that are read before the first of them is out
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
    batch_size: int | None = None,
) -> Iterator[Result]:
    """Yield a `Result` for every source in order; one that cannot be used yields its error and the others go on.

    Threads decode while the device is at work, some batches ahead, so that memory does not grow with the number of
    sources. What is left for the last batch is filled up to a power of two, so that few shapes are compiled.

    Args:
        sources: as `audio` of `classify`.
        checkpoint: the model.
        sampling_rate: as in `classify`.
        top_k: as in `classify`.
        batch_size: sounds that go through the model together; None for what suits the device.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    if "classifier" not in checkpoint.params:
        raise ValueError("the model has no classifier and can name nothing; fine-tune it (`ast-jax finetune --init`)")
    batch_size = batch_size or BATCH_SIZES.get(jax.default_backend(), BATCH_SIZE)
    params = jax.device_put(checkpoint.params)
    hear = functools.partial(_hear, frontend=checkpoint.frontend, sampling_rate=sampling_rate)
    heard = in_order(hear, sources, ahead=AHEAD * batch_size)
    running: collections.deque[tuple[tuple[Heard, ...], jax.Array | None]] = collections.deque()
    for batch in _batched(heard, batch_size):
        running.append((batch, _start(batch, batch_size, params, checkpoint)))
        if len(running) > 1:  # one is at work, and the next is there when it is done
            yield from _results(*running.popleft(), checkpoint.config, top_k)
    for batch, scores in running:
        yield from _results(batch, scores, checkpoint.config, top_k)


class Heard(NamedTuple):
    """A source as the model takes it, or what is wrong with it.

    Attributes:
        name: the source's.
        samples: [S], as many as the model hears; None where there is an error.
        used: seconds that they are.
        duration: seconds of the whole sound.
        error: one line, or None.
    """

    name: str
    samples: np.ndarray | None = None
    used: float = 0.0
    duration: float = 0.0
    error: str | None = None


def _batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield the items in tuples of a size, of which the last may be shorter."""
    items = iter(items)
    while batch := tuple(itertools.islice(items, size)):
        yield batch


def _hear(source: Any, frontend: FrontendConfig, sampling_rate: int | None) -> Heard:
    """Decode as much of a source as the model hears."""
    name, sound = _read(source, frontend, sampling_rate)
    if isinstance(sound, str):
        return Heard(name, error=sound)
    samples = sound.samples[: frontend.max_samples]  # the result says what was cut
    return Heard(name, samples, len(samples) / frontend.sampling_rate, sound.duration)


def _read(source: Any, frontend: FrontendConfig, sampling_rate: int | None) -> tuple[str, Sound | str]:
    """Return a source's name, and its sound or what is wrong with it."""
    name = describe(source)
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


def _start(batch: tuple[Heard, ...], batch_size: int, params: Any, checkpoint: Checkpoint) -> jax.Array | None:
    """Start computing the scores of what was heard; None where that is nothing."""
    sounds = [heard.samples for heard in batch if heard.samples is not None]
    if not sounds:
        return None
    config, frontend = checkpoint.config, checkpoint.frontend.replace(dither=0.0)  # dither is for training
    size = min(1 << (len(sounds) - 1).bit_length(), batch_size)
    waveforms, num_samples = np.zeros((size, frontend.max_samples), np.float32), np.zeros(size, np.int32)
    for row, samples in enumerate(sounds):
        waveforms[row, : len(samples)] = samples
        num_samples[row] = len(samples)
    return _scores(logits_of_waveforms(params, waveforms, num_samples, config, frontend), config)


def _results(batch: tuple[Heard, ...], scores: jax.Array | None, config: ASTConfig, top_k: int) -> Iterator[Result]:
    """Yield the results of a batch in order."""
    rows = iter(() if scores is None else np.asarray(scores))
    for heard in batch:
        if heard.error:
            yield Result(heard.name, [], error=heard.error)
            continue
        row = next(rows)
        if not np.isfinite(row).all():
            reason = "the scores are not finite; the values of the sound or of the model are too large"
            yield Result(heard.name, [], error=f"{heard.name}: {reason}")
            continue
        best = np.argsort(-row, kind="stable")[:top_k]
        predictions = [(config.labels[label], float(row[label])) for label in best]
        yield Result(heard.name, predictions, heard.used, heard.duration)


def logits(params: Any, spec: Any, config: ASTConfig, *, dtype: Any = None) -> jax.Array:
    """Compute logits [B, C] of spectrograms [B, T, F], compiled, in pieces that suit the device.

    On a CPU as many go through the model at once as leave what lies between two layers in the cache.
    """
    return _logits(params, (spec,), config, None, _piece(len(spec), config), dtype, _attention(params, dtype))


def logits_of_waveforms(
    params: Any, waveforms: Any, num_samples: Any, config: ASTConfig, frontend: FrontendConfig, *, dtype: Any = None
) -> jax.Array:
    """Compute logits [B, C] of waveforms [B, S], features included, as `logits`; see `features.padded_log_mel`."""
    inputs, piece = (waveforms, num_samples), _piece(len(waveforms), config)
    return _logits(params, inputs, config, frontend, piece, dtype, _attention(params, dtype))


def _piece(batch: int, config: ASTConfig) -> int:
    """Return how many of a batch go through the model at once."""
    if jax.default_backend() != "cpu":
        return batch
    most = max(1, CPU_TOKENS // config.num_tokens)
    return max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)


def _attention(params: Any, dtype: Any) -> str:
    """Return the attention for this process's devices, where they compute in `dtype`, or the parameters' own."""
    return fastest_implementation(params["layernorm"]["scale"].dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames=("config", "frontend", "piece", "dtype", "attention"))
def _logits(
    params: Any,
    inputs: tuple[jax.Array, ...],
    config: ASTConfig,
    frontend: FrontendConfig | None,
    piece: int,
    dtype: Any,
    attention: str,
) -> jax.Array:
    """Compute logits [B, C], `piece` spectrograms (or, with a frontend, waveforms and their samples) at a time."""

    def some(inputs: tuple[jax.Array, ...]) -> jax.Array:
        spec = inputs[0] if frontend is None else normalize(padded_log_mel(*inputs, frontend), frontend)
        return model.apply(params, spec, config, dtype=dtype, attention_implementation=attention)

    if piece == len(inputs[0]):
        return some(inputs)
    pieces = jax.tree.map(lambda x: x.reshape(-1, piece, *x.shape[1:]), inputs)
    return jax.lax.map(some, pieces).reshape(len(inputs[0]), -1)


@functools.partial(jax.jit, static_argnames="config")
def _scores(outputs: jax.Array, config: ASTConfig) -> jax.Array:
    """Return scores [B, C] in the sense of the model's problem type."""
    kind = config.resolved_problem_type
    if kind == "multi_label_classification":
        return jax.nn.sigmoid(outputs)
    return jax.nn.softmax(outputs) if kind == "single_label_classification" else outputs
