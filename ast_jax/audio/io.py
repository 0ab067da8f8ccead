"""Decoding files, bytes and file objects to mono float32 samples at a given rate.

libsndfile decodes (WAV, FLAC, OGG, MP3 and more); soxr resamples at its high quality, which is also the default of
`librosa.resample`. soxr is called directly because importing librosa takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

AudioSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
UNKNOWN_FRAMES = 2**36 - 1  # FLAC's largest count; libsndfile returns 2**63 - 1 for a stream without a count
BLOCK = 2**20  # frames per read: memory is allocated for what is there, not for what the header claims
MIN_SECONDS = 0.025  # one frame of the filter bank
RESAMPLER_REACH = 0.05  # seconds read before and after a slice for the resampler's filter, which needs about 10 ms


class AudioError(ValueError):
    """An unusable sound; the message is one line and names the file."""


@dataclasses.dataclass(frozen=True)
class Sound:
    """Decoded sound.

    Attributes:
        samples: [S] mono float32 at `sampling_rate`.
        sampling_rate: Hz.
        duration: seconds of the whole source; `samples` may be a part of it.
    """

    samples: np.ndarray
    sampling_rate: int
    duration: float


def read_audio(source: AudioSource, sampling_rate: int = 16000) -> np.ndarray:
    """Read a whole sound as mono float32 in [-1, 1] at `sampling_rate`: [S].

    Args:
        source: path, encoded bytes (a complete WAV, FLAC, OGG or MP3 file), or a binary file object; pipes are read to
            their end first.
        sampling_rate: Hz of the result; other rates are resampled. Several channels are averaged.

    Raises:
        AudioError: unreadable, empty, shorter than 25 ms, or with NaN or Inf samples (the message counts them).
        FileNotFoundError: no such file.
    """
    return decode(source, sampling_rate).samples


def decode(
    source: AudioSource, sampling_rate: int = 16000, max_seconds: float | None = None, start_seconds: float = 0.0
) -> Sound:
    """Read a sound, or the slice of at most `max_seconds` from `start_seconds` on.

    The slice starts at the sample nearest to `start_seconds`. It equals the slice of the whole sound: exactly at the
    file's own rate, within the resampler's precision at others. Other arguments and errors as in `read_audio`.

    Raises:
        AudioError: also if the sound ends before `start_seconds` or less than 25 ms after it.
    """
    name = describe(source)
    if start_seconds < 0:
        raise AudioError(f"{name}: expected to start at 0 s or later, got {start_seconds:g} s")
    with open_sound(source) as file:
        rate, total = file.samplerate, file.frames if file.seekable() else 0
        beginning, lead = _aligned(start_seconds, rate, sampling_rate)
        skipped = skip(file, beginning)
        wanted = None
        if max_seconds is not None:
            wanted = int(np.ceil((lead / sampling_rate + max_seconds + RESAMPLER_REACH) * rate))
        blocks = list(read_blocks(file, wanted if file.seekable() else None))  # a pipe's length is not known
        samples = np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)
    complete = wanted is None or len(samples) < wanted
    frames = skipped + len(samples)
    if not complete:
        frames = max(total, frames)  # a header's length may be wrong
    if start_seconds:
        check_extent((frames - round(start_seconds * rate)) / rate, name, start_seconds)
    mono = to_mono(samples, rate, sampling_rate, name)[lead:]
    if max_seconds is not None:
        mono = mono[: int(np.ceil(max_seconds * sampling_rate))]
    return Sound(mono, sampling_rate, frames / rate)


def _aligned(start_seconds: float, rate: int, sampling_rate: int) -> tuple[int, int]:
    """Return the frame to read from, and the number of resampled samples between it and `start_seconds`.

    The resampler's filter needs context before the slice. Reading starts at a frame that coincides with a sample of the
    result, so that the slice equals the same samples of the whole resampled sound.
    """
    wanted = round(start_seconds * sampling_rate)
    if rate == sampling_rate:
        return wanted, 0
    step = rate // math.gcd(rate, sampling_rate)
    frame = max(0, math.floor((start_seconds - RESAMPLER_REACH) * rate)) // step * step
    return frame, wanted - frame * sampling_rate // rate


def header_seconds(source: AudioSource) -> float:
    """Return the duration in a sound's header (an estimate for MP3 without a frame count); nothing is decoded.

    Raises:
        AudioError: not a sound file, empty, or shorter than 25 ms.
        FileNotFoundError: no such file.
    """
    name = describe(source)
    with sound_file(_openable(source, name), name) as file:
        seconds = file.frames / file.samplerate
    check_extent(seconds, name)
    return seconds


@contextlib.contextmanager
def open_sound(source: AudioSource, name: str | None = None) -> Iterator[soundfile.SoundFile]:
    """Open a sound for `skip` and `read_blocks`.

    Args:
        source: as in `read_audio`.
        name: for messages; None for the source's own.

    Raises:
        AudioError: not a sound file, empty, or an error while it is read.
        FileNotFoundError: no such file.
    """
    name = name or describe(source)
    source = _openable(source, name)
    piped = _is_mp3_of_unknown_length(source)
    with _piped(source) if piped else contextlib.nullcontext(source) as opened, sound_file(opened, name) as file:
        yield file


def skip(file: soundfile.SoundFile, frames: int) -> int:
    """Skip frames, at most to the end; return how many were skipped."""
    if frames and file.seekable():
        return file.seek(min(frames, file.frames))
    return sum(map(len, read_blocks(file, frames)))


def read_blocks(file: soundfile.SoundFile, wanted: int | None, size: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield `wanted` frames or all of them, as blocks [S, channels] of float32 with `size` frames each."""
    left = wanted
    while left is None or left > 0:
        block = file.read(size if left is None else min(size, left), dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block
        left = None if left is None else left - len(block)


def _openable(source: AudioSource, name: str) -> str | bytes | BinaryIO:
    """Return the source as a path or file object for libsndfile."""
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise AudioError(f"{name}: there are no bytes in it")
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        return _existing_file(pathlib.Path(source), name)
    if hasattr(source, "read"):
        return _seekable(source, name)
    raise AudioError(f"{name}: expected a path, the bytes of a sound file, or a binary file object")


@contextlib.contextmanager
def sound_file(
    source: Any, name: str, expected: str = "not a readable sound file", **options: Any
) -> Iterator[soundfile.SoundFile]:
    """Open a file with libsndfile; all its errors, now or while reading, become an AudioError.

    Args:
        source: path, file object or descriptor; a descriptor stays open.
        name: of the sound, for messages.
        expected: start of the message, before libsndfile's reason.
        **options: of `soundfile.SoundFile`.
    """
    try:
        with soundfile.SoundFile(source, closefd=False, **options) as file:
            if file.frames >= UNKNOWN_FRAMES and not isinstance(source, int):  # a pipe is read to its end
                raise AudioError(f"{name}: the header does not hold the length; encode it again into a file")
            yield file
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
        if not reason or reason.startswith("File does not exist"):  # as for an MP3 file without a frame
            reason = "Format not recognised"
        raise AudioError(f"{name}: {expected} ({reason})") from error


def _is_mp3_of_unknown_length(source: str | bytes | BinaryIO) -> bool:
    """Whether this is an MP3 file without a frame count in its first frame.

    libsndfile then estimates the length from the first frame's bit rate and stops too early if the rate varies; through
    a pipe it reads to the end.
    """
    if isinstance(source, str | bytes):
        try:
            with open(source, "rb") as file:
                return _is_mp3_of_unknown_length(file)
        except OSError:  # libsndfile raises it again
            return False
    source.seek(0)
    tag = source.read(10)
    size = 0
    if tag[:3] == b"ID3" and len(tag) == 10:  # seven bits per byte
        size = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    source.seek(size)
    frame = source.read(64)
    is_mp3 = len(frame) == 64 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2  # sync, and layer III
    source.seek(0)
    return is_mp3 and not any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


@contextlib.contextmanager
def _piped(source: str | bytes | BinaryIO) -> Iterator[int]:
    """Yield the read end of a pipe that a thread feeds with a file."""
    read_end, write_end = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as pipe:
            if isinstance(source, str | bytes):
                with open(source, "rb") as file:
                    shutil.copyfileobj(file, pipe)
            else:
                shutil.copyfileobj(source, pipe)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield read_end
    finally:
        os.close(read_end)  # ends the thread too
        thread.join()


def check_extent(seconds: float, name: str, start_seconds: float = 0.0) -> None:
    """Refuse a sound that is empty or shorter than a frame, counted from `start_seconds`.

    Raises:
        AudioError: `seconds` are less than 25 ms.
    """
    if start_seconds and seconds <= 0:
        raise AudioError(
            f"{name}: expected a sound from {start_seconds:g} s on, but it ends at {start_seconds + seconds:.2f} s"
        )
    if seconds == 0:
        raise AudioError(f"{name}: there are no samples in it")
    if seconds < MIN_SECONDS:
        needed = f"at least {1000 * MIN_SECONDS:.0f} ms are needed"
        where = f" from {start_seconds:g} s on" if start_seconds else ""
        raise AudioError(f"{name}: only {1000 * seconds:.1f} ms long{where}; {needed}")


def _existing_file(path: pathlib.Path, name: str) -> str | bytes | io.BytesIO:
    """Return the path of a non-empty file for libsndfile, or the contents of a named pipe."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:  # a name that is too long, a folder without permission
        raise AudioError(f"{name}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{name}: expected a sound file, got a folder")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise AudioError(f"{name}: the file is empty")
    if stat.S_ISFIFO(status.st_mode):
        return _all_bytes(path.read_bytes, name)
    path = path.absolute()  # libsndfile reads the standard input for "-"
    return str(path) if os.name == "nt" else os.fsencode(path)  # bytes, as names need not be UTF-8


def _seekable(source: Any, name: str) -> Any:
    """Return a seekable file object, which libsndfile needs; a pipe is read to its end."""
    try:
        nothing = source.read(0)
        seekable = source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek")
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(nothing, bytes):
        raise AudioError(f"{name}: expected a binary file object, got one that reads {type(nothing).__name__}")
    return source if seekable else _all_bytes(source.read, name)


def _all_bytes(read: Callable[[], bytes], name: str) -> io.BytesIO:
    """Return everything `read` returns, in memory."""
    try:
        content = read()
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not content:
        raise AudioError(f"{name}: there are no bytes in it")
    return io.BytesIO(content)


def to_mono(samples: np.ndarray, rate: int, sampling_rate: int, name: str = "sound") -> np.ndarray:
    """Check samples [S] or [S, channels], average the channels and resample: [S'] float32.

    Raises:
        AudioError: no samples, shorter than 25 ms, or NaN or Inf among them.
    """
    if bad := int(np.count_nonzero(~np.isfinite(samples))):
        raise AudioError(f"{name}: {bad} of {samples.size} samples are NaN or Inf")
    check_extent(len(samples) / rate, name)
    mono = samples.mean(axis=1, dtype=np.float32) if samples.ndim == 2 else samples.astype(np.float32)
    return mono if rate == sampling_rate else soxr.resample(mono, rate, sampling_rate)


def describe(source: object) -> str:
    """Return a name for messages: the path, the file object's name, or the type."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    name = getattr(source, "name", None)  # a number for pipes
    return name if name and isinstance(name, str) else f"<{type(source).__name__}>"
