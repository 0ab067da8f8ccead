"""`resize`: a checkpoint for another input length, number of mel bins, stride or label set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.config import ASTConfig

Grid = tuple[int, int]


class ResizeOptions(TypedDict, total=False):
    """Keyword arguments of `resize` for functions that pass them on; the docstrings appear in the API reference."""

    max_length: int | None
    """T, frames; by default the model's."""
    num_mel_bins: int | None
    """F; by default the model's."""
    frequency_stride: int | None
    """Patch stride in mel bins; by default the model's."""
    time_stride: int | None
    """Patch stride in frames; by default the model's."""
    num_labels: int | None
    """C; if it differs from the model's, the classifier is initialised anew."""
    labels: Sequence[str] | None
    """Class names; if they differ from the model's, the classifier is initialised anew."""
    keep_classifier: bool
    """Rename the classes to `labels` and keep the classifier; False by default."""
    seed: int
    """For the initialisation of the classifier; 0 by default."""


def resize(
    checkpoint: Checkpoint,
    *,
    max_length: int | None = None,
    num_mel_bins: int | None = None,
    frequency_stride: int | None = None,
    time_stride: int | None = None,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    keep_classifier: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Return a checkpoint for another input or other labels, as the constructor of the original repository does.

    The grid of position embeddings is resized along each axis independently: centre-cropped where it shrinks, linearly
    interpolated where it grows (paper section 2.2). The patch kernel is unchanged. None leaves a setting unchanged.

    Args:
        checkpoint: the model to start from; it is not modified.
        max_length: T, frames.
        num_mel_bins: F.
        frequency_stride: patch stride in mel bins.
        time_stride: patch stride in frames.
        num_labels: C; if it differs from the model's, the classifier is initialised anew.
        labels: class names; if they differ from the model's, the classifier is initialised anew.
        keep_classifier: rename the classes to `labels` instead, one name for each, and keep the classifier.
        seed: for the initialisation of the classifier.

    Returns:
        The checkpoint; with a new classifier its `problem_type` is None. The provenance notes the changes.

    Raises:
        ValueError: the position grid of an ImageNet model was resized before; a value is out of range; or `labels`,
            `num_labels` and `keep_classifier` contradict each other.
    """
    old = checkpoint.config
    size = {"max_length": max_length, "num_mel_bins": num_mel_bins, "frequency_stride": frequency_stride,
            "time_stride": time_stride}  # fmt: skip
    config = old.replace(**{name: value for name, value in size.items() if value is not None})
    frontend, params, changes = checkpoint.frontend, dict(checkpoint.params), []
    provenance = checkpoint.provenance
    if config.grid != old.grid and provenance.imagenet_only and provenance.grid_resized:
        raise ValueError(
            f"the position grid of this ImageNet model was already resized to {old.grid[0]}x{old.grid[1]}; resizing it "
            "again would differ from the original's initialisation: convert the ImageNet weights for this input instead"
        )
    if config != old:
        frontend = frontend.replace(max_length=config.max_length, num_mel_bins=config.num_mel_bins)
        positions = params["embeddings"]["position_embeddings"]
        resized = resize_positions(np.asarray(positions), old.grid, config.grid)
        params["embeddings"] = {**params["embeddings"], "position_embeddings": resized}
        changes.append(
            f"input {old.num_mel_bins} bins x {old.max_length} frames at strides {old.frequency_stride}, "
            f"{old.time_stride} to {config.num_mel_bins} x {config.max_length} at {config.frequency_stride}, "
            f"{config.time_stride}: position grid {_describe(old.grid, config.grid)}"
        )
    names = _checked_labels(labels)
    count = len(names) if names else num_labels
    if num_labels not in (None, count):
        raise ValueError(f"num_labels: expected {count}, the number of labels, got {num_labels}")
    has_head = "classifier" in params
    if keep_classifier:
        if not (names and has_head and count == old.num_labels):
            raise ValueError(
                f"keep_classifier: expected labels, a name for each of the model's {old.num_labels if has_head else 0} "
                f"classes, got {len(names or ())}"
            )
        config = config.replace(id2label=names)
        changes += ["labels renamed"] if names != old.labels else []
    elif count is not None and (not has_head or count != old.num_labels or (names and names != old.labels)):
        config = config.replace(num_labels=count, id2label=names or (), problem_type=None)
        params["classifier"] = init_classifier(config, seed, np.asarray(params["layernorm"]["scale"]).dtype)
        changes.append(f"classifier of {count} labels: initialised, untrained")
    if not changes:
        return checkpoint
    provenance = provenance.changed(*changes, grid_resized=provenance.grid_resized or config.grid != old.grid)
    return checkpoint.replace(params=params, config=config, frontend=frontend, provenance=provenance)


def _checked_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return class names as a tuple.

    Raises:
        ValueError: a string instead of a sequence of strings, no names, or a duplicate.
    """
    if labels is None:
        return None
    if isinstance(labels, str):
        raise ValueError(f"labels: expected a list of names, got {labels!r}")
    names = tuple(labels)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"labels: expected at least one name and no duplicates, got {names}")
    return names


def resize_positions(positions: np.ndarray, old: Grid, new: Grid) -> np.ndarray:
    """Resize position embeddings [2 + F T, D] to a new grid [2 + F' T', D]; the first two rows are unchanged.

    Args:
        positions: those of the class and the distillation token, then the grid in frequency-major order.
        old: the present grid (frequency, time) of patches.
        new: the grid to resize to.
    """
    grid = positions[2:].reshape(*old, -1)
    for axis in (1, 0):
        grid = _resize_axis(grid, new[axis], axis)
    return np.concatenate([positions[:2], grid.reshape(new[0] * new[1], -1)])


def _resize_axis(grid: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Centre-crop an axis, or interpolate it linearly like PyTorch's bilinear with `align_corners=False`."""
    old = grid.shape[axis]
    if size <= old:
        start = old // 2 - size // 2
        return grid.take(np.arange(start, start + size), axis)
    centers = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0)
    low = centers.astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = np.expand_dims((centers - low).astype(grid.dtype), tuple(range(1, grid.ndim - axis)))
    return grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight


def init_classifier(config: ASTConfig, seed: int, dtype: np.dtype) -> dict[str, Any]:
    """Initialise a classifier from the distribution that `init` uses."""
    from ast_jax.model.modules import Head

    pooled = np.zeros((1, config.hidden_size), np.float32)
    params = Head(config).init(jax.random.key(seed), pooled)["params"]
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)


def _describe(old: Grid, new: Grid) -> str:
    """Describe how each axis of a grid is resized."""
    axes = [
        f"{name} {'cropped' if after < before else 'interpolated' if after > before else 'unchanged'}"
        for name, before, after in zip(("frequency", "time"), old, new, strict=True)
    ]
    return f"{old[0]}x{old[1]} to {new[0]}x{new[1]} ({', '.join(axes)})"
