"""What is heard when: scores of windows, the whole, and the segments in which a label is heard."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

AGGREGATES = {"mean": functools.partial(np.mean, axis=0), "max": functools.partial(np.max, axis=0)}
THRESHOLD = 0.5
LOW_SHARE = 0.6  # of the threshold, down to which a segment goes on


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch in which a label is heard.

    Attributes:
        start: seconds.
        end: seconds.
        label: its name.
        score: the highest in it.
    """

    start: float
    end: float
    label: str
    score: float


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer to it
class Analysis:
    """What came of a sound: scores of all its windows, or an error.

    Attributes:
        source: the sound's name.
        labels: names of the C classes.
        times: [W, 2] seconds, beginning and end of each window; together they cover the sound.
        scores: [W, C] probabilities (for regression the outputs), of each window.
        duration: seconds of the whole sound.
        aggregate: "mean" or "max", how windows become one result.
        error: one line, or None; then there are no windows.
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
        """Scores [C] of the whole sound."""
        return AGGREGATES[self.aggregate](self.scores)

    def best(self, top_k: int | None = None) -> list[tuple[str, float]]:
        """Return (label, score) of the whole sound, the best first; `top_k` of them or all."""
        return ranked(self.overall, self.labels, top_k)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the score of each label at each time.

        Windows overlap: between two neighbouring edges [E + 1] of windows, in seconds, the score [E, C] is the mean (or
        the largest) of the windows that lie over it.
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
        """Return the segments in which labels are heard, by time.

        A segment begins and ends where the score falls below `low`, and somewhere in it the score reaches `threshold`
        (hysteresis), so that a score that wavers does not cut it to pieces.

        Args:
            threshold: score that makes a segment.
            low: score that goes on with one; None for 0.6 of the threshold.

        Raises:
            ValueError: `low` is above `threshold`.
        """
        low = threshold - (1 - LOW_SHARE) * abs(threshold) if low is None else low
        if not low <= threshold:
            raise ValueError(f"low: expected at most the threshold {threshold:g}, got {low:g}")
        edges, scores = self.curve()
        found = []
        for index in np.flatnonzero(scores.max(0, initial=-np.inf) >= threshold):
            label, column = self.labels[index], scores[:, index]
            turns = np.flatnonzero(
                np.diff(np.pad(column >= low, 1).astype(np.int8))
            )  # where it begins and where it ends
            for begin, end in zip(turns[::2], turns[1::2], strict=True):
                highest = float(column[begin:end].max())
                if highest >= threshold:
                    found.append(Segment(float(edges[begin]), float(edges[end]), label, highest))
        return sorted(found, key=lambda segment: (segment.start, -segment.score))


def ranked(scores: np.ndarray, labels: tuple[str, ...], top_k: int | None = None) -> list[tuple[str, float]]:
    """Return (label, score), the best first."""
    return [(labels[label], float(scores[label])) for label in np.argsort(-scores, kind="stable")[:top_k]]
