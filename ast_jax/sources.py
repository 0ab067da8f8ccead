"""Where PyTorch weights are found: folders, files, shards, and state dicts in memory; all as arrays by name.

Files are mapped, not copied: their tensors are views that are read when they are used.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .checkpoint import CONFIG_FILE, CheckpointError, read_json
from .features import PREPROCESSOR_FILE
from .torch_file import read_torch_file

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json")  # the first that is there is read
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A state dict and what lay beside it.

    Attributes:
        name: for messages.
        state: arrays by name.
        config: the content of config.json, or None.
        frontend: the content of preprocessor_config.json, or None.
        folder: where both lay, for messages.
    """

    name: str
    state: Mapping[str, np.ndarray]
    config: Mapping[str, Any] | None = None
    frontend: Mapping[str, Any] | None = None
    folder: str = ""


def read_source(source: Any) -> Source:
    """Read the weights of a folder, a file, a state dict in memory, or a live PyTorch model.

    Raises:
        CheckpointError: nothing there, or files that are damaged, incomplete or of another kind.
    """
    if isinstance(source, Mapping):
        return Source("state dict", {name: _as_numpy(name, value) for name, value in source.items()})
    if hasattr(source, "state_dict"):
        config = source.config.to_dict() if hasattr(getattr(source, "config", None), "to_dict") else None
        state = read_source(source.state_dict()).state
        return Source(type(source).__name__, state, config and json.loads(json.dumps(config, default=str)))
    path = pathlib.Path(source)
    if path.is_dir():
        return Source(str(path), _read_folder(path), *_beside(path), str(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a folder or a file of weights, found none")
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    return Source(str(path), state, *_beside(path.parent), str(path.parent))


def _beside(folder: pathlib.Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the content of the two JSON files of a Hugging Face folder, None for one that is not there."""
    config, frontend = (
        read_json(folder / name) if (folder / name).is_file() else None for name in (CONFIG_FILE, PREPROCESSOR_FILE)
    )
    return config, frontend


def _read_folder(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the weights of a Hugging Face folder, in one file or in shards."""
    if not (folder / CONFIG_FILE).is_file():
        hint = f"; a run's checkpoint is {folder / 'best'}" if (folder / "best" / CONFIG_FILE).is_file() else ""
        raise CheckpointError(
            f"{folder}: expected a checkpoint or a Hugging Face folder, found no {CONFIG_FILE} in it{hint}"
        )
    present = [name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        raise CheckpointError(f"{folder}: expected {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}, found none of them")
    if not present[0].endswith(".json"):
        return read_source(folder / present[0]).state
    index = folder / present[0]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index}: expected the name of a file for each tensor under weight_map")
    state: dict[str, np.ndarray] = {}
    for shard in sorted(set(shards.values())):
        if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names the file {shard!r}, which is not in {folder}")
        tensors = read_source(folder / shard).state
        listed = {name for name, file in shards.items() if file == shard}
        if tensors.keys() != listed:
            wrong = ", ".join(sorted(tensors.keys() ^ listed))
            raise CheckpointError(f"{folder / shard}: expected the tensors that {index.name} lists, differing: {wrong}")
        state |= tensors
    return state


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file as they are, bfloat16 included, as read-only views into it.

    Raises:
        CheckpointError: damaged or truncated, or a tensor of another kind of number.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # checks the header and every place in it; its arrays know no bfloat16
            pass
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            expected = ", ".join(_SAFETENSORS_DTYPES)
            raise CheckpointError(f"{path}: {name}: expected one of {expected}, got {entry['dtype']}")
    data = memoryview(mapped)[start:]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """Return a tensor of any library as a NumPy array; PyTorch's bfloat16, which NumPy lacks, by its bits."""
    if type(value).__module__.split(".")[0] == "torch":
        import torch

        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
        return value.numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise CheckpointError(f"state dict: {name}: expected a tensor, got {type(value).__name__}")
    return array
