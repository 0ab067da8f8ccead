"""Figures: created, styled and written by matplotlib, without pyplot's state and without a display."""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ast_jax.runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#666666"
DPI = 120
NAME_LENGTH = 40  # characters of a class name; the middle of longer ones is left out
# Fallbacks, where installed, for scripts that matplotlib's own font lacks.
OTHER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans Devanagari", "Nirmala UI", "Noto Sans Thai", "Leelawadee UI",
)  # fmt: skip


def short_name(label: str) -> str:
    """Return a class name on one line, shortened in the middle: beginnings and ends distinguish names."""
    label = " ".join(label.split())
    return label if len(label) <= NAME_LENGTH else f"{label[: NAME_LENGTH // 2]}…{label[1 - NAME_LENGTH // 2 :]}"


def new_figure(width: float, height: float) -> Figure:
    """Return a new figure of this size in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Apply matplotlib's default style and ours in place of the user's (dark backgrounds, LaTeX).

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib.style
        from matplotlib import font_manager
    except ImportError as error:
        raise ValueError("pictures need matplotlib; install it with: pip install 'ast-jax[plots]'") from error
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed)]
    ours = {"font.family": fonts, "font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "legend.frameon": False}
    ours |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.style.context(["default", ours]):
        yield


def save_figure(figure: Figure, path: str | pathlib.Path) -> None:
    """Write a figure as a PNG, atomically."""
    with drawing(), warnings.catch_warnings(), atomic_file(path) as name:
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box is drawn
        figure.savefig(name, format="png")
