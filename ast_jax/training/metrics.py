"""How good predictions are, from logits: NumPy, and scikit-learn's curves."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Return the average precision of each class [C]; NaN where a class has no positive or nothing but positives.

    Args:
        logits: [N, C]; any monotone function of them gives the same.
        labels: [N, C], positive where at least 0.5.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    from sklearn.metrics import average_precision_score

    return _by_class(average_precision_score, logits, labels)


def aucs(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the area under each class's ROC curve [C]; arguments, NaN and errors as in `average_precisions`."""
    from sklearn.metrics import roc_auc_score

    return _by_class(roc_auc_score, logits, labels)


def d_prime(auc: float) -> float:
    """Return the distance between two unit normals whose ROC curve has this area, sqrt(2) times the inverse CDF.

    The area is in [0, 1]; 1 gives infinity, 0.5 zero, NaN NaN. As in the original's `stats.py`, it is the d' of the
    mean area that is reported, not the mean of the classes' d'.

    Raises:
        ValueError: an area out of its range.
    """
    from scipy.special import ndtri

    if not (0 <= auc <= 1 or math.isnan(auc)):
        raise ValueError(f"auc: expected an area from 0 to 1, got {auc}")
    return math.sqrt(2) * float(ndtri(auc))


def evaluate_logits(logits: np.ndarray, labels: np.ndarray, config: ASTConfig) -> dict[str, float]:
    """Return the metrics that belong to the problem type, the one that chooses the best epoch first.

    Where every example has exactly one label: "accuracy", "mAP", "mAUC", "d_prime", whichever loss was used, as Speech
    Commands is trained with binary cross-entropy and judged by accuracy; else "mAP", "mAUC", "d_prime"; regression:
    "negative_mse".

    mAP and mAUC are means over the classes that have positives and negatives, NaN where there are none such. Each class
    is ranked against the rest by its logits, for a single-label model by the softmax: unlike the original, which takes
    the sigmoid of the logits there too, although only their differences mean something.

    Args:
        logits: [N, C].
        labels: [N, C]; multi-label: positive where at least 0.5; single-label: the largest is the true class.
        config: whose `problem_type` decides.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or single-label examples without a label.
    """
    logits, labels = _pair(logits, labels, config.num_labels)
    if config.resolved_problem_type == ProblemType.REGRESSION:
        return {"negative_mse": -float(np.square(logits - labels).mean())}
    positive = _positive(labels, config)
    ranking = _ranking(logits, config)
    return _overall(logits, positive, config, average_precisions(ranking, positive), aucs(ranking, positive))


def report(logits: np.ndarray, labels: np.ndarray, config: ASTConfig, threshold: float = 0.5) -> Report:
    """Return everything there is to say about predictions, ready for JSON: None stands for what is not a finite number.

    Keys: "problem_type"; "examples", their count; "threshold", None where the best class is what counts; "metrics", as
    `evaluate_logits` has them; "classes", a list in index order of "name", "positives", "average_precision", "auc",
    "precision", "recall" and "f1"; "ranked_classes", how many of them have an average precision; "micro" and "macro",
    with "precision", "recall" and "f1"; "confusion" [C][C], counts with a row for each true and a column for each best
    class, None unless every example has exactly one label.

    Macro is the mean over the classes that have positives, where a class that is never predicted counts with a
    precision of zero; for the class itself that precision is None, as is the recall of one without positives. For
    regression there are "problem_type", "examples", "metrics" and "classes" with "name" and "mean_squared_error".

    Args:
        logits: [N, C].
        labels: [N, C], as in `evaluate_logits`.
        config: whose `problem_type` decides, and whose labels name the classes.
        threshold: the score from which on a multi-label model is taken to say yes.

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
    predicted = _one_hot(logits.argmax(-1), config) if single else scores(logits, config) >= threshold
    return {
        **begin,
        "threshold": None if single else float(threshold),
        "metrics": {
            name: _json(value) for name, value in _overall(logits, positive, config, precisions, areas).items()
        },
        "ranked_classes": int(np.isfinite(precisions).sum()),
        **_decisions(positive, predicted),
        "classes": _classes(config.labels, positive, predicted, precisions, areas),
        "confusion": _confusion(logits, positive) if _exclusive(positive) else None,
    }


def report_lines(found: Report, limit: int = 20) -> list[str]:
    """Return a report for the terminal: the metrics, the classes from best to worst, the most frequent confusions.

    Args:
        found: what `report` returned.
        limit: how many classes to show, at least 2; of more the best half and the worst half are shown.

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
    """Return the most frequent confusions, where every example has exactly one label."""
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
    """Return the columns of a class, or those of a mean, which has no ranking."""
    keys = [key for key in ("precision", "recall", "f1", "average_precision", "auc") if key in entry]
    return f" {_cell(entry[keys[0]]):>8} " + " ".join(f"{_cell(entry[key]):>8}" for key in keys[1:])


def _cell(value: float | None) -> str:
    """Return a metric with four decimals, "-" where there is none."""
    return "-" if value is None else f"{value:.4f}"


def _name(text: str) -> str:
    """Return a name as wide as a column: wide characters take two places of a terminal."""
    return set_cell_size(" ".join(text.split()), 32)


def _overall(
    logits: np.ndarray, positive: np.ndarray, config: ASTConfig, precisions: np.ndarray, areas: np.ndarray
) -> dict[str, float]:
    """Return the metrics of a classification in their order."""
    usable = np.isfinite(precisions)
    mean_area = float(areas[usable].mean()) if usable.any() else math.nan
    means = {"mAP": float(precisions[usable].mean()) if usable.any() else math.nan, "mAUC": mean_area}
    means["d_prime"] = d_prime(mean_area)
    if not _exclusive(positive):
        return means
    accuracy = {"accuracy": float((logits.argmax(-1) == positive.argmax(-1)).mean())}
    return {**accuracy, **means}


def _decisions(positive: np.ndarray, predicted: np.ndarray) -> Report:
    """Return precision, recall and F1 over all decisions together, and their means over the classes with positives."""
    hits, said, true = (positive & predicted).sum(0), predicted.sum(0), positive.sum(0)
    rates = [np.nan_to_num(rate[true > 0]) for rate in _rates(hits, said, true)]
    macro = [rate.mean() if rate.size else math.nan for rate in rates]
    return {"micro": _prf(*map(float, _rates(hits.sum(), said.sum(), true.sum()))), "macro": _prf(*macro)}


def _classes(
    names: tuple[str, ...], positive: np.ndarray, predicted: np.ndarray, precisions: np.ndarray, areas: np.ndarray
) -> list[Report]:
    """Return what there is to say about each class."""
    counts = positive.sum(0)
    rates = _rates((positive & predicted).sum(0), predicted.sum(0), counts)
    return [
        {"name": name, "positives": int(count), "average_precision": _json(ap), "auc": _json(area), **_prf(*found)}
        for name, count, ap, area, *found in zip(names, counts, precisions, areas, *rates, strict=True)
    ]


def _rates(hits: np.ndarray, said: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 from counts, NaN for nothing out of nothing."""
    with np.errstate(invalid="ignore"):
        return hits / said, hits / true, 2 * hits / (said + true)


def _prf(precision: float, recall: float, f1: float) -> Report:
    """Return the three by name, ready for JSON."""
    return {"precision": _json(precision), "recall": _json(recall), "f1": _json(f1)}


def _confusion(logits: np.ndarray, positive: np.ndarray) -> list[list[int]]:
    """Return counts [C][C], a row for each true class and a column for each best class."""
    from sklearn.metrics import confusion_matrix

    classes = np.arange(positive.shape[1])
    return confusion_matrix(positive.argmax(-1), logits.argmax(-1), labels=classes).tolist()


def _json(value: float) -> float | None:
    """Return a plain number, or None for what JSON has no word for."""
    return float(value) if math.isfinite(value) else None


def _ranking(logits: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return [N, C], by which the examples are ranked for each class: logits where a sigmoid would only make ties."""
    return logits if config.resolved_problem_type == ProblemType.MULTI_LABEL else scores(logits, config)


def _positive(labels: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return which classes an example has: bool [N, C]."""
    if config.resolved_problem_type == ProblemType.MULTI_LABEL:
        return labels >= 0.5
    if several := int(((labels >= 0.5).sum(-1) > 1).sum()):
        raise ValueError(f"labels: expected one class an example, got {several} of {len(labels)} examples with several")
    without = int((labels.max(-1) <= 0).sum())
    if without:
        raise ValueError(f"labels: expected one class an example, got {without} of {len(labels)} examples with none")
    return _one_hot(labels.argmax(-1), config)


def _one_hot(classes: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return bool [N, C] with one True a row."""
    return classes[:, None] == np.arange(config.num_labels)


def _exclusive(positive: np.ndarray) -> bool:
    """Whether every example has exactly one label."""
    return bool((positive.sum(-1) == 1).all())


def _by_class(metric: Callable[[np.ndarray, np.ndarray], float], logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the metric of each class's truth and scores [C], NaN where a class has no positives or no negatives."""
    logits, labels = _pair(logits, labels)
    pairs = zip((labels >= 0.5).T, logits.T, strict=True)
    return np.array(
        [
            metric(truth, score) if 0 < truth.sum() < len(truth) else np.nan
            for truth, score in track(pairs, "metrics by class", logits.shape[1])
        ]
    )


def _pair(logits: np.ndarray, labels: np.ndarray, num_labels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 [N, C]."""
    logits, labels = _finite("logits", logits, num_labels), _finite("labels", labels)
    if labels.shape != logits.shape:
        raise ValueError(f"labels: expected the logits' shape {logits.shape}, got {labels.shape}")
    return logits, labels


def _finite(name: str, values: np.ndarray, num_labels: int | None = None) -> np.ndarray:
    """Return values as float64 [N, C], at least one of them and all of them finite."""
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
