"""Sounds to what a model makes of their windows: threads decode, the device takes batches, results come in order.

`listen` is what `classify` and `embed` stand on. Threads read the beginnings of sounds, some batches ahead; the rest of
a long one is read as it is needed, so that memory grows neither with the number of sounds nor with their length.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ast_jax.audio.io import AudioError, describe, header_seconds
from ast_jax.audio.streams import Live, mono_blocks
from ast_jax.audio.windows import Grid, cut, piece_starts
from ast_jax.runtime.progress import step
from ast_jax.runtime.threads import ordered_map

AHEAD = 3  # batches that are read before the first of them is out
FIRST = 4  # pieces of a sound that a thread reads
OPEN = 16  # files with more than that which wait, open, for the rest to be read

Outputs = Callable[[], Sequence[np.ndarray]]
Start = Callable[[Sequence[np.ndarray]], Outputs]
Combine = Callable[[np.ndarray], Any]


class Part(NamedTuple):
    """A window of a sound, and what the model makes of it.

    Attributes:
        start: seconds.
        end: seconds.
        output: [...] of the window; of one that is heard in several pieces what `combine` made of theirs.
        source: what it is a window of.
    """

    start: float
    end: float
    output: np.ndarray
    source: Any


class End(NamedTuple):
    """The end of a sound.

    Attributes:
        name: the sound's.
        duration: seconds.
        error: one line, or None; then the parts before are not to be used.
    """

    name: str
    duration: float = 0.0
    error: str | None = None


class _Piece(NamedTuple):
    """As much of a window as goes through the model at once."""

    start: float
    end: float
    samples: np.ndarray
    last: bool
    source: Any


def listen(
    sources: Iterable[Any] | Live,
    start: Start,
    grid: Grid,
    rate: int,
    *,
    batch_size: int,
    combine: Combine,
    array_rate: int | None = None,
) -> Iterator[Part | End]:
    """Yield the windows of every sound in order, and its end after them.

    A sound that cannot be used ends with its error, and the others go on.

    Args:
        sources: paths, bytes, file objects, samples [S], or one `Live`, whose windows come as they are complete.
        start: starts the model on pieces [P] of [S]; what it returns waits for their outputs [P, ...].
        grid: how sounds are cut.
        rate: Hz of the model's input.
        batch_size: pieces that go through the model together.
        combine: outputs [P, ...] of a window's pieces to one.
        array_rate: Hz of samples given as arrays.
    """
    live = isinstance(sources, Live)
    items: Iterator[_Piece | End]
    if isinstance(sources, Live):
        items, batch_size = _pieces(sources, grid, rate, None), 1
    else:
        items = _read_ahead(sources, grid, rate, array_rate, AHEAD * batch_size)
    told: list[np.ndarray] = []  # outputs of the window's pieces so far
    running: collections.deque[tuple[list[_Piece | End], Outputs]] = collections.deque()
    for batch in _batched(items, batch_size):
        running.append((batch, start([item.samples for item in batch if isinstance(item, _Piece)])))
        if live or len(running) > 1:  # one is at work, and the next is there when it is done
            yield from _events(*running.popleft(), told, combine)
    for batch, outputs in running:
        yield from _events(batch, outputs, told, combine)


def by_sound(events: Iterable[Part | End], bar: bool = True) -> Iterator[tuple[End, list[Part]]]:
    """Yield the end of each sound with all of its windows; one whose outputs are not finite ends with that error.

    Args:
        events: of `listen`.
        bar: draw a progress bar for each long file.
    """
    parts: list[Part] = []
    for event in _with_bar(events) if bar else events:
        if isinstance(event, Part):
            parts.append(event)
            continue
        if not event.error and not all(np.isfinite(part.output).all() for part in parts):
            reason = "what comes out is not finite; the values of the sound or of the model are too large"
            event = event._replace(error=f"{event.name}: {reason}")
        yield event, parts
        parts = []


def _with_bar(events: Iterable[Part | End]) -> Iterator[Part | End]:
    """Yield events, with a progress bar over the seconds of each file of several windows until its end comes."""
    events = iter(events)
    for event in events:
        total = _seconds(event) if isinstance(event, Part) else None
        if isinstance(event, Part) and total is not None and event.end < total:
            scored = 0.0
            with step("seconds", total) as advance:
                while isinstance(event, Part):
                    advance(event.end - scored)
                    scored = event.end
                    yield event
                    event = next(events)  # after its windows comes the end of a sound
        yield event


def _seconds(part: Part) -> float | None:
    """Return the duration in the header of the file that this is a window of; None where it is no file."""
    if not isinstance(part.source, str | os.PathLike) or not os.path.isfile(part.source):
        return None
    with contextlib.suppress(OSError, ValueError):
        return header_seconds(part.source)
    return None


def one_or_all(audio: Any, each: Callable[[Sequence[Any]], Iterable[Any]]) -> Any:
    """Return the result of a sound, or a list of them for a list.

    Raises:
        AudioError: of the first sound that cannot be used.
    """
    several = isinstance(audio, list | tuple)
    found = []
    for result in each(audio if several else [audio]):
        if result.error:
            raise AudioError(result.error)
        found.append(result)
    return found if several else found[0]


def _read_ahead(
    sources: Iterable[Any], grid: Grid, rate: int, array_rate: int | None, ahead: int
) -> Iterator[_Piece | End]:
    """Yield the pieces of all sounds, the first of which are read by threads.

    A long file beyond the `OPEN` that wait already is closed, and read from its beginning when its turn comes.
    """
    places = threading.Semaphore(OPEN)

    def begin(source: Any) -> tuple[list[_Piece | End], Iterator[_Piece | End], bool]:
        pieces = _pieces(source, grid, rate, array_rate)
        first = list(itertools.islice(pieces, FIRST))
        again = isinstance(source, str | os.PathLike) and os.path.isfile(source)
        if isinstance(first[-1], End) or not again:
            return first, pieces, False
        if places.acquire(blocking=False):
            return first, pieces, True
        pieces.close()
        return [], _pieces(source, grid, rate, array_rate), False

    for first, rest, waits in ordered_map(begin, sources, ahead=ahead):
        yield from first
        yield from rest
        if waits:
            places.release()


def _pieces(source: Any, grid: Grid, rate: int, array_rate: int | None) -> Generator[_Piece | End, None, None]:
    """Yield the pieces of a sound as it is read, and its end."""
    name, read = describe(source), 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal read
        for block in mono_blocks(source, rate, array_rate):
            read += len(block)
            yield block

    try:
        for start, samples in cut(counted(), grid):
            begins = piece_starts(len(samples), grid.longest)
            for begin in begins:
                piece = samples[begin : begin + grid.longest]
                end = (start + len(samples)) / rate
                yield _Piece(start / rate, end, piece, begin == begins[-1], source)
    except (AudioError, FileNotFoundError) as error:
        yield End(name, error=str(error))
    else:
        yield End(name, read / rate)


def _batched(items: Iterable[_Piece | End], size: int) -> Iterator[list[_Piece | End]]:
    """Yield the items in lists with a number of pieces, of which the last may have fewer."""
    batch: list[_Piece | End] = []
    count = 0
    for item in items:
        batch.append(item)
        count += isinstance(item, _Piece)
        if count == size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _events(
    batch: list[_Piece | End],
    outputs: Outputs,
    told: list[np.ndarray],
    combine: Combine,
) -> Iterator[Part | End]:
    """Yield the windows and ends of a batch; `told` keeps what belongs to a window that is not complete."""
    rows = iter(outputs())
    for item in batch:
        if isinstance(item, End):
            told.clear()
            yield item
            continue
        told.append(next(rows))
        if item.last:
            output = told[0] if len(told) == 1 else combine(np.stack(told))
            yield Part(item.start, item.end, output, item.source)
            told.clear()
