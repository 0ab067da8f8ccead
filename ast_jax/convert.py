"""PyTorch checkpoints to parameters, without PyTorch.

Every tensor of a source is used, or passed over for a reason that the report names; every place in the parameter tree
is filled exactly once; otherwise the source is refused.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .adapt import resize
from .checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    CheckpointError,
    check_frontend,
    flatten,
    raise_differences,
    unflatten,
    widen,
)
from .config import ASTConfig, FrontendConfig
from .features import PREPROCESSOR_FILE
from .formats import HUGGING_FACE, LIVE, ORIGINAL, RGB_PATCH, VIT, Format, Turn, detect
from .labels import label_set_of_size
from .shapes import config_from_shapes
from .sources import BFLOAT16, Source, read_source

FLOATS = {np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}
# Mean and standard deviation of the log-mel features of the original's data sets, by the number of its labels.
ORIGINAL_STATISTICS = {527: (-4.2677393, 4.5689974), 50: (-6.6268077, 5.358466), 35: (-6.845978, 5.5654526)}
AST_INPUT = {"max_length": 1024, "num_mel_bins": 128, "frequency_stride": 10, "time_stride": 10}


def from_torch(
    source: Any,
    *,
    config: ASTConfig | None = None,
    source_strides: tuple[int, int] | None = None,
    source_max_length: int | None = None,
    **changes: Any,
) -> Checkpoint:
    """Convert the weights of a PyTorch AST; no PyTorch needed.

    Args:
        source: a Hugging Face folder (`model.safetensors` or `pytorch_model.bin`, whole or in shards, beside
            `config.json`); one such file, or the original repository's `.pth`; a state dict in memory; or a live model
            of transformers. Names are those of transformers' files, of a live transformers 5 model, of the original
            repository, or of timm's distilled vision transformer (DeiT), which becomes the original's ImageNet
            initialisation: kernels summed over the colours, the position grid cut or interpolated, no classifier.
        config: the architecture, where neither a `config.json` nor the shapes tell it (heads of another width than 64).
        source_strides: of the source, (frequency, time), where the position embeddings fit several. Else they are
            taken from a file name like `audioset_12_12_0.4467.pth`, or from the shapes where only one pair fits.
        source_max_length: frames of the source's input, likewise.
        **changes: another input or other labels: `max_length`, `num_mel_bins`, `frequency_stride`, `time_stride`,
            `num_labels`, `labels`; see `resize`.

    Returns:
        A checkpoint whose params are NumPy arrays, half precision widened to float32. Its metadata say under
        "conversion" what was found: the format, the tensors passed over and why, and what had to be assumed.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or the tensors do not fit the configuration; the message
            lists what is missing, unexpected and of the wrong shape.
        ValueError: an option does not fit the source.
    """
    found = source if isinstance(source, Source) else read_source(source)
    return adapt(convert(found, config, source_strides, source_max_length), **changes)


def adapt(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Return what `convert` gave with the input and labels asked for; an ImageNet model always becomes an AST."""
    start = AST_INPUT if started_from_pictures(checkpoint) else {}
    return resize(checkpoint, **start | {name: value for name, value in changes.items() if value is not None})


def started_from_pictures(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an ImageNet model's, made to start from: it has heard nothing yet."""
    return checkpoint.metadata.get("conversion", {}).get("format") == VIT.name


def convert(
    found: Source,
    config: ASTConfig | None = None,
    source_strides: tuple[int, int] | None = None,
    source_max_length: int | None = None,
) -> Checkpoint:
    """Do what `from_torch` says, but leave the input and the labels as they are in the source.

    An ImageNet model stays one here: its "spectrogram" is the square picture that it was made for.
    """
    state, notes = unwrapped(found.state), []
    if state.keys() != found.state.keys():
        notes.append("names lie under `module.`, as in DataParallel")
    form = detect(state)
    if form is None:
        some = ", ".join(sorted(state)[:3]) or "none"
        raise CheckpointError(f"{found.name}: expected the tensors of an AST, got others: {some}, …")
    has_head = any(row.source in state for row in form.head)
    json_config = found.read_json(CONFIG_FILE) if _is_transformers(form) and config is None else None
    told = "config" if config else CONFIG_FILE if json_config is not None else None
    told = "a square grid" if form is VIT else told
    if told and (source_strides or source_max_length):
        raise ValueError(f"source_strides, source_max_length: expected none where {told} tells them")
    if config is None:
        config = _config(found, json_config, state, form, has_head, source_strides, source_max_length, notes)
    params, dtypes = _fill(state, form, config, has_head, found.name)
    if form is VIT:
        notes.append("ImageNet initialisation: no classifier, kernels summed over red, green and blue")
    frontend = _frontend(found, form, config, notes)
    config = _labelled(config, has_head, notes)
    ignored = {name: form.ignored[name] for name in sorted(state) if name in form.ignored}
    conversion = {
        "format": form.name, "tensors": len(dtypes), "ignored": ignored, "notes": notes,
        **_dtype_record(dtypes, form, config, has_head),
    }  # fmt: skip
    metadata = {"converted_from": found.label, "conversion": conversion}
    return Checkpoint(params, config, frontend, json.dumps(metadata))


def _fill(
    state: Mapping[str, np.ndarray], form: Format, config: ASTConfig, has_head: bool, name: str
) -> tuple[dict[str, Any], dict[str, np.dtype]]:
    """Return the parameter tree of a state dict, and the dtype of each tensor that is used.

    Raises:
        CheckpointError: with sorted lists of the tensors that are missing, unexpected or misshaped.
    """
    from .model import param_shapes

    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    places = form.places(config, has_head)
    misshaped, dtypes, widest = {}, {}, {}
    torch_shapes: dict[tuple[Any, Any], tuple[int, ...]] = {}
    for source, (row, index) in places.items():
        if source not in state:
            continue
        tensor, key = state[source], (row.target, row.part)
        if key not in torch_shapes:
            torch_shapes[key] = _torch_shape(row.turn, shapes[row.target], index, config)
        if tensor.shape != torch_shapes[key]:
            misshaped[source] = (torch_shapes[key], tensor.shape)
        elif tensor.dtype not in FLOATS:
            kinds = ", ".join(sorted(dtype.name for dtype in FLOATS))
            raise CheckpointError(f"{name}: {source}: expected one of {kinds}, got {tensor.dtype}")
        dtypes[source] = tensor.dtype
        at_least = np.float64 if tensor.dtype == np.float64 else np.float32
        widest[row.target] = np.promote_types(widest.get(row.target, at_least), at_least)
    raise_differences(name, places.keys() - state.keys(), state.keys() - places.keys() - form.ignored.keys(), misshaped)
    filled = {path: np.empty(shapes[path], dtype) for path, dtype in widest.items()}

    def put(source: str) -> None:
        row, index = places[source]
        filled[row.target][index] = row.turn.here(widen(state[source]), config)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # NumPy lets go of the lock while it copies
        list(pool.map(put, places))
    return unflatten(filled), dtypes


def _torch_shape(turn: Turn, shape: tuple[int, ...], index: tuple[Any, ...], config: ASTConfig) -> tuple[int, ...]:
    """Return the shape that a PyTorch tensor must have for its place."""
    expected = turn.there(np.broadcast_to(np.float32(0), shape)[index], config).shape
    return (expected[0], 3, *expected[2:]) if turn is RGB_PATCH else expected


def unwrapped(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Take away DataParallel's `module.` where every name has it."""
    if not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _dtype_record(
    dtypes: Mapping[str, np.dtype], form: Format, config: ASTConfig, has_head: bool
) -> dict[str, str | dict[str, str]]:
    """Return the dtype that most tensors have, and those of others by the names they have when going back."""
    most = collections.Counter(dtype.name for dtype in dtypes.values()).most_common(1)[0][0]
    back = going_back(form)
    names = dict(zip(form.places(config, has_head), back.places(config, has_head), strict=True))
    others = {names[name]: dtype.name for name, dtype in dtypes.items() if dtype.name != most}
    return {"dtype": most, "other_dtypes": others}


def _is_transformers(form: Format) -> bool:
    return form.rows in (HUGGING_FACE.rows, LIVE.rows)


def going_back(form: Format) -> Format:
    """Return the format in which transformers writes what it holds in memory; any other as it is."""
    return HUGGING_FACE.with_prefix(form.prefix) if form.rows == LIVE.rows else form


def _config(
    found: Source,
    json_config: Mapping[str, Any] | None,
    state: Mapping[str, np.ndarray],
    form: Format,
    has_head: bool,
    strides: tuple[int, int] | None,
    max_length: int | None,
    notes: list[str],
) -> ASTConfig:
    """Return the architecture: from config.json for transformers' names, else from the shapes."""
    if json_config is not None:
        try:
            return ASTConfig.from_json_dict(json_config)
        except ValueError as error:
            raise CheckpointError(f"{found.where(CONFIG_FILE)}: {error}") from error
    config = config_from_shapes(state, form, has_head, found.name, strides, max_length, notes=notes)
    if _is_transformers(form):
        notes.append(f"no {CONFIG_FILE}: {config.num_attention_heads} heads of 64 and eps 1e-12 are assumed")
    return config


def _frontend(found: Source, form: Format, config: ASTConfig, notes: list[str]) -> FrontendConfig:
    """Return the features' settings: from preprocessor_config.json, else the original's or transformers' defaults."""
    size = {"max_length": config.max_length, "num_mel_bins": config.num_mel_bins}
    json_frontend = found.read_json(PREPROCESSOR_FILE) if _is_transformers(form) else None
    if json_frontend is not None:
        try:
            frontend = FrontendConfig.from_json_dict(json_frontend)
        except ValueError as error:
            raise CheckpointError(f"{found.where(PREPROCESSOR_FILE)}: {error}") from error
        check_frontend(frontend, config, found.name)
        return frontend
    mean, std = ORIGINAL_STATISTICS[527]
    if form is ORIGINAL:
        mean, std = ORIGINAL_STATISTICS.get(config.num_labels, (mean, std))
    notes.append(f"features are normalised with mean {mean:g} and std {std:g}, which the weights do not tell")
    return FrontendConfig(**size, mean=mean, std=std)


def _labelled(config: ASTConfig, has_head: bool, notes: list[str]) -> ASTConfig:
    """Attach the label set of this size to a classifier that brings no names of its own."""
    known = label_set_of_size(config.num_labels)
    unnamed = not config.id2label or config.id2label == config.replace(id2label=()).labels
    if not (has_head and known and unnamed):
        return config
    notes.append(f"the {config.num_labels} labels bring no names; those of {known.name} are attached")
    return config.replace(id2label=known.labels)
