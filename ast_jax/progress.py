"""Progress bars on stderr: on a terminal alone, and only of what takes longer than two seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

PATIENCE = 2.0  # seconds
_Item = TypeVar("_Item")
_drawn: list[str] = []  # the bar that is there: a terminal has room for one


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield what advances a bar by some steps; where stderr is no terminal, or has a bar already, it does nothing."""
    if _drawn or not (sys.stderr.isatty() or os.environ.get("FORCE_COLOR")):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(title, total=total)
    began = time.monotonic()

    def advance(count: int) -> None:
        bar.advance(task, count)
        if not bar.live.is_started and time.monotonic() - began >= PATIENCE:
            bar.start()

    _drawn.append(title)
    try:
        yield advance
    finally:
        _drawn.remove(title)
        if bar.live.is_started:
            bar.stop()


def track(items: Iterable[_Item], title: str, total: int | None = None) -> Iterator[_Item]:
    """Yield items while a bar says how many of `total` are done."""
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance(1)
