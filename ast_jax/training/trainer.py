"""The loop over the epochs of a run.

It owns nothing but its place: order, mixup and the device's random keys depend on (seed, step, row), and all the rest
is in the state. So a run that was stopped anywhere, and goes on from a saved state, is the run itself.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.checkpoints.load import load
from ast_jax.config import ProblemType
from ast_jax.data import datasets
from ast_jax.data.datasets import DataError, DataSet
from ast_jax.model import functional as model
from ast_jax.model.attention import fastest_implementation
from ast_jax.model.losses import loss
from ast_jax.runtime.files import write_text
from ast_jax.runtime.progress import hidden_bars, progress_display, step
from ast_jax.runtime.signals import DEFERRED, defer_signals, stop
from ast_jax.training import distill, input_pipeline, optimizers, plots, run_folder
from ast_jax.training import step as train
from ast_jax.training.config import TrainConfig
from ast_jax.training.evaluate import Evaluator, Predictions
from ast_jax.training.metrics import evaluate_logits, report, report_lines, scores
from ast_jax.training.parallel import METHODS, DataParallel, allgather_json, broadcast_arrays, broadcast_json
from ast_jax.training.run_folder import Record, Run, States
from ast_jax.training.step import TrainState
from ast_jax.training.tensorboard import Board

LAG = 4  # steps whose losses are not looked at yet, so that the device need not wait for the host
NAMED = 8  # files of a batch that a message names
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Machine:
    """How a run is carried out; another one gives the same run, to rounding.

    Attributes:
        parallel: "pmap" or "jit", see `parallel.METHODS`.
        num_workers: processes that decode; 0 uses threads, None half of the cores.
        save_minutes: between states within an epoch; each epoch's end is one anyway.
    """

    parallel: str = "pmap"
    num_workers: int | None = 0
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.parallel not in METHODS:
            raise ValueError(f"parallel: expected {' or '.join(METHODS)}, got {self.parallel!r}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {self.num_workers}")
        if not self.save_minutes > 0:
            raise ValueError(f"save_minutes: expected more than 0, got {self.save_minutes}")

    @property
    def workers(self) -> int:
        """How many processes decode."""
        return input_pipeline.default_workers() if self.num_workers is None else self.num_workers


class Gathered(NamedTuple):
    """What the epochs add up to.

    Attributes:
        mean: of the epochs' parameters from `average_from` on, or None.
        total: [N, C] the sum of the epochs' validation scores, or None.
        usable: [N] which validation sounds could be read every time, or None.
    """

    mean: Any
    total: np.ndarray | None
    usable: np.ndarray | None


class Arrays(NamedTuple):
    """What a state saves.

    Attributes:
        state: parameters, optimizer, moving average.
        gathered: over the epochs.
    """

    state: TrainState
    gathered: Gathered


def is_over(history: run_folder.History, training: TrainConfig) -> bool:
    """Whether a run has had its epochs, or as many without a better one as its patience allows."""
    if not history or len(history) >= training.epochs:
        return bool(history)
    return bool(training.patience) and len(history) - run_folder.best_row(history)["epoch"] >= training.patience


class Loop:
    """One run under way in this process."""

    def __init__(
        self,
        run: Run,
        dataset: DataSet,
        params: Any,
        folder: pathlib.Path,
        saved: tuple[Record, pathlib.Path | None] | None,
        machine: Machine,
        say: Say,
    ):
        """Set up steps and state, the latter from a saved one where there is one."""
        self.run, self.folder, self.machine, self._say = run, folder, machine, say
        self.first = not jax.process_index()
        training = run.training
        self.examples, self.validation = dataset.splits["train"], dataset.splits["validation"]
        self.test = dataset.splits["test"]
        self.parallel: DataParallel = METHODS[machine.parallel]()
        self.parallel.check_batch_size(training.batch_size, training.grad_accum_steps)
        self.steps_per_epoch = len(self.examples) // training.batch_size
        if not self.steps_per_epoch:
            raise DataError(f"{run.data['source']}: its training examples have become less than one batch")
        optimizer = optimizers.make_optimizer(training, self.steps_per_epoch)
        self.rates = optimizers.epoch_rates(training, self.steps_per_epoch)
        self.step = self.parallel.compile_train_step(
            functools.partial(
                train.train_step, config=run.config, frontend=run.frontend, training=training, optimizer=optimizer,
                steps_per_epoch=self.steps_per_epoch, attention_implementation=fastest_implementation(training.dtype),
            )
        )  # fmt: skip
        self.soften = _softener(run, self.parallel)
        self.state = train.init_state(params, optimizer, training)
        shape = (len(self.validation), run.config.num_labels)
        self.gathered = Gathered(
            jax.tree.map(np.zeros_like, self.state.params) if training.average_from else None,
            np.zeros(shape) if self.validation else None,
            np.ones(shape[0], bool) if self.validation else None,
        )
        self.resumed = saved is not None
        sizes = [len(self.examples), len(self.validation)]
        self.record = Record(seed=training.seed, sizes=sizes)
        if saved is not None:
            self.record, folder_of_state = saved
            if self.record.sizes != sizes:
                raise DataError(
                    f"{run.data['source']}: expected {self.record.sizes[0]} examples for training and "
                    f"{self.record.sizes[1]} for validation, found {sizes[0]} and {sizes[1]}; give it the data it was "
                    "started with"
                )
            arrays = Arrays(self.state, self.gathered)
            arrays = arrays if folder_of_state is None else run_folder.restore_arrays(folder_of_state, arrays)
            self.state, self.gathered = broadcast_arrays(arrays)
        self.elsewhere: dict[str, str] = {}  # sounds that this process, one of several, could not read
        self.pending: collections.deque[tuple[int, jax.Array, np.ndarray]] = collections.deque()

    def say(self, line: str) -> None:
        """Report a line, above the progress bars."""
        with hidden_bars():
            self._say(line)

    def train(self) -> Checkpoint | None:
        """Train to the end, and return the best epoch's checkpoint; the first of several processes alone has it."""
        training, record = self.run.training, self.record
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress_display())
            alone = jax.process_count() == 1  # else JAX itself waits for SIGTERM, to make all processes agree
            self.came = stack.enter_context(defer_signals(DEFERRED if alone else (signal.SIGINT,)))
            if self.first:
                write_text(self.folder / run_folder.RUN_FILE, self.run.to_json())
            self.states = stack.enter_context(States(self.folder))
            if self.resumed and self.first:
                self._catch_up()
            if not self.resumed:  # the start too, so that a kill in the first epoch can be resumed
                self.states.save(record, jax.tree.map(np.array, Arrays(self.state, self.gathered)), wait=True)
            with run_folder.writing(self.folder):
                board = Board(self.folder / run_folder.TENSORBOARD, record.history, write=self.first)
            self.board = stack.enter_context(board)
            self.say(
                f"{len(self.examples)} training examples, {len(self.validation)} for validation, "
                f"{self.run.config.num_labels} labels, {model.num_params(self.state.params):,} parameters, "
                f"{len(self.parallel.devices)} {self.parallel.devices[0].platform} device(s)"
            )
            if not self.validation:
                self.say("no validation examples: the best epoch will be the one with the lowest training loss")
            self.state = self.parallel.replicate(self.state)
            self.saved_at = time.monotonic()
            self.evaluator = self._evaluator(self.validation, training.epochs)
            stack.callback(self.evaluator.close)
            if not is_over(record.history, training):
                self.say("the first step takes longest: it is compiled")
                self._epochs()
            best = self._finish()
        return best

    def _evaluator(self, examples: list[datasets.Example], passes: int) -> Evaluator:
        """Return what evaluates parameters on some examples."""
        return Evaluator(
            examples, self.run.config, self.run.frontend, self.parallel,
            batch_size=self.run.training.batch_size, passes=passes, num_workers=self.machine.workers,
        )  # fmt: skip

    def _epochs(self) -> None:
        """Take the epochs that are left."""
        training, record = self.run.training, self.record
        batches = input_pipeline.train_batches(
            self.examples, self.run.frontend, self.run.config.num_labels, training,
            first_step=record.step, rows=self.parallel.local_rows(training.batch_size),
            num_workers=self.machine.workers,
        )  # fmt: skip
        with contextlib.closing(batches):
            while not is_over(record.history, training):
                began = time.monotonic()
                epoch = len(record.history) + 1
                with step(f"epoch {epoch}/{training.epochs}", self.steps_per_epoch) as advance:
                    advance(record.step - (epoch - 1) * self.steps_per_epoch)
                    while record.step < epoch * self.steps_per_epoch:
                        self._stop_if_asked(between_steps=True)
                        self._take(next(batches))
                        advance(1)
                        if time.monotonic() - self.saved_at > 60 * self.machine.save_minutes:
                            self._save()
                self._settle_all()
                self._end_epoch(epoch, began)
                self._stop_if_asked()

    def _take(self, batch: input_pipeline.Batch) -> None:
        """Take one step."""
        skipped = batch.pop("skipped")
        self._note_skipped([self.examples[number] for number in np.unique(skipped[skipped >= 0])])
        if (skipped >= 0).all(-1).any():
            raise DataError(
                f"{input_pipeline.MAX_SKIPPED} sounds in a row cannot be read, the last is "
                f"{self.examples[int(skipped.max())].name}; are they there?"
            )
        numbers = batch.pop("example")
        self.state, value = self.step(self.state, self.soften(batch))
        self.pending.append((self.record.step, value, numbers))
        self.record.step += 1
        if len(self.pending) > LAG:
            self._settle()

    def _settle(self) -> None:
        """Look at the oldest loss that nobody has looked at."""
        step, waiting, numbers = self.pending.popleft()
        value = float(waiting)
        if not math.isfinite(value):
            names = [self.examples[number].name for number in numbers]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise FloatingPointError(
                f"the loss is not finite at step {step} (epoch {step // self.steps_per_epoch + 1}), whose batch is "
                f"{', '.join(names[:NAMED])}{more}; the last saved state is good, but goes the same way: start again "
                "with a lower rate, or with max_grad_norm"
            )
        self.record.loss_sum += value

    def _settle_all(self) -> None:
        """Look at all losses there are."""
        while self.pending:
            self._settle()

    def _note_skipped(self, examples: Sequence[datasets.Example]) -> None:
        """Count and tell sounds that could not be read, or stop at them; of several processes, later (see below)."""
        for example in examples:
            if example.name in self.record.skipped or example.name in self.elsewhere:
                continue
            reason = "unreadable"
            try:
                datasets.load_example(example, self.run.frontend)
            except input_pipeline.UNREADABLE as error:
                reason = str(error)
            if jax.process_count() > 1:
                self.elsewhere[example.name] = reason
            else:
                self._list_skipped({example.name: reason})

    def _gather_skipped(self) -> None:
        """Put together what several processes could not read."""
        if jax.process_count() > 1:
            for found in allgather_json(self.elsewhere):
                self._list_skipped(found)

    def _list_skipped(self, found: dict[str, str]) -> None:
        """List sounds by name, with the reason; with `strict`, refuse them."""
        for name, reason in found.items():
            if name not in self.record.skipped:
                if self.run.training.strict:
                    raise DataError(f"{reason}; mend or remove it, or leave out --strict to skip such files")
                self.record.skipped[name] = reason
                self.say(f"skipped: {reason}")

    def _end_epoch(self, epoch: int, began: float) -> None:
        """Evaluate, save and publish."""
        record, training = self.record, self.run.training
        single = self.parallel.unreplicate(self.state)
        self._check_finite(single)
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": self.rates[epoch - 1]}
        row["train_loss"] = record.loss_sum / self.steps_per_epoch
        mean, total, usable = self.gathered
        if self.validation:
            found = self.evaluator(self.state.eval_params, self._stop_if_asked)
            self._note_skipped([self.validation[number] for number in np.flatnonzero(~found.usable)])
            measured = self._metrics(found)
            total, usable = total + scores(found.logits, self.run.config), usable & found.usable
            row |= measured | self._cumulative(total / epoch, usable, found.labels)
            if epoch == 1 and not any(
                name in measured and not math.isnan(measured[name]) for name in run_folder.METRICS
            ):
                self.say(
                    "no label has both positives and negatives among the validation examples: "
                    "the best epoch will be the one with the lowest training loss"
                )
        if training.average_from and epoch >= training.average_from:
            count = epoch - training.average_from + 1
            mean = jax.tree.map(lambda old, new: old + (new - old) / count, mean, single.eval_params)
        self._gather_skipped()
        row["seconds"] = round(time.monotonic() - began, 1)
        self.gathered = Gathered(mean, total, usable)
        record.history.append(row)
        record.loss_sum = 0.0
        self.states.save(record, Arrays(single, self.gathered), finished=True)
        self.saved_at = time.monotonic()
        self._publish(single.eval_params)
        with run_folder.writing(self.folder):
            self.board.add(row)
        self.say(run_folder.row_line(row))

    def _metrics(self, found: Predictions) -> dict[str, float]:
        """Return loss and metrics of validation."""
        logits, labels = found.measured()
        value = float(loss(jnp.asarray(logits), jnp.asarray(labels), self.run.config))
        return {"validation_loss": value, **evaluate_logits(logits, labels, self.run.config)}

    def _cumulative(self, mean: np.ndarray, usable: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the chosen metric of the mean scores of all epochs so far, the original's ensemble over epochs."""
        found = evaluate_logits(mean[usable], labels[usable], self.run.config)  # ranks and maxima are the scores' own
        name = next(iter(found))
        return {f"cumulative_{name}": found[name]} if name != "negative_mse" else {}

    def _publish(self, params: Any) -> None:
        """Bring the run folder up to the last state."""
        if self.first:
            run_folder.publish(self.run, self.folder, params, self.record)

    def _catch_up(self) -> None:
        """Do what a kill may have left undone after the last state was saved."""
        history = self.record.history
        if history and not run_folder.best_is_there(self.run, self.folder, history):
            row = run_folder.best_row(history)
            state = run_folder.state_of_epoch(self.folder, row["epoch"], self.steps_per_epoch)
            like = Arrays(jax.tree.map(np.asarray, self.state), self.gathered)
            kept = run_folder.restore_arrays(state, like).state.eval_params
            metadata = json.dumps(run_folder.run_metadata(self.run, row))
            with run_folder.writing(self.folder):
                save(self.folder / run_folder.BEST, Checkpoint(kept, self.run.config, self.run.frontend, metadata))
        if history and self.record.step == len(history) * self.steps_per_epoch:
            self._publish(self.state.eval_params)
        run_folder.write_tables(self.folder, self.record)

    def _save(self, wait: bool = False) -> None:
        """Save a state in the middle of an epoch."""
        self._settle_all()
        single = self.parallel.unreplicate(self.state)
        self._check_finite(single)
        self.states.save(self.record, Arrays(single, self.gathered), wait=wait)
        self.saved_at = time.monotonic()

    def _check_finite(self, state: TrainState) -> None:
        """Refuse parameters that are not numbers, which must not take the place of good ones."""
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise FloatingPointError(
                f"the parameters are not finite after step {self.record.step - 1}; the last saved state is good, but "
                "goes the same way: start again with a lower rate, or with max_grad_norm"
            )

    def _stop_if_asked(self, between_steps: bool = False) -> None:
        """Save and stop if a signal came; several processes do so between steps, when they agree on one."""
        number = self.came()
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if number is not None:  # Ctrl-C here: stop all of them, as SIGTERM does
                signal.raise_signal(signal.SIGTERM)
            agreed = between_steps and multihost_utils.reached_preemption_sync_point(self.record.step)
            number = signal.SIGTERM if agreed else None
        if number is not None:
            self._save(wait=True)
            stop(number)

    def _finish(self) -> Checkpoint | None:
        """Measure and draw what the run gave, and return the best epoch's checkpoint; twice is as once."""
        best = load((self.folder / run_folder.BEST).absolute()) if self.first else None
        if broadcast_json(self.first and run_folder.has_results(self.folder, self.record)):
            return best
        params = best.params if best is not None else self.parallel.unreplicate(self.state).eval_params
        models = {"best": broadcast_arrays(params)}
        if self.gathered.mean is not None and len(self.record.history) >= self.run.training.average_from:
            models["average"] = self.gathered.mean
            if self.first:
                span = [self.run.training.average_from, len(self.record.history)]
                origin = json.dumps(run_folder.run_metadata(self.run, {"averaged_epochs": span}))
                whole = Checkpoint(self.gathered.mean, self.run.config, self.run.frontend, origin)
                with run_folder.writing(self.folder):
                    save(self.folder / run_folder.AVERAGE, whole)
        history = self.record.history
        content: dict[str, Any] = {"epochs": len(history), "best": run_folder.best_row(history), "last": history[-1]}
        for split, examples in (("validation", self.validation), ("test", self.test)):
            if not examples:
                continue
            with contextlib.closing(self._evaluator(examples, len(models))) as evaluator:
                for name, params in models.items():
                    found = evaluator(self.parallel.replicate(params), self._stop_when_done)
                    self._note_skipped([examples[number] for number in np.flatnonzero(~found.usable)])
                    content.setdefault(split, {})[name] = report(*found.measured(), self.run.config)
        self._gather_skipped()
        if self.first:
            self._tell(content)
            with run_folder.writing(self.folder):
                self._draw(content)
                write_text(self.folder / run_folder.RESULTS_FILE, run_folder.json_text(content))
            run_folder.write_tables(self.folder, self.record)
        self._stop_when_done()
        return best

    def _stop_when_done(self) -> None:
        """Stop if a signal came after the last epoch, whose state is saved."""
        if jax.process_count() == 1 and (number := self.came()) is not None:
            stop(number)

    def _tell(self, content: dict[str, Any]) -> None:
        """Print what the run gave."""
        for split in ("validation", "test"):
            for name, found in content.get(split, {}).items():
                self.say(f"{split}, {name} epoch:" if name == "best" else f"{split}, average of the epochs' weights:")
                for line in report_lines(found):
                    self.say(f"  {line}".rstrip())

    def _draw(self, content: dict[str, Any]) -> None:
        """Draw the run's curves, and what the best epoch takes for what."""
        plots.curves(self.record.history, self.folder / "curves.png")
        split = next((name for name in ("test", "validation") if name in content), None)
        if split is None or self.run.config.resolved_problem_type == ProblemType.REGRESSION:
            return
        best, title = content[split]["best"], f"{split}, epoch {content['best']['epoch']}"
        if best["confusion"] is not None:
            plots.confusion(best["confusion"], self.run.config.labels, self.folder / "confusion.png", title)
        elif best["ranked_classes"]:
            plots.ranked_classes(best, self.folder / "classes.png", title)


def _softener(run: Run, parallel: DataParallel) -> Callable[[input_pipeline.Batch], input_pipeline.Batch]:
    """Return what a teacher, if there is one, makes of a batch's labels."""
    if run.teacher is None:
        return lambda batch: batch
    per_device = run.training.batch_size // len(parallel.devices)
    teacher = distill.load_teacher(run.teacher, run.config, run.frontend, per_device)
    logits, params = parallel.compile_eval_step(teacher.logits), parallel.replicate(teacher.params)

    def soften(batch: input_pipeline.Batch) -> input_pipeline.Batch:
        heard = {name: batch[name] for name in ("waveform", "num_samples")}
        weight = run.training.teacher_weight
        return {**batch, "labels": distill.soften(batch["labels"], logits(params, heard), weight, run.config)}

    return soften
