"""Ctrl-C and SIGTERM, held back to where stopping is safe."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

HELD_BACK = (signal.SIGINT, signal.SIGTERM)
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came while a run was training; ends the process with status 143 where nobody catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@contextlib.contextmanager
def held_back(numbers: tuple[int, ...] = HELD_BACK) -> Iterator[Callable[[], int | None]]:
    """Hold signals back; yield a function that returns the number of the one that came, or None.

    An exception in the middle of a step could land in a callback of JAX, which swallows it, or leave XLA's threads
    working while the process ends; in the middle of saving it would lose the epoch. A second signal stops at once.
    Outside the main thread, which alone may handle signals, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        for one in numbers:
            signal.signal(one, lambda second, _: stop(second))

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int) -> NoReturn:
    """Raise what stands for a signal: KeyboardInterrupt or `Terminated`."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated()
