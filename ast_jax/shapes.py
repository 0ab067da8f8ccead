"""The architecture of a model without a `config.json`, as far as the shapes of its tensors tell it."""

from __future__ import annotations

import math
import numbers
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .checkpoint import CheckpointError
from .config import ASTConfig
from .formats import VIT, Format

PAPER_STRIDES = (10, 12, 14, 16)


def config_from_shapes(
    state: Mapping[str, np.ndarray],
    form: Format,
    has_head: bool,
    name: str,
    strides: tuple[int, int] | None = None,
    max_length: int | None = None,
    *,
    notes: list[str],
) -> ASTConfig:
    """Read off the shapes what they tell: all but heads (64 wide in every published model), and most strides.

    Raises:
        CheckpointError: a tensor is missing, or no or several strides and lengths fit the position embeddings.
    """
    pair = isinstance(strides, tuple | list) and len(strides) == 2
    if strides is not None and not (pair and all(isinstance(step, numbers.Integral) and step > 0 for step in strides)):
        raise CheckpointError(f"source_strides: expected two positive whole numbers, got {strides}")

    def shape(target: str, rank: int) -> tuple[int, ...]:
        pattern = form.name_of(target)
        source = form.find(state, target)
        if source is None:
            raise CheckpointError(f"{name}: the weights are not whole; missing: {pattern.format(n=0)}")
        if state[source].ndim != rank or 0 in state[source].shape:
            raise CheckpointError(f"{name}: {source}: expected {rank} dimensions, got {state[source].shape}")
        return state[source].shape

    width, _, *patch = shape("embeddings/projection/kernel", 4)
    if width % 64:
        raise CheckpointError(f"{name}: heads of 64 do not divide the width {width}; pass config=ASTConfig(…)")
    layer_of = re.compile(re.escape(form.prefix) + r"(?:encoder\.layer|layers|blocks)\.(\d{1,9})\.")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 1 + max(int(match[1]) for key in state if (match := layer_of.match(key))),
        "intermediate_size": shape("layers/mlp/fc1/kernel", 2)[0],
        "qkv_bias": form.find(state, "layers/attention/qkv/bias") is not None,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "layer_norm_eps": form.eps[0],
        "head_layer_norm_eps": None if form.eps[0] == form.eps[1] else form.eps[1],
        "num_labels": shape("classifier/dense/kernel", 2)[0] if has_head else ASTConfig.num_labels,
    }
    patches = shape("embeddings/position_embeddings", 3)[1] - 2
    if form is VIT:
        side = math.isqrt(max(patches, 0))
        if not side or side * side != patches:
            raise CheckpointError(f"{name}: expected a square grid of positions, got {patches} of them")
        pixels = {"max_length": side * patch[1], "num_mel_bins": side * patch[0]}
        return _checked(name, **fields, **pixels, frequency_stride=patch[0], time_stride=patch[1])
    (frequency, time), frames, why = _strides(patches, patch, name, strides, max_length)
    notes.append(f"strides {frequency}, {time} and {frames} frames: {why}")
    return _checked(name, **fields, max_length=frames, frequency_stride=frequency, time_stride=time)


def _checked(name: str, **fields: Any) -> ASTConfig:
    """Return a configuration; one that is out of range is the file's fault."""
    try:
        return ASTConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _strides(
    patches: int, patch: list[int], name: str, strides: tuple[int, int] | None, max_length: int | None
) -> tuple[tuple[int, int], int, str]:
    """Return the strides and the length that make so many patches of 128 mel bins, and how they were found."""

    def lengths(pair: tuple[int, int]) -> range:
        """Return the numbers of frames that make so many patches with a pair of strides."""
        rows = (ASTConfig.num_mel_bins - patch[0]) // pair[0] + 1
        if patches < 1 or rows < 1 or patches % rows:
            return range(0)
        shortest = (patches // rows - 1) * pair[1] + patch[1]
        return range(shortest, shortest + pair[1])

    def likely(pair: tuple[int, int]) -> int | None:
        """Return the length that was asked for, or a multiple of 128, where one fits."""
        if max_length is not None:
            return max_length if max_length in lengths(pair) else None
        return next((frames for frames in lengths(pair) if frames % 128 == 0), None)

    named = re.search(r"_(\d+)_(\d+)(?=[_.])", pathlib.PurePath(name).name)
    in_name = (int(named[1]), int(named[2])) if named else (0, 0)
    if strides is not None:
        pairs, why = [tuple(strides)], "as asked for"
    elif min(in_name) >= 1 and max(in_name) <= max(patch) and likely(in_name):
        pairs, why = [in_name], "from the file's name"
    else:
        pairs, why = [(stride, stride) for stride in PAPER_STRIDES], "the only ones of the paper's that fit"
    fits = {pair: frames for pair in pairs if (frames := likely(pair))}
    if len(fits) == 1:
        return *next(iter(fits.items())), why
    possible = ", ".join(
        f"{pair[0]} {pair[1]} with {fitting[0]} to {fitting[-1]} frames" for pair in pairs if (fitting := lengths(pair))
    )
    raise CheckpointError(
        f"{name}: the shapes do not tell strides and input length ({patches} patches; possible: {possible or 'none'}); "
        "say them: source_strides (--source-strides) and source_max_length (--source-max-length)"
    )
