"""A thread pool's map that keeps the order and runs a bounded number of items ahead."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 4  # queued items per thread, so that no thread idles
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ordered_map(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    num_threads: int | None = None,
    ahead: int | None = None,
) -> Iterator[_Result]:
    """Yield function(item) for each item in order, computed in a thread pool.

    Args:
        function: should release the GIL for most of its time.
        items: consumed lazily.
        num_threads: size of the pool; None for one thread per core.
        ahead: most items taken before the first result is yielded; None for `AHEAD` per thread.
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
        if not is_over():  # at interpreter shutdown the threads have been joined already
            pool.shutdown()
