"""The order of an epoch: a permutation, or class-balanced sampling."""

import numpy as np
import pytest

from ast_jax.training.sampling import balanced_weights, epoch_order


def test_balanced_weights_are_the_originals():
    """Sums of 1000 / (count + 0.01), by hand: label 0 occurs three times, 1 and 2 once, 3 never."""
    weights = balanced_weights([(0,), (0, 1), (0,), (2,), ()], 4)
    often, once = 1000 / 3.01, 1000 / 1.01
    np.testing.assert_allclose(weights, [often, often + once, often, once, 0.0], rtol=1e-15)


@pytest.mark.parametrize("targets", [[(0,), (4,)], [(-1,)]])
def test_unknown_labels_have_no_weight(targets):
    with pytest.raises(ValueError, match="targets: expected indices from 0 to 3, got"):
        balanced_weights(targets, 4)


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(50, seed=3, epoch=1)
    assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(order, epoch_order(50, seed=3, epoch=1))
    for seed, epoch in ((3, 2), (4, 1), (1, 3)):
        assert (epoch_order(50, seed, epoch) != order).any()


def test_weighted_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 3.0] * 1000)
    order = epoch_order(3000, seed=0, epoch=0, weights=weights)
    assert order.shape == (3000,)
    assert order.dtype == np.int64
    counts = np.bincount(order % 3, minlength=3)
    assert counts[0] == 0
    assert abs(counts[2] / 3000 - 0.75) < 0.04  # five standard errors of 0.008
    assert len(set(order.tolist())) < 2000  # with replacement
    np.testing.assert_array_equal(order, epoch_order(3000, 0, 0, weights))
    assert (epoch_order(3000, 0, 1, weights) != order).any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"expected shape \(4,\)"), (np.zeros(4), "one above 0, got 0.0 to 0.0"),
        (np.array([1, 1, 1, -1]), "got -1.0 to 1.0"), (np.array([1, 1, 1, np.nan]), "got nan to nan"),
    ],
)  # fmt: skip
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"weights: .*{message}"):
        epoch_order(4, 0, 0, weights)
