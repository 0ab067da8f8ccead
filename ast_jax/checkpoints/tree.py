"""Checks on the arrays of a checkpoint, and `CheckpointError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ast_jax.model.tree import Shape, differences


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names it."""


@contextlib.contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    """Raise a ValueError about a file of a checkpoint as a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def check_shapes(name: str, expected: Mapping[str, Shape | None], got: Mapping[str, Shape]) -> None:
    """Compare the names and shapes of a checkpoint's arrays with those of its configuration.

    Args:
        name: the checkpoint, for the message.
        expected: the shape of every name, None where any shape will do.
        got: the checkpoint's.

    Raises:
        CheckpointError: with sorted lists of what is missing, unexpected and of the wrong shape.
    """
    if different := differences(expected, got):
        raise CheckpointError(f"{name}: the weights do not fit the configuration; {different}")


def differing(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names whose arrays differ in dtype, shape or any bit; those missing in `got` are among them."""
    return sorted(name for name, array in expected.items() if name not in got or not _identical(array, got[name]))


def _identical(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    return first.dtype == second.dtype and np.array_equal(
        np.ascontiguousarray(first).view(np.uint8), np.ascontiguousarray(second).view(np.uint8)
    )


def widen(array: Any) -> np.ndarray:
    """Return half precision as float32, any other dtype unchanged."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array
