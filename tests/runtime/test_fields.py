"""Dataclass fields are checked against their annotations, whatever kind these are."""

import dataclasses
import enum
import json
import os
import pathlib
import typing

import numpy as np
import pytest

from ast_jax.runtime.fields import check_types


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


ANNOTATIONS = {
    "bool": (bool, [(True, True)], [1, None, np.bool_(True)], "true or false"),
    "int": (int, [(3, 3), (np.int64(3), 3)], [True, 3.0, "3", None], "an integer"),
    "float": (
        float, [(0.5, 0.5), (2, 2.0), (np.float32(0.5), 0.5)],
        [True, "1", None, float("inf"), float("nan"), 10**400], "a finite number",
    ),
    "str": (str, [("a", "a"), (np.str_("a"), "a")], [1, None, b"a"], "a string"),
    "StrEnum": (Color, [("red", Color.RED), (Color.BLUE, Color.BLUE)], ["green", 1, None], "one of red, blue"),
    "Optional": (
        typing.Optional[float], [(None, None), (1, 1.0)], ["1", float("nan")], "None or a finite number"  # noqa: UP045
    ),
    "union": (str | None, [(None, None), ("a", "a")], [1], "None or a string"),
    "StrEnum or its value": (
        Color | str | None, [("red", Color.RED), (None, None)], ["green", 1], "None or one of red, blue"
    ),
    "names": (tuple[str, ...], [((), ()), (["a", "b"], ("a", "b"))], ["a", None, {}], "a tuple (any number of items, "),
    "path": (str | os.PathLike[str], [(pathlib.Path("a"), "a"), ("b", "b")], [None, b"a", 3], "a string or a path"),
    "pair": (int | tuple[int, int], [(3, 3), ([3, np.int32(4)], (3, 4))], [(1,), (1, 2, 3), (1, "2"), "1"],
             "an integer or a tuple (an integer, an integer)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_types_are_checked_and_made_plain(name):
    annotation, taken, refused, expected = ANNOTATIONS[name]
    cls = dataclasses.make_dataclass("Options", [("field", annotation)], frozen=True)
    for given, want in taken:
        options = cls(given)
        check_types(options)
        assert options.field == want
        assert type(options.field) is type(want)
        json.dumps(dataclasses.asdict(options))
    for given in refused:
        with pytest.raises(ValueError, match="field: expected ") as caught:
            check_types(cls(given))
        assert str(caught.value).startswith(f"field: expected {expected}")
        assert str(caught.value).endswith(f"got {given!r}")


def test_an_item_of_another_type_is_named():
    cls = dataclasses.make_dataclass("Options", [("names", tuple[str, ...])], frozen=True)
    with pytest.raises(ValueError, match=r"^names: expected a string, got 2$"):
        check_types(cls(("a", 2)))


@pytest.mark.parametrize(
    "annotation", [bytes, list[str], dict[str, int], int | list[int], tuple, typing.Any, enum.Enum]
)
def test_an_annotation_that_cannot_be_checked_is_a_type_error(annotation):
    """Otherwise its field would not be checked."""
    cls = dataclasses.make_dataclass("Options", [("field", annotation)], frozen=True)
    with pytest.raises(
        TypeError, match=r"annotation of Options\.field: expected None, bool, int, float, str, os\.PathLike"
    ):
        check_types(cls(None))


def test_annotations_as_strings_are_resolved():
    """As with `from __future__ import annotations`."""
    cls = dataclasses.make_dataclass("Options", [("field", "typing.Union[int, None]")], frozen=True)
    cls.__module__ = __name__
    with pytest.raises(ValueError, match=r"^field: expected None or an integer, got 'a'$"):
        check_types(cls("a"))
