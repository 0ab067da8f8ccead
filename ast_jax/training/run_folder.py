"""The folder of a training run: what was asked for, states to go on from, and what is published of them.

RUN/
  run.json        what was asked for: data, labels, architecture, frontend, training settings
  states/STEP/    Orbax checkpoints: parameters, optimizer, averages, and a record of where the run stands
  best/           the checkpoint of the best epoch on the validation split, for inference
  metrics.csv, metrics.json, tensorboard/     a row an epoch
  skipped.csv     the sounds that could not be read
  epochs/NNNN/    a checkpoint of every epoch, where asked for
  average/        the mean of the epochs' weights, where asked for
  results.json, *.png     what the finished run gave

Only a state counts: all else follows from it, and where a kill came between, `resume` makes it again. The newest state
and that of the best epoch are kept.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint, restore_numpy, save
from ast_jax.checkpoints.locate import FORMAT_FILE
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.runtime.files import write_text
from ast_jax.training.config import TrainConfig

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
METRICS_JSON = "metrics.json"
SKIPPED_FILE = "skipped.csv"
STATES = "states"
BEST = "best"
AVERAGE = "average"
RESULTS_FILE = "results.json"
EPOCHS = "epochs"
TENSORBOARD = "tensorboard"
OURS = r"run\.json|metrics\.csv|metrics\.json|skipped\.csv|best|results\.json|average|[a-z]+\.png|\d{4}"
METRICS = frozenset({"mAP", "accuracy", "negative_mse"})  # what may choose the best epoch

History = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run, as stored in `run.json`.

    Attributes:
        data: arguments of `datasets.read_dataset`, by name; `source` among them.
        config: the architecture.
        frontend: the features.
        training: the settings.
        metadata: where the weights and the data came from.
        teacher: a model or an exported program, or None.
        keep_epochs: whether every epoch's checkpoint is kept.
    """

    data: dict[str, Any]
    config: ASTConfig
    frontend: FrontendConfig
    training: TrainConfig
    metadata: dict[str, Any]
    teacher: str | None = None
    keep_epochs: bool = False

    def to_json(self) -> str:
        """Return the text of `run.json`."""
        content = {
            "data": self.data,
            "config": self.config.to_json_dict(),
            "frontend": self.frontend.to_json_dict(),
            "training": dataclasses.asdict(self.training),
            "metadata": self.metadata,
            "teacher": self.teacher,
            "keep_epochs": self.keep_epochs,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Invert `to_json`; a text that is none of its own raises KeyError, TypeError, AttributeError or ValueError."""
        content = json.loads(text)
        data, metadata, teacher = content["data"], content["metadata"], content["teacher"]
        if not (isinstance(data, dict) and isinstance(data["source"], str) and isinstance(metadata, dict)):
            raise TypeError("data or metadata have another type")
        if not isinstance(teacher, str | None):
            raise TypeError("teacher has another type")
        return cls(
            data,
            ASTConfig.from_json_dict(content["config"]),
            FrontendConfig.from_json_dict(content["frontend"]),
            TrainConfig(**content["training"]),
            metadata,
            teacher,
            bool(content["keep_epochs"]),
        )


@dataclasses.dataclass
class Record:
    """Where a run stands, beside its arrays.

    Attributes:
        step: optimizer steps taken; the next batch of the input has this number.
        loss_sum: of the steps of the epoch that is under way.
        history: a row for each finished epoch.
        seed: of the run.
        sizes: examples for training and for validation.
        skipped: path and reason of every sound that could not be read.
    """

    step: int = 0
    loss_sum: float = 0.0
    history: History = dataclasses.field(default_factory=list)
    seed: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json_dict(cls, content: Any) -> Record:
        """Invert `dataclasses.asdict`; content that is none of its own raises TypeError, KeyError or ValueError."""
        record = cls(**content)
        types = {"step": int, "loss_sum": float, "history": list, "seed": int, "sizes": list, "skipped": dict}
        for name, kind in types.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        if record.history:
            is_best(record.history), csv_text(record.history)  # what will be made of it
        return record


class States:
    """The saved states of a run, written by Orbax's `CheckpointManager` while training goes on.

    With several processes the first one writes; the others have an object that does nothing.
    """

    def __init__(self, run_folder: pathlib.Path):
        """Open the states of a run folder, and remove what a killed writer left."""
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
            best_fn=rank,  # or Orbax would not store what the policy goes by
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
        """Save arrays (NumPy, which nobody may change any more) and record; writing goes on in the background.

        A state's number counts the steps and the finished epochs, so that the end of an epoch's steps and the end of
        its evaluation are two.

        Args:
            record: where the run stands.
            arrays: a tree; its leaves are saved in order.
            finished: whether an epoch has just ended, whose result may make this the best state.
            wait: return only when it is on the disk.

        Raises:
            OSError: this state, or the one before it, cannot be written.
        """
        import orbax.checkpoint as ocp

        if self._manager is None:
            return
        number = record.step + len(record.history)
        score = score_of(record.history) if finished else math.nan
        leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(arrays))}
        with writing(self.folder):
            self._manager.wait_until_finished()
            if number not in self._manager.all_steps():
                items = ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(dataclasses.asdict(record))
                )
                rank = None if math.isnan(score) else {"score": score, "epoch": len(record.history)}
                with _hushed():
                    self._manager.save(number, args=items, metrics=rank, force=True)
            if wait:
                self._manager.wait_until_finished()


def newest_state(run_folder: str | pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the last whole state of a run, or None."""
    folder = pathlib.Path(run_folder) / STATES
    names = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return max(names, key=lambda path: int(path.name), default=None)


def state_of_epoch(run_folder: pathlib.Path, epoch: int, steps_per_epoch: int) -> pathlib.Path:
    """Return the folder of the state at the end of an epoch, evaluation included."""
    return run_folder / STATES / str(epoch * (steps_per_epoch + 1))


def read_record(state: pathlib.Path) -> Record:
    """Read where a run stood when a state was saved.

    Raises:
        ValueError: the file is damaged.
    """
    path = state / "record" / "metadata"
    with _damage(path):
        return Record.from_json_dict(json.loads(path.read_text(encoding="utf-8")))


def restore_arrays(state: pathlib.Path, like: Any) -> Any:
    """Return the arrays of a state as NumPy, in a tree like `like`, on however many devices they were saved.

    Raises:
        ValueError: damaged, or arrays of other shapes than `like`'s.
    """
    leaves, expected = restore_numpy(state / "arrays"), jax.tree.leaves(like)
    restored = [np.asarray(leaves[name]) for name in sorted(leaves, key=int)]
    if [leaf.shape for leaf in restored] != [np.shape(leaf) for leaf in expected]:
        raise ValueError(f"{state}: expected what {RUN_FILE} describes, got arrays of other shapes; undo the change")
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def read_run(run_folder: str | pathlib.Path) -> Run:
    """Read what a run was started with.

    Raises:
        ValueError: the folder holds no run, or its `run.json` is damaged.
    """
    path = pathlib.Path(run_folder) / RUN_FILE
    if not path.exists():
        raise ValueError(f"{run_folder}: expected a run folder to resume, found no {RUN_FILE} in it")
    with _damage(path):
        return Run.from_json(path.read_text(encoding="utf-8"))


def can_resume(run_folder: str | pathlib.Path) -> bool:
    """Whether a folder holds a run with a saved state."""
    return (pathlib.Path(run_folder) / RUN_FILE).exists() and newest_state(run_folder) is not None


def publish(run: Run, folder: pathlib.Path, params: Any, record: Record) -> None:
    """Bring the rest of a run folder up to a state at an epoch's end; done twice, it changes nothing.

    Args:
        run: what was asked for.
        folder: the run's.
        params: to keep, NumPy.
        record: of the state.

    Raises:
        OSError: something cannot be written.
    """
    history = record.history
    checkpoint = Checkpoint(params, run.config, run.frontend, json.dumps(run_metadata(run, history[-1])))
    with writing(folder):
        if run.keep_epochs:
            (folder / EPOCHS).mkdir(exist_ok=True)
            save(folder / EPOCHS / f"{len(history):04d}", checkpoint)
        if is_best(history):
            save(folder / BEST, checkpoint)
    write_tables(folder, record)


def write_tables(folder: pathlib.Path, record: Record) -> None:
    """Write the metrics of all epochs, and the list of sounds that could not be read.

    Raises:
        OSError: one of them cannot be written.
    """
    with writing(folder):
        if record.skipped:
            rows = [{"path": path, "reason": reason} for path, reason in record.skipped.items()]
            write_text(folder / SKIPPED_FILE, csv_text(rows))
        if record.history:
            write_text(folder / METRICS_FILE, csv_text(record.history))
            write_text(folder / METRICS_JSON, json_text(record.history))


def best_is_there(run: Run, folder: pathlib.Path, history: History) -> bool:
    """Whether `best/` holds what the history says is best: a kill may have come between it and the state."""
    wanted = run_metadata(run, best_row(history))["epoch"]
    try:
        description = json.loads((folder / BEST / FORMAT_FILE).read_text(encoding="utf-8"))
        return description["metadata"]["epoch"] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_metadata(run: Run, epoch: Any) -> dict[str, Any]:
    """Return what a checkpoint of a run says of its origin."""
    return {**run.metadata, "training": dataclasses.asdict(run.training), "epoch": _finite(epoch)}


def checkpoints_of(model: str, epochs: str | None = None) -> list[str]:
    """Return the checkpoints that a model's name stands for: a run's best, or some of its epochs; else the name itself.

    Args:
        model: a run folder, or what `load` takes.
        epochs: FIRST-LAST or one number, of a run that kept its epochs.

    Raises:
        ValueError: `epochs` is no such thing, there is no such run, or it has not kept them.
    """
    folder = pathlib.Path(model)
    if epochs is None:
        return [str(folder / BEST)] if (folder / RUN_FILE).is_file() else [model]
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", epochs)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"epochs: expected FIRST-LAST, as 6-25, got {epochs!r}")
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder}: expected a run's folder, of whose epochs to take some, found no {RUN_FILE} in it")
    wanted = [folder / EPOCHS / f"{number:04d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    if missing := [path for path in wanted if not path.is_dir()]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} epochs are not there, the first is {missing[0]}; "
            "finetune keeps them with --keep-epochs"
        )
    return [str(path) for path in wanted]


def has_results(folder: pathlib.Path, record: Record) -> bool:
    """Whether what a finished run gave has been written down."""
    path = folder / RESULTS_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(path.read_text(encoding="utf-8"))["epochs"] == len(record.history)
    return False


def metric_of(history: History) -> str | None:
    """Return the metric that chooses the best epoch: the first that is a number in the last row; None for the loss."""
    return next((key for key, value in history[-1].items() if key in METRICS and not math.isnan(value)), None)


def score_of(history: History) -> float:
    """Return how good the last epoch is, by its metric, else by its training loss."""
    metric = metric_of(history)
    return history[-1][metric] if metric else -history[-1]["train_loss"]


def best_row(history: History) -> dict[str, Any]:
    """Return the best epoch's row; of equals, the first."""
    metric = metric_of(history)

    def score(row: dict[str, Any]) -> float:
        value = row.get(metric, math.nan) if metric else -row["train_loss"]
        return -math.inf if math.isnan(value) else value

    return max(history, key=score)


def row_line(row: Mapping[str, Any]) -> str:
    """Return an epoch's row as a line for the terminal, "-" for what is no finite number in JSON."""
    return ", ".join(f"{name} {_number(value)}" for name, value in row.items())


def _number(value: Any) -> str:
    """Return a number with four digits at most, unless it counts something."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def is_best(history: History) -> bool:
    """Whether the last epoch is better than all before it."""
    return best_row(history) is history[-1]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV text, with every column that any of them has."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_text(content: Any) -> str:
    """Return JSON text, null for what is no finite number."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a tree with None for infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_states(folder: pathlib.Path) -> None:
    """Remove what a run has written before its first epoch's end, so that its folder is free again."""
    for name in (RUN_FILE, SKIPPED_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (STATES, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep Orbax from warning that a state within an epoch has no metrics."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected the file as finetune wrote it, found none; start again") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: expected the file as finetune wrote it, got a damaged one ({reason}); "
            "put it back, or start again in a new folder"
        ) from error


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Turn what Orbax and tensorstore raise where a disk is full or a folder forbidden into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's way to tell it
        number = getattr(error, "errno", None) or (int(code[1]) if code else None)
        if number is None:
            raise
        raise OSError(
            f"{folder}: cannot be written ({os.strerror(number)}); the last saved state is whole: "
            f"{_REMEDY.get(number, 'mend that')} and go on with --resume"
        ) from error


_REMEDY = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "allow writing there",
    errno.EROFS: "allow writing there",
}
