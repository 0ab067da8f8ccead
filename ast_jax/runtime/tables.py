"""CSV and tab-separated files with a header: reading, and rows as CSV text."""

from __future__ import annotations

import collections
import csv
import io
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

TAB_SUFFIXES = (".tsv", ".tab")


def read_table(path: pathlib.Path, required: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file and line, {column: value}) for each row of a CSV file in UTF-8; blank lines are skipped.

    A file is tab-separated if its suffix says so, or if its header has tabs and no commas.

    Args:
        path: the file.
        required: the columns that it must have, each as its name followed by its aliases.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another encoding (UnicodeDecodeError), not CSV, a required column missing or under two names, a
            column twice, or a row with more or fewer fields than the header; the message names file and line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        tabs = path.suffix.lower() in TAB_SUFFIXES or ("\t" in first and "," not in first)
        separator = "\t" if tabs else ","
        reader = csv.reader(file, delimiter=separator)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, required, path)
            for values in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(values) != len(header):
                    hint = f"; quote values that contain {separator!r}" if len(values) > len(header) else ""
                    raise ValueError(
                        f"{where}: expected {len(header)} fields as in the header, got {len(values)}{hint}"
                    )
                yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: expected CSV ({error})") from error


def one_of(names: Sequence[str], present: Collection[str], where: object) -> str:
    """Return the one of a column's name and aliases that is present.

    Raises:
        ValueError: none is, or several are; the message begins with `where`.
    """
    found = [name for name in names if name in present]
    if len(found) != 1:
        raise ValueError(f"{where}: expected {' or '.join(names)}, got {'both' if found else 'neither'}")
    return found[0]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV text; its columns are all keys of all rows."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_header(header: list[str], required: Sequence[tuple[str, ...]], path: pathlib.Path) -> None:
    if missing := [names[0] for names in required if not set(names) & set(header)]:
        expected = ", ".join(names[0] for names in required)
        plural = "s" if len(required) > 1 else ""
        raise ValueError(f"{path}: expected the column{plural} {expected}; missing {', '.join(missing)}")
    if doubled := sorted(name for name, count in collections.Counter(header).items() if count > 1):
        raise ValueError(f"{path}: expected each column once, got several of {', '.join(doubled)}")
    for names in required:
        one_of(names, header, path)
