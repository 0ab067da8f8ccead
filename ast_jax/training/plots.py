"""Figures of a run and of a report: training curves, confusion matrix, average precision by class.

For each a function returns the figure and another one writes it as a PNG. Line colours are the colour-blind safe
palette of Okabe and Ito, and the colour map is perceptually ordered.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from ast_jax.runtime.figures import GREY, drawing, new_figure, save_figure, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ast_jax.training.metrics import Report

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
METRICS = (
    "accuracy",
    "mAP",
    "mAUC",
    "d_prime",
    "negative_mse",
)  # metrics with a panel, beside losses and learning rate
MANY_EPOCHS = 40  # up to this many, every epoch has a marker
MANY_CLASSES = 100  # up to this many, a confusion matrix has tick labels
MANY_COUNTS = 20  # up to this many classes, its cells have counts
END_CLASSES = 20  # of more than twice as many classes, the best and the worst have bars


def curves(history: Sequence[Mapping[str, Any]], path: str | pathlib.Path, metric: str | None = None) -> None:
    """Write `curves_figure` as a PNG file, atomically."""
    save_figure(curves_figure(history, metric), path)


def confusion(
    matrix: Sequence[Sequence[int]], labels: Sequence[str], path: str | pathlib.Path, title: str = ""
) -> None:
    """Write `confusion_figure` as a PNG file, atomically."""
    save_figure(confusion_figure(matrix, labels, title), path)


def ranked_classes(report: Report, path: str | pathlib.Path, title: str = "") -> None:
    """Write `ranked_classes_figure` as a PNG file, atomically."""
    save_figure(ranked_classes_figure(report, title), path)


def curves_figure(history: Sequence[Mapping[str, Any]], metric: str | None = None) -> Figure:
    """Plot losses, metrics and the learning rate against the epoch, in a panel each.

    Values that are missing, None or not finite leave gaps. A vertical line marks the best epoch.

    Args:
        history: a row an epoch: "epoch", "learning_rate", whatever has "loss" in its name, and metrics whose
            names end in one of `METRICS`. Other columns are ignored.
        metric: column that selects the best epoch, by its highest value, or by its lowest if it is a loss; None marks
            no epoch.

    Raises:
        ValueError: no rows, a row without an epoch, or matplotlib is missing.
    """
    if not history or not all("epoch" in row for row in history):
        raise ValueError(f"history: expected one row or more, each with an epoch, got {list(history)!r:.80}")
    numbers = [int(row["epoch"]) for row in history]
    epochs = np.arange(min(numbers), max(numbers) + 1)
    names = dict.fromkeys(name for row in history for name in row)
    members = {"loss": [name for name in names if "loss" in name]}
    members |= {metric: [name for name in names if name.endswith(metric)] for metric in METRICS}
    members |= {"learning_rate": [name for name in names if name == "learning_rate"]}
    columns = {name: _column(history, epochs, name) for found in members.values() for name in found}
    panels = {title: {name: columns[name] for name in found} for title, found in members.items() if found}
    best = None if metric is None else _best_index(metric, columns.get(metric, np.array([])))
    across = min(3, max(1, len(panels)))
    down = max(1, math.ceil(len(panels) / across))
    with drawing():
        figure = new_figure(4 * across, 3 * down + 0.4)
        places = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, (title, lines) in zip(places, panels.items(), strict=False):
            _draw_lines(axes, _words(title), epochs, lines, best)
        for axes in places[len(panels) :]:
            axes.remove()
        if metric is not None and best is not None:
            figure.suptitle(f"best epoch {epochs[best]}: {_words(metric)} {columns[metric][best]:.4g}")
    return figure


def confusion_figure(matrix: Sequence[Sequence[int]], labels: Sequence[str], title: str = "") -> Figure:
    """Plot a confusion matrix, coloured by the share of the row.

    Rows without examples are grey. Up to `MANY_COUNTS` classes cells have counts, up to `MANY_CLASSES` axes have tick
    labels.

    Args:
        matrix: counts [C][C], with true classes as rows.
        labels: C names.
        title: what was measured; the number of examples and the accuracy are appended.

    Raises:
        ValueError: not a square matrix of counts, another number of labels, or matplotlib is missing.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"matrix: expected counts of shape (C, C), got shape {counts.shape}")
    if counts.min() < 0:
        raise ValueError(f"matrix: expected counts, none below 0, got {counts.min()}")
    size = len(counts)
    if len(labels) != size:
        raise ValueError(f"labels: expected {size} names for a {size} x {size} matrix, got {len(labels)}")
    names = [short_name(label) for label in labels]
    totals = counts.sum(1, keepdims=True)
    shares = np.ma.masked_array(counts / np.maximum(totals, 1), np.broadcast_to(totals == 0, counts.shape))
    cell = 0.3 + 0.07 * len(f"{counts.max():,}") if size <= MANY_COUNTS else 0.2 if size <= MANY_CLASSES else 9 / size
    side = max(3.0, cell * size)
    margin = 0.07 * max(map(cell_len, names)) if size <= MANY_CLASSES else 0.0  # inches for tick labels
    with drawing():
        import matplotlib
        from matplotlib.colors import PowerNorm

        figure = new_figure(side + margin + 1.8, side + margin + 1.0)
        axes = figure.subplots()
        blues = matplotlib.colormaps["Blues"].with_extremes(bad="#d9d9d9")
        image = axes.imshow(shares, cmap=blues, norm=PowerNorm(0.5, 0, 1))  # square root: rare confusions show
        bar = figure.colorbar(image, label="share of the true class (square root scale)", shrink=0.8, aspect=30)
        bar.outline.set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
        if size <= MANY_CLASSES:
            upright = max(map(cell_len, names)) * 0.08 > side / size
            axes.set_xticks(range(size), names, rotation=90 if upright else 0, parse_math=False)
            axes.set_yticks(range(size), names, parse_math=False)
        if size <= MANY_COUNTS:
            for (row, column), count in np.ndenumerate(counts):
                color = "white" if shares[row, column] > 0.3 else "black" if count else "#999999"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
        right = np.trace(counts) / max(1, counts.sum())
        axes.set_title(_title(title, f"{counts.sum():,} examples, accuracy {right:.1%}"))
    return figure


def ranked_classes_figure(report: Report, title: str = "") -> Figure:
    """Plot each class's average precision as a bar, in descending order; of many classes, the best and the worst.

    Classes without an average precision are left out; the title has their number.

    Args:
        report: report of a classification, from `metrics.report`.
        title: what was measured; mAP and the number of classes are appended.

    Raises:
        ValueError: no class has an average precision, or matplotlib is missing.
    """
    ranked = [entry for entry in report["classes"] if entry.get("average_precision") is not None]
    if not ranked:
        raise ValueError(
            "report: expected a class with an average precision, got none; a class needs positives and negatives"
        )
    ranked.sort(key=lambda entry: entry["average_precision"], reverse=True)
    between = max(0, len(ranked) - 2 * END_CLASSES)
    shown = [ranked] if not between else [ranked[:END_CLASSES], ranked[-END_CLASSES:]]
    left_out = len(report["classes"]) - len(ranked)
    names = [f"{short_name(entry['name'])} ({entry['positives']:,})" for part in shown for entry in part]
    with drawing():
        figure = new_figure(6.0 + 0.08 * max(map(cell_len, names)), 1.2 + 0.2 * (len(names) + len(shown) - 1))
        axes = figure.subplots()
        ticks: list[int] = []
        for part, color in zip(shown, COLORS, strict=False):
            places = range(len(ticks) + bool(ticks), len(ticks) + bool(ticks) + len(part))
            bars = axes.barh(places, [entry["average_precision"] for entry in part], color=color, height=0.75)
            axes.bar_label(bars, fmt="{:.3f}", padding=3, fontsize=8)
            ticks += places
        if between:
            axes.text(0.01, END_CLASSES, f"{between:,} classes between", va="center", color=GREY, fontsize=8)
        mean = report["metrics"]["mAP"]
        axes.axvline(mean, color=GREY, linestyle="--", linewidth=1, zorder=0)
        axes.set_yticks(ticks, names, parse_math=False)
        axes.set(xlim=(0, 1.1), xticks=np.linspace(0, 1, 6), ylim=(ticks[-1] + 0.6, -0.6))
        axes.set_xlabel("average precision (in brackets: positives)")
        classes = f"classes: {len(ranked):,}" + (f", left out: {left_out:,}" if left_out else "")
        axes.set_title(_title(title, f"mAP {mean:.4f} ({classes})"))
    return figure


def _draw_lines(axes: Axes, title: str, epochs: np.ndarray, lines: dict[str, np.ndarray], best: int | None) -> None:
    """Draw a panel: a line for each column, with gaps for missing values, and a mark at the best epoch."""
    from matplotlib.ticker import MaxNLocator

    for (name, values), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        known = np.pad(np.isfinite(values), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]  # between two gaps, where a line is invisible
        dots = np.flatnonzero(alone | (len(epochs) <= MANY_EPOCHS))
        style = ":" if name.startswith("cumulative") else "-"  # where it coincides with another line, both are visible
        axes.plot(
            epochs, values, style, color=color, marker="o", markersize=3, markevery=dots.tolist(), label=_words(name)
        )
    if best is not None:
        axes.axvline(epochs[best], color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set(title=title, xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(y=0.1)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if len(lines) > 1:
        axes.legend()


def _column(history: Sequence[Mapping[str, Any]], epochs: np.ndarray, name: str) -> np.ndarray:
    """Return a column of the history [epochs], NaN for values that are missing or not finite."""
    values = np.full(len(epochs), np.nan)
    for row in history:
        value = row.get(name)
        if value is not None and math.isfinite(value):
            values[int(row["epoch"]) - epochs[0]] = value
    return values


def _best_index(metric: str, values: np.ndarray) -> int | None:
    """Return the index of the first of the best values of a metric, or None without finite values."""
    if not np.isfinite(values).any():
        return None
    return int(np.nanargmin(values) if "loss" in metric else np.nanargmax(values))


def _title(beginning: str, end: str) -> str:
    """Return a title of two lines, the first of them the caller's."""
    return f"{' '.join(beginning.split())}\n{end}" if beginning else end


def _words(name: str) -> str:
    """Return a column's name in words."""
    return name.replace("_", " ")
