"""Folder layouts: a folder per class, with or without folders of splits, ESC-50 and Speech Commands as downloaded."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from ast_jax.data import hf_folder
from ast_jax.data.manifests import find_manifests, read_manifest, read_table
from ast_jax.data.records import AUDIO_SUFFIXES, SPLITS, DataError, Listing, Row, split_named, visible_files

ESC50_TABLE = pathlib.PurePath("meta", "esc50.csv")
ESC50_COLUMNS = ("filename", "fold", "target", "category", "src_file")
COMMAND_LISTS = {"validation_list.txt": "validation", "testing_list.txt": "test"}
BACKGROUND = "_background_noise_"
COMMAND_TEXTS = ("README.md", "LICENSE", f"{BACKGROUND}/README.md", *COMMAND_LISTS)
SPEAKER_END = "_nohash_"


def read_folder(source: pathlib.Path) -> Listing:
    """Read a folder; its layout is detected from its content.

    Raises:
        DataError: a damaged table or list of files, or folders of splits beside folders of classes.
    """
    if find_manifests(source):
        return _read_listed(source)
    if (source / ESC50_TABLE).is_file():
        return _read_esc50(source)
    if all((source / name).is_file() for name in COMMAND_LISTS):
        return _read_speech_commands(source)
    if hf_folder.is_saved(source):
        return hf_folder.read_saved(source)
    folders = [entry for entry in _visible(source) if entry.is_dir()]
    splits = [folder for folder in folders if split_named(folder.name)]
    if len(splits) >= 2 or (splits and len(splits) == len(folders)):
        return _read_splits(source, folders)
    return _read_classes(source)


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the entries of a folder except hidden ones, such as macOS's `._x.wav`."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_listed(folder: pathlib.Path, split: str = "") -> Listing:
    """Read the manifest in a folder."""
    found = find_manifests(folder)
    listing = read_manifest(found[0], split)
    if others := [path.name for path in found[1:]]:
        listing.notes.append(f"{found[0]} is read; {', '.join(others)} beside it is ignored")
    return listing


def _read_splits(source: pathlib.Path, folders: list[pathlib.Path]) -> Listing:
    """Read folders train, validation and test, each with a folder per class or a manifest (audiofolder)."""
    names = [split_named(folder.name) for folder in folders]
    if "" in names:
        raise DataError(
            f"{source}: expected folders of splits or folders of classes, got both, {folders[names.index('')].name!r} "
            f"among the splits; move it away or write a manifest.csv"
        )
    if doubled := [split for split in SPLITS if names.count(split) > 1]:
        raise DataError(f"{source}: expected one folder per split, got several for {doubled[0]!r}")
    whole = Listing([], ignored=[path for path in _visible(source) if not path.is_dir()])
    for folder, split in zip(folders, names, strict=True):
        listing = _read_listed(folder, split) if find_manifests(folder) else _read_classes(folder, split)
        if not listing.rows:
            raise DataError(f"{folder}: expected folders of sound files, one for each class, or a manifest; found none")
        whole.rows += listing.rows
        whole.notes += listing.notes
        whole.ignored += listing.ignored
    return whole


def _read_classes(source: pathlib.Path, split: str = "") -> Listing:
    """Read a folder per class, and list the files without a class or with another suffix; a class may be a symlink."""
    listing = Listing([])
    for entry in _visible(source):
        if not entry.is_dir():
            listing.ignored.append(entry)
            continue
        for path in visible_files(entry):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                listing.rows.append(Row(path, (entry.name,), split))
            else:
                listing.ignored.append(path)
    return listing


def _read_esc50(source: pathlib.Path) -> Listing:
    """Read ESC-50 (Piczak 2015) as in its repository: meta/esc50.csv and audio/; labels in the order of `target`.

    Clips from one recording share `src_file` and are in one fold.
    """
    rows: list[Row] = []
    categories: dict[int, str] = {}
    for where, values in read_table(source / ESC50_TABLE, [(name,) for name in ESC50_COLUMNS]):
        target, category = values["target"].strip(), values["category"].strip()
        if not target.isdecimal() or not category or categories.setdefault(int(target), category) != category:
            raise DataError(f"{where}: expected one category per integer target, got {target!r}, {category!r}")
        path = source / "audio" / values["filename"]
        rows.append(Row(path, (category,), fold=values["fold"].strip(), group=values["src_file"].strip()))
    labels = tuple(categories[target] for target in sorted(categories))
    if len(set(labels)) < len(labels):
        raise DataError(f"{source / ESC50_TABLE}: expected one target per category, got several")
    return Listing(rows, labels)


def _read_speech_commands(source: pathlib.Path) -> Listing:
    """Read Speech Commands v2 (Warden 2018) as downloaded: a folder per word, and lists of validation and test files.

    Files in neither list are training examples. File names begin with the speaker, which becomes the group.
    `_background_noise_` has long recordings without words and is not a class.
    """
    split_of = {name: split for file, split in COMMAND_LISTS.items() for name in _lines(source / file)}
    found, listing = _read_classes(source), Listing([])
    for row in found.rows:
        split = split_of.pop(row.path.relative_to(source).as_posix(), "train")
        if row.names != (BACKGROUND,):
            listing.rows.append(row._replace(split=split, group=row.path.name.partition(SPEAKER_END)[0]))
    # The rest is listed but not on disk; `datasets` reports it with all other missing files.
    listing.rows += [Row(source / name, (pathlib.PurePath(name).parts[0],), split) for name, split in split_of.items()]
    known = {source / name for name in COMMAND_TEXTS}
    listing.ignored = [path for path in found.ignored if path not in known]
    if background := len(found.rows) + len(split_of) - len(listing.rows):
        listing.notes.append(f"{source / BACKGROUND} is not a class: its {background} files are left out")
    return listing


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Yield the entries of a list of Speech Commands files, each word/file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a list of files in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(pathlib.PurePath(line.strip()).parts) != 2:
            raise DataError(f"{path}, line {number}: expected word/file, got {line.strip()!r}")
        yield line.strip()
