"""Input pipeline: examples to batches of waveforms with Grain, in an order that is a function of (seed, step).

Batches hold waveforms; features are computed on the device, in the training step. The pipeline has no state but the
index of the batch, so a run can resume from any step, with any number of worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from ast_jax.audio.io import AudioError
from ast_jax.config import FrontendConfig
from ast_jax.data.datasets import DataError, Example, load_example
from ast_jax.data.mixup import MIXUP_ALPHA, mix_waveforms
from ast_jax.training.config import TrainConfig
from ast_jax.training.sampling import balanced_weights, epoch_order

MAX_SKIPPED = 8  # consecutive unreadable files for one row, after which the data set is taken to be missing
THREADS = 4  # decoding threads without worker processes; each prefetches a batch of its own
WORKER_THREADS = 2
WORKER_BUFFER = 2  # batches that a worker process prefetches
UNREADABLE = (AudioError, DataError, OSError)

Batch = dict[str, np.ndarray]


class PackedExamples:
    """Examples in a few arrays: about 100 bytes per example, pickled to worker processes as one object."""

    def __init__(self, examples: Sequence[Example]):
        """Pack the examples; `group`, which training does not use, is dropped."""
        paths = [os.fsencode(example.path) for example in examples]
        self._paths, self._path_ends = b"".join(paths), np.cumsum([0, *map(len, paths)])
        targets = [example.targets for example in examples]
        self._targets = np.array([target for some in targets for target in some], np.int32)
        self._target_ends = np.cumsum([0, *map(len, targets)])
        self._starts = np.array([example.start for example in examples], np.float64)
        self._ends = np.array([np.inf if example.end is None else example.end for example in examples], np.float64)
        self._rows = np.array([-1 if example.row is None else example.row for example in examples], np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        start, end, row = float(self._starts[index]), float(self._ends[index]), int(self._rows[index])
        return Example(
            pathlib.Path(os.fsdecode(self._paths[self._path_ends[index] : self._path_ends[index + 1]])),
            tuple(self._targets[self._target_ends[index] : self._target_ends[index + 1]].tolist()),
            start,
            None if np.isinf(end) else end,
            None if row < 0 else row,
        )

    def targets(self) -> list[tuple[int, ...]]:
        """Return the label indices of every example."""
        return [tuple(some.tolist()) for some in np.split(self._targets, self._target_ends[1:-1])]


def make_item(
    waveform: np.ndarray, targets: Mapping[int, float], frontend: FrontendConfig, num_labels: int
) -> dict[str, Any]:
    """Return one example as fixed-size arrays: zero-padded waveform, number of samples, and soft labels [C]."""
    labels = np.zeros(num_labels, np.float32)
    for index, weight in targets.items():
        labels[index] = weight
    padded = np.zeros(frontend.max_samples, np.float32)
    padded[: len(waveform)] = waveform
    return {"waveform": padded, "num_samples": np.int32(len(waveform)), "labels": labels}


@dataclasses.dataclass(frozen=True)
class _TrainItems:
    """Items of a whole training run: item step * b + row is that row of this process's share of a step's batch.

    Attributes:
        examples: the training split.
        frontend: sampling rate and length.
        num_labels: C.
        training: batch size, seed, sampling and mixup.
        rows: start and stop of this process's rows of the global batch.
    """

    examples: PackedExamples
    frontend: FrontendConfig
    num_labels: int
    training: TrainConfig
    rows: tuple[int, int]

    @functools.cached_property
    def _weights(self) -> np.ndarray | None:
        return balanced_weights(self.examples.targets(), self.num_labels) if self.training.balanced_sampling else None

    @functools.cached_property
    def _order(self) -> Any:
        @functools.lru_cache(maxsize=2)  # threads may load the end of an epoch and the start of the next at once
        def order(epoch: int) -> np.ndarray:
            return epoch_order(len(self.examples), self.training.seed, epoch, self._weights)

        return order

    def __call__(self, number: int) -> dict[str, Any]:
        """Load an item, and apply mixup."""
        first, stop = self.rows
        step, row = divmod(number, stop - first)
        global_index = first + row
        steps_per_epoch = len(self.examples) // self.training.batch_size
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        rng = np.random.default_rng([self.training.seed, step, global_index])
        mixed = rng.random() < self.training.mixup * self._strength(step, steps_per_epoch)
        skipped: list[int] = []
        chosen = int(self._order(epoch)[step_in_epoch * self.training.batch_size + global_index])
        chosen, waveform = self._load(chosen, rng, skipped)
        targets = dict.fromkeys(self.examples[chosen].targets, 1.0)
        if mixed:
            weight = rng.beta(MIXUP_ALPHA, MIXUP_ALPHA)
            partner, other = self._load(int(rng.integers(len(self.examples))), rng, skipped)
            waveform = mix_waveforms(waveform, other, weight)
            targets = {target: weight for target in targets}
            for target in self.examples[partner].targets:
                targets[target] = targets.get(target, 0.0) + 1 - weight
        item = make_item(waveform, targets, self.frontend, self.num_labels)
        return {**item, "example": np.int64(chosen), "skipped": _padded(skipped)}

    def _strength(self, step: int, steps_per_epoch: int) -> float:
        """Return the strength of mixup in [0, 1] at a step, which grows over `ramp_epochs`."""
        ramp = self.training.ramp_epochs * steps_per_epoch
        return min(1.0, step / ramp) if ramp else 1.0

    def _load(self, index: int, rng: np.random.Generator, skipped: list[int]) -> tuple[int, np.ndarray]:
        """Return an example's index and waveform; if it cannot be read, those of another one drawn at random."""
        while len(skipped) < MAX_SKIPPED:
            try:
                return index, load_example(self.examples[index], self.frontend)
            except UNREADABLE:
                skipped.append(index)
                index = int(rng.integers(len(self.examples)))
        return index, np.zeros(1, np.float32)  # `skipped` is full, at which the trainer stops


def _padded(skipped: Sequence[int]) -> np.ndarray:
    """Return indices [MAX_SKIPPED], padded with -1."""
    return np.array([*skipped, *[-1] * (MAX_SKIPPED - len(skipped))], np.int64)


def train_batches(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    num_labels: int,
    training: TrainConfig,
    *,
    first_step: int = 0,
    rows: slice | None = None,
    num_workers: int = 0,
) -> Generator[Batch]:
    """Yield the batches of a training run from a given step, over all epochs; a short last batch is dropped.

    The order, mixup (partner uniform over all examples, weight from Beta(10, 10), as in the original) and the
    replacement of unreadable files are a function of the seed, the step and the row in the global batch.

    Args:
        examples: the training split.
        frontend: sampling rate and length.
        num_labels: C.
        training: global batch size B, epochs, seed, `balanced_sampling`, `mixup`, `ramp_epochs`.
        first_step: counted from 0 over the whole run.
        rows: rows of the global batch that this process loads; None means all.
        num_workers: worker processes; 0 loads in threads of this process.

    Yields:
        {"waveform": [b, S], "num_samples": [b], "labels": [b, C], "example": [b] index of the example,
        "skipped": [b, 8] indices of unreadable examples that were replaced, padded with -1}, b rows.
    """
    rows = rows or slice(0, training.batch_size)
    share = rows.stop - rows.start
    items = _TrainItems(PackedExamples(examples), frontend, num_labels, training, (rows.start, rows.stop))
    num_steps = training.epochs * (len(examples) // training.batch_size)
    yield from _through_grain(range(first_step * share, num_steps * share), items, share, num_workers)


@dataclasses.dataclass(frozen=True)
class _EvalItems:
    """Items of several passes over all examples in order, each pass padded to whole batches with silence."""

    examples: PackedExamples
    frontend: FrontendConfig
    num_labels: int
    batch_size: int
    rows: tuple[int, int]

    def __call__(self, number: int) -> dict[str, Any]:
        """Load an item; unreadable files and padding are silence that is not `usable`."""
        first, stop = self.rows
        batch, row = divmod(number, stop - first)
        index = batch % -(-len(self.examples) // self.batch_size) * self.batch_size + first + row
        waveform, usable = np.zeros(1, np.float32), index < len(self.examples)
        targets: tuple[int, ...] = ()
        if usable:
            targets = self.examples[index].targets
            try:
                waveform = load_example(self.examples[index], self.frontend)
            except UNREADABLE:
                usable = False
        item = make_item(waveform, dict.fromkeys(targets, 1.0), self.frontend, self.num_labels)
        return {**item, "usable": np.bool_(usable)}


def eval_batches(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    num_labels: int,
    *,
    batch_size: int,
    passes: int = 1,
    rows: slice | None = None,
    num_workers: int = 0,
) -> Generator[Batch]:
    """Yield all examples in order as batches of one size, `passes` times over.

    Args:
        examples: examples of any split.
        frontend: sampling rate and length.
        num_labels: C.
        batch_size: global batch size B.
        passes: number of passes, of ceil(len(examples) / B) batches each.
        rows: as in `train_batches`.
        num_workers: as in `train_batches`.

    Yields:
        {"waveform": [b, S], "num_samples": [b], "labels": [b, C], "usable": [b]}; padding of the last batch and
        unreadable files are not usable.
    """
    rows = rows or slice(0, batch_size)
    share = rows.stop - rows.start
    items = _EvalItems(PackedExamples(examples), frontend, num_labels, batch_size, (rows.start, rows.stop))
    num_batches = passes * -(-len(examples) // batch_size)
    yield from _through_grain(range(num_batches * share), items, share, num_workers)


def _through_grain(numbers: range, items: Any, batch_size: int, num_workers: int) -> Generator[Batch]:
    """Yield batches of `items(number)` in order, prefetched by threads or processes, which end when it is closed."""
    import grain
    from absl import flags

    threads = WORKER_THREADS if num_workers else THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(items)
    dataset = dataset.batch(batch_size).to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags that only absl.app.run parses
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=WORKER_BUFFER)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_start_worker)
    try:
        with contextlib.closing(iter(dataset)) as batches:
            for batch in batches:  # copied: arrays of worker processes are views of shared memory
                yield {name: np.array(array) for name, array in batch.items()}
    finally:
        batch = batches = None
        if num_workers:
            gc.collect()  # Grain's iterator is a reference cycle; at interpreter exit its workers could not be closed


def _start_worker(*_: int) -> None:
    """Leave signals to the parent process, and exit with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
