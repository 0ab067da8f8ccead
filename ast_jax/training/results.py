"""The final evaluation of a run: its content, as text, and as pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ast_jax.config import ASTConfig, ProblemType
from ast_jax.data.datasets import Example
from ast_jax.training import plots
from ast_jax.training.evaluate import Predictions
from ast_jax.training.metrics import report, report_lines
from ast_jax.training.states import Record

SPLITS = ("validation", "test")


def final_report(
    record: Record,
    splits: Mapping[str, list[Example]],
    predictions: Callable[[list[Example]], Iterable[tuple[str, Predictions]]],
    config: ASTConfig,
) -> dict[str, Any]:
    """Return the content of `results.json`; see `Run.results`.

    Args:
        record: of the finished run.
        splits: examples by split.
        predictions: yields the name ("best" or "average") and the predictions of each model for some examples.
        config: the architecture.

    Raises:
        DataError: no example of a split can be read.
    """
    content: dict[str, Any] = {"epochs": len(record.history), "best": record.best_row, "last": record.history[-1]}
    for split in SPLITS:
        if splits[split]:
            found = predictions(splits[split])
            content[split] = {name: report(*one.measured(), config) for name, one in found}
    return content


def log_reports(content: dict[str, Any], log: Callable[[str], None]) -> None:
    """Log every report, a line at a time."""
    for split in SPLITS:
        for name, found in content.get(split, {}).items():
            log(f"{split}, best epoch:" if name == "best" else f"{split}, average of the epochs' weights:")
            for line in report_lines(found):
                log(f"  {line}".rstrip())


def draw(content: dict[str, Any], record: Record, config: ASTConfig, folder: pathlib.Path) -> None:
    """Draw the curves of the run, and the confusion matrix or the classes of the best epoch."""
    plots.curves(record.history, folder / "curves.png", record.metric)
    split = next((name for name in ("test", "validation") if name in content), None)
    if split is None or config.resolved_problem_type == ProblemType.REGRESSION:
        return
    best, title = content[split]["best"], f"{split}, epoch {content['best']['epoch']}"
    if best["confusion"] is not None:
        plots.confusion(best["confusion"], config.labels, folder / "confusion.png", title)
    elif best["ranked_classes"]:
        plots.ranked_classes(best, folder / "classes.png", title)
