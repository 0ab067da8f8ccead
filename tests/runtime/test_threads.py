"""`ordered_map`: results in order, a bounded number of items in flight, errors raised."""

import threading

import pytest

from ast_jax.runtime import threads


def test_results_come_in_order_and_few_items_are_in_flight():
    running, most, lock = 0, 0, threading.Lock()
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    def work(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return number * number

    results = threads.ordered_map(work, items(), num_threads=3)
    assert next(results) == 0
    assert len(taken) <= 3 * threads.AHEAD
    assert list(results) == [number * number for number in range(1, 50)]
    assert most <= 3


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(threads.ordered_map(lambda number: 1 / number, [1, 0, 2], num_threads=2))
