"""Progress bars on stderr: on a terminal alone, and only of what takes longer than two seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import Timer
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0  # seconds
Total = float | None | Callable[[], float | None]
_Item = TypeVar("_Item")


@contextlib.contextmanager
def progress(title: str, total: Total = None) -> Iterator[Callable[[float], None]]:
    """Yield what advances a bar by some steps; where stderr is no terminal, it does nothing.

    A bar within another is drawn under it. What is printed meanwhile stands above them.

    Args:
        title: what the steps are.
        total: how many there will be, None where nobody knows; or a function that says so, called by a thread when the
            bar is drawn.
    """
    on_terminal = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
    if not on_terminal or threading.current_thread() is not threading.main_thread():
        yield lambda count: None
        return
    bar = _Bar(title, total)
    try:
        yield bar.advance
    finally:
        bar.close()


def track(items: Iterable[_Item], title: str, total: int | None = None) -> Iterator[_Item]:
    """Yield items while a bar says how many of `total` are done."""
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance(1)


class _Bar:
    """A bar, which a timer draws."""

    lock = threading.Lock()
    screen: Progress | None = None  # where all bars are drawn that are there

    def __init__(self, title: str, total: Total):
        self.title, self.total = title, total
        self.done, self.of = 0.0, ""
        self.task: TaskID | None = None
        self.closed = False
        self.timer = Timer(PATIENCE, self.draw)
        self.timer.daemon = True
        self.timer.start()

    def draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        total = self.total() if callable(self.total) else self.total
        with _Bar.lock:
            if self.closed:
                return
            if _Bar.screen is None:
                title, steps = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[steps]}")
                _Bar.screen = Progress(
                    title, BarColumn(), steps, TimeRemainingColumn(),
                    console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
                )  # fmt: skip
                _Bar.screen.start()
            self.of = "" if total is None else f"/{total:.0f}"
            self.task = _Bar.screen.add_task(self.title, total=total, steps="")
        self.advance(0)

    def advance(self, count: float) -> None:
        with _Bar.lock:
            self.done += count
            if _Bar.screen is not None and self.task is not None:
                steps = f"{self.done:.0f}{self.of}" if self.done or self.of else ""
                _Bar.screen.update(self.task, completed=self.done, steps=steps)

    def close(self) -> None:
        self.timer.cancel()
        with _Bar.lock:
            self.closed = True
            if _Bar.screen is not None and self.task is not None:
                if len(_Bar.screen.tasks) == 1:
                    _Bar.screen.stop()
                    _Bar.screen = None
                else:
                    _Bar.screen.remove_task(self.task)
