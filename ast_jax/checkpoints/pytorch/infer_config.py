"""Inference of the architecture from tensor names and shapes, for weights without a `config.json`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ast_jax.checkpoints.pytorch.names import DEIT, ORIGINAL, Format
from ast_jax.checkpoints.tree import CheckpointError, check_shapes
from ast_jax.config import ASTConfig

# Of the models that the original repository published; strides are equal on both axes.
PUBLISHED_STRIDES = (10, 12, 14, 16)
PUBLISHED_LENGTHS = (1024, 512, 256, 128)
MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class Hints:
    """Settings of the source that cannot be inferred from shapes; None where the user gave none.

    Attributes:
        strides: (frequency, time).
        max_length: frames.
        num_mel_bins: default 128.
        num_attention_heads: default width / 64.

    Raises:
        ValueError: a value is not a positive integer.
    """

    strides: tuple[int, int] | None = None
    max_length: int | None = None
    num_mel_bins: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        pair = isinstance(self.strides, tuple | list) and len(self.strides) == 2
        if self.strides is not None and not (pair and all(map(_positive, self.strides))):
            raise ValueError(f"source_strides: expected two positive whole numbers, got {self.strides}")
        for name in ("max_length", "num_mel_bins", "num_attention_heads"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise ValueError(f"source_{name}: expected a positive whole number, got {value!r}")

    def __bool__(self) -> bool:
        """Whether any setting is given."""
        return any(value is not None for value in dataclasses.astuple(self))


def _positive(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def config_from_shapes(
    state: Mapping[str, np.ndarray], form: Format, has_head: bool, name: str, hints: Hints, notes: list[str]
) -> ASTConfig:
    """Infer the architecture from names, shapes and `hints`; assumptions are appended to `notes`.

    Raises:
        CheckpointError: a tensor is missing or has the wrong rank, or none or several of the possible strides and
            lengths fit the position embeddings.
    """
    layers = _num_layers(state, form, has_head, name)

    def shape(target: str, rank: int) -> tuple[int, ...]:
        source = form.find(state, target)
        assert source is not None, target  # `_num_layers` checks that those asked for are present
        if state[source].ndim != rank or 0 in state[source].shape:
            raise CheckpointError(f"{name}: {source}: expected {rank} dimensions, got {state[source].shape}")
        return state[source].shape

    width, _, *patch = shape("embeddings/projection/kernel", 4)
    heads = hints.num_attention_heads or (0 if width % 64 else width // 64)
    if not heads or width % heads:
        raise CheckpointError(
            f"{name}: {f'{heads} heads' if heads else 'heads of 64'} do not divide the width {width}; give their "
            "number to `ast-jax convert`: --source-heads (source_num_attention_heads in Python)"
        )
    if hints.num_attention_heads is None:
        notes.append(f"{heads} heads of 64 are assumed")
    if form is ORIGINAL and layers != 12:
        notes.append(f"{layers} layers; the published models have 12")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": shape("layers/mlp/fc1/kernel", 2)[0],
        "qkv_bias": form.find(state, "layers/attention/qkv/bias") is not None,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "layer_norm_eps": form.eps[0],
        "head_layer_norm_eps": None if form.eps[0] == form.eps[1] else form.eps[1],
        "num_labels": shape("classifier/dense/kernel", 2)[0] if has_head else ASTConfig.num_labels,
    }
    patches = shape("embeddings/position_embeddings", 3)[1] - 2
    if form is DEIT:
        side = math.isqrt(max(patches, 0))
        if not side or side * side != patches:
            raise CheckpointError(f"{name}: expected a square position grid, got {patches} positions")
        fields |= {"max_length": side * patch[1], "num_mel_bins": side * patch[0]}
        fields |= {"frequency_stride": patch[0], "time_stride": patch[1]}
    else:
        (frequency, time), frames, bins = _grid(patches, patch, name, hints, notes)
        fields |= {"max_length": frames, "num_mel_bins": bins, "frequency_stride": frequency, "time_stride": time}
    try:
        return ASTConfig(**fields)
    except ValueError as error:  # a value of the file is out of range
        raise CheckpointError(f"{name}: {error}") from error


def _num_layers(state: Mapping[str, np.ndarray], form: Format, has_head: bool, name: str) -> int:
    """Return the number of layers, and check that the tensors whose shapes give the architecture are present.

    Raises:
        CheckpointError: they are not, or there are too many layers.
    """
    names = state.keys() - form.ignored.keys()
    pattern = re.compile(re.escape(form.prefix) + r"(?:encoder\.layer|layers|blocks)\.(\d{1,9})\.")
    layers = 1 + max(int(match[1]) for key in names if (match := pattern.match(key)))
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{name}: expected at most {MAX_LAYERS:,} layers, got layer number {layers - 1:,}")
    has_bias = form.find(names, "layers/attention/qkv/bias") is not None
    rows = [row for row in form.all_rows(has_head) if has_bias or row.target != "layers/attention/qkv/bias"]
    expected = {row.source.format(n=layer) for row in rows for layer in range(layers if "{n}" in row.source else 1)}
    if form is DEIT and "dist_token" not in names:
        raise CheckpointError(
            f"{name}: expected a distilled vision transformer, got one without dist_token; AST starts from DeiT's "
            "distilled models"
        )
    needed = ["embeddings/projection/kernel", "embeddings/position_embeddings", "layers/mlp/fc1/kernel"]
    needed += ["classifier/dense/kernel"] if has_head else []
    if any(form.find(names, target) is None for target in needed):  # else `from_torch` compares names and shapes
        check_shapes(name, dict.fromkeys(expected), {key: state[key].shape for key in names})
    return layers


def _grid(
    patches: int, patch: list[int], name: str, hints: Hints, notes: list[str]
) -> tuple[tuple[int, int], int, int]:
    """Return the strides, length and mel bins that give this number of patches.

    Strides come from `hints`, else from a file name like `audioset_12_12_0.4467.pth`, else from the published models.

    Raises:
        CheckpointError: they do not fit, leave the length open, or no or several published models fit.
    """
    bins = hints.num_mel_bins or ASTConfig.num_mel_bins

    def lengths(pair: tuple[int, int]) -> range:
        """Return the lengths in frames that give this number of patches with a pair of strides."""
        rows = (bins - patch[0]) // pair[0] + 1
        if patches < 1 or rows < 1 or patches % rows:
            return range(0)
        shortest = (patches // rows - 1) * pair[1] + patch[1]
        return range(shortest, shortest + pair[1])

    def fitting(pair: tuple[int, int], rounded: bool) -> int | None:
        """Return the length from the hints, else a published one, else, if `rounded`, a multiple of 128."""
        if hints.max_length is not None:
            return hints.max_length if hints.max_length in lengths(pair) else None
        likely = PUBLISHED_LENGTHS if patch == [16, 16] else ()
        return next((frames for frames in lengths(pair) if frames in likely or (rounded and frames % 128 == 0)), None)

    named = re.search(r"_(\d{1,4})_(\d{1,4})(?=[_.])", pathlib.PurePath(name).name)
    in_name = (int(named[1]), int(named[2])) if named else (0, 0)
    published = [(stride, stride) for stride in PUBLISHED_STRIDES]
    if hints.strides is not None:
        pairs, why = [(int(hints.strides[0]), int(hints.strides[1]))], "as given"
    elif min(in_name) >= 1 and max(in_name) <= max(patch) and lengths(in_name):
        pairs, why = [in_name], "from the file name"  # no other pair is tried, even if the length stays open
    else:
        pairs, why = published, "as published" if hints.max_length is None else "with the given length"
    fits = {pair: frames for pair in pairs if (frames := fitting(pair, pairs is not published))}
    possible = {pair: lengths(pair) for pair in dict.fromkeys([*pairs, *published]) if lengths(pair)}
    listed = [f"{pair[0]} {pair[1]} with {some[0]} to {some[-1]} frames" for pair, some in possible.items()]
    if len(fits) == 1:
        ((pair, frames),) = fits.items()
        others = [text for text, other in zip(listed, possible, strict=True) if other != pair]
        doubt = f"; {' or '.join(others)} would fit too" if others and pairs is published else ""
        notes.append(f"strides {pair[0]} {pair[1]} and {frames} frames: {why}{doubt}")
        if hints.num_mel_bins is None:
            notes.append(f"{bins} mel bins are assumed")
        return pair, frames, bins
    problem = (
        "the given strides and input length do not fit the weights"
        if hints.strides or hints.max_length
        else "strides and input length cannot be inferred from the shapes"
    )
    raise CheckpointError(
        f"{name}: {problem} ({patches} patches; with {bins} mel bins possible: {', '.join(listed) or 'none'}); "
        "give them to `ast-jax convert`: --source-strides, --source-max-length, --source-num-mel-bins "
        "(source_strides and so on in Python)"
    )
