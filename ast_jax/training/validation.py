"""The validation of each epoch, and what the epochs so far add up to: mean weights and mean scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.config import ASTConfig
from ast_jax.model.losses import loss
from ast_jax.training.evaluate import Evaluator, Predictions
from ast_jax.training.metrics import evaluate_logits, scores
from ast_jax.training.states import TRAIN_LOSS, Record, selection_metric


class Gathered(NamedTuple):
    """Sums and means over the epochs so far, part of every saved state.

    Attributes:
        mean: mean of the epochs' parameters from `average_from` on, or None.
        total: [N, C] sum of the epochs' validation scores, or None.
        usable: [N] which validation examples could be read in every epoch, or None.
    """

    mean: Any
    total: np.ndarray | None
    usable: np.ndarray | None

    @classmethod
    def empty(cls, params: Any, averages: bool, num_examples: int, num_labels: int) -> Gathered:
        """Return the state before the first epoch."""
        return cls(
            jax.tree.map(np.zeros_like, params) if averages else None,
            np.zeros((num_examples, num_labels)) if num_examples else None,
            np.ones(num_examples, bool) if num_examples else None,
        )

    def with_params(self, params: Any, count: int) -> Gathered:
        """Return a copy whose mean includes an epoch's parameters, the `count`-th of those averaged."""
        return self._replace(mean=jax.tree.map(lambda old, new: old + (new - old) / count, self.mean, params))


def validate(
    evaluator: Evaluator,
    params: Any,
    record: Record,
    gathered: Gathered,
    config: ASTConfig,
    log: Callable[[str], None],
    between: Callable[[], None],
) -> tuple[dict[str, float], Gathered, np.ndarray]:
    """Evaluate an epoch on the validation split; the first decides `record.metric`.

    Args:
        evaluator: of the validation examples.
        params: replicated parameters.
        record: of the run, before the epoch's row is appended.
        gathered: over the epochs so far.
        config: the architecture.
        log: called with a line where nothing can be measured.
        between: called before each batch.

    Returns:
        The metrics, `gathered` with the epoch's scores, and the indices of examples that could not be read.
    """
    assert gathered.total is not None
    assert gathered.usable is not None
    found = evaluator(params, between)
    measured = _measure(found, config)
    record.metric = record.metric or _choose_metric(measured, log)
    total, usable = gathered.total + scores(found.logits, config), gathered.usable & found.usable
    mean = total / (len(record.history) + 1)
    measured |= _cumulative(record.metric, mean[usable], found.labels[usable], config)
    gathered = gathered._replace(total=total, usable=usable)
    return measured, gathered, np.flatnonzero(~found.usable)


def _measure(found: Predictions, config: ASTConfig) -> dict[str, float]:
    """Return the loss and the metrics of predictions."""
    logits, labels = found.measured()
    value = float(loss(jnp.asarray(logits), jnp.asarray(labels), config))
    return {"validation_loss": value, **evaluate_logits(logits, labels, config)}


def _choose_metric(measured: Mapping[str, float], log: Callable[[str], None]) -> str:
    """Return the metric that selects the best epoch."""
    metric = selection_metric(measured)
    if metric == TRAIN_LOSS:
        log(
            "no label has both positives and negatives among the validation examples: "
            "the best epoch will be the one with the lowest training loss"
        )
    return metric


def _cumulative(name: str, mean: np.ndarray, labels: np.ndarray, config: ASTConfig) -> dict[str, float]:
    """Return the selection metric of the mean scores of all epochs so far, the original's ensemble over epochs."""
    if name in (TRAIN_LOSS, "negative_mse"):
        return {}
    # Scores instead of logits: their ranks and maxima are what is measured.
    return {f"cumulative_{name}": evaluate_logits(mean, labels, config)[name]}
