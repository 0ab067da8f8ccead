"""Knowledge distillation: a teacher's scores on the augmented batch are mixed into the labels (Hinton et al. 2015).

A teacher is a checkpoint of this package, or a program exported with `jax.export`. Gong et al. 2022 (CMKD) found
convolutional teachers best for small spectrogram transformers.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import load
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference.export import read_exported
from ast_jax.model.scores import scores
from ast_jax.training import step as train

EXPORTED = ".stablehlo"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher model.

    Attributes:
        params: parameters, the first argument of `logits`; empty for an exported program.
        logits: (params, batch) -> [b, C], in the order of the student's labels; batch has "waveform" and "num_samples".
    """

    params: Any
    logits: Callable[[Any, Mapping[str, jax.Array]], jax.Array]


def load_teacher(
    source: str | os.PathLike[str], student: ASTConfig, frontend: FrontendConfig, batch_size: int = 1
) -> Teacher:
    """Load a teacher whose labels include the student's; its other labels are ignored.

    Args:
        source: a model as for `load`, or a file `*.stablehlo` written with `jax.export`, a function of
            (waveform [b, S] float32 at the student's sampling rate, zero-padded; num_samples [b] int32)
            -> {label: logits [b]}, with a symbolic b or `batch_size`, and the student's S.
        student: configuration of the student; its labels select the columns.
        frontend: feature settings of the student.
        batch_size: batch size of one device, which an exported program must accept.

    Raises:
        ValueError: the teacher lacks labels or has another sampling rate, or the file holds no such program.
    """
    if pathlib.Path(source).suffix == EXPORTED:
        return _exported(pathlib.Path(source), student.labels, frontend, batch_size)
    checkpoint = load(source)
    if checkpoint.frontend.sampling_rate != frontend.sampling_rate:
        raise ValueError(
            f"{source}: expected a teacher for {frontend.sampling_rate} Hz, got one for "
            f"{checkpoint.frontend.sampling_rate} Hz"
        )
    return _checkpoint(checkpoint, _columns(source, checkpoint.config.labels, student.labels))


def soften(labels: np.ndarray, logits: np.ndarray, weight: float, config: ASTConfig) -> np.ndarray:
    """Return (1 - weight) * labels + weight * the teacher's scores, both [B, C].

    Scores are a sigmoid or a softmax as `problem_type` says, and the logits themselves for regression. All three losses
    are linear in their targets (mean squared error up to a constant), so that this is the weighted mean of two losses.
    """
    return ((1 - weight) * labels + weight * scores(np.asarray(logits), config)).astype(labels.dtype)


def _checkpoint(checkpoint: Checkpoint, columns: np.ndarray) -> Teacher:
    """Return a checkpoint as a teacher; waveforms longer than its input are truncated."""
    size = checkpoint.frontend.max_samples

    def logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        waveform = batch["waveform"][:, :size]
        waveform = jnp.pad(waveform, ((0, 0), (0, size - waveform.shape[1])))
        inputs = {"waveform": waveform, "num_samples": jnp.minimum(batch["num_samples"], size)}
        return train.eval_step(params, inputs, config=checkpoint.config, frontend=checkpoint.frontend)[:, columns]

    return Teacher(checkpoint.params, logits)


def _exported(path: pathlib.Path, labels: Sequence[str], frontend: FrontendConfig, batch_size: int) -> Teacher:
    """Return an exported program as a teacher."""
    program, outputs = read_exported(path)
    _columns(path, tuple(outputs), labels)
    platform = jax.default_backend()
    if {"gpu": "cuda"}.get(platform, platform) not in program.platforms:
        raise ValueError(
            f"{path}: exported for {', '.join(program.platforms)}, but this machine runs on {platform}; export it again"
        )
    try:
        shapes = jax.eval_shape(
            program.call,
            jax.ShapeDtypeStruct((batch_size, frontend.max_samples), jnp.float32),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        )
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: does not take waveform [{batch_size}, {frontend.max_samples}] float32 and num_samples "
            f"[{batch_size}] int32 ({reason[:200]})"
        ) from error
    for label in labels:
        output = shapes[label]
        if getattr(output, "shape", None) != (batch_size,) or not jnp.issubdtype(output.dtype, jnp.floating):
            raise ValueError(f"{path}: expected floating-point logits [{batch_size}] for {label}, got {output}")

    def logits(_: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        by_label = program.call(batch["waveform"], batch["num_samples"])
        return jnp.stack([by_label[label] for label in labels], axis=-1)

    return Teacher({}, logits)


def _columns(source: Any, has: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Return the indices of the wanted labels among the teacher's."""
    missing = [label for label in wanted if label not in has]
    if missing:
        raise ValueError(f"{source}: a teacher must have all labels of the data; it lacks {', '.join(missing)}")
    return np.array([list(has).index(label) for label in wanted])
