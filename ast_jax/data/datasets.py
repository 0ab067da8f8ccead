"""`read_dataset`: a data set of any layout to labelled examples by split."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ast_jax.audio.io import AudioSource, decode
from ast_jax.config import FrontendConfig
from ast_jax.data import hf_folder, layouts, manifests
from ast_jax.data.records import SPLITS, DataError, Listing, Row
from ast_jax.labels import audioset_ids, label_set, read_label_ids, read_labels
from ast_jax.runtime.fields import check_types

HELD_OUT = 10  # one in 10 examples of each label is held out for validation if the data set names no split
PATHS = ("source", "validation", "test", "label_file")  # fields of `DatasetConfig` that are paths
ID_PREFIX = "/"  # of AudioSet's ids: /m/09x0r, /t/dd00003


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A clip and the indices of its labels.

    Attributes:
        path: the audio file, or the folder of a split saved by Hugging Face's `datasets`.
        targets: indices of the labels.
        start: seconds from the beginning of the file.
        end: seconds from the beginning of the file; None: its end.
        row: index into a saved split.
        group: the speaker or source recording, which must not be in two splits.
    """

    path: pathlib.Path
    targets: tuple[int, ...]
    start: float = 0.0
    end: float | None = None
    row: int | None = None
    group: str = ""

    @property
    def name(self) -> str:
        """The clip's name in messages."""
        row = "" if self.row is None else f", row {self.row}"
        end = "its end" if self.end is None else f"{self.end:g} s"
        return f"{self.path}{row}{f', {self.start:g} s to {end}' if self.start or self.end is not None else ''}"

    @property
    def source(self) -> AudioSource:
        """The audio file that `audio.io.decode` reads: its path or its bytes."""
        return self.path if self.row is None else hf_folder.read_row(self.path, self.row)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples by split.

    Attributes:
        labels: class names in index order.
        splits: the examples of each of `SPLITS`.
        ignored: files in the folder that are not audio files of a class.
        folds: the cross-validation folds in order; empty if there are none.
        notes: lines for the user about files left out and choices made.
    """

    labels: tuple[str, ...]
    splits: dict[str, list[Example]]
    ignored: tuple[pathlib.Path, ...] = ()
    folds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether any example has several labels or none."""
        return any(len(example.targets) != 1 for examples in self.splits.values() for example in examples)

    def reordered(self, labels: Sequence[str]) -> DataSet:
        """Return the same examples with the classes in the order of `labels`."""
        new = {self.labels.index(name): index for index, name in enumerate(labels)}

        def moved(example: Example) -> Example:
            return dataclasses.replace(example, targets=tuple(sorted(new[target] for target in example.targets)))

        splits = {split: list(map(moved, examples)) for split, examples in self.splits.items()}
        return dataclasses.replace(self, labels=tuple(labels), splits=splits)


def load_example(example: Example, frontend: FrontendConfig) -> np.ndarray:
    """Return the samples of an example, truncated to the model's input: [<= frontend.max_samples].

    Raises:
        AudioError: an unusable file, see `read_audio`, or one that ends before `start`.
        FileNotFoundError: the file does not exist.
    """
    length = frontend.max_seconds if example.end is None else min(frontend.max_seconds, example.end - example.start)
    sound = decode(example.source, frontend.sampling_rate, length, example.start)
    return sound.samples[: frontend.max_samples]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The audio files, labels and splits of a data set; `read_dataset` lists the layouts.

    Args:
        source: file or folder.
        validation: another source, of any layout, for the validation split; if it has several splits, its validation
            split.
        test: likewise for the test split.
        label_file: the classes and their order, see `labels.read_labels`; labels may be its names or its ids. By
            default the layout's own order (ESC-50, ClassLabel), AudioSet's for its ids, or alphabetical order.
        fold: the cross-validation fold to validate on; all others, except a test split, are for training. By default
            the last fold if no split is named, which `DataSet.notes` report.

    Raises:
        ValueError: a field of another type.
    """

    source: str | os.PathLike[str]
    validation: str | os.PathLike[str] | None = None
    test: str | os.PathLike[str] | None = None
    label_file: str | os.PathLike[str] | None = None
    fold: str | int | None = None

    def __post_init__(self) -> None:
        """Check the types, and convert paths and the fold to strings for JSON."""
        check_types(self)
        if isinstance(self.fold, int):
            object.__setattr__(self, "fold", str(self.fold))

    @classmethod
    def of(cls, data: DatasetConfig | str | os.PathLike[str]) -> DatasetConfig:
        """Return a configuration unchanged, or one with a path as its source."""
        return data if isinstance(data, DatasetConfig) else cls(data)

    def absolute(self) -> DatasetConfig:
        """Return a copy with absolute paths."""
        paths = {name: getattr(self, name) for name in PATHS}
        known = {name: str(pathlib.Path(path).absolute()) for name, path in paths.items() if path is not None}
        return dataclasses.replace(self, **known)

    def moved_to(self, other: DatasetConfig | str | os.PathLike[str] | None) -> DatasetConfig:
        """Return the same data set at the paths given by `other`; its empty fields keep their paths.

        Raises:
            ValueError: `other` has a source that this data set does not have, or another fold.
        """
        if other is None:
            return self
        new = DatasetConfig.of(other).absolute()
        for field in dataclasses.fields(self):
            name = field.name
            wrong = getattr(self, name) is None if name in PATHS else getattr(new, name) != getattr(self, name)
            if getattr(new, name) is not None and wrong:
                raise ValueError(
                    f"{name}: expected the new path of a source of this run, got {getattr(new, name)!r} where the run "
                    f"has {getattr(self, name)!r}"
                )
        given = {name: getattr(new, name) for name in PATHS if getattr(new, name) is not None}
        return dataclasses.replace(self, **given)


def read_dataset(data: DatasetConfig | str | os.PathLike[str], seed: int = 0) -> DataSet:
    """Read a data set; its layout is detected from the files.

    - A folder with one folder per class, or with folders train, validation and test that have one per class. Files
      with another suffix than an audio file's are listed and ignored, hidden files ignored.
    - A CSV, TSV or JSONL manifest, or a folder with one as manifest.* or metadata.*, see `manifests.read_manifest`.
    - A JSON file of the original AST repository, see `manifests.read_original`, with its label file beside it.
    - ESC-50 and Speech Commands v2 as downloaded.
    - A folder saved by Hugging Face's `datasets`, see `hf_folder.read_saved`.

    If the data set names neither splits nor folds, about a tenth of the examples of each label, drawn with `seed`, is
    held out for validation: at least one of two or more. Segments of one file and examples of one group stay together.

    Args:
        data: the data set; a path is its `source`.
        seed: of the held-out examples.

    Raises:
        DataError: no training example, a single class, missing or duplicate columns, missing files, an invalid row, an
            unknown split or fold, or a label that is not in the label file.
        ValueError: an invalid label file.
        FileNotFoundError: a source does not exist.
    """
    data = DatasetConfig.of(data)
    source, validation, test, label_file, fold = dataclasses.astuple(data)
    listing = _read(pathlib.Path(source))
    rows, notes = listing.rows, listing.notes
    folds = sorted({row.fold for row in rows if row.fold}, key=_natural)
    if fold is not None and fold not in folds:
        raise DataError(f"{source}: expected a fold of {', '.join(folds) or 'a data set with folds'}, got {fold!r}")
    if fold is not None and validation is not None:
        raise DataError(f"{source}: expected either a fold or other data for validation, got both")
    named = any(row.split for row in rows)
    if fold is None and len(folds) > 1 and not named and validation is None:
        fold = folds[-1]
        notes.append(f"{source}: no split is named: fold {fold} of {', '.join(folds)} is for validation")
    if fold is not None:
        rows = [_in_fold(row, fold) for row in rows]
    holds_out = not named and fold is None and validation is None
    labels = listing.labels
    for split, further in (("validation", validation), ("test", test)):
        if further is not None:
            if any(row.split == split for row in rows):
                raise DataError(f"{source}: names a {split} split already; expected no other data for it")
            other = _read(pathlib.Path(further))
            rows = rows + _of_split(other.rows, split, further)
            notes, labels = notes + other.notes, labels or other.labels
            listing.ignored += other.ignored
    _check_files(rows, source)
    if label_file is None and pathlib.Path(source).suffix.lower() == ".json":
        label_file = manifests.find_label_file(pathlib.Path(source))
    labels, index = _label_index(rows, labels, label_file, source)
    splits = _split(rows, index, label_file, source)
    if holds_out:
        splits["train"], splits["validation"] = _hold_out(splits["train"], seed)
    if not splits["train"]:
        raise DataError(f"{source}: no example is in the split 'train'")
    if len(labels) == 1 and all(row.names for row in rows):
        raise DataError(f"{source}: every sound has the one label {labels[0]!r}; expected at least two classes")
    return DataSet(labels, splits, tuple(listing.ignored), tuple(folds), tuple(notes))


def _read(source: pathlib.Path) -> Listing:
    """Read the rows of one source, at least one."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_dir():
        listing = layouts.read_folder(source)
    elif source.suffix.lower() == ".json":
        listing = manifests.read_original(source)
    else:
        listing = manifests.read_manifest(source)
    if not listing.rows:
        raise DataError(f"{source}: expected folders of sound files, one for each class, or a manifest.csv; found none")
    return listing


def _natural(fold: str) -> tuple[bool, int, str]:
    """Return a sort key that puts 2 before 10, and numbers before words."""
    return not fold.isdecimal(), int(fold) if fold.isdecimal() else 0, fold


def _in_fold(row: Row, fold: str) -> Row:
    """Return a row with the split that it has if `fold` is for validation."""
    return row if row.split == "test" else row._replace(split="validation" if row.fold == fold else "train")


def _of_split(rows: list[Row], split: str, source: str | pathlib.Path) -> list[Row]:
    """Return the rows of another source for a split: that split if the source names several, else all rows."""
    names = {row.split for row in rows}
    if len(names) > 1:
        if split not in names:
            raise DataError(f"{source}: expected a split {split!r}, got {', '.join(filter(None, sorted(names)))}")
        rows = [row for row in rows if row.split == split]
    return [row._replace(split=split) for row in rows]


def _check_files(rows: list[Row], source: str | pathlib.Path) -> None:
    """Raise if files are missing; the message counts them."""
    paths = dict.fromkeys(row.path for row in rows if row.row is None)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{source}: {len(missing)} of {len(paths)} files are missing, the first is {missing[0]}")


def _label_index(
    rows: list[Row],
    labels: tuple[str, ...],
    label_file: str | pathlib.Path | None,
    source: str | pathlib.Path,
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names in index order, and the index of each name and id."""
    ids: dict[str, str] = {}
    if label_file is not None:
        labels, ids = read_labels(label_file), read_label_ids(label_file)
    elif not labels:
        labels = tuple(sorted({name for row in rows for name in row.names}))
        marked = [name for name in labels if name.startswith(ID_PREFIX)]
        if marked and audioset_ids().keys() >= set(marked):
            labels, ids = label_set("audioset").labels, audioset_ids()
        elif marked:
            raise DataError(
                f"{source}: its labels are ids such as {marked[0]!r}, which no label file beside it names; "
                "give the class_labels_indices.csv with --labels"
            )
    if not labels:
        raise DataError(f"{source}: expected at least one label, but all are empty")
    numbers = {name: number for number, name in enumerate(labels)}
    return labels, {id: numbers[name] for id, name in ids.items()} | numbers


def _split(
    rows: list[Row], index: dict[str, int], label_file: str | pathlib.Path | None, source: str | pathlib.Path
) -> dict[str, list[Example]]:
    """Return the examples of each split."""
    targets: dict[tuple[str, ...], tuple[int, ...]] = {}  # examples with the same labels share them
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.names not in targets:
            if unknown := [name for name in row.names if name not in index]:
                where = label_file or "the data set's own list of classes"
                raise DataError(f"{source}: {row.path} has the label {unknown[0]!r}, which is not in {where}")
            targets[row.names] = tuple(sorted({index[name] for name in row.names}))
        example = Example(row.path, targets[row.names], row.start, row.end, row.row, row.group)
        splits[row.split or "train"].append(example)
    return splits


def _hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Return the training examples, and about a tenth of the examples of each label, held out for validation.

    Labels are handled from the rarest to the most common, as in iterative stratification (Sechidis, Tsoumakas,
    Vlahavas 2011). A tenth of a label's examples is held out, at least one of two or more, including those held out for
    rarer labels. The unit is a group, or all segments of a file. Units with more examples of a label than still needed,
    or with labels that already have their tenth, are taken last, in an order drawn with `seed`; the last training
    example of a label is never held out. Examples without labels count as a label of their own.
    """
    together = collections.defaultdict(list)
    for number, example in enumerate(examples):
        together[example.group or (example.path, example.row)].append(number)
    units = list(together.values())
    keys = [[key for number in unit for key in _keys(examples[number])] for unit in units]
    members = collections.defaultdict(list)
    for unit, own in enumerate(keys):
        for key in dict.fromkeys(own):
            members[key].append(unit)
    total = collections.Counter(key for own in keys for key in own)
    wanted = {key: max(total[key] // HELD_OUT, min(total[key] - 1, 1)) for key in members}
    count: collections.Counter[tuple[int, ...]] = collections.Counter()
    held: set[int] = set()
    for key in sorted(members, key=lambda key: (total[key], key)):
        order = np.random.default_rng([seed, *key]).permutation(len(members[key]))
        left = max(1, wanted[key] - count[key])
        ranks = {  # has more of this label than needed; examples of labels that already have their tenth
            unit: (keys[unit].count(key) > left, sum(count[other] >= wanted[other] for other in keys[unit]))
            for unit in (members[key][index] for index in order)
        }
        for unit in sorted(ranks, key=ranks.__getitem__):
            if count[key] >= wanted[key]:
                break
            more = collections.Counter(keys[unit])
            if unit not in held and all(count[other] + more[other] < total[other] for other in more):
                held.add(unit)
                count.update(more)
    numbers = {number for unit in held for number in units[unit]}
    kept = [example for number, example in enumerate(examples) if number not in numbers]
    return kept, [examples[number] for number in sorted(numbers)]


def _keys(example: Example) -> list[tuple[int, ...]]:
    """Return the labels of an example as `_hold_out` counts them; an empty key for none."""
    return [(target,) for target in example.targets] or [()]
