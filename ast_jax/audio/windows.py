"""Long sounds in windows: where they begin, and their samples as a stream brings them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ast_jax.config import FrontendConfig


class Window(NamedTuple):
    """A part of a sound.

    Attributes:
        start: of the first sample, counted from the sound's beginning.
        samples: [S].
    """

    start: int
    samples: np.ndarray


class Grid(NamedTuple):
    """How sounds are cut into windows, in samples at the model's rate.

    Attributes:
        length: of a window.
        hop: from the beginning of a window to that of the next.
        longest: that the model hears at once; a window that is longer is heard in several pieces.
        least: what a last window must have that the ones before it have not.
    """

    length: int
    hop: int
    longest: int
    least: int


def window_grid(frontend: FrontendConfig, window: float | None = None, hop: float | None = None) -> Grid:
    """Return the grid of windows of some seconds.

    Args:
        frontend: of the model.
        window: seconds; None for the model's input.
        hop: seconds; None for half a window.

    Raises:
        ValueError: a window that is shorter than a frame, or a hop of nothing or beyond the window, so that something
            would not be heard.
    """
    rate, longest = frontend.sampling_rate, frontend.max_samples
    length = longest if window is None else _samples("window", window, rate)
    near = rate // 50  # what rounds to the model's input is that: 2.58 s for 2.575, 10.24 for 10.255
    if abs(length - longest) <= near:
        length = longest
    if length < frontend.window_samples:  # Kaldi's frame
        raise ValueError(f"window: expected {frontend.frame_length:g} ms or more, got {1000 * length / rate:g} ms")
    step = max(1, length // 2) if hop is None else _samples("hop", hop, rate)
    if length == longest and abs(step - length) <= near:
        step = length
    if not 0 < step <= length:
        raise ValueError(
            f"hop: expected more than 0 s and at most the window's {length / rate:g} s, or something would not be "
            f"heard, got {step / rate:g} s"
        )
    return Grid(length, step, longest, frontend.shift_samples)


def _samples(name: str, seconds: float, rate: int) -> int:
    """Return seconds in samples."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name}: expected a positive number of seconds, got {seconds!r}")
    return round(seconds * rate)


def cut(blocks: Iterable[np.ndarray], grid: Grid) -> Iterator[Window]:
    """Yield the windows of a sound as soon as their last sample is there.

    The last window ends where the sound ends, so that it is as long as the others; a rest that makes no frame of its
    own has no window. A sound that is shorter than a window is one window.

    Args:
        blocks: of the sound's samples.
        grid: of the windows.
    """
    start, held = 0, np.zeros(0, np.float32)
    before = None  # the window before
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= grid.length:
            before = Window(start, held[: grid.length])
            yield before
            held = held[grid.hop :]
            start += grid.hop
    if before is None:
        yield Window(0, held)
        return
    new = held[grid.length - grid.hop :]
    if len(new) >= grid.least:
        yield Window(before.start + len(new), np.concatenate([before.samples, new])[len(new) :])


def piece_starts(length: int, longest: int) -> list[int]:
    """Return where the pieces of a window begin, which cover it evenly, none of them longer than `longest`."""
    count = math.ceil(length / longest)
    return [round(index * (length - longest) / (count - 1)) for index in range(count)] if count > 1 else [0]
