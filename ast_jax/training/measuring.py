"""`ast-jax evaluate`: models, alone and as an ensemble, on a split of a data set."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ast_jax.checkpoints.load import load
from ast_jax.config import ASTConfig, ProblemType
from ast_jax.data import datasets
from ast_jax.data.datasets import SPLITS, DataError, DataSet, Example
from ast_jax.runtime.files import write_text
from ast_jax.training import plots
from ast_jax.training.evaluate import align, evaluate
from ast_jax.training.metrics import Report, report, report_lines, scores
from ast_jax.training.run_folder import RUN_FILE, checkpoints_of, json_text, read_run

ENSEMBLE = "ensemble"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Reports by model, and of their ensemble where there are several.

    Attributes:
        split: what was measured on.
        examples: how many sounds.
        skipped: how many could not be read.
        reports: by the name of the model, `ENSEMBLE` last.
        notes: lines for the user.
    """

    split: str
    examples: int
    skipped: int
    reports: dict[str, Report]
    notes: tuple[str, ...] = ()

    def to_json_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return it for the terminal: every model's metrics, and the last one's classes."""
        skipped = f", {self.skipped} more could not be read" if self.skipped else ""
        found = [*self.notes, f"{self.examples} sounds of the split {self.split}{skipped}"]
        for name, one in list(self.reports.items())[:-1]:
            found += [f"{name}:", f"  {report_lines(one)[1]}"]  # the metrics
        name, last = list(self.reports.items())[-1]
        return [*found, f"{name}:", *(f"  {line}".rstrip() for line in report_lines(last))]


def measure(
    models: Sequence[str],
    source: str | pathlib.Path,
    reading: dict[str, Any] | None = None,
    *,
    split: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 32,
    num_workers: int = 0,
    output: pathlib.Path | None = None,
) -> Measured:
    """Measure models on a split of a data set.

    Args:
        models: what `load` takes, or run folders, which stand for their best epoch.
        source: the data set, see `datasets.read_dataset`.
        reading: further arguments of it.
        split: None for test where there is one, else validation; "all" for everything.
        threshold: see `metrics.report`.
        batch_size: over all devices.
        num_workers: processes that decode.
        output: a folder to write `report.json` and pictures into.

    Raises:
        DataError: no such split, nothing in it, or labels that a model does not know.
        ValueError: a model that cannot be loaded or has no classifier.
    """
    dataset, split, examples = _heard_by(models, source, reading or {}, split)
    notes = list(dataset.notes)
    reports, all_scores, usable, kinds = {}, [], np.ones(len(examples), bool), set()
    folders = [folder for model in models for folder in checkpoints_of(model)]
    if len({str(pathlib.Path(folder).resolve()) for folder in folders}) < len(folders):
        notes.append("a model is there more than once (a run stands for its best epoch), and weighs as much more")
    for model, folder in zip(models, folders, strict=True):
        checkpoint = load(folder)
        if "classifier" not in checkpoint.params:
            raise ValueError(f"{model}: has no classifier; fine-tune it first")
        columns = align(checkpoint, dataset.labels)
        if len(columns) < checkpoint.config.num_labels:
            notes.append(f"{model}: of its {checkpoint.config.num_labels} labels the data have {len(columns)}")
        config = checkpoint.config.replace(num_labels=len(columns), id2label=dataset.labels)
        kinds.add(config.resolved_problem_type)
        if len(kinds) > 1:
            raise ValueError(f"an ensemble: expected models of one problem type, got {' and '.join(sorted(kinds))}")
        found = evaluate(_only(checkpoint, columns, config), examples, batch_size, num_workers=num_workers)
        reports[model] = report(*found.measured(), config, threshold)
        all_scores.append(scores(found.logits, config))
        usable &= found.usable
    if len(models) > 1:
        logits = _as_logits(np.mean(all_scores, axis=0), config)
        reports[ENSEMBLE] = report(logits[usable], found.labels[usable], config, threshold)
    measured = Measured(split, int(usable.sum()), int((~usable).sum()), reports, tuple(notes))
    if output is not None:
        _write(measured, dataset.labels, output)
    return measured


def _heard_by(
    models: Sequence[str], source: str | pathlib.Path, reading: dict[str, Any], split: str | None
) -> tuple[DataSet, str, list[Example]]:
    """Read the data as the runs among the models did: with the seed and the fold that held out their validation.

    Raises:
        DataError: they held out different sounds, so that the split is not the same for all.
    """
    asked = []
    for model in models:
        if (pathlib.Path(model) / RUN_FILE).is_file():
            run = read_run(model)
            fold = {"fold": run.data["fold"]} if run.data.get("fold") is not None else {}
            asked.append((run.training.seed, {**fold, **reading}))
    found = [
        _chosen(datasets.read_dataset(datasets.DatasetConfig(source, **how), seed), split)
        for seed, how in asked or [(0, reading)]
    ]
    if any(other[1:] != found[0][1:] for other in found[1:]):
        raise DataError(
            f"{source}: the runs held out different sounds (by --seed or --fold), so that what one has not heard "
            "another has; measure on a test split, or one by one"
        )
    return found[0]


def _chosen(dataset: DataSet, split: str | None) -> tuple[DataSet, str, list[Example]]:
    """Return a data set with the split that is meant, and its examples."""
    return dataset, *_examples(dataset, split)


def _examples(dataset: DataSet, split: str | None) -> tuple[str, list[Example]]:
    """Return a split by its name, or the one that is meant without."""
    if split is None:
        split = next((name for name in ("test", "validation", "train") if dataset.splits[name]), "test")
    if split == "all":
        return split, [example for name in SPLITS for example in dataset.splits[name]]
    if split not in SPLITS:
        raise DataError(f"split: expected {', '.join(SPLITS)} or all, got {split!r}")
    if not dataset.splits[split]:
        raise DataError(f"the split {split} has no sounds; choose another, or --split all")
    return split, dataset.splits[split]


def _only(checkpoint: Any, columns: np.ndarray, config: ASTConfig) -> Any:
    """Return a checkpoint with the data's labels alone, in their order."""
    dense = checkpoint.params["classifier"]["dense"]
    head = {
        **checkpoint.params["classifier"],
        "dense": {"kernel": dense["kernel"][:, columns], "bias": dense["bias"][columns]},
    }
    return checkpoint.replace(params={**checkpoint.params, "classifier": head}, config=config)


def _as_logits(mean: np.ndarray, config: ASTConfig) -> np.ndarray:
    """Return logits whose scores are the given ones."""
    from scipy.special import logit

    kind = config.resolved_problem_type
    if kind == ProblemType.REGRESSION:
        return mean
    tiny = np.finfo(mean.dtype).tiny
    if kind == ProblemType.SINGLE_LABEL:
        return np.log(np.maximum(mean, tiny))
    return logit(np.clip(mean, tiny, 1 - np.finfo(mean.dtype).epsneg))


def _write(measured: Measured, labels: Sequence[str], output: pathlib.Path) -> None:
    """Write a report and the pictures of the last model's."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.json", json_text(measured.to_json_dict()))
    name, last = list(measured.reports.items())[-1]
    title = f"{measured.split}, {name}"
    if last.get("confusion") is not None:
        plots.confusion(last["confusion"], labels, output / "confusion.png", title)
    elif last.get("ranked_classes"):
        plots.ranked_classes(last, output / "classes.png", title)
