"""Data sets on disk to examples: files, labels and splits, whatever the layout."""

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
from ast_jax.runtime.progress import progress

HELD_OUT = 10  # one example in so many of each label becomes validation where the data set names no split
PATHS = ("source", "validation", "test", "label_file")  # fields of `DatasetConfig` that are paths
ID_MARK = "/"  # what AudioSet's ids begin with: /m/09x0r, /t/dd00003


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One sound and the indices of its labels.

    Attributes:
        path: its file, or the folder of a split that Hugging Face's `datasets` saved.
        targets: indices of its labels.
        start: seconds into the file at which it begins.
        end: seconds into the file at which it ends; None for the file's end.
        row: of such a folder, where `path` is one.
        group: what it shares with others that must not stand in two splits: a speaker, a source recording.
    """

    path: pathlib.Path
    targets: tuple[int, ...]
    start: float = 0.0
    end: float | None = None
    row: int | None = None
    group: str = ""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        row = "" if self.row is None else f", row {self.row}"
        end = "its end" if self.end is None else f"{self.end:g} s"
        return f"{self.path}{row}{f', {self.start:g} s to {end}' if self.start or self.end is not None else ''}"

    @property
    def source(self) -> AudioSource:
        """What `audio.decode` reads: its file, or the bytes of one."""
        return self.path if self.row is None else hf_folder.read_row(self.path, self.row)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples by split.

    Attributes:
        labels: the class names in index order.
        splits: examples of each of `SPLITS`.
        passed_over: files of its folder that are no sounds of a class.
        folds: of cross-validation, in their order; empty where it has none.
        notes: lines for the user about what was left out or chosen.
    """

    labels: tuple[str, ...]
    splits: dict[str, list[Example]]
    passed_over: tuple[pathlib.Path, ...] = ()
    folds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether any example has other than exactly one label."""
        return any(len(example.targets) != 1 for examples in self.splits.values() for example in examples)

    def reordered(self, labels: Sequence[str]) -> DataSet:
        """Return the same examples with the classes in the order of `labels`."""
        new = {self.labels.index(name): index for index, name in enumerate(labels)}

        def moved(example: Example) -> Example:
            return dataclasses.replace(example, targets=tuple(sorted(new[target] for target in example.targets)))

        splits = {split: list(map(moved, examples)) for split, examples in self.splits.items()}
        return dataclasses.replace(self, labels=tuple(labels), splits=splits)


def load_example(example: Example, frontend: FrontendConfig) -> np.ndarray:
    """Return the beginning of a sound, at most as much as fills the model's input: [<= frontend.max_samples].

    Raises:
        AudioError: it cannot be used, see `audio.read_audio`, or it ends before its `start`.
        FileNotFoundError: its file is gone.
    """
    length = frontend.max_seconds if example.end is None else min(frontend.max_seconds, example.end - example.start)
    sound = decode(example.source, frontend.sampling_rate, length, example.start)
    return sound.samples[: frontend.max_samples]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Where sounds and labels are, and how they are split; `read_dataset` says which layouts there are.

    Args:
        source: file or folder.
        validation: another source of any layout for the validation split. Of a source with several splits, only the one
            of this name is used.
        test: likewise for the test split.
        label_file: fixes the classes and their order, see `labels.read_labels`; its ids may stand for names. By default
            the layout's own order (ESC-50, ClassLabel), AudioSet's for its ids, or alphabetical order.
        fold: the cross-validation fold to validate on; all others but a test split are for training. By default the
            last fold where no split is named, and `DataSet.notes` say so.

    Raises:
        ValueError: a field of another type.
    """

    source: str | os.PathLike[str]
    validation: str | os.PathLike[str] | None = None
    test: str | os.PathLike[str] | None = None
    label_file: str | os.PathLike[str] | None = None
    fold: str | int | None = None

    def __post_init__(self) -> None:
        """Make every field text, as `run.json` keeps it."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))
            elif field.name == "fold" and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, str(value))
            elif not isinstance(value, str) and (value is not None or field.name == "source"):
                expected = "a fold's name" if field.name == "fold" else "a path"
                raise ValueError(f"{field.name}: expected {expected}, got {value!r}")

    @classmethod
    def of(cls, data: DatasetConfig | str | os.PathLike[str]) -> DatasetConfig:
        """Return a configuration as it is, or that of a path alone."""
        return data if isinstance(data, DatasetConfig) else cls(data)

    def absolute(self) -> DatasetConfig:
        """Return a copy with absolute paths."""
        paths = {name: getattr(self, name) for name in PATHS}
        known = {name: str(pathlib.Path(path).absolute()) for name, path in paths.items() if path is not None}
        return dataclasses.replace(self, **known)

    def moved_to(self, other: DatasetConfig | str | os.PathLike[str] | None) -> DatasetConfig:
        """Return the same data at the paths that `other` gives; what it leaves out stays where it was.

        Raises:
            ValueError: `other` names a source that these data do not have, or another fold.
        """
        if other is None:
            return self
        new = DatasetConfig.of(other).absolute()
        for field in dataclasses.fields(self):
            name = field.name
            wrong = getattr(self, name) is None if name in PATHS else getattr(new, name) != getattr(self, name)
            if getattr(new, name) is not None and wrong:
                raise ValueError(
                    f"{name}: expected a new place of data that the run was started with, got {getattr(new, name)!r}, "
                    f"where the run has {getattr(self, name)!r}"
                )
        given = {name: getattr(new, name) for name in PATHS if getattr(new, name) is not None}
        return dataclasses.replace(self, **given)


@progress("reading the data set")
def read_dataset(data: DatasetConfig | str | os.PathLike[str], seed: int = 0) -> DataSet:
    """Read a data set; its layout is detected from the files.

    - A folder with one folder per class, or with folders train, validation and test that have one per class. Files
      without a sound file's ending are passed over, and hidden ones without a word.
    - A CSV, TSV or JSONL manifest, or a folder that holds one as manifest.* or metadata.*, see
      `manifests.read_manifest`.
    - A JSON file of the original AST repository, see `manifests.read_original`. Its label file is looked for beside it.
    - ESC-50 and Speech Commands v2 as downloaded.
    - A folder that Hugging Face's `datasets` saved, see `hf_folder.read_saved`.

    Where neither splits nor folds are named, about a tenth of the examples of every label, drawn by `seed`, becomes
    validation: at least one where there are two or more, none of a single one. Parts of one file, and examples of one
    group, stay together.

    Args:
        data: where sounds and labels are; a path alone is its `source`.
        seed: decides which examples are held out.

    Raises:
        DataError: nothing to train on or to tell apart, missing or doubled columns, missing files, a row that cannot be
            read, an unknown split or fold, or a label that the label file does not have.
        ValueError: the label file cannot be read.
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
            listing.passed_over += other.passed_over
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
    return DataSet(labels, splits, tuple(listing.passed_over), tuple(folds), tuple(notes))


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
    """Return what sorts 2 before 10, and both before words."""
    return not fold.isdecimal(), int(fold) if fold.isdecimal() else 0, fold


def _in_fold(row: Row, fold: str) -> Row:
    """Return a row in the split that it has where one fold is for validation."""
    return row if row.split == "test" else row._replace(split="validation" if row.fold == fold else "train")


def _of_split(rows: list[Row], split: str, source: str | pathlib.Path) -> list[Row]:
    """Return what another source has for a split: that split where it names several, else all of it."""
    names = {row.split for row in rows}
    if len(names) > 1:
        if split not in names:
            raise DataError(f"{source}: expected a split {split!r}, got {', '.join(filter(None, sorted(names)))}")
        rows = [row for row in rows if row.split == split]
    return [row._replace(split=split) for row in rows]


def _check_files(rows: list[Row], source: str | pathlib.Path) -> None:
    """Refuse missing files; the message counts them."""
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
        marked = [name for name in labels if name.startswith(ID_MARK)]
        if marked and audioset_ids().keys() >= set(marked):
            labels, ids = label_set("audioset").labels, audioset_ids()
        elif marked:
            raise DataError(
                f"{source}: its labels are ids such as {marked[0]!r}, which no label file beside it names; "
                "give the class_labels_indices.csv with --labels"
            )
    if not labels:
        raise DataError(f"{source}: expected at least one label, but every sound's is empty")
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
    """Split off about a tenth of the examples of each label, in an order drawn by `seed`.

    Labels take their turn from the rarest to the most common, as in iterative stratification (Sechidis, Tsoumakas,
    Vlahavas 2011). Each holds a tenth of its examples, at least one of two or more; those that earlier labels held
    count. What belongs together is held together: parts of a file, or a group. What has more of a label than is wanted,
    or other labels that have their tenth already, comes last, and nothing is held that is a label's last in training.
    Examples without any label count as a label of their own.
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
        ranks = {  # whether it has too much of this label, and how much of others that have their tenth
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
    """Return what an example counts for in `_hold_out`: its labels, or having none."""
    return [(target,) for target in example.targets] or [()]
