"""Checks of a data set before training: unreadable files, durations, duplicates, leaks, statistics of the features."""

from __future__ import annotations

import array
import collections
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.io import AudioError, check_extent, header_seconds, open_sound, read_blocks, skip
from ast_jax.config import FrontendConfig
from ast_jax.data.audit_report import Durations, Survey, suggest_max_length
from ast_jax.data.datasets import DataSet, Example, load_example
from ast_jax.data.mixup import MIXUP_ALPHA, mix_waveforms
from ast_jax.data.records import SPLITS, DataError
from ast_jax.runtime.progress import track
from ast_jax.runtime.threads import ordered_map

UNUSABLE = (AudioError, OSError, DataError)  # raised for a file that cannot be used
CONSTANT_STD = 1e-6  # spacing of float32 at the magnitude of log-mel values, up to 16
SILENT_PEAK = 1e-4  # -80 dBFS, three 16-bit steps: dither only
FULL_SCALE = 0.9999  # the largest 16-bit sample is 32767 / 32768
CLIPPED_SHARE = 1e-3  # of samples at full scale; a good recording reaches it in a few samples at most
ORIGINAL_MASKS = (24, 192)  # mel bins and frames
ORIGINAL_MIXUP = 0.5
ORIGINAL_BATCH = 1000


class Headers(NamedTuple):
    """The result of `check_headers`.

    Attributes:
        checked: number of headers read.
        longer: number of clips longer than the model's input.
        bad: unusable examples, each with the reason in one line.
    """

    checked: int
    longer: int
    bad: list[tuple[Example, str]]


class Statistics(NamedTuple):
    """Mean and standard deviation of log-mel values.

    Attributes:
        mean: mean of all values.
        std: standard deviation of all values.
        frames: number of frames.
        clips: number of clips.
        skipped: number of unusable clips.
    """

    mean: float
    std: float
    frames: int
    clips: int
    skipped: int


class _Moments(NamedTuple):
    """Count, mean and sum of squared deviations in float64, with a parallel merge (Chan, Golub, LeVeque 1979)."""

    size: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> _Moments:
        values = values.astype(np.float64)
        mean = values.mean()
        return cls(values.size, float(mean), float(np.square(values - mean).sum()))

    def merge(self, other: _Moments) -> _Moments:
        size = self.size + other.size
        delta = other.mean - self.mean
        return _Moments(
            size,
            self.mean + delta * other.size / size,
            self.squares + other.squares + delta**2 * self.size * other.size / size,
        )


def _drawn(examples: Sequence[Example], limit: int | None, seed: int) -> list[int]:
    """Return the indices of `limit` examples drawn with `seed`, or of all, in ascending order."""
    if limit is None or limit >= len(examples):
        return list(range(len(examples)))
    return sorted(np.random.default_rng(seed).permutation(len(examples))[:limit].tolist())


def check_headers(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Headers:
    """Read the headers of all examples, or of `limit` of them drawn with `seed`, without decoding."""

    def check(example: Example) -> bool | str:
        try:
            seconds = header_seconds(example.source)
            if example.start:
                check_extent(seconds - example.start, example.name, example.start)
        except UNUSABLE as error:
            return str(error)
        end = seconds if example.end is None else min(example.end, seconds)
        return end - example.start > frontend.max_seconds

    chosen = [examples[index] for index in _drawn(examples, limit, seed)]
    found = list(ordered_map(check, chosen, num_threads))
    bad = [(example, reason) for example, reason in zip(chosen, found, strict=True) if isinstance(reason, str)]
    return Headers(len(chosen), sum(longer is True for longer in found), bad)


def statistics(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_threads: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Statistics:
    """Compute mean and standard deviation of the log-mel values of all examples, without padding.

    One pass in constant memory. Moments are merged in float64 in the order of the examples, so that the result does not
    depend on the number of threads, bit for bit.

    Args:
        examples: the training split.
        frontend: the settings of the features; mean and std are not used.
        limit: number of examples to draw with `seed`; None: all.
        seed: of that draw and of dither.
        num_threads: None: one per core.
        advance: called once for each completed example.

    Raises:
        DataError: no example can be used, or all log-mel values are equal.
    """

    def measure(index: int) -> tuple[_Moments, int] | str:
        try:
            waveform = load_example(examples[index], frontend)
        except UNUSABLE as error:
            return str(error)
        frames, noise = fbank.num_frames(len(waveform), frontend), None
        if frontend.dither:
            noise = np.random.default_rng([seed, index]).standard_normal((frames, frontend.window_samples), np.float32)
        return _Moments.of(fbank.log_mel(waveform, frontend, noise=noise)), frames

    chosen = _drawn(examples, limit, seed)
    total, frames, skipped = _Moments(), 0, []
    for found in track(ordered_map(measure, chosen, num_threads), "features", len(chosen)):
        advance()
        if isinstance(found, str):
            skipped.append(found)
        else:
            total, frames = total.merge(found[0]), frames + found[1]
    clips = _usable(len(chosen), skipped)
    std = float(np.sqrt(total.squares / total.size))
    if std <= CONSTANT_STD:
        raise DataError(f"all log-mel values of {clips} training clips are equal, as in silence")
    return Statistics(total.mean, std, frames, clips, len(skipped))


def statistics_as_original(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Statistics:
    """Compute the statistics as the original's `src/get_norm_stats.py` does, for comparison only: they are biased.

    The original averages over augmented training batches of 1000: zeros from padding and SpecAugment (masks of up to 24
    bins and 192 frames) are counted, half of the clips are mixed with another, and the standard deviation is the mean
    of the batches' standard deviations, which lacks the variance between batches.

    Args:
        examples: the training split.
        frontend: the settings of the features; mean, std and dither are not used.
        limit: number of examples to draw with `seed`; None: all. Mixup partners come from all examples.
        seed: of that draw, mixup and the masks.
        num_threads: None: one per core; the result does not depend on it.

    Raises:
        DataError: no example can be used.
    """

    def measure(index: int) -> _Moments | str:
        rng = np.random.default_rng([seed, index])
        try:
            waveform = load_example(examples[index], frontend)
            if rng.random() < ORIGINAL_MIXUP:
                partner = load_example(examples[int(rng.integers(len(examples)))], frontend)
                waveform = mix_waveforms(waveform, partner, rng.beta(MIXUP_ALPHA, MIXUP_ALPHA))
            else:
                waveform = waveform - waveform.mean()
        except UNUSABLE as error:
            return str(error)
        spec = np.zeros((frontend.max_length, frontend.num_mel_bins), np.float32)
        values = fbank.log_mel(waveform, frontend)
        spec[: len(values)] = values
        for axis, most in ((1, ORIGINAL_MASKS[0]), (0, ORIGINAL_MASKS[1])):
            _mask(rng, spec, axis, most)
        return _Moments.of(spec)

    frontend = frontend.replace(dither=0.0)
    chosen = _drawn(examples, limit, seed)
    batches, skipped = [], []
    for start in range(0, len(chosen), ORIGINAL_BATCH):
        total = _Moments()
        some = chosen[start : start + ORIGINAL_BATCH]
        for found in track(ordered_map(measure, some, num_threads), f"features from {start} on", len(some)):
            if isinstance(found, str):
                skipped.append(found)
            else:
                total = total.merge(found)
        if total.size:
            batches.append((total.mean, np.sqrt(total.squares / (total.size - 1))))  # as torch.std
    clips = _usable(len(chosen), skipped)
    mean, std = np.mean(batches, axis=0).tolist()
    return Statistics(mean, std, clips * frontend.max_length, clips, len(skipped))


def _mask(rng: np.random.Generator, spec: np.ndarray, axis: int, most: int) -> None:
    """Set one band of less than `most` bins or frames to zero, with torchaudio's distribution."""
    width = rng.random() * min(most, spec.shape[axis])
    start = int(rng.random() * (spec.shape[axis] - width))
    np.moveaxis(spec, axis, 0)[start : start + int(width)] = 0


def _usable(count: int, skipped: list[str]) -> int:
    """Return the number of measured examples, at least one."""
    if count == len(skipped):
        reason = f", the first: {skipped[0]}" if skipped else ""
        raise DataError(f"expected usable clips, but none of {count} can be used{reason}")
    return count - len(skipped)


class _Decoded(NamedTuple):
    """The properties of a decoded clip, or the reason why it cannot be used."""

    reason: str = ""
    seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    not_finite: int = 0
    silent: bool = False
    clipped: bool = False
    digest: bytes = b""


def _decode(example: Example) -> _Decoded:
    """Decode a whole clip block by block at its own sampling rate."""
    frames = samples = not_finite = full = 0
    low, high = np.inf, -np.inf
    try:
        with open_sound(example.source) as file:
            rate, channels = file.samplerate, file.channels
            digest = hashlib.blake2b(f"{rate} {channels}".encode(), digest_size=16)
            first = round(example.start * rate)
            begun = skip(file, first)
            wanted = None if example.end is None else round(example.end * rate) - first
            for block in read_blocks(file, wanted):
                frames, samples = frames + len(block), samples + block.size
                not_finite += block.size - int(np.count_nonzero(np.isfinite(block)))
                full += int(np.count_nonzero(np.abs(block) >= FULL_SCALE))
                low, high = min(low, block.min()), max(high, block.max())
                digest.update(block.data)
            check_extent((frames - (first - begun)) / rate, example.name, example.start)
    except UNUSABLE as error:
        return _Decoded(str(error))
    silent = not not_finite and (high - low) / 2 < SILENT_PEAK  # after removing the DC offset
    clipped = full >= CLIPPED_SHARE * samples
    return _Decoded("", frames / rate, rate, channels, not_finite, silent, clipped, digest.digest())


def survey(
    dataset: DataSet,
    frontend: FrontendConfig,
    *,
    num_threads: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Survey:
    """Decode every clip of a data set and report its content and its faults.

    Clips are read block by block at their own sampling rate. Duplicates have the same samples, rate and number of
    channels, in any file format; silent clips are not compared.

    Args:
        dataset: see `datasets.read_dataset`.
        frontend: defines the frames of the suggested input length.
        num_threads: None: one per core.
        advance: called once for each completed example.
    """
    faults: dict[str, list[str]] = {name: [] for name in ("bad", "not_finite", "silent", "clipped")}
    seconds = array.array("d")
    rates: collections.Counter[int] = collections.Counter()
    channels: collections.Counter[int] = collections.Counter()
    first: dict[bytes, tuple[str, Example]] = {}
    same: dict[bytes, list[tuple[str, Example]]] = {}
    splits_of: dict[object, dict[str, None]] = {}
    placed = [(split, example) for split in SPLITS for example in dataset.splits[split]]
    results = ordered_map(_decode, (example for _, example in placed), num_threads)
    for (split, example), clip in zip(placed, track(results, "sounds", len(placed)), strict=True):
        advance()
        if example.group or example.row is None:
            splits_of.setdefault(example.group or example.path, {})[split] = None
        if clip.reason:
            faults["bad"].append(clip.reason)
            continue
        seconds.append(clip.seconds)
        rates[clip.rate] += 1
        channels[clip.channels] += 1
        if clip.not_finite:
            faults["not_finite"].append(f"{example.name}: {clip.not_finite} samples")
        if clip.clipped:
            faults["clipped"].append(example.name)
        if clip.silent:
            faults["silent"].append(example.name)
        elif clip.digest in first:
            same.setdefault(clip.digest, [first[clip.digest]]).append((split, example))
        else:
            first[clip.digest] = split, example
    length, reason = None, ""
    if seconds:
        length, reason = suggest_max_length(
            np.array([fbank.num_frames(round(one * frontend.sampling_rate), frontend) for one in seconds])
        )
    return Survey(
        labels=dataset.labels,
        examples={split: len(dataset.splits[split]) for split in SPLITS},
        counts=_class_counts(dataset),
        durations=_durations(seconds),
        rates=dict(rates),
        channels=dict(channels),
        **faults,
        duplicates=[[(split, example.name) for split, example in found] for found in same.values()],
        shared=[f"{key}: {', '.join(splits)}" for key, splits in splits_of.items() if len(splits) > 1],
        max_length=length,
        reason=reason,
        ignored=len(dataset.ignored),
        notes=dataset.notes,
    )


def _class_counts(dataset: DataSet) -> dict[str, list[int]]:
    """Return the number of examples of each class by split."""
    counts = {}
    for split, examples in dataset.splits.items():
        targets = list(itertools.chain.from_iterable(example.targets for example in examples))
        counts[split] = np.bincount(np.array(targets, np.int64), minlength=len(dataset.labels)).tolist()
    return counts


def _durations(seconds: Sequence[float]) -> Durations | None:
    """Return the distribution of the durations."""
    if not seconds:
        return None
    shortest, median, most, longest = np.percentile(np.asarray(seconds), (0, 50, 95, 100)).tolist()
    return Durations(shortest, median, most, longest, sum(seconds) / 3600)
