"""The training loss and label smoothing for each problem type."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ast_jax.config import ASTConfig, ProblemType

Array = TypeVar("Array", jax.Array, np.ndarray)


def loss(logits: jax.Array, labels: ArrayLike, config: ASTConfig) -> jax.Array:
    """Return the mean loss over the batch: a scalar in the logits' dtype.

    Args:
        logits: [B, C].
        labels: single-label: class indices [B] or probabilities [B, C] (mixup); multi-label: [B, C] in [0, 1];
            regression: [B, C], or [B] where C is 1.
        config: its `problem_type` selects cross-entropy, binary cross-entropy with logits (averaged over the classes
            too) or mean squared error.

    Raises:
        ValueError: labels of another shape, or a class index out of range; under `jit`, which hides values, such an
            index gives NaN.
    """
    labels = jnp.asarray(labels)
    kind = config.resolved_problem_type
    if kind == ProblemType.SINGLE_LABEL and labels.shape == logits.shape[:-1]:
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels: expected class indices (integers) of shape {labels.shape}, got {labels.dtype}")
        classes = logits.shape[-1]
        known = (labels >= 0) & (labels < classes)
        if not isinstance(labels, jax.core.Tracer) and not known.all():
            raise ValueError(
                f"labels: expected class indices from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
            )
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(known, values, jnp.nan).mean()
    if kind == ProblemType.REGRESSION and labels.shape == logits.shape[:-1] and logits.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != logits.shape:
        raise ValueError(f"labels: expected shape {logits.shape} for {kind}, got {labels.shape}")
    labels = labels.astype(logits.dtype)
    if kind == ProblemType.SINGLE_LABEL:
        return optax.softmax_cross_entropy(logits, labels).mean()
    if kind == ProblemType.MULTI_LABEL:
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return jnp.square(logits - labels).mean()


def smooth(labels: Array, amount: float, config: ASTConfig) -> Array:
    """Apply label smoothing: [B, C].

    Args:
        labels: [B, C] probabilities.
        amount: s. Single-label: (1 - s) labels + s / C, as torch's `CrossEntropyLoss(label_smoothing=s)`; multi-label:
            (1 - s) labels + s / 2.
        config: its `problem_type` decides.

    Raises:
        ValueError: `amount` is not 0 for a regression.
    """
    if not amount:
        return labels
    kind = config.resolved_problem_type
    if kind == ProblemType.REGRESSION:
        raise ValueError(f"label_smoothing: expected 0 for regression: its labels are not probabilities; got {amount}")
    choices = labels.shape[-1] if kind == ProblemType.SINGLE_LABEL else 2
    return (1 - amount) * labels + amount / choices
