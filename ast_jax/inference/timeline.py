"""Scores of a sound's windows, their aggregate, and the segments of a timeline."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

AGGREGATES = {"mean": functools.partial(np.mean, axis=0), "max": functools.partial(np.max, axis=0)}
THRESHOLD = 0.5
LOW_RATIO = 0.6  # of the threshold: default of the lower threshold


@dataclasses.dataclass(frozen=True)
class Segment:
    """An interval in which a label is detected.

    Attributes:
        start: seconds.
        end: seconds.
        label: name of the class.
        score: maximum over the interval.
    """

    start: float
    end: float
    label: str
    score: float


@dataclasses.dataclass(frozen=True, eq=False)  # == of arrays is an array
class Analysis:
    """Scores of all windows of a sound, or an error.

    Attributes:
        source: name of the sound.
        labels: names of the C classes.
        times: [W, 2] seconds, start and end of each window; together they cover the sound.
        scores: [W, C] probabilities (for regression the model's outputs).
        duration: seconds.
        aggregate: "mean" or "max", over windows.
        error: one line, or None; with an error there are no windows.
    """

    source: str
    labels: tuple[str, ...] = ()
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    duration: float = 0.0
    aggregate: str = "mean"
    error: str | None = None

    @property
    def overall(self) -> np.ndarray:
        """Scores [C] aggregated over the windows."""
        return AGGREGATES[self.aggregate](self.scores)

    def best(self, top_k: int | None = None) -> list[tuple[str, float]]:
        """Return the `top_k` (label, score) of the whole sound, or all, the highest score first."""
        return ranked(self.overall, self.labels, top_k)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each label's score over time: edges [E + 1] in seconds and scores [E, C] between them.

        The edges are those of all windows; where windows overlap, their scores are aggregated.
        """
        if not len(self.times):
            return np.zeros(1), np.zeros((0, len(self.labels)))
        edges = np.unique(self.times)
        first, last = np.searchsorted(edges, self.times).T
        shape = (len(edges) - 1, len(self.labels))
        if self.aggregate == "max":
            scores = np.full(shape, -np.inf)
            for begin, end, row in zip(first, last, self.scores, strict=True):
                np.maximum(scores[begin:end], row, out=scores[begin:end])
            return edges, scores
        scores, counts = np.zeros(shape), np.zeros((shape[0], 1))
        for begin, end, row in zip(first, last, self.scores, strict=True):
            scores[begin:end] += row
            counts[begin:end] += 1
        return edges, scores / counts

    def timeline(self, threshold: float = THRESHOLD, low: float | None = None) -> list[Segment]:
        """Return the segments in which labels are detected, by start time.

        Hysteresis thresholding: a segment is a run of scores of at least `low` that reaches `threshold`, so that a
        fluctuating score does not split it.

        Args:
            threshold: upper threshold.
            low: lower threshold; None for 0.6 of the upper one.

        Raises:
            ValueError: `low` is above `threshold`.
        """
        low = threshold - (1 - LOW_RATIO) * abs(threshold) if low is None else low
        if not low <= threshold:
            raise ValueError(f"low: expected at most the threshold {threshold:g}, got {low:g}")
        edges, scores = self.curve()
        found = []
        for index in np.flatnonzero(scores.max(0, initial=-np.inf) >= threshold):
            label, column = self.labels[index], scores[:, index]
            changes = np.flatnonzero(np.diff(np.pad(column >= low, 1).astype(np.int8)))  # starts and ends of runs
            for begin, end in zip(changes[::2], changes[1::2], strict=True):
                highest = float(column[begin:end].max())
                if highest >= threshold:
                    found.append(Segment(float(edges[begin]), float(edges[end]), label, highest))
        return sorted(found, key=lambda segment: (segment.start, -segment.score))


def ranked(scores: np.ndarray, labels: tuple[str, ...], top_k: int | None = None) -> list[tuple[str, float]]:
    """Return the `top_k` (label, score), the highest score first."""
    return [(labels[label], float(scores[label])) for label in np.argsort(-scores, kind="stable")[:top_k]]
