"""Folders written by `save_to_disk` of Hugging Face's `datasets`: their labels, and single rows.

The library is imported on demand and does not decode: audio is read as the bytes of its files.
"""

from __future__ import annotations

import functools
import io
import pathlib
from types import ModuleType
from typing import Any

from ast_jax.data.records import DataError, Listing, Row, checked_split

STATE_FILE = "state.json"  # of one split
SPLITS_FILE = "dataset_dict.json"  # of a folder of splits
LABEL_COLUMNS = ("label", "labels", "category", "categories", "class", "classes")


class NamedBytes(io.BytesIO):
    """The bytes of an audio file, with a name for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


def is_saved(folder: pathlib.Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / STATE_FILE).is_file() or (folder / SPLITS_FILE).is_file()


def read_saved(folder: pathlib.Path) -> Listing:
    """Read the labels of a saved `Dataset`, or of a `DatasetDict`, whose keys are the splits.

    The audio is the column of type Audio. The labels are the column named as in `LABEL_COLUMNS`, or the only one of
    type ClassLabel, and hold ClassLabel or strings, or lists of these. Columns `fold` and `group` are read too.

    Raises:
        DataError: the library is missing, the folder is damaged, or a column is missing or of another type.
    """
    if not (folder / SPLITS_FILE).is_file():
        return _read_split(folder, "")
    whole = Listing([])
    for split_folder in sorted(path for path in folder.iterdir() if is_saved(path)):
        listing = _read_split(split_folder, checked_split(split_folder.name, folder))
        whole.rows += listing.rows
        whole.labels = whole.labels or listing.labels
    return whole


def read_row(folder: pathlib.Path, row: int) -> pathlib.Path | NamedBytes:
    """Return the audio file in a row: its bytes, or its path if the data set only refers to it.

    Folders stay open in a process that has read a row.

    Raises:
        DataError: as `read_saved`, or the row has no audio.
    """
    dataset, column = _open_sounds(folder)
    sound = dataset[row][column]
    if sound and sound["bytes"] is not None:
        return NamedBytes(sound["bytes"], f"{folder}, row {row}")
    if sound and sound["path"]:
        return folder / sound["path"]
    raise DataError(f"{folder}, row {row}: expected audio, got none")


def _library() -> ModuleType:
    """Import the library."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading a folder of Hugging Face's datasets needs that library: pip install datasets"
        ) from error
    return datasets


def _load(folder: pathlib.Path) -> Any:
    """Open one split, memory-mapped."""
    library = _library()
    try:
        return library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # from damaged JSON and Arrow files
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: expected a folder written by save_to_disk, got a damaged one ({reason})") from error


@functools.lru_cache(maxsize=64)
def _open_sounds(folder: pathlib.Path) -> tuple[Any, str]:
    """Return one split with its audio column as {"bytes", "path"}, and the column's name."""
    dataset, library = _load(folder), _library()
    name = _audio_column(dataset, folder)
    return dataset.select_columns([name]).with_format(None).cast_column(name, library.Audio(decode=False)), name


def _audio_column(dataset: Any, folder: pathlib.Path) -> str:
    """Return the name of the audio column."""
    found = [name for name, feature in dataset.features.items() if isinstance(feature, _library().Audio)]
    if len(found) != 1:
        raise DataError(
            f"{folder}: expected one column of type Audio, got {', '.join(found) or 'none'} of "
            f"{', '.join(dataset.features)}; use cast_column(..., datasets.Audio()) or remove_columns, then save again"
        )
    return found[0]


def _read_split(folder: pathlib.Path, split: str) -> Listing:
    """Read the labels of one split."""
    dataset = _load(folder)
    _audio_column(dataset, folder)
    label = _label_column(dataset, folder)
    wanted = [label, *(name for name in ("fold", "group") if name in dataset.features)]
    columns = dataset.select_columns(wanted).with_format(None)[:]
    names = tuple(name.strip() for name in getattr(_element(dataset.features[label]), "names", ()))
    rows = []
    for number, value in enumerate(columns[label]):
        values = value if isinstance(value, list) else [value]
        if names:
            valid = all(isinstance(one, int) and 0 <= one < len(names) for one in values)  # -1 means unknown
            values = [names[one] for one in values] if valid else [None]
        if not all(isinstance(one, str) for one in values):
            raise DataError(f"{folder}, row {number}: expected labels, got {value!r}")
        extras = {name: str(columns[name][number]) for name in wanted[1:] if columns[name][number] is not None}
        found = tuple(filter(None, map(str.strip, values)))
        rows.append(Row(folder, found, split, extras.get("fold", ""), row=number, group=extras.get("group", "")))
    return Listing(rows, names)


def _element(feature: Any) -> Any:
    """Return the type of a list's elements, or a type that is not a list itself."""
    return getattr(feature, "feature", feature)


def _label_column(dataset: Any, folder: pathlib.Path) -> str:
    """Return the name of the label column."""
    library = _library()
    by_type = [name for name, one in dataset.features.items() if isinstance(_element(one), library.ClassLabel)]
    by_name = [name for name in LABEL_COLUMNS if name in dataset.features]
    if not by_name and len(by_type) != 1:
        raise DataError(
            f"{folder}: expected a column label or labels, or one of type ClassLabel, got {', '.join(dataset.features)}"
        )
    chosen = (by_name or by_type)[0]
    element = _element(dataset.features[chosen])
    is_text = getattr(element, "dtype", None) in ("string", "large_string")
    if not is_text and not isinstance(element, library.ClassLabel):
        raise DataError(
            f"{folder}: expected names in the column {chosen!r} (ClassLabel or string), got {element}; "
            "use cast_column with datasets.ClassLabel(names=...), then save again"
        )
    return chosen
