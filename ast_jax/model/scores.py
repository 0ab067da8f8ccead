"""Logits to scores, in NumPy (without importing JAX) and in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ast_jax.config import ASTConfig, ProblemType

if TYPE_CHECKING:
    import jax

Array = TypeVar("Array", "jax.Array", np.ndarray)


def scores(logits: Array, config: ASTConfig) -> Array:
    """Convert logits to scores: sigmoid for multi-label models, softmax over the classes for single-label ones.

    Args:
        logits: [..., C]. NumPy arrays are computed in float64, JAX arrays in their own dtype.
        config: its `problem_type` decides; for regression the logits are the scores.
    """
    kind = config.resolved_problem_type
    values: Any = logits
    if isinstance(logits, np.ndarray):
        from scipy.special import expit as sigmoid
        from scipy.special import softmax

        values = logits.astype(np.float64)
    else:
        from jax.nn import sigmoid, softmax
    if kind == ProblemType.REGRESSION:
        return values
    return sigmoid(values) if kind == ProblemType.MULTI_LABEL else softmax(values, axis=-1)
