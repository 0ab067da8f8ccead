"""The final evaluation of a run: its content, as text, and as pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from ast_jax.config import ASTConfig, ProblemType
from ast_jax.training import plots
from ast_jax.training.evaluate import Predictions
from ast_jax.training.metrics import report, report_lines
from ast_jax.training.states import Record

SPLITS = ("validation", "test")


def summary(record: Record) -> dict[str, Any]:
    """Return the number of epochs, and the rows of the best and of the last one."""
    return {"epochs": len(record.history), "best": record.best_row, "last": record.history[-1]}


def add(content: dict[str, Any], split: str, name: str, found: Predictions, config: ASTConfig) -> None:
    """Add the report of a model ("best" or "average") on a split.

    Raises:
        DataError: no example of the split can be read.
    """
    content.setdefault(split, {})[name] = report(*found.measured(), config)


def log_reports(content: dict[str, Any], log: Callable[[str], None]) -> None:
    """Log every report, a line at a time."""
    for split in SPLITS:
        for name, found in content.get(split, {}).items():
            log(f"{split}, best epoch:" if name == "best" else f"{split}, average of the epochs' weights:")
            for line in report_lines(found):
                log(f"  {line}".rstrip())


def draw(content: dict[str, Any], record: Record, config: ASTConfig, folder: pathlib.Path) -> None:
    """Draw the curves of the run, and the confusion matrix or the classes of the best epoch."""
    plots.curves(record.history, folder / "curves.png")
    split = next((name for name in ("test", "validation") if name in content), None)
    if split is None or config.resolved_problem_type == ProblemType.REGRESSION:
        return
    best, title = content[split]["best"], f"{split}, epoch {content['best']['epoch']}"
    if best["confusion"] is not None:
        plots.confusion(best["confusion"], config.labels, folder / "confusion.png", title)
    elif best["ranked_classes"]:
        plots.ranked_classes(best, folder / "classes.png", title)
