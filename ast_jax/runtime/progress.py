"""Progress bars on stderr, drawn by rich while a display is open: the command line and the trainer open it.

Library code calls `track` and `step` wherever a bar is worth it; without a display they draw nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.live import Live

_Item = TypeVar("_Item")
_active: contextvars.ContextVar[_Display | None] = contextvars.ContextVar("progress display", default=None)


@contextlib.contextmanager
def progress_display() -> Iterator[None]:
    """Draw the bars of `track` and `step` on stderr until this exits; none where stderr is no terminal.

    Within an open display this does nothing. Threads started meanwhile have no display.
    """
    if _active.get() is not None or not _is_terminal(sys.stderr):
        yield
        return
    display = _Display(sys.stderr)
    token = _active.set(display)
    try:
        yield
    finally:
        _active.reset(token)
        display.hide()


@contextlib.contextmanager
def step(description: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Draw a bar until this exits, and yield a function that advances it by a count.

    Args:
        description: printed before the bar.
        total: count at which the step is complete; None for a pulsing bar with the elapsed time.
    """
    display = _current()
    if display is None:
        yield lambda count: None
        return
    task = display.bars.add_task(description, total=total)
    try:
        display.show()
        yield functools.partial(display.bars.advance, task)
    finally:
        display.bars.remove_task(task)
    # Not in `finally`: a generator that the garbage collector closes must not wait for the lock of the drawing thread.
    if not display.bars.tasks:
        display.hide()


def track(items: Iterable[_Item], description: str, total: float | None = None) -> Iterator[_Item]:
    """Yield items and draw a bar that counts them; see `step`."""
    with step(description, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """Remove the bars from the terminal while something else is printed to it."""
    display = _current()
    if display is not None:
        display.hide()
    try:
        yield
    finally:
        if display is not None:
            display.show()


class _Display:
    """The open tasks, and the thread of rich that draws them."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.text import Text

        class CursorConsole(Console):
            """Never hides the cursor: a process that is killed could not show it again."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        class Count(MofNCompleteColumn):
            """Count and total, of tasks that have a total."""

            def render(self, task: Any) -> Text:
                return Text() if task.total is None else super().render(task)

        title = TextColumn("{task.description}", markup=False)
        self.bars = Progress(
            title, BarColumn(), Count(), TimeElapsedColumn(), Remaining(), console=CursorConsole(file=stream)
        )
        self.live: Live | None = None
        self.process = os.getpid()

    def show(self) -> None:
        """Draw the open tasks until `hide`. A new `Live` each time: one that starts again erases what was printed."""
        from rich.live import Live

        if self.live is None and self.bars.tasks:
            self.live = Live(
                self.bars, console=self.bars.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                self.live.start(refresh=True)

    def hide(self) -> None:
        """Erase the bars."""
        live, self.live = self.live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.stop()


def _current() -> _Display | None:
    """Return the active display, unless this is a fork: its parent draws."""
    display = _active.get()
    return display if display is not None and display.process == os.getpid() else None


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, closed, or an object that can only write
        return False
