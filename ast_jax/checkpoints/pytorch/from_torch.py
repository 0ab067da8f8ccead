"""`from_torch`: conversion of PyTorch checkpoints, without PyTorch.

Every tensor of a source is either used or ignored for a reason that the report states, and every parameter is filled
exactly once; otherwise the conversion fails.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Mapping
from typing import Any, Unpack, cast

import numpy as np
from flax.traverse_util import unflatten_dict

from ast_jax.checkpoints.folder import Checkpoint, check_frontend
from ast_jax.checkpoints.provenance import Pairs, Provenance
from ast_jax.checkpoints.pytorch.infer_config import Hints, config_from_shapes
from ast_jax.checkpoints.pytorch.names import DEIT, ORIGINAL, RGB_PATCH, Format, Transform, detect
from ast_jax.checkpoints.pytorch.state_dicts import BFLOAT16, Source, read_source
from ast_jax.checkpoints.resize import ResizeOptions, resize
from ast_jax.checkpoints.tree import CheckpointError, check_shapes, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, ASTConfig, FrontendConfig
from ast_jax.labels import label_set_of_size
from ast_jax.model.functional import param_shapes
from ast_jax.model.tree import Shape, shapes_of

FLOATS = {np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}
# Mean and standard deviation of the log-mel features of the original's data sets, by number of labels.
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
    **changes: Unpack[ResizeOptions],
) -> Checkpoint:
    """Convert the weights of a PyTorch AST; PyTorch is not needed.

    Args:
        source: a Hugging Face folder (`model.safetensors` or `pytorch_model.bin`, whole or sharded, beside
            `config.json`) or Hub id; one such file, or the original repository's `.pth`; a state dict in memory; or a
            live transformers model. Tensor names are those of transformers' files, of a live transformers 5 model, of
            the original repository, or of timm's distilled vision transformer (DeiT). The latter becomes the original's
            ImageNet initialisation: patch kernel summed over colour channels, position grid cropped or interpolated, no
            classifier.
        config: the architecture, instead of `config.json` or what is inferred from shapes.
        source_strides: patch strides of the source, (frequency, time). The default comes from a file name like
            `audioset_12_12_0.4467.pth`, or from the shapes if a single published model has them.
        source_max_length: input length of the source in frames; the default likewise.
        source_num_mel_bins: mel bins of the source; default 128.
        source_num_attention_heads: attention heads of the source; default width / 64.
        mean: mean of the log-mel features that the source was trained on; overrides `preprocessor_config.json`.
        std: their standard deviation; likewise.
        **changes: another input or other labels: `max_length`, `num_mel_bins`, `frequency_stride`, `time_stride`,
            `num_labels`, `labels`, `keep_classifier`, `seed`; see `resize`.

    Returns:
        A checkpoint whose params are NumPy arrays, half precision widened to float32. Its provenance has the format of
        the source, the ignored tensors with the reason for each, and notes on what had to be assumed.

    Raises:
        CheckpointError: a file is missing, damaged or of another format, or the tensors do not fit the configuration;
            the message lists what is missing, unexpected and of the wrong shape.
        ValueError: an option does not fit the source.
    """
    weights = source if isinstance(source, Source) else read_source(source)
    hints = Hints(source_strides, source_max_length, source_num_mel_bins, source_num_attention_heads)
    return resize_converted(convert(weights, config, hints, mean, std), **changes)


def resize_converted(checkpoint: Checkpoint, **changes: Unpack[ResizeOptions]) -> Checkpoint:
    """Resize what `convert` returns; the input of an ImageNet model becomes the default input of AST."""
    start = AST_INPUT if checkpoint.provenance.imagenet_only else {}
    given = {name: value for name, value in changes.items() if value is not None}
    return resize(checkpoint, **cast(ResizeOptions, start | given))


def convert(
    source: Source,
    config: ASTConfig | None = None,
    hints: Hints = Hints(),  # noqa: B008 (frozen)
    mean: float | None = None,
    std: float | None = None,
) -> Checkpoint:
    """Do the conversion of `from_torch` without `resize`: input and labels are the source's.

    An ImageNet model keeps its square input image as the "spectrogram".
    """
    state, notes = strip_data_parallel(source.state), []
    if state.keys() != source.state.keys():
        notes.append("names have the prefix `module.` of DataParallel")
    form = detect(state)
    if form is None:
        some = ", ".join(sorted(state)[:3]) or "none"
        raise CheckpointError(f"{source.name}: expected the tensors of an AST, got others: {some}, …")
    has_head = any(row.source in state for row in form.head)
    json_config = source.read_json(CONFIG_FILE) if form.is_transformers and config is None else None
    known_from = "config" if config else CONFIG_FILE if json_config is not None else None
    if form is DEIT and (hints.strides or hints.max_length or hints.num_mel_bins):
        known_from = "a square grid"
    if known_from and hints:
        raise ValueError(f"source_strides, source_max_length and so on: expected none where {known_from} gives them")
    if json_config is not None:
        try:
            config = ASTConfig.from_json_dict(json_config)
        except ValueError as error:
            raise CheckpointError(f"{source.path_of(CONFIG_FILE)}: {error}") from error
    elif config is None:
        config = config_from_shapes(state, form, has_head, source.name, hints, notes)
        if form.is_transformers:
            notes.append(f"no {CONFIG_FILE}: eps 1e-12 is assumed")
    params, dtypes = _to_params(state, form, config, has_head, source.name)
    if form is DEIT:
        notes.append("ImageNet initialisation: no classifier, patch kernel summed over the colour channels")
    frontend, assumed = _frontend(source, form, config, mean, std, notes)
    config = _attach_labels(config, has_head, notes)
    dtype, other_dtypes = _dtype_record(dtypes, form, config, has_head)
    provenance = Provenance(
        source=source.label,
        format=form.kind,
        num_tensors=len(dtypes),
        ignored=tuple((name, form.ignored[name]) for name in sorted(state) if name in form.ignored),
        dtype=dtype,
        other_dtypes=other_dtypes,
        statistics_assumed=assumed,
        notes=tuple(notes),
    )
    return Checkpoint(params, config, frontend, provenance=provenance)


def _to_params(
    state: Mapping[str, np.ndarray], form: Format, config: ASTConfig, has_head: bool, name: str
) -> tuple[dict[str, Any], dict[str, np.dtype]]:
    """Return the parameter tree of a state dict, and the dtype of each tensor that is used.

    Raises:
        CheckpointError: a tensor is not of floating point, or with sorted lists of the tensors that are missing,
            unexpected and of the wrong shape.
    """
    shapes = shapes_of(param_shapes(config))
    places = form.places(config, has_head)
    torch_shapes: dict[tuple[Any, Any], Shape] = {}  # the same in every layer
    for row, index in places.values():
        if (row.target, row.part) not in torch_shapes:
            shape = _torch_shape(row.transform, shapes[row.target], index, config)
            torch_shapes[row.target, row.part] = shape
    check_shapes(
        name,
        {source: torch_shapes[row.target, row.part] for source, (row, _) in places.items()},
        {source: tensor.shape for source, tensor in state.items() if source not in form.ignored},
    )
    dtypes = {source: state[source].dtype for source in places}
    widest: dict[str, np.dtype] = {}
    for source, dtype in dtypes.items():
        if dtype not in FLOATS:
            kinds = ", ".join(sorted(kind.name for kind in FLOATS))
            raise CheckpointError(f"{name}: {source}: expected one of {kinds}, got {dtype}")
        target = places[source][0].target
        at_least = np.float64 if dtype == np.float64 else np.float32
        widest[target] = np.promote_types(widest.get(target, at_least), at_least)
    params = {path: np.empty(shapes[path], dtype) for path, dtype in widest.items()}

    def fill(source: str) -> None:
        row, index = places[source]
        params[row.target][index] = row.transform.to_jax(widen(state[source]), config)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # NumPy releases the GIL while it copies
        list(pool.map(fill, places))
    return unflatten_dict(params, sep="/"), dtypes


def _torch_shape(transform: Transform, shape: Shape, index: tuple[Any, ...], config: ASTConfig) -> Shape:
    """Return the shape that a PyTorch tensor must have to fill `index` of an array of a shape."""
    expected = transform.to_torch(np.broadcast_to(np.float32(0), shape)[index], config).shape
    return (expected[0], 3, *expected[2:]) if transform is RGB_PATCH else expected


def strip_data_parallel(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Remove the prefix `module.` of DataParallel if every name has it."""
    if not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _dtype_record(dtypes: Mapping[str, np.dtype], form: Format, config: ASTConfig, has_head: bool) -> tuple[str, Pairs]:
    """Return the dtype of most tensors, and those of the others by their exported names without prefix."""
    most = collections.Counter(dtype.name for dtype in dtypes.values()).most_common(1)[0][0]
    names = form.exported_names(config, has_head)
    others = (
        (names[name].removeprefix(form.prefix), dtype.name) for name, dtype in dtypes.items() if dtype.name != most
    )
    return most, tuple(others)


def _frontend(
    source: Source, form: Format, config: ASTConfig, mean: float | None, std: float | None, notes: list[str]
) -> tuple[FrontendConfig, bool]:
    """Return the settings of the features, and whether their mean and standard deviation are assumed.

    The statistics are the given ones, else those of preprocessor_config.json, else the original's for the data set with
    this number of labels, else AudioSet's.
    """
    json_frontend = source.read_json(PREPROCESSOR_FILE) if form.is_transformers else None
    if json_frontend is not None:
        try:
            frontend = FrontendConfig.from_json_dict(json_frontend)
        except ValueError as error:
            raise CheckpointError(f"{source.path_of(PREPROCESSOR_FILE)}: {error}") from error
        check_frontend(frontend, config, source.name)
        given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
        if given:
            before = f"mean {frontend.mean:g} and std {frontend.std:g}"
            frontend = frontend.replace(**given)
            notes.append(
                f"features are normalised with mean {frontend.mean:g} and std {frontend.std:g}: as given, the source "
                f"has {before}"
            )
        return frontend, False
    known = ORIGINAL_STATISTICS.get(config.num_labels) if form is ORIGINAL else None
    default = known or ORIGINAL_STATISTICS[527]
    given_both = mean is not None and std is not None
    mean, std = default[0] if mean is None else mean, default[1] if std is None else std
    assumed = "assumed, those of the data set with this many classes" if known else "assumed, AudioSet's"
    why = "as given" if given_both else assumed
    notes.append(f"features are normalised with mean {mean:g} and std {std:g}: {why}")
    frontend = FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins, mean=mean, std=std)
    return frontend, not (given_both or known)


def _attach_labels(config: ASTConfig, has_head: bool, notes: list[str]) -> ASTConfig:
    """Attach the label set of this size to a classifier without class names."""
    known = label_set_of_size(config.num_labels)
    unnamed = not config.id2label or config.id2label == config.replace(id2label=()).labels
    if not (has_head and known and unnamed):
        return config
    notes.append(
        f"the {config.num_labels} labels have no names; those of {known.name} are assumed from their number "
        "(to rename: --labels FILE --keep-classifier)"
    )
    return config.replace(id2label=known.labels)
