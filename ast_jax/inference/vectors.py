"""Vectors of sounds in files, .npz and .parquet, that are written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ast_jax.inference.embeddings import Embedding
from ast_jax.inference.explanations import Explanation
from ast_jax.runtime.files import whole_file

ROWS = 10_000  # of a group in Parquet


@contextlib.contextmanager
def vector_table(path: pathlib.Path) -> Iterator[Callable[..., None]]:
    """Yield `write(embedding, whole=False)`; what it was given is in the file when the block ends.

    A row is a vector: "source", "start" and "end" in seconds, of patches also "low" and "high" in Hz, and "embedding".
    With `whole` it is the mean of all vectors of the sound. Parquet is written as it comes; for .npz all is held in
    memory.

    Raises:
        ValueError: .parquet without pyarrow.
    """
    if path.suffix.lower() == ".parquet":
        with _parquet(path) as write_rows:
            yield lambda found, whole=False: write_rows(rows(found, whole))
        return
    held: list[Mapping[str, np.ndarray]] = []
    yield lambda found, whole=False: held.append(rows(found, whole))
    columns = {name: np.concatenate([each[name] for each in held]) for name in held[0]} if held else {}
    _write_npz(path, columns)


def rows(found: Embedding, whole: bool = False) -> dict[str, np.ndarray]:
    """Return the columns of an embedding's rows: [N], and "embedding" [N, D]."""
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
        values = found.values.reshape(-1, found.values.shape[-1])
        columns = {"start": starts, "end": ends, "low": low, "high": high, "embedding": values}
    count = len(columns["embedding"])
    return {"source": np.array([found.source.encode("utf-8", "backslashreplace").decode()] * count), **columns}


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> Iterator[Callable[[dict[str, np.ndarray]], None]]:
    """Yield what writes columns to a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow; install it with: pip install pyarrow, or write .npz"
        ) from error
    with whole_file(path) as name, contextlib.ExitStack() as opened:
        writer = None
        held: list[dict[str, np.ndarray]] = []  # a group of rows is written together

        def write(columns: dict[str, np.ndarray]) -> None:
            held.append(columns)
            if sum(len(each["source"]) for each in held) >= ROWS:
                flush()

        def flush() -> None:
            nonlocal writer
            columns = {name: np.concatenate([each[name] for each in held]) for name in held[0]}
            held.clear()
            values = columns["embedding"]
            arrays: dict[str, Any] = {
                key: pyarrow.array(column) for key, column in columns.items() if key != "embedding"
            }
            arrays["embedding"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])
            table = pyarrow.table(arrays)
            if writer is None:
                writer = opened.enter_context(pyarrow.parquet.ParquetWriter(name, table.schema))
            writer.write_table(table)

        yield write
        if held:
            flush()
        if writer is None:
            pyarrow.parquet.write_table(pyarrow.table({}), name)


def write_arrays(path: pathlib.Path, found: Explanation) -> None:
    """Write the fields of an explanation that are arrays, and its labels, to a .npz."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    del fields["frontend"]
    _write_npz(path, {name: np.asarray(value) for name, value in fields.items()})


def _write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, whole or not at all."""
    with whole_file(path) as name, name.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any name for allow_pickle
