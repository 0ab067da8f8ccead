"""How good predictions are, from logits; the curves are scikit-learn's."""

from __future__ import annotations

import numpy as np

from .config import ASTConfig


def average_precisions(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision of each class [C]; NaN where a class has no positive or nothing but positives.

    Args:
        logits: [N, C]; any monotone function of them gives the same.
        labels: [N, C], positive where at least 0.5.
    """
    from sklearn.metrics import average_precision_score

    positive = np.asarray(labels) >= 0.5
    return np.array(
        [
            average_precision_score(truth, score) if 0 < truth.sum() < len(truth) else np.nan
            for truth, score in zip(positive.T, np.asarray(logits).T, strict=True)
        ]
    )


def evaluate_logits(logits: np.ndarray, labels: np.ndarray, config: ASTConfig) -> dict[str, float]:
    """Return the metrics that belong to the problem type, the one that chooses the best epoch first.

    Multi-label: "mAP" (mean over the classes that have positives and negatives) and "mAUC"; single-label: "accuracy";
    regression: "negative_mse".

    Args:
        logits: [N, C].
        labels: [N, C].
        config: whose `problem_type` decides.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    kind = config.resolved_problem_type
    if kind == "regression":
        return {"negative_mse": -float(np.square(logits - labels).mean())}
    if kind == "single_label_classification":
        return {"accuracy": float((logits.argmax(-1) == labels.argmax(-1)).mean())}
    from sklearn.metrics import roc_auc_score

    precisions = average_precisions(logits, labels)
    usable = ~np.isnan(precisions)
    if not usable.any():
        return {"mAP": float("nan"), "mAUC": float("nan")}
    auc = roc_auc_score(labels[:, usable] >= 0.5, logits[:, usable], average="macro")
    return {"mAP": float(precisions[usable].mean()), "mAUC": float(auc)}
