"""Sounds to vectors: what the model has made of a window, or of each of its patches, after any layer."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.windows import window_grid
from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import loaded
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.inference.predict import DEFAULT_MODEL, Runner, default_batch_size
from ast_jax.inference.sliding_window import Part, by_sound, listen, one_or_all
from ast_jax.model import functional as model
from ast_jax.model.modules import valid_tokens

POOLS = ("pooled", "cls", "mean", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """What came of a sound: vectors of all its windows, or an error.

    Attributes:
        source: the sound's name.
        values: [W, D], a vector for each window; with `pool="none"` [W, F', T', D], one for each patch that begins
            within the sound.
        times: [W, 2] seconds, beginning and end of each window.
        patch_times: [T', 2] seconds after the window's beginning that a patch hears; None without patches.
        patch_frequencies: [F', 2] Hz that a patch hears; None without patches.
        error: one line, or None; then there are no windows.
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


def embed(
    audio: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    **options: Any,
) -> Any:
    """Return vectors that say what a sound is like, or each of a list of sounds.

    Args:
        audio: path, encoded bytes, file object, or samples [S] (with `sampling_rate`); or a list of any of these.
        checkpoint: a loaded checkpoint, with a classifier or without, or what `load` takes.
        sampling_rate: Hz of samples given as arrays.
        **options: `layer`, `pool`, `window`, `hop`, `padding` and `batch_size` of `embed_each`.

    Returns:
        An `Embedding`, or a list of them for a list.

    Raises:
        AudioError: a sound that cannot be used (see `read_audio`).
        ValueError: as `embed_each`.
    """
    return one_or_all(audio, lambda sounds: embed_each(sounds, checkpoint, sampling_rate=sampling_rate, **options))


def embed_each(
    sources: Iterable[Any],
    checkpoint: Checkpoint | str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    sampling_rate: int | None = None,
    layer: int | None = None,
    pool: str = "pooled",
    window: float | None = None,
    hop: float | None = None,
    padding: str = "zero",
    batch_size: int | None = None,
) -> Iterator[Embedding]:
    """Yield an `Embedding` for every source in order; one that cannot be used yields its error and the others go on.

    Args:
        sources: as `audio` of `embed`.
        checkpoint: as in `embed`.
        sampling_rate: as in `embed`.
        layer: after how many blocks, as `hidden_states` counts them: 0 for the embeddings, -1 for the last block.
            Layers after it are not computed. None for the last one and the final norm, which the classifier takes.
        pool: "pooled" for the mean of the class and the distillation token (what the classifier takes), "cls" for the
            class token, "mean" for the mean of all patches (under "mask" of those that hear the sound alone), "none"
            for every patch.
        window: as in `analyze_each`; at most the model's input with `pool="none"`.
        hop: as in `analyze_each`.
        padding: as in `analyze_each`.
        batch_size: as in `analyze_each`.

    Raises:
        ValueError: an option out of its range.
    """
    checkpoint = loaded(checkpoint)
    config, frontend = checkpoint.config, checkpoint.frontend
    depth = config.num_hidden_layers
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    if layer is not None and not -depth - 1 <= layer <= depth:
        raise ValueError(f"layer: expected 0 to {depth}, or -1 to {-depth - 1} from the end, got {layer}")
    grid = window_grid(frontend, window, hop)
    if pool == "none" and grid.length > grid.longest:
        raise ValueError(
            f"window: expected at most the model's input of {frontend.max_seconds:g} s for a vector of each patch, "
            f"got {window:g} s"
        )
    output = _Pooling(None if layer is None else layer % (depth + 1), pool)
    batch_size = batch_size or default_batch_size()
    events = listen(
        sources, Runner(checkpoint, output, padding, batch_size), grid, frontend.sampling_rate,
        batch_size=batch_size, combine=functools.partial(np.mean, axis=0), array_rate=sampling_rate,
    )  # fmt: skip
    for end, parts in by_sound(events):
        if end.error:
            yield Embedding(end.name, error=end.error)
        else:
            yield _embedding(end.name, parts, pool, config, frontend)


def _embedding(name: str, parts: list[Part], pool: str, config: ASTConfig, frontend: FrontendConfig) -> Embedding:
    """Return a sound's embedding from the outputs of its windows."""
    times = np.array([[part.start, part.end] for part in parts])
    values = np.stack([part.output for part in parts])
    if pool != "none":
        return Embedding(name, values, times)
    patch_times, patch_frequencies = patch_extents(config, frontend)
    inside = np.flatnonzero(patch_times[: values.shape[2], 0] < times[0, 1] - times[0, 0])  # not in the padding
    return Embedding(name, values[:, :, inside], times, patch_times[inside], patch_frequencies)


def patch_extents(config: ASTConfig, frontend: FrontendConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return what the patches of the grid hear: seconds [T', 2] and Hz [F', 2], where filters begin and end."""
    rows, columns = config.grid
    patch_frequency, patch_time = config.patch_shape
    first = np.arange(columns) * config.time_stride  # frames
    starts = first * frontend.shift_samples
    ends = (first + patch_time - 1) * frontend.shift_samples + frontend.window_samples
    lowest = np.arange(rows) * config.frequency_stride  # mel bins
    edges = fbank.mel_edges(frontend)  # [F + 2] Hz
    hertz = np.stack([edges[lowest], edges[lowest + patch_frequency + 1]], axis=1)
    return np.stack([starts, ends], axis=1) / frontend.sampling_rate, hertz


@dataclasses.dataclass(frozen=True)
class _Pooling:
    """What `Runner` takes out of the model: `layer` 0 to L, or None for the final norm."""

    layer: int | None
    pool: str

    def __call__(
        self, params: Any, spec: jax.Array, config: ASTConfig, *, lengths: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Return [B, D], or [B, F', T', D] of all patches."""
        tokens = _tokens(params, spec, config, self.layer, lengths=lengths, **options)
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
        if self.pool == "none":
            return tokens[:, 2:].reshape(len(tokens), *config.grid, -1)
        if self.pool != "mean":
            return tokens[:, 0] if self.pool == "cls" else tokens[:, :2].mean(1)
        if lengths is None:
            return tokens[:, 2:].mean(1)
        valid = valid_tokens(lengths, config)[:, 2:, None]
        return jnp.where(valid, tokens[:, 2:], 0).sum(1) / valid.sum(1)


def _tokens(params: Any, spec: jax.Array, config: ASTConfig, layer: int | None, **options: Any) -> jax.Array:
    """Return tokens [B, N, D] after the layers that are needed for them."""
    if layer is None:
        return model.encode(params, spec, config, **options).last_hidden_state
    needed = max(layer, 1)
    params = {**params, "layers": jax.tree.map(lambda leaf: leaf[:needed], params["layers"])}
    config = config.replace(num_hidden_layers=needed)
    states = model.encode(params, spec, config, output_hidden_states=True, **options).hidden_states
    assert states is not None
    return states[layer]
