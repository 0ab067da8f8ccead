"""Fields of dataclasses, checked against their annotations at run time and converted to plain values."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class _MismatchError(ValueError):
    """A value that is not of the expected type."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected {expected}, got {got!r}")


class _Kind(NamedTuple):
    """A type of field: its description in messages, and its conversion to plain values, which raises _MismatchError."""

    expected: str
    plain: Callable[[Any], Any]


def _scalar(expected: str, holds: Callable[[Any], bool], plain: Callable[[Any], Any]) -> _Kind:
    def checked(value: Any) -> Any:
        if not holds(value):
            raise _MismatchError(expected, value)
        return plain(value)

    return _Kind(expected, checked)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


_SCALARS: dict[Any, _Kind] = {
    types.NoneType: _scalar("None", lambda value: value is None, lambda _: None),
    bool: _scalar("true or false", lambda value: isinstance(value, bool), bool),
    int: _scalar("an integer", _is_integer, int),
    float: _scalar("a finite number", _is_finite, float),
    str: _scalar("a string", lambda value: isinstance(value, str), str),
    os.PathLike[str]: _scalar("a path", lambda value: isinstance(value, os.PathLike), os.fspath),
}


def _kind(annotation: Any) -> _Kind:
    """Return the kind of an annotation: one of `_SCALARS`, a StrEnum, a tuple or a union of these.

    A `str` beside a StrEnum in a union stands for the enum's values, which become members.

    Raises:
        TypeError: any other annotation.
    """
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_enum(annotation):
        values = tuple(str(member) for member in annotation)
        expected = f"one of {', '.join(values)}"
        return _scalar(expected, lambda value: isinstance(value, str) and value in values, annotation)
    if origin in (typing.Union, types.UnionType):
        chosen = [one for one in arguments if not (one is str and any(map(_is_enum, arguments)))]
        return _union([_kind(one) for one in sorted(chosen, key=lambda one: one is not types.NoneType)])
    if origin is tuple and arguments:
        return _tuple([_kind(one) for one in arguments if one is not ...], any_length=arguments[-1] is ...)
    names = "None, bool, int, float, str, os.PathLike[str], a StrEnum, a tuple or a union of these"
    raise TypeError(f"expected {names}, got {annotation!r}")


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.StrEnum)


def _union(kinds: Sequence[_Kind]) -> _Kind:
    expected = " or ".join(kind.expected for kind in kinds)

    def plain(value: Any) -> Any:
        for kind in kinds:
            with contextlib.suppress(_MismatchError):
                return kind.plain(value)
        raise _MismatchError(expected, value)

    return _Kind(expected, plain)


def _tuple(kinds: Sequence[_Kind], *, any_length: bool) -> _Kind:
    """Return the kind of `tuple[X, ...]` or `tuple[X, Y]`; a list, as JSON has it, is converted."""
    items = f"any number of items, each {kinds[0].expected}" if any_length else ", ".join(k.expected for k in kinds)
    expected = f"a tuple ({items})"

    def plain(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, tuple | list) or not (any_length or len(value) == len(kinds)):
            raise _MismatchError(expected, value)
        each = [kinds[0]] * len(value) if any_length else kinds
        return tuple(kind.plain(item) for kind, item in zip(each, value, strict=True))

    return _Kind(expected, plain)


@functools.cache
def _field_kinds(cls: type[DataclassInstance]) -> dict[str, _Kind]:
    """Return the kind of each field of a dataclass."""
    hints, kinds = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        try:
            kinds[field.name] = _kind(hints[field.name])
        except TypeError as error:
            raise TypeError(f"the annotation of {cls.__name__}.{field.name}: {error}") from None
    return kinds


def check_types(config: DataclassInstance) -> None:
    """Check the fields of a frozen dataclass against their annotations, and convert them to plain values.

    NumPy's numbers become `int` and `float`, paths strings, lists tuples, and strings members of a StrEnum, so that
    JSON can write a field and equal fields have equal hashes.

    Raises:
        TypeError: an annotation that `_kind` does not know.
        ValueError: a value of another type, or a float that is not finite.
    """
    for name, kind in _field_kinds(type(config)).items():
        try:
            object.__setattr__(config, name, kind.plain(getattr(config, name)))
        except _MismatchError as error:
            raise ValueError(f"{name}: {error}") from None
