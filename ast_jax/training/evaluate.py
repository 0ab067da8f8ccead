"""Logits of whole splits on all devices; ensembles and averages of models."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.data.datasets import DataError, Example
from ast_jax.runtime.progress import track
from ast_jax.training import input_pipeline
from ast_jax.training import step as train
from ast_jax.training.parallel import DataParallel


class Predictions(NamedTuple):
    """Logits and labels, each [N, C], of all examples in order, and which of them could be read [N]."""

    logits: np.ndarray
    labels: np.ndarray
    usable: np.ndarray

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels of what could be read.

        Raises:
            DataError: nothing could.
        """
        if not self.usable.any():
            raise DataError(f"none of the {len(self.usable)} sounds to evaluate on can be read")
        return self.logits[self.usable], self.labels[self.usable]


class Evaluator:
    """Compute logits of the same examples again and again; its workers stay, and go when it is closed."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: ASTConfig,
        frontend: FrontendConfig,
        parallel: DataParallel,
        *,
        batch_size: int,
        passes: int = 1,
        num_workers: int = 0,
    ):
        """Take the examples, the model's shape and how often they will be needed.

        Raises:
            ValueError: `batch_size` does not divide over the devices.
        """
        parallel.check_batch_size(batch_size)
        self.count = len(examples)
        self._num_batches = -(-self.count // batch_size)
        step = functools.partial(train.eval_step, config=config, frontend=frontend)
        self._run = parallel.compile_eval_step(step)
        self._batches = input_pipeline.eval_batches(
            examples, frontend, config.num_labels,
            batch_size=batch_size, passes=passes, rows=parallel.local_rows(batch_size), num_workers=num_workers,
        )  # fmt: skip

    def __call__(self, params: Any, between: Callable[[], None] = lambda: None) -> Predictions:
        """Return the predictions of replicated params; call `between` before each batch."""
        logits, labels, usable = [], [], []
        batches = itertools.islice(self._batches, self._num_batches)
        for batch in track(batches, "evaluation batches", self._num_batches):
            between()
            labels.append(batch.pop("labels"))
            usable.append(batch.pop("usable"))
            logits.append(self._run(params, batch))
        return Predictions(*(_together(parts)[: self.count] for parts in (logits, labels, usable)))

    def close(self) -> None:
        """End the workers."""
        self._batches.close()


def _together(parts: list[np.ndarray]) -> np.ndarray:
    """Return the rows of all batches in order, those of other processes too."""
    rows = np.stack([np.array(part) for part in parts])  # [batches, b, …]
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        rows = np.moveaxis(multihost_utils.process_allgather(rows), 0, 1)  # [batches, processes, b, …]
        rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return rows.reshape(-1, *rows.shape[2:])


def evaluate(
    checkpoint: Checkpoint, examples: Sequence[Example], batch_size: int = 32, *, num_workers: int = 0
) -> Predictions:
    """Return logits and labels of all examples, using all devices.

    Raises:
        ValueError: `batch_size` does not divide over the devices.
    """
    parallel = DataParallel()
    evaluator = Evaluator(
        examples, checkpoint.config, checkpoint.frontend, parallel, batch_size=batch_size, num_workers=num_workers
    )
    with contextlib.closing(evaluator):
        return evaluator(parallel.replicate(checkpoint.params))


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return a checkpoint whose params are the mean of several (weight averaging; paper, section 3.1).

    Raises:
        ValueError: none given, or they differ in architecture, labels or features.
    """
    if not checkpoints:
        raise ValueError("expected one checkpoint or more to average, got none")
    first = checkpoints[0]
    flats = [flatten_dict(one.params, sep="/") for one in checkpoints]
    for number, one in enumerate(checkpoints[1:], 2):
        for name in ("config", "frontend"):
            if getattr(one, name) != getattr(first, name):
                raise ValueError(
                    f"checkpoint {number} has another {name} than the first; only models of one shape, label set and "
                    "frontend can be averaged (ensembles of others: ast-jax evaluate MODEL… DATA)"
                )
    mean = {
        path: np.mean([np.asarray(flat[path], np.float64) for flat in flats], axis=0).astype(leaf.dtype)
        for path, leaf in flats[0].items()
    }
    metadata = {"averaged": [one.origin for one in checkpoints]}
    return Checkpoint(unflatten_dict(mean, sep="/"), first.config, first.frontend, json.dumps(metadata))


def align(checkpoint: Checkpoint, labels: Sequence[str]) -> np.ndarray:
    """Return where a data set's labels stand among the model's.

    Raises:
        DataError: the model does not know all of them.
    """
    known = {name: index for index, name in enumerate(checkpoint.config.labels)}
    if missing := [name for name in labels if name not in known]:
        raise DataError(
            f"the model does not know {len(missing)} of the data's {len(labels)} labels, the first is {missing[0]!r}"
        )
    return np.array([known[name] for name in labels])
