"""Manifests: CSV, TSV and JSONL, and the JSON files of the original AST repository."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ast_jax.audio.io import MIN_SECONDS
from ast_jax.data.records import DataError, Listing, Row, checked_split, split_named
from ast_jax.runtime import tables

# By precedence. `metadata` is the name in Hugging Face's audiofolder.
MANIFESTS = ("manifest.csv", "manifest.tsv", "manifest.jsonl", "metadata.csv", "metadata.jsonl")
PATH_COLUMNS = ("path", "file_name")
LABEL_COLUMNS = ("label", "labels")
LABEL_SEPARATOR = ";"  # AudioSet's own names contain commas
ID_SEPARATOR = ","  # between ids, in the original's JSON
LINE_SUFFIXES = (".jsonl", ".ndjson")


def find_manifests(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the manifests in a folder by precedence."""
    return [folder / name for name in MANIFESTS if (folder / name).is_file()]


def read_manifest(path: pathlib.Path, split: str = "") -> Listing:
    """Read a manifest; the suffix decides its format, see `tables.read_table` for tab-separated files.

    Columns, or keys of the JSON objects in JSONL: `path` or `file_name`, relative to the manifest; `label` or `labels`,
    several separated by ";" or in JSONL a list; optionally `split`, `start` and `end` in seconds, `fold` and `group`.
    Other columns are ignored.

    Args:
        path: the file.
        split: the split of rows without one. By default that is the first folder of the paths in a `metadata` file, if
            it is `train`, `validation` or `test`, as in Hugging Face's audiofolder.

    Raises:
        DataError: a missing or duplicate column, or an invalid row; the message names file and line.
    """
    is_lines = path.suffix.lower() in LINE_SUFFIXES
    fields = _read_lines(path) if is_lines else read_table(path, (PATH_COLUMNS, LABEL_COLUMNS))
    rows = [_row(values, where, path.parent) for where, values in fields]
    if split:
        rows = [row if row.split else row._replace(split=split) for row in rows]
    elif path.stem == "metadata":
        rows = [row if row.split else row._replace(split=_first_folder(row.path, path.parent)) for row in rows]
    return Listing(rows)


def _first_folder(path: pathlib.Path, folder: pathlib.Path) -> str:
    """Return the split named by the first component of a path below a folder."""
    return split_named(path.relative_to(folder).parts[0]) if path.is_relative_to(folder) else ""


def read_table(path: pathlib.Path, required: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file and line, row) of a CSV file, see `tables.read_table`.

    Raises:
        DataError: in place of its ValueError.
    """
    try:
        yield from tables.read_table(path, required)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a CSV manifest in UTF-8 or a folder, got something else") from error
    except ValueError as error:
        raise DataError(str(error)) from error


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and line, JSON object) of a JSONL file; blank lines are skipped."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: expected a JSON object ({error})") from error
                if not isinstance(values, dict):
                    raise DataError(f"{where}: expected a JSON object, got {type(values).__name__}")
                yield where, values
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected JSON lines in UTF-8, got something else") from error


def _value(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    """Return the value of a column under its name or an alias."""
    try:
        return values[tables.one_of(names, values, where)]
    except ValueError as error:
        raise DataError(str(error)) from error


def _row(values: Mapping[str, Any], where: str, folder: pathlib.Path) -> Row:
    """Check one row; CSV has strings only, JSONL also numbers, lists and null."""
    path = _value(values, PATH_COLUMNS, where)
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where}: expected a path, got {repr(path) if path else 'nothing'}")
    labels = _value(values, LABEL_COLUMNS, where)
    names = labels.split(LABEL_SEPARATOR) if isinstance(labels, str) else labels
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: expected labels as a string or a list of strings, got {labels!r}")
    start = _seconds(values.get("start"), "start", where) or 0.0
    end = _seconds(values.get("end"), "end", where)
    if end is not None and end - start < MIN_SECONDS:
        raise DataError(
            f"{where}: expected an end at least {1000 * MIN_SECONDS:.0f} ms after the start {start:g} s, got {end:g} s"
        )
    return Row(
        folder / path,
        tuple(name.strip() for name in names if name.strip()),
        checked_split(_text(values.get("split"), "split", where), where),
        _text(values.get("fold"), "fold", where),
        start,
        end,
        group=_text(values.get("group"), "group", where),
    )


def _text(value: Any, name: str, where: str) -> str:
    """Return a string or an integer as a string; None becomes empty."""
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{where}: expected a string as {name}, got {value!r}")
    return str(value).strip()


def _seconds(value: Any, name: str, where: str) -> float | None:
    """Return seconds, or None for an empty value."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"{where}: expected {name} in seconds, 0 or more, got {value!r}")
    return seconds


def read_original(path: pathlib.Path) -> Listing:
    """Read a JSON file of the original AST repository: {"data": [{"wav": path, "labels": "/m/09x0r,/m/05zppz"}]}.

    Labels are ids (or names without commas), separated by ","; paths may be relative to the file. Source:
    `src/dataloader.py` and `egs/*/prep_*.py` of github.com/YuanGongND/ast.

    Raises:
        DataError: another JSON file, or an invalid entry; the message counts entries from 1.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected JSON in UTF-8 ({error})") from error
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}, got other JSON')
    rows = []
    for number, entry in enumerate(entries, 1):
        wav, labels = (entry.get(key) if isinstance(entry, dict) else None for key in ("wav", "labels"))
        if not isinstance(wav, str) or not isinstance(labels, str) or not wav.strip():
            raise DataError(f'{path}, entry {number}: expected "wav" and "labels" as strings, got {str(entry)[:100]}')
        names = (name.strip() for name in labels.split(ID_SEPARATOR))
        rows.append(Row(path.parent / wav, tuple(filter(None, names))))
    return Listing(rows)


def find_label_file(path: pathlib.Path) -> pathlib.Path | None:
    """Return the label CSV beside one of the original's JSON files or in its parent folder, where its recipes keep it.

    Raises:
        DataError: several label files.
    """
    for folder in (path.absolute().parent, path.absolute().parent.parent):
        found = sorted(folder.glob("*class_labels_indices*.csv"))
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise DataError(f"{path}: expected one label file, found {names}; choose one with --labels")
        if found:
            return found[0]
    return None
