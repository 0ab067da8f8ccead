"""Metrics of predictions, computed from logits and labels with scikit-learn, and their report as data and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.cells import set_cell_size

from ast_jax.config import ASTConfig, ProblemType
from ast_jax.model.scores import scores as to_scores
from ast_jax.runtime.progress import track

Report = dict[str, Any]

_LOOK_AT = {"logits": "look at the model's parameters, or compute in float32", "labels": "look at the data set"}


def scores(logits: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Check logits and convert them to scores (see `ast_jax.model.scores`): float64 [N, C].

    Args:
        logits: [N, C], of any floating type.
        config: its `problem_type` decides.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    return to_scores(_finite("logits", logits, config.num_labels), config)


def average_precisions(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision of each class [C]; NaN for a class without positives or without negatives.

    Args:
        logits: [N, C]; only their order matters.
        labels: [N, C], positive if at least 0.5.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    from sklearn.metrics import average_precision_score

    return _by_class(average_precision_score, logits, labels)


def aucs(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the ROC AUC of each class [C]; arguments, NaN and errors as in `average_precisions`."""
    from sklearn.metrics import roc_auc_score

    return _by_class(roc_auc_score, logits, labels)


def d_prime(auc: float) -> float:
    """Return d' of a ROC AUC, sqrt(2) times the inverse of the standard normal CDF.

    An AUC of 1 gives infinity, 0.5 gives 0, NaN gives NaN. As in the original's `stats.py`, metrics report the d' of
    the mean AUC, not the mean of the classes' d'.

    Raises:
        ValueError: an AUC outside [0, 1].
    """
    from scipy.special import ndtri

    if not (0 <= auc <= 1 or math.isnan(auc)):
        raise ValueError(f"auc: expected an AUC from 0 to 1, got {auc}")
    return math.sqrt(2) * float(ndtri(auc))


def evaluate_logits(logits: np.ndarray, labels: np.ndarray, config: ASTConfig) -> dict[str, float]:
    """Return the metrics of a problem type; the first of them selects the best epoch.

    If every example has exactly one label: "accuracy", "mAP", "mAUC", "d_prime", whatever the loss (Speech Commands is
    trained with binary cross-entropy and evaluated by accuracy); otherwise "mAP", "mAUC", "d_prime"; for regression
    "negative_mse".

    mAP and mAUC are means over the classes that have positives and negatives, NaN if no class has both. Examples are
    ranked by a class's logits, for a single-label model by its softmax scores. (The original ranks by the sigmoid of
    the logits there too, but a softmax model's logits are comparable within an example only.)

    Args:
        logits: [N, C].
        labels: [N, C]; multi-label: positive if at least 0.5; single-label: the largest is the true class.
        config: its `problem_type` decides.

    Raises:
        ValueError: shapes that do not match, values that are not finite, or single-label examples without a label.
    """
    logits, labels = _pair(logits, labels, config.num_labels)
    if config.resolved_problem_type == ProblemType.REGRESSION:
        return {"negative_mse": -float(np.square(logits - labels).mean())}
    positive = _positive(labels, config)
    ranking = _ranking(logits, config)
    return _overall(logits, positive, average_precisions(ranking, positive), aucs(ranking, positive))


def report(logits: np.ndarray, labels: np.ndarray, config: ASTConfig, threshold: float = 0.5) -> Report:
    """Return the report of predictions as JSON-serialisable data; None stands for a number that is not finite.

    Keys: "problem_type"; "examples", their number; "threshold", None for a single-label model, which predicts the class
    of the highest score; "metrics" of `evaluate_logits`; "classes", a list in index order with "name", "positives",
    "average_precision", "auc", "precision", "recall" and "f1"; "ranked_classes", the number of classes with an average
    precision; "micro" and "macro" averages of "precision", "recall" and "f1"; "confusion" [C][C], counts with true
    classes as rows and predicted classes as columns, None unless every example has exactly one label.

    Macro averages are over the classes with positives; there a class that is never predicted has a precision of 0. In
    "classes" that precision is None, and so is the recall of a class without positives. For regression the keys are
    "problem_type", "examples", "metrics" and "classes" with "name" and "mean_squared_error".

    Args:
        logits: [N, C].
        labels: [N, C], as in `evaluate_logits`.
        config: its `problem_type` decides, and its labels name the classes.
        threshold: the lowest score that is a positive prediction of a multi-label model.

    Raises:
        ValueError: as in `evaluate_logits`, or a threshold outside [0, 1].
    """
    logits, labels = _pair(logits, labels, config.num_labels)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a score from 0 to 1, got {threshold}")
    kind = config.resolved_problem_type
    begin = {"problem_type": kind, "examples": len(logits)}
    if kind == ProblemType.REGRESSION:
        errors = np.square(logits - labels).mean(0)
        by_class = [{"name": n, "mean_squared_error": float(e)} for n, e in zip(config.labels, errors, strict=True)]
        return {**begin, "metrics": evaluate_logits(logits, labels, config), "classes": by_class}
    positive = _positive(labels, config)
    ranking = _ranking(logits, config)
    precisions, areas = average_precisions(ranking, positive), aucs(ranking, positive)
    single = kind == ProblemType.SINGLE_LABEL
    predicted = _one_hot(logits.argmax(-1), config) if single else to_scores(logits, config) >= threshold
    return {
        **begin,
        "threshold": None if single else float(threshold),
        "metrics": {name: _json(value) for name, value in _overall(logits, positive, precisions, areas).items()},
        "ranked_classes": int(np.isfinite(precisions).sum()),
        "micro": _averaged(positive, predicted, range(config.num_labels), average="micro", zero_division=np.nan),
        "macro": _averaged(
            positive, predicted, np.flatnonzero(positive.any(0)).tolist(), average="macro", zero_division=0.0
        ),
        "classes": _classes(config.labels, positive, predicted, precisions, areas),
        "confusion": _confusion(logits, positive) if _exclusive(positive) else None,
    }


def report_lines(found: Report, limit: int = 20) -> list[str]:
    """Return a report as lines of text: metrics, classes by descending average precision, most frequent confusions.

    Args:
        found: a report of `report`.
        limit: maximum number of classes, at least 2; of more, the best and the worst are shown.

    Raises:
        ValueError: a limit below 2.
    """
    if limit < 2:
        raise ValueError(f"limit: expected 2 classes or more, got {limit}")
    kind, classes = found["problem_type"].replace("_", "-").removesuffix("-classification"), found["classes"]
    lines = [f"{found['examples']:,} examples, {len(classes):,} classes, {kind}"]
    lines.append("  ".join(f"{name} {_cell(value)}" for name, value in found["metrics"].items()))
    if found["problem_type"] == ProblemType.REGRESSION:
        return lines + [f"{_name(entry['name'])}  {entry['mean_squared_error']:.4g}" for entry in classes]
    decided = "the highest-scoring class" if found["threshold"] is None else f"score {found['threshold']:g} or more"
    lines[0] += f"; precision, recall and F1 for {decided}; best AP first"
    lines += ["", f"{_name('')} precision   recall       F1       AP      AUC  positives"]
    lines += [f"{_name(name)} {_figures(found[name])}" for name in ("micro", "macro")]
    ranked = [entry for entry in classes if entry["average_precision"] is not None]
    ranked.sort(key=lambda entry: entry["average_precision"], reverse=True)
    rows = [f"{_name(entry['name'])} {_figures(entry)}  {entry['positives']:9,}" for entry in ranked]
    if len(rows) > limit:
        between = f"... {len(rows) - limit:,} more between"
        rows = [*rows[: limit - limit // 2], between, *rows[-(limit // 2) :]]
    lines += rows
    if len(ranked) < len(classes):
        lines.append(f"not ranked, without positives or without negatives: {len(classes) - len(ranked):,}")
    return lines + _confusion_lines(found)


def _confusion_lines(found: Report, limit: int = 5) -> list[str]:
    """Return the most frequent confusions, if the report has a confusion matrix."""
    if found["confusion"] is None:
        return []
    names = [" ".join(entry["name"].split()) for entry in found["classes"]]
    counts = np.array(found["confusion"])
    np.fill_diagonal(counts, 0)
    most = np.argsort(-counts, axis=None, kind="stable")[:limit]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(most, counts.shape), strict=True)]
    lines = [f"{counts[pair]:,} of {names[pair[0]]} taken for {names[pair[1]]}" for pair in pairs if counts[pair]]
    return ["", *lines] if lines else []


def _figures(entry: dict[str, Any]) -> str:
    """Return the columns of a class, or of an average, which has no AP and no AUC."""
    keys = [key for key in ("precision", "recall", "f1", "average_precision", "auc") if key in entry]
    return f" {_cell(entry[keys[0]]):>8} " + " ".join(f"{_cell(entry[key]):>8}" for key in keys[1:])


def _cell(value: float | None) -> str:
    """Return a metric with four decimals, "-" for None."""
    return "-" if value is None else f"{value:.4f}"


def _name(text: str) -> str:
    """Return a name padded or cut to the column's width; wide characters take two terminal cells."""
    return set_cell_size(" ".join(text.split()), 32)


def _overall(logits: np.ndarray, positive: np.ndarray, precisions: np.ndarray, areas: np.ndarray) -> dict[str, float]:
    """Return the metrics of a classification; the first selects the best epoch."""
    usable = np.isfinite(precisions)
    mean_area = float(areas[usable].mean()) if usable.any() else math.nan
    means = {"mAP": float(precisions[usable].mean()) if usable.any() else math.nan, "mAUC": mean_area}
    means["d_prime"] = d_prime(mean_area)
    if not _exclusive(positive):
        return means
    accuracy = {"accuracy": float((logits.argmax(-1) == positive.argmax(-1)).mean())}
    return {**accuracy, **means}


def _classes(
    names: tuple[str, ...], positive: np.ndarray, predicted: np.ndarray, precisions: np.ndarray, areas: np.ndarray
) -> list[Report]:
    """Return the report of each class."""
    rates = _rates(positive, predicted, range(len(names)), average=None, zero_division=np.nan)
    columns = zip(names, positive.sum(0), precisions, areas, *rates, strict=True)
    return [
        {"name": name, "positives": int(count), "average_precision": _json(ap), "auc": _json(area), **_by_name(*found)}
        for name, count, ap, area, *found in columns
    ]


def _averaged(positive: np.ndarray, predicted: np.ndarray, classes: Sequence[int], **options: Any) -> Report:
    """Return averages of precision, recall and F1 over some classes, None if there are no classes."""
    return _by_name(*(_rates(positive, predicted, classes, **options) if len(classes) else [math.nan] * 3))


def _rates(positive: np.ndarray, predicted: np.ndarray, classes: Sequence[int], **options: Any) -> Any:
    """Return scikit-learn's precision, recall and F1 of some classes."""
    from sklearn.metrics import precision_recall_fscore_support

    if positive.shape[1] == 1:  # scikit-learn takes a single column for a binary problem with the classes 0 and 1
        positive, predicted, classes = positive[:, 0], predicted[:, 0], [1]
    return precision_recall_fscore_support(positive, predicted, labels=classes, **options)[:3]


def _by_name(precision: float, recall: float, f1: float) -> Report:
    """Return the three rates by name, JSON-serialisable."""
    return {"precision": _json(precision), "recall": _json(recall), "f1": _json(f1)}


def _confusion(logits: np.ndarray, positive: np.ndarray) -> list[list[int]]:
    """Return the confusion matrix [C][C], true classes as rows and predicted classes as columns."""
    from sklearn.metrics import confusion_matrix

    classes = np.arange(positive.shape[1])
    return confusion_matrix(positive.argmax(-1), logits.argmax(-1), labels=classes).tolist()


def _json(value: float) -> float | None:
    """Return a Python float, or None for a value that JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def _ranking(logits: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return [N, C] that rank the examples of each class: logits, where a sigmoid would add ties, or softmax scores."""
    return logits if config.resolved_problem_type == ProblemType.MULTI_LABEL else to_scores(logits, config)


def _positive(labels: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return the true classes of each example: bool [N, C]."""
    if config.resolved_problem_type == ProblemType.MULTI_LABEL:
        return labels >= 0.5
    if several := int(((labels >= 0.5).sum(-1) > 1).sum()):
        raise ValueError(f"labels: expected one class an example, got {several} of {len(labels)} examples with several")
    without = int((labels.max(-1) <= 0).sum())
    if without:
        raise ValueError(f"labels: expected one class an example, got {without} of {len(labels)} examples with none")
    return _one_hot(labels.argmax(-1), config)


def _one_hot(classes: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return class indices [N] as one-hot rows: bool [N, C]."""
    return classes[:, None] == np.arange(config.num_labels)


def _exclusive(positive: np.ndarray) -> bool:
    """Whether every example has exactly one label."""
    return bool((positive.sum(-1) == 1).all())


def _by_class(metric: Callable[[np.ndarray, np.ndarray], float], logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return a metric of labels and scores for each class [C], NaN for a class without positives or negatives."""
    logits, labels = _pair(logits, labels)
    pairs = zip((labels >= 0.5).T, logits.T, strict=True)
    return np.array(
        [
            metric(truth, score) if 0 < truth.sum() < len(truth) else np.nan
            for truth, score in track(pairs, "metrics by class", logits.shape[1])
        ]
    )


def _pair(logits: np.ndarray, labels: np.ndarray, num_labels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Check logits and labels, and return them as float64 [N, C]."""
    logits, labels = _finite("logits", logits, num_labels), _finite("labels", labels)
    if labels.shape != logits.shape:
        raise ValueError(f"labels: expected the logits' shape {logits.shape}, got {labels.shape}")
    return logits, labels


def _finite(name: str, values: np.ndarray, num_labels: int | None = None) -> np.ndarray:
    """Check that values are [N, C], N at least 1, and finite; return them as float64."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or num_labels not in (None, values.shape[1]):
        expected = "C" if num_labels is None else num_labels
        raise ValueError(f"{name}: expected shape (N, {expected}) with one example or more, got {values.shape}")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{name}: expected finite numbers, got {bad} of {values.size} NaN or infinite; {_LOOK_AT[name]}"
        )
    return values
