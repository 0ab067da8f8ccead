"""Progress bars on stderr: where that is a terminal, and only of what takes longer than two seconds.

A thread of its own draws them, ten times a second, so that a single long step has a bar too. What is at work only keeps
count. Nothing waits for the thread for longer than a second, whatever it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import TaskID

PATIENCE = 2.0  # seconds
TICK = 0.1  # seconds
Total = float | None | Callable[[], float | None]
_Item = TypeVar("_Item")


@dataclasses.dataclass(eq=False)
class _Bar:
    """A bar that is open."""

    title: str
    total: Total
    stream: TextIO
    began: float = dataclasses.field(default_factory=time.monotonic)
    done: float = 0.0

    @property
    def due(self) -> bool:
        """Whether it takes a while."""
        return time.monotonic() - self.began >= PATIENCE

    def advance(self, count: float) -> None:
        self.done += count


_open: list[_Bar] = []
_awake = threading.Event()  # bars are open
_painting = threading.Lock()  # never waited for without end: the garbage collector may close a bar within
_painter: int | None = None  # the thread that holds it
_thread: threading.Thread | None = None
_screen: _Screen | None = None  # that shows bars; only for who holds the lock


@contextlib.contextmanager
def progress(title: str, total: Total = None) -> Iterator[Callable[[float], None]]:
    """Yield what advances a bar by some steps; beside the main thread, or where stderr is no terminal, there is none.

    A bar within another is drawn under it.

    Args:
        title: what the steps are.
        total: how many there will be, None where nobody knows; or a function that says so, called by the thread that
            draws until it does.
    """
    stream = sys.stderr
    if threading.current_thread() is not threading.main_thread() or not _is_terminal(stream):
        yield lambda count: None
        return
    bar = _Bar(title, total, stream)
    try:
        _open.append(bar)
        _wake_up()
        yield bar.advance
    finally:
        with contextlib.suppress(ValueError):  # interrupted before it was there
            _open.remove(bar)
        if bar.due:  # and drawn, or just being so
            with aside():  # those that stay open are drawn anew
                pass


def track(items: Iterable[_Item], title: str, total: int | None = None) -> Iterator[_Item]:
    """Yield items while a bar says how many of `total` are done, if there are several."""
    if total == 1:
        yield from items
        return
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Keep bars away while something is printed to the terminal."""
    with _the_brush() as mine:
        if mine and _screen is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                _screen.hide()
        yield


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None where there is no stderr; closed; or something that can only write
        return False


def _wake_up() -> None:
    """See to it that the thread is there and at work."""
    global _thread
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_draw, name="ast_jax progress", daemon=True)
        _thread.start()
    _awake.set()


@contextlib.contextmanager
def _the_brush() -> Iterator[bool]:
    """Hold the lock if it is to be had within a second, and not this thread's already; yield whether."""
    global _painter
    me = threading.get_ident()
    mine = _painter != me and _painting.acquire(timeout=1.0)
    try:
        if mine:
            _painter = me
        yield mine
    finally:
        if mine:
            _painter = None
            _painting.release()


def _draw() -> None:
    """Draw whatever is open for long enough, for ever; a terminal that is gone ends it."""
    global _screen
    with contextlib.suppress(OSError, ValueError):
        while True:
            _awake.wait()
            time.sleep(TICK)
            due = [bar for bar in list(_open) if bar.due]
            for bar in due:
                _ask_for_total(bar)
            with _the_brush() as mine:
                due = [bar for bar in due if bar in _open]
                if mine and due:
                    if _screen is None or _screen.console.file is not due[0].stream:
                        _screen = _Screen(due[0].stream)
                    _screen.show(due)
                elif mine and _screen is not None:
                    _screen.hide()
            if not _open:
                _awake.clear()
                if _open:  # since then
                    _awake.set()


def _ask_for_total(bar: _Bar) -> None:
    """Put a number in the place of a function that knows one."""
    if callable(bar.total):
        total = bar.total()
        if total is not None:
            bar.total = total


class _Screen:
    """Where bars are drawn, by rich."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        class Plain(Console):
            """Leaves the cursor alone: a process that is killed could not show it again."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        self.console = Plain(file=stream)
        self.tasks: dict[_Bar, TaskID] = {}
        title, steps = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[steps]}")
        self.bars = Progress(title, BarColumn(), steps, TimeRemainingColumn(), console=self.console)
        self.live: Live | None = None  # while they are shown

    def show(self, bars: list[_Bar]) -> None:
        """Draw these."""
        from rich.live import Live

        for gone in self.tasks.keys() - set(bars):
            self.bars.remove_task(self.tasks.pop(gone))
        for bar in bars:
            if bar not in self.tasks:
                self.tasks[bar] = self.bars.add_task(bar.title, total=None, steps="")
            total = None if callable(bar.total) else bar.total
            steps = f"{bar.done:.0f}/{total:.0f}" if total is not None else f"{bar.done:.0f}" if bar.done else ""
            self.bars.update(self.tasks[bar], total=total, completed=bar.done, steps=steps)
        if self.live is None:
            self.live = Live(
                self.bars, console=self.console, transient=True, auto_refresh=False,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self.live.start()
        self.live.refresh()

    def hide(self) -> None:
        """Take them away."""
        live, self.live = self.live, None
        if live is not None:
            live.stop()


def _forget() -> None:
    """Begin anew in a process that was forked: its parent's bars and thread are not its own."""
    global _awake, _painting, _painter, _screen
    _open.clear()
    _awake, _painting, _painter, _screen = threading.Event(), threading.Lock(), None, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
