"""Trees of parameters: how they differ, and the error that says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

LONGEST_LIST = 20  # of what does not fit: more would hide the beginning


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names it."""


@contextlib.contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    """Turn a ValueError about a file of a checkpoint into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def raise_differences(name: str, missing: Any, unexpected: Any, misshaped: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise one error with titled, sorted lists, or return where all of them are empty."""
    shapes = [f"{path} (expected {tuple(want)}, got {tuple(got)})" for path, (want, got) in sorted(misshaped.items())]
    titled = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": shapes}
    lists = []
    for title, entries in titled.items():
        more = f", and {len(entries) - LONGEST_LIST} more" if len(entries) > LONGEST_LIST else ""
        if entries:
            lists.append(f"{title}: {', '.join(entries[:LONGEST_LIST])}{more}")
    if lists:
        raise CheckpointError(f"{name}: the weights do not fit the configuration; {'; '.join(lists)}")


def widen(array: Any) -> np.ndarray:
    """Return float32 for half precision, anything else as it is."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array
