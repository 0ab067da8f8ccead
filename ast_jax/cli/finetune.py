"""The command that trains: finetune."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import logging
import pathlib
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ast_jax.cli.common import (
    EXIT_INTERRUPTED,
    SIZE,
    FrequencyStride,
    GroupedCommand,
    MaxLength,
    NumMelBins,
    TimeStride,
    app,
    complain,
    say,
    user_errors,
    wrong_usage,
)  # fmt: skip
from ast_jax.config import ProblemType
from ast_jax.runtime.progress import step
from ast_jax.training.config import TrainConfig

SAVE_MINUTES = 10.0
READING = ("validation", "test", "label_file", "fold")
MOVABLE = READING[:3]
SPELLED = {"validation": "--validation-data", "test": "--test-data", "label_file": "--labels"}
DATA_HELP = (
    "A folder per class; a manifest (CSV, TSV, JSONL: path, label, and split, start, end); the original's JSON; "
    "ESC-50 or Speech Commands as downloaded; a folder that Hugging Face's datasets saved."
)
PANELS = {
    "Learning rate": (
        "optimizer", "learning_rate", "schedule", "warmup_steps", "warmup_hold", "decay_start", "decay_step",
        "decay_factor", "layer_decay", "head_multiplier", "freeze_layers", "linear_probe", "weight_decay",
        "max_grad_norm", "beta1", "beta2",
    ),
    "Augmentation": (
        "balanced_sampling", "mixup", "frequency_mask", "time_mask", "frequency_shift", "time_shift", "noise",
        "ramp_epochs", "patchout_frequency", "patchout_time", "patchout", "label_smoothing", "teacher_weight",
    ),
}  # fmt: skip


class Classification(enum.StrEnum):
    """The problem types of labelled data."""

    SINGLE_LABEL = ProblemType.SINGLE_LABEL
    MULTI_LABEL = ProblemType.MULTI_LABEL


class Parallel(enum.StrEnum):
    """How a step is spread over devices."""

    pmap = "pmap"
    jit = "jit"


ValidationData = Annotated[
    pathlib.Path | None, typer.Option("--validation-data", help="Another data set for validation, of any layout.")
]
TestData = Annotated[pathlib.Path | None, typer.Option("--test-data", help="Another data set for the test split.")]
LabelFile = Annotated[
    pathlib.Path | None,
    typer.Option("--labels", help="File that fixes names and order of labels; for the original's JSON its label CSV."),
]
Fold = Annotated[str | None, typer.Option("--fold", help="The fold to validate on, where the data have folds.")]
Workers = Annotated[
    int | None, typer.Option(min=0, show_default="half of the cores", help="Processes that decode; 0: threads.")
]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every training setting; those that were given reach it as `settings`."""
    hints = typing.get_type_hints(TrainConfig)
    fields = dataclasses.fields(TrainConfig)
    own = inspect.signature(command, eval_str=True).parameters.values()
    options = []
    for field in fields:
        names = [f"--{field.name.replace('_', '-')}", *(["--lr"] if field.name == "learning_rate" else [])]
        if hints[field.name] is bool:
            names = [f"{names[0]}/--no-{names[0][2:]}"]
        panel = next((title for title, members in PANELS.items() if field.name in members), "Training")
        default = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        text = f"{field.metadata['help'][0].upper()}{field.metadata['help'][1:]}. [default: {default}]"
        option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
        kind = hints[field.name] | None
        annotation = Annotated[kind, option]  # type: ignore[valid-type]  # a type that is made at run time
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        settings = {field.name: given.pop(field.name) for field in fields}
        command(settings={name: value for name, value in settings.items() if value is not None}, **given)

    del wrapped.__wrapped__  # typer would look through it
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own if parameter.name != "settings"
    ]
    wrapped.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]  # for typer
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *options]}
    return wrapped


@app.command(cls=GroupedCommand)
@_with_settings
def finetune(
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The run's folder.")],
    data: Annotated[
        pathlib.Path | None,
        typer.Argument(
            metavar="DATA", show_default=False, help=f"{DATA_HELP} With --resume: where it lies now, if it was moved."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The paper's settings: audioset-full, audioset-balanced, esc50 or speechcommands; any other option "
            "overrides its own."
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="Model to start from (as --model of classify); default: from scratch.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option("--architecture", help="From scratch: tiny (default), small, base, or a config.json."),
    ] = None,
    max_length: MaxLength = None,
    num_mel_bins: NumMelBins = None,
    frequency_stride: FrequencyStride = None,
    time_stride: TimeStride = None,
    mean: Annotated[
        float | None, typer.Option(help="Mean of the features; default: the recipe's, the model's, or measured.")
    ] = None,
    std: Annotated[float | None, typer.Option(help="Their standard deviation.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output from its last saved state.")
    ] = False,
    problem_type: Annotated[
        Classification | None,
        typer.Option("--problem-type", help="Default: multi-label if any file has several labels."),
    ] = None,
    validation: ValidationData = None,
    test: TestData = None,
    label_file: LabelFile = None,
    fold: Fold = None,
    cross_validate: Annotated[
        bool | None,
        typer.Option("--cross-validate/--no-cross-validate", help="A run for each fold of the data, and their mean."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model, or jax.export program (*.stablehlo), whose scores soften the labels."),
    ] = None,
    keep_epochs: Annotated[
        bool, typer.Option("--keep-epochs", help="Keep every epoch's checkpoint, in RUN/epochs.")
    ] = False,
    parallel: Annotated[Parallel, typer.Option(help="How steps are spread over devices.")] = Parallel.pmap,
    workers: Workers = None,
    save_minutes: Annotated[float, typer.Option(help="Minutes between states within an epoch.")] = SAVE_MINUTES,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes that find each other (TPU pod, SLURM).")
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first of several processes that are told of each other.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="How many these are.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="Which of them this is.")] = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Train on your own sounds; needs the extra `train`.

    States are saved while it trains: after a kill, Ctrl-C or SIGTERM, --output RUN --resume goes on with the settings
    that the run was started with, and gives what it would have given. RUN/best is the checkpoint of the best epoch on
    the validation split.
    """
    from ast_jax.runtime.signals import EXIT_TERMINATED, Terminated

    size = dict(zip(SIZE, (max_length, num_mel_bins, frequency_stride, time_stride), strict=True))
    reading = reading_of((validation, test, label_file, fold))
    if data is None and not resume:
        wrong_usage("finetune: expected DATA, a folder per class or a manifest, got none")
    if init and architecture:
        wrong_usage("--init: brings its own architecture; leave out --architecture")
    if (mean is None) != (std is None):
        wrong_usage("--mean and --std: expected both or none, got one")
    if coordinator is None and (num_processes is not None or process_id is not None):
        wrong_usage("--num-processes and --process-id: expected with --coordinator only")
    with user_errors(), step("fine-tuning"):
        need_train_extra("finetune")
        _join(distributed, coordinator, num_processes, process_id)
        from ast_jax.checkpoints.load import load
        from ast_jax.training import crossval, run_folder
        from ast_jax.training import finetune as tuning
        from ast_jax.training.trainer import Machine

        chosen = _recipe(recipe)
        initial = load(init, **_sized(size, chosen)) if init and not resume else None
        training = _training(chosen, settings, initial)
        problem = problem_type.value if problem_type else (chosen.problem_type if chosen and not resume else None)
        try:
            machine = Machine(parallel.value, workers, save_minutes)
            if resume:
                several = crossval.is_cross_validation(output)
                begun = crossval.read_run(output) if several else run_folder.read_run(output)
                asked = {
                    **settings, **_sized(size, chosen), "init": init, "architecture": architecture, "teacher": teacher,
                    "recipe": recipe, "mean": mean, "std": std, "keep_epochs": keep_epochs or None,
                    "problem_type": problem_type and problem_type.value, "cross_validate": cross_validate, **reading,
                }  # fmt: skip
                _refuse_contradictions(output, begun, asked, cross_validate=several)
                paths = {name: path for name, path in reading.items() if name in MOVABLE}
                if several:
                    crossval.resume(output, data, reading=paths, machine=machine, say=say)
                    return
                best = tuning.resume(output, data, reading=paths, machine=machine, say=say)
            else:
                assert data is not None  # or it was wrong usage
                if chosen:
                    own: dict[str, float | None] = {"max_length": _sized(size, chosen)["max_length"]}
                    own |= {} if mean is None else {"mean": mean, "std": std}
                    say("\n".join(chosen.lines(_others(chosen, training), own, init or architecture or "scratch")))
                statistics = None if mean is None else (mean, std)
                if chosen and mean is None:
                    statistics = chosen.frontend["mean"], chosen.frontend["std"]
                preset = architecture or ("base" if chosen else "tiny")
                given: dict[str, Any] = {
                    "architecture": None if init else _architecture(preset, _sized(size, chosen)),
                    "initial": initial, "problem_type": problem, "statistics": statistics,
                    "teacher": teacher, "keep_epochs": keep_epochs, "reading": reading, "machine": machine,
                    "notes": {"recipe": recipe} if recipe else {},
                }  # fmt: skip
                by_recipe = chosen is not None and chosen.cross_validate and not fold
                if by_recipe if cross_validate is None else cross_validate:
                    _refuse_held_out(fold, validation, by_recipe and cross_validate is None)
                    crossval.start(data, output, training, say=say, **given)
                    return
                best = tuning.start(data, output, training, say=say, **given)
        except (KeyboardInterrupt, Terminated) as stopped:
            joined = {
                "--parallel": None if parallel is Parallel.pmap else parallel.value, "--workers": workers,
                "--save-minutes": None if save_minutes == SAVE_MINUTES else save_minutes,
                "--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id,
            }  # fmt: skip
            same = [word for name, value in joined.items() if value is not None for word in (name, str(value))]
            same += ["--distributed"] if distributed else []
            command = shlex.join(["ast-jax", "finetune", "--output", str(output), "--resume", *same])
            resumable = run_folder.can_resume(output) or crossval.is_cross_validation(output)
            complain(f"stopped; go on with: {command}" if resumable else "stopped")
            raise typer.Exit(EXIT_TERMINATED if isinstance(stopped, Terminated) else EXIT_INTERRUPTED) from None
        if best is not None:  # only the first of several processes has it
            say(f"the best: {run_folder.row_line(best.metadata['epoch'])}")
            say(f"checkpoint: {output / 'best'}")


def _join(distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Meet the other processes, where there are several."""
    if distributed or coordinator:
        import jax

        jax.distributed.initialize(coordinator, num_processes, process_id)


def _recipe(name: str | None) -> Any:
    """Return a recipe by its name."""
    if name is None:
        return None
    from ast_jax.training.recipes import RECIPES

    if name not in RECIPES:
        wrong_usage(f"--recipe: expected {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def _sized(size: dict[str, int | None], recipe: Any) -> dict[str, int | None]:
    """Return the input that is asked for: by options, else by the recipe."""
    if recipe is None or size["max_length"] is not None:
        return size
    return {**size, "max_length": recipe.frontend["max_length"]}


def _training(recipe: Any, settings: dict[str, Any], initial: Any) -> TrainConfig:
    """Return the settings that options and recipe make; a wrong one is wrong usage."""
    try:
        if recipe is None:
            return TrainConfig(**settings)
        if recipe.learning_rate_from_scratch and not _has_heard(initial):
            settings = {"learning_rate": recipe.learning_rate_from_scratch, **settings}
        return recipe.settings(**settings)
    except ValueError as error:
        wrong_usage(_option(*str(error).split(":", 1)))


def _has_heard(initial: Any) -> bool:
    """Whether a model to start from has learned from sounds, and not from pictures alone."""
    return initial is not None and not initial.provenance.imagenet_only


def _others(recipe: Any, training: TrainConfig) -> dict[str, Any]:
    """Return the settings that are not the recipe's own."""
    own = vars(recipe.settings())
    return {name: value for name, value in vars(training).items() if value != own[name]}


def _refuse_held_out(fold: str | None, validation: pathlib.Path | None, by_recipe: bool) -> None:
    """Say what cannot be had together with cross-validation, in which every fold is held out once."""
    wrong = [name for name, value in (("--fold", fold), ("--validation-data", validation)) if value is not None]
    if wrong:
        wanted = "as the recipe wants it; add --no-cross-validate" if by_recipe else f"leave out {wrong[0]}"
        wrong_usage(f"{wrong[0]}: every fold of DATA is held out once in cross-validation, {wanted}")


def _refuse_contradictions(output: pathlib.Path, run: Any, asked: dict[str, Any], *, cross_validate: bool) -> None:
    """Say which of the options given together with --resume (None: not given) the run was not started with.

    What says where data lie is no contradiction, as they may have been moved, unless the run was started without.
    Nothing can be compared with a cross-validation that has not begun (`run` is None), and nothing may be given then.
    """
    if run is None:
        _refuse_others(output, asked, dict.fromkeys(asked))
        return
    size = {name: getattr(run.config, name) for name in SIZE}
    has = {
        **vars(run.training), **size, "problem_type": run.config.problem_type, "recipe": run.metadata.get("recipe"),
        "mean": run.frontend.mean, "std": run.frontend.std, "keep_epochs": run.keep_epochs,
        "fold": None if cross_validate else run.data.get("fold"), "cross_validate": cross_validate,
        **{name: run.data.get(name) and asked.get(name) for name in MOVABLE},
    }  # fmt: skip
    if asked["teacher"]:
        names = asked["teacher"], str(pathlib.Path(asked["teacher"]).absolute())
        has["teacher"] = asked["teacher"] if run.teacher in names else None
    if asked["architecture"]:
        own = {name: getattr(run.config, name) for name in ("num_labels", "id2label", "problem_type")}
        same = _architecture(asked["architecture"], size).replace(**own) == run.config
        has["architecture"] = asked["architecture"] if same else None
    if asked["init"]:
        from ast_jax.checkpoints.load import load

        has["init"] = None
        with contextlib.suppress(ValueError):  # it does not even go to this size
            if load(asked["init"], **size).origin == run.metadata.get("trained_from"):
                has["init"] = asked["init"]
    _refuse_others(output, asked, has)


def _refuse_others(output: pathlib.Path, asked: dict[str, Any], has: dict[str, Any]) -> None:
    """Name the options whose value is another than the run's."""
    wrong = sorted(_option(name) for name, value in asked.items() if value is not None and value != has[name])
    if wrong:
        wrong_usage(
            f"--resume: goes on with the settings that the run in {output} was started with, not with others; "
            f"leave out {', '.join(wrong)}"
        )


def _option(name: str, *message: str) -> str:
    """Return a setting's name as the command line has it, and what is said of it."""
    return ":".join([SPELLED.get(name, f"--{name.replace('_', '-')}"), *message])


def _architecture(name: str, size: dict[str, int | None]) -> Any:
    """Return the `ASTConfig` of a preset or of a `config.json`, with the input that is asked for."""
    from ast_jax.config import PRESETS, ASTConfig, read_config

    if name in PRESETS:
        config = PRESETS[name]()
    elif pathlib.Path(name).is_file():
        config = read_config(ASTConfig, pathlib.Path(name))
    else:
        wrong_usage(f"--architecture: expected {', '.join(PRESETS)} or a config.json, got {name!r}")
    return config.replace(**{name: value for name, value in size.items() if value is not None})


def need_train_extra(command: str) -> None:
    """Say which command installs what training needs, where it is missing; keep Orbax from talking in between."""
    import importlib.util

    needed = ("grain", "sklearn", "tensorboard", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{command} needs {' and '.join(missing)}; install it with: pip install 'ast-jax[train]'")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # tracebacks of what is told in a line here
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # tensorstore, of the writes beside one that failed
            usual(unraisable)

    sys.unraisablehook = hook


def reading_of(values: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of `read_dataset` that were given."""
    return {name: str(value) for name, value in zip(READING, values, strict=True) if value is not None}
