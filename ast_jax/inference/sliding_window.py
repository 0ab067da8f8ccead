"""The inference loop: decode, cut into windows, batch, run on the device, regroup by sound.

    threads: decode ──clips──▶ batches ──▶ device, one batch in flight ──outputs──▶ windows ──▶ a result per sound

`classify`, `analyze` and `embed` are thin layers over `SlidingWindow.run`. Threads decode only the first clips of each
sound, a few batches ahead, and the loop decodes the rest of a long sound when its turn comes, so that memory depends
neither on the number of sounds nor, apart from the outputs, on their length.

Letters: B batch, S samples, T frames, F mel bins, C classes, W windows.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.audio.io import AudioError, describe
from ast_jax.audio.streams import Live, mono_blocks
from ast_jax.audio.windows import clip_starts, cut, window_grid
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.resize import resize
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference.timeline import AGGREGATES
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.runtime.threads import ordered_map

logger = logging.getLogger(__name__)
PADDING = ("zero", "repeat", "mask", "own-length")
BATCH_SIZES = {"cpu": 8}  # default by platform
BATCH_SIZE = 64  # default on other platforms
CPU_TOKENS = 1300  # most tokens per forward pass on a CPU, so that the activations stay in its cache
AHEAD = 3  # batches decoded ahead
FIRST_CLIPS = 4  # clips of a sound that a thread decodes
MAX_OPEN = 16  # partly decoded files that stay open

Running = list[tuple[list[int], jax.Array]]  # positions in a batch, and the outputs of their clips
Forward = Callable[..., jax.Array]  # of (params, spec [B, T, F], config), with the keyword options of `model.apply`


class _HasError(Protocol):
    @property
    def error(self) -> str | None: ...


_Result = TypeVar("_Result", bound=_HasError)


class WindowOptions(TypedDict, total=False):
    """Options of `SlidingWindow` that `classify`, `analyze` and `embed` pass on; see `analyze_each`."""

    window: float | None
    """Seconds per window; by default the model's input length."""
    hop: float | None
    """Seconds between the starts of two windows; by default half a window."""
    padding: str
    """Of clips shorter than the model's input: "zero" (the default), "repeat", "mask" or "own-length"."""
    batch_size: int | None
    """Clips per batch; by default 8 on CPU and 64 elsewhere."""


class WindowOutput(NamedTuple):
    """A window of a sound and the model's output for it.

    Attributes:
        start: seconds.
        end: seconds.
        output: [...], aggregated over its clips if the window is longer than the model's input.
        source: the sound, as given.
    """

    start: float
    end: float
    output: np.ndarray
    source: Any


class SoundOutputs(NamedTuple):
    """All windows of one sound, or why there are none.

    Attributes:
        name: of the sound.
        times: [W, 2] seconds, start and end of each window.
        outputs: [W, ...].
        duration: seconds.
        error: one line, or None; with an error there are no windows.
    """

    name: str
    times: np.ndarray
    outputs: np.ndarray
    duration: float
    error: str | None


class Clip(NamedTuple):
    """Samples that fit into the model's input: a window, or one part of a longer window.

    Attributes:
        start: seconds, of the window.
        end: seconds, of the window.
        samples: [S].
        completes_window: whether this is the window's last clip.
        source: the sound, as given.
    """

    start: float
    end: float
    samples: np.ndarray
    completes_window: bool
    source: Any


class End(NamedTuple):
    """The end of a sound; with an error its clips are not to be used."""

    name: str
    duration: float = 0.0
    error: str | None = None


class SlidingWindow:
    """Runs a model over the windows of many sounds.

    Args:
        checkpoint: the model; dither is switched off.
        forward: called as `model.apply`, with the same keyword options; hashable, as it is a static argument of `jit`.
        aggregate: "mean" or "max", over the clips of a window longer than the model's input.
        window: as in `analyze_each`.
        hop: as in `analyze_each`.
        padding: as in `analyze_each`.
        batch_size: as in `analyze_each`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        forward: Forward,
        *,
        aggregate: str = "mean",
        window: float | None = None,
        hop: float | None = None,
        padding: str = "zero",
        batch_size: int | None = None,
    ):
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
        if padding not in PADDING:
            raise ValueError(f"padding: expected one of {', '.join(PADDING)}, got {padding!r}")
        self.grid = window_grid(checkpoint.frontend, window, hop)
        frontend = checkpoint.frontend.replace(dither=0.0)
        self.checkpoint = checkpoint.replace(frontend=frontend, params=jax.device_put(checkpoint.params))
        self.forward, self.aggregate, self.padding = forward, AGGREGATES[aggregate], padding
        self.batch_size = batch_size or default_batch_size()
        self.models: dict[int, Checkpoint] = {}  # by input length in frames, for "own-length"

    def run(
        self,
        sources: Iterable[Any] | Live,
        sampling_rate: int | None = None,
        on_window: Callable[[WindowOutput], object] | None = None,
    ) -> Iterator[SoundOutputs]:
        """Yield the windows of each sound, in the order of the sounds; an unusable sound yields its error.

        Args:
            sources: paths, encoded bytes, file objects or samples [S]; or one `Live`, each window of which is run as
                soon as it is complete.
            sampling_rate: Hz of samples given as arrays.
            on_window: called with each window as soon as its output is there.
        """
        items: Iterator[Clip | End]
        if isinstance(sources, Live):
            items, batch_size, in_flight = self._clips(sources, None), 1, 0
        else:
            items, batch_size, in_flight = self._read_ahead(sources, sampling_rate), self.batch_size, 1
        outputs: list[np.ndarray] = []  # of the current window's clips
        windows: list[WindowOutput] = []  # of the current sound
        for item, output in self._run_batches(_batches(items, batch_size), in_flight):
            if isinstance(item, Clip):
                outputs.append(output)
                if item.completes_window:
                    combined = outputs[0] if len(outputs) == 1 else self.aggregate(np.stack(outputs))
                    windows.append(WindowOutput(item.start, item.end, combined, item.source))
                    outputs = []
                    if on_window is not None:
                        on_window(windows[-1])
            else:
                yield _regroup(item, windows)
                outputs, windows = [], []

    def _read_ahead(self, sources: Iterable[Any], sampling_rate: int | None) -> Iterator[Clip | End]:
        """Yield the clips and the end of each sound, with the first clips decoded by threads.

        A long file beyond the `MAX_OPEN` that wait is closed, and decoded again from its start when its turn comes.
        """
        slots = threading.Semaphore(MAX_OPEN)

        def decode_first(source: Any) -> tuple[list[Clip | End], Iterator[Clip | End], bool]:
            clips = self._clips(source, sampling_rate)
            first = list(itertools.islice(clips, FIRST_CLIPS))
            is_file = isinstance(source, str | os.PathLike) and os.path.isfile(source)
            if isinstance(first[-1], End) or not is_file:
                return first, clips, False
            if slots.acquire(blocking=False):
                return first, clips, True
            clips.close()
            return [], self._clips(source, sampling_rate), False

        for first, rest, holds_slot in ordered_map(decode_first, sources, ahead=AHEAD * self.batch_size):
            yield from first
            yield from rest
            if holds_slot:
                slots.release()

    def _clips(self, source: Any, sampling_rate: int | None) -> Generator[Clip | End, None, None]:
        """Decode a sound; yield its clips as they are complete, and its end."""
        name, rate, decoded = describe(source), self.checkpoint.frontend.sampling_rate, 0

        def blocks() -> Iterator[np.ndarray]:
            nonlocal decoded
            for block in mono_blocks(source, rate, sampling_rate):
                decoded += len(block)
                yield block

        try:
            for start, samples in cut(blocks(), self.grid):
                times = start / rate, (start + len(samples)) / rate
                starts = clip_starts(len(samples), self.grid.max_samples)
                for begin in starts:
                    clip = samples[begin : begin + self.grid.max_samples]
                    yield Clip(*times, clip, begin == starts[-1], source)
        except (AudioError, FileNotFoundError) as error:
            yield End(name, error=str(error))
        else:
            yield End(name, decoded / rate)

    def _run_batches(self, batches: Iterable[list[Clip | End]], in_flight: int) -> Iterator[tuple[Clip | End, Any]]:
        """Run batches on the device, `in_flight` of them while the next is decoded; yield items with their outputs."""
        running: collections.deque[tuple[list[Clip | End], Running]] = collections.deque()
        for batch in batches:
            running.append((batch, self._dispatch(batch)))
            if len(running) > in_flight:
                yield from _fetch(*running.popleft())
        for batch, outputs in running:
            yield from _fetch(batch, outputs)

    def _dispatch(self, batch: Sequence[Clip | End]) -> Running:
        """Start the device on a batch, once per input length."""
        groups: dict[int, tuple[list[int], list[np.ndarray]]] = {}
        for position, item in enumerate(batch):
            if isinstance(item, Clip):
                positions, clips = groups.setdefault(self._frames(len(item.samples)), ([], []))
                positions.append(position)
                clips.append(item.samples)
        return [(positions, self._start(clips, frames)) for frames, (positions, clips) in groups.items()]

    def _frames(self, num_samples: int) -> int:
        """Return the model's input length for a clip: its own, or for "own-length" the frames of whole patches."""
        config = self.checkpoint.config
        if self.padding != "own-length":
            return config.max_length
        patch, stride = config.patch_shape[1], config.time_stride
        frames = min(fbank.num_frames(num_samples, self.checkpoint.frontend), config.max_length)
        return patch + max(0, frames - patch) // stride * stride

    def _start(self, clips: Sequence[np.ndarray], frames: int) -> jax.Array:
        """Pad clips [S] to the input length and to a power of two of them, so that few shapes are compiled; run them.

        Returns:
            Outputs [B, ...] that the device is still computing; rows beyond the clips are padding.
        """
        if frames not in self.models:
            is_own = frames == self.checkpoint.config.max_length
            self.models[frames] = self.checkpoint if is_own else resize(self.checkpoint, max_length=frames)
            logger.info("compiling the model for %d frames", frames)
        params, config, frontend = self.models[frames]
        size = min(1 << (len(clips) - 1).bit_length(), self.batch_size)
        waveforms, num_samples = np.zeros((size, frontend.max_samples), np.float32), np.zeros(size, np.int32)
        for row, samples in enumerate(clips):
            padded = samples[: frontend.max_samples]
            if self.padding == "repeat":
                padded = np.resize(samples, frontend.max_samples)
            waveforms[row, : len(padded)] = padded
            num_samples[row] = len(padded)
        return forward_batch(
            params, (waveforms, num_samples), config, frontend, forward=self.forward,
            chunk_size=chunk_size(size, config), mask_padding=self.padding == "mask",
            attention_implementation=fastest_implementation(params["layernorm"]["scale"].dtype),
        )  # fmt: skip


def _batches(items: Iterable[Clip | End], size: int) -> Iterator[list[Clip | End]]:
    """Yield lists with `size` clips each, the last with as many as are left, and the ends between them."""
    batch: list[Clip | End] = []
    clips = 0
    for item in items:
        batch.append(item)
        clips += isinstance(item, Clip)
        if clips == size:
            yield batch
            batch, clips = [], 0
    if batch:
        yield batch


def _fetch(batch: Sequence[Clip | End], running: Running) -> Iterator[tuple[Clip | End, Any]]:
    """Wait for the device; yield the items of a batch with their outputs [...], None for ends."""
    outputs: dict[int, np.ndarray] = {}
    for positions, rows in running:
        outputs.update(zip(positions, np.asarray(rows), strict=False))  # further rows are padding
    for position, item in enumerate(batch):
        yield item, outputs.get(position)


def _regroup(end: End, windows: Sequence[WindowOutput]) -> SoundOutputs:
    """Return the result of a sound; outputs that are not finite are an error."""
    error = end.error
    if not error and not all(np.isfinite(window.output).all() for window in windows):
        error = f"{end.name}: the model's output is not finite; the samples or the parameters are too large"
    if error:
        return SoundOutputs(end.name, np.zeros((0, 2)), np.zeros((0, 0), np.float32), 0.0, error)
    times = np.array([[window.start, window.end] for window in windows])
    return SoundOutputs(end.name, times, np.stack([window.output for window in windows]), end.duration, None)


def raise_error(results: Iterable[_Result]) -> list[_Result]:
    """Return results as a list.

    Raises:
        AudioError: the first error among them.
    """
    found = []
    for result in results:
        if result.error:
            raise AudioError(result.error)
        found.append(result)
    return found


def default_batch_size() -> int:
    """Return the clips per batch for this process's devices."""
    return BATCH_SIZES.get(jax.default_backend(), BATCH_SIZE)


def chunk_size(batch_size: int, config: ASTConfig) -> int:
    """Return how many clips of a batch `forward_batch` runs at once: all; on a CPU those that fit into its cache."""
    if jax.default_backend() != "cpu":
        return batch_size
    most = max(1, CPU_TOKENS // config.num_tokens)
    return max(size for size in range(1, min(most, batch_size) + 1) if batch_size % size == 0)


@functools.partial(
    jax.jit,
    static_argnames=(
        "config", "frontend", "forward", "chunk_size", "mask_padding", "dtype", "attention_implementation",
    ),
)  # fmt: skip
def forward_batch(
    params: Any,
    inputs: tuple[jax.Array, ...],
    config: ASTConfig,
    frontend: FrontendConfig | None = None,
    *,
    forward: Forward = model.apply,
    chunk_size: int,
    mask_padding: bool = False,
    dtype: Any = None,
    attention_implementation: str = "auto",
) -> jax.Array:
    """Compute outputs [B, ...] of a batch, features included.

    Args:
        params: the parameter tree.
        inputs: waveforms [B, S] and valid samples [B]; without a frontend, spectrograms [B, T, F] alone.
        config: the architecture.
        frontend: settings of the features.
        forward: as `model.apply`.
        chunk_size: clips per forward pass, a divisor of B.
        mask_padding: mask the tokens that do not lie wholly within a waveform.
        dtype: as in `apply`.
        attention_implementation: as in `apply`.
    """

    def one_chunk(inputs: tuple[jax.Array, ...]) -> jax.Array:
        spec, lengths = inputs[0], None
        if frontend is not None:
            waveforms, num_samples = inputs
            spec = normalize(padded_log_mel(waveforms, num_samples, frontend), frontend)  # [B, T, F]
            if mask_padding:  # at least one column of patches stays, or nothing would
                lengths = jnp.clip(fbank.num_frames(num_samples, frontend), config.patch_shape[1], config.max_length)
        return forward(
            params, spec, config, lengths=lengths, dtype=dtype, attention_implementation=attention_implementation
        )

    batch_size = len(inputs[0])
    if chunk_size == batch_size:
        return one_chunk(inputs)
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk_size, *x.shape[1:]), inputs)  # [B / chunk, chunk, ...]
    outputs = jax.lax.map(one_chunk, chunks)
    return outputs.reshape(batch_size, *outputs.shape[2:])  # [B, ...]
