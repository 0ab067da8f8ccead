"""Fine-tuning from data set to checkpoint: `finetune` starts a run, `resume` continues one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.config import PRESETS, ASTConfig, FrontendConfig, ProblemType
from ast_jax.data import audit
from ast_jax.data.datasets import DataError, DataSet, DatasetConfig, read_dataset
from ast_jax.model import functional as model
from ast_jax.runtime.files import exclusive_lock, remove_scratch
from ast_jax.training import distill, run_folder
from ast_jax.training import step as train
from ast_jax.training.config import ExecutionConfig, TrainConfig
from ast_jax.training.extras import require_train_extra
from ast_jax.training.parallel import METHODS, broadcast_json, sync_errors
from ast_jax.training.recipes import Recipe, find_recipe, load_init
from ast_jax.training.run_folder import Run, RunConfig
from ast_jax.training.states import Record, newest_state, read_record
from ast_jax.training.trainer import Log, MetricsCallback, Trainer, is_over

logger = logging.getLogger(__name__)
CROSS_VALIDATION_FILE = "cross_validation.json"
HEADERS = 2000  # files whose headers are read before training
StrPath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to train, with every default resolved; all but the data and the initial checkpoint.

    Attributes:
        training: the hyperparameters.
        architecture: the model to initialise where there is no initial checkpoint.
        problem_type: None decides by the data.
        statistics: mean and standard deviation of the features; None takes the initial checkpoint's, or measures them.
        teacher: see `finetune`.
        keep_epochs: see `finetune`.
        recipe: its name, or None.
    """

    training: TrainConfig
    architecture: ASTConfig | None = None
    problem_type: ProblemType | None = None
    statistics: tuple[float, float] | None = None
    teacher: str | None = None
    keep_epochs: bool = False
    recipe: str | None = None

    def to_json_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            **dataclasses.asdict(self),
            "architecture": self.architecture.to_json_dict() if self.architecture else None,
        }

    @classmethod
    def from_json_dict(cls, content: dict[str, Any]) -> Plan:
        """Invert `to_json_dict`; any other content raises KeyError, TypeError or ValueError."""
        architecture, statistics, problem_type = (
            content[name] for name in ("architecture", "statistics", "problem_type")
        )
        return cls(**{
            **content,
            "training": TrainConfig(**content["training"]),
            "architecture": ASTConfig.from_json_dict(architecture) if architecture else None,
            "statistics": tuple(statistics) if statistics else None,
            "problem_type": ProblemType(problem_type) if problem_type else None,
        })  # fmt: skip


def make_plan(
    init: Checkpoint | None,
    recipe: Recipe | None,
    *,
    training: TrainConfig | None = None,
    architecture: ASTConfig | None = None,
    problem_type: ProblemType | str | None = None,
    statistics: tuple[float, float] | None = None,
    teacher: StrPath | None = None,
    keep_epochs: bool = False,
) -> Plan:
    """Resolve what was left open: by the recipe, else by the defaults.

    Raises:
        ValueError: an argument of another type, or both an initial checkpoint and an architecture.
    """
    checks = (("training", training, TrainConfig), ("architecture", architecture, ASTConfig))
    for name, value, kind in checks:
        if not isinstance(value, kind | None):
            raise ValueError(f"{name}: expected {kind.__name__}(...) or None, got {value!r}")
    if problem_type is not None and problem_type not in [*ProblemType]:
        raise ValueError(f"problem_type: expected one of {', '.join(ProblemType)}, or None, got {problem_type!r}")
    if statistics is not None and not _is_pair(statistics):
        raise ValueError(f"statistics: expected the pair (mean, standard deviation), got {statistics!r}")
    if init is not None and architecture is not None:
        raise ValueError("init and architecture: expected one of them, got both; a checkpoint has its own architecture")
    if recipe is not None:
        statistics = statistics or (recipe.frontend["mean"], recipe.frontend["std"])
    if init is None and architecture is None:
        preset = PRESETS["base" if recipe else "tiny"]
        architecture = preset(max_length=recipe.frontend["max_length"]) if recipe else preset()
    if teacher is not None and pathlib.Path(teacher).exists():
        teacher = pathlib.Path(teacher).absolute()
    return Plan(
        training=training or (recipe.training_for(init) if recipe else TrainConfig()),
        architecture=architecture,
        problem_type=ProblemType(problem_type) if problem_type else recipe.problem_type if recipe else None,
        statistics=statistics,
        teacher=None if teacher is None else os.fspath(teacher),
        keep_epochs=keep_epochs,
        recipe=recipe.name if recipe else None,
    )


def _is_pair(values: Any) -> bool:
    """Whether this is a pair of numbers."""
    numbers = isinstance(values, tuple | list) and len(values) == 2
    return numbers and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def check_call(execution: Any, metrics: Any, log: Any) -> None:
    """Check what `finetune`, `resume` and `cross_validate` have in common, before the work begins.

    Raises:
        ValueError: an argument of another type, or the extra `train` is not installed.
    """
    require_train_extra("training")
    if not isinstance(execution, ExecutionConfig):
        raise ValueError(f"execution: expected ExecutionConfig(...), got {execution!r}")
    for name, function in (("metrics", metrics), ("log", log)):
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected a function of one argument, got {function!r}")


def finetune(
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
) -> Run:
    """Train a model on a data set, from a checkpoint or from scratch, into a new run folder.

    States are saved while it trains, so that `resume` continues after a kill, Ctrl-C or SIGTERM as if nothing had
    happened.

    Args:
        data: where sounds and labels are; a path alone stands for `DatasetConfig(path)`.
        output: run folder, new or empty.
        init: checkpoint to start from, or its name, see `load`; its classifier is kept where it has the data's labels,
            else drawn anew. None trains from scratch.
        architecture: the model to initialise from scratch; None for `PRESETS["tiny"]`, with a recipe "base".
        training: hyperparameters; None for the recipe's, else the defaults.
        execution: devices and worker processes.
        recipe: the paper's settings by name, see `RECIPES`: hyperparameters, statistics, input length, problem type.
        problem_type: None for the recipe's, else multi-label where any example has several labels or none.
        statistics: mean and standard deviation of the log-mel features; None for the recipe's, else those of `init`,
            else they are measured on the training split.
        teacher: distillation: a model as `load` takes it, or an exported program (`.stablehlo`), whose scores are
            mixed into the labels.
        keep_epochs: keep every epoch's checkpoint, in `output/epochs`.
        metrics: called with each epoch's row of `Run.metrics` when the epoch is saved, for an experiment tracker of
            your own; in the first of several processes only. An exception in it ends the run; the epoch is saved.
        log: called with a line of progress at a time; by default the logger `ast_jax.training.finetune`.

    Returns:
        The finished run; `best` is the checkpoint of the best epoch on the validation split.

    Raises:
        DataError: the data set cannot be used. After an error before anything was learned the folder is free again.
        ValueError: a setting is out of range, the teacher does not fit, or `output` already holds a run or is used by
            another process.
        OSError: something cannot be read or written; the last saved state is complete.
        FloatingPointError: the loss is not finite; the message names the step and its files.
        Terminated: SIGTERM was received; the state is saved.
    """
    check_call(execution, metrics, log)
    chosen = find_recipe(recipe) if recipe is not None else None
    start = load_init(init, chosen)
    plan = make_plan(
        start, chosen, training=training, architecture=architecture, problem_type=problem_type, statistics=statistics,
        teacher=teacher, keep_epochs=keep_epochs,
    )  # fmt: skip
    if chosen and not jax.process_index():
        describe_plan(plan, chosen, start, init, log)
    return start_run(DatasetConfig.of(data), pathlib.Path(output), start, plan, execution, metrics, log)


def describe_plan(plan: Plan, recipe: Recipe, init: Checkpoint | None, name: Any, log: Log) -> None:
    """Log a recipe's settings, each with the recipe's own value where another is used."""
    config = init.config if init is not None else plan.architecture
    assert config is not None  # a plan has one of them
    assert plan.statistics is not None  # a recipe has some
    mean, std = plan.statistics
    origin = "scratch" if init is None else name if isinstance(name, str) else "a checkpoint"
    own = vars(recipe.settings())
    overrides = {name: value for name, value in vars(plan.training).items() if value != own[name]}
    for line in recipe.lines(overrides, {"mean": mean, "std": std, "max_length": config.max_length}, origin):
        log(line)


def start_run(
    data: DatasetConfig,
    output: pathlib.Path,
    init: Checkpoint | None,
    plan: Plan,
    execution: ExecutionConfig,
    metrics: MetricsCallback | None,
    log: Log,
) -> Run:
    """Train a new run; see `finetune`."""
    is_first = not jax.process_index()
    log = log if is_first else lambda _: None
    sync_errors(lambda: _refuse_occupied(output), first_only=True)
    config, dataset, params = sync_errors(lambda: _prepare(data, init, plan, execution, log))
    config = RunConfig.from_json(broadcast_json(config.to_json()))
    if not is_first:
        Trainer(config, dataset, params, output, execution, log=log).run()
        return Run(output)
    output.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(output):
        _refuse_what_is_there(output)  # again: another process may have been here while the data were read
        try:
            Trainer(config, dataset, params, output, execution, metrics=metrics, log=log).run()
        except Exception as error:
            state = newest_state(output)
            full = isinstance(error, OSError)  # a disk: then even the initial state is worth keeping
            if state is None or (state.name == "0" and not full):  # else the folder stays free
                run_folder.remove_states(output)
            raise
    return Run(output)


def _prepare(
    data: DatasetConfig, init: Checkpoint | None, plan: Plan, execution: ExecutionConfig, log: Log
) -> tuple[RunConfig, DataSet, Any]:
    """Read the data, and return the run's configuration, examples and initial parameters."""
    training = plan.training
    dataset = read_dataset(data, training.seed)
    keeps_head = False
    if init is not None and "classifier" in init.params:
        keeps_head = set(init.config.labels) == set(dataset.labels)
        dataset = dataset.reordered(init.config.labels) if keeps_head else dataset
    kind = plan.problem_type or (ProblemType.MULTI_LABEL if dataset.multi_label else ProblemType.SINGLE_LABEL)
    if kind == ProblemType.SINGLE_LABEL and dataset.multi_label:
        raise DataError(f"{data.source}: some examples have several labels or none, which {kind} cannot learn")
    parallel = METHODS[execution.parallel]()
    parallel.check_batch_size(training.batch_size, training.grad_accum_steps)
    if len(dataset.splits["train"]) < training.batch_size:
        raise DataError(
            f"{data.source}: {len(dataset.splits['train'])} training examples are less than one batch of "
            f"{training.batch_size}; choose a smaller --batch-size"
        )
    architecture = init.config if init is not None else plan.architecture
    assert architecture is not None  # a plan has one of them
    config = architecture.replace(num_labels=len(dataset.labels), id2label=dataset.labels, problem_type=kind)
    train.check_fit(training, config)
    frontend = _frontend(dataset, config, plan, init, log)
    if dataset.ignored:
        log(
            f"ignored: {len(dataset.ignored)} files that are no sound files of a class, the first is "
            f"{dataset.ignored[0]}"
        )
    for note in dataset.notes:
        log(note)
    params = model.init(jax.random.key(training.seed), config)
    if init is not None:
        params = {**init.params} if keeps_head else {**init.params, "classifier": params["classifier"]}
    metadata: dict[str, Any] = {
        "trained_from": init.origin if init is not None else "scratch",
        "data": pathlib.Path(data.source).name,
        **({"recipe": plan.recipe} if plan.recipe else {}),
    }
    if plan.teacher is not None:
        per_device = training.batch_size // len(parallel.devices)
        distill.load_teacher(plan.teacher, config, frontend, per_device)  # before anything is written
        metadata |= {"teacher": pathlib.Path(plan.teacher).name, "teacher_weight": training.teacher_weight}
    run = RunConfig(data.absolute(), config, frontend, training, metadata, plan.teacher, plan.keep_epochs)
    return run, dataset, params


def _frontend(dataset: DataSet, config: ASTConfig, plan: Plan, init: Checkpoint | None, log: Log) -> FrontendConfig:
    """Return the features' settings: as planned, the initial checkpoint's, or measured; check headers on the way."""
    kept = init.frontend if init is not None and not init.provenance.statistics_assumed else None
    frontend = kept or FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins)
    used = dataset.splits["train"] + dataset.splits["validation"]
    headers = audit.check_headers(used, frontend, limit=None if plan.training.strict else HEADERS)
    if headers.bad:
        _, reason = headers.bad[0]
        if plan.training.strict:
            raise DataError(f"{len(headers.bad)} of {headers.checked} files cannot be used, the first is {reason}")
        log(f"{len(headers.bad)} of {headers.checked} files cannot be used and will be skipped, the first is {reason}")
    if headers.longer:
        log(f"{headers.longer} of {headers.checked} sounds are longer than the model's input: their first "
            f"{frontend.max_seconds:.2f} s are used")  # fmt: skip
    if plan.statistics is not None:
        mean, std = plan.statistics
        frontend = frontend.replace(mean=mean, std=std)
    elif kept is None:
        found = audit.statistics(dataset.splits["train"], frontend, limit=1000)
        frontend = frontend.replace(mean=round(found.mean, 4), std=round(found.std, 4))
        log(f"features of the training split: mean {frontend.mean}, standard deviation {frontend.std}")
    for note in init.provenance.notes if init is not None else ():
        log(f"the initial checkpoint: {note}")
    return frontend


def _refuse_occupied(output: pathlib.Path) -> None:
    """Raise ValueError where a folder is used by another process, holds a run, or other things."""
    if output.exists():
        with exclusive_lock(output):
            _refuse_what_is_there(output)


def _refuse_what_is_there(output: pathlib.Path) -> None:
    """Raise ValueError where a folder holds a run or other things; remove what a killed start left.

    To be called in sole use of the folder.
    """
    if run_folder.can_resume(output):
        raise ValueError(f"{output}: already holds a run; resume it (ast-jax resume) or choose another folder")
    remove_scratch(output, run_folder.OURS)
    if {path.name for path in output.iterdir()} <= {run_folder.RUN_FILE, run_folder.STATES, run_folder.TENSORBOARD}:
        with contextlib.suppress(ValueError):  # a file that is no run's is somebody's own
            run_folder.read_run(output)
            run_folder.remove_states(output)
    if any(output.iterdir()):
        raise ValueError(f"{output}: expected a new or empty folder, got one with other things in it")


def resume(
    output: StrPath,
    data: DatasetConfig | StrPath | None = None,
    *,
    epochs: int | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    metrics: MetricsCallback | None = None,
    log: Log = logger.info,
) -> Run:
    """Continue a run from its last saved state, with the settings it was started with.

    Args:
        output: run folder.
        data: where the data are now, if they were moved; a path alone is their `source`. The run folder keeps it.
        epochs: train for so many epochs in all, also past the end of a finished run; None for as many as it was started
            with. The result is that of a run started with so many, which a cosine schedule rules out.
        execution: devices and worker processes, which may differ from before.
        metrics: as in `finetune`.
        log: as in `finetune`; by default the logger `ast_jax.training.finetune`.

    Returns:
        The finished run.

    Raises:
        DataError: the data set is no longer the one that the run was started with.
        OSError, FloatingPointError, Terminated: as in `finetune`.
        ValueError: `output` holds no run, or a damaged one, or is used by another process; `data` names a source that
            the run was not started with; or its schedule cannot have so many epochs.
    """
    check_call(execution, metrics, log)
    output, is_first = pathlib.Path(output), not jax.process_index()
    log = log if is_first else lambda _: None
    sync_errors(lambda: _check_resumable(output), first_only=True)
    config = RunConfig.from_json(broadcast_json(run_folder.read_run(output).to_json() if is_first else None))
    with exclusive_lock(output) if is_first else contextlib.nullcontext():
        state = newest_state(output) if is_first else None
        record = Record(**broadcast_json(dataclasses.asdict(read_record(state)) if state else None))
        training = with_epochs(config.training, record, epochs)
        config = dataclasses.replace(config, data=config.data.moved_to(data), training=training)
        dataset = sync_errors(lambda: _read_again(config))
        params = model.init(jax.random.key(training.seed), config.config)
        if is_first:
            remove_scratch(output, run_folder.OURS)
            if (output / run_folder.EPOCHS).is_dir():
                remove_scratch(output / run_folder.EPOCHS, run_folder.OURS)
        finished = "; the run is finished; more epochs continue it" if is_over(record, training) else ""
        log(f"resuming after epoch {len(record.history)} of {training.epochs}, step {record.step}{finished}")
        Trainer(
            config, dataset, params, output, execution, saved=(record, state), metrics=metrics, log=log
        ).run()  # fmt: skip
    return Run(output)


def with_epochs(training: TrainConfig, record: Record, epochs: int | None) -> TrainConfig:
    """Return a run's hyperparameters with another number of epochs.

    Raises:
        ValueError: the epochs so far followed a schedule that another number would have changed, early stopping has
            ended the run, or more epochs are trained already.
    """
    if epochs is None or epochs == training.epochs:
        return training
    if not isinstance(epochs, int) or isinstance(epochs, bool):
        raise ValueError(f"epochs: expected an integer, got {epochs!r}")
    done = len(record.history)
    if training.schedule == "cosine":
        ended = done >= training.epochs
        why = "has ended: its learning rate is zero" if ended else "spans the epochs it was started with"
        raise ValueError(
            f"epochs: expected {training.epochs}, as the run was started with, got {epochs}; its cosine schedule "
            f"{why}; start a new run from its best checkpoint"
        )
    if epochs < done:
        raise ValueError(f"epochs: expected {done} or more, which are trained already, got {epochs}")
    if is_over(record, training) and done < training.epochs:
        raise ValueError(
            f"epochs: early stopping (patience {training.patience}) has ended the run after epoch {done}; "
            "start a new run from its best checkpoint"
        )
    return training.replace(epochs=epochs)


def data_of(output: pathlib.Path) -> DatasetConfig:
    """Return the data of a run, read by the first of several processes.

    Raises:
        ValueError: the folder holds no run, or its `run.json` is damaged.
    """
    data = sync_errors(lambda: run_folder.read_run(output).data, first_only=True)
    return DatasetConfig(**broadcast_json(dataclasses.asdict(data) if data else None))


def _check_resumable(output: pathlib.Path) -> None:
    """Raise ValueError where a folder holds no run that can be resumed."""
    if (output / CROSS_VALIDATION_FILE).exists():
        raise ValueError(f"{output}: holds a cross-validation; continue it with ast_jax.resume_cross_validation")
    run_folder.read_run(output)
    state = newest_state(output)
    if state is None:
        raise ValueError(f"{output}: stopped before anything was saved; start it again in a new folder")
    read_record(state)


def _read_again(config: RunConfig) -> DataSet:
    """Read the data set that a run was started with.

    Raises:
        DataError: it has other labels now.
    """
    dataset = read_dataset(config.data, config.training.seed)
    if set(dataset.labels) != set(config.config.labels):
        raise DataError(f"{config.data.source}: its labels are no longer those that the run was started with")
    return dataset.reordered(config.config.labels)
