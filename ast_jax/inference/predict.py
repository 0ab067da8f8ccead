"""`classify` and `analyze`: sounds to labels, and to the scores of their windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack, overload

import jax

from ast_jax.audio.streams import Audio, Live
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.config import ASTConfig
from ast_jax.inference.sliding_window import SlidingWindow, WindowOptions, WindowOutput, raise_error
from ast_jax.inference.timeline import Analysis
from ast_jax.model import functional as model
from ast_jax.model.scores import scores

DEFAULT_MODEL = "sounds-tiny"


class AnalyzeOptions(WindowOptions, total=False):
    """Options of `analyze_each` that `classify` and `analyze` pass on."""

    aggregate: str
    """"mean" (the default) or "max" over the scores of windows."""


@overload
def classify(
    audio: list[Any] | tuple[Any, ...],
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    top_k: int = ...,
    **options: Unpack[AnalyzeOptions],
) -> list[list[tuple[str, float]]]: ...


@overload
def classify(
    audio: Audio,
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    top_k: int = ...,
    **options: Unpack[AnalyzeOptions],
) -> list[tuple[str, float]]: ...


def classify(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    top_k: int = 5,
    **options: Unpack[AnalyzeOptions],
) -> Any:
    """Return the best labels of a sound, or of each of a list of sounds.

    Args:
        audio: path, encoded bytes, file object, or samples [S] (with `sampling_rate`); or a list of any of these.
        checkpoint: a loaded checkpoint, or the argument of `load`.
        sampling_rate: Hz of samples given as arrays; they are resampled to the model's rate.
        top_k: number of labels, at most as many as the model has.
        **options: `window`, `hop`, `padding`, `batch_size` and `aggregate` of `analyze_each`.

    Returns:
        [(label, score), ...], the highest score first; a list of these for a list. Scores are probabilities: sigmoid
        for multi-label models, softmax for single-label ones; for regression they are the model's outputs. The scores
        of a sound longer than the model's input are the mean over its windows.

    Raises:
        AudioError: an unusable sound (see `read_audio`).
        ValueError: samples without a rate, `top_k` below 1, or as `analyze_each`.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    found = analyze(audio, checkpoint, sampling_rate=sampling_rate, **options)
    return [each.best(top_k) for each in found] if isinstance(found, list) else found.best(top_k)


@overload
def analyze(
    audio: list[Any] | tuple[Any, ...],
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    **options: Unpack[AnalyzeOptions],
) -> list[Analysis]: ...


@overload
def analyze(
    audio: Audio,
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    **options: Unpack[AnalyzeOptions],
) -> Analysis: ...


def analyze(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    **options: Unpack[AnalyzeOptions],
) -> Any:
    """Score all windows of a sound, or of each of a list of sounds.

    Args:
        audio: as in `classify`.
        checkpoint: as in `classify`.
        sampling_rate: as in `classify`.
        **options: `window`, `hop`, `padding`, `batch_size` and `aggregate` of `analyze_each`.

    Returns:
        An `Analysis`, or a list of them for a list: scores of each window and of the whole sound, and a timeline.

    Raises:
        AudioError: an unusable sound (see `read_audio`).
        ValueError: as `analyze_each`.
    """
    several = isinstance(audio, list | tuple)
    sources = audio if several else [audio]
    results = raise_error(analyze_each(sources, checkpoint, sampling_rate=sampling_rate, **options))
    return results if several else results[0]


def analyze_each(
    sources: Iterable[Any] | Live,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    window: float | None = None,
    hop: float | None = None,
    padding: str = "zero",
    batch_size: int | None = None,
    aggregate: str = "mean",
    on_window: Callable[[WindowOutput], object] | None = None,
) -> Iterator[Analysis]:
    """Yield an `Analysis` for every sound, in order; an unusable sound yields its error, and the others follow.

    Threads decode some batches ahead while the device computes. Memory is constant apart from the scores, whatever the
    number and length of the sounds.

    Args:
        sources: each as `audio` of `classify`; or one `Live`.
        checkpoint: as in `classify`.
        sampling_rate: as in `classify`.
        window: seconds per window; None for the model's input length. A longer window is run in several clips.
        hop: seconds between the starts of two windows; None for half a window.
        padding: of clips shorter than the model's input: "zero" pads with silence as the original does; "repeat" with
            copies of the clip; "mask" also masks the padding in the attention of every layer; "own-length" runs the
            model at the clip's length, with position embeddings cropped as `resize` does.
        batch_size: clips per batch; None for 8 on CPU and 64 elsewhere. The last batch is padded to a power of two, so
            that few shapes are compiled.
        aggregate: "mean" or "max" over the scores of windows (and of a window's clips).
        on_window: called with each window as soon as it is scored; its `output` holds the scores [C].

    Raises:
        ValueError: an option out of its range, or a model without a classifier.
    """
    checkpoint = loaded(checkpoint)
    check_classifier(checkpoint)
    windows = SlidingWindow(
        checkpoint, _scores, aggregate=aggregate, window=window, hop=hop, padding=padding, batch_size=batch_size
    )
    for found in windows.run(sources, sampling_rate, on_window):
        if found.error:
            yield Analysis(found.name, error=found.error)
        else:
            labels = checkpoint.config.labels
            yield Analysis(found.name, labels, found.times, found.outputs, found.duration, aggregate)


def check_classifier(checkpoint: Checkpoint) -> None:
    """Refuse a headless model.

    Raises:
        ValueError: the checkpoint has no classifier.
    """
    if "classifier" not in checkpoint.params:
        raise ValueError("the model has no classifier; fine-tune it first (`ast-jax finetune --init`)")


def _scores(params: Any, spec: jax.Array, config: ASTConfig, **options: Any) -> jax.Array:
    """Return the scores [B, C] of spectrograms [B, T, F]."""
    return scores(model.apply(params, spec, config, **options), config)
