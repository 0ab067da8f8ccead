"""The grid of sliding windows, and cutting a stream of samples into windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ast_jax.config import FrontendConfig


class Window(NamedTuple):
    """A window of a sound.

    Attributes:
        start: index of its first sample in the sound.
        samples: [S].
    """

    start: int
    samples: np.ndarray


class Grid(NamedTuple):
    """How sounds are cut into windows, in samples at the model's rate.

    Attributes:
        length: of a window.
        hop: between the starts of two windows.
        max_samples: the model's input length; a longer window is run in several clips.
        min_new_samples: minimum new samples in the final window.
    """

    length: int
    hop: int
    max_samples: int
    min_new_samples: int


def window_grid(frontend: FrontendConfig, window: float | None = None, hop: float | None = None) -> Grid:
    """Convert window and hop from seconds to samples.

    Args:
        frontend: of the model.
        window: seconds; None for the model's input length.
        hop: seconds; None for half a window.

    Raises:
        ValueError: a window shorter than a frame, or a hop of 0 or longer than the window, which would skip samples.
    """
    rate, max_samples = frontend.sampling_rate, frontend.max_samples
    length = max_samples if window is None else _samples("window", window, rate)
    tolerance = rate // 50  # a rounded input length counts as the input length: 2.58 s for 2.575, 10.24 for 10.255
    if abs(length - max_samples) <= tolerance:
        length = max_samples
    if length < frontend.window_samples:  # one frame
        raise ValueError(f"window: expected {frontend.frame_length:g} ms or more, got {1000 * length / rate:g} ms")
    step = max(1, length // 2) if hop is None else _samples("hop", hop, rate)
    if length == max_samples and abs(step - length) <= tolerance:
        step = length
    if not 0 < step <= length:
        raise ValueError(
            f"hop: expected more than 0 s and at most the window's {length / rate:g} s, or samples would be skipped, "
            f"got {step / rate:g} s"
        )
    return Grid(length, step, max_samples, frontend.shift_samples)


def _samples(name: str, seconds: float, rate: int) -> int:
    """Convert seconds to samples."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name}: expected a positive number of seconds, got {seconds!r}")
    return round(seconds * rate)


def cut(blocks: Iterable[np.ndarray], grid: Grid) -> Iterator[Window]:
    """Yield the windows of a sound, each as soon as its last sample is there.

    The final window ends with the sound and is as long as the others; a remainder of fewer than `min_new_samples` gets
    no window. A sound shorter than a window is one window.

    Args:
        blocks: the sound's samples, in blocks [S].
        grid: window length and hop.
    """
    start, buffer = 0, np.zeros(0, np.float32)
    previous = None
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) >= grid.length:
            previous = Window(start, buffer[: grid.length])
            yield previous
            buffer = buffer[grid.hop :]
            start += grid.hop
    if previous is None:
        yield Window(0, buffer)
        return
    new = buffer[grid.length - grid.hop :]
    if len(new) >= grid.min_new_samples:
        yield Window(previous.start + len(new), np.concatenate([previous.samples, new])[len(new) :])


def clip_starts(length: int, max_samples: int) -> list[int]:
    """Return the starts of the evenly spaced clips that cover a window, each at most `max_samples` long."""
    count = math.ceil(length / max_samples)
    return [round(index * (length - max_samples) / (count - 1)) for index in range(count)] if count > 1 else [0]
