"""What a trainer watches while it runs: losses, unreadable examples, and signals to stop."""

from __future__ import annotations

import collections
import math
import signal
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ast_jax.config import FrontendConfig
from ast_jax.data.datasets import DataError, Example, load_example
from ast_jax.training import input_pipeline
from ast_jax.training.parallel import allgather_json
from ast_jax.training.states import Record

LAG = 4  # steps whose losses are not fetched yet, so that the device need not wait for the host
NAMED = 8  # examples of a batch that a message names


class LossMonitor:
    """Sums the losses of an epoch a few steps late, and stops at one that is not finite."""

    def __init__(self, record: Record, examples: Sequence[Example], steps_per_epoch: int):
        """Add to `record.loss_sum`; the examples are for messages."""
        self._record, self._examples, self._steps_per_epoch = record, examples, steps_per_epoch
        self._pending: collections.deque[tuple[int, jax.Array, np.ndarray]] = collections.deque()

    def add(self, step: int, loss: jax.Array, indices: np.ndarray) -> None:
        """Take the loss of a step on the examples with these indices.

        Raises:
            FloatingPointError: the loss of an earlier step is not finite.
        """
        self._pending.append((step, loss, indices))
        if len(self._pending) > LAG:
            self._settle()

    def flush(self) -> None:
        """Wait for all losses.

        Raises:
            FloatingPointError: one of them is not finite; the message names the step and its examples.
        """
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        step, loss, indices = self._pending.popleft()
        value = float(loss)
        if not math.isfinite(value):
            names = [self._examples[index].name for index in indices]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise FloatingPointError(
                f"the loss is not finite at step {step} (epoch {step // self._steps_per_epoch + 1}), whose batch is "
                f"{', '.join(names[:NAMED])}{more}; {DIVERGED}"
            )
        self._record.loss_sum += value


DIVERGED = (
    "the last saved state is good, but resuming it would diverge again: start a new run with a lower learning rate, or "
    "with max_grad_norm"
)


class SkippedExamples:
    """Lists examples that cannot be read, each once with the reason; with `strict` they are errors.

    Several processes share what each of them could not read at an epoch's end.
    """

    def __init__(self, record: Record, frontend: FrontendConfig, strict: bool, log: Callable[[str], None]):
        """Write to `record.skipped`."""
        self._record, self._frontend, self._strict, self._log = record, frontend, strict, log
        self._local: dict[str, str] = {}  # of this process, not shared yet

    def add(self, examples: Sequence[Example]) -> None:
        """List examples.

        Raises:
            DataError: with `strict`.
        """
        for example in examples:
            if example.name in self._record.skipped or example.name in self._local:
                continue
            reason = "unreadable"
            try:
                load_example(example, self._frontend)
            except input_pipeline.UNREADABLE as error:
                reason = str(error)
            if jax.process_count() > 1:
                self._local[example.name] = reason
            else:
                self._list({example.name: reason})

    def gather(self) -> None:
        """Share the lists of all processes.

        Raises:
            DataError: with `strict`.
        """
        if jax.process_count() > 1:
            for found in allgather_json(self._local):
                self._list(found)

    def _list(self, found: dict[str, str]) -> None:
        for name, reason in found.items():
            if name not in self._record.skipped:
                if self._strict:
                    raise DataError(f"{reason}; repair or remove it, or leave out --strict to skip such files")
                self._record.skipped[name] = reason
                self._log(f"skipped: {reason}")


class StopRequest:
    """Whether a signal asks the run to stop; several processes stop together."""

    def __init__(self, received: Callable[[], int | None]):
        """Take what `defer_signals` yields."""
        self._received = received

    def number(self, step: int | None = None) -> int | None:
        """Return the signal to stop for, or None.

        Args:
            step: of several processes, the step at which all of them ask, so that they can agree; None where they do
                not ask together.
        """
        number = self._received()
        if jax.process_count() == 1:
            return number
        from jax.experimental import multihost_utils

        if number is not None:  # Ctrl-C here: stop all of them, as SIGTERM does
            signal.raise_signal(signal.SIGTERM)
        return signal.SIGTERM if step is not None and multihost_utils.reached_preemption_sync_point(step) else None
