"""PyTorch checkpoints to parameters, without PyTorch.

Every tensor of a source is used, or passed over for a reason that the report names; every place in the parameter tree
is filled exactly once; otherwise the source is refused.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ast_jax.checkpoints.folder import Checkpoint, check_frontend
from ast_jax.checkpoints.provenance import Pairs, Provenance
from ast_jax.checkpoints.pytorch.infer_config import Hints, config_from_shapes
from ast_jax.checkpoints.pytorch.names import DEIT, ORIGINAL, RGB_PATCH, Format, Turn, detect
from ast_jax.checkpoints.pytorch.state_dicts import BFLOAT16, Source, read_source
from ast_jax.checkpoints.resize import resize
from ast_jax.checkpoints.tree import CheckpointError, raise_differences, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, ASTConfig, FrontendConfig
from ast_jax.labels import label_set_of_size
from ast_jax.model.functional import param_shapes

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
    source_num_mel_bins: int | None = None,
    source_num_attention_heads: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    **changes: Any,
) -> Checkpoint:
    """Convert the weights of a PyTorch AST; no PyTorch needed.

    Args:
        source: a Hugging Face folder (`model.safetensors` or `pytorch_model.bin`, whole or in shards, beside
            `config.json`) or Hub id; one such file, or the original repository's `.pth`; a state dict in memory; or a
            live model of transformers. Names are those of transformers' files, of a live transformers 5 model, of the
            original repository, or of timm's distilled vision transformer (DeiT), which becomes the original's ImageNet
            initialisation: kernels summed over the colours, the position grid cut or interpolated, no classifier.
        config: the architecture, instead of `config.json` or what the shapes tell.
        source_strides: of the source, (frequency, time). Where nothing is said they are taken from a file name like
            `audioset_12_12_0.4467.pth`, or from the shapes where only one published model has such.
        source_max_length: frames of the source's input, likewise.
        source_num_mel_bins: mel bins of the source's input; 128 where nothing is said.
        source_num_attention_heads: heads of the source; one for every 64 of its width where nothing is said.
        mean: of the log-mel features that the source was trained on; in place of what `preprocessor_config.json` says.
        std: their standard deviation.
        **changes: another input or other labels: `max_length`, `num_mel_bins`, `frequency_stride`, `time_stride`,
            `num_labels`, `labels`, `keep_classifier`; see `resize`.

    Returns:
        A checkpoint whose params are NumPy arrays, half precision widened to float32. Its provenance has the format of
        the source, the ignored tensors with the reason for each, and notes on what had to be assumed.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, or the tensors do not fit the configuration; the message
            lists what is missing, unexpected and of the wrong shape.
        ValueError: an option does not fit the source.
    """
    found = source if isinstance(source, Source) else read_source(source)
    hints = Hints(source_strides, source_max_length, source_num_mel_bins, source_num_attention_heads)
    return fit(convert(found, config, hints, mean, std), **changes)


def fit(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Return what `convert` gave with the input and labels asked for; an ImageNet model always becomes an AST."""
    start = AST_INPUT if checkpoint.provenance.imagenet_only else {}
    return resize(checkpoint, **start | {name: value for name, value in changes.items() if value is not None})


def convert(
    found: Source,
    config: ASTConfig | None = None,
    hints: Hints = Hints(),  # noqa: B008 (frozen)
    mean: float | None = None,
    std: float | None = None,
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
    json_config = found.read_json(CONFIG_FILE) if form.is_transformers and config is None else None
    told = "config" if config else CONFIG_FILE if json_config is not None else None
    told = "a square grid" if form is DEIT and (hints.strides or hints.max_length or hints.num_mel_bins) else told
    if told and hints:
        raise ValueError(f"source_strides, source_max_length and so on: expected none where {told} tells them")
    if json_config is not None:
        try:
            config = ASTConfig.from_json_dict(json_config)
        except ValueError as error:
            raise CheckpointError(f"{found.where(CONFIG_FILE)}: {error}") from error
    elif config is None:
        config = config_from_shapes(state, form, has_head, found.name, hints, notes)
        if form.is_transformers:
            notes.append(f"no {CONFIG_FILE}: eps 1e-12 is assumed")
    params, dtypes = _fill(state, form, config, has_head, found.name)
    if form is DEIT:
        notes.append("ImageNet initialisation: no classifier, kernels summed over red, green and blue")
    frontend, assumed = _frontend(found, form, config, mean, std, notes)
    config = _labelled(config, has_head, notes)
    dtype, other_dtypes = _dtype_record(dtypes, form, config, has_head)
    provenance = Provenance(
        source=found.label,
        format=form.kind,
        num_tensors=len(dtypes),
        ignored=tuple((name, form.ignored[name]) for name in sorted(state) if name in form.ignored),
        dtype=dtype,
        other_dtypes=other_dtypes,
        statistics_assumed=assumed,
        notes=tuple(notes),
    )
    return Checkpoint(params, config, frontend, provenance=provenance)


def _fill(
    state: Mapping[str, np.ndarray], form: Format, config: ASTConfig, has_head: bool, name: str
) -> tuple[dict[str, Any], dict[str, np.dtype]]:
    """Return the parameter tree of a state dict, and the dtype of each tensor that is used.

    Raises:
        CheckpointError: with sorted lists of the tensors that are missing, unexpected or misshaped.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    places = form.places(config, has_head)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    dtypes: dict[str, np.dtype] = {}
    widest: dict[str, np.dtype] = {}
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
    return unflatten_dict(filled, sep="/"), dtypes


def _torch_shape(turn: Turn, shape: tuple[int, ...], index: tuple[Any, ...], config: ASTConfig) -> tuple[int, ...]:
    """Return the shape that a PyTorch tensor must have for its place."""
    expected = turn.there(np.broadcast_to(np.float32(0), shape)[index], config).shape
    return (expected[0], 3, *expected[2:]) if turn is RGB_PATCH else expected


def unwrapped(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Take away DataParallel's `module.` where every name has it."""
    if not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _dtype_record(dtypes: Mapping[str, np.dtype], form: Format, config: ASTConfig, has_head: bool) -> tuple[str, Pairs]:
    """Return the dtype that most tensors have, and those of others by their names when going back, without prefix."""
    most = collections.Counter(dtype.name for dtype in dtypes.values()).most_common(1)[0][0]
    names = form.names_back(config, has_head)
    others = (
        (names[name].removeprefix(form.prefix), dtype.name) for name, dtype in dtypes.items() if dtype.name != most
    )
    return most, tuple(others)


def _frontend(
    found: Source, form: Format, config: ASTConfig, mean: float | None, std: float | None, notes: list[str]
) -> tuple[FrontendConfig, bool]:
    """Return the features' settings, and whether mean and standard deviation had to be assumed.

    They come from preprocessor_config.json, else from what is said, else they are the original's for the data set that
    has so many labels, else transformers' defaults.
    """
    json_frontend = found.read_json(PREPROCESSOR_FILE) if form.is_transformers else None
    if json_frontend is not None:
        try:
            frontend = FrontendConfig.from_json_dict(json_frontend)
        except ValueError as error:
            raise CheckpointError(f"{found.where(PREPROCESSOR_FILE)}: {error}") from error
        check_frontend(frontend, config, found.name)
        said = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
        if said:
            was = f"mean {frontend.mean:g} and std {frontend.std:g}"
            frontend = frontend.replace(**said)
            notes.append(f"features are normalised with mean {frontend.mean:g} and std {frontend.std:g}: as said, the "
                         f"source has {was}")  # fmt: skip
        return frontend, False
    known = ORIGINAL_STATISTICS.get(config.num_labels) if form is ORIGINAL else None
    usual = known or ORIGINAL_STATISTICS[527]
    told = mean is not None and std is not None
    mean, std = usual[0] if mean is None else mean, usual[1] if std is None else std
    why = (
        "as said"
        if told
        else "those of the data set of this size, which is assumed"
        if known
        else "AudioSet's, which is assumed"
    )
    notes.append(f"features are normalised with mean {mean:g} and std {std:g}: {why}")
    frontend = FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins, mean=mean, std=std)
    return frontend, not (told or known)


def _labelled(config: ASTConfig, has_head: bool, notes: list[str]) -> ASTConfig:
    """Attach the label set of this size to a classifier that brings no names of its own."""
    known = label_set_of_size(config.num_labels)
    unnamed = not config.id2label or config.id2label == config.replace(id2label=()).labels
    if not (has_head and known and unnamed):
        return config
    notes.append(
        f"the {config.num_labels} labels bring no names; those of {known.name} are attached, for their number alone "
        "(others: --labels FILE --keep-classifier)"
    )
    return config.replace(id2label=known.labels)
