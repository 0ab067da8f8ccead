"""What a pickle of PyTorch's says about tensors, read by an interpreter that cannot call anything.

It is walked one instruction at a time. A name in it is a name: there is no way from it to what it names, and only those
that tensors and ordered dicts need are let in. Time and memory are in proportion to the pickle's length.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

STORAGES = {  # torch.<name>: what its elements are here
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
ADMITTED = {
    *(f"torch.{name}" for name in STORAGES),
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_parameter",
}
Kind = TypeVar("Kind")
RESAVE = "load it with PyTorch and save the weights alone: torch.save(model.state_dict(), …)"


@dataclasses.dataclass(frozen=True)
class _Name:
    """A module's attribute that a pickle names."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided part of a storage; counts are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DamagedError(Exception):
    """What the file holds makes no sense; the message says what."""


class RefusedError(Exception):
    """The file is whole, and holds what is not let in; the message says what."""


def shown(text: object) -> str:
    """Return a text from a file as one line that moves no terminal's cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text)[:2000])


def short(text: object) -> str:
    """Return the beginning of a name from a file."""
    text = shown(text)
    return text if len(text) < 60 else f"{text[:60]}…"


# What each pickle instruction does here; all that are not listed are refused by name.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "LIST", "APPENDS", "DICT", "SETITEMS"}  # take all that was put since the last mark
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "BINPERSID": 1,
          "REDUCE": 2, "BUILD": 1}  # fmt: skip


def interpret(file: io.BytesIO, used: dict[str, Storage] | None = None) -> Any:
    """Return what the pickle at the file's place holds, tensors as `Tensor`; nothing is imported or called.

    Args:
        file: is left behind the pickle.
        used: takes the storages that the pickle names.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    for opcode, argument, _ in pickletools.genops(file):
        name, items = opcode.name, []
        if name in _TO_MARK:
            items, stack = stack, marks.pop()
        elif name in _TAKEN:
            items = [stack.pop() for _ in range(_TAKEN[name])][::-1]
        if name in _VALUES:
            stack.append(argument)
        elif name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else expect(argument, int)] = stack[-1]
        elif name in _GETS:
            stack.append(memo[expect(argument, int)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(items))
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            expect(stack[-1], list).extend(items)
        elif name in ("EMPTY_DICT", "DICT"):
            stack.append(_pairs(items))
        elif name in ("SETITEM", "SETITEMS"):
            expect(stack[-1], dict).update(_pairs(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = items or expect(argument, str).split(" ", 1)
            stack.append(_admit(".".join(expect(part, str) for part in parts)))
        elif name == "BINPERSID":
            stack.append(_storage(items[0], used))
        elif name == "REDUCE":
            stack.append(_build(expect(items[0], _Name).text, expect(items[1], tuple)))
        elif name == "BUILD":  # the attributes of an ordered dict: version numbers of modules
            expect(stack[-1], dict)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"expected tensors and plain values, got the pickle instruction {name}; {RESAVE}")
    raise DamagedError("its pickle has no end")


def expect(value: Any, kind: type[Kind]) -> Kind:
    """Return a value of the type that belongs there.

    Raises:
        DamagedError: it is of another.
    """
    if not isinstance(value, kind):
        raise DamagedError(
            f"its pickle has a {type(value).__name__} where a {kind.__name__.strip('_').lower()} belongs"
        )
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of keys and values in turn; keys are plain, as the hash of nested tuples can take for ever."""
    keys, values = items[::2], items[1::2]
    for key in keys:
        if not isinstance(key, str | int | float | None) or (isinstance(key, int) and not abs(key) < 1 << 31):
            raise DamagedError(f"its pickle has a {type(key).__name__} as a key")  # large numbers have equal hashes
    return dict(zip(keys, values, strict=True))


def _admit(name: str) -> _Name:
    """Return a name that tensors and ordered dicts need.

    Raises:
        RefusedError: any other.
    """
    if name not in ADMITTED:
        raise RefusedError(
            f"expected tensors and plain values, got {short(name)} in the pickle, which was not run; "
            f"if you trust the file, {RESAVE}"
        )
    return _Name(name)


def _storage(identity: Any, used: dict[str, Storage] | None) -> Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, elements), and a view in old files."""
    kind, storage_type, key, _, _, *view = expect(identity, tuple)
    storage_name = expect(storage_type, _Name).text.removeprefix("torch.")
    if kind != "storage" or storage_name not in STORAGES or (view and view[0] is not None):
        raise DamagedError("its pickle names a storage in an unknown way")
    storage = Storage(expect(key, str), STORAGES[storage_name])
    if used is not None:
        used[storage.key] = storage
    return storage


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return what a call of an admitted name stands for."""
    if name == "collections.OrderedDict":
        pairs = expect(arguments[0], list) if arguments else []
        return _pairs([value for pair in pairs for value in expect(pair, tuple)])
    if name == "torch._utils._rebuild_parameter":
        return expect(arguments[0], Tensor)
    if name.startswith("torch._utils._rebuild_tensor"):
        storage, offset, shape, strides = arguments[:4]
        whole = [expect(value, int) for value in (offset, *expect(shape, tuple), *expect(strides, tuple))]
        if len(shape) != len(strides) or len(shape) > 32 or not all(0 <= value < 1 << 63 for value in whole):
            raise DamagedError("a tensor's sizes, strides or offset make no sense")
        if len(arguments) > 6 and arguments[6]:  # such as {"neg": True}: the storage has the opposite sign
            raise RefusedError(f"expected plain tensors, got one with a negative or conjugate bit; {RESAVE}")
        return Tensor(expect(storage, Storage), whole[0], shape, strides)
    raise DamagedError(f"its pickle calls {name}")
