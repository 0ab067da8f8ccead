"""Render a data set of musical instruments from SoundFonts of Debian 12, split by SoundFont.

    python tools/instruments_data.py --output DATA [--cache CACHE]

Fourteen classes of single notes, phrases and chords at 16 kHz, 2.5 s each. Needs `fluidsynth`, `timidity` and a
Debian 12 system for `apt-get download`. The SoundFonts come from five packages (190 MB), each in one split only; before
rendering, the samples are checked for recordings that occur in two splits. The same packages, programs and --seed give
the same data.

Writes DATA/clips/**.flac and, last, DATA/manifest.csv with the columns path, label, split, group, source and license;
`group` is the source's General MIDI program.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import itertools
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr
from sounds import synth
from sounds.cut import SPLITS, DataError
from sounds.synth import RATE, Rng
from sounds_data import fetch_package, generator

LENGTH = 40_000  # samples of a clip: 2.5 s
RENDER_RATE = 48_000  # synthesizers resample without an anti-aliasing filter; at this rate aliases lie above 8 kHz
SLOT = 4_000  # ms from one clip to the next in a rendered file
CUT_OFF = 2_600  # ms into a slot at which all notes are cut off, before the next clip

# Classes: General MIDI programs (from 0), each with the lowest and highest pitch of the instrument.
INSTRUMENTS: dict[str, dict[int, tuple[int, int]]] = {
    "Piano": {0: (33, 96), 1: (33, 96), 3: (40, 88)},
    "Electric piano": {4: (36, 88), 5: (36, 88)},
    "Mallet percussion": {9: (77, 100), 11: (53, 89), 12: (45, 91), 13: (65, 96)},
    "Organ": {16: (36, 84), 17: (36, 84), 18: (36, 84), 19: (36, 84)},
    "Accordion": {21: (53, 89), 23: (50, 86)},
    "Guitar": {24: (40, 79), 25: (40, 79), 26: (40, 79), 27: (40, 79)},
    "Distorted guitar": {29: (40, 76), 30: (40, 76)},
    "Bass": {32: (28, 55), 33: (28, 55), 34: (28, 55), 35: (28, 55)},
    "Strings": {40: (55, 93), 41: (48, 81), 42: (36, 69), 44: (48, 84), 48: (40, 88)},
    "Choir": {52: (48, 77), 53: (48, 77)},
    "Brass": {56: (55, 82), 57: (40, 69), 58: (29, 53), 60: (41, 72), 61: (48, 77)},
    "Saxophone": {64: (56, 85), 65: (49, 78), 66: (44, 73), 67: (37, 66)},
    "Reeds": {68: (58, 86), 69: (52, 79), 70: (34, 68), 71: (50, 86)},
    "Flute": {72: (74, 98), 73: (60, 93), 74: (65, 91), 75: (60, 88)},
}
CHORDS = frozenset(INSTRUMENTS) - {
    "Bass",
    "Saxophone",
    "Reeds",
    "Flute",
}  # polyphonic classes
SCALE = (0, 2, 4, 5, 7, 9, 11)


@dataclasses.dataclass(frozen=True)
class Source:
    """A SoundFont or a folder of Gravis patches.

    Args:
        package: Debian 12 package.
        file: the SoundFont, or the folder of patches (`NNN_name.pat` by program), in the package.
        split: its split.
        license: licence of the recordings, from the package's copyright file or the SoundFont.
        clips: number of clips per class.
        without: programs to exclude, as their recordings are in another split too.
    """

    package: str
    file: str
    split: str
    license: str
    clips: int
    without: frozenset[int] = frozenset()


# Programs of A320U.sf2 with recordings that are also in TimGM6mb or FreePats: the first six bit-exact, as `check_apart`
# finds; the others filtered or at another level, with a correlation of up to 0.999 between single dry notes.
AIRFONT_SHARED = frozenset({5, 9, 19, 35, 48, 74} | {13, 16, 17, 26, 57, 58, 61, 70})

SOURCES = (
    Source("minuet-data", "usr/share/minuet/soundfonts/GeneralUser-v1.47.sf2", "train", "GeneralUser GS 2.0", 34),
    Source("timgm6mb-soundfont", "usr/share/sounds/sf2/TimGM6mb.sf2", "train", "GPL-2", 34),
    Source("freepats", "usr/share/midi/freepats/Tone_000", "train", "GPL-2+ with FreePats exception", 34),
    Source("denemo-data", "usr/share/sounds/sf2/A320U.sf2", "validation", "GPL-2", 14, AIRFONT_SHARED),
    Source("fluid-soundfont-gm", "usr/share/sounds/sf2/FluidR3_GM.sf2", "test", "MIT", 24),
)


@dataclasses.dataclass(frozen=True)
class Note:
    """A note: start and end in ms from the clip's start, MIDI pitch and velocity."""

    start: int
    end: int
    pitch: int
    velocity: int


@dataclasses.dataclass(frozen=True)
class Clip:
    """The score of a clip."""

    label: str
    program: int
    notes: tuple[Note, ...]


# ------------------------------------------------------------ recordings


def chunks(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each RIFF chunk."""
    while start + 8 <= end:
        name, size = struct.unpack_from("<4sI", content, start)
        yield name, start + 8, start + 8 + size
        start += 8 + size + size % 2


def soundfont_recordings(path: pathlib.Path) -> dict[int, list[np.ndarray]]:
    """Return the recordings (int16) of a SoundFont 2 file by program of bank 0."""
    content = path.read_bytes()
    tables: dict[bytes, bytes] = {}
    for _, start, end in chunks(content, 12, len(content)):
        if content[start : start + 4] in (b"sdta", b"pdta"):
            tables |= {name: content[at:to] for name, at, to in chunks(content, start + 4, end)}
    samples = np.frombuffer(tables[b"smpl"], "<i2")
    headers = [row[1:3] for row in struct.iter_unpack("<20sIIIIIBbHH", tables[b"shdr"])]

    def links(zones: bytes, generators: bytes, kind: int, first: int, last: int) -> set[int]:
        """Return the amounts of generators of a kind in zones `first` to `last` - 1."""
        starts = [row[0] for row in struct.iter_unpack("<HH", tables[zones])]
        rows = list(struct.iter_unpack("<HH", tables[generators]))[starts[first] : starts[last]]
        return {amount for name, amount in rows if name == kind}

    first_zones = [row[1] for row in struct.iter_unpack("<20sH", tables[b"inst"])]
    presets = list(struct.iter_unpack("<20sHHHIII", tables[b"phdr"]))
    recordings: dict[int, list[np.ndarray]] = {}
    for (_, program, bank, first, *_), (_, _, _, last, *_) in itertools.pairwise(presets):
        if bank == 0:
            instruments = links(b"pbag", b"pgen", 41, first, last)
            found = set().union(*(links(b"ibag", b"igen", 53, first_zones[i], first_zones[i + 1]) for i in instruments))
            recordings[program] = [samples[slice(*headers[index])] for index in sorted(found)]
    return recordings


def patch_recordings(folder: pathlib.Path) -> dict[int, list[np.ndarray]]:
    """Return the recordings of a folder of Gravis patches by program, as int16."""
    recordings: dict[int, list[np.ndarray]] = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9]_*.pat")):
        content, at = path.read_bytes(), 239  # the headers of file, instrument and layer
        found = recordings.setdefault(int(path.name[:3]), [])
        for _ in range(content[198]):
            size, mode = struct.unpack_from("<I", content, at + 8)[0], content[at + 55]
            wide, unsigned = mode & 1, mode & 2
            data = content[at + 96 : at + 96 + size - (size % 2 if wide else 0)]
            wave = np.frombuffer(data, "<i2" if wide else "i1").astype(np.int16) << (0 if wide else 8)
            found.append(wave ^ np.int16(-32768) if unsigned else wave)
            at += 96 + size
    return recordings


def recordings_of(source: Source, cache: pathlib.Path) -> dict[int, list[np.ndarray]]:
    """Return the recordings of a source by program, for the programs of the classes that are not excluded."""
    path = file_of(source, cache)
    found = patch_recordings(path) if path.is_dir() else soundfont_recordings(path)
    wanted = {program for programs in INSTRUMENTS.values() for program in programs} - source.without
    return {program: found[program] for program in sorted(wanted & set(found))}


WINDOW = 24  # consecutive samples that agree only if one recording is a copy of the other


def fingerprint(wave: np.ndarray) -> np.ndarray:
    """Return sorted hashes of about one in sixteen windows of a recording, selected by content, not by position.

    Cut, concatenated and renamed copies of a recording share them. Nearly constant windows are skipped.
    """
    if len(wave) < WINDOW:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)
    hashes = np.zeros(len(windows), np.uint64)
    for column in range(WINDOW):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + windows[:, column].astype(np.uint64)
    chosen = np.flatnonzero(hashes >> np.uint64(60) == 0)
    return np.unique(hashes[chosen][np.ptp(windows[chosen].astype(np.int32), axis=1) > 100])


def programs_with(everything: np.ndarray, programs: dict[int, list[np.ndarray]]) -> list[int]:
    """Return the programs with a recording, given as a `fingerprint`, of which at least a tenth is in `everything`."""

    def has_part(marks: np.ndarray) -> bool:
        if not len(marks) or not len(everything):
            return False
        nearest = np.minimum(np.searchsorted(everything, marks), len(everything) - 1)
        return bool((everything[nearest] == marks).mean() >= 0.1)

    return [program for program, recordings in programs.items() if any(map(has_part, recordings))]


def check_apart(recordings: dict[Source, dict[int, list[np.ndarray]]]) -> None:
    """Check that no two splits share a recording.

    Raises:
        DataError: they do; the message names the programs.
    """
    marks = {
        source: {program: [fingerprint(wave) for wave in waves] for program, waves in programs.items()}
        for source, programs in recordings.items()
    }
    for other, programs in marks.items():
        everything = np.unique(np.concatenate([mark for waves in programs.values() for mark in waves]))
        for one in marks:
            found = programs_with(everything, marks[one]) if one.split != other.split else []
            if found:
                raise DataError(
                    f"{one.package}: expected recordings that {other.package} does not have, got shared ones in "
                    f"programs {', '.join(map(str, found))}; leave these out of one of the two"
                )


# ----------------------------------------------------------------- music


def draw_notes(label: str, low: int, high: int, rng: Rng) -> tuple[Note, ...]:
    """Return a note, a chord or a phrase in a range of pitches that ends before the clip does."""
    kind = rng.choice(["note", "phrase", "chord"], p=[0.4, 0.4, 0.2] if label in CHORDS else [0.5, 0.5, 0.0])
    velocity = int(rng.integers(50, 121))
    start = int(rng.integers(20, 200))
    root = int(rng.integers(low, high + 1))
    if kind == "note":
        return (Note(start, start + int(rng.integers(500, 2000)), root, velocity),)
    pitches = [pitch for octave in range(-4, 5) for pitch in (root + 12 * octave + step for step in SCALE)]
    pitches = [pitch for pitch in pitches if low <= pitch <= high]
    at = pitches.index(root)
    if kind == "chord":
        end = start + int(rng.integers(700, 2000))
        return tuple(Note(start, end, pitch, velocity) for pitch in pitches[at : at + 5 : 2])
    beat = int(rng.integers(150, 600))
    notes = []
    while start + beat < 2300:
        loud = int(np.clip(velocity + rng.integers(-12, 13), 40, 127))
        notes.append(Note(start, start + int(beat * rng.uniform(0.6, 1.0)), pitches[at], loud))
        at = int(np.clip(at + rng.integers(-3, 4), 0, len(pitches) - 1))
        start += beat * int(rng.choice([1, 1, 1, 2]))
    return tuple(notes)


def draw_clips(source: Source, programs: set[int], seed: int) -> list[Clip]:
    """Return the clips of a source: the same number for each class, round-robin over the programs that it has.

    Raises:
        DataError: it has no program of a class.
    """
    clips = []
    for label, ranges in INSTRUMENTS.items():
        rng = generator(seed, source.package, label)
        usable = sorted(programs & set(ranges))
        if not usable:
            raise DataError(f"{source.package}: expected a program of the class {label}, got none; take another source")
        for number in range(source.clips):
            program = usable[number % len(usable)]
            clips.append(Clip(label, program, draw_notes(label, *ranges[program], rng)))
    return clips


def midi(clips: list[Clip]) -> bytes:
    """Return a MIDI file that plays a clip in each `SLOT`, with ticks of 1 ms."""
    events: list[tuple[int, int, bytes]] = []  # time, order at equal times, message
    for index, clip in enumerate(clips):
        begin = index * SLOT
        events.append((begin, 1, bytes([0xC0, clip.program])))
        events.append((begin + CUT_OFF, 0, bytes([0xB0, 120, 0])))  # all sound off
        for note in clip.notes:
            events.append((begin + note.start, 3, bytes([0x90, note.pitch, note.velocity])))
            events.append((begin + note.end, 2, bytes([0x80, note.pitch, 0])))
    track = b"\x00\xff\x51\x03" + (500_000).to_bytes(3, "big")  # microseconds for the header's 500 ticks
    now = 0
    for when, _, message in sorted(events):
        track += variable_length(when - now) + message
        now = when
    track += variable_length(SLOT - CUT_OFF) + b"\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500) + b"MTrk" + struct.pack(">I", len(track)) + track


def variable_length(value: int) -> bytes:
    """Return a MIDI variable-length quantity."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


# ------------------------------------------------------------- rendering


def file_of(source: Source, cache: pathlib.Path) -> pathlib.Path:
    """Return the path of a source's SoundFont or folder of patches in the cache."""
    return cache / "root" / source.package / source.file


def render(source: Source, clips: list[Clip], cache: pathlib.Path) -> list[np.ndarray]:
    """Render the clips without effects, 2.5 s at 16 kHz each.

    Raises:
        DataError: the synthesizer is not installed or fails, or a clip is silent.
    """
    with tempfile.TemporaryDirectory() as scratch:
        song, wav, path = pathlib.Path(scratch, "song.mid"), pathlib.Path(scratch, "song.wav"), file_of(source, cache)
        song.write_bytes(midi(clips))
        if path.is_dir():
            settings = pathlib.Path(scratch, "timidity.cfg")
            patches = "".join(f"{int(file.name[:3])} {file.name}\n" for file in sorted(path.glob("*.pat")))
            settings.write_text(f"dir {path.absolute()}\nbank 0\n{patches}", encoding="utf-8")
            dry = ["-EFreverb=d", "-EFchorus=d", "-EFdelay=d"]
            command = [
                "timidity",
                "-c",
                settings,
                *dry,
                "--preserve-silence",
                "-OwM",
                "-s",
                RENDER_RATE,
                "-A",
                40,
                "-o",
                wav,
                song,
            ]
        else:
            quiet = ["-n", "-i", "-q", "-R", "0", "-C", "0", "-g", "0.3"]
            command = ["fluidsynth", *quiet, "-r", RENDER_RATE, "-O", "float", "-T", "wav", "-F", wav, path, song]
        if shutil.which(command[0]) is None:
            raise DataError(f"{command[0]} not found: install the package {command[0]}")
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode or not wav.exists():
            raise DataError(f"{command[0]} cannot play {path.name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        sound, rate = soundfile.read(str(wav), dtype="float32", always_2d=True)
    mono = soxr.resample(sound.mean(axis=1), rate, RATE)
    slot = SLOT * RATE // 1000
    mono = np.pad(mono, (0, max(0, len(clips) * slot - len(mono))))  # timidity stops after the last note
    waves = [mono[index * slot : index * slot + LENGTH] for index in range(len(clips))]
    for clip, wave in zip(clips, waves, strict=True):
        if np.abs(wave).max() < 1e-3:
            raise DataError(f"{source.package}: expected sound of program {clip.program} ({clip.label}), got silence")
    return waves


def finish(wave: np.ndarray, rng: Rng) -> np.ndarray:
    """Return a clip with a noise floor 40 to 65 dB below it, at a peak of -20 to -1 dBFS."""
    floor = synth.coloured(rng, len(wave), rng.uniform(0, 6))
    return synth.at_peak(synth.at_snr(wave, floor, rng.uniform(40, 65)), rng.uniform(-20, -1))


def build(output: pathlib.Path, cache: pathlib.Path, seed: int) -> None:
    """Build the data set, and print the number of clips by class and split."""
    for source in SOURCES:
        fetch_package(source.package, cache)
    recordings = {source: recordings_of(source, cache) for source in SOURCES}
    check_apart(recordings)
    shutil.rmtree(output / "clips", ignore_errors=True)
    rows: list[dict[str, str]] = []
    for source in SOURCES:
        clips = draw_clips(source, set(recordings[source]), seed)
        rng = generator(seed, source.package, "finish")
        for number, (clip, wave) in enumerate(zip(clips, render(source, clips, cache), strict=True)):
            path = pathlib.Path("clips", source.split, f"{source.package}-{number:04d}.flac")
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(str(output / path), finish(wave, rng), RATE, subtype="PCM_16")
            rows.append({
                "path": path.as_posix(), "label": clip.label, "split": source.split,
                "group": f"{source.package}/{clip.program:03d}", "source": source.package, "license": source.license,
            })  # fmt: skip
    part = output / "manifest.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    part.replace(output / "manifest.csv")
    counts = collections.Counter((row["label"], row["split"]) for row in rows)
    print(f"{'':20s}" + "".join(f"{split:>12s}" for split in SPLITS))
    for label in INSTRUMENTS:
        print(f"{label:20s}" + "".join(f"{counts[label, split]:12d}" for split in SPLITS))
    print(f"{'clips':20s}" + "".join(f"{sum(row['split'] == split for row in rows):12d}" for split in SPLITS))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        required=True,
        metavar="DATA",
        help="folder of the data set; its clips are replaced",
    )
    parser.add_argument("--cache", type=pathlib.Path, help="folder of the packages (default: DATA.cache)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    args = parser.parse_args(argv)
    try:
        build(args.output, args.cache or args.output.with_name(args.output.name + ".cache"), args.seed)
    except (DataError, OSError, soundfile.SoundFileError) as error:
        print(f"instruments_data: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
