"""`embed`: sounds to vectors, one per window or per patch, from any layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.streams import Audio
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference.predict import DEFAULT_MODEL
from ast_jax.inference.sliding_window import SlidingWindow, SoundOutputs, WindowOptions, WindowOutput, raise_error
from ast_jax.model import functional as model
from ast_jax.model.modules import valid_tokens

POOLS = ("pooled", "cls", "mean", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors of all windows of a sound, or an error.

    Attributes:
        source: name of the sound.
        values: [W, D], a vector per window; with `pool="none"` [W, F', T', D], a vector per patch that starts within
            the sound.
        times: [W, 2] seconds, start and end of each window.
        patch_times: [T', 2] seconds from the window's start, start and end of each patch; None without patches.
        patch_frequencies: [F', 2] Hz, lowest and highest of each patch; None without patches.
        error: one line, or None; with an error there are no windows.
    """

    source: str
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    patch_times: np.ndarray | None = None
    patch_frequencies: np.ndarray | None = None
    error: str | None = None

    @property
    def clip(self) -> np.ndarray:
        """[D], the mean of all vectors."""
        return self.values.reshape(-1, self.values.shape[-1]).mean(0)


class EmbedOptions(WindowOptions, total=False):
    """Options of `embed_each` that `embed` passes on."""

    layer: int | None
    """Number of blocks; by default all, and the final norm."""
    pool: str
    """"pooled" (the default), "cls", "mean" or "none"."""


@overload
def embed(
    audio: list[Any] | tuple[Any, ...],
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    **options: Unpack[EmbedOptions],
) -> list[Embedding]: ...


@overload
def embed(
    audio: Audio,
    checkpoint: Checkpoint | str | os.PathLike[str] = ...,
    *,
    sampling_rate: int | None = ...,
    **options: Unpack[EmbedOptions],
) -> Embedding: ...


def embed(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    **options: Unpack[EmbedOptions],
) -> Any:
    """Compute embeddings of a sound, or of each of a list of sounds.

    Args:
        audio: path, encoded bytes, file object, or samples [S] (with `sampling_rate`); or a list of any of these.
        checkpoint: a loaded checkpoint, with or without a classifier, or the argument of `load`.
        sampling_rate: Hz of samples given as arrays.
        **options: `layer`, `pool`, `window`, `hop`, `padding` and `batch_size` of `embed_each`.

    Returns:
        An `Embedding`, or a list of them for a list.

    Raises:
        AudioError: an unusable sound (see `read_audio`).
        ValueError: as `embed_each`.
    """
    several = isinstance(audio, list | tuple)
    sources = audio if several else [audio]
    results = raise_error(embed_each(sources, checkpoint, sampling_rate=sampling_rate, **options))
    return results if several else results[0]


def embed_each(
    sources: Iterable[Any],
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    layer: int | None = None,
    pool: str = "pooled",
    on_window: Callable[[WindowOutput], object] | None = None,
    **options: Unpack[WindowOptions],
) -> Iterator[Embedding]:
    """Yield an `Embedding` for every sound, in order; an unusable sound yields its error, and the others follow.

    Args:
        sources: each as `audio` of `embed`.
        checkpoint: as in `embed`.
        sampling_rate: as in `embed`.
        layer: number of blocks, as `hidden_states` are indexed: 0 for the embeddings, -1 for the last block; later
            blocks are not computed. None for the last block and the final norm, which is the classifier's input.
        pool: "pooled" for the mean of the class and the distillation token (the classifier's input), "cls" for the
            class token, "mean" for the mean over patches (with padding "mask" over unmasked ones), "none" for every
            patch.
        on_window: as in `analyze_each`; its `output` holds the vector [D] or vectors [F', T', D].
        **options: `window`, `hop`, `padding` and `batch_size` of `analyze_each`; with `pool="none"` the window is at
            most the model's input.

    Raises:
        ValueError: an option out of its range.
    """
    checkpoint = loaded(checkpoint)
    depth = checkpoint.config.num_hidden_layers
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    if layer is not None and not -depth - 1 <= layer <= depth:
        raise ValueError(f"layer: expected 0 to {depth}, or -1 to {-depth - 1} from the end, got {layer}")
    forward = _PooledTokens(None if layer is None else layer % (depth + 1), pool)
    windows = SlidingWindow(checkpoint, forward, **options)
    if pool == "none" and windows.grid.length > windows.grid.max_samples:
        raise ValueError(
            f"window: expected at most the model's input of {checkpoint.frontend.max_seconds:g} s for a vector of each "
            f"patch, got {options.get('window'):g} s"
        )
    for found in windows.run(sources, sampling_rate, on_window):
        if found.error:
            yield Embedding(found.name, error=found.error)
        elif pool == "none":
            yield _patch_embedding(found, checkpoint.config, checkpoint.frontend)
        else:
            yield Embedding(found.name, found.outputs, found.times)


def _patch_embedding(found: SoundOutputs, config: ASTConfig, frontend: FrontendConfig) -> Embedding:
    """Return the vectors [W, F', T', D] of the patches that start before the sound ends."""
    patch_times, patch_frequencies = patch_extents(config, frontend)
    columns = found.outputs.shape[2]  # fewer than the grid's with padding "own-length"
    inside = np.flatnonzero(patch_times[:columns, 0] < found.times[0, 1] - found.times[0, 0])
    return Embedding(found.name, found.outputs[:, :, inside], found.times, patch_times[inside], patch_frequencies)


def patch_extents(config: ASTConfig, frontend: FrontendConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the receptive fields of the grid's patches: seconds [T', 2] and Hz [F', 2], start and end of each."""
    rows, columns = config.grid
    patch_frequency, patch_time = config.patch_shape
    first = np.arange(columns) * config.time_stride  # frames
    starts = first * frontend.shift_samples
    ends = (first + patch_time - 1) * frontend.shift_samples + frontend.window_samples
    lowest = np.arange(rows) * config.frequency_stride  # mel bins
    edges = fbank.mel_edges(frontend)  # [F + 2] Hz
    hertz = np.stack([edges[lowest], edges[lowest + patch_frequency + 1]], axis=1)  # [F', 2]
    return np.stack([starts, ends], axis=1) / frontend.sampling_rate, hertz


@dataclasses.dataclass(frozen=True)
class _PooledTokens:
    """A forward function for `SlidingWindow`: the pooled tokens after block `layer`, or after the final norm."""

    layer: int | None
    """Number of blocks; by default all, and the final norm."""
    pool: str
    """"pooled" (the default), "cls", "mean" or "none"."""

    def __call__(
        self, params: Any, spec: jax.Array, config: ASTConfig, *, lengths: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Return [B, D], or [B, F', T', D] with `pool="none"`."""
        tokens = _tokens(params, spec, config, self.layer, lengths=lengths, **options)  # [B, N, D]
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
        if self.pool == "none":
            return tokens[:, 2:].reshape(len(tokens), *config.grid, -1)  # [B, F', T', D]
        if self.pool != "mean":
            return tokens[:, 0] if self.pool == "cls" else tokens[:, :2].mean(1)
        if lengths is None:
            return tokens[:, 2:].mean(1)
        valid = valid_tokens(lengths, config)[:, 2:, None]  # [B, F' T', 1]
        return jnp.where(valid, tokens[:, 2:], 0).sum(1) / valid.sum(1)


def _tokens(params: Any, spec: jax.Array, config: ASTConfig, layer: int | None, **options: Any) -> jax.Array:
    """Return tokens [B, N, D] after block `layer`, computing no later block."""
    if layer is None:
        return model.encode(params, spec, config, **options).last_hidden_state
    needed = max(layer, 1)
    params = {**params, "layers": jax.tree.map(lambda leaf: leaf[:needed], params["layers"])}
    config = config.replace(num_hidden_layers=needed)
    states = model.encode(params, spec, config, output_hidden_states=True, **options).hidden_states
    assert states is not None
    return states[layer]
