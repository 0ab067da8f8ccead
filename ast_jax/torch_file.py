"""State dicts from and to PyTorch's `.pth` and `.bin` files, without PyTorch and without running any pickle's code.

A file that `torch.save` wrote is a zip archive (since PyTorch 1.6) or a row of pickles with raw numbers behind them.
The pickle says which tensor is which part of which storage. It is walked here one instruction at a time by an
interpreter that knows no way to call anything: a name in it is a name, and only those that tensors and ordered dicts
need are let in. Tensors are views into the mapped file, so that reading takes no memory to speak of.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .checkpoint import CheckpointError

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
WRAPPERS = ("state_dict", "model", "model_state_dict")  # what training scripts keep a state dict under
RESAVE = "load it with PyTorch and save the weights alone: torch.save(model.state_dict(), …)"

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 1 << 23  # names and shapes of some 30,000 tensors; a larger one is no state dict
EXPANSION = 4  # tensors may overlap and repeat, but hold at most this many times the bytes of the file
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, ..., lengths of its name and of its extra field
EXTRA_HEADER = struct.Struct("<2sH")  # of a field in it: name and length


@dataclasses.dataclass(frozen=True)
class _Name:
    """A module's attribute that a pickle names."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file."""

    key: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A strided part of a storage; counts are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _DamagedError(Exception):
    """What the file holds makes no sense; the message says what."""


class _RefusedError(Exception):
    """The file is whole, and holds what is not let in; the message says what."""


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the state dict in a file that `torch.save` wrote, as read-only arrays {name: array}.

    Read are the zip format and the older one; a state dict may lie under "state_dict", "model" or "model_state_dict".
    bfloat16 becomes `ml_dtypes.bfloat16`; all else is the NumPy type of the same name. Strides and shared storages are
    kept.

    Raises:
        CheckpointError: not such a file, damaged, or it holds anything but tensors, ordered dicts and plain values,
            none of which is run; or a TorchScript archive. One line, with the way out.
        OSError: the file cannot be opened.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path}: expected a file that torch.save wrote, got an empty one")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        content, storage = (_open_zip if mapped[:2] == b"PK" else _open_legacy)(mapped)
        tensors = _state_dict(content)
        used = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
        if used > EXPANSION * len(mapped):
            raise _DamagedError(f"its tensors would take {used:,} bytes, the file has {len(mapped):,}")
        return {name: _array(tensor, storage(tensor.storage)) for name, tensor in tensors.items()}
    except _RefusedError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, pickletools and struct raise many kinds for what is damaged
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path}: expected a state dict that torch.save wrote, got a damaged or foreign file ({reason[:200]})"
        ) from error


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """Find the dict of tensors in what a pickle holds."""
    for wrapper in ("", *WRAPPERS):
        found = content.get(wrapper) if wrapper and isinstance(content, dict) else content
        if isinstance(found, dict) and any(isinstance(value, _Tensor) for value in found.values()):
            break
    else:
        kind = f"a dict of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content)
        raise _RefusedError(f"expected a dict of tensors, or one under {' or '.join(WRAPPERS)}, got {kind}; {RESAVE}")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, _Tensor)):
            raise _RefusedError(f"{name}: expected a tensor, got {type(value).__name__}; {RESAVE}")
    return found


def _array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """Return the view of a storage that a tensor is."""
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32:
        raise _DamagedError("a tensor's shape and strides do not fit")
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        raise _DamagedError("a tensor has a negative size, stride or offset")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(storage):
        raise _DamagedError(f"a tensor reaches to element {last} of a storage of {len(storage)}")
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


Opened = tuple[Any, Callable[[_Storage], np.ndarray]]


def _open_zip(mapped: mmap.mmap) -> Opened:
    """Return what the pickle of a zip archive holds, and a function that finds a storage's numbers."""
    archive = zipfile.ZipFile(mapped)
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _DamagedError("a zip archive, but not of a model")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries or any(name.startswith(f"{root}code/") for name in entries):
        raise _RefusedError(
            "expected weights, got a TorchScript program; load it with PyTorch and save its weights alone: "
            "torch.save(torch.jit.load(…).state_dict(), …)"
        )

    checked = any(entry.CRC for entry in entries.values())  # torch.serialization.set_crc32_options(False) leaves zeros

    def read(name: str) -> memoryview:
        entry = entries.get(root + name)
        if entry is None:
            raise _DamagedError(f"there is no {root}{name} in it")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _DamagedError(f"{entry.filename} is compressed or encrypted")
        signature, name_length, extra_length = LOCAL_HEADER.unpack_from(mapped, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        data = memoryview(mapped)[start : start + entry.file_size]
        whole = signature == b"PK\3\4" and len(data) == entry.file_size
        if not whole or (checked and zlib.crc32(data) != entry.CRC):
            raise _DamagedError(f"{entry.filename} is cut off or its check sum is wrong")
        return data

    swapped = "byteorder" in {name.removeprefix(root) for name in entries} and bytes(read("byteorder")) == b"big"
    found: dict[str, memoryview] = {}

    def storage(wanted: _Storage) -> np.ndarray:
        if wanted.key not in found:
            found[wanted.key] = read(f"data/{wanted.key}")
        return _numbers(found[wanted.key], wanted.dtype, swapped)

    data = read("data.pkl")
    if len(data) > LARGEST_PICKLE:
        raise _DamagedError(f"its list of tensors has {len(data):,} bytes")
    return _interpret(io.BytesIO(data)), storage


def _open_legacy(mapped: mmap.mmap) -> Opened:
    """Do the same for the format before PyTorch 1.6: five pickles, then each storage's length and numbers."""
    file = io.BytesIO(mapped[:LARGEST_PICKLE])
    if mapped[:1] != b"\x80" or _interpret(file) != LEGACY_MAGIC:
        raise _DamagedError("it begins like neither of PyTorch's formats")
    _interpret(file)  # version
    system = _interpret(file)
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    used: dict[str, _Storage] = {}
    content = _interpret(file, used)
    keys = _interpret(file)
    places, start = {}, file.tell()
    for key in keys:
        if key not in used:
            raise _DamagedError(f"storage {key!r} has no tensor")
        (elements,) = struct.unpack_from(">q" if swapped else "<q", mapped, start)
        start, size = start + 8, elements * used[key].dtype.itemsize
        places[key] = memoryview(mapped)[start : start + size]
        if elements < 0 or len(places[key]) != size:
            raise _DamagedError("it is cut off")
        start += size
    return content, lambda wanted: _numbers(places[wanted.key], wanted.dtype, swapped)


def _numbers(data: memoryview, dtype: np.dtype, swapped: bool) -> np.ndarray:
    """Return bytes of the file as numbers, without a copy where their order is this machine's."""
    if not swapped:
        return np.frombuffer(data, dtype)
    return np.frombuffer(data, f"u{dtype.itemsize}").byteswap().view(dtype)


# What each pickle instruction does here; all that are not listed are refused by name.
_VALUES = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE",
           "UNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "STRING"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "LIST", "APPENDS", "DICT", "SETITEMS"}  # take all that was put since the last mark
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "BINPERSID": 1,
          "REDUCE": 2, "BUILD": 1}  # fmt: skip


def _interpret(file: io.BytesIO, used: dict[str, _Storage] | None = None) -> Any:
    """Return what the pickle at the file's place holds, tensors as `_Tensor`; nothing is imported or called.

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
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
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
            _expect(stack[-1], list).extend(items)
        elif name in ("EMPTY_DICT", "DICT"):
            stack.append(_pairs(items))
        elif name in ("SETITEM", "SETITEMS"):
            _expect(stack[-1], dict).update(_pairs(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = items or argument.split(" ", 1)
            stack.append(_admit(".".join(_expect(part, str) for part in parts)))
        elif name == "BINPERSID":
            stack.append(_storage(items[0], used))
        elif name == "REDUCE":
            stack.append(_build(_expect(items[0], _Name).text, _expect(items[1], tuple)))
        elif name == "BUILD":  # the attributes of an ordered dict: version numbers of modules
            _expect(stack[-1], dict)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"expected tensors and plain values, got the pickle instruction {name}; {RESAVE}")
    raise _DamagedError("its pickle has no end")


def _expect(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise _DamagedError(
            f"its pickle has a {type(value).__name__} where a {kind.__name__.strip('_').lower()} belongs"
        )
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of keys and values in turn; keys are plain, as the hash of nested tuples can take for ever."""
    keys, values = items[::2], items[1::2]
    for key in keys:
        _expect(key, (str, int, float, type(None)))
    return dict(zip(keys, values, strict=True))


def _admit(name: str) -> _Name:
    """Return a name that tensors and ordered dicts need.

    Raises:
        _RefusedError: any other.
    """
    if name not in ADMITTED:
        raise _RefusedError(
            f"expected tensors and plain values, got {name} in the pickle, which was not run; if you trust the file, "
            f"{RESAVE}"
        )
    return _Name(name)


def _storage(identity: Any, used: dict[str, _Storage] | None) -> _Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, elements), and a view in old files."""
    kind, storage_type, key, _, _, *view = _expect(identity, tuple)
    storage_name = _expect(storage_type, _Name).text.removeprefix("torch.")
    if kind != "storage" or storage_name not in STORAGES or (view and view[0] is not None):
        raise _DamagedError("its pickle names a storage in an unknown way")
    storage = _Storage(_expect(key, str), STORAGES[storage_name])
    if used is not None:
        used[storage.key] = storage
    return storage


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return what a call of an admitted name stands for."""
    if name == "collections.OrderedDict":
        pairs = _expect(arguments[0], list) if arguments else []
        return _pairs([value for pair in pairs for value in _expect(pair, tuple)])
    if name == "torch._utils._rebuild_parameter":
        return _expect(arguments[0], _Tensor)
    if name.startswith("torch._utils._rebuild_tensor"):
        storage, offset, shape, strides = arguments[:4]
        whole = [_expect(value, int) for value in (offset, *_expect(shape, tuple), *_expect(strides, tuple))]
        return _Tensor(_expect(storage, _Storage), whole[0], tuple(shape), tuple(strides))
    raise _DamagedError(f"its pickle calls {name}")


def write_torch_file(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as `torch.save` does: an ordered dict of tensors, each with a storage of its own.

    The numbers begin at multiples of 64 bytes, so that `torch.load(…, mmap=True)` can use them where they lie.

    Raises:
        OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    pickled = [b"\x80\x02", ordered_dict, b"("]
    for key, (name, array) in enumerate(state.items()):
        identity = [_text("storage"), f"ctorch\n{names[array.dtype]}\n".encode(), _text(str(key)), _text("cpu"),
                    _number(array.size)]  # fmt: skip
        steps = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
        shape, strides = (b"(" + b"".join(map(_number, sizes)) + b"t" for sizes in (array.shape, steps))
        pickled += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", *identity, b"tQ", _number(0), shape, strides,
                    b"\x89", ordered_dict, b"tR"]  # fmt: skip
    root = "archive"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), b"".join([*pickled, b"u."]))
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for key, array in enumerate(state.values()):
            entry = zipfile.ZipInfo(f"{root}/data/{key}")
            place = archive.fp.tell() + LOCAL_HEADER.size + len(entry.filename) + EXTRA_HEADER.size
            padding = -place % 64
            entry.extra = EXTRA_HEADER.pack(b"FB", padding) + bytes(padding)
            little = np.ascontiguousarray(array, array.dtype)
            archive.writestr(entry, little.view(np.uint8).reshape(-1).data if little.size else b"")
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _text(value: str) -> bytes:
    """Return the pickle instruction that puts a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    """Return the pickle instruction that puts a number of up to 63 bits."""
    return b"\x8a\x08" + struct.pack("<q", value)
