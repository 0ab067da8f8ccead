"""Saved states of a run: its progress, its arrays as Orbax checkpoints, and write errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.folder import quiet_orbax, restore_numpy

STATES = "states"
TRAIN_LOSS = "train_loss"
SELECTION_METRICS = ("accuracy", "mAP", "negative_mse")  # the first that is measured selects the best epoch

Row = dict[str, Any]
History = list[Row]


@dataclasses.dataclass
class Record:
    """The progress of a run: everything of a state but its arrays.

    Attributes:
        step: optimizer steps taken; also the number of the next batch.
        loss_sum: sum of the losses of the current epoch's steps.
        history: a row of metrics for each finished epoch.
        metric: the name of the column that selects the best epoch, decided after the first epoch; "train_loss", of
            which the lowest is best, where nothing can be measured on a validation split. "" before.
        seed: random seed of the run.
        sizes: number of training and of validation examples.
        skipped: name and reason of every example that could not be read.
    """

    step: int = 0
    loss_sum: float = 0.0
    history: History = dataclasses.field(default_factory=list)
    metric: str = ""
    seed: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json_dict(cls, content: Any) -> Record:
        """Invert `dataclasses.asdict`; any other content raises TypeError, KeyError or ValueError."""
        record = cls(**content)
        types = {"step": int, "loss_sum": float, "history": list, "metric": str, "seed": int, "sizes": list,
                 "skipped": dict}  # fmt: skip
        for name, kind in types.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        for row in record.history:
            if not isinstance(row["epoch"], int):
                raise TypeError("epoch is no int")
            record.score(row)
        return record

    def score(self, row: Mapping[str, Any]) -> float:
        """Return how good an epoch is: its metric, or the negative training loss; -inf where it has no number."""
        value = float(row.get(self.metric, math.nan))
        return -math.inf if math.isnan(value) else -value if self.metric == TRAIN_LOSS else value

    @property
    def best_row(self) -> Row:
        """The best epoch's row; of equals the first."""
        return max(self.history, key=self.score)

    @property
    def last_is_best(self) -> bool:
        """Whether the last epoch is better than all before it."""
        return self.best_row is self.history[-1]


def selection_metric(measured: Mapping[str, float]) -> str:
    """Return the metric that selects the best epoch, given what the first epoch measured on the validation split."""
    return next((name for name in SELECTION_METRICS if math.isfinite(measured.get(name, math.nan))), TRAIN_LOSS)


class States:
    """The saved states of a run, written by Orbax's `CheckpointManager` in the background while training goes on.

    With several processes the first one writes; in the others the methods do nothing.
    """

    def __init__(self, run_folder: pathlib.Path):
        """Open the states of a run folder, and remove partial writes of a killed process."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self.folder = run_folder / STATES
        self._manager = None
        if jax.process_index():
            return

        def rank(found: dict[str, Any]) -> tuple[float, int]:
            return found["score"], -found["epoch"]  # of equals, the first

        best = policies.BestN(n=1, get_metric_fn=rank, keep_checkpoints_without_metrics=False)
        policy = policies.AnyPreservationPolicy([policies.LatestN(1), best])
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=rank,  # or Orbax would not store the metrics that the policy needs
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        handlers = {
            "arrays": ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> States:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._manager is None:
            return
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext(), writing(self.folder):
            self._manager.wait_until_finished()
        self._manager.close()

    def save(self, record: Record, arrays: Any, *, finished: bool = False, wait: bool = False) -> None:
        """Save a state in the background.

        Its number is the sum of steps and finished epochs, so that an epoch's last step and its end are two states.

        Args:
            record: the progress of the run.
            arrays: a tree of NumPy arrays that nobody modifies afterwards; its leaves are saved in order.
            finished: an epoch has just ended, whose score may make this the best state.
            wait: return only when the state is on disk.

        Raises:
            OSError: this state, or the one before it, cannot be written.
        """
        import orbax.checkpoint as ocp

        if self._manager is None:
            return
        number = record.step + len(record.history)
        leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(arrays))}
        with writing(self.folder):
            self._manager.wait_until_finished()
            if number not in self._manager.all_steps():
                items = ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(dataclasses.asdict(record))
                )
                score = record.score(record.history[-1]) if finished else -math.inf
                rank = {"score": score, "epoch": len(record.history)} if math.isfinite(score) else None
                with quiet_orbax():
                    self._manager.save(number, args=items, metrics=rank, force=True)
            if wait:
                self._manager.wait_until_finished()


def newest_state(run_folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """Return the folder of a run's last complete state, or None."""
    folder = pathlib.Path(run_folder) / STATES
    names = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return max(names, key=lambda path: int(path.name), default=None)


def state_of_epoch(run_folder: pathlib.Path, epoch: int, steps_per_epoch: int) -> pathlib.Path:
    """Return the folder of the state at the end of an epoch, after its evaluation."""
    return run_folder / STATES / str(epoch * (steps_per_epoch + 1))


def read_record(state: pathlib.Path) -> Record:
    """Read the progress of a run from a saved state.

    Raises:
        ValueError: the file is damaged.
    """
    path = state / "record" / "metadata"
    with damage_as_value_error(path):
        return Record.from_json_dict(json.loads(path.read_text(encoding="utf-8")))


def restore_arrays(state: pathlib.Path, like: Any) -> Any:
    """Return the arrays of a state as NumPy in a tree like `like`, whatever devices saved them.

    Raises:
        ValueError: damaged, or arrays of other shapes than `like`'s.
    """
    leaves, expected = restore_numpy(state / "arrays"), jax.tree.leaves(like)
    restored = [np.asarray(leaves[name]) for name in sorted(leaves, key=int)]
    if [leaf.shape for leaf in restored] != [np.shape(leaf) for leaf in expected]:
        raise ValueError(f"{state}: expected what run.json describes, got arrays of other shapes; undo the change")
    return jax.tree.unflatten(jax.tree.structure(like), restored)


@contextlib.contextmanager
def damage_as_value_error(path: pathlib.Path) -> Iterator[None]:
    """Turn the exceptions of reading a damaged file into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected the file as finetune wrote it, found none; start again") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: expected the file as finetune wrote it, got a damaged file ({reason}); "
            "restore it, or start again in a new folder"
        ) from error


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Turn what Orbax and tensorstore raise on a full disk or without permission into an OSError of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # how tensorstore reports errno
        number = getattr(error, "errno", None) or (int(code[1]) if code else None)
        if number is None:
            raise
        raise OSError(
            f"{folder}: cannot be written ({os.strerror(number)}); the last saved state is complete: "
            f"{_REMEDY.get(number, 'fix that')} and resume the run"
        ) from error


_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "allow writing there",
    errno.EROFS: "allow writing there",
}
