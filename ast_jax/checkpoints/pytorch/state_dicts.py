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

from ast_jax.checkpoints.locate import resolve
from ast_jax.checkpoints.pytorch.files import read_torch_file
from ast_jax.checkpoints.tree import CheckpointError, as_checkpoint_errors
from ast_jax.config import CONFIG_FILE, read_json

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json")  # the first that is there is read

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A state dict and what lay beside it.

    Attributes:
        name: for messages, and for a file's strides.
        label: what is kept as the place where the weights came from: a file's name without its folder, a Hub id.
        state: arrays by name.
        folder: where `config.json` and `preprocessor_config.json` may lie, or None.
        live_config: of a live model, as it would write it, or None.
    """

    name: str
    label: str
    state: Mapping[str, np.ndarray]
    folder: pathlib.Path | None = None
    live_config: Mapping[str, Any] | None = None

    def read_json(self, name: str) -> Mapping[str, Any] | None:
        """Return the content of a JSON file beside the weights, None where there is none.

        Raises:
            CheckpointError: it is there, and no JSON object.
        """
        if name == CONFIG_FILE and self.live_config is not None:
            return self.live_config
        if self.folder is None or not (self.folder / name).is_file():
            return None
        with as_checkpoint_errors():
            return read_json(self.folder / name)

    def where(self, name: str) -> str:
        """Return what to call a JSON file beside the weights in a message."""
        return f"{self.folder or self.name}/{name}"


def read_source(source: Any, name: str | None = None) -> Source:
    """Read the weights of a folder, a file, a Hub id, a state dict in memory, or a live PyTorch model.

    Args:
        source: what to read.
        name: what it is called, where `source` is a download's folder.

    Raises:
        CheckpointError: nothing there, or files that are damaged, incomplete or of another kind.
        ConnectionError: a Hub id, and the Hub cannot be reached.
    """
    if isinstance(source, Mapping):
        for key in source:
            if not isinstance(key, str):
                raise CheckpointError(f"state dict: {key!r}: expected a name, got {type(key).__name__}")
        return Source("state dict", "state dict", {key: _as_numpy(key, value) for key, value in source.items()})
    if hasattr(source, "state_dict"):
        model = getattr(source, "module", source)  # DataParallel's
        config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else None
        live = config and json.loads(json.dumps(config, default=str))
        kind = type(model).__name__
        return Source(kind, kind, read_source(source.state_dict()).state, live_config=live)
    try:
        path = pathlib.Path(source)
    except TypeError as error:
        raise CheckpointError(
            f"expected a folder, a file, a Hub id, a state dict or a model, got {type(source).__name__}"
        ) from error
    name = os.fspath(source) if name is None else name
    path = path if path.exists() else resolve(source)
    label = path.resolve().name if pathlib.Path(name).exists() else name
    if path.is_dir():
        return Source(name, label, _read_folder(path), path)
    return Source(name, label, _read_file(path), path.parent)


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


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
        return _read_file(folder / present[0])
    index = folder / present[0]
    with as_checkpoint_errors():
        shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index}: expected the name of a file for each tensor under weight_map")
    state: dict[str, np.ndarray] = {}
    for shard in sorted(set(shards.values())):
        if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names the file {shard!r}, which is not in {folder}")
        tensors = _read_file(folder / shard)
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
    try:
        if type(value).__module__.split(".")[0] == "torch":
            import torch

            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:
                return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
            return value.numpy()
        array = np.asarray(value)
    except Exception as error:  # a library's tensor without data, of a dtype that NumPy lacks, or no tensor at all
        raise CheckpointError(f"state dict: {name}: expected a tensor of numbers ({error})") from error
    if array.dtype == object:
        raise CheckpointError(f"state dict: {name}: expected a tensor, got {type(value).__name__}")
    return array
