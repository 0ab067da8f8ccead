"""The commands that train: finetune and resume."""

from __future__ import annotations

import contextlib
import enum
import logging
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ast_jax.cli.common import (
    EXIT_INTERRUPTED,
    FrequencyStride,
    MaxLength,
    NumMelBins,
    TimeStride,
    app,
    complain,
    say,
    user_errors,
    wrong_usage,
)
from ast_jax.cli.options import (
    DATA_HELP,
    Fold,
    HostsConfig,
    LabelFile,
    TestData,
    ValidationData,
    command_with,
    given,
    option_name,
    words,
)
from ast_jax.config import ProblemType
from ast_jax.runtime.progress import step
from ast_jax.training.config import ExecutionConfig, TrainConfig

if TYPE_CHECKING:
    from ast_jax.checkpoints.resize import ResizeOptions
    from ast_jax.config import ASTConfig
    from ast_jax.training.recipes import Recipe

Output = Annotated[pathlib.Path, typer.Option("--output", "-o", help="Run folder to write.")]


class Classification(enum.StrEnum):
    """The problem types that labels of a data set can have."""

    single_label = ProblemType.SINGLE_LABEL.value
    multi_label = ProblemType.MULTI_LABEL.value


@app.command(cls=command_with(TrainConfig, ExecutionConfig, HostsConfig))
def finetune(
    context: typer.Context,
    data: Annotated[pathlib.Path, typer.Argument(metavar="DATA", show_default=False, help=DATA_HELP)],
    output: Output,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe of the paper: audioset-full, audioset-balanced, esc50 or speechcommands; other options "
            "override its settings."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="Initial checkpoint (as --model of classify). [default: random initialisation]"),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture", help="Architecture from scratch: tiny, small, base, or a config.json. [default: tiny]"
        ),
    ] = None,
    max_length: MaxLength = None,
    num_mel_bins: NumMelBins = None,
    frequency_stride: FrequencyStride = None,
    time_stride: TimeStride = None,
    mean: Annotated[
        float | None,
        typer.Option(help="Mean of the log-mel features. [default: the recipe's, --init's, or measured]"),
    ] = None,
    std: Annotated[float | None, typer.Option(help="Standard deviation of the log-mel features, with --mean.")] = None,
    problem_type: Annotated[
        Classification | None,
        typer.Option("--problem-type", help="Problem type. [default: multi-label if any file has several labels]"),
    ] = None,
    validation: ValidationData = None,
    test: TestData = None,
    label_file: LabelFile = None,
    fold: Fold = None,
    cross_validate: Annotated[
        bool | None,
        typer.Option("--cross-validate/--no-cross-validate", help="Cross-validation: a run for each fold of the data."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Distillation teacher: a model, or a jax.export program (*.stablehlo)."),
    ] = None,
    keep_epochs: Annotated[
        bool, typer.Option("--keep-epochs", help="Keep every epoch's checkpoint, in RUN/epochs.")
    ] = False,
) -> None:
    """Train on your own sounds; needs the extra `train`.

    States are saved while it trains: after a kill, Ctrl-C or SIGTERM, `ast-jax resume RUN` continues as if nothing had
    happened. RUN/best is the checkpoint of the best epoch on the validation split.
    """
    if init and architecture:
        wrong_usage("--init: has its own architecture; leave out --architecture")
    if (mean is None) != (std is None):
        wrong_usage("--mean and --std: expected both or none, got one")
    size: ResizeOptions = {
        "max_length": max_length, "num_mel_bins": num_mel_bins, "frequency_stride": frequency_stride,
        "time_stride": time_stride,
    }  # fmt: skip
    with user_errors(), step("fine-tuning"), training_process(context, "finetune", output):
        from ast_jax.checkpoints.load import load
        from ast_jax.data.datasets import DatasetConfig
        from ast_jax.training import crossval
        from ast_jax.training import finetune as tuning

        chosen = _recipe(recipe)
        if chosen and max_length is None:
            size["max_length"] = chosen.frontend["max_length"]
        execution, settings = _execution(context), given(context, TrainConfig)
        _training(chosen, settings, None)  # checked before a model is loaded
        initial = load(init, **size) if init else None
        by_recipe = chosen is not None and chosen.cross_validate and fold is None
        if several := by_recipe if cross_validate is None else cross_validate:
            _refuse_held_out(fold, validation, by_recipe and cross_validate is None)
        result = (crossval.cross_validate if several else tuning.finetune)(
            DatasetConfig(data, validation, test, label_file, fold),
            output,
            init=initial,
            architecture=None if init else _architecture(architecture or ("base" if chosen else "tiny"), size),
            training=_training(chosen, settings, initial),
            execution=execution,
            recipe=recipe,
            problem_type=problem_type.value if problem_type else None,
            statistics=None if mean is None or std is None else (mean, std),
            teacher=teacher,
            keep_epochs=keep_epochs,
            log=say,
        )
        _print_result(result)


@app.command(cls=command_with(ExecutionConfig, HostsConfig))
def resume(
    context: typer.Context,
    run: Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="Run folder, or folder of a cross-validation.")],
    data: Annotated[
        pathlib.Path | None,
        typer.Argument(metavar="DATA", show_default=False, help="Where the data set is now, if it was moved."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Epochs in all, also past the end of a finished run; not with a cosine schedule."
            " [default: as started]",
        ),
    ] = None,
    validation: ValidationData = None,
    test: TestData = None,
    label_file: LabelFile = None,
) -> None:
    """Continue a run from its last saved state.

    It keeps the settings it was started with. --validation-data, --test-data and --labels say where these are now, if
    they were moved.
    """
    with user_errors(), step("fine-tuning"), training_process(context, "resume", run):
        from ast_jax.data.datasets import DatasetConfig
        from ast_jax.training import crossval
        from ast_jax.training import finetune as tuning

        several = crossval.is_cross_validation(run)
        moved = None
        if any(path is not None for path in (data, validation, test, label_file)):
            old = crossval.data_of(run) if several else tuning.data_of(run)
            try:
                moved = old.moved_to(DatasetConfig(data or old.source, validation, test, label_file))
            except ValueError as error:
                wrong_usage(_in_options(str(error)))
        result = (crossval.resume_cross_validation if several else tuning.resume)(
            run, moved, epochs=epochs, execution=_execution(context), log=say
        )
        _print_result(result)


@contextlib.contextmanager
def training_process(context: typer.Context, command: str, output: pathlib.Path) -> Iterator[None]:
    """Join the other processes of a multi-host run; when stopped by a signal, print the command that continues."""
    from ast_jax.runtime.signals import EXIT_TERMINATED, Terminated

    hosts = HostsConfig(**given(context, HostsConfig))
    for name, least in (("num_processes", 1), ("process_id", 0)):
        value = getattr(hosts, name)
        if value is not None and value < least:
            wrong_usage(f"{option_name(name)}: expected {least} or more, got {value}")
    if hosts.coordinator is None and (hosts.num_processes is not None or hosts.process_id is not None):
        wrong_usage("--num-processes and --process-id: expected with --coordinator only")
    need_train_extra(command)
    if hosts.distributed or hosts.coordinator:
        import jax

        jax.distributed.initialize(hosts.coordinator, hosts.num_processes, hosts.process_id)
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stopped:
        from ast_jax.training import crossval, run_folder

        same = [*words(given(context, ExecutionConfig)), *words(given(context, HostsConfig))]
        again = shlex.join(["ast-jax", "resume", str(output), *same])
        resumable = run_folder.can_resume(output) or crossval.is_cross_validation(output)
        complain(f"stopped; continue with: {again}" if resumable else "stopped")
        raise typer.Exit(EXIT_TERMINATED if isinstance(stopped, Terminated) else EXIT_INTERRUPTED) from None


def _execution(context: typer.Context) -> ExecutionConfig:
    """Return the execution that options ask for; on the command line worker processes decode by default."""
    try:
        return ExecutionConfig(**{"num_workers": None, **given(context, ExecutionConfig)})
    except ValueError as error:
        wrong_usage(_in_options(str(error)))


def _recipe(name: str | None) -> Recipe | None:
    """Return a recipe by its name."""
    if name is None:
        return None
    from ast_jax.training.recipes import find_recipe

    try:
        return find_recipe(name)
    except ValueError as error:
        wrong_usage(_in_options(str(error)))


def _training(recipe: Recipe | None, settings: dict[str, Any], initial: Any) -> TrainConfig:
    """Return the hyperparameters of options and recipe."""
    try:
        return TrainConfig(**settings) if recipe is None else recipe.training_for(initial, **settings)
    except ValueError as error:
        wrong_usage(_in_options(str(error)))


def _in_options(message: str) -> str:
    """Return a message that begins with a field's name with the option's name instead."""
    field, _, rest = message.partition(":")
    return f"{option_name(field)}:{rest}"


def _refuse_held_out(fold: str | None, validation: pathlib.Path | None, by_recipe: bool) -> None:
    """Refuse options that cannot go with cross-validation, in which every fold is held out once."""
    wrong = [name for name, value in (("--fold", fold), ("--validation-data", validation)) if value is not None]
    if wrong:
        wanted = "as the recipe wants it; add --no-cross-validate" if by_recipe else f"leave out {wrong[0]}"
        wrong_usage(f"{wrong[0]}: every fold of DATA is held out once in cross-validation, {wanted}")


def _architecture(name: str, size: ResizeOptions) -> ASTConfig:
    """Return the `ASTConfig` of a preset or of a `config.json`, with the input that was asked for."""
    from ast_jax.config import PRESETS, ASTConfig, read_config

    if name in PRESETS:
        config = PRESETS[name]()
    elif pathlib.Path(name).is_file():
        config = read_config(ASTConfig, pathlib.Path(name))
    else:
        wrong_usage(f"--architecture: expected {', '.join(PRESETS)} or a config.json, got {name!r}")
    return config.replace(**{name: value for name, value in size.items() if value is not None})


def _print_result(result: Any) -> None:
    """Print where the best checkpoint of a run is; a cross-validation has logged its table."""
    from ast_jax.training import run_folder

    if isinstance(result, run_folder.Run) and _is_first():
        say(f"the best: {run_folder.row_line(result.results['best'])}")
        say(f"checkpoint: {result.best}")


def _is_first() -> bool:
    """Whether this is the first of several processes, or the only one."""
    import jax

    return jax.process_index() == 0


def need_train_extra(command: str) -> None:
    """Name the command that installs the training extra, where it is missing; silence Orbax's logs."""
    from ast_jax.training.extras import require_train_extra

    require_train_extra(command)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # tracebacks of errors that we report in a line
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # tensorstore, of the writes beside one that failed
            usual(unraisable)

    sys.unraisablehook = hook
