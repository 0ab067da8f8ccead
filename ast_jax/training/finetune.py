"""Fine-tuning from data set to checkpoint: a new run, and one that goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.config import ASTConfig, FrontendConfig, ProblemType
from ast_jax.data import audit, datasets
from ast_jax.data.datasets import DataError, DataSet
from ast_jax.model import functional as model
from ast_jax.runtime.files import remove_scratch, sole_use
from ast_jax.training import distill, run_folder
from ast_jax.training import step as train
from ast_jax.training.config import TrainConfig
from ast_jax.training.parallel import METHODS, broadcast_json, sync_errors
from ast_jax.training.run_folder import Record, Run
from ast_jax.training.trainer import Loop, Machine, Say, is_over

logger = logging.getLogger(__name__)
HEADERS = 2000  # files whose headers are read before training
PATHS = ("source", "validation", "test", "label_file")  # arguments of `read_dataset` that are paths


def start(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    training: TrainConfig,
    *,
    initial: Checkpoint | None = None,
    architecture: ASTConfig | None = None,
    problem_type: str | None = None,
    statistics: tuple[float, float] | None = None,
    teacher: str | pathlib.Path | None = None,
    keep_epochs: bool = False,
    reading: dict[str, Any] | None = None,
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    notes: dict[str, Any] | None = None,
    say: Say = logger.info,
) -> Checkpoint | None:
    """Train a model on a data set, from `initial` or from scratch, into a new run folder.

    Args:
        source: data set, see `datasets.read_dataset`.
        output: run folder, new or empty.
        training: the settings.
        initial: a checkpoint to start from; its classifier is kept where it has the data set's labels, else drawn anew.
        architecture: the model to draw where there is no `initial`.
        problem_type: None chooses multi-label where any example has several labels or none.
        statistics: mean and standard deviation of the features; None takes those of `initial`, else measures them.
        teacher: a model or an exported program whose scores soften the labels, see `distill.load_teacher`.
        keep_epochs: whether to keep every epoch's checkpoint.
        reading: further arguments of `datasets.read_dataset`: validation, test, label_file, fold.
        machine: devices and workers.
        notes: kept in the metadata.
        say: where progress is told; by default to the logger `ast_jax.training.finetune`.

    Returns:
        The best epoch's checkpoint, which also lies in `output/best`; None in all of several processes but the first.

    Raises:
        DataError: the data set cannot be used. An error before anything was learned leaves the folder free again.
        ValueError: a setting is out of range, the teacher does not fit, or `output` already holds a run or is another
            process's.
        OSError: something cannot be read or written; the last saved state is whole.
        FloatingPointError: the loss is not finite; the message names the step and its files.
        Terminated: SIGTERM came; the state is saved.
    """
    output, first = pathlib.Path(output), not jax.process_index()
    say = say if first else lambda _: None
    sync_errors(lambda: _refuse_occupied(output), first_only=True)
    run, dataset, params = sync_errors(
        lambda: _prepare(
            source, training, initial=initial, architecture=architecture, problem_type=problem_type,
            statistics=statistics, teacher=teacher, keep_epochs=keep_epochs, reading=reading or {}, machine=machine,
            notes=notes or {}, say=say,
        )
    )  # fmt: skip
    run = Run.from_json(broadcast_json(run.to_json()))
    if not first:
        return Loop(run, dataset, params, output, None, machine, say).train()
    output.mkdir(parents=True, exist_ok=True)
    with sole_use(output):
        _refuse_what_is_there(output)  # again: another process may have been here while the data were read
        try:
            return Loop(run, dataset, params, output, None, machine, say).train()
        except Exception as error:
            state = run_folder.newest_state(output)
            full = isinstance(error, OSError)  # a disk: there is something to go on with, even if it is the start
            if state is None or (state.name == "0" and not full):  # else the folder stays free
                run_folder.remove_states(output)
            raise


def _prepare(
    source: str | pathlib.Path,
    training: TrainConfig,
    *,
    initial: Checkpoint | None,
    architecture: ASTConfig | None,
    problem_type: str | None,
    statistics: tuple[float, float] | None,
    teacher: str | pathlib.Path | None,
    keep_epochs: bool,
    reading: dict[str, Any],
    machine: Machine,
    notes: dict[str, Any],
    say: Say,
) -> tuple[Run, DataSet, Any]:
    """Read the data and settle everything a run needs: its description, its examples, its first parameters."""
    dataset = datasets.read_dataset(datasets.DatasetConfig(source, **reading), training.seed)
    keeps_head = False
    if initial is not None and "classifier" in initial.params:
        keeps_head = set(initial.config.labels) == set(dataset.labels)
        dataset = dataset.reordered(initial.config.labels) if keeps_head else dataset
    kind = problem_type or (ProblemType.MULTI_LABEL if dataset.multi_label else ProblemType.SINGLE_LABEL)
    if kind == ProblemType.SINGLE_LABEL and dataset.multi_label:
        raise DataError(f"{source}: some examples have several labels or none, which {kind} cannot learn")
    parallel = METHODS[machine.parallel]()
    parallel.check_batch_size(training.batch_size, training.grad_accum_steps)
    if len(dataset.splits["train"]) < training.batch_size:
        raise DataError(
            f"{source}: {len(dataset.splits['train'])} training examples are less than one batch of "
            f"{training.batch_size}; choose a smaller --batch-size"
        )
    config = (initial.config if initial else architecture or ASTConfig()).replace(
        num_labels=len(dataset.labels), id2label=dataset.labels, problem_type=kind
    )
    train.check_fit(training, config)
    frontend = _frontend(dataset, config, training, initial, statistics, say)
    for note in (*dataset.notes, *_passed_over(dataset)):
        say(note)
    params = model.init(jax.random.key(training.seed), config)
    if initial:
        params = {**initial.params} if keeps_head else {**initial.params, "classifier": params["classifier"]}
    metadata = {"trained_from": initial.origin if initial else "scratch", "data": pathlib.Path(source).name, **notes}
    if teacher is not None:
        teacher = str(pathlib.Path(teacher).absolute() if pathlib.Path(teacher).exists() else teacher)
        per_device = training.batch_size // len(parallel.devices)
        distill.load_teacher(teacher, config, frontend, per_device)  # before anything is written
        metadata |= {"teacher": pathlib.Path(teacher).name, "teacher_weight": training.teacher_weight}
    where = {"source": source, **reading}
    where = {name: absolute(value) if name in PATHS else value for name, value in where.items()}
    run = Run(where, config, frontend, training, metadata, teacher, keep_epochs)
    return run, dataset, params


def absolute(path: Any) -> str | None:
    """Return a path as `run.json` keeps it."""
    return None if path is None else str(pathlib.Path(path).absolute())


def _passed_over(dataset: DataSet) -> Iterator[str]:
    """Yield what there is to say of files that are not used."""
    if dataset.passed_over:
        yield (
            f"passed over: {len(dataset.passed_over)} files that are no sound files of a class, the first is "
            f"{dataset.passed_over[0]}"
        )


def _frontend(
    dataset: DataSet,
    config: ASTConfig,
    training: TrainConfig,
    initial: Checkpoint | None,
    statistics: tuple[float, float] | None,
    say: Say,
) -> FrontendConfig:
    """Return the features' settings: given, the initial model's, or measured; say what the headers tell."""
    kept = initial.frontend if initial is not None and not initial.provenance.statistics_assumed else None
    known = statistics is not None or kept is not None
    frontend = kept or FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins)
    used = dataset.splits["train"] + dataset.splits["validation"]
    headers = audit.check_headers(used, frontend, limit=None if training.strict else HEADERS)
    if headers.bad:
        _, reason = headers.bad[0]
        if training.strict:
            raise DataError(f"{len(headers.bad)} of {headers.checked} files cannot be used, the first is {reason}")
        say(f"{len(headers.bad)} of {headers.checked} files cannot be used and will be skipped, the first is {reason}")
    if headers.longer:
        say(f"{headers.longer} of {headers.checked} sounds are longer than the model's input: their first "
            f"{frontend.max_seconds:.2f} s are used")  # fmt: skip
    if statistics is not None:
        frontend = frontend.replace(mean=statistics[0], std=statistics[1])
    elif not known:
        found = audit.statistics(dataset.splits["train"], frontend, limit=1000)
        frontend = frontend.replace(mean=round(found.mean, 4), std=round(found.std, 4))
        say(f"features of the training split: mean {frontend.mean}, standard deviation {frontend.std}")
    for note in initial.provenance.notes if initial else ():
        say(f"the model to start from: {note}")
    return frontend


def _refuse_occupied(output: pathlib.Path) -> None:
    """Raise ValueError where a folder is another process's, holds a run, or other things."""
    if output.exists():
        with sole_use(output):
            _refuse_what_is_there(output)


def _refuse_what_is_there(output: pathlib.Path) -> None:
    """Raise ValueError where a folder holds a run or other things; what a start leaves that was killed goes.

    To be called in sole use of the folder.
    """
    if run_folder.can_resume(output):
        raise ValueError(f"{output}: already holds a run; go on with it (--resume) or choose another folder")
    remove_scratch(output, run_folder.OURS)
    if {path.name for path in output.iterdir()} <= {run_folder.RUN_FILE, run_folder.STATES, run_folder.TENSORBOARD}:
        with contextlib.suppress(ValueError):  # one that is no run's is somebody's own file
            run_folder.read_run(output)
            run_folder.remove_states(output)
    if any(output.iterdir()):
        raise ValueError(f"{output}: expected a new or empty folder, got one with other things in it")


def moved(where: dict[str, Any], source: str | pathlib.Path | None, reading: dict[str, Any] | None) -> dict[str, Any]:
    """Return where the data of a run lie that goes on: what it was started with, at the paths that are given.

    Raises:
        ValueError: a path is given of something that the run was not started with.
    """
    now = {**(reading or {}), **({} if source is None else {"source": source})}
    for name in now:
        if name not in PATHS or where.get(name) is None:
            raise ValueError(f"{name}: expected where something lies that the run was started with, got another")
    return {**where, **{name: absolute(path) for name, path in now.items()}}


def _read_again(run: Run) -> DataSet:
    """Read the data set that a run was started with.

    Raises:
        DataError: it has other labels now.
    """
    where = dict(run.data)
    dataset = datasets.read_dataset(datasets.DatasetConfig(**where), run.training.seed)
    if set(dataset.labels) != set(run.config.labels):
        raise DataError(f"{run.data['source']}: its labels are no longer those that the run was started with")
    return dataset.reordered(run.config.labels)


def _check_resumable(output: pathlib.Path) -> None:
    """Raise ValueError where a folder holds no run that can go on."""
    run_folder.read_run(output)
    state = run_folder.newest_state(output)
    if state is None:
        raise ValueError(f"{output}: stopped before anything was saved; start it again in a new folder")
    run_folder.read_record(state)


def resume(
    output: str | pathlib.Path,
    source: str | pathlib.Path | None = None,
    *,
    reading: dict[str, Any] | None = None,
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    say: Say = logger.info,
) -> Checkpoint | None:
    """Go on with a run from its last saved state, with the settings it was started with.

    Args:
        output: run folder.
        source: where the data set lies now, if it was moved; the run folder keeps it.
        reading: likewise for validation, test and label_file, as far as the run was started with them.
        machine: devices and workers, which may be others than before.
        say: where progress is told; by default to the logger `ast_jax.training.finetune`.

    Returns:
        The best epoch's checkpoint; None in all of several processes but the first.

    Raises:
        DataError: the data set is no longer the one that the run was started with.
        ValueError: `output` holds no run, or a damaged one, or another process is training into it; or `reading` names
            what the run was not started with.
    """
    output, first = pathlib.Path(output), not jax.process_index()
    say = say if first else lambda _: None
    sync_errors(lambda: _check_resumable(output), first_only=True)
    run = Run.from_json(broadcast_json(run_folder.read_run(output).to_json() if first else None))
    with sole_use(output) if first else contextlib.nullcontext():
        state = run_folder.newest_state(output) if first else None
        record = Record(**broadcast_json(dataclasses.asdict(run_folder.read_record(state)) if state else None))
        run = dataclasses.replace(run, data=moved(run.data, source, reading))
        dataset = sync_errors(lambda: _read_again(run))
        params = model.init(jax.random.key(run.training.seed), run.config)
        if first:
            remove_scratch(output, run_folder.OURS)
            if (output / run_folder.EPOCHS).is_dir():
                remove_scratch(output / run_folder.EPOCHS, run_folder.OURS)
        done = len(record.history)
        whole = "; that is all of them, and `--init` starts a new run from its checkpoint"
        say(
            f"going on after epoch {done} of {run.training.epochs}, step {record.step}"
            f"{whole if is_over(record.history, run.training) else ''}"
        )
        return Loop(run, dataset, params, output, (record, state), machine, say).train()
