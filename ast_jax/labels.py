"""Class names in index order: the three label sets in the package, and users' label files.

`label_sets/LICENSES.md` has the source of each set and of its index order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import pathlib
from typing import Any

from ast_jax.runtime.tables import read_table

_FOLDER = pathlib.Path(__file__).parent / "label_sets"
LABEL_SETS = {"audioset": "audioset.csv", "speech-commands": "speech_commands.txt", "esc50": "esc50.txt"}


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The classes of a data set.

    Args:
        name: a key of `LABEL_SETS`.
        labels: class names in index order.
    """

    name: str
    labels: tuple[str, ...]


@functools.cache
def label_set(name: str) -> LabelSet:
    """Return a label set of the package.

    Args:
        name: "audioset" (527 classes), "speech-commands" (35) or "esc50" (50).

    Raises:
        ValueError: an unknown name.
    """
    if name not in LABEL_SETS:
        raise ValueError(f"label set: expected one of {', '.join(LABEL_SETS)}, got {name!r}")
    return LabelSet(name, read_labels(_FOLDER / LABEL_SETS[name]))


def label_set_of_size(num_labels: int) -> LabelSet | None:
    """Return the label set with `num_labels` classes (527, 35 or 50), or None."""
    return next((found for found in map(label_set, LABEL_SETS) if len(found.labels) == num_labels), None)


def read_labels(path: str | pathlib.Path) -> tuple[str, ...]:
    """Read class names in index order; surrounding white space is stripped.

    The suffix decides the format; all are UTF-8:
      .json  a list of names, or Hugging Face's `id2label`, an object with the keys "0" to "n-1"
      .csv   a column `display_name`, and optionally `index`, which counts from 0: the `class_labels_indices.csv` of
             AudioSet and of the original AST repository
      other  one name per line; blank lines are skipped

    Raises:
        OSError: the file cannot be opened.
        ValueError: another format or encoding, no names, or a name twice.
    """
    path = pathlib.Path(path)
    ending = path.suffix.lower()
    try:
        if ending == ".json":
            names = _json_names(path)
        elif ending == ".csv":
            names = [row["display_name"] for row in _csv_rows(path)]
        else:
            with path.open(encoding="utf-8-sig") as file:
                names = [line for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected class names in UTF-8, got another encoding ({error})") from error
    if not names:
        raise ValueError(f"{path}: expected class names, got none")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: expected a name for class {index}, got {name!r}")
    labels = tuple(name.strip() for name in names)
    name, count = collections.Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: expected each name once, got {count} of {name!r}")
    return labels


def read_label_ids(path: str | pathlib.Path) -> dict[str, str]:
    """Read the class ids in the optional column `mid` of a `.csv` label file.

    Returns:
        {id: name}; empty without that column and for other formats.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another format, or an id twice.
    """
    path = pathlib.Path(path)
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else []
    ids = {row["mid"].strip(): row["display_name"].strip() for row in rows if "mid" in row}
    if ids and len(ids) < len(rows):
        raise ValueError(f"{path}: expected each mid once, got {len(ids)} different ones in {len(rows)} rows")
    return ids


@functools.cache
def audioset_ids() -> dict[str, str]:
    """Return {id: name} of AudioSet's 527 classes; the id of Speech is "/m/09x0r"."""
    return read_label_ids(_FOLDER / LABEL_SETS["audioset"])


def _json_names(path: pathlib.Path) -> list[Any]:
    """Return the unchecked names in a JSON list or an `id2label`, in index order."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if isinstance(content, dict):
        indices = [str(index) for index in range(len(content))]
        if content.keys() != set(indices):
            other = next(key for key in content if key not in indices)
            raise ValueError(f"{path}: expected the indices 0 to {len(content) - 1} as keys, got {other!r}")
        return [content[index] for index in indices]
    if not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of names or an object with a name for each index, got {type(content).__name__}"
        )
    return content


def _csv_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a column `display_name`; a column `index` must count from 0."""
    rows: list[dict[str, str]] = []
    for where, row in read_table(path, [("display_name",)]):
        if row.get("index", str(len(rows))).strip() != str(len(rows)):
            raise ValueError(f"{where}: expected index {len(rows)}, got {row['index']!r}")
        rows.append(row)
    return rows
