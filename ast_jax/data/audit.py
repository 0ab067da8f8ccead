"""What there is to know of a data set before training on it: bad files, lengths, statistics of the features."""

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

UNUSABLE = (AudioError, OSError, DataError)  # what reading a sound can raise: its message says what is wrong
SAME_THROUGHOUT = 1e-6  # float32 values of log-mel's size, up to 16, lie this far apart
SILENT_PEAK = 1e-4  # -80 dB of full scale, three steps of 16 bits: dither, but no sound
FULL_SCALE = 0.9999  # beyond 32767 / 32768 there is nothing in 16 bits
CLIPPED_SHARE = 1e-3  # of samples at full scale; a loud sound that is well recorded touches it a few times
ORIGINAL_MASKS = (24, 192)  # mel bins and frames
ORIGINAL_MIXUP = 0.5
ORIGINAL_BATCH = 1000


class Headers(NamedTuple):
    """What the headers of sounds tell.

    Attributes:
        checked: how many were read.
        longer: how many are longer than the model's input.
        bad: those that cannot be used, each with a line that says why.
    """

    checked: int
    longer: int
    bad: list[tuple[Example, str]]


class Statistics(NamedTuple):
    """Mean and standard deviation of log-mel values.

    Attributes:
        mean: of all values.
        std: their standard deviation.
        frames: how many were measured.
        clips: how many sounds they are from.
        skipped: how many others could not be used.
    """

    mean: float
    std: float
    frames: int
    clips: int
    skipped: int


class _Moments(NamedTuple):
    """Count, mean and sum of squared deviations, float64, which merge (Chan, Golub, LeVeque 1979)."""

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
        apart = other.mean - self.mean
        return _Moments(
            size,
            self.mean + apart * other.size / size,
            self.squares + other.squares + apart**2 * self.size * other.size / size,
        )


def _drawn(examples: Sequence[Example], limit: int | None, seed: int) -> list[int]:
    """Return the indices of `limit` examples drawn by `seed`, or of all, in their order."""
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
    """Read the headers of all sounds, or of `limit` of them drawn by `seed`; nothing is decoded."""

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
    """Measure the log-mel values of all examples as the model hears them, padding left out.

    One pass that keeps three numbers, in float64. Moments are merged in the order of the examples, so that the result
    is the same to the last bit for any number of threads.

    Args:
        examples: the training split.
        frontend: the settings of the features; its mean and std do not matter.
        limit: measure only so many, drawn by `seed`.
        seed: also of the dither, where the settings have any.
        num_threads: None for one a core.
        advance: called once for each example that is done.

    Raises:
        DataError: no example can be used, or all hold the same throughout.
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
    if std <= SAME_THROUGHOUT:
        raise DataError(f"all of {clips} training sounds hold the same throughout, as silence does")
    return Statistics(total.mean, std, frames, clips, len(skipped))


def statistics_as_original(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Statistics:
    """Measure as the original's `src/get_norm_stats.py` does, for comparison only: the result is biased.

    It reads training batches of 1000, so that zeros of padding and of SpecAugment's masks (up to 24 bins and 192
    frames) count as values, half of the sounds are mixed with another, all are freed of their mean, and the deviation
    is the mean of those of the batches, each of which lacks what differs between them.

    Args:
        examples: the training split.
        frontend: the settings of the features; its mean, std and dither do not matter.
        limit: measure only so many, drawn by `seed`; they are mixed with any.
        seed: of what is drawn.
        num_threads: None for one a core; the result does not depend on it.

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
            batches.append((total.mean, np.sqrt(total.squares / (total.size - 1))))  # as torch.std has it
    clips = _usable(len(chosen), skipped)
    mean, std = np.mean(batches, axis=0).tolist()
    return Statistics(mean, std, clips * frontend.max_length, clips, len(skipped))


def _mask(rng: np.random.Generator, spec: np.ndarray, axis: int, most: int) -> None:
    """Set one band of less than `most` bins or frames to zero, as torchaudio draws it."""
    width = rng.random() * min(most, spec.shape[axis])
    start = int(rng.random() * (spec.shape[axis] - width))
    np.moveaxis(spec, axis, 0)[start : start + int(width)] = 0


def _usable(count: int, skipped: list[str]) -> int:
    """Return how many of `count` examples were measured, at least one."""
    if count == len(skipped):
        reason = f", the first: {skipped[0]}" if skipped else ""
        raise DataError(f"expected sounds to measure, but none of {count} can be used{reason}")
    return count - len(skipped)


class _Heard(NamedTuple):
    """What decoding one sound tells: a reason against it, or what it is like."""

    reason: str = ""
    seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    not_finite: int = 0
    silent: bool = False
    clipped: bool = False
    digest: bytes = b""


def _hear(example: Example) -> _Heard:
    """Decode one sound from end to end, at its own rate, a block at a time."""
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
        return _Heard(str(error))
    silent = not not_finite and (high - low) / 2 < SILENT_PEAK  # whatever the constant that it lies around
    clipped = full >= CLIPPED_SHARE * samples
    return _Heard("", frames / rate, rate, channels, not_finite, silent, clipped, digest.digest())


def survey(
    dataset: DataSet,
    frontend: FrontendConfig,
    *,
    num_threads: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Survey:
    """Decode every sound of a data set once, from end to end, and say what is in it and what is wrong with it.

    Sounds are read a block at a time and at their own rate. Two are the same where all their samples, the rate and the
    number of channels are, whatever the file format; silent ones are not compared.

    Args:
        dataset: see `datasets.read_dataset`.
        frontend: says what a frame is.
        num_threads: None for one a core.
        advance: called once for each example that is done.
    """
    faults: dict[str, list[str]] = {name: [] for name in ("bad", "not_finite", "silent", "clipped")}
    seconds = array.array("d")
    rates: collections.Counter[int] = collections.Counter()
    channels: collections.Counter[int] = collections.Counter()
    first: dict[bytes, tuple[str, Example]] = {}
    same: dict[bytes, list[tuple[str, Example]]] = {}
    splits_of: dict[object, dict[str, None]] = {}
    placed = [(split, example) for split in SPLITS for example in dataset.splits[split]]
    results = ordered_map(_hear, (example for _, example in placed), num_threads)
    for (split, example), heard in zip(placed, track(results, "sounds", len(placed)), strict=True):
        advance()
        if example.group or example.row is None:
            splits_of.setdefault(example.group or example.path, {})[split] = None
        if heard.reason:
            faults["bad"].append(heard.reason)
            continue
        seconds.append(heard.seconds)
        rates[heard.rate] += 1
        channels[heard.channels] += 1
        if heard.not_finite:
            faults["not_finite"].append(f"{example.name}: {heard.not_finite} samples")
        if heard.clipped:
            faults["clipped"].append(example.name)
        if heard.silent:
            faults["silent"].append(example.name)
        elif heard.digest in first:
            same.setdefault(heard.digest, [first[heard.digest]]).append((split, example))
        else:
            first[heard.digest] = split, example
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
        passed_over=len(dataset.passed_over),
        notes=dataset.notes,
    )


def _class_counts(dataset: DataSet) -> dict[str, list[int]]:
    """Return how many examples of each class there are, by split."""
    counts = {}
    for split, examples in dataset.splits.items():
        targets = list(itertools.chain.from_iterable(example.targets for example in examples))
        counts[split] = np.bincount(np.array(targets, np.int64), minlength=len(dataset.labels)).tolist()
    return counts


def _durations(seconds: Sequence[float]) -> Durations | None:
    """Return what there is to say of the lengths of sounds."""
    if not seconds:
        return None
    shortest, median, most, longest = np.percentile(np.asarray(seconds), (0, 50, 95, 100)).tolist()
    return Durations(shortest, median, most, longest, sum(seconds) / 3600)
