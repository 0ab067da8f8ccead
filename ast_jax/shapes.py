"""The architecture of a model without a `config.json`, as far as the shapes of its tensors tell it."""

from __future__ import annotations

import math
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

    def shape(target: str, rank: int, part: int | None = None) -> tuple[int, ...]:
        source = form.find(state, target, part)
        if source is None or state[source].ndim != rank or 0 in state[source].shape:
            raise CheckpointError(f"{name}: expected a {rank}-dimensional tensor for {target}, found none")
        return state[source].shape

    width, _, *patch = shape("embeddings/projection/kernel", 4)
    if width % 64:
        raise CheckpointError(f"{name}: heads of 64 do not divide the width {width}; pass config=ASTConfig(…)")
    layer_of = re.compile(re.escape(form.prefix) + r"(?:encoder\.layer|layers|blocks)\.(\d+)\.")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 1 + max(int(match[1]) for key in state if (match := layer_of.match(key))),
        "intermediate_size": shape("layers/mlp/fc1/kernel", 2)[0],
        "qkv_bias": form.find(state, "layers/attention/qkv/bias", 0) is not None,
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
        return ASTConfig(**fields, **pixels, frequency_stride=patch[0], time_stride=patch[1])
    (frequency, time), frames, why = _strides(patches, patch, name, strides, max_length)
    notes.append(f"strides {frequency}, {time} and {frames} frames: {why}")
    return ASTConfig(**fields, max_length=frames, frequency_stride=frequency, time_stride=time)


def _strides(
    patches: int, patch: list[int], name: str, strides: tuple[int, int] | None, max_length: int | None
) -> tuple[tuple[int, int], int, str]:
    """Return the strides and the length that make so many patches of 128 mel bins, and how they were found."""
    bins = ASTConfig.num_mel_bins

    def length(pair: tuple[int, int]) -> int | None:
        """Return the frames that fit a pair of strides: those asked for, or a multiple of 128; None where none do."""
        rows = (bins - patch[0]) // pair[0] + 1
        if patches < 1 or patches % rows:
            return None
        shortest = (patches // rows - 1) * pair[1] + patch[1]
        fitting = range(shortest, shortest + pair[1])
        if max_length is not None:
            return max_length if max_length in fitting else None
        return next((frames for frames in fitting if frames % 128 == 0), shortest if strides else None)

    if strides is not None:
        pairs, why = [tuple(strides)], "as asked for"
    else:
        named = re.search(r"_(\d+)_(\d+)(?=[_.])", pathlib.PurePath(name).name)
        pairs, why = [(int(named[1]), int(named[2]))] if named else [], "from the file's name"
        if not any(min(pair) >= 1 and length(pair) for pair in pairs):
            pairs, why = [(stride, stride) for stride in PAPER_STRIDES], "the only ones of the paper's that fit"
    if min(min(pair) for pair in pairs) < 1:
        raise CheckpointError(f"source_strides: expected two positive numbers, got {strides}")
    fits = {pair: frames for pair in pairs if (frames := length(pair))}
    if len(fits) == 1:
        return *next(iter(fits.items())), why
    possible = ", ".join(f"{pair[0]} {pair[1]} with {frames} frames" for pair, frames in fits.items()) or "none"
    raise CheckpointError(
        f"{name}: {patches} position embeddings of patches do not tell strides and length (possible: {possible}); say "
        "them: source_strides, source_max_length"
    )
