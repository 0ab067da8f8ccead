"""Evaluation of models on a split of a data set, alone and as an ensemble; weight averaging."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import load
from ast_jax.config import ASTConfig, FrontendConfig, ProblemType
from ast_jax.data.datasets import SPLITS, DataError, DataSet, DatasetConfig, Example, read_dataset
from ast_jax.runtime.files import write_text
from ast_jax.runtime.progress import track
from ast_jax.training import input_pipeline, plots
from ast_jax.training import step as train
from ast_jax.training.extras import require_train_extra
from ast_jax.training.metrics import Report, report, report_lines, scores
from ast_jax.training.parallel import DataParallel
from ast_jax.training.run_folder import RUN_FILE, Run, checkpoints_of, json_text, read_run

ENSEMBLE = "ensemble"
Model = Checkpoint | Run | str | os.PathLike[str]


class Predictions(NamedTuple):
    """Logits and labels, each [N, C], of all examples in order, and which of them could be read [N]."""

    logits: np.ndarray
    labels: np.ndarray
    usable: np.ndarray

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels of the examples that could be read.

        Raises:
            DataError: none could.
        """
        if not self.usable.any():
            raise DataError(f"none of the {len(self.usable)} sounds to evaluate on can be read")
        return self.logits[self.usable], self.labels[self.usable]


class Evaluator:
    """Computes logits of the same examples with different parameters; its workers live until it is closed."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: ASTConfig,
        frontend: FrontendConfig,
        parallel: DataParallel,
        *,
        batch_size: int,
        passes: int = 1,
        num_workers: int = 0,
    ):
        """Take the examples, the model's shape and how often it will be called (`passes`).

        Raises:
            ValueError: `batch_size` does not divide over the devices.
        """
        parallel.check_batch_size(batch_size)
        self.count = len(examples)
        self._num_batches = -(-self.count // batch_size)
        step = functools.partial(train.eval_step, config=config, frontend=frontend)
        self._run = parallel.compile_eval_step(step)
        self._batches = input_pipeline.eval_batches(
            examples, frontend, config.num_labels,
            batch_size=batch_size, passes=passes, rows=parallel.local_rows(batch_size), num_workers=num_workers,
        )  # fmt: skip

    def __call__(self, params: Any, between: Callable[[], None] = lambda: None) -> Predictions:
        """Return the predictions with replicated params; call `between` before each batch."""
        logits, labels, usable = [], [], []
        batches = itertools.islice(self._batches, self._num_batches)
        for batch in track(batches, "evaluation batches", self._num_batches):
            between()
            labels.append(batch.pop("labels"))
            usable.append(batch.pop("usable"))
            logits.append(self._run(params, batch))
        return Predictions(*(_gathered(parts)[: self.count] for parts in (logits, labels, usable)))

    def close(self) -> None:
        """Stop the workers."""
        self._batches.close()


def _gathered(parts: list[np.ndarray]) -> np.ndarray:
    """Return the rows of all batches in order, those of other processes included."""
    rows = np.stack([np.array(part) for part in parts])  # [batches, b, …]
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        rows = np.moveaxis(multihost_utils.process_allgather(rows), 0, 1)  # [batches, processes, b, …]
        rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return rows.reshape(-1, *rows.shape[2:])


def predict(
    checkpoint: Checkpoint, examples: Sequence[Example], batch_size: int = 32, *, num_workers: int = 0
) -> Predictions:
    """Return logits and labels of all examples, using all devices.

    Raises:
        ValueError: `batch_size` does not divide over the devices.
    """
    parallel = DataParallel()
    evaluator = Evaluator(
        examples, checkpoint.config, checkpoint.frontend, parallel, batch_size=batch_size, num_workers=num_workers
    )
    with contextlib.closing(evaluator):
        return evaluator(parallel.replicate(checkpoint.params))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        split: the split.
        examples: number of examples.
        skipped: number of examples that could not be read.
        reports: a report for each model by its name, and with several models for "ensemble", the last. A report has the
            keys "problem_type", "examples", "threshold", "metrics" (mAP, mAUC, d_prime, accuracy), "classes" (average
            precision, AUC, precision, recall and F1 of each), "micro", "macro" and "confusion"; None stands for NaN.
        notes: remarks for the user.
    """

    split: str
    examples: int
    skipped: int
    reports: dict[str, Report]
    notes: tuple[str, ...] = ()

    def to_json_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return it for the terminal: the metrics of every model, and the classes of the last."""
        skipped = f", {self.skipped} more could not be read" if self.skipped else ""
        found = [*self.notes, f"{self.examples} sounds of the split {self.split}{skipped}"]
        for name, one in list(self.reports.items())[:-1]:
            found += [f"{name}:", f"  {report_lines(one)[1]}"]  # the metrics
        name, last = list(self.reports.items())[-1]
        return [*found, f"{name}:", *(f"  {line}".rstrip() for line in report_lines(last))]


def evaluate(
    models: Model | Sequence[Model],
    data: DatasetConfig | str | os.PathLike[str],
    *,
    split: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 32,
    num_workers: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluate models on a split of a data set; several also as an ensemble, the mean of their scores.

    Models may differ in everything but the labels: each computes its own features. Run folders are evaluated on what
    the run held out: with its seed and its fold.

    Args:
        models: one or several of: a run or its folder, which stand for the best epoch; a checkpoint; a name for `load`.
        data: where sounds and labels are; a path alone stands for `DatasetConfig(path)`.
        split: "train", "validation", "test" or "all"; None for test where there is one, else validation.
        threshold: score from which a multi-label model predicts a label, for precision, recall and F1.
        batch_size: over all devices.
        num_workers: worker processes that decode; 0 for threads.
        output: folder for `report.json` and pictures.

    Raises:
        DataError: no such split, nothing in it, labels that a model does not have, or runs that held out different
            examples.
        ValueError: no models, a model that cannot be loaded or has no classifier, or models of several problem types.
    """
    require_train_extra("evaluation")
    models = [models] if isinstance(models, Checkpoint | Run | str | os.PathLike) else list(models)
    if not models:
        raise ValueError("models: expected one or more, got none")
    names = [_name(model, index) for index, model in enumerate(models)]
    dataset, split, examples = _examples_for(models, DatasetConfig.of(data), split)
    notes = list(dataset.notes)
    loadable = [model if isinstance(model, Checkpoint) else checkpoints_of(_path(model))[0] for model in models]
    paths = [str(pathlib.Path(model).resolve()) for model in loadable if not isinstance(model, Checkpoint)]
    if len(set(paths)) < len(paths):
        notes.append("a model is given more than once (a run stands for its best epoch): its weight counts each time")
    reports, all_scores, usable, kinds = {}, [], np.ones(len(examples), bool), set()
    for name, model in zip(names, loadable, strict=True):
        checkpoint = model if isinstance(model, Checkpoint) else load(model)
        if "classifier" not in checkpoint.params:
            raise ValueError(f"{name}: has no classifier; fine-tune it first")
        columns = label_columns(checkpoint, dataset.labels)
        if len(columns) < checkpoint.config.num_labels:
            notes.append(f"{name}: the data have {len(columns)} of its {checkpoint.config.num_labels} labels")
        config = checkpoint.config.replace(num_labels=len(columns), id2label=dataset.labels)
        kinds.add(config.resolved_problem_type)
        if len(kinds) > 1:
            raise ValueError(f"an ensemble: expected models of one problem type, got {' and '.join(sorted(kinds))}")
        found = predict(_only(checkpoint, columns, config), examples, batch_size, num_workers=num_workers)
        reports[name] = report(*found.measured(), config, threshold)
        all_scores.append(scores(found.logits, config))
        usable &= found.usable
    if len(models) > 1:
        logits = _as_logits(np.mean(all_scores, axis=0), config)
        reports[ENSEMBLE] = report(logits[usable], found.labels[usable], config, threshold)
    evaluation = Evaluation(split, int(usable.sum()), int((~usable).sum()), reports, tuple(notes))
    if output is not None:
        _write(evaluation, dataset.labels, pathlib.Path(output))
    return evaluation


def _name(model: Model, index: int) -> str:
    """Return a model's name in reports."""
    return f"model {index + 1}" if isinstance(model, Checkpoint) else _path(model)


def _path(model: Run | str | os.PathLike[str]) -> str:
    """Return the name that a model is loaded by."""
    return str(model.folder) if isinstance(model, Run) else os.fspath(model)


def _examples_for(
    models: Sequence[Model], data: DatasetConfig, split: str | None
) -> tuple[DataSet, str, list[Example]]:
    """Read the data as the runs among the models did: with the seed and the fold that held out their validation split.

    Raises:
        DataError: they held out different examples, so that the split is not the same for all.
    """
    asked = []
    for model in models:
        if not isinstance(model, Checkpoint) and (pathlib.Path(_path(model)) / RUN_FILE).is_file():
            run = read_run(_path(model))
            asked.append((run.training.seed, dataclasses.replace(data, fold=data.fold or run.data.fold)))
    found = [_chosen(read_dataset(which, seed), split) for seed, which in asked or [(0, data)]]
    if any(other[1:] != found[0][1:] for other in found[1:]):
        raise DataError(
            f"{data.source}: the runs held out different sounds (by --seed or --fold), so that one was trained on what "
            "another held out; evaluate on a test split, or one by one"
        )
    return found[0]


def _chosen(dataset: DataSet, split: str | None) -> tuple[DataSet, str, list[Example]]:
    """Return a data set with the name and the examples of the split to evaluate on."""
    if split is None:
        split = next((name for name in ("test", "validation", "train") if dataset.splits[name]), "test")
    if split == "all":
        return dataset, split, [example for name in SPLITS for example in dataset.splits[name]]
    if split not in SPLITS:
        raise DataError(f"split: expected {', '.join(SPLITS)} or all, got {split!r}")
    if not dataset.splits[split]:
        raise DataError(f"the split {split} has no sounds; choose another, or --split all")
    return dataset, split, dataset.splits[split]


def label_columns(checkpoint: Checkpoint, labels: Sequence[str]) -> np.ndarray:
    """Return the columns of a model's logits for a data set's labels.

    Raises:
        DataError: the model does not have all of them.
    """
    known = {name: index for index, name in enumerate(checkpoint.config.labels)}
    if missing := [name for name in labels if name not in known]:
        raise DataError(
            f"the model does not know {len(missing)} of the data's {len(labels)} labels, the first is {missing[0]!r}"
        )
    return np.array([known[name] for name in labels])


def _only(checkpoint: Checkpoint, columns: np.ndarray, config: ASTConfig) -> Checkpoint:
    """Return a checkpoint whose classifier has the data's labels only, in their order."""
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


def _write(evaluation: Evaluation, labels: Sequence[str], output: pathlib.Path) -> None:
    """Write the report, and the pictures of the last model."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.json", json_text(evaluation.to_json_dict()))
    name, last = list(evaluation.reports.items())[-1]
    title = f"{evaluation.split}, {name}"
    if last.get("confusion") is not None:
        plots.confusion(last["confusion"], labels, output / "confusion.png", title)
    elif last.get("ranked_classes"):
        plots.ranked_classes(last, output / "classes.png", title)


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return a checkpoint whose params are the mean of several (weight averaging; paper, section 3.1).

    Raises:
        ValueError: none given, or they differ in architecture, labels or features.
    """
    if not checkpoints:
        raise ValueError("expected one checkpoint or more to average, got none")
    first = checkpoints[0]
    flats = [flatten_dict(one.params, sep="/") for one in checkpoints]
    for number, one in enumerate(checkpoints[1:], 2):
        for name in ("config", "frontend"):
            if getattr(one, name) != getattr(first, name):
                raise ValueError(
                    f"checkpoint {number} has another {name} than the first; only models of one shape, label set and "
                    "frontend can be averaged (ensembles of others: ast-jax evaluate MODEL… DATA)"
                )
    mean = {
        path: np.mean([np.asarray(flat[path], np.float64) for flat in flats], axis=0).astype(leaf.dtype)
        for path, leaf in flats[0].items()
    }
    metadata = {"averaged": [one.origin for one in checkpoints]}
    return Checkpoint(unflatten_dict(mean, sep="/"), first.config, first.frontend, json.dumps(metadata))
