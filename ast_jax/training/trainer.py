"""The trainer: the epochs of one run, from its first or its last saved state to its final evaluation.

Example order, mixup and the device's random keys depend on (seed, step, row); everything else is in the state. A run
that was stopped anywhere and resumes from a saved state is therefore the run that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ast_jax.checkpoints.load import load
from ast_jax.data.datasets import DataError, DataSet, Example
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.runtime.files import write_text
from ast_jax.runtime.progress import hidden_bars, progress_display, step
from ast_jax.runtime.signals import DEFERRED, defer_signals, stop
from ast_jax.training import distill, input_pipeline, optimizers, results, run_folder
from ast_jax.training import step as train
from ast_jax.training.config import ExecutionConfig, TrainConfig
from ast_jax.training.evaluate import Evaluator, Predictions
from ast_jax.training.monitor import DIVERGED, LossMonitor, SkippedExamples, StopRequest
from ast_jax.training.parallel import METHODS, DataParallel, broadcast_arrays, broadcast_json, sync_errors
from ast_jax.training.run_folder import RunConfig
from ast_jax.training.states import (
    TRAIN_LOSS,
    Record,
    States,
    restore_arrays,
    state_of_epoch,
    writing,
)
from ast_jax.training.step import TrainState
from ast_jax.training.tensorboard import TensorBoardWriter
from ast_jax.training.validation import Gathered, validate

Log = Callable[[str], None]
MetricsCallback = Callable[[dict[str, Any]], None]


class Arrays(NamedTuple):
    """The arrays of a saved state.

    Attributes:
        state: parameters, optimizer state, moving average.
        gathered: over the epochs.
    """

    state: TrainState
    gathered: Gathered


def is_over(record: Record, training: TrainConfig) -> bool:
    """Whether a run has trained all its epochs, or early stopping has ended it."""
    done = len(record.history)
    if not done or done >= training.epochs:
        return bool(done)
    return bool(training.patience) and done - record.best_row["epoch"] >= training.patience


class Trainer:
    """A run that is training in this process."""

    def __init__(
        self,
        config: RunConfig,
        dataset: DataSet,
        params: Any,
        folder: pathlib.Path,
        execution: ExecutionConfig,
        *,
        saved: tuple[Record, pathlib.Path | None] | None = None,
        metrics: MetricsCallback | None = None,
        log: Log,
    ):
        """Compile the steps and set up the state.

        Args:
            config: what was asked for.
            dataset: the examples of its splits.
            params: initial parameters.
            folder: the run folder.
            execution: devices and workers.
            saved: record and folder of the state to resume from; of several processes only the first has the folder.
            metrics: called with the row of each epoch, in the first process.
            log: called with a line at a time.

        Raises:
            DataError: the training split is smaller than a batch, or has another size than when the run was started.
            ValueError: the batch does not divide over the devices.
        """
        self.config, self.folder, self.execution = config, folder, execution
        self.metrics = metrics or (lambda row: None)
        self._log = log
        self.is_first = not jax.process_index()
        training = config.training
        self.splits = dataset.splits
        self.examples, self.validation = dataset.splits["train"], dataset.splits["validation"]
        self.parallel: DataParallel = METHODS[execution.parallel]()
        self.parallel.check_batch_size(training.batch_size, training.grad_accum_steps)
        self.steps_per_epoch = len(self.examples) // training.batch_size
        if not self.steps_per_epoch:
            raise DataError(f"{config.data.source}: its training examples have become less than one batch")
        optimizer = optimizers.make_optimizer(training, self.steps_per_epoch)
        self.rates = optimizers.epoch_rates(training, self.steps_per_epoch)
        self.step = self.parallel.compile_train_step(
            functools.partial(
                train.train_step, config=config.config, frontend=config.frontend, training=training,
                optimizer=optimizer, steps_per_epoch=self.steps_per_epoch,
                attention_implementation=fastest_implementation(training.dtype),
            )
        )  # fmt: skip
        self.soften = _softener(config, self.parallel)
        self.state = train.init_state(params, optimizer, training)
        self.gathered = Gathered.empty(
            self.state.params, bool(training.average_from), len(self.validation), config.config.num_labels
        )
        self.is_resumed = saved is not None
        self.record = Record(seed=training.seed, sizes=[len(self.examples), len(self.validation)])
        if saved is not None:
            self._restore(*saved)
        self.losses = LossMonitor(self.record, self.examples, self.steps_per_epoch)
        self.skipped = SkippedExamples(self.record, config.frontend, training.strict, self.log)

    def _restore(self, record: Record, state: pathlib.Path | None) -> None:
        """Take over a saved state."""
        if record.sizes != self.record.sizes:
            (train_size, validation_size), found = record.sizes, self.record.sizes
            raise DataError(
                f"{self.config.data.source}: expected {train_size} examples for training and {validation_size} for "
                f"validation, found {found[0]} and {found[1]}; give it the data it was started with"
            )
        arrays = Arrays(self.state, self.gathered)
        self.record = record
        self.state, self.gathered = broadcast_arrays(arrays if state is None else restore_arrays(state, arrays))

    def log(self, line: str) -> None:
        """Log a line, above the progress bars."""
        with hidden_bars():
            self._log(line)

    def run(self) -> None:
        """Train to the end and evaluate; the run folder then has all it can have."""
        record = self.record
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress_display())
            alone = jax.process_count() == 1  # else JAX itself waits for SIGTERM, to make all processes agree
            received = stack.enter_context(defer_signals(DEFERRED if alone else (signal.SIGINT,)))
            self.stop_request = StopRequest(received)
            if self.is_first:
                write_text(self.folder / run_folder.RUN_FILE, self.config.to_json())
            self.states = stack.enter_context(States(self.folder))
            if self.is_resumed and self.is_first:
                self._publish_missing()
            if not self.is_resumed:  # the initial state too, so that a kill in the first epoch can be resumed
                self.states.save(record, jax.tree.map(np.array, Arrays(self.state, self.gathered)), wait=True)
            with writing(self.folder):
                board = TensorBoardWriter(self.folder / run_folder.TENSORBOARD, record.history, write=self.is_first)
            self.board = stack.enter_context(board)
            devices = self.parallel.devices
            self.log(
                f"{len(self.examples)} training examples, {len(self.validation)} for validation, "
                f"{self.config.config.num_labels} labels, {model.num_params(self.state.params):,} parameters, "
                f"{len(devices)} {devices[0].platform} device(s)"
            )
            if not self.validation:
                self.log("no validation examples: the best epoch will be the one with the lowest training loss")
            self.state = self.parallel.replicate(self.state)
            self.saved_at = time.monotonic()
            self.evaluator = self._evaluator(self.validation, self.config.training.epochs)
            stack.callback(self.evaluator.close)
            if not is_over(record, self.config.training):
                self.log("compiling the training step")
                self._train_epochs()
            self._finish()

    def _evaluator(self, examples: list[Example], passes: int) -> Evaluator:
        """Return an evaluator of parameters on some examples."""
        return Evaluator(
            examples, self.config.config, self.config.frontend, self.parallel,
            batch_size=self.config.training.batch_size, passes=passes, num_workers=self.execution.workers,
        )  # fmt: skip

    def _train_epochs(self) -> None:
        """Train the remaining epochs."""
        training, record = self.config.training, self.record
        batches = input_pipeline.train_batches(
            self.examples, self.config.frontend, self.config.config.num_labels, training,
            first_step=record.step, rows=self.parallel.local_rows(training.batch_size),
            num_workers=self.execution.workers,
        )  # fmt: skip
        with contextlib.closing(batches):
            while not is_over(record, training):
                began = time.monotonic()
                epoch = len(record.history) + 1
                with step(f"epoch {epoch}/{training.epochs}", self.steps_per_epoch) as advance:
                    advance(record.step - (epoch - 1) * self.steps_per_epoch)
                    while record.step < epoch * self.steps_per_epoch:
                        self._stop_if_signalled(between_steps=True)
                        self._train_step(next(batches))
                        advance(1)
                        if time.monotonic() - self.saved_at > 60 * self.execution.save_minutes:
                            self._save()
                self.losses.flush()
                self._end_epoch(epoch, began)
                self._stop_if_signalled()

    def _train_step(self, batch: input_pipeline.Batch) -> None:
        """Take one optimizer step."""
        skipped = batch.pop("skipped")
        self.skipped.add([self.examples[index] for index in np.unique(skipped[skipped >= 0])])
        if (skipped >= 0).all(-1).any():
            raise DataError(
                f"{input_pipeline.MAX_SKIPPED} sounds in a row cannot be read, the last is "
                f"{self.examples[int(skipped.max())].name}; are they there?"
            )
        indices = batch.pop("example")
        self.state, value = self.step(self.state, self.soften(batch))
        self.losses.add(self.record.step, value, indices)
        self.record.step += 1

    def _end_epoch(self, epoch: int, began: float) -> None:
        """Evaluate, save and publish."""
        record, training = self.record, self.config.training
        single = self.parallel.unreplicate(self.state)
        self._check_finite(single)
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": self.rates[epoch - 1]}
        row[TRAIN_LOSS] = record.loss_sum / self.steps_per_epoch
        gathered = self.gathered
        if self.validation:
            measured, gathered, unreadable = validate(
                self.evaluator, self.state.eval_params, record, gathered, self.config.config, self.log,
                self._stop_if_signalled,
            )  # fmt: skip
            self.skipped.add([self.validation[index] for index in unreadable])
            row |= measured
        record.metric = record.metric or TRAIN_LOSS
        if training.average_from and epoch >= training.average_from:
            gathered = gathered.with_params(single.eval_params, epoch - training.average_from + 1)
        self.skipped.gather()
        row["seconds"] = round(time.monotonic() - began, 1)
        self.gathered = gathered
        record.history.append(row)
        record.loss_sum = 0.0
        self.states.save(record, Arrays(single, self.gathered), finished=True)
        self.saved_at = time.monotonic()
        self._publish(single.eval_params)
        with writing(self.folder):
            self.board.add(row)
        self.log(run_folder.row_line(row))
        sync_errors(lambda: self.metrics(run_folder.finite(row)), first_only=True)

    def _publish(self, params: Any) -> None:
        """Publish the last state in the run folder."""
        if self.is_first:
            run_folder.publish(self.config, self.folder, params, self.record)

    def _save(self, wait: bool = False) -> None:
        """Save a state within an epoch."""
        self.losses.flush()
        single = self.parallel.unreplicate(self.state)
        self._check_finite(single)
        self.states.save(self.record, Arrays(single, self.gathered), wait=wait)
        self.saved_at = time.monotonic()

    def _check_finite(self, state: TrainState) -> None:
        """Refuse to save parameters that are not finite."""
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise FloatingPointError(f"the parameters are not finite after step {self.record.step - 1}; {DIVERGED}")

    def _stop_if_signalled(self, between_steps: bool = False) -> None:
        """Save and stop if a signal was received; several processes do so between steps."""
        number = self.stop_request.number(self.record.step if between_steps else None)
        if number is not None:
            self._save(wait=True)
            stop(number)

    def _stop_if_signalled_when_done(self) -> None:
        """Stop if a signal was received after the last epoch, whose state is saved."""
        if jax.process_count() == 1 and (number := self.stop_request.number()) is not None:
            stop(number)

    def _publish_missing(self) -> None:
        """Publish what a kill may have left undone after the last state was saved."""

        def params_of(epoch: int) -> Any:
            like = Arrays(jax.tree.map(np.asarray, self.state), self.gathered)
            state = state_of_epoch(self.folder, epoch, self.steps_per_epoch)
            return restore_arrays(state, like).state.eval_params

        run_folder.publish_missing(self.config, self.folder, self.record, params_of)
        if self.record.history and self.record.step == len(self.record.history) * self.steps_per_epoch:
            self._publish(self.state.eval_params)

    def _finish(self) -> None:
        """Evaluate the best epoch and the average on validation and test split; idempotent."""
        best = load((self.folder / run_folder.BEST).absolute()) if self.is_first else None
        if broadcast_json(self.is_first and run_folder.has_results(self.folder, self.record)):
            return
        params = best.params if best is not None else self.parallel.unreplicate(self.state).eval_params
        models = {"best": broadcast_arrays(params)}
        if self.gathered.mean is not None and len(self.record.history) >= self.config.training.average_from:
            models["average"] = self.gathered.mean
            if self.is_first:
                run_folder.save_average(self.config, self.folder, self.record, self.gathered.mean)
        content = results.final_report(self.record, self.splits, self._predictions(models), self.config.config)
        self.skipped.gather()
        if self.is_first:
            results.log_reports(content, self.log)
            with writing(self.folder):
                results.draw(content, self.record, self.config.config, self.folder)
                write_text(self.folder / run_folder.RESULTS_FILE, run_folder.json_text(content))
            run_folder.write_tables(self.folder, self.record)
        self._stop_if_signalled_when_done()

    def _predictions(self, models: Mapping[str, Any]) -> Callable[[list[Example]], Iterator[tuple[str, Predictions]]]:
        """Return a function that yields each model's name and its predictions of some examples."""

        def predictions(examples: list[Example]) -> Iterator[tuple[str, Predictions]]:
            with contextlib.closing(self._evaluator(examples, len(models))) as evaluator:
                for name, params in models.items():
                    found = evaluator(self.parallel.replicate(params), self._stop_if_signalled_when_done)
                    self.skipped.add([examples[index] for index in np.flatnonzero(~found.usable)])
                    yield name, found

        return predictions


def _softener(config: RunConfig, parallel: DataParallel) -> Callable[[input_pipeline.Batch], input_pipeline.Batch]:
    """Return a function that mixes a teacher's scores, if there is one, into a batch's labels."""
    if config.teacher is None:
        return lambda batch: batch
    per_device = config.training.batch_size // len(parallel.devices)
    teacher = distill.load_teacher(config.teacher, config.config, config.frontend, per_device)
    logits, params = parallel.compile_eval_step(teacher.logits), parallel.replicate(teacher.params)

    def soften(batch: input_pipeline.Batch) -> input_pipeline.Batch:
        inputs = {name: batch[name] for name in ("waveform", "num_samples")}
        weight = config.training.teacher_weight
        return {**batch, "labels": distill.soften(batch["labels"], logits(params, inputs), weight, config.config)}

    return soften
