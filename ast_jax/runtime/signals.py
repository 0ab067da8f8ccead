"""Deferring SIGINT and SIGTERM to points where stopping is safe."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

DEFERRED = (signal.SIGINT, signal.SIGTERM)
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM arrived during training; uncaught, it ends the process with status 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@contextlib.contextmanager
def defer_signals(numbers: tuple[int, ...] = DEFERRED) -> Iterator[Callable[[], int | None]]:
    """Defer signals within the block; yield a function that returns the number of the received one, or None.

    An exception raised within a step may end in a JAX callback that swallows it, or leave XLA's threads running while
    the process exits; within a save it would lose the epoch. A second signal stops at once. Only the main thread can
    handle signals: in other threads nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def record(number: int, _: Any) -> None:
        received.append(number)
        for one in numbers:
            signal.signal(one, lambda second, _: stop(second))

    before = {number: signal.signal(number, record) for number in numbers}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int) -> NoReturn:
    """Raise the exception for a signal: KeyboardInterrupt or `Terminated`."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated()
