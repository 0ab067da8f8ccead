"""Fetch, cut, label and mix the training data of `sounds-tiny`.

    python tools/sounds_data.py fetch --cache CACHE
    python tools/sounds_data.py build --cache CACHE --output DATA

`fetch` downloads the Debian packages of tools/sounds/sources.toml (with `apt-get download`) and unpacks them in CACHE;
packages that are there already are not fetched again. `build` cuts the recordings into clips of at most 2.575 s at
16 kHz and writes DATA/clips/**.flac and DATA/manifest.csv. The same cache, sources and seed give the same data.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from sounds import synth
from sounds.cut import LENGTH, SHORTEST, SOUNDFONT, SPLITS, DataError, Take, cuts, read_takes
from sounds.synth import RATE, Rng

SYNTHETIC = "synthetic"
FREE = "CC0-1.0"  # licence of synthesised sounds


@dataclasses.dataclass(frozen=True)
class Clip:
    """A finished clip: its waveform and its row of the manifest."""

    wave: np.ndarray
    labels: tuple[str, ...]
    split: str
    condition: str
    source: str
    license: str


def generator(seed: int, *names: str) -> Rng:
    """Return a random generator seeded by the seed and the names."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


# ----------------------------------------------------------------- fetch


def fetch_package(package: str, cache: Path) -> None:
    """Download and unpack a Debian package, unless it is in the cache."""
    root = cache / "root" / package
    if root.is_dir():
        return
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        done = subprocess.run(["apt-get", "download", package], cwd=debs, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
            raise DataError(f"cannot download {package}: {reason}")
    deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
    part = root.with_name(f"{package}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    done = subprocess.run(["dpkg", "-x", str(deb), str(part)], capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"cannot unpack {deb.name}: {done.stderr.strip()}")
    part.rename(root)


def fetch(cache: Path) -> None:
    """Fetch every package of the table of sources into the cache."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} not found: fetch needs a Debian system")
    packages = sorted({take.package for take in read_takes()} | {SOUNDFONT.split("/", 1)[0]})
    for number, package in enumerate(packages, 1):
        print(f"[{number}/{len(packages)}] {package}", flush=True)
        fetch_package(package, cache)


# ----------------------------------------------------------- conditioning


def place(wave: np.ndarray, rng: Rng) -> np.ndarray:
    """Return a short sound, as it is or at a random time of a full clip over a low noise floor."""
    if len(wave) < SHORTEST:
        wave = np.pad(wave, (0, SHORTEST - len(wave)))
    if len(wave) >= LENGTH or rng.random() < 0.4:
        return wave[:LENGTH]
    floor = synth.coloured(rng, LENGTH, rng.uniform(0, 6))
    clip = floor / synth.rms(floor) * max(1e-5, synth.rms(wave) * synth.decibels(rng.uniform(-65, -45)))
    start = int(rng.integers(0, LENGTH - len(wave) + 1))
    clip[start : start + len(wave)] += wave
    return clip.astype(np.float32)


def finish(wave: np.ndarray, take: Take, rng: Rng) -> np.ndarray:
    """Return a segment as a clip: placed, in training sometimes degraded, at a random level."""
    if "Silence" in take.labels:
        return wave[:LENGTH]
    wave = place(synth.at_peak(wave, -1.0), rng)
    if take.split == "train" and rng.random() < 0.4:
        wave = synth.degrade(rng, wave)
    return synth.at_peak(wave, rng.uniform(-24, 0))


def real_clips(take: Take, cache: Path, seed: int) -> list[Clip]:
    """Return the clips of a take.

    If a take has fewer segments than `clips`, they are reused at other times and levels: up to 12 times in training, 3
    times in the other splits.
    """
    rng = generator(seed, take.package, take.split, *take.labels, *take.files)
    pieces = []
    for piece in cuts(take, cache, rng):
        pieces.append(piece)
        if len(pieces) == take.clips:
            break
    if not pieces:
        raise DataError(f"{take.package}: nothing to cut from {', '.join(take.files)}")
    count = min(take.clips, len(pieces) * (12 if take.split == "train" else 3))
    return [
        Clip(
            finish(varied(pieces[i % len(pieces)], take, rng), take, rng),
            take.labels,
            take.split,
            "clean",
            take.package,
            take.license,
        )
        for i in range(count)
    ]


def varied(wave: np.ndarray, take: Take, rng: Rng) -> np.ndarray:
    """Return a training segment at a random speed, pitch included: up to 12 % for speech and music, else 60 %.

    There are few different recordings of sirens, beeps and telephones.
    """
    if take.split != "train" or "Silence" in take.labels or rng.random() < 0.25:
        return wave
    widest = 1.12 if {"Speech", "Music"} & set(take.labels) else 1.6
    speed = float(np.exp(rng.uniform(-1, 1) * np.log(widest)))
    return soxr.resample(wave, RATE * speed, RATE)[:LENGTH].astype(np.float32)


MAKERS: tuple[tuple[Callable[[Rng, int], np.ndarray], tuple[str, ...], tuple[int, int, int]], ...] = (
    # maker, labels, clips in train, validation and test
    (synth.noise, ("Noise",), (500, 40, 60)),
    (synth.silence, ("Silence",), (300, 30, 40)),
    (synth.siren, ("Siren", "Alarm"), (1200, 25, 15)),
    (synth.beep, ("Alarm",), (900, 25, 15)),
    (synth.telephone, ("Alarm",), (700, 25, 15)),
    (synth.melody, ("Music",), (250, 10, 10)),
)


def synthetic_clips(seed: int) -> list[Clip]:
    """Return the synthesised clips."""
    clips = []
    for make, labels, counts in MAKERS:
        for split, count in zip(SPLITS, counts, strict=True):
            rng = generator(seed, SYNTHETIC, make.__name__, split)
            take = Take(SYNTHETIC, split, labels, (), count, FREE)
            for _ in range(count):
                length = LENGTH if rng.random() < 0.8 else int(rng.uniform(0.25, 1.0) * LENGTH)
                clips.append(Clip(finish(make(rng, length), take, rng), labels, split, SYNTHETIC, SYNTHETIC, FREE))
    return clips


# --------------------------------------------------------------- mixtures


def fit(wave: np.ndarray, length: int, rng: Rng) -> np.ndarray:
    """Return `wave` looped from a random start to `length` samples."""
    return np.roll(np.resize(wave, length), int(rng.integers(length)))


FAINT = 12.0  # dB: fainter noise, such as the hiss of old recordings, is not labelled Noise


def mixture(front: Clip, back: Clip, snr: float, condition: str, rng: Rng) -> Clip:
    """Mix `front` with `back` at `snr` dB; the clip has the labels of both, but faint noise adds none."""
    wave = front.wave
    back_labels = () if back.labels == ("Noise",) and snr > FAINT else back.labels
    if len(wave) < LENGTH and condition == "mixture" and (front.split != "train" or rng.random() < 0.6):
        padded = np.zeros(LENGTH, np.float32)
        start = int(rng.integers(0, LENGTH - len(wave) + 1))
        padded[start : start + len(wave)] = wave
        snr -= 10 * np.log10(LENGTH / len(wave))
        wave = padded
    mixed = synth.at_snr(wave, fit(back.wave, len(wave), rng), snr)
    if condition == "mixture":
        mixed = synth.at_peak(mixed, rng.uniform(-18, 0))
    return Clip(
        mixed,
        tuple(dict.fromkeys(front.labels + back_labels)),
        front.split,
        condition,
        "+".join(dict.fromkeys((front.source, back.source))),
        " + ".join(dict.fromkeys((front.license, back.license))),
    )


MIXTURES: tuple[tuple[str, str, tuple[float, float], tuple[int, int, int]], ...] = (
    # front, back, range of the signal-to-noise ratio, clips in train, validation and test
    ("Speech", "Music", (0.0, 15.0), (900, 60, 200)),
    ("Speech", "Noise", (0.0, 20.0), (800, 40, 0)),
    ("Music", "Noise", (0.0, 20.0), (1700, 40, 0)),
    ("effect", "Music", (0.0, 15.0), (350, 20, 0)),
    ("effect", "Speech", (-3.0, 12.0), (300, 20, 0)),
    ("effect", "Noise", (0.0, 20.0), (3300, 72, 0)),
)
OTHER = ""  # clips without labels
EFFECTS = ("Percussion;Drum", "Percussion;Cymbal", "Percussion", "Siren;Alarm", "Alarm", OTHER)


def mixtures(clips: list[Clip], seed: int) -> list[Clip]:
    """Return mixtures of two clips of the same split, with effects balanced by label."""
    mixed = []
    for front, back, (low, high), counts in MIXTURES:
        for split, count in zip(SPLITS, counts, strict=True):
            rng = generator(seed, "mixture", front, back, split)
            pools = {
                label: [c for c in clips if c.split == split and ";".join(c.labels) == label]
                for label in (*EFFECTS, "Speech", "Music", "Noise")
            }
            backs = [c for c in pools[back] if len(c.wave) == LENGTH]
            for index in range(count):
                pool = pools[EFFECTS[index % len(EFFECTS)] if front == "effect" else front]
                mixed.append(
                    mixture(
                        pool[rng.integers(len(pool))],
                        backs[rng.integers(len(backs))],
                        rng.uniform(low, high),
                        "mixture",
                        rng,
                    )
                )
    return mixed


def noisy_copies(clips: list[Clip], seed: int) -> list[Clip]:
    """Return the test clips mixed with noise at 10 dB: half of it synthesised, half recorded."""
    rng = generator(seed, "noisy")
    noises = [c for c in clips if c.split == "test" and c.labels == ("Noise",) and c.source != SYNTHETIC]
    copies = []
    for clip in clips:
        if clip.split != "test" or {"Noise", "Silence"} & set(clip.labels):
            continue
        fresh = Clip(synth.noise(rng, LENGTH), ("Noise",), "test", SYNTHETIC, SYNTHETIC, FREE)
        back = fresh if rng.random() < 0.5 else noises[rng.integers(len(noises))]
        copies.append(mixture(clip, back, 10.0, "noisy", rng))
    return copies


# ------------------------------------------------------------------ build


UNTAUGHT = "Cymbal"  # balances the mixtures but is not written: on the validation split claps were taken for cymbals


def write(clips: list[Clip], output: Path) -> None:
    """Write the clips and then, atomically, the manifest."""
    shutil.rmtree(output / "clips", ignore_errors=True)
    rows = []
    for number, clip in enumerate(clips):
        path = Path("clips", clip.split, f"{number:05d}.flac")
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(output / path), np.clip(clip.wave, -1.0, 32767 / 32768), RATE, subtype="PCM_16")
        labels = ";".join(label for label in clip.labels if label != UNTAUGHT)
        rows.append([path.as_posix(), labels, clip.split, clip.condition, clip.source, clip.license])
    part = output / "manifest.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "label", "split", "condition", "source", "license"])
        table.writerows(rows)
    part.replace(output / "manifest.csv")


def report(clips: list[Clip]) -> None:
    """Print the number of clips by label and split."""
    print(f"{'label':14s}" + "".join(f"{split:>12s}" for split in SPLITS))
    for label in sorted({label for clip in clips for label in clip.labels}):
        counts = [sum(label in c.labels and c.split == split for c in clips) for split in SPLITS]
        print(f"{label:14s}" + "".join(f"{count:12d}" for count in counts))
    print(f"{'clips':14s}" + "".join(f"{sum(c.split == s for c in clips):12d}" for s in SPLITS))


def build(cache: Path, output: Path, seed: int) -> None:
    """Build the data set."""
    clips: list[Clip] = []
    for take in read_takes():
        made = real_clips(take, cache, seed)
        print(f"{take.split:10s} {len(made):5d} {take.package} {';'.join(take.labels) or 'other'}", flush=True)
        clips += made
    clips += synthetic_clips(seed)
    clips += mixtures(clips, seed) + noisy_copies(clips, seed)
    output.mkdir(parents=True, exist_ok=True)
    write(clips, output)
    report(clips)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download and unpack the packages (3 GB, 7.5 GB on disk)")
    two = commands.add_parser("build", help="cut, label and mix the clips (4 minutes on one core)")
    for command in (one, two):
        command.add_argument("--cache", type=Path, required=True, help="folder of the packages")
    two.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DATA",
        help="folder for the clips and manifest.csv; its clips folder is replaced",
    )
    two.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            fetch(args.cache)
        else:
            build(args.cache, args.output, args.seed)
    except (DataError, OSError, soundfile.SoundFileError) as error:
        print(f"sounds_data: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
