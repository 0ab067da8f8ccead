"""Embeddings and explanations as files, .npz and .parquet, written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ast_jax.inference.embeddings import Embedding
from ast_jax.inference.explanations import Explanation
from ast_jax.runtime.files import atomic_file

ROW_GROUP = 10_000  # rows per Parquet row group

Columns = dict[str, np.ndarray]


@contextlib.contextmanager
def vector_table(path: pathlib.Path) -> Iterator[NpzTable | ParquetTable]:
    """Yield a table to write embeddings to; the file is there when the block ends without an exception.

    Columns: "source", "start" and "end" in seconds, for patches also "low" and "high" in Hz, and "embedding" [D].

    Raises:
        ValueError: .parquet without pyarrow.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    if is_parquet:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{path}: Parquet needs pyarrow; install it with: pip install pyarrow, or write .npz"
            ) from error
    with atomic_file(path) as name, contextlib.ExitStack() as stack:
        table = ParquetTable(name, stack) if is_parquet else NpzTable(name)
        yield table
        table.finish()


class NpzTable:
    """Collects columns in memory and writes them to a .npz."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.pending: list[Columns] = []

    def write(self, found: Embedding, whole: bool = False) -> None:
        """Add a row per vector, or with `whole` one row with the mean of the sound's vectors."""
        self.pending.append(columns_of(found, whole))

    def finish(self) -> None:
        """Write the file."""
        _write_npz(self.path, _concatenated(self.pending))


class ParquetTable:
    """Writes columns to a Parquet file in row groups.

    Args:
        path: of the file.
        stack: closes the file.
    """

    def __init__(self, path: pathlib.Path, stack: contextlib.ExitStack):
        self.path, self.stack = path, stack
        self.pending: list[Columns] = []  # of the next row group
        self.writer: Any = None

    def write(self, found: Embedding, whole: bool = False) -> None:
        """Add a row per vector, or with `whole` one row with the mean of the sound's vectors."""
        self.pending.append(columns_of(found, whole))
        if sum(len(columns["source"]) for columns in self.pending) >= ROW_GROUP:
            self._write_row_group()

    def finish(self) -> None:
        """Write the last row group."""
        import pyarrow.parquet

        if self.pending:
            self._write_row_group()
        if self.writer is None:
            pyarrow.parquet.write_table(pyarrow.table({}), self.path)

    def _write_row_group(self) -> None:
        import pyarrow.parquet

        columns = _concatenated(self.pending)
        self.pending = []
        vectors = columns.pop("embedding")  # [rows, D]
        arrays: dict[str, Any] = {name: pyarrow.array(column) for name, column in columns.items()}
        arrays["embedding"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
        table = pyarrow.table(arrays)
        if self.writer is None:
            self.writer = self.stack.enter_context(pyarrow.parquet.ParquetWriter(self.path, table.schema))
        self.writer.write_table(table)


def columns_of(found: Embedding, whole: bool = False) -> Columns:
    """Return the table's columns for an embedding: each [rows], and "embedding" [rows, D]."""
    if whole:
        columns = {"start": found.times[:1, 0], "end": found.times[-1:, 1], "embedding": found.clip[None]}
    elif found.patch_times is None or found.patch_frequencies is None:
        columns = {"start": found.times[:, 0], "end": found.times[:, 1], "embedding": found.values}
    else:
        shape = found.values.shape[:-1]  # [W, F', T']
        starts, ends = (
            np.broadcast_to(found.times[:, :1, None] + found.patch_times[:, side], shape).ravel() for side in (0, 1)
        )
        low, high = (np.broadcast_to(found.patch_frequencies[:, side, None], shape).ravel() for side in (0, 1))
        values = found.values.reshape(-1, found.values.shape[-1])  # [W F' T', D]
        columns = {"start": starts, "end": ends, "low": low, "high": high, "embedding": values}
    source = found.source.encode("utf-8", "backslashreplace").decode()
    return {"source": np.array([source] * len(columns["embedding"])), **columns}


def write_arrays(path: pathlib.Path, found: Explanation) -> None:
    """Write the arrays and the labels of an explanation to a .npz."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    del fields["frontend"]
    with atomic_file(path) as name:
        _write_npz(name, {field: np.asarray(value) for field, value in fields.items()})


def _concatenated(parts: list[Columns]) -> Columns:
    """Concatenate tables with the same columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _write_npz(path: pathlib.Path, arrays: Columns) -> None:
    with path.open("wb") as file:  # np.savez would add the suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any name for allow_pickle
