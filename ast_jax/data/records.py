"""`Row` and `Listing`, into which every data set layout is read: one row per clip, with its label names."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation",
                 "eval": "test", "testing": "test"}  # fmt: skip
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"})


class DataError(ValueError):
    """An unusable data set; the message is one line and names the file and what to change."""


class Row(NamedTuple):
    """One clip; see `datasets.Example` for `path`, `start`, `end`, `row` and `group`.

    Attributes:
        path: the audio file, or the folder of a saved split.
        names: the labels, by name or by id.
        split: one of `SPLITS`; empty if the data set does not name one.
        fold: the cross-validation fold; empty if there are none.
        start: seconds.
        end: seconds.
        row: index into a saved split.
        group: speaker or source recording.
    """

    path: pathlib.Path
    names: tuple[str, ...]
    split: str = ""
    fold: str = ""
    start: float = 0.0
    end: float | None = None
    row: int | None = None
    group: str = ""


@dataclasses.dataclass
class Listing:
    """The content of a data set on disk.

    Attributes:
        rows: its clips.
        labels: class names in index order if the layout defines one, else empty.
        notes: lines for the user about files left out and choices made.
        ignored: files without a class or with another suffix than an audio file's.
    """

    rows: list[Row]
    labels: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)
    ignored: list[pathlib.Path] = dataclasses.field(default_factory=list)


def split_named(name: str) -> str:
    """Return the split with this name or alias, or an empty string."""
    name = name.strip().lower()
    name = SPLIT_ALIASES.get(name, name)
    return name if name in SPLITS else ""


def checked_split(name: str, where: object) -> str:
    """Return the split with this name or alias; an empty name gives an empty string.

    Raises:
        DataError: an unknown name; the message begins with `where`.
    """
    split = split_named(name)
    if name.strip() and not split:
        raise DataError(f"{where}: expected split {', '.join(SPLITS)}, got {name!r}")
    return split


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in a folder and its subfolders except hidden ones, sorted by path components."""

    def stop(error: OSError) -> None:
        raise error  # by default os.walk skips an unreadable folder silently

    found = []
    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)


def sound_files(path: str) -> list[str]:
    """Return the sound files in a folder, recursively; the path itself if it is not a folder.

    Raises:
        ValueError: a folder without sound files.
    """
    if not pathlib.Path(path).is_dir():
        return [path]
    found = [str(file) for file in visible_files(pathlib.Path(path)) if file.suffix.lower() in AUDIO_SUFFIXES]
    if not found:
        endings = ", ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{path}: expected a folder with sound files, found none that ends in {endings}")
    return found
