"""State dicts from folders, files, shards, memory and live models, as {name: NumPy array}.

Files are memory-mapped: tensors are views whose data is read on access.
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
from ast_jax.model.tree import differences

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json")  # the first that exists is read

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A state dict and the configuration files beside it.

    Attributes:
        name: for messages, and for strides in a file name.
        label: for the provenance: a file name without its folder, or a Hub id.
        state: arrays by name.
        folder: with `config.json` and `preprocessor_config.json`, if they exist; None for weights in memory.
        live_config: the configuration of a live model, or None.
    """

    name: str
    label: str
    state: Mapping[str, np.ndarray]
    folder: pathlib.Path | None = None
    live_config: Mapping[str, Any] | None = None

    def read_json(self, name: str) -> Mapping[str, Any] | None:
        """Return the content of a JSON file beside the weights, None if it does not exist.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        if name == CONFIG_FILE and self.live_config is not None:
            return self.live_config
        if self.folder is None or not (self.folder / name).is_file():
            return None
        with as_checkpoint_errors():
            return read_json(self.folder / name)

    def path_of(self, name: str) -> str:
        """Return the path of a JSON file beside the weights, for messages."""
        return f"{self.folder or self.name}/{name}"


def read_source(source: Any, name: str | None = None) -> Source:
    """Read the weights of a folder, a file, a Hub id, a state dict in memory, or a live PyTorch model.

    Args:
        source: what to read.
        name: for messages; default is the path. A Hub id where `source` is the folder of its download.

    Raises:
        CheckpointError: `source` does not exist, or is damaged, incomplete or of another format.
        ConnectionError: `source` is a Hub id, and the Hub cannot be reached.
    """
    if isinstance(source, Mapping):
        for key in source:
            if not isinstance(key, str):
                raise CheckpointError(f"state dict: {key!r}: expected a name, got {type(key).__name__}")
        return Source("state dict", "state dict", {key: _as_numpy(key, value) for key, value in source.items()})
    if hasattr(source, "state_dict"):
        model = getattr(source, "module", source)  # inside DataParallel
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
    """Read the weights of a Hugging Face folder, a single file or shards."""
    if not (folder / CONFIG_FILE).is_file():
        hint = f"; the checkpoint of a run is {folder / 'best'}" if (folder / "best" / CONFIG_FILE).is_file() else ""
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
        raise CheckpointError(f"{index}: expected a file name for each tensor under weight_map")
    state: dict[str, np.ndarray] = {}
    for shard in sorted(set(shards.values())):
        if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index}: lists the file {shard!r}, which is not in {folder}")
        tensors = _read_file(folder / shard)
        listed = dict.fromkeys(name for name, file in shards.items() if file == shard)
        if different := differences(listed, {name: tensor.shape for name, tensor in tensors.items()}):
            raise CheckpointError(f"{folder / shard}: the tensors are not those that {index.name} lists; {different}")
        state |= tensors
    return state


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file, bfloat16 included, as read-only views of the mapped file.

    Raises:
        CheckpointError: damaged or truncated, or a tensor of an unsupported dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # validates the header and its offsets; its NumPy arrays lack bfloat16
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
    """Return a tensor of any library as a NumPy array; PyTorch's bfloat16, which NumPy lacks, is reinterpreted."""
    try:
        if type(value).__module__.split(".")[0] == "torch":
            import torch

            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:
                return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
            return value.numpy()
        array = np.asarray(value)
    except Exception as error:  # a tensor without data or of a dtype that NumPy lacks, or not a tensor
        raise CheckpointError(f"state dict: {name}: expected a tensor of numbers ({error})") from error
    if array.dtype == object:
        raise CheckpointError(f"state dict: {name}: expected a tensor, got {type(value).__name__}")
    return array
