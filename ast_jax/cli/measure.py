"""The commands evaluate, average, check-data and stats."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from ast_jax.cli.common import MODEL_HELP, app, json_line, one_line, user_errors, wrong_usage
from ast_jax.cli.finetune import need_train_extra
from ast_jax.cli.options import DATA_HELP, Fold, LabelFile, TestData, ValidationData


@app.command()
def evaluate(
    models_and_data: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... DATA",
            help=f"Models: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]} Several form an ensemble. Data set: any layout that "
            "finetune reads.",
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Split: train, validation, test or all. [default: test if there is one, else validation]"),
    ] = None,
    test: TestData = None,
    validation: ValidationData = None,
    label_file: LabelFile = None,
    fold: Fold = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Decision threshold for precision, recall and F1 of multi-label models.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Global batch size, over all devices.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes that decode audio; 0: threads.")] = 0,
    output: Annotated[
        pathlib.Path | None, typer.Option("--output", "-o", help="Output folder for report.json and figures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Evaluate models on a data set, and their ensemble.

    Metrics: mAP, AUC, d-prime, accuracy, precision, recall and F1, overall and per class. The ensemble is the mean of
    the models' scores. The models need the labels in common; features, input length and architecture may differ.
    """
    if len(models_and_data) < 2:
        wrong_usage("evaluate: expected a model and a data set, got one of them")
    *models, source = models_and_data
    with user_errors():
        need_train_extra("evaluate")
        from ast_jax.data.datasets import DatasetConfig
        from ast_jax.runtime.progress import step
        from ast_jax.training import evaluate as evaluation

        with step("evaluating"):
            result = evaluation.evaluate(
                models, DatasetConfig(source, validation, test, label_file, fold), split=split, threshold=threshold,
                batch_size=batch_size, num_workers=workers, output=output,
            )  # fmt: skip
        if as_json:
            print(json_line(result.to_json_dict(), indent=2))
        else:
            print(*map(one_line, result.lines()), sep="\n")


@app.command()
def average(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Checkpoints or runs; a run stands for its best epoch, or for --epochs."),
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Checkpoint folder to write.")],
    epochs: Annotated[
        str | None,
        typer.Option(help="Epochs to average, FIRST-LAST, for example 6-25; needs runs trained with --keep-epochs."),
    ] = None,
) -> None:
    """Average the weights of checkpoints or epochs, as in the paper."""
    with user_errors():
        from ast_jax.checkpoints.folder import check_destination, save
        from ast_jax.checkpoints.load import load
        from ast_jax.runtime.progress import step, track
        from ast_jax.training.evaluate import average as mean_of
        from ast_jax.training.run_folder import checkpoints_of

        check_destination(output)
        folders = [folder for model in models for folder in checkpoints_of(model, epochs)]
        found = [load(folder) for folder in track(folders, "loading models", len(folders))]
        if len(found) == 1:
            raise ValueError(
                f"{models[0]}: expected several models to average, got one; --epochs FIRST-LAST selects epochs of a "
                "run trained with --keep-epochs"
            )
        with step("averaging"):
            save(output, mean_of(found))
        print(f"checkpoint: {output}, the mean of {len(found)}")


@app.command("check-data")
def check_data(
    data: Annotated[pathlib.Path, typer.Argument(metavar="DATA", help=DATA_HELP)],
    validation: ValidationData = None,
    test: TestData = None,
    label_file: LabelFile = None,
    fold: Fold = None,
    max_length: Annotated[int, typer.Option(min=16, help="Input length of the model, in frames of 10 ms.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Audit a data set before training.

    Reports class counts, durations and sampling rates, unreadable files, silent clips, duplicates, and leakage between
    splits. The exit status is 1 if there are problems.
    """
    with user_errors():
        from ast_jax.config import FrontendConfig
        from ast_jax.data.audit import survey
        from ast_jax.data.datasets import DatasetConfig, read_dataset
        from ast_jax.runtime.progress import step

        with step("reading the data set"):
            dataset = read_dataset(DatasetConfig(data, validation, test, label_file, fold))
        found = survey(dataset, FrontendConfig(max_length=max_length))
        if as_json:
            print(json_line(found.to_json_dict(), indent=2))
        else:
            print(*map(one_line, [*dataset.notes, *found.lines()]), sep="\n")
        if found.problems:
            raise typer.Exit(1)


@app.command()
def stats(
    data: Annotated[pathlib.Path, typer.Argument(metavar="DATA", help=DATA_HELP)],
    label_file: LabelFile = None,
    fold: Fold = None,
    split: Annotated[str, typer.Option(help="Split: train, validation or test.")] = "train",
    max_length: Annotated[
        int, typer.Option(min=16, help="Maximum clip length, in frames of 10 ms; longer clips are cut.")
    ] = 1024,
    num_mel_bins: Annotated[int, typer.Option(min=16, help="Number of mel bins.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Sample size: clips drawn at random. [default: all]")] = None,
    as_original: Annotated[
        bool,
        typer.Option(
            "--as-original",
            help="Statistics as the original's script computes them, with padding, mixup and masks; biased.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute mean and standard deviation of the log-mel features.

    finetune takes them as --mean and --std; without these options it computes them itself.
    """
    with user_errors():
        from ast_jax.config import FrontendConfig
        from ast_jax.data.audit import statistics, statistics_as_original
        from ast_jax.data.datasets import DatasetConfig, read_dataset
        from ast_jax.runtime.progress import step

        with step("reading the data set"):
            dataset = read_dataset(DatasetConfig(data, label_file=label_file, fold=fold))
        if split not in dataset.splits:
            wrong_usage(f"--split: expected {', '.join(dataset.splits)}, got {split!r}")
        frontend = FrontendConfig(max_length=max_length, num_mel_bins=num_mel_bins)
        measure = statistics_as_original if as_original else statistics
        found = measure(dataset.splits[split], frontend, limit=limit, seed=seed)
        if as_json:
            print(json_line(found._asdict()))
        else:
            skipped = f", {found.skipped} skipped" if found.skipped else ""
            print(f"mean {found.mean:.7g}  std {found.std:.7g}  ({found.clips} clips{skipped})")
            print(
                "computed as by the original's script, with padding, mixup and masks: for comparison only"
                if as_original
                else f"options for finetune: --mean {found.mean:.7g} --std {found.std:.7g}"
            )
