"""Cross-validation: a run for each fold of a data set in one folder, and the table of their results.

FOLDER/
  cross_validation.json     what was asked for
  initial/                  the checkpoint that every fold starts from, where there is one
  fold-N/                   the run in which fold N is the validation split, see `run_folder`
  folds.csv, folds.json     the results of the finished folds, and their mean
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.checkpoints.load import load
from ast_jax.checkpoints.locate import is_own
from ast_jax.config import ASTConfig, ProblemType
from ast_jax.data.datasets import DataError, DatasetConfig, read_dataset
from ast_jax.runtime.files import exclusive_lock, write_text
from ast_jax.runtime.tables import csv_text
from ast_jax.training import finetune, run_folder
from ast_jax.training.config import ExecutionConfig, TrainConfig
from ast_jax.training.finetune import Plan
from ast_jax.training.recipes import find_recipe, load_init
from ast_jax.training.run_folder import Run
from ast_jax.training.states import Record, damage_as_value_error, newest_state, read_record
from ast_jax.training.trainer import Log, MetricsCallback, is_over

logger = logging.getLogger(__name__)
PLAN_FILE = finetune.CROSS_VALIDATION_FILE
INITIAL = "initial"
TABLE_JSON = "folds.json"
StrPath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """A cross-validation on disk.

    Attributes:
        folder: its folder.
    """

    folder: pathlib.Path

    def __post_init__(self) -> None:
        """Accept a string for the folder."""
        object.__setattr__(self, "folder", pathlib.Path(self.folder))

    def __fspath__(self) -> str:
        """Stand for the folder wherever a path is taken."""
        return str(self.folder)

    @property
    def folds(self) -> dict[str, Run]:
        """The runs of the folds that have begun, by the fold's name.

        Raises:
            ValueError: the folder holds no cross-validation, or its description is damaged.
        """
        runs = {fold: Run(self.folder / f"fold-{fold}") for fold in _read_plan(self.folder)["folds"]}
        return {fold: run for fold, run in runs.items() if run_folder.can_resume(run.folder)}

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each finished fold, and the row "mean".

        Keys: "fold", "metric" (its name), "last" and "best" (its value in the last and in the best epoch) and
        "best_epoch". The best epoch is selected on the fold that is measured: "last" is the unbiased figure.

        Raises:
            ValueError: no fold is finished, or the file is damaged.
        """
        path = self.folder / TABLE_JSON
        if not path.exists():
            raise ValueError(
                f"{path}: not written yet; no fold is finished (ast_jax.resume_cross_validation continues)"
            )
        with damage_as_value_error(path):
            return json.loads(path.read_text(encoding="utf-8"))


def cross_validate(
    data: DatasetConfig | StrPath,
    output: StrPath,
    *,
    init: Checkpoint | StrPath | None = None,
    architecture: ASTConfig | None = None,
    training: TrainConfig | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    recipe: str | None = None,
    problem_type: ProblemType | str | None = None,
    statistics: tuple[float, float] | None = None,
    teacher: StrPath | None = None,
    keep_epochs: bool = False,
    metrics: MetricsCallback | None = None,
    log: Log = logger.info,
) -> CrossValidation:
    """Fine-tune once for each fold of a data set, with that fold as the validation split.

    The arguments are those of `finetune`; `data` names neither a fold nor a validation source.

    Returns:
        The finished cross-validation.

    Raises:
        DataError: the data set has no folds.
        ValueError: as in `finetune`.
    """
    finetune.check_call(execution, metrics, log)
    output, data = pathlib.Path(output), DatasetConfig.of(data)
    _refuse_several_processes()
    if held_out := [name for name in ("fold", "validation") if getattr(data, name) is not None]:
        raise ValueError(f"{held_out[0]}: expected none; every fold is held out once in cross-validation")
    chosen = find_recipe(recipe) if recipe is not None else None
    start = load_init(init, chosen)
    plan = finetune.make_plan(
        start, chosen, training=training, architecture=architecture, problem_type=problem_type, statistics=statistics,
        teacher=teacher, keep_epochs=keep_epochs,
    )  # fmt: skip
    folds = read_dataset(data, plan.training.seed).folds
    if not folds:
        raise DataError(
            f"{data.source}: expected a data set with folds (ESC-50, or a column fold), found none; "
            "--no-cross-validate makes one run"
        )
    output.mkdir(parents=True, exist_ok=True)
    _free(output)
    if any(output.iterdir()):
        raise ValueError(
            f"{output}: expected a new or empty folder; resume what is in it (ast-jax resume) or choose another"
        )
    if chosen:
        finetune.describe_plan(plan, chosen, start, init, log)
    if start is not None:
        save(output / INITIAL, start)
    content = {"folds": folds, "data": dataclasses.asdict(data.absolute()), "plan": plan.to_json_dict()}
    _write_plan(output, content)
    try:
        return resume_cross_validation(output, execution=execution, metrics=metrics, log=log)
    except Exception:
        _free(output)
        raise


def resume_cross_validation(
    output: StrPath,
    data: DatasetConfig | StrPath | None = None,
    *,
    epochs: int | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    metrics: MetricsCallback | None = None,
    log: Log = logger.info,
) -> CrossValidation:
    """Continue a cross-validation: with the fold that was training, then with those that have not begun.

    The arguments are those of `resume`; `epochs` holds for every fold, and is refused where one of them cannot have it.

    Returns:
        The finished cross-validation.

    Raises:
        ValueError: the folder holds none, or a damaged one; or as in `resume`.
    """
    finetune.check_call(execution, metrics, log)
    output = pathlib.Path(output)
    _refuse_several_processes()
    content = _read_plan(output)
    old, plan = DatasetConfig(**content["data"]), Plan.from_json_dict(content["plan"])
    source = old.moved_to(data)
    with exclusive_lock(output):
        records = {fold: _record(output, fold) for fold in content["folds"]}
        training = plan.training
        for record in [*filter(None, records.values())] or [Record()]:  # all of them before any is trained on
            training = finetune.with_epochs(plan.training, record, epochs)
        plan = dataclasses.replace(plan, training=training)
        changed = {**content, "data": dataclasses.asdict(source), "plan": plan.to_json_dict()}
        if changed != content:
            _write_plan(output, changed)
        init = load((output / INITIAL).absolute()) if (output / INITIAL).is_dir() else None
        rows: list[dict[str, Any]] = []
        for number, fold in enumerate(content["folds"], 1):
            folder, held_out = output / f"fold-{fold}", dataclasses.replace(source, fold=fold)
            log(f"fold {fold} ({number} of {len(content['folds'])})")
            if run_folder.can_resume(folder):
                finetune.resume(
                    folder, held_out, epochs=plan.training.epochs, execution=execution, metrics=metrics, log=log
                )
            else:
                finetune.start_run(held_out, folder, init, plan, execution, metrics, log)
            rows = _write_table(output, content["folds"])
    for line in table_lines(rows):
        log(line)
    return CrossValidation(output)


def _free(output: pathlib.Path) -> None:
    """Remove what a cross-validation leaves that ended before any fold had a state."""
    paths = {path.name: path for path in output.iterdir()}
    ours = {name for name in paths if name in (PLAN_FILE, INITIAL) or name.startswith("fold-")}
    begun = any(newest_state(path) for name, path in paths.items() if name.startswith("fold-"))
    complete = PLAN_FILE in paths or (set(paths) == {INITIAL} and is_own(output / INITIAL))
    if begun or not complete or ours != set(paths):
        return
    for path in paths.values():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_plan(output: pathlib.Path, content: dict[str, Any]) -> None:
    """Write what was asked for."""
    write_text(output / PLAN_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _refuse_several_processes() -> None:
    """Raise ValueError in one of several processes."""
    if jax.process_count() > 1:
        raise ValueError("cross-validation: expected one process, got several; run each fold by itself (--fold)")


def is_cross_validation(output: StrPath) -> bool:
    """Whether a folder holds a cross-validation."""
    return (pathlib.Path(output) / PLAN_FILE).is_file()


def data_of(output: StrPath) -> DatasetConfig:
    """Return the data of a cross-validation.

    Raises:
        ValueError: its description is damaged.
    """
    return DatasetConfig(**_read_plan(pathlib.Path(output))["data"])


def _read_plan(output: pathlib.Path) -> dict[str, Any]:
    """Read what was asked for."""
    path = output / PLAN_FILE
    if not path.exists():
        hint = (
            "; it is a single run: continue it with ast_jax.resume" if (output / run_folder.RUN_FILE).exists() else ""
        )
        raise ValueError(f"{output}: expected the folder of a cross-validation, found no {PLAN_FILE} in it{hint}")
    with damage_as_value_error(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        DatasetConfig(**content["data"]), Plan.from_json_dict(content["plan"])  # or it is damaged
        return {name: content[name] for name in ("folds", "data", "plan")}


def _record(output: pathlib.Path, fold: str) -> Record | None:
    """Return where a fold's run stands; None before its first state."""
    state = newest_state(output / f"fold-{fold}")
    return None if state is None else read_record(state)


def _write_table(output: pathlib.Path, folds: Sequence[str]) -> list[dict[str, Any]]:
    """Write the results of the finished folds, and return them."""
    records = {}
    for fold in folds:
        if (record := _record(output, fold)) is not None:
            with contextlib.suppress(ValueError):
                if is_over(record, run_folder.read_run(output / f"fold-{fold}").training):
                    records[fold] = record
    rows = table(records)
    if rows:
        write_text(output / "folds.csv", csv_text(rows))
        write_text(output / TABLE_JSON, run_folder.json_text(rows))
    return rows


def table(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Return a row for each fold, and their mean; see `CrossValidation.table`."""
    rows = []
    for fold, record in records.items():
        metric, best = record.metric, record.best_row
        rows.append({
            "fold": fold, "metric": metric, "last": record.history[-1][metric], "best": best[metric],
            "best_epoch": best["epoch"],
        })  # fmt: skip
    if rows:
        mean = {name: float(np.mean([row[name] for row in rows])) for name in ("last", "best")}
        rows.append({"fold": "mean", "metric": rows[0]["metric"], **mean, "best_epoch": ""})
    return rows


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table for the terminal."""
    title = f"{'fold':>6}  {'last epoch':>10}  {'best epoch':>10}  ({rows[0]['metric']})"
    return [
        title,
        *(
            f"{row['fold']:>6}  {row['last']:>10.4f}  {row['best']:>10.4f}"
            + (f"  (epoch {row['best_epoch']})" if row["best_epoch"] else "")
            for row in rows
        ),
    ]
