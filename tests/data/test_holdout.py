"""Examples held out for validation if a data set names no split."""

import pathlib

import numpy as np
import pytest

from ast_jax.data import datasets


def hold_out(*targets, seed=0):
    """Return the labels of the kept and of the held-out examples."""
    examples = [datasets.Example(pathlib.Path(str(number)), labels) for number, labels in enumerate(targets)]
    kept, held = datasets._hold_out(examples, seed)
    assert sorted(kept + held, key=lambda one: int(one.path.name)) == examples
    return ([example.targets for example in part] for part in (kept, held))


@pytest.mark.parametrize(("size", "wanted"), [(1, 0), (2, 1), (9, 1), (10, 1), (29, 2), (30, 3)])
def test_a_tenth_of_each_class_is_held_out(size, wanted):
    kept, held = hold_out(*[(0,)] * size, *[(1,)] * 50)
    assert (held.count((0,)), held.count((1,))) == (wanted, 5)
    assert kept.count((0,)) == size - wanted


def test_a_tenth_of_each_label_is_held_out_for_any_combinations():
    """200 examples with independently drawn labels, so that most combinations are rare."""
    rates = np.array([0.5, 0.3, 0.3, 0.2, 0.1, 0.02])
    drawn = np.random.default_rng(0).random((200, 6)) < rates
    targets = [tuple(np.flatnonzero(row).tolist()) for row in drawn]
    kept, held = hold_out(*targets)
    for label in range(6):
        total = drawn[:, label].sum()
        share = sum(label in one for one in held)
        assert max(1, total // 10) <= share <= total // 10 + 4  # some come along with rarer labels
    assert held.count(()) == targets.count(()) // 10
    assert list(hold_out(*targets)) == [kept, held]
    assert list(hold_out(*targets, seed=1)) != [kept, held]


def test_hold_out_keeps_a_training_example_of_each_label():
    kept, held = hold_out((0, 1), (0, 2), (1,), (2,))  # holding (0, 1) for 1 and (0, 2) for 2 would take all of 0
    assert {label for one in kept for label in one} == {0, 1, 2}
    assert {label for one in held for label in one} == {0, 1, 2}
