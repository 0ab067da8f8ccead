"""`load`: a checkpoint from a shipped name, a folder, the Hugging Face Hub, or PyTorch weights."""

from __future__ import annotations

import os
from typing import Unpack

from ast_jax.checkpoints.folder import Checkpoint, read_folder
from ast_jax.checkpoints.locate import is_own, resolve
from ast_jax.checkpoints.resize import ResizeOptions, resize


def load(source: str | os.PathLike[str], **changes: Unpack[ResizeOptions]) -> Checkpoint:
    """Load a model: the name of a shipped one, a checkpoint folder, a Hub id, or PyTorch weights (see `from_torch`).

    Arrays are NumPy, whatever devices they were saved from; half precision on disk becomes float32.

    Args:
        source: a name, a folder, or a file of weights.
        **changes: another input or other labels: `max_length`, `num_mel_bins`, `frequency_stride`, `time_stride`,
            `num_labels`, `labels`, `keep_classifier`, `seed`; see `resize`.

    Raises:
        CheckpointError: `source` does not exist, is not in a known format, or is inconsistent.
        ConnectionError: `source` is a Hub id, and the Hub cannot be reached.
    """
    path = resolve(source)
    if is_own(path):
        return resize(read_folder(path), **changes)
    # Imported here, so that a checkpoint folder loads without the readers of PyTorch files.
    from ast_jax.checkpoints.pytorch.from_torch import from_torch
    from ast_jax.checkpoints.pytorch.state_dicts import read_source

    return from_torch(read_source(path, os.fspath(source)), **changes)


def loaded(model: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """Return a `Checkpoint` unchanged, and load anything else."""
    return model if isinstance(model, Checkpoint) else load(model)
