"""Sounds to labels: windows of sounds through the model, in batches and pieces that suit the device."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.audio.streams import Live
from ast_jax.audio.windows import window_grid
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.checkpoints.resize import resize
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference.sliding_window import End, Part, by_sound, listen, one_or_all
from ast_jax.inference.timeline import AGGREGATES, Analysis
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.model.scores import scores

logger = logging.getLogger(__name__)
DEFAULT_MODEL = "sounds-tiny"
BATCH_SIZES = {"cpu": 8}  # by platform
BATCH_SIZE = 64  # elsewhere
CPU_TOKENS = 1300  # that go through the model together
PADDING = ("zero", "repeat", "mask", "own-length")


def classify(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    top_k: int = 5,
    **options: Any,
) -> Any:
    """Name what is in a sound, or in each of a list of sounds.

    Args:
        audio: path, encoded bytes, file object, or samples [S] (with `sampling_rate`); or a list of any of these.
        checkpoint: a loaded checkpoint, or what `load` takes.
        sampling_rate: Hz of samples given as arrays, which are resampled where the model wants another rate.
        top_k: how many labels, at most as many as the model has.
        **options: `window`, `hop`, `aggregate`, `padding`, `batch_size` of `analyze_each`.

    Returns:
        [(label, score), ...], the best first; a list of these for a list. Scores are probabilities: of each label for
        itself for a multi-label model (sigmoid), over all labels for a single-label one (softmax); for regression the
        outputs themselves. Of a sound that is longer than the model's input they are the mean of all windows'.

    Raises:
        AudioError: a sound that cannot be used (see `read_audio`).
        ValueError: samples without a rate, `top_k` below 1, or as `analyze_each`.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k!r}")
    found = analyze(audio, checkpoint, sampling_rate=sampling_rate, **options)
    return [each.best(top_k) for each in found] if isinstance(found, list) else found.best(top_k)


def analyze(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    **options: Any,
) -> Any:
    """Say what is heard when in a sound, or in each of a list of sounds.

    Args:
        audio: as in `classify`.
        checkpoint: as in `classify`.
        sampling_rate: as in `classify`.
        **options: `window`, `hop`, `aggregate`, `padding` and `batch_size` of `analyze_each`.

    Returns:
        An `Analysis`, or a list of them for a list: scores of all windows, of the whole, and a timeline.

    Raises:
        AudioError: a sound that cannot be used (see `read_audio`).
        ValueError: as `analyze_each`.
    """
    return one_or_all(audio, lambda sounds: analyze_each(sounds, checkpoint, sampling_rate=sampling_rate, **options))


def analyze_each(
    sources: Iterable[Any] | Live,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    window: float | None = None,
    hop: float | None = None,
    aggregate: str = "mean",
    padding: str = "zero",
    batch_size: int | None = None,
    tell: Callable[[Part], None] = lambda part: None,
) -> Iterator[Analysis]:
    """Yield an `Analysis` for every source in order; one that cannot be used yields its error and the others go on.

    Threads decode while the device is at work, some batches ahead, so that memory does not grow with the number of
    sources, nor with their length but for the scores. What is left for the last batch is filled up to a power of two,
    so that few shapes are compiled.

    Args:
        sources: as `audio` of `classify`, or one `Live`.
        checkpoint: as in `classify`.
        sampling_rate: as in `classify`.
        window: seconds that are scored together; None for the model's input. A longer window is heard in pieces of the
            model's input.
        hop: seconds from one window to the next; None for half a window.
        aggregate: "mean" or "max", how the scores of windows (and of a window's pieces) become one.
        padding: what a window that is shorter than the model's input is filled with: "zero" as the original does,
            "repeat" with itself; "mask" leaves the rest out in every layer; "own-length" runs the model at the window's
            length, with position embeddings cut as `resize` cuts them.
        batch_size: windows that go through the model together; None for what suits the device.
        tell: called with each window's `Part` as soon as it is there; its `output` are the scores [C].

    Raises:
        ValueError: an option out of its range, or a model without a classifier.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    checkpoint = loaded(checkpoint)
    check_classifier(checkpoint)
    grid = window_grid(checkpoint.frontend, window, hop)
    batch_size = batch_size or default_batch_size()
    events = listen(
        sources, Runner(checkpoint, _scores_of, padding, batch_size), grid, checkpoint.frontend.sampling_rate,
        batch_size=batch_size, combine=AGGREGATES[aggregate], array_rate=sampling_rate,
    )  # fmt: skip
    for end, parts in by_sound(_told(events, tell), bar=not isinstance(sources, Live)):
        if end.error:
            yield Analysis(end.name, error=end.error)
        else:
            times = np.array([[part.start, part.end] for part in parts])
            outputs = np.stack([part.output for part in parts])
            yield Analysis(end.name, checkpoint.config.labels, times, outputs, end.duration, aggregate)


def _told(events: Iterable[Part | End], tell: Callable[[Part], None]) -> Iterator[Part | End]:
    """Yield events, and tell the windows among them."""
    for event in events:
        if isinstance(event, Part):
            tell(event)
        yield event


def check_classifier(checkpoint: Checkpoint) -> None:
    """Refuse a model that has none.

    Raises:
        ValueError: so it is.
    """
    if "classifier" not in checkpoint.params:
        raise ValueError("the model has no classifier and can name nothing; fine-tune it (`ast-jax finetune --init`)")


def default_batch_size() -> int:
    """Return how many windows go through the model together on this process's devices."""
    return BATCH_SIZES.get(jax.default_backend(), BATCH_SIZE)


Output = Callable[..., Any]  # of params, spec [B, T, F], config, and `lengths`, `dtype`, `attention_implementation`


class Runner:
    """Runs sounds that the model hears at once through it, filled up to its input.

    Args:
        checkpoint: the model.
        output: a function as `model.apply`, which tells what comes out.
        padding: one of `PADDING`, see `analyze_each`.
        batch_size: the most that come at once.

    Raises:
        ValueError: another padding, or "own-length" for a model whose positions cannot be cut.
    """

    def __init__(self, checkpoint: Checkpoint, output: Output, padding: str, batch_size: int):
        if padding not in PADDING:
            raise ValueError(f"padding: expected one of {', '.join(PADDING)}, got {padding!r}")
        frontend = checkpoint.frontend.replace(dither=0.0)  # dither is for training
        self.checkpoint = checkpoint.replace(frontend=frontend, params=jax.device_put(checkpoint.params))
        self.output, self.padding, self.batch_size = output, padding, batch_size
        self.lengths: dict[int, Checkpoint] = {}  # the model at other lengths

    def __call__(self, sounds: Sequence[np.ndarray]) -> Callable[[], Sequence[np.ndarray]]:
        """Start the model on sounds [B] of [S]; what is returned waits for the outputs [B, ...]."""
        groups: dict[int, list[int]] = {}
        for index, samples in enumerate(sounds):
            groups.setdefault(self._frames(len(samples)), []).append(index)
        running = {frames: self._start([sounds[index] for index in found], frames) for frames, found in groups.items()}

        def outputs() -> Sequence[np.ndarray]:
            rows: list[Any] = [None] * len(sounds)
            for frames, found in groups.items():
                for index, row in zip(found, np.asarray(running[frames]), strict=False):  # the rest is filling
                    rows[index] = row
            return rows  # of other lengths where the output tells of each patch

        return outputs

    def _frames(self, samples: int) -> int:
        """Return the frames of the model that hears so many samples: its own, or as many as hold whole patches."""
        config = self.checkpoint.config
        if self.padding != "own-length":
            return config.max_length
        patch, stride = config.patch_shape[1], config.time_stride
        frames = min(fbank.num_frames(samples, self.checkpoint.frontend), config.max_length)
        return patch + max(0, frames - patch) // stride * stride

    def _start(self, sounds: Sequence[np.ndarray], frames: int) -> jax.Array:
        """Start the model of a length on sounds; the outputs have rows for the filling too."""
        if frames not in self.lengths:
            own = frames == self.checkpoint.config.max_length
            logger.info("the model is compiled for %d frames", frames)
            self.lengths[frames] = self.checkpoint if own else resize(self.checkpoint, max_length=frames)
        params, config, frontend = self.lengths[frames]
        size = min(1 << (len(sounds) - 1).bit_length(), self.batch_size)
        waveforms, num_samples = np.zeros((size, frontend.max_samples), np.float32), np.zeros(size, np.int32)
        for row, samples in enumerate(sounds):
            filled = samples[: frontend.max_samples]
            if self.padding == "repeat":
                filled = np.resize(samples, frontend.max_samples)
            waveforms[row, : len(filled)] = filled
            num_samples[row] = len(filled)
        inputs = (waveforms, num_samples)
        piece, masked = _piece(size, config), self.padding == "mask"
        return _run(params, inputs, config, frontend, piece, None, _attention(params, None), self.output, masked)


def logits(params: Any, spec: Any, config: ASTConfig, *, dtype: Any = None) -> jax.Array:
    """Compute logits [B, C] of spectrograms [B, T, F], compiled, in pieces that suit the device.

    On a CPU as many go through the model at once as leave what lies between two layers in the cache.
    """
    return _run(
        params, (spec,), config, None, _piece(len(spec), config), dtype, _attention(params, dtype), model.apply, False
    )


def logits_of_waveforms(
    params: Any, waveforms: Any, num_samples: Any, config: ASTConfig, frontend: FrontendConfig, *, dtype: Any = None
) -> jax.Array:
    """Compute logits [B, C] of waveforms [B, S], features included, as `logits`; see `features.padded_log_mel`."""
    inputs, piece = (waveforms, num_samples), _piece(len(waveforms), config)
    return _run(params, inputs, config, frontend, piece, dtype, _attention(params, dtype), model.apply, False)


def _piece(batch: int, config: ASTConfig) -> int:
    """Return how many of a batch go through the model at once."""
    if jax.default_backend() != "cpu":
        return batch
    most = max(1, CPU_TOKENS // config.num_tokens)
    return max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)


def _attention(params: Any, dtype: Any) -> str:
    """Return the attention for this process's devices, where they compute in `dtype`, or the parameters' own."""
    return fastest_implementation(params["layernorm"]["scale"].dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames=("config", "frontend", "piece", "dtype", "attention", "output", "masked"))
def _run(
    params: Any,
    inputs: tuple[jax.Array, ...],
    config: ASTConfig,
    frontend: FrontendConfig | None,
    piece: int,
    dtype: Any,
    attention: str,
    output: Output,
    masked: bool,
) -> jax.Array:
    """Compute outputs [B, ...], `piece` at a time, of spectrograms, or with a frontend of waveforms and their samples.

    With `masked`, tokens that do not lie wholly within a waveform are masked.
    """

    def some(inputs: tuple[jax.Array, ...]) -> jax.Array:
        spec, lengths = inputs[0], None
        if frontend is not None:
            waveforms, num_samples = inputs
            spec = normalize(padded_log_mel(waveforms, num_samples, frontend), frontend)
            if masked:  # at least one patch is heard, or there would be nothing
                lengths = jnp.clip(fbank.num_frames(num_samples, frontend), config.patch_shape[1], config.max_length)
        return output(params, spec, config, lengths=lengths, dtype=dtype, attention_implementation=attention)

    if piece == len(inputs[0]):
        return some(inputs)
    pieces = jax.tree.map(lambda x: x.reshape(-1, piece, *x.shape[1:]), inputs)
    found = jax.lax.map(some, pieces)
    return found.reshape(len(inputs[0]), *found.shape[2:])


def _scores_of(params: Any, spec: jax.Array, config: ASTConfig, **options: Any) -> jax.Array:
    """Return the scores [B, C] of spectrograms."""
    return scores(model.apply(params, spec, config, **options), config)
