"""The folder of a training run: what was asked for, what is published of its states, and how to read it.

RUN/
  run.json        what was asked for: data, labels, architecture, frontend, hyperparameters
  states/STEP/    Orbax checkpoints to resume from: parameters, optimizer, averages, and where the run stands
  best/           the checkpoint of the best epoch on the validation split, for inference
  metrics.csv, metrics.json, tensorboard/     a row for each epoch
  skipped.csv     examples that could not be read
  epochs/NNNN/    a checkpoint of every epoch, where asked for
  average/        the mean of the epochs' weights, where asked for
  results.json, *.png     the final evaluation

Only the states matter: everything else follows from them, and `resume` makes it again where a kill came between. The
newest state and that of the best epoch are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.checkpoints.locate import FORMAT_FILE
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.data.datasets import DatasetConfig
from ast_jax.runtime.files import write_text
from ast_jax.runtime.tables import csv_text
from ast_jax.training.config import TrainConfig
from ast_jax.training.states import STATES, Record, damage_as_value_error, newest_state, writing

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
METRICS_JSON = "metrics.json"
SKIPPED_FILE = "skipped.csv"
BEST = "best"
AVERAGE = "average"
RESULTS_FILE = "results.json"
EPOCHS = "epochs"
TENSORBOARD = "tensorboard"
OURS = r"run\.json|metrics\.csv|metrics\.json|skipped\.csv|best|results\.json|average|[a-z]+\.png|\d{4}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run on disk.

    Attributes:
        folder: the run folder.
    """

    folder: pathlib.Path

    def __post_init__(self) -> None:
        """Accept a string for the folder."""
        object.__setattr__(self, "folder", pathlib.Path(self.folder))

    def __fspath__(self) -> str:
        """Stand for the folder wherever a path is taken."""
        return str(self.folder)

    @property
    def best(self) -> pathlib.Path:
        """The checkpoint folder of the best epoch, for `load`."""
        return self.folder / BEST

    @property
    def config(self) -> RunConfig:
        """What the run was started with.

        Raises:
            ValueError: the folder holds no run, or its `run.json` is damaged.
        """
        return read_run(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row for each epoch so far.

        Keys: "epoch", "learning_rate", "train_loss", and the metrics of the validation split; None stands for NaN.

        Raises:
            ValueError: there is no epoch yet, or the file is damaged.
        """
        return self._read(METRICS_JSON)

    @property
    def results(self) -> dict[str, Any]:
        """The final evaluation.

        Keys: "epochs", their number; "best" and "last", rows of `metrics`; "validation" and "test", for each of these
        splits a report (see `ast_jax.evaluate`) of the model "best" and, with weight averaging, of "average".

        Raises:
            ValueError: the run is not finished, or the file is damaged.
        """
        return self._read(RESULTS_FILE)

    def _read(self, name: str) -> Any:
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"{path}: not written yet; continue the run (ast_jax.resume)")
        with damage_as_value_error(path):
            return json.loads(path.read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that determines a run, as stored in `run.json`.

    Attributes:
        data: where sounds and labels are, as absolute paths.
        config: the architecture.
        frontend: the features.
        training: the hyperparameters.
        metadata: where the weights and the data came from.
        teacher: a model or an exported program, or None.
        keep_epochs: whether every epoch's checkpoint is kept.
    """

    data: DatasetConfig
    config: ASTConfig
    frontend: FrontendConfig
    training: TrainConfig
    metadata: dict[str, Any]
    teacher: str | None = None
    keep_epochs: bool = False

    def to_json(self) -> str:
        """Return the text of `run.json`."""
        content = {
            "data": dataclasses.asdict(self.data),
            "config": self.config.to_json_dict(),
            "frontend": self.frontend.to_json_dict(),
            "training": dataclasses.asdict(self.training),
            "metadata": self.metadata,
            "teacher": self.teacher,
            "keep_epochs": self.keep_epochs,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Invert `to_json`; any other text raises KeyError, TypeError, AttributeError or ValueError."""
        content = json.loads(text)
        metadata, teacher = content["metadata"], content["teacher"]
        if not isinstance(metadata, dict):
            raise TypeError("metadata has another type")
        if not isinstance(teacher, str | None):
            raise TypeError("teacher has another type")
        return cls(
            DatasetConfig(**content["data"]),
            ASTConfig.from_json_dict(content["config"]),
            FrontendConfig.from_json_dict(content["frontend"]),
            TrainConfig(**content["training"]),
            metadata,
            teacher,
            bool(content["keep_epochs"]),
        )


def read_run(run_folder: str | pathlib.Path) -> RunConfig:
    """Read what a run was started with.

    Raises:
        ValueError: the folder holds no run, or its `run.json` is damaged.
    """
    path = pathlib.Path(run_folder) / RUN_FILE
    if not path.exists():
        raise ValueError(f"{run_folder}: expected a run folder to resume, found no {RUN_FILE} in it")
    with damage_as_value_error(path):
        return RunConfig.from_json(path.read_text(encoding="utf-8"))


def can_resume(run_folder: str | pathlib.Path) -> bool:
    """Whether a folder holds a run with a saved state."""
    return (pathlib.Path(run_folder) / RUN_FILE).exists() and newest_state(run_folder) is not None


def publish(run: RunConfig, folder: pathlib.Path, params: Any, record: Record) -> None:
    """Publish a state at an epoch's end: checkpoints and tables; idempotent.

    Args:
        run: what was asked for.
        folder: the run folder.
        params: the parameters to keep, NumPy arrays.
        record: the record of the state.

    Raises:
        OSError: something cannot be written.
    """
    history = record.history
    checkpoint = Checkpoint(params, run.config, run.frontend, json.dumps(run_metadata(run, history[-1])))
    with writing(folder):
        if run.keep_epochs:
            (folder / EPOCHS).mkdir(exist_ok=True)
            save(folder / EPOCHS / f"{len(history):04d}", checkpoint)
        if record.last_is_best:
            save(folder / BEST, checkpoint)
    write_tables(folder, record)


def publish_missing(run: RunConfig, folder: pathlib.Path, record: Record, params_of: Callable[[int], Any]) -> None:
    """Publish what a kill may have left undone after the last state was saved, given the parameters of an epoch."""
    if record.history and not best_is_there(run, folder, record):
        row = record.best_row
        metadata = json.dumps(run_metadata(run, row))
        with writing(folder):
            save(folder / BEST, Checkpoint(params_of(row["epoch"]), run.config, run.frontend, metadata))
    write_tables(folder, record)


def save_average(run: RunConfig, folder: pathlib.Path, record: Record, params: Any) -> None:
    """Write the checkpoint of the mean of the epochs' weights."""
    span = [run.training.average_from, len(record.history)]
    metadata = json.dumps(run_metadata(run, {"averaged_epochs": span}))
    with writing(folder):
        save(folder / AVERAGE, Checkpoint(params, run.config, run.frontend, metadata))


def write_tables(folder: pathlib.Path, record: Record) -> None:
    """Write the metrics of all epochs, and the list of examples that could not be read.

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


def best_is_there(run: RunConfig, folder: pathlib.Path, record: Record) -> bool:
    """Whether `best/` holds the best epoch: a kill may have come between its state and its checkpoint."""
    wanted = run_metadata(run, record.best_row)["epoch"]
    try:
        description = json.loads((folder / BEST / FORMAT_FILE).read_text(encoding="utf-8"))
        return description["metadata"]["epoch"] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_metadata(run: RunConfig, epoch: Any) -> dict[str, Any]:
    """Return the metadata of a checkpoint of a run."""
    return {**run.metadata, "training": dataclasses.asdict(run.training), "epoch": finite(epoch)}


def checkpoints_of(model: str, epochs: str | None = None) -> list[str]:
    """Return the checkpoints of a model name: a run's best, or some of its epochs; any other name is returned as it is.

    Args:
        model: a run folder, or what `load` takes.
        epochs: FIRST-LAST or one number, of a run that kept its epochs.

    Raises:
        ValueError: `epochs` is malformed, `model` is no run folder, or the run did not keep these epochs.
    """
    folder = pathlib.Path(model)
    if epochs is None:
        return [str(folder / BEST)] if (folder / RUN_FILE).is_file() else [model]
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", epochs)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"epochs: expected FIRST-LAST, as 6-25, got {epochs!r}")
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder}: expected a run folder, whose epochs to take, found no {RUN_FILE} in it")
    wanted = [folder / EPOCHS / f"{number:04d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    if missing := [path for path in wanted if not path.is_dir()]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} epochs are not there, the first is {missing[0]}; "
            "finetune keeps them with --keep-epochs"
        )
    return [str(path) for path in wanted]


def has_results(folder: pathlib.Path, record: Record) -> bool:
    """Whether the final evaluation of a run has been written."""
    path = folder / RESULTS_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(path.read_text(encoding="utf-8"))["epochs"] == len(record.history)
    return False


def row_line(row: Mapping[str, Any]) -> str:
    """Return an epoch's row as a line for the terminal, "-" for None."""
    return ", ".join(f"{name} {_number(value)}" for name, value in row.items())


def _number(value: Any) -> str:
    """Return a float with four significant digits, anything else as it is."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def json_text(content: Any) -> str:
    """Return JSON text with null for NaN and infinity."""
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return a tree with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_states(folder: pathlib.Path) -> None:
    """Remove what a run wrote before its first epoch ended, so that its folder can be used again."""
    for name in (RUN_FILE, SKIPPED_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (STATES, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)
