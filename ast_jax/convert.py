"""PyTorch checkpoints to parameters, without PyTorch: one literal table a source format.

Each row of a table says where one PyTorch tensor goes: its name with {n} for the layer, the path in the parameter tree,
where in that array it lands, and how it is turned round. Every tensor is used or the source is refused, and every place
is filled exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    CheckpointError,
    check_frontend,
    flatten,
    raise_differences,
    read_config,
    unflatten,
    widen,
)
from .config import ASTConfig, FrontendConfig
from .features import PREPROCESSOR_FILE

WEIGHTS_FILE = "model.safetensors"
SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BODY_PREFIX = "audio_spectrogram_transformer."

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one tensor goes.

    Attributes:
        source: name in the PyTorch state dict; {n} stands for the layer.
        target: path in the parameter tree.
        part: of query, key, value (0, 1, 2), which share one array; None for all else.
        turn: the PyTorch tensor, shaped for its place.
    """

    source: str
    target: str
    turn: Callable[[Array, ASTConfig], Array]
    part: int | None = None


def _same(tensor: Array, config: ASTConfig) -> Array:
    return tensor


def _token(tensor: Array, config: ASTConfig) -> Array:
    """[1, 1, D] -> [D]."""
    return tensor[0, 0]


def _positions(tensor: Array, config: ASTConfig) -> Array:
    """[1, N, D] -> [N, D]."""
    return tensor[0]


def _dense(tensor: Array, config: ASTConfig) -> Array:
    """[out, in] -> [in, out]."""
    return tensor.T


def _patch_kernel(tensor: Array, config: ASTConfig) -> Array:
    """[D, 1, Pf, Pt] -> [Pf, Pt, 1, D]."""
    return tensor.transpose(2, 3, 1, 0)


def _head_kernel(tensor: Array, config: ASTConfig) -> Array:
    """[D, D] -> [D, H, D/H]: the output features are split into heads."""
    return tensor.T.reshape(config.hidden_size, config.num_attention_heads, -1)


def _head_bias(tensor: Array, config: ASTConfig) -> Array:
    """[D] -> [H, D/H]."""
    return tensor.reshape(config.num_attention_heads, -1)


def _out_kernel(tensor: Array, config: ASTConfig) -> Array:
    """[D, D] -> [H, D/H, D]: the input features are the heads'."""
    return tensor.T.reshape(config.num_attention_heads, -1, config.hidden_size)


# The names in every Hugging Face file on disk, whichever version of transformers wrote it.
HUGGING_FACE = (
    Row("embeddings.cls_token", "embeddings/cls_token", _token),
    Row("embeddings.distillation_token", "embeddings/distillation_token", _token),
    Row("embeddings.position_embeddings", "embeddings/position_embeddings", _positions),
    Row("embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel", _patch_kernel),
    Row("embeddings.patch_embeddings.projection.bias", "embeddings/projection/bias", _same),
    Row("encoder.layer.{n}.layernorm_before.weight", "layers/layernorm_before/scale", _same),
    Row("encoder.layer.{n}.layernorm_before.bias", "layers/layernorm_before/bias", _same),
    Row("encoder.layer.{n}.attention.attention.query.weight", "layers/attention/qkv/kernel", _head_kernel, 0),
    Row("encoder.layer.{n}.attention.attention.query.bias", "layers/attention/qkv/bias", _head_bias, 0),
    Row("encoder.layer.{n}.attention.attention.key.weight", "layers/attention/qkv/kernel", _head_kernel, 1),
    Row("encoder.layer.{n}.attention.attention.key.bias", "layers/attention/qkv/bias", _head_bias, 1),
    Row("encoder.layer.{n}.attention.attention.value.weight", "layers/attention/qkv/kernel", _head_kernel, 2),
    Row("encoder.layer.{n}.attention.attention.value.bias", "layers/attention/qkv/bias", _head_bias, 2),
    Row("encoder.layer.{n}.attention.output.dense.weight", "layers/attention/out/kernel", _out_kernel),
    Row("encoder.layer.{n}.attention.output.dense.bias", "layers/attention/out/bias", _same),
    Row("encoder.layer.{n}.layernorm_after.weight", "layers/layernorm_after/scale", _same),
    Row("encoder.layer.{n}.layernorm_after.bias", "layers/layernorm_after/bias", _same),
    Row("encoder.layer.{n}.intermediate.dense.weight", "layers/mlp/fc1/kernel", _dense),
    Row("encoder.layer.{n}.intermediate.dense.bias", "layers/mlp/fc1/bias", _same),
    Row("encoder.layer.{n}.output.dense.weight", "layers/mlp/fc2/kernel", _dense),
    Row("encoder.layer.{n}.output.dense.bias", "layers/mlp/fc2/bias", _same),
    Row("layernorm.weight", "layernorm/scale", _same),
    Row("layernorm.bias", "layernorm/bias", _same),
)
HUGGING_FACE_HEAD = (
    Row("classifier.layernorm.weight", "classifier/layernorm/scale", _same),
    Row("classifier.layernorm.bias", "classifier/layernorm/bias", _same),
    Row("classifier.dense.weight", "classifier/dense/kernel", _dense),
    Row("classifier.dense.bias", "classifier/dense/bias", _same),
)


def from_torch(source: str | os.PathLike[str]) -> Checkpoint:
    """Convert a Hugging Face folder of `transformers` AST: config.json, model.safetensors, preprocessor_config.json.

    Args:
        source: the folder; with a classifier (`ASTForAudioClassification`) or without (`ASTModel`). A missing
            `preprocessor_config.json` means transformers' defaults at the model's own length and mel bins.

    Returns:
        A checkpoint whose params are NumPy arrays, half precision widened to float32.

    Raises:
        CheckpointError: a file is missing or unreadable, or the tensors do not fit the configuration; the message lists
            what is missing, unexpected and of the wrong shape.
    """
    folder = pathlib.Path(source)
    if not (folder / CONFIG_FILE).is_file():
        hint = f"; a run's checkpoint is {folder / 'best'}" if (folder / "best" / CONFIG_FILE).is_file() else ""
        raise CheckpointError(
            f"{folder}: expected a checkpoint or a Hugging Face folder, found no {CONFIG_FILE} in it{hint}"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder}: expected {WEIGHTS_FILE}, found none; re-save the model with safetensors")
    config = read_config(ASTConfig, folder / CONFIG_FILE)
    if (folder / PREPROCESSOR_FILE).is_file():
        frontend = read_config(FrontendConfig, folder / PREPROCESSOR_FILE)
        check_frontend(frontend, config, str(folder))
    else:
        frontend = FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins)
    params = params_from_state_dict(_read_safetensors(folder / WEIGHTS_FILE), config, str(folder))
    return Checkpoint(params, config, frontend, json.dumps({"converted_from": folder.name}))


def params_from_state_dict(state: Mapping[str, Array], config: ASTConfig, name: str = "state dict") -> dict[str, Any]:
    """Return the parameter tree of a Hugging Face state dict with the names found on disk.

    Raises:
        CheckpointError: with sorted lists of the tensors that are missing, unexpected or misshaped.
    """
    from .model import param_shapes

    has_head = any(key.startswith("classifier.") for key in state)
    prefix = BODY_PREFIX if any(key.startswith(BODY_PREFIX) for key in state) else ""
    rows = [dataclasses.replace(row, source=prefix + row.source) for row in HUGGING_FACE]
    shapes = flatten(param_shapes(config))
    places = _places(rows + list(HUGGING_FACE_HEAD if has_head else ()), config)
    misshaped, filled = {}, {}
    for source, (row, layer) in places.items():
        if source not in state:
            continue
        expected = _torch_shape(row, shapes[row.target].shape, config)
        if tuple(state[source].shape) != expected:
            misshaped[source] = (expected, state[source].shape)
            continue
        tensor = widen(state[source])
        if row.target not in filled:
            filled[row.target] = np.empty(shapes[row.target].shape, tensor.dtype)
        where = () if layer is None else (layer,) if row.part is None else _part(row, layer)
        filled[row.target][where] = row.turn(tensor, config)
    raise_differences(name, places.keys() - state.keys(), state.keys() - places.keys(), misshaped)
    return unflatten(filled)


def _places(rows: list[Row], config: ASTConfig) -> dict[str, tuple[Row, int | None]]:
    """Return {name in the state dict: (row, layer)} with the layers written out."""
    places: dict[str, tuple[Row, int | None]] = {}
    for row in rows:
        if not config.qkv_bias and row.target == "layers/attention/qkv/bias":
            continue
        if "{n}" not in row.source:
            places[row.source] = (row, None)
            continue
        for layer in range(config.num_hidden_layers):
            places[row.source.format(n=layer)] = (row, layer)
    return places


def _part(row: Row, layer: int) -> tuple[Any, ...]:
    """Return where query, key or value lies: [L, D, 3, H, K] for the kernel, [L, 3, H, K] for the bias."""
    return (layer, slice(None), row.part) if row.target.endswith("kernel") else (layer, row.part)


def _torch_shape(row: Row, shape: tuple[int, ...], config: ASTConfig) -> tuple[int, ...]:
    """Return the shape that the PyTorch tensor of a row must have."""
    if "{n}" in row.source:
        shape = shape[1:]
    if row.turn is _token or row.turn is _positions:
        return (1,) * (3 - len(shape)) + shape
    if row.turn is _patch_kernel:
        return (shape[3], shape[2], shape[0], shape[1])
    if row.turn in (_head_kernel, _out_kernel):
        return (config.hidden_size, config.hidden_size)
    if row.turn is _head_bias:
        return (config.hidden_size,)
    return shape[::-1] if row.turn is _dense else shape


def _read_safetensors(path: pathlib.Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file as they are, bfloat16 included; nothing goes to a device.

    Raises:
        CheckpointError: damaged or truncated, or a tensor of another kind of number.
    """
    from safetensors import SafetensorError, deserialize  # safetensors.numpy refuses bfloat16

    try:
        entries = deserialize(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    for name, entry in entries:
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            expected = ", ".join(SAFETENSORS_DTYPES)
            raise CheckpointError(f"{path}: {name}: expected one of {expected}, got {entry['dtype']}")
    return {
        name: np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
