"""`to_torch`: export to a folder that transformers loads, or to a file that the original repository's class loads.

Converted tensors are written with the bits that they were read with. Settings that the target format lacks raise an
error, or are reported with their effect.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from ast_jax.checkpoints.folder import Checkpoint, check_params
from ast_jax.checkpoints.pytorch.files import write_torch_file
from ast_jax.checkpoints.pytorch.from_torch import FLOATS
from ast_jax.checkpoints.pytorch.names import HF_PREFIX, HUGGING_FACE, IMAGENET_HEADS, ORIGINAL, Format
from ast_jax.checkpoints.pytorch.state_dicts import SAFETENSORS
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, ASTConfig, FrontendConfig
from ast_jax.runtime.files import atomic_file, atomic_folder, write_text

TARGETS = ("huggingface", "original")
# (width, heads) of the model sizes of the original's class; all have 12 layers and an MLP of four times the width.
ORIGINAL_SIZES = {(192, 3): "tiny224", (384, 6): "small224", (768, 12): "base384"}
IMAGENET_CLASSES = 1000
# Settings that neither transformers' extractor nor the original's scripts have, and the values they use.
FRONTEND_EXTRAS = {
    name: getattr(FrontendConfig, name)
    for name in ("frame_length", "frame_shift", "low_freq", "high_freq", "window_type", "preemphasis_coefficient",
                 "dither", "remove_dc_offset")
}  # fmt: skip


def to_torch(
    checkpoint: Checkpoint, destination: str | os.PathLike[str], *, format: str = "huggingface"
) -> tuple[str, ...]:
    """Write a PyTorch checkpoint; PyTorch is not needed.

    Args:
        checkpoint: the model to export.
        destination: for "huggingface" a new or empty folder, which `transformers` loads: `model.safetensors`,
            `config.json`, `preprocessor_config.json`. For "original" a file that ends in `.pth`: the state dict of the
            original repository's class in `torch.nn.DataParallel`, as its scripts load it.
        format: "huggingface" or "original".

    Returns:
        Settings that the format lacks, one line each, with the effect.

    Raises:
        ValueError: the format cannot represent the model, or `destination` is in use.
        OSError: the files cannot be written.
    """
    if format not in TARGETS:
        raise ValueError(f"format: expected one of {', '.join(TARGETS)}, got {format!r}")
    destination = pathlib.Path(destination)
    check_destination(destination, format)
    check_params(checkpoint.params, checkpoint.config, str(destination))
    if format == "original":
        return _write_original(checkpoint, destination)
    return _write_hugging_face(checkpoint, destination)


def check_destination(destination: pathlib.Path, format: str) -> None:
    """Check that `to_torch` can write to a path.

    Raises:
        ValueError: it is in use, or has a name that the programs reading the format do not accept.
    """
    if format == "original" and destination.suffix != ".pth":
        raise ValueError(
            f"{destination}: expected a name that ends in .pth, the files that the original repository loads"
        )
    if format == "original" and destination.exists():
        raise ValueError(f"{destination}: expected a new file, got an existing one")
    empty = destination.is_dir() and not any(destination.iterdir())
    if format == "huggingface" and destination.exists() and not empty:
        kind = "folder that is not empty" if destination.is_dir() else "file"
        raise ValueError(f"{destination}: expected a new or empty folder, got a {kind}")


def state_dict(checkpoint: Checkpoint, form: Format) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint by a format's names, each in the dtype of its source.

    A tensor that has changed since and would be rounded in that dtype keeps its own.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(checkpoint.params, sep="/").items()}
    state = {}
    for name, (row, index) in form.places(checkpoint.config, "classifier" in checkpoint.params).items():
        tensor = row.transform.to_torch(leaves[row.target][index], checkpoint.config)
        state[name] = _lossless_cast(tensor, _recorded_dtype(checkpoint, form, name) or tensor.dtype)
    return state


def _recorded_dtype(checkpoint: Checkpoint, form: Format, name: str) -> np.dtype | None:
    """Return the dtype of a tensor in the source, None where the checkpoint was not converted."""
    return _DTYPES.get(checkpoint.provenance.dtype_of(name.removeprefix(form.prefix)) or "")


_DTYPES = {dtype.name: dtype for dtype in FLOATS}


def _lossless_cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a tensor in another dtype if no value is rounded, else unchanged."""
    with np.errstate(over="ignore"):
        other = tensor.astype(dtype, copy=False)
    return other if np.array_equal(other.astype(tensor.dtype, copy=False), tensor, equal_nan=True) else tensor


def _write_hugging_face(checkpoint: Checkpoint, folder: pathlib.Path) -> tuple[str, ...]:
    """Write a folder that transformers loads."""
    from safetensors.numpy import save_file  # it writes bfloat16, which it does not read

    config, notes = checkpoint.config, []
    if config.patch_shape[0] != config.patch_shape[1]:
        raise ValueError(f"transformers has square patches only, the model has {config.patch_shape}")
    has_head = "classifier" in checkpoint.params
    if has_head and config.head_eps != config.layer_norm_eps:
        notes.append(_eps_note("the classifier's LayerNorm", config.head_eps, config.layer_norm_eps, "transformers"))
    notes += _feature_notes(checkpoint.frontend, "transformers' extractor")
    features = checkpoint.frontend.to_json_dict()
    for name, usual in FRONTEND_EXTRAS.items():
        if features[name] == usual:
            del features[name]
    form = HUGGING_FACE.with_prefix(HF_PREFIX if has_head else "")
    state = state_dict(checkpoint, form)
    values = config.to_json_dict()
    values["architectures"] = ["ASTForAudioClassification" if has_head else "ASTModel"]
    if checkpoint.provenance.problem_type_resolved and config == _resolved(config):
        values["problem_type"] = None  # as in the source
    if any(tensor.dtype != _recorded_dtype(checkpoint, form, name) for name, tensor in state.items()):
        dtypes = {tensor.dtype for tensor in state.values()}
        widest = functools.reduce(np.promote_types, dtypes, np.dtype(np.float32)).name
        values |= {key: widest for key in ("dtype", "torch_dtype") if values.get(key)}  # transformers 5 and 4
    with atomic_folder(folder) as new:
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
        with atomic_file(new / SAFETENSORS) as file:  # safetensors creates files with mode 600
            save_file(whole, file, {"format": "pt"})
        for name, content in ((CONFIG_FILE, values), (PREPROCESSOR_FILE, features)):
            write_text(new / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return tuple(notes)


def _resolved(config: ASTConfig) -> ASTConfig:
    """Return a configuration whose problem type is the one that None resolves to."""
    return config.replace(problem_type=config.replace(problem_type=None).resolved_problem_type)


def _feature_notes(frontend: FrontendConfig, whose: str, **more: Any) -> list[str]:
    """Return a note for each setting of the features that the target lacks and that differs from what it uses."""
    fixed = {**FRONTEND_EXTRAS, "padding_value": 0.0, **more}
    return [
        f"the features have {name} {getattr(frontend, name)}, {whose} uses {value}: its features will differ"
        for name, value in fixed.items()
        if getattr(frontend, name) != value
    ]


def _write_original(checkpoint: Checkpoint, path: pathlib.Path) -> tuple[str, ...]:
    """Write a state dict that the original repository's class loads."""
    config = checkpoint.config
    size = _original_size(config)
    if "classifier" not in checkpoint.params:
        raise ValueError(
            "the original's class has a classifier, the model has none; add one with num_labels (--num-labels)"
        )
    eps, head_eps = ORIGINAL.eps
    notes = []
    if config.layer_norm_eps != eps:
        notes.append(_eps_note("every LayerNorm of the encoder", config.layer_norm_eps, eps, "the original"))
    if config.head_eps != head_eps:
        notes.append(_eps_note("the classifier's LayerNorm", config.head_eps, head_eps, "the original"))
    notes += _feature_notes(checkpoint.frontend, "the original", sampling_rate=16000, do_normalize=True)
    if not config.qkv_bias:
        notes.append("query, key and value have no bias, the original's have: written as zeros, which is equivalent")
    state = state_dict(with_qkv_bias(checkpoint), ORIGINAL)
    dtype = state["v.pos_embed"].dtype
    for name in IMAGENET_HEADS:
        shape = (IMAGENET_CLASSES, config.hidden_size) if name.endswith("weight") else (IMAGENET_CLASSES,)
        state[f"v.{name}"] = np.zeros(shape, dtype)
    notes.append("the two ImageNet classifiers, which the original's class has but does not use, are zeros")
    notes.append(
        f"the file holds only tensors; construct the class with label_dim={config.num_labels}, "
        f"fstride={config.frequency_stride}, tstride={config.time_stride}, input_fdim={config.num_mel_bins}, "
        f"input_tdim={config.max_length}, model_size={size!r}, normalise with mean {checkpoint.frontend.mean} and "
        f"std {checkpoint.frontend.std}, and store the labels elsewhere"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        write_torch_file(new, {f"module.{name}": tensor for name, tensor in state.items()})
    return tuple(notes)


def _original_size(config: ASTConfig) -> str:
    """Return the original's name of this model size.

    Raises:
        ValueError: its class does not have this size.
    """
    size = ORIGINAL_SIZES.get((config.hidden_size, config.num_attention_heads))
    fixed = {"num_hidden_layers": 12, "intermediate_size": 4 * config.hidden_size, "hidden_act": "gelu",
             "patch_shape": (16, 16)}  # fmt: skip
    wrong = [f"{name} {getattr(config, name)}" for name, value in fixed.items() if getattr(config, name) != value]
    if size is None:
        wrong.insert(0, f"width {config.hidden_size} with {config.num_attention_heads} heads")
    if wrong or size is None:
        raise ValueError(
            "the original's class has 12 layers of width 192, 384 or 768 with heads of 64, an MLP of four times the "
            f"width, exact GELU and patches of 16 x 16; the model has {', '.join(wrong)}"
        )
    return size


def with_qkv_bias(checkpoint: Checkpoint) -> Checkpoint:
    """Return an equivalent checkpoint whose query, key and value have a bias: their own or zeros."""
    qkv = checkpoint.params["layers"]["attention"]["qkv"]
    layers, _, three, heads, width = np.shape(qkv["kernel"])
    zeros = np.zeros((layers, three, heads, width), np.asarray(qkv["kernel"]).dtype)
    attention = {**checkpoint.params["layers"]["attention"], "qkv": {"bias": zeros, **qkv}}
    params = {**checkpoint.params, "layers": {**checkpoint.params["layers"], "attention": attention}}
    return checkpoint.replace(params=params, config=checkpoint.config.replace(qkv_bias=True))


def _eps_note(where: str, ours: float, theirs: float, target: str) -> str:
    """Return a note on the effect of another eps: LayerNorm divides by sqrt(variance + eps)."""
    effect = abs(ours - theirs) / 2
    return (
        f"eps of {where} is {ours:g} here and {theirs:g} in {target}: where the variance of its input is 1 its output "
        f"changes by a relative {effect:.1g}, at a lower variance by proportionally more"
    )
