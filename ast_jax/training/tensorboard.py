"""TensorBoard event files of a run."""

from __future__ import annotations

import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Self

NOT_SCALARS = ("epoch",)  # columns of the history that are no metrics


class TensorBoardWriter:
    """Write metrics to TensorBoard event files, rewritten from the history on resume so that no epoch occurs twice."""

    def __init__(self, folder: pathlib.Path, history: Sequence[Mapping[str, Any]], *, write: bool = True):
        """Write the history; with `write=False`, for processes other than the first, write nothing at all."""
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
        """Write one epoch's metrics."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in NOT_SCALARS and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
