"""The order of examples in an epoch: shuffled, or weighted sampling for class balance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_weights(targets: Sequence[Sequence[int]], num_labels: int) -> np.ndarray:
    """Return sampling weights [N], larger for examples with rarer labels.

    As in the original's `gen_weight_file.py`, a weight is the sum over an example's labels of 1000 / (count + 0.01),
    where count is the number of examples with that label. An example without labels has a weight of 0.

    Args:
        targets: label indices of each of N examples.
        num_labels: C.

    Raises:
        ValueError: an index that is not in [0, C).
    """
    flat = np.array([index for labels in targets for index in labels], np.int64)
    if flat.size and (flat.min() < 0 or flat.max() >= num_labels):
        raise ValueError(f"targets: expected indices from 0 to {num_labels - 1}, got {flat.min()} to {flat.max()}")
    weight_of = 1000.0 / (np.bincount(flat, minlength=num_labels) + 0.01)
    return np.array([weight_of[list(labels)].sum() for labels in targets])


def epoch_order(num_examples: int, seed: int, epoch: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the example indices [N] of one epoch, a function of (seed, epoch) only.

    Args:
        num_examples: N.
        seed: seed of the run.
        epoch: counted from 0.
        weights: [N] sampling weights, to draw N examples with replacement; None draws a permutation.

    Raises:
        ValueError: weights of another shape, negative, not finite, or all zero.
    """
    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        return rng.permutation(num_examples)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_examples,):
        raise ValueError(f"weights: expected shape {(num_examples,)}, one for each example, got {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(
            f"weights: expected numbers of 0 or more with one above 0, got {weights.min()} to {weights.max()}; "
            "balanced sampling needs examples with labels"
        )
    return rng.choice(num_examples, num_examples, p=weights / weights.sum())
