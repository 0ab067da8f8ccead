"""What a survey of a data set found, as lines for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEW = 10  # training examples of a class
SMALL = 100  # examples of a split that measures: of fewer, a single one is more than a per cent
SHOWN = 5  # names of each kind of fault
CLASSES_SHOWN = 50  # in the table; of more classes, as many of the rarest
COVERED = 95  # per cent of the sounds that a suggested length holds in full
LENGTH_STEP = 16  # frames of a patch: with time strides up to it, none or less than one of them is left over
LONGEST = 1024  # frames of the published models; attention's cost grows with the square


class Durations(NamedTuple):
    """Seconds of the sounds that can be decoded, and hours of all of them."""

    shortest: float
    median: float
    percentile_95: float
    longest: float
    total_hours: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a survey found; sounds are lines that begin with their names.

    Attributes:
        labels: the class names in index order.
        examples: how many there are, by split.
        counts: how many there are of each class, by split.
        durations: None where nothing can be decoded.
        rates: how many sounds there are by sampling rate in Hz.
        channels: and by number of channels.
        bad: sounds that cannot be decoded.
        not_finite: sounds with NaN or Inf samples.
        silent: sounds that are constant but for what is below -80 dB of full scale.
        clipped: sounds with a thousandth or more of their samples at full scale.
        duplicates: sets of sounds with the same samples, each as its split and its name.
        shared: files and groups that stand in several splits.
        max_length: suggested model input in frames; None where nothing can be decoded.
        reason: for it.
        passed_over: how many files are no sounds of a class.
        notes: those of the data set, which `lines` leave to whoever reads it.
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
    passed_over: int
    notes: tuple[str, ...]

    @property
    def leaks(self) -> list[list[tuple[str, str]]]:
        """Those of the duplicates that reach over several splits."""
        return [found for found in self.duplicates if len({split for split, _ in found}) > 1]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Classes without an example, by split, where the split has any examples at all."""
        return {
            split: [name for name, count in zip(self.labels, counts, strict=True) if not count]
            for split, counts in self.counts.items()
            if self.examples[split]
        }

    @property
    def unlearned(self) -> list[str]:
        """Classes of other splits that have no training example."""
        return [
            name
            for name, *counts in zip(self.labels, *self.counts.values(), strict=True)
            if any(counts) and not counts[list(self.counts).index("train")]
        ]

    @property
    def few(self) -> list[str]:
        """Classes with some, but less than ten training examples."""
        return [name for name, count in zip(self.labels, self.counts["train"], strict=True) if 0 < count < FEW]

    @property
    def small(self) -> dict[str, int]:
        """Splits to measure on with some, but less than a hundred examples, and how many these are."""
        return {split: count for split, count in self.examples.items() if split != "train" and 0 < count < SMALL}

    @property
    def problems(self) -> int:
        """How many faults there are that spoil training or make its results look better than they are."""
        faults: tuple[Sequence[object], ...] = (self.bad, self.not_finite, self.silent, self.leaks, self.shared)
        return sum(map(len, (*faults, self.unlearned)))

    def to_json_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        found = {name: getattr(self, name) for name in ("leaks", "missing", "unlearned", "few", "small", "problems")}
        durations = self.durations and self.durations._asdict()
        return {**dataclasses.asdict(self), "durations": durations, **found}

    def lines(self) -> list[str]:
        """Return what a terminal shows: what is there, what is wrong, what to do."""
        parts = ", ".join(f"{split} {count}" for split, count in self.examples.items())
        facts = [("examples", f"{sum(self.examples.values())} in {len(self.labels)} classes: {parts}")]
        if self.durations:
            shortest, median, most, longest, hours = self.durations
            facts += [
                ("durations", f"{shortest:.2f} s to {longest:.2f} s, median {median:.2f} s, 95 % up to {most:.2f} s"),
                ("in all", f"{hours:.2f} hours"),
                ("rates", _counted(self.rates, " Hz")),
                ("channels", _counted(self.channels, "")),
                ("suggestion", f"--max-length {self.max_length}: {self.reason}"),
            ]
        if self.passed_over:
            facts.append(("passed over", f"{self.passed_over} files that are no sounds of a class"))
        lines = _aligned(facts) + self._class_table()
        within = [found for found in self.duplicates if len({split for split, _ in found}) == 1]
        lines += _named("worth a look: the same sound within a split", _joined(within))
        lines += _named("worth a look: clipped", self.clipped)
        lines += _named(f"worth a look: classes with less than {FEW} training examples", self.few)
        small = [f"{split}: one sound of {count} is {100 / count:.3g} %" for split, count in self.small.items()]
        lines += _named(f"worth a look: splits to measure on with less than {SMALL} sounds", small)
        for split, names in self.missing.items():
            lines += _named(f"worth a look: classes without an example for {split}", names)
        lines += _named("problem: cannot be decoded", self.bad)
        lines += _named("problem: NaN or Inf samples", self.not_finite)
        lines += _named("problem: silent", self.silent)
        lines += _named("problem: the same sound in several splits", _joined(self.leaks))
        lines += _named("problem: files or groups in several splits", self.shared)
        lines += _named("problem: classes without a training example that other splits have", self.unlearned)
        return [*lines, f"problems: {self.problems}" if self.problems else "no problems"]

    def _class_table(self) -> list[str]:
        """Return the number of examples by class and split; of many classes, those of the rarest in training."""
        order: Sequence[int] = range(len(self.labels))
        if len(self.labels) > CLASSES_SHOWN:
            order = sorted(order, key=lambda index: self.counts["train"][index])[:CLASSES_SHOWN]
        title = "class" if len(order) == len(self.labels) else f"the {CLASSES_SHOWN} rarest classes"
        rows = [(title, *self.counts)]
        rows += [(self.labels[index], *(str(counts[index]) for counts in self.counts.values())) for index in order]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def suggest_max_length(frames: np.ndarray) -> tuple[int, str]:
    """Return a model input that holds 95 % of the sounds in full, and the reason for it.

    It is a multiple of a patch's 16 frames, which a time stride of 16 uses to the last and others but for less than a
    stride, at least one patch, and at most the 1024 frames of the published models: beyond, their position embeddings
    are stretched, and attention costs four times as much for twice the length.

    Args:
        frames: [n] of each sound.
    """
    wanted = int(np.percentile(frames, COVERED, method="inverted_cdf"))
    length = min(max(-(-wanted // LENGTH_STEP) * LENGTH_STEP, LENGTH_STEP), LONGEST)
    covered = int(np.count_nonzero(frames <= length))
    return length, f"{covered} of {len(frames)} sounds are heard in full; the longest has {frames.max()} frames"


def _counted(counts: dict[int, int], unit: str) -> str:
    """Return a distribution, the most common first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{key}{unit} ({count})" for key, count in ordered)


def _joined(duplicates: list[list[tuple[str, str]]]) -> list[str]:
    """Return a line for each set of sounds that are the same."""
    return [" = ".join(f"{split} {name}" for split, name in found) for found in duplicates]


def _aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    return [f"{name.ljust(width)}  {value}" for name, value in facts]


def _named(title: str, names: Sequence[str]) -> list[str]:
    """Return a fault's count and the first of its names; nothing where there is none."""
    if not names:
        return []
    rest = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *rest]
