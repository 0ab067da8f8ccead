"""What every layout of a data set is read into: one row a sound, with the names of its labels as they stand there."""

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
    """A data set that cannot be used; the message is one line and names the file and what to change."""


class Row(NamedTuple):
    """One sound; see `datasets.Example` for `path`, `start`, `end`, `row` and `group`.

    Attributes:
        path: its file, or the folder of a saved split.
        names: its labels, by name or by id.
        split: one of `SPLITS`; empty where none is named.
        fold: of cross-validation; empty where there is none.
        start: seconds.
        end: seconds.
        row: of a saved split.
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
    """A data set as it lies on disk.

    Attributes:
        rows: its sounds.
        labels: names of the classes in index order, where the layout has one; else empty.
        notes: lines for the user about what was left out or chosen.
        passed_over: files without a class or a sound file's ending.
    """

    rows: list[Row]
    labels: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)
    passed_over: list[pathlib.Path] = dataclasses.field(default_factory=list)


def split_named(name: str) -> str:
    """Return the split that a name or an alias of it stands for, empty where it stands for none."""
    name = name.strip().lower()
    name = SPLIT_ALIASES.get(name, name)
    return name if name in SPLITS else ""


def checked_split(name: str, where: object) -> str:
    """Return what `split_named` does; no name is no split.

    Raises:
        DataError: it stands for none; the message begins with `where`.
    """
    split = split_named(name)
    if name.strip() and not split:
        raise DataError(f"{where}: expected split {', '.join(SPLITS)}, got {name!r}")
    return split


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in a folder and the folders in it, but for hidden ones, in the order of their parts."""

    def stop(error: OSError) -> None:
        raise error  # a folder that may not be read would be missed silently

    found = []
    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)
