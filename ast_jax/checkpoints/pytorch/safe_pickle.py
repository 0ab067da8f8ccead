"""A restricted pickle interpreter for PyTorch state dicts that imports and calls nothing.

Opcodes are interpreted one by one. A global is kept as its name and never resolved; only the names that tensors and
ordered dicts need are allowed. Time and memory are linear in the length of the pickle.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

STORAGES = {  # torch.<name>: dtype
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
ALLOWED_GLOBALS = {
    *(f"torch.{name}" for name in STORAGES),
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_parameter",
}
T = TypeVar("T")
RESAVE = "load it with PyTorch and save only the weights: torch.save(model.state_dict(), …)"


@dataclasses.dataclass(frozen=True)
class _Global:
    """A global of the pickle, by its dotted name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A contiguous array in the file."""

    key: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DamagedError(Exception):
    """The file is damaged or inconsistent."""


class UnsupportedError(Exception):
    """The file is intact, but contains something that is not allowed or not supported."""


def printable(text: object) -> str:
    """Return text from a file as one line without control characters."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text)[:2000])


def shortened(text: object) -> str:
    """Return the beginning of a name from a file."""
    text = printable(text)
    return text if len(text) < 60 else f"{text[:60]}…"


# Opcodes by what they do; all others raise UnsupportedError.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MEMO_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_MEMO_GETS = {"BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "LIST", "APPENDS", "DICT", "SETITEMS"}  # pop everything above the last mark
_NUM_POPPED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "BINPERSID": 1,
          "REDUCE": 2, "BUILD": 1}  # fmt: skip


def interpret(file: io.BytesIO, used: dict[str, Storage] | None = None) -> Any:
    """Return the content of the pickle at the file's position, tensors as `Tensor`; nothing is imported or called.

    Args:
        file: is left at the end of the pickle.
        used: if given, is filled with the storages of the pickle by key.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    for opcode, argument, _ in pickletools.genops(file):
        name, items = opcode.name, []
        if name in _TO_MARK:
            items, stack = stack, marks.pop()
        elif name in _NUM_POPPED:
            items = [stack.pop() for _ in range(_NUM_POPPED[name])][::-1]
        if name in _VALUES:
            stack.append(argument)
        elif name in _MEMO_PUTS:
            memo[len(memo) if name == "MEMOIZE" else expect(argument, int)] = stack[-1]
        elif name in _MEMO_GETS:
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
            stack.append(_allowed_global(".".join(expect(part, str) for part in parts)))
        elif name == "BINPERSID":
            stack.append(_storage(items[0], used))
        elif name == "REDUCE":
            stack.append(_build(expect(items[0], _Global).name, expect(items[1], tuple)))
        elif name == "BUILD":  # the attributes of an ordered dict: version numbers of modules
            expect(stack[-1], dict)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UnsupportedError(f"expected tensors and plain values, got the pickle opcode {name}; {RESAVE}")
    raise DamagedError("its pickle has no STOP opcode")


def expect(value: Any, kind: type[T]) -> T:
    """Return a value after checking its type.

    Raises:
        DamagedError: it has another type.
    """
    if not isinstance(value, kind):
        raise DamagedError(f"its pickle has a {type(value).__name__} instead of a {kind.__name__.strip('_').lower()}")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of alternating keys and values; only scalar keys, as hashing nested tuples can take very long."""
    keys, values = items[::2], items[1::2]
    for key in keys:
        if not isinstance(key, str | int | float | None) or (isinstance(key, int) and not abs(key) < 1 << 31):
            raise DamagedError(f"its pickle has a {type(key).__name__} as a key")  # large integers may collide
    return dict(zip(keys, values, strict=True))


def _allowed_global(name: str) -> _Global:
    """Return a global that tensors and ordered dicts need.

    Raises:
        UnsupportedError: any other.
    """
    if name not in ALLOWED_GLOBALS:
        raise UnsupportedError(
            f"expected tensors and plain values, got {shortened(name)} in the pickle, which was not run; "
            f"if you trust the file, {RESAVE}"
        )
    return _Global(name)


def _storage(identity: Any, used: dict[str, Storage] | None) -> Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, elements), and a view in old files."""
    kind, storage_type, key, _, _, *view = expect(identity, tuple)
    storage_name = expect(storage_type, _Global).name.removeprefix("torch.")
    if kind != "storage" or storage_name not in STORAGES or (view and view[0] is not None):
        raise DamagedError("its pickle has a storage id of an unknown form")
    storage = Storage(expect(key, str), STORAGES[storage_name])
    if used is not None:
        used[storage.key] = storage
    return storage


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the result of calling an allowed global, computed here."""
    if name == "collections.OrderedDict":
        pairs = expect(arguments[0], list) if arguments else []
        return _pairs([value for pair in pairs for value in expect(pair, tuple)])
    if name == "torch._utils._rebuild_parameter":
        return expect(arguments[0], Tensor)
    if name.startswith("torch._utils._rebuild_tensor"):
        storage, offset, shape, strides = arguments[:4]
        whole = [expect(value, int) for value in (offset, *expect(shape, tuple), *expect(strides, tuple))]
        if len(shape) != len(strides) or len(shape) > 32 or not all(0 <= value < 1 << 63 for value in whole):
            raise DamagedError("a tensor has an invalid shape, strides or offset")
        if len(arguments) > 6 and arguments[6]:  # {"neg": True} for example: negated lazily
            raise UnsupportedError(f"expected plain tensors, got one with a negative or conjugate bit; {RESAVE}")
        return Tensor(expect(storage, Storage), whole[0], shape, strides)
    raise DamagedError(f"its pickle calls {name}")
