"""Another input length, mel count, stride or label set for a model that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint

Grid = tuple[int, int]


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
    """Return a checkpoint for another input or other labels, as the original repository's constructor makes it.

    The grid of position embeddings is fitted to the new patches, each axis on its own: cut from the middle where it
    shrinks, interpolated where it grows (paper section 2.2). The patch kernel stays. What is None stays as it is.

    Args:
        checkpoint: the model to start from; it is not changed.
        max_length: T, frames.
        num_mel_bins: F.
        frequency_stride: step between patches in mel bins.
        time_stride: step between patches in frames.
        num_labels: C; another number than the model's gives it a new classifier, drawn at random.
        labels: names of the classes; other names than the model's give it a new classifier.
        keep_classifier: `labels` are the right names of the classes that the model has already.
        seed: of the new classifier.

    Returns:
        The checkpoint; a new classifier comes with `problem_type` None, and the provenance notes the changes.

    Raises:
        ValueError: an ImageNet model was fitted to another input before; a value is out of its range; or `labels`,
            `num_labels` and `keep_classifier` do not agree.
    """
    old = checkpoint.config
    wanted = {"max_length": max_length, "num_mel_bins": num_mel_bins, "frequency_stride": frequency_stride,
              "time_stride": time_stride}  # fmt: skip
    given = {name: value for name, value in wanted.items() if value is not None}
    config, frontend, params, changes = old.replace(**given), checkpoint.frontend, dict(checkpoint.params), []
    provenance = checkpoint.provenance
    if config.grid != old.grid and provenance.imagenet_only and provenance.grid_resized:
        raise ValueError(
            f"the checkpoint is an ImageNet model's, fitted to a grid of {old.grid[0]}x{old.grid[1]} already; to fit "
            "it again would not give what the original makes of it: convert the ImageNet model itself for this input"
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
    names = _checked(labels)
    count = len(names) if names else num_labels
    if num_labels not in (None, count):
        raise ValueError(f"num_labels: expected {count}, the number of labels, got {num_labels}")
    has_head = "classifier" in params
    if keep_classifier:
        if not (names and has_head and count == old.num_labels):
            raise ValueError(
                f"keep_classifier: expected labels, a name for each of the {old.num_labels if has_head else 0} classes "
                f"that the model has, got {len(names or ())}"
            )
        config = config.replace(id2label=names)
        changes += ["labels renamed"] if names != old.labels else []
    elif count is not None and (not has_head or count != old.num_labels or (names and names != old.labels)):
        config = config.replace(num_labels=count, id2label=names or (), problem_type=None)
        params["classifier"] = new_classifier(config, seed, np.asarray(params["layernorm"]["scale"]).dtype)
        changes.append(f"classifier of {count} labels: new, untrained")
    if not changes:
        return checkpoint
    provenance = provenance.changed(*changes, grid_resized=provenance.grid_resized or config.grid != old.grid)
    return checkpoint.replace(params=params, config=config, frontend=frontend, provenance=provenance)


def _checked(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of classes as a tuple.

    Raises:
        ValueError: a text instead of a list of texts, no names, or a name twice.
    """
    if labels is None:
        return None
    if isinstance(labels, str):
        raise ValueError(f"labels: expected a list of names, got {labels!r}")
    names = tuple(labels)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"labels: expected one name or more, each once, got {names}")
    return names


def resize_positions(positions: np.ndarray, old: Grid, new: Grid) -> np.ndarray:
    """Fit position embeddings [2 + F T, D] to a new grid [2 + F' T', D]; the two prefix tokens keep theirs.

    Args:
        positions: frequency-major, the prefix tokens first.
        old: their grid (frequency, time).
        new: the grid to fit.
    """
    grid = positions[2:].reshape(*old, -1)
    for axis in (1, 0):
        grid = _resize_axis(grid, new[axis], axis)
    return np.concatenate([positions[:2], grid.reshape(new[0] * new[1], -1)])


def _resize_axis(grid: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Cut an axis from its middle, or stretch it linearly between the centres of its cells, as PyTorch's bilinear."""
    old = grid.shape[axis]
    if size <= old:
        start = old // 2 - size // 2
        return grid.take(np.arange(start, start + size), axis)
    places = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0)
    low = places.astype(int)
    high = np.minimum(low + 1, old - 1)
    share = np.expand_dims((places - low).astype(grid.dtype), tuple(range(1, grid.ndim - axis)))
    return grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share


def new_classifier(config: Any, seed: int, dtype: np.dtype) -> dict[str, Any]:
    """Draw a classifier as `init` draws it."""
    from ast_jax.model.modules import Head

    pooled = np.zeros((1, config.hidden_size), np.float32)
    drawn = Head(config).init(jax.random.key(seed), pooled)["params"]
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), drawn)


def _describe(old: Grid, new: Grid) -> str:
    """Say what happened to a grid, axis by axis."""
    ways = [
        f"{name} {'cut' if now < was else 'interpolated' if now > was else 'kept'}"
        for name, was, now in zip(("frequency", "time"), old, new, strict=True)
    ]
    return f"{old[0]}x{old[1]} to {new[0]}x{new[1]} ({', '.join(ways)})"
