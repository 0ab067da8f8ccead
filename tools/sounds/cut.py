"""The table of sources of `sounds-tiny`, and the segmentation of its recordings."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from sounds import synth
from sounds.synth import RATE, Rng

LENGTH = 41_200  # samples of 256 frames with a hop of 10 ms and a window of 25 ms
SHORTEST = RATE // 4
SOURCES = Path(__file__).with_name("sources.toml")
SPLITS = ("train", "validation", "test")


class DataError(Exception):
    """A problem to report to the user in one line."""


@dataclasses.dataclass(frozen=True)
class Take:
    """Some files of one package that share their labels and split."""

    package: str
    split: str
    labels: tuple[str, ...]  # empty: none of the model's labels applies
    files: tuple[str, ...]
    clips: int
    license: str
    exclude: tuple[str, ...] = ()
    join: bool = False
    midi: bool = False


def read_takes(path: Path = SOURCES) -> list[Take]:
    """Return the takes of the table of sources."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    takes = []
    for package, entry in table.items():
        for take in entry["take"]:
            fields = {**take, **{k: tuple(take[k]) for k in ("labels", "files", "exclude") if k in take}}
            takes.append(Take(package=package, **{"split": entry.get("split"), "license": entry["license"], **fields}))
    for take in takes:
        if take.split not in SPLITS:
            raise DataError(f"{path.name}: {take.package} has no split among {', '.join(SPLITS)}")
    return takes


# ----------------------------------------------------------------- files

SOUNDFONT = "timgm6mb-soundfont/usr/share/sounds/sf2/TimGM6mb.sf2"


def render(midi: Path, cache: Path) -> Path:
    """Render a MIDI file with fluidsynth, cached; return the path of the WAV file."""
    wav = cache / "rendered" / f"{midi.stem}.wav"
    if not wav.exists():
        if shutil.which("fluidsynth") is None:
            raise DataError("fluidsynth not found: install the package fluidsynth")
        wav.parent.mkdir(parents=True, exist_ok=True)
        part = wav.with_suffix(".part")
        done = subprocess.run(
            [
                "fluidsynth",
                "-ni",
                "-q",
                "-g",
                "0.5",
                "-r",
                str(RATE),
                "-T",
                "wav",
                "-F",
                str(part),
                str(cache / "root" / SOUNDFONT),
                str(midi),
            ],
            capture_output=True,
        )
        if done.returncode or not part.exists():
            raise DataError(f"fluidsynth cannot render {midi.name}")
        part.rename(wav)
    return wav


def find_files(take: Take, cache: Path) -> list[Path]:
    """Return the files of a take, sorted."""
    root = cache / "root" / take.package
    if not root.is_dir():
        raise DataError(f"{take.package} is not in the cache: run fetch first")
    found = {path for pattern in take.files for path in root.glob(pattern)}
    found -= {path for pattern in take.exclude for path in root.glob(pattern)}
    files = sorted(path for path in found if path.is_file() and not path.is_symlink())
    if not files:
        raise DataError(f"{take.package}: no file matches {', '.join(take.files)}")
    return [render(path, cache) for path in files] if take.midi else files


def duration(path: Path) -> float:
    """Return the duration of an audio file in seconds."""
    return soundfile.info(str(path)).duration


def load(path: Path, start: float = 0.0, seconds: float | None = None) -> np.ndarray:
    """Return a part of an audio file, mono at 16 kHz, with its mean removed."""
    with soundfile.SoundFile(str(path)) as file:
        file.seek(int(start * file.samplerate))
        count = -1 if seconds is None else int(seconds * file.samplerate)
        wave = file.read(count, dtype="float32", always_2d=True).mean(axis=1)
        rate = file.samplerate
    if len(wave) < 32:
        return np.zeros(SHORTEST, np.float32)
    wave = soxr.resample(wave - wave.mean(), rate, RATE)
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


# --------------------------------------------------------------- cutting

FRAME = 320


def active_frames(wave: np.ndarray, below: float) -> np.ndarray:
    """Return for every 20 ms frame whether it is within `below` dB of the loudest."""
    count = max(1, len(wave) // FRAME)
    frames = np.resize(wave, (count, FRAME)) if len(wave) < FRAME else wave[: count * FRAME].reshape(count, FRAME)
    level = 10 * np.log10(np.mean(np.square(frames), axis=1) + 1e-12)
    return level > max(level.max() - below, -66.0)


def trim(wave: np.ndarray, below: float) -> np.ndarray:
    """Return `wave` without silence at both ends; empty if it is all silence."""
    active = np.flatnonzero(active_frames(wave, below))
    if not len(active) or np.max(np.abs(wave)) < synth.decibels(-50):
        return wave[:0]
    return wave[max(0, active[0] - 2) * FRAME : (active[-1] + 3) * FRAME]


def dense_enough(wave: np.ndarray, labels: tuple[str, ...]) -> bool:
    """Return whether enough frames of a window are active: 40 % for speech."""
    if "Silence" in labels:
        return synth.rms(wave) < synth.decibels(-62)
    below, share = (30.0, 0.4) if "Speech" in labels else (40.0, 0.5) if "Music" in labels else (40.0, 0.05)
    return bool(np.mean(active_frames(wave, below)) >= share) and synth.rms(wave) > synth.decibels(-50)


def segments(wave: np.ndarray, labels: tuple[str, ...], rng: Rng) -> Iterator[np.ndarray]:
    """Yield windows of a recording with enough active frames.

    The hop is half a window; of percussion only the first window is taken, which has the onset.
    """
    if "Silence" not in labels:
        wave = trim(wave, 35.0 if "Speech" in labels else 50.0)
    if len(wave) <= LENGTH or "Percussion" in labels:
        if len(wave):
            yield wave[:LENGTH]
        return
    for start in rng.permutation(range(0, len(wave) - LENGTH + 1, LENGTH // 2)):
        window = wave[start : start + LENGTH]
        if dense_enough(window, labels):
            yield window


def long_segments(path: Path, labels: tuple[str, ...], rng: Rng) -> Iterator[np.ndarray]:
    """Yield windows like `segments`, reading only those parts of a long file."""
    slots = rng.permutation(int(duration(path) // 4))
    for slot in slots:
        window = load(path, 4.0 * slot + float(rng.uniform(0, 1)), LENGTH / RATE + 0.05)[:LENGTH]
        if len(window) == LENGTH and dense_enough(window, labels):
            yield window


def joined(files: list[Path], rng: Rng) -> Iterator[np.ndarray]:
    """Yield concatenated utterances of one folder, each about 0.8 to 2.2 s."""
    parts: list[np.ndarray] = []
    folder, wanted = None, rng.uniform(0.8, 2.2) * RATE
    for path in files:
        wave = trim(load(path), 35.0)
        if parts and (path.parent != folder or sum(map(len, parts)) + len(wave) > LENGTH):
            yield np.concatenate(parts)
            parts, wanted = [], rng.uniform(0.8, 2.2) * RATE
        if len(wave) < 1600:
            continue
        if len(wave) > LENGTH:
            yield from segments(wave, ("Speech",), rng)
            continue
        folder = path.parent
        parts += [synth.at_peak(wave, -1.0), np.zeros(int(rng.uniform(0.03, 0.25) * RATE), np.float32)]
        if sum(map(len, parts)) >= wanted:
            yield np.concatenate(parts)[:LENGTH]
            parts, wanted = [], rng.uniform(0.8, 2.2) * RATE


def cuts(take: Take, cache: Path, rng: Rng) -> Iterator[np.ndarray]:
    """Yield the segments of a take, round-robin over its files."""
    files = find_files(take, cache)
    if take.join:
        folders = sorted({path.parent for path in files})
        streams = [joined([path for path in files if path.parent == folder], rng) for folder in folders]
    else:
        streams = [
            long_segments(path, take.labels, rng)
            if duration(path) > 30 and "Silence" not in take.labels
            else segments(load(path), take.labels, rng)
            for path in (files[i] for i in rng.permutation(len(files))[: 2 * take.clips])
        ]
    while streams:
        alive = []
        for stream in streams:
            segment = next(stream, None)
            if segment is not None:
                alive.append(stream)
                yield segment
        streams = alive
