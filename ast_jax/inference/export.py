"""Samples to logits as one function, and its export to a file with `jax.export`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.typing import ArrayLike, DTypeLike

from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.model import functional as model
from ast_jax.runtime.files import atomic_file

PLATFORMS = ("cpu", "cuda", "tpu")


def wave_to_logits(
    params: Mapping[str, Any],
    config: ASTConfig,
    frontend: FrontendConfig,
    *,
    dtype: DTypeLike | None = None,
    attention_implementation: str = "auto",
) -> Callable[..., jax.Array]:
    """Return a pure function from samples to logits, features included.

    It runs under `jit`, `grad` (with respect to the samples), `vmap` and `pmap`, and equals `ASTFeatureExtractor`
    followed by `apply`.

    Args:
        params: the parameter tree.
        config: the architecture.
        frontend: settings of the features; dither is switched off.
        dtype: as in `apply`.
        attention_implementation: as in `apply`.

    Returns:
        `logits(waveform, num_samples=None)`. `waveform` is [S] or [B, S], floating point in [-1, 1] at
        `frontend.sampling_rate`, at most `frontend.max_samples` long; shorter ones are padded. `num_samples` (a scalar
        or [B]) is the number of valid samples, None for S. The logits are [C] or [B, C].

    Raises:
        ValueError: `params` have no classifier; from the function, another shape or dtype, or too many samples.
    """
    if "classifier" not in params:
        raise ValueError("params: expected a classifier, got a headless model")
    settings = frontend.replace(dither=0.0)

    def logits(waveform: ArrayLike, num_samples: ArrayLike | None = None) -> jax.Array:
        waveform = jnp.asarray(waveform)
        if waveform.ndim not in (1, 2) or not jnp.issubdtype(waveform.dtype, jnp.floating):
            raise ValueError(
                f"waveform: expected floating-point samples [S] or [B, S], got {waveform.dtype} {waveform.shape}"
            )
        size = waveform.shape[-1]
        if not 0 < size <= settings.max_samples:
            raise ValueError(
                f"waveform: expected 1 to {settings.max_samples} samples ({settings.max_seconds:g} s), got {size}; "
                "split longer sounds into windows (ast_jax.analyze does)"
            )
        batch = jnp.atleast_2d(waveform)
        counts = jnp.broadcast_to(jnp.asarray(size if num_samples is None else num_samples), batch.shape[:1])
        batch = jnp.where(jnp.arange(size)[None] < counts[:, None], batch, 0)  # a frame may reach beyond them
        batch = jnp.pad(batch, ((0, 0), (0, settings.max_samples - size)))
        spec = normalize(padded_log_mel(batch, counts, settings), settings)
        out = model.apply(params, spec, config, dtype=dtype, attention_implementation=attention_implementation)
        return out[0] if waveform.ndim == 1 else out

    return logits


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported model: features, architecture and weights.

    Attributes:
        exported: the `jax.export.Exported` function.
        labels: names of the C classes, in the order of the logits.
        num_samples: S, its input length.
    """

    exported: jax_export.Exported = dataclasses.field(repr=False)  # its repr would print the weights
    labels: tuple[str, ...]
    num_samples: int

    def __call__(self, waveforms: ArrayLike, num_samples: ArrayLike | None = None) -> jax.Array:
        """Return logits [B, C] of waveforms [B, 1 to S]; `num_samples` [B] are the valid samples, None for all."""
        waveforms = jnp.asarray(waveforms, jnp.float32)
        if waveforms.ndim != 2 or not 0 < waveforms.shape[1] <= self.num_samples:
            raise ValueError(f"waveforms: expected [B, 1 to {self.num_samples}], got {waveforms.shape}")
        counts = jnp.full(len(waveforms), waveforms.shape[1]) if num_samples is None else jnp.asarray(num_samples)
        padded = jnp.pad(waveforms, ((0, 0), (0, self.num_samples - waveforms.shape[1])))
        named = self.exported.call(padded, counts.astype(jnp.int32))
        return jnp.stack([named[label] for label in self.labels], axis=-1)


def export(checkpoint: Checkpoint, path: str | os.PathLike[str], *, platforms: Sequence[str] = PLATFORMS) -> None:
    """Export a model to a file for `jax.export.deserialize`: samples to logits, for any batch size.

    The exported function takes waveforms [B, S] float32, S being the model's input length, and the number of valid
    samples [B] int32; it returns a dict from label to logits [B]. `finetune --teacher` accepts such files.

    Args:
        checkpoint: the model.
        path: of the file, written atomically.
        platforms: target platforms, of "cpu", "cuda", "rocm" and "tpu".

    Raises:
        ValueError: an unknown platform, no classifier, or duplicate labels.
    """
    params, config, frontend = checkpoint
    unknown = sorted(set(platforms) - {*PLATFORMS, "rocm"})
    if unknown or not platforms:
        raise ValueError(f"platforms: expected some of cpu, cuda, rocm, tpu, got {', '.join(unknown) or 'none'}")
    if len(set(config.labels)) < len(config.labels):
        raise ValueError("labels: expected unique names, as they are the keys of the program's output")
    logits = wave_to_logits(params, config, frontend)

    def program(waveform: jax.Array, num_samples: jax.Array) -> Mapping[str, jax.Array]:
        out = logits(waveform, num_samples)
        return {label: out[:, index] for index, label in enumerate(config.labels)}

    (batch,) = jax_export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((batch, frontend.max_samples), np.float32), jax.ShapeDtypeStruct((batch,), np.int32)
    exported = jax_export.export(jax.jit(program), platforms=list(platforms))(*shapes)
    with atomic_file(path) as name:
        name.write_bytes(exported.serialize())


def load_program(path: str | os.PathLike[str]) -> Program:
    """Load a file written by `export`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a program, or not readable by this version of JAX.
    """
    exported, outputs = read_exported(path)
    if exported.in_avals[0].ndim != 2:
        raise ValueError(f"{path}: expected a function of waveforms [b, S], got {exported.in_avals[0]}")
    return Program(exported, tuple(outputs), int(exported.in_avals[0].shape[1]))


def read_exported(path: str | os.PathLike[str]) -> tuple[jax_export.Exported, dict[str, Any]]:
    """Read an exported function of (waveform, num_samples), and its output: the shape of the logits by label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a program, or not readable by this version of JAX.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        exported = jax_export.deserialize(bytearray(content))
    except ImportError:
        raise
    except Exception as error:  # flatbuffers and XLA raise many types
        raise ValueError(f"{path}: not a program that jax.export of this version can read ({error})") from error
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    if not isinstance(outputs, dict) or len(outputs) != len(exported.out_avals) or len(exported.in_avals) != 2:
        raise ValueError(
            f"{path}: expected a function of (waveform, num_samples) that returns a dict of label to logits, got "
            f"{len(exported.in_avals)} inputs and a {type(outputs).__name__}"
        )
    return exported, outputs
