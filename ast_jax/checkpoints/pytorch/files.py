"""Reading and writing PyTorch's `.pth` and `.bin` files, without PyTorch and without executing pickles.

A file that `torch.save` wrote is a zip archive (since PyTorch 1.6) or a sequence of pickles followed by the storages.
The pickle maps tensors to parts of storages; `safe_pickle` interprets it. Tensors are views of the memory-mapped file,
so that reading allocates next to nothing.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ast_jax.checkpoints.pytorch.safe_pickle import (
    RESAVE,
    STORAGES,
    DamagedError,
    Storage,
    Tensor,
    UnsupportedError,
    expect,
    interpret,
    printable,
    shortened,
)
from ast_jax.checkpoints.tree import CheckpointError

WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys of the state dict in checkpoints of training scripts
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE_BYTES = 1 << 20  # enough for the names and shapes of 4,000 tensors
MAX_EXPANSION = 4  # tensors may overlap and repeat, up to this many times the size of the file
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, ..., lengths of its name and of its extra field
EXTRA_HEADER = struct.Struct("<2sH")  # of an extra field: name and length


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the state dict in a file that `torch.save` wrote, as read-only arrays {name: array}.

    Reads the zip format and the one before PyTorch 1.6; the state dict may be nested under "state_dict", "model" or
    "model_state_dict". bfloat16 becomes `ml_dtypes.bfloat16`, any other dtype the NumPy dtype of the same name. Strides
    and shared storages are preserved.

    Raises:
        CheckpointError: not such a file, damaged, a TorchScript archive, or it contains anything but tensors, ordered
            dicts and plain values, which is not executed. One line that says how to save the weights instead.
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
        if used > MAX_EXPANSION * len(mapped):
            raise DamagedError(f"its tensors would take {used:,} bytes, the file has {len(mapped):,}")
        return {name: _view(tensor, storage(tensor.storage)) for name, tensor in tensors.items()}
    except UnsupportedError as error:
        raise CheckpointError(f"{path}: {printable(error)}") from error
    except Exception as error:  # zipfile, pickletools and struct raise many types for damaged files
        reason = printable(error) or type(error).__name__
        raise CheckpointError(
            f"{path}: expected a state dict that torch.save wrote, got a damaged or another file ({reason[:200]})"
        ) from error


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Return the dict of tensors in the content of a pickle."""
    for wrapper in (*WRAPPERS, ""):
        found = content.get(wrapper) if wrapper and isinstance(content, dict) else content
        if isinstance(found, dict) and any(isinstance(value, Tensor) for value in found.values()):
            break
    else:
        kind = type(content).__name__.strip("_").lower()
        if isinstance(content, dict):
            kind = f"a dict of {', '.join(map(shortened, list(content)[:5]))}"
        raise UnsupportedError(
            f"expected a dict of tensors, or one under {' or '.join(WRAPPERS)}, got {kind}; {RESAVE}"
        )
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UnsupportedError(f"{shortened(name)}: expected a tensor, got {type(value).__name__}; {RESAVE}")
    return found


def _view(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Return a tensor as a view of its storage."""
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(storage):
        raise DamagedError(f"a tensor uses element {last} of a storage of {len(storage)}")
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


class _LimitedReader:
    """A file for zipfile that limits the central directory to a megabyte: parsed, it takes twenty times its size."""

    def __init__(self, mapped: mmap.mmap):
        self._mapped, self.tell = mapped, mapped.tell

    def read(self, size: int = -1, /) -> bytes:
        if size > MAX_PICKLE_BYTES:
            raise DamagedError(f"its central directory has {size:,} bytes")
        return self._mapped.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._mapped.seek(offset, whence)  # type: ignore[arg-type]  # typeshed asks for a literal
        return self._mapped.tell()


Opened = tuple[Any, Callable[[Storage], np.ndarray]]


def _open_zip(mapped: mmap.mmap) -> Opened:
    """Return the content of the pickle in a zip archive, and a function that returns the data of a storage."""
    archive = zipfile.ZipFile(_LimitedReader(mapped))
    entries = {entry.filename: entry for entry in archive.infolist()}
    starts = sorted(entry.header_offset for entry in archive.infolist())
    if len(entries) < len(starts):
        raise DamagedError("it has two entries of the same name")
    ends = dict(zip(starts, [*starts[1:], archive.start_dir], strict=True))
    if len(ends) < len(starts):
        raise DamagedError("it has two entries at the same offset")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise DamagedError("a zip archive without a single data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries or any(name.startswith(f"{root}code/") for name in entries):
        raise UnsupportedError(
            "expected weights, got a TorchScript program; load it with PyTorch and save only the weights: "
            "torch.save(torch.jit.load(…).state_dict(), …)"
        )

    checked = any(entry.CRC for entry in entries.values())  # zeros after torch.serialization.set_crc32_options(False)

    def read(name: str) -> memoryview:
        entry = entries.get(root + name)
        if entry is None:
            raise DamagedError(f"it has no entry {root}{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise DamagedError(f"{entry.filename} is compressed or encrypted")
        signature, name_length, extra_length = LOCAL_HEADER.unpack_from(mapped, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        data = memoryview(mapped)[start : start + entry.file_size]
        whole = signature == b"PK\3\4" and start + entry.file_size <= ends[entry.header_offset]
        if not whole or (checked and zlib.crc32(data) != entry.CRC):
            raise DamagedError(f"{entry.filename} is truncated or its checksum is wrong")
        return data

    order = read("byteorder") if f"{root}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise DamagedError("its byte order is unknown")
    found: dict[str, np.ndarray] = {}

    def storage(wanted: Storage) -> np.ndarray:
        if wanted.key not in found:
            found[wanted.key] = _as_array(read(f"data/{wanted.key}"), wanted.dtype, order == b"big")
        if found[wanted.key].dtype != wanted.dtype:
            raise DamagedError(f"storage {wanted.key!r} has two dtypes")
        return found[wanted.key]

    data = read("data.pkl")
    if len(data) > MAX_PICKLE_BYTES:
        raise DamagedError(f"its pickle has {len(data):,} bytes")
    return interpret(io.BytesIO(data)), storage


def _open_legacy(mapped: mmap.mmap) -> Opened:
    """Do the same for the format before PyTorch 1.6: five pickles, then the length and data of each storage."""
    file = io.BytesIO(mapped[:MAX_PICKLE_BYTES])
    if mapped[:1] != b"\x80" or interpret(file) != LEGACY_MAGIC:
        raise DamagedError("it has the signature of neither of PyTorch's formats")
    interpret(file)  # version
    interpret(file)  # the machine; its byte order is irrelevant, as this format is always little-endian
    used: dict[str, Storage] = {}
    content = interpret(file, used)
    keys = interpret(file)
    places, start = {}, file.tell()
    for key in expect(keys, list):
        if expect(key, str) not in used:
            raise DamagedError(f"storage {key!r} has no tensor")
        (elements,) = struct.unpack_from("<q", mapped, start)
        start, size = start + 8, elements * used[key].dtype.itemsize
        places[key] = memoryview(mapped)[start : start + size]
        if elements < 0 or len(places[key]) != size:
            raise DamagedError("it is truncated")
        start += size
    return content, lambda wanted: np.frombuffer(places[wanted.key], wanted.dtype)


def _as_array(data: memoryview, dtype: np.dtype, swapped: bool) -> np.ndarray:
    """Return bytes of the file as an array, copied only if the byte order has to be swapped."""
    if not swapped:
        return np.frombuffer(data, dtype)
    return np.frombuffer(data, f"u{dtype.itemsize}").byteswap().view(dtype)


def write_torch_file(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Write a state dict in the format of `torch.save`: an ordered dict of tensors, each with its own storage.

    The data is aligned to 64 bytes, so that `torch.load(…, mmap=True)` can use it in place.

    Args:
        path: the file.
        state: arrays of the dtypes in `STORAGES`.

    Raises:
        OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    pickled = [b"\x80\x02", ordered_dict, b"("]
    for key, (name, array) in enumerate(state.items()):
        identity = [_text("storage"), f"ctorch\n{names[array.dtype]}\n".encode(), _text(str(key)), _text("cpu"),
                    _int(array.size)]  # fmt: skip
        steps = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
        shape, strides = (b"(" + b"".join(map(_int, sizes)) + b"t" for sizes in (array.shape, steps))
        pickled += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", *identity, b"tQ", _int(0), shape, strides,
                    b"\x89", ordered_dict, b"tR"]  # fmt: skip
    root = "archive"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), b"".join([*pickled, b"u."]))
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for key, array in enumerate(state.values()):
            entry = zipfile.ZipInfo(f"{root}/data/{key}")
            assert archive.fp is not None  # open
            place = archive.fp.tell() + LOCAL_HEADER.size + len(entry.filename) + EXTRA_HEADER.size
            padding = -place % 64
            entry.extra = EXTRA_HEADER.pack(b"FB", padding) + bytes(padding)
            little = np.ascontiguousarray(array, array.dtype)
            archive.writestr(entry, little.view(np.uint8).reshape(-1).data if little.size else b"")
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _text(value: str) -> bytes:
    """Return the pickle opcode that pushes a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    """Return the pickle opcode that pushes an integer of up to 63 bits."""
    return b"\x8a\x08" + struct.pack("<q", value)
