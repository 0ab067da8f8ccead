"""`Survey`, the result of a data set audit, as lines for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEW = 10  # a class with fewer training examples is reported
SMALL = 100  # a validation or test split with fewer examples is reported: one is then more than 1 %
SHOWN = 5  # names per kind of fault
CLASSES_SHOWN = 50  # rows of the class table, the rarest
COVERED = 95  # percentage of the clips that the suggested input length covers in full
LENGTH_STEP = 16  # frames of a patch; at most one time stride of up to 16 frames is left over
LONGEST = 1024  # frames of the published models; the cost of attention grows quadratically


class Durations(NamedTuple):
    """Durations of the readable clips in seconds, and their total in hours."""

    shortest: float
    median: float
    percentile_95: float
    longest: float
    total_hours: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of `audit.survey`; clips are lines that begin with their names.

    Attributes:
        labels: class names in index order.
        examples: number of examples by split.
        counts: number of examples of each class by split.
        durations: None if no clip can be decoded.
        rates: number of clips by sampling rate in Hz.
        channels: number of clips by number of channels.
        bad: clips that cannot be decoded.
        not_finite: clips with NaN or Inf samples.
        silent: clips with a peak below -80 dBFS after removing the DC offset.
        clipped: clips with at least 0.1 % of their samples at full scale.
        duplicates: sets of clips with the same samples, each as (split, name).
        shared: files and groups that are in several splits.
        max_length: suggested input length in frames; None if no clip can be decoded.
        reason: of the suggestion.
        ignored: number of files that are not audio files of a class.
        notes: the data set's notes, which `lines` does not repeat.
    """

    labels: tuple[str, ...]
    examples: dict[str, int]
    counts: dict[str, list[int]]
    durations: Durations | None
    rates: dict[int, int]
    channels: dict[int, int]
    bad: list[str]
    not_finite: list[str]
    silent: list[str]
    clipped: list[str]
    duplicates: list[list[tuple[str, str]]]
    shared: list[str]
    max_length: int | None
    reason: str
    ignored: int
    notes: tuple[str, ...]

    @property
    def leaks(self) -> list[list[tuple[str, str]]]:
        """The duplicates that are in several splits."""
        return [found for found in self.duplicates if len({split for split, _ in found}) > 1]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Classes without an example, by split; of splits that have examples."""
        return {
            split: [name for name, count in zip(self.labels, counts, strict=True) if not count]
            for split, counts in self.counts.items()
            if self.examples[split]
        }

    @property
    def unlearned(self) -> list[str]:
        """Classes of the other splits without a training example."""
        return [
            name
            for name, *counts in zip(self.labels, *self.counts.values(), strict=True)
            if any(counts) and not counts[list(self.counts).index("train")]
        ]

    @property
    def few(self) -> list[str]:
        """Classes with 1 to 9 training examples."""
        return [name for name, count in zip(self.labels, self.counts["train"], strict=True) if 0 < count < FEW]

    @property
    def small(self) -> dict[str, int]:
        """Number of examples of validation and test splits that have 1 to 99."""
        return {split: count for split, count in self.examples.items() if split != "train" and 0 < count < SMALL}

    @property
    def problems(self) -> int:
        """Number of faults that harm training or inflate its results."""
        faults: tuple[Sequence[object], ...] = (self.bad, self.not_finite, self.silent, self.leaks, self.shared)
        return sum(map(len, (*faults, self.unlearned)))

    def to_json_dict(self) -> dict[str, Any]:
        """Return all fields and properties for JSON."""
        found = {name: getattr(self, name) for name in ("leaks", "missing", "unlearned", "few", "small", "problems")}
        durations = self.durations and self.durations._asdict()
        return {**dataclasses.asdict(self), "durations": durations, **found}

    def lines(self) -> list[str]:
        """Return the report for a terminal: content, warnings, problems."""
        parts = ", ".join(f"{split} {count}" for split, count in self.examples.items())
        facts = [("examples", f"{sum(self.examples.values())} in {len(self.labels)} classes: {parts}")]
        if self.durations:
            shortest, median, most, longest, hours = self.durations
            facts += [
                ("durations", f"{shortest:.2f} s to {longest:.2f} s, median {median:.2f} s, 95 % up to {most:.2f} s"),
                ("total", f"{hours:.2f} hours"),
                ("rates", _counted(self.rates, " Hz")),
                ("channels", _counted(self.channels, "")),
                ("suggestion", f"--max-length {self.max_length}: {self.reason}"),
            ]
        if self.ignored:
            facts.append(("ignored", f"{self.ignored} files that are not audio files of a class"))
        lines = _aligned(facts) + self._class_table()
        within = [found for found in self.duplicates if len({split for split, _ in found}) == 1]
        lines += _named("warning: duplicates within a split", _joined(within))
        lines += _named("warning: clipped", self.clipped)
        lines += _named(f"warning: classes with fewer than {FEW} training examples", self.few)
        small = [f"{split}: one clip of {count} is {100 / count:.3g} %" for split, count in self.small.items()]
        lines += _named(f"warning: validation or test splits with fewer than {SMALL} clips", small)
        for split, names in self.missing.items():
            lines += _named(f"warning: classes without an example in {split}", names)
        lines += _named("problem: cannot be decoded", self.bad)
        lines += _named("problem: NaN or Inf samples", self.not_finite)
        lines += _named("problem: silent", self.silent)
        lines += _named("problem: duplicates in several splits (leaks)", _joined(self.leaks))
        lines += _named("problem: files or groups in several splits", self.shared)
        lines += _named("problem: classes of other splits without a training example", self.unlearned)
        return [*lines, f"problems: {self.problems}" if self.problems else "no problems"]

    def _class_table(self) -> list[str]:
        """Return a table of the number of examples by class and split; of many classes, the rarest in training."""
        order: Sequence[int] = range(len(self.labels))
        if len(self.labels) > CLASSES_SHOWN:
            order = sorted(order, key=lambda index: self.counts["train"][index])[:CLASSES_SHOWN]
        title = "class" if len(order) == len(self.labels) else f"the {CLASSES_SHOWN} rarest classes"
        rows = [(title, *self.counts)]
        rows += [(self.labels[index], *(str(counts[index]) for counts in self.counts.values())) for index in order]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def suggest_max_length(frames: np.ndarray) -> tuple[int, str]:
    """Return an input length in frames that covers 95 % of the clips in full, and the reason.

    The length is a multiple of a patch's 16 frames, at least one patch, and at most the 1024 frames of the published
    models: a longer input needs interpolated position embeddings, and attention costs four times as much for twice the
    length.

    Args:
        frames: [n] frames of each clip.
    """
    wanted = int(np.percentile(frames, COVERED, method="inverted_cdf"))
    length = min(max(-(-wanted // LENGTH_STEP) * LENGTH_STEP, LENGTH_STEP), LONGEST)
    covered = int(np.count_nonzero(frames <= length))
    return length, f"{covered} of {len(frames)} clips fit in full; the longest has {frames.max()} frames"


def _counted(counts: dict[int, int], unit: str) -> str:
    """Return counts as text, the most common value first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{key}{unit} ({count})" for key, count in ordered)


def _joined(duplicates: list[list[tuple[str, str]]]) -> list[str]:
    """Return a line for each set of duplicates."""
    return [" = ".join(f"{split} {name}" for split, name in found) for found in duplicates]


def _aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and values as two aligned columns."""
    width = max(len(name) for name, _ in facts)
    return [f"{name.ljust(width)}  {value}" for name, value in facts]


def _named(title: str, names: Sequence[str]) -> list[str]:
    """Return the number of names and the first few; no lines if there are none."""
    if not names:
        return []
    rest = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *rest]
