"""Data sets on disk to examples: files, labels and splits, whatever the layout."""

from __future__ import annotations

import collections
import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
LABEL_SEPARATOR = ";"  # AudioSet's own names contain commas
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"})
HELD_OUT = 10  # one example in so many of each label becomes validation where the data set names no split


class DataError(ValueError):
    """A data set that cannot be used; the message is one line and names the file and what to change."""


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


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples by split, the class names in index order, and the files of its folder that were passed over."""

    labels: tuple[str, ...]
    splits: dict[str, list[Example]]
    passed_over: tuple[pathlib.Path, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether any example has other than exactly one label."""
        return any(len(example.targets) != 1 for examples in self.splits.values() for example in examples)

    def reordered(self, labels: Sequence[str]) -> DataSet:
        """Return the same examples with the classes in the order of `labels`."""
        new = {self.labels.index(name): index for index, name in enumerate(labels)}
        splits = {
            split: [
                dataclasses.replace(one, targets=tuple(sorted(new[target] for target in one.targets))) for one in examples
            ]
            for split, examples in self.splits.items()
        }
        return DataSet(tuple(labels), splits, self.passed_over)


def read_dataset(source: str | pathlib.Path, seed: int = 0) -> DataSet:
    """Read a folder with one folder per class, a CSV manifest, or a folder that holds a `manifest.csv`.

    A manifest has the columns `path` (relative to the manifest) and `label` (several joined by ";"), and may have
    `split` (train, validation or test). Where there is no split, about a tenth of the examples of every label, drawn by
    `seed`, becomes validation: at least one where there are two or more, none of a single one. In folders, files
    without a sound file's ending are passed over, and hidden ones without a word.

    Raises:
        DataError: nothing to train on or to tell apart, missing or doubled columns, missing files, a row unlike the
            header, or an unknown split.
        FileNotFoundError: `source` does not exist.
    """
    source = pathlib.Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_dir() and (source / "manifest.csv").is_file():
        source = source / "manifest.csv"
    passed_over: list[pathlib.Path] = []
    rows = list(_read_folders(source, passed_over) if source.is_dir() else _read_manifest(source))
    if not rows:
        raise DataError(f"{source}: expected folders of sound files, one for each class, or a manifest.csv; found none")
    missing = [path for path, _, _ in rows if not path.is_file()]
    if missing:
        raise DataError(f"{source}: {len(missing)} of {len(rows)} files are missing, the first is {missing[0]}")
    labels = tuple(sorted({name for _, names, _ in rows for name in names}))
    if not labels:
        raise DataError(f"{source}: expected at least one label, but every sound's is empty")
    index = {name: number for number, name in enumerate(labels)}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for path, names, split in rows:
        splits[split or "train"].append(Example(path, tuple(sorted({index[name] for name in names}))))
    if not any(split for _, _, split in rows):
        splits["train"], splits["validation"] = _hold_out(splits["train"], seed)
    if not splits["train"]:
        raise DataError(f"{source}: no example is in the split 'train'")
    if len(labels) == 1 and all(names for _, names, _ in rows):
        raise DataError(f"{source}: every sound has the one label {labels[0]!r}; expected at least two classes")
    return DataSet(labels, splits, tuple(passed_over))


def _read_folders(
    source: pathlib.Path, passed_over: list[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, list[str], str]]:
    """Yield (path, labels, no split) of a folder per class; note files without a class or a sound file's ending.

    Hidden files are left aside without a word: macOS leaves a `._x.wav` beside x.wav. A class may be a symbolic link.
    """
    for entry in sorted(path for path in source.iterdir() if not path.name.startswith(".")):
        if not entry.is_dir():
            passed_over.append(entry)
            continue
        for path in sorted(entry.rglob("*")):
            if path.is_dir() or any(part.startswith(".") for part in path.relative_to(entry).parts):
                continue
            if path.suffix.lower() in AUDIO_SUFFIXES:
                yield path, [entry.name], ""
            else:
                passed_over.append(path)


def _read_manifest(source: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str], str]]:
    """Yield (path, labels, split) of a CSV file."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = {"path", "label"} - set(header)
            if missing:
                raise DataError(
                    f"{source}: expected the columns path,label[,split], missing {', '.join(sorted(missing))}"
                )
            if doubled := sorted(name for name, count in collections.Counter(header).items() if count > 1):
                raise DataError(f"{source}: expected each column once, got several of {', '.join(doubled)}")
            for values in filter(None, reader):  # blank lines are skipped
                where = f"{source}, line {reader.line_num}"
                if len(values) != len(header):
                    raise DataError(f"{where}: expected {len(header)} fields as in the header, got {len(values)}")
                row = dict(zip(header, values, strict=True))
                if not row["path"].strip():
                    raise DataError(f"{where}: expected a path, got nothing")
                split = row.get("split", "").strip().lower()
                split = SPLIT_ALIASES.get(split, split)
                if split and split not in SPLITS:
                    raise DataError(f"{where}: expected split {', '.join(SPLITS)}, got {row['split']!r}")
                names = [name.strip() for name in row["label"].split(LABEL_SEPARATOR)]
                yield source.parent / row["path"], [name for name in names if name], split
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected a CSV manifest in UTF-8 or a folder, got something else") from error
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: expected CSV ({error})") from error


def _hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Split off about a tenth of the examples of each label, in an order drawn by `seed`.

    Labels take their turn from the rarest to the most common, as in iterative stratification (Sechidis, Tsoumakas,
    Vlahavas 2011). Each holds a tenth of its examples, at least one of two or more; those that earlier labels held
    count. Examples whose other labels have their tenth already come last, and none that is a label's last one in
    training is held. Examples without any label count as a label of their own.
    """
    keys = [[(target,) for target in example.targets] or [()] for example in examples]
    members = collections.defaultdict(list)
    for number, own in enumerate(keys):
        for key in own:
            members[key].append(number)
    wanted = {key: max(len(numbers) // HELD_OUT, min(len(numbers) - 1, 1)) for key, numbers in members.items()}
    count: collections.Counter[tuple[int, ...]] = collections.Counter()
    held: set[int] = set()
    for key in sorted(members, key=lambda key: (len(members[key]), key)):
        order = np.random.default_rng([seed, *key]).permutation(len(members[key]))
        drawn = [members[key][index] for index in order]
        for number in sorted(drawn, key=lambda number: sum(count[other] >= wanted[other] for other in keys[number])):
            if count[key] >= wanted[key]:
                break
            if number not in held and all(count[other] + 1 < len(members[other]) for other in keys[number]):
                held.add(number)
                count.update(keys[number])
    kept = [example for number, example in enumerate(examples) if number not in held]
    return kept, [examples[number] for number in sorted(held)]
