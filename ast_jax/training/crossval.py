"""Cross-validation: a run for each fold of a data set, in one folder, and the table of what they gave.

RUN/
  cross_validation.json     what was asked for
  initial/                  the checkpoint that every fold starts from, where there is one
  fold-N/                   the run in which fold N is the validation split, see `runs`
  folds.csv, folds.json     the results of the folds that are done, and their mean
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.checkpoints.load import load
from ast_jax.checkpoints.locate import is_own
from ast_jax.config import ASTConfig
from ast_jax.data import datasets
from ast_jax.data.datasets import DataError
from ast_jax.runtime.files import sole_use, write_text
from ast_jax.training import finetune, run_folder
from ast_jax.training.config import TrainConfig
from ast_jax.training.finetune import PATHS, absolute, moved
from ast_jax.training.trainer import Machine, is_over

logger = logging.getLogger(__name__)
ASKED_FILE = "cross_validation.json"
INITIAL = "initial"

Say = Callable[[str], None]


def start(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    training: TrainConfig,
    *,
    initial: Checkpoint | None = None,
    architecture: ASTConfig | None = None,
    reading: dict[str, Any] | None = None,
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    say: Say = logger.info,
    **others: Any,
) -> list[dict[str, Any]]:
    """Train on all folds but one, for each one in turn.

    Args:
        source: a data set with folds, see `datasets.read_dataset`.
        output: folder, new or empty.
        training: the settings of every fold.
        initial: as in `finetune.start`.
        architecture: likewise.
        reading: likewise.
        machine: likewise.
        say: where progress is told; by default to the logger `ast_jax.training.crossval`.
        **others: further arguments of `finetune.start` that JSON can hold: problem_type, statistics, teacher,
            keep_epochs, notes.

    Returns:
        A row for each fold, see `table`.

    Raises:
        DataError: the data set has no folds.
        ValueError: as `finetune.start`.
    """
    output = pathlib.Path(output)
    _refuse_several_processes()
    folds = datasets.read_dataset(datasets.DatasetConfig(source, **(reading or {})), training.seed).folds
    if not folds:
        raise DataError(
            f"{source}: expected a data set with folds (ESC-50, or a column fold), found none; "
            "--no-cross-validate makes one run"
        )
    output.mkdir(parents=True, exist_ok=True)
    _free(output)
    if any(output.iterdir()):
        raise ValueError(
            f"{output}: expected a new or empty folder; go on with what is in it (--resume) or choose another"
        )
    if initial is not None:
        save(output / INITIAL, initial)
    reading = {name: absolute(value) if name in PATHS else value for name, value in (reading or {}).items()}
    if others.get("teacher") and pathlib.Path(others["teacher"]).exists():
        others["teacher"] = absolute(others["teacher"])
    asked = {
        "folds": folds, "source": absolute(source), "training": dataclasses.asdict(training),
        "architecture": architecture.to_json_dict() if architecture else None, "reading": reading, "others": others,
    }  # fmt: skip
    _write_asked(output, asked)
    try:
        return resume(output, machine=machine, say=say)
    except Exception:
        _free(output)
        raise


def _free(output: pathlib.Path) -> None:
    """Remove what a cross-validation leaves that ended before any fold had a state."""
    paths = {path.name: path for path in output.iterdir()}
    ours = {name for name in paths if name in (ASKED_FILE, INITIAL) or name.startswith("fold-")}
    begun = any(run_folder.newest_state(path) for name, path in paths.items() if name.startswith("fold-"))
    whole = ASKED_FILE in paths or (set(paths) == {INITIAL} and is_own(output / INITIAL))
    if begun or not whole or ours != set(paths):
        return
    for path in paths.values():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_asked(output: pathlib.Path, asked: dict[str, Any]) -> None:
    """Write what was asked for."""
    write_text(output / ASKED_FILE, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")


def _refuse_several_processes() -> None:
    """Raise ValueError in one of several processes."""
    if jax.process_count() > 1:
        raise ValueError("cross-validation: expected one process, got several; run each fold by itself (--fold)")


def is_cross_validation(output: str | pathlib.Path) -> bool:
    """Whether a folder holds a cross-validation."""
    return (pathlib.Path(output) / ASKED_FILE).is_file()


def read_run(output: str | pathlib.Path) -> run_folder.Run | None:
    """Return a description of what a cross-validation was started with: its first fold's; None before that began.

    Raises:
        ValueError: its description, or that run's, is damaged.
    """
    output = pathlib.Path(output)
    folder = output / f"fold-{_asked(output)['folds'][0]}"
    return run_folder.read_run(folder) if run_folder.can_resume(folder) else None


def _asked(output: pathlib.Path) -> dict[str, Any]:
    """Read what was asked for."""
    path = output / ASKED_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("folds", "source", "training", "architecture", "reading", "others")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the file as finetune wrote it ({error}); start again") from error


def resume(
    output: str | pathlib.Path,
    source: str | pathlib.Path | None = None,
    *,
    reading: dict[str, Any] | None = None,
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    say: Say = logger.info,
) -> list[dict[str, Any]]:
    """Go on with a cross-validation: with the fold that is under way, then with those that are not begun.

    Args:
        output: its folder.
        source: where the data set lies now, if it was moved.
        reading: as in `finetune.resume`.
        machine: as in `finetune.start`.
        say: where progress is told; by default to the logger `ast_jax.training.crossval`.

    Returns:
        A row for each fold, see `table`.

    Raises:
        ValueError: the folder holds none, or a damaged one; or as `finetune.resume`.
    """
    output = pathlib.Path(output)
    _refuse_several_processes()
    asked = _asked(output)
    where = {"source": asked["source"], **asked["reading"]}
    now = moved(where, source, reading)
    source, paths = now.pop("source"), {name: path for name, path in now.items() if name in PATHS}
    if {"source": source, **now} != where:
        asked |= {"source": source, "reading": now}
        _write_asked(output, asked)
    initial = load((output / INITIAL).absolute()) if (output / INITIAL).is_dir() else None
    architecture = ASTConfig.from_json_dict(asked["architecture"]) if asked["architecture"] else None
    with sole_use(output):
        for number, fold in enumerate(asked["folds"], 1):
            folder = output / f"fold-{fold}"
            say(f"fold {fold} ({number} of {len(asked['folds'])})")
            if run_folder.can_resume(folder):
                finetune.resume(folder, source, reading=paths, machine=machine, say=say)
            else:
                finetune.start(
                    source, folder, TrainConfig(**asked["training"]), initial=initial, architecture=architecture,
                    reading={**asked["reading"], "fold": fold}, machine=machine, say=say, **asked["others"],
                )  # fmt: skip
            rows = _write_table(output, asked["folds"])
    for line in lines(rows):
        say(line)
    return rows


def _write_table(output: pathlib.Path, folds: Sequence[str]) -> list[dict[str, Any]]:
    """Write the results there are, and return them."""
    histories = {}
    for fold in folds:
        state = run_folder.newest_state(output / f"fold-{fold}")
        if state is not None:
            record = run_folder.read_record(state)
            with contextlib.suppress(ValueError):
                if is_over(record.history, run_folder.read_run(output / f"fold-{fold}").training):
                    histories[fold] = record.history
    rows = table(histories)
    if rows:
        write_text(output / "folds.csv", run_folder.csv_text(rows))
        write_text(output / "folds.json", run_folder.json_text(rows))
    return rows


def table(histories: dict[str, run_folder.History]) -> list[dict[str, Any]]:
    """Return a row for each fold, and their mean: the metric of the last and of the best epoch, and which that was.

    Which epoch is best is chosen on the fold that is measured: the last epoch's is the honest figure, and the one
    that compares.
    """
    rows = []
    for fold, history in histories.items():
        metric, best = run_folder.metric_of(history) or "train_loss", run_folder.best_row(history)
        rows.append({
            "fold": fold, "metric": metric, "last": history[-1][metric], "best": best[metric],
            "best_epoch": best["epoch"],
        })  # fmt: skip
    if rows:
        mean = {name: float(np.mean([row[name] for row in rows])) for name in ("last", "best")}
        rows.append({"fold": "mean", "metric": rows[0]["metric"], **mean, "best_epoch": ""})
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
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
