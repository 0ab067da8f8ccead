"""Streaming decode: blocks of mono samples at the requested rate, from a file, an array or a pipe.

Only a few seconds are in memory at a time. The samples are bit-identical to those of `read_audio`, as soxr's streaming
resampler equals its one-shot resampler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from ast_jax.audio.io import AudioError, AudioSource, check_extent, describe, open_sound, read_blocks, sound_file

BLOCK_SECONDS = 2.0
LIVE_SECONDS = 0.05  # per block of a pipe, so that latency is low
ENCODINGS = {  # ffmpeg's names of raw encodings to libsndfile's (subtype, endianness)
    "s16le": ("PCM_16", "LITTLE"), "s16be": ("PCM_16", "BIG"), "s24le": ("PCM_24", "LITTLE"),
    "s32le": ("PCM_32", "LITTLE"), "f32le": ("FLOAT", "LITTLE"), "f64le": ("DOUBLE", "LITTLE"),
    "u8": ("PCM_U8", "FILE"), "alaw": ("ALAW", "FILE"), "mulaw": ("ULAW", "FILE"),
}  # fmt: skip


class SupportsArray(Protocol):
    """A NumPy or JAX array, or any other object with `__array__`."""

    def __array__(self) -> np.ndarray: ...


Audio = AudioSource | SupportsArray


@dataclasses.dataclass(frozen=True)
class Live:
    """A live stream of samples through a pipe.

    Attributes:
        descriptor: file descriptor of the pipe; 0 is the standard input.
        encoding: a key of `ENCODINGS` for raw samples without a header, None for WAV.
        sampling_rate: Hz of raw samples.
        channels: of raw samples.
        name: for messages.
        stop: called before every block; the stream ends where it returns True.
    """

    descriptor: int = 0
    encoding: str | None = None
    sampling_rate: int = 16000
    channels: int = 1
    name: str = "-"
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Check the encoding."""
        if self.encoding is not None and self.encoding not in ENCODINGS:
            raise ValueError(f"raw samples: expected one of {', '.join(ENCODINGS)}, got {self.encoding!r}")


def mono_blocks(source: Any, sampling_rate: int, array_rate: int | None = None) -> Iterator[np.ndarray]:
    """Yield a sound in blocks [S] of mono float32 at `sampling_rate`, decoded lazily.

    Args:
        source: as `read_audio`, samples [S], or `Live`.
        sampling_rate: Hz of the blocks.
        array_rate: Hz of samples given as `source`.

    Raises:
        AudioError: as `read_audio`, once decoding reaches the fault; samples that are not [S] or not floating point.
        FileNotFoundError: no such file.
        ValueError: samples without a rate.
    """
    if hasattr(source, "__array__") or isinstance(source, list):
        samples, rate = _checked_array(source, array_rate)
        size = max(1, round(BLOCK_SECONDS * rate))
        parts = (samples[start : start + size] for start in range(0, len(samples), size))
        yield from _mono(parts, rate, sampling_rate, describe(source))
        return
    with _live(source) if isinstance(source, Live) else open_sound(source) as file:
        seconds = LIVE_SECONDS if isinstance(source, Live) else BLOCK_SECONDS
        blocks = read_blocks(file, None, math.ceil(seconds * file.samplerate))
        if isinstance(source, Live):
            blocks = itertools.takewhile(lambda _: not source.stop(), blocks)
        yield from _mono(blocks, file.samplerate, sampling_rate, describe(source))


@contextlib.contextmanager
def _live(source: Live) -> Iterator[soundfile.SoundFile]:
    """Open a pipe, or the file behind the descriptor."""
    if not source.encoding and stat.S_ISREG(os.fstat(source.descriptor).st_mode):  # as `< sound.mp3` does
        with os.fdopen(os.dup(source.descriptor), "rb") as file_object, open_sound(file_object, source.name) as file:
            yield file
        return
    options: dict[str, Any] = {}
    if source.encoding:
        subtype, endian = ENCODINGS[source.encoding]
        options = {"format": "RAW", "subtype": subtype, "endian": endian, "channels": source.channels}
        options["samplerate"] = source.sampling_rate
    expected = "expected WAV, or raw samples with their encoding, rate and channels"
    with sound_file(source.descriptor, source.name, expected, **options) as file:
        yield file


def _checked_array(source: Any, rate: Any) -> tuple[np.ndarray, float]:
    """Check samples and their rate; return them as [S] and Hz."""
    if rate is None:
        raise ValueError("samples: expected sampling_rate=... with an array, got none")
    if not isinstance(rate, numbers.Real) or not 0 < float(rate) < math.inf:
        raise ValueError(f"sampling_rate: expected a positive number of Hz, got {rate!r}")
    samples = np.asarray(source)
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise AudioError(
            f"samples: expected floating-point samples [S] in [-1, 1], got {samples.dtype} {samples.shape}"
        )
    return samples, float(rate)


def _mono(blocks: Iterator[np.ndarray], rate: float, sampling_rate: int, name: str) -> Iterator[np.ndarray]:
    """Check blocks [S] or [S, channels], average their channels, and resample them as one stream."""
    resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
    frames = 0
    for block in blocks:
        if bad := int(np.count_nonzero(~np.isfinite(block))):
            where = f" from {frames / rate:.2f} s on" if frames else ""
            raise AudioError(f"{name}: {bad} of {block.size} samples{where} are NaN or Inf")
        frames += len(block)
        mono = block.mean(axis=1, dtype=np.float32) if block.ndim == 2 else block.astype(np.float32)
        yield mono if resampler is None else resampler.resample_chunk(mono)
    check_extent(frames / rate, name)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
