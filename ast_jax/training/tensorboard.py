"""A run's metrics for TensorBoard."""

from __future__ import annotations

import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Self

AXES = ("epoch",)  # what stands below the curves


class Board:
    """Event files of a run, made anew from its history when it goes on, so that no epoch stands there twice."""

    def __init__(self, folder: pathlib.Path, history: Sequence[Mapping[str, Any]], *, write: bool = True):
        """Write the epochs there were; without `write` (the other processes of several) nothing is ever written."""
        self._writer = None
        if not write:
            return
        from tensorboard.summary import Writer

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = Writer(str(folder))
        for row in history:
            self.add(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write an epoch's numbers."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in AXES and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
