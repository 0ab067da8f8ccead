"""Work that threads do side by side, in order and some of it ahead."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 4  # items a thread, so that none waits for work
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    num_threads: int | None = None,
    ahead: int | None = None,
) -> Iterator[_Result]:
    """Yield function(item) of all items in their order.

    Args:
        function: that lets go of the interpreter for most of its time.
        items: read as they are needed.
        num_threads: None for one a core.
        ahead: items that are read before the first result is out; None for some a thread.
    """
    threads = num_threads or os.cpu_count() or 1
    waiting: collections.deque[Future[_Result]] = collections.deque()
    pool, is_over = ThreadPoolExecutor(threads), sys.is_finalizing
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= (ahead or AHEAD * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        if not is_over():  # when Python ends it has waited for the threads already
            pool.shutdown()
