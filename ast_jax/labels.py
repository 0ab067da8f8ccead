"""Names of classes in index order: the three label sets that come with the package, and label files of users.

`label_sets/LICENSES.md` says where the sets come from and whose index order each has.
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
        labels: names of the classes in index order.
    """

    name: str
    labels: tuple[str, ...]


@functools.cache
def label_set(name: str) -> LabelSet:
    """Return a label set that comes with the package.

    Args:
        name: "audioset" (527 classes), "speech-commands" (35) or "esc50" (50).

    Raises:
        ValueError: there is no such set.
    """
    if name not in LABEL_SETS:
        raise ValueError(f"label set: expected one of {', '.join(LABEL_SETS)}, got {name!r}")
    return LabelSet(name, read_labels(_FOLDER / LABEL_SETS[name]))


def label_set_of_size(num_labels: int) -> LabelSet | None:
    """Return the label set with so many classes (527, 35, 50), None where there is none."""
    return next((found for found in map(label_set, LABEL_SETS) if len(found.labels) == num_labels), None)


def read_labels(path: str | pathlib.Path) -> tuple[str, ...]:
    """Read the names of classes, in index order and without the white space around them.

    The file's ending tells its format; all are UTF-8:
      .json  a list of names, or an object with a name for each index "0" to "n-1", Hugging Face's `id2label`
      .csv   a column `display_name`, and `index`, where there is one, from 0 to n-1 in this order: the
             `class_labels_indices.csv` of AudioSet and of the original AST repository
      other  a name a line; blank lines are skipped

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, has no names, or has a name twice; the message has what was expected and came.
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
        raise ValueError(f"{path}: expected names of classes in UTF-8, got another encoding ({error})") from error
    if not names:
        raise ValueError(f"{path}: expected names of classes, got none")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: expected a name for class {index}, got {name!r}")
    labels = tuple(name.strip() for name in names)
    name, count = collections.Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: expected each name once, got {count} of {name!r}")
    return labels


def read_label_ids(path: str | pathlib.Path) -> dict[str, str]:
    """Read the ids of the classes in a `.csv` file for `read_labels`: the column `mid` where there is one.

    Returns:
        {id: name}, empty for files of other kinds and without that column.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, or has an id twice.
    """
    path = pathlib.Path(path)
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else []
    ids = {row["mid"].strip(): row["display_name"].strip() for row in rows if "mid" in row}
    if ids and len(ids) < len(rows):
        raise ValueError(f"{path}: expected each mid once, got {len(ids)} different ones in {len(rows)} rows")
    return ids


@functools.cache
def audioset_ids() -> dict[str, str]:
    """Return the names of AudioSet's 527 classes by their ids, such as "/m/09x0r" for Speech."""
    return read_label_ids(_FOLDER / LABEL_SETS["audioset"])


def _json_names(path: pathlib.Path) -> list[Any]:
    """Return what stands for the names in a JSON list or an `id2label`, in index order."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if isinstance(content, dict):
        indices = [str(index) for index in range(len(content))]
        if content.keys() != set(indices):
            odd = next(key for key in content if key not in indices)
            raise ValueError(f"{path}: expected the indices 0 to {len(content) - 1} as keys, got {odd!r}")
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
