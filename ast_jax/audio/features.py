"""Waveforms to the model's input: log-mel frames, padded or cropped to one length, and normalised.

`ASTFeatureExtractor` and `fbank` run on the host in NumPy; `padded_log_mel` and `normalize` run on the device inside
`jit`. All of them call `ast_jax.audio.fbank.log_mel`.
"""

from __future__ import annotations

import json
import pathlib
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ast_jax.audio import fbank as kaldi
from ast_jax.config import PREPROCESSOR_FILE, FrontendConfig, read_config
from ast_jax.runtime.files import write_text

if TYPE_CHECKING:
    import jax

Array = TypeVar("Array", np.ndarray, "jax.Array")


def _namespace(array: Any) -> ModuleType:
    """Return `jax.numpy` for JAX arrays and tracers, else `numpy`, without importing JAX for NumPy users."""
    jax = sys.modules.get("jax")
    return jax.numpy if jax is not None and isinstance(array, jax.Array) else np


def _as_samples(waveform: Any, dtype: DTypeLike) -> Any:
    """Return samples in `dtype`; integers are refused, as their scale is unknown."""
    xp = _namespace(waveform)
    samples = xp.asarray(waveform)
    if not xp.issubdtype(samples.dtype, xp.floating):
        raise ValueError(
            f"waveform: expected floating-point samples in [-1, 1], got {samples.dtype}; "
            "divide 16-bit integers by 32768 first"
        )
    return samples.astype(dtype, copy=False) if xp is np else samples.astype(dtype)


def fbank(
    waveform: Array,
    sampling_rate: int = 16000,
    num_mel_bins: int = 128,
    *,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    window_type: str = "hanning",
    preemphasis_coefficient: float = 0.97,
    dither: float = 0.0,
    remove_dc_offset: bool = True,
    key: int | np.random.Generator | jax.Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """Compute Kaldi's log-mel filter bank (`compute-fbank-feats`), not normalised.

    NumPy in, NumPy out; JAX arrays and tracers give JAX arrays, so it also runs under `jax.jit` and `jax.grad`.

    Args:
        waveform: samples [S] in [-1, 1], or a batch [..., S]. Fewer samples than one frame are zero-padded to one.
        sampling_rate: Hz.
        num_mel_bins: F.
        frame_length: ms.
        frame_shift: ms.
        low_freq: Hz.
        high_freq: Hz; 0 or less counts from the Nyquist frequency.
        window_type: "hanning", "hamming", "povey", "rectangular" or "blackman".
        preemphasis_coefficient: 0 for none.
        dither: standard deviation of noise added to each sample; requires `key` unless 0.
        remove_dc_offset: subtract each frame's mean.
        key: seed (or `numpy.random.Generator`) for NumPy, `jax.random` key for JAX; used by `dither` only.
        dtype: of the computation and the result.

    Returns:
        [T, F] (or [..., T, F]) natural logarithms, T = 1 + (S - window) // shift.

    Raises:
        ValueError: integer samples, no samples, NaN or Inf among them (in NumPy), samples along the wrong axis, or an
            option out of its range.
    """
    config = FrontendConfig(
        sampling_rate=sampling_rate, num_mel_bins=num_mel_bins, frame_length=frame_length, frame_shift=frame_shift,
        low_freq=low_freq, high_freq=high_freq, window_type=window_type, dither=dither,
        preemphasis_coefficient=preemphasis_coefficient, remove_dc_offset=remove_dc_offset,
    )  # fmt: skip
    xp = _namespace(waveform)
    samples: Any = _as_samples(waveform, dtype)
    if samples.ndim == 0 or samples.shape[-1] == 0:
        raise ValueError(f"waveform: expected at least one sample, got shape {samples.shape}")
    if samples.ndim > 1 and samples.shape[-1] < config.window_samples <= samples.shape[-2]:
        raise ValueError(
            f"waveform: expected samples along the last axis, got shape {samples.shape}; average the channels first "
            "(waveform.mean(-1)), or transpose"
        )
    if xp is np:
        _check_finite(samples, "waveform")
    noise = None
    if dither and key is not None:
        shape = (*samples.shape[:-1], kaldi.num_frames(samples.shape[-1], config), config.window_samples)
        noise = _standard_normal(key, shape, dtype, xp)
    return kaldi.log_mel(samples, config, xp, noise)


def _standard_normal(key: Any, shape: tuple[int, ...], dtype: Any, xp: ModuleType) -> Any:
    """Draw noise with NumPy or JAX."""
    if xp is np:
        return np.random.default_rng(key).standard_normal(shape).astype(dtype)
    import jax

    return jax.random.normal(key, shape, dtype)


def normalize(spec: Array, config: FrontendConfig) -> Array:
    """Return (spec - mean) / (2 std) as the original does; `spec` itself if `do_normalize` is off."""
    return (spec - config.mean) / (2 * config.std) if config.do_normalize else spec


def padded_log_mel(
    waveforms: jax.Array, num_samples: jax.Array, config: FrontendConfig, noise: jax.Array | None = None
) -> jax.Array:
    """Compute the features of a zero-padded batch on the device, equal to the extractor's before normalisation.

    Args:
        waveforms: [B, S] JAX array with S = `config.max_samples`.
        num_samples: [B] valid samples; frames beyond them hold `config.padding_value`.
        config: the frontend's settings.
        noise: standard normal samples [B, T, window] for `config.dither`.

    Returns:
        [B, max_length, F], not normalised.
    """
    import jax.numpy as jnp

    spec = kaldi.log_mel(waveforms, config, jnp, noise)  # [B, T, F]
    valid = jnp.arange(spec.shape[-2])[None] < kaldi.num_frames(num_samples, config)[:, None]  # [B, T]
    return jnp.where(valid[..., None], spec, config.padding_value)


class ASTFeatureExtractor:
    """Turn waveforms into the model's input, with the fields and files of `transformers.ASTFeatureExtractor`.

    Example:
        >>> spec = ASTFeatureExtractor()(np.zeros(16000, np.float32), sampling_rate=16000)
        >>> spec.shape
        (1, 1024, 128)
    """

    def __init__(self, config: FrontendConfig | None = None, **fields: Any):
        """Take a `FrontendConfig`, its fields by name, or both (the fields override it)."""
        self.config = (config or FrontendConfig()).replace(**fields)

    def __repr__(self) -> str:
        return f"ASTFeatureExtractor({self.config!r})"

    @classmethod
    def from_pretrained(cls, folder: str | pathlib.Path) -> Self:
        """Read `preprocessor_config.json` from a folder.

        Raises:
            ValueError: missing, not a JSON object, or a value of the wrong type or out of its range.
        """
        return cls(read_config(FrontendConfig, pathlib.Path(folder) / PREPROCESSOR_FILE))

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """Write `preprocessor_config.json` into a folder, creating the folder if needed."""
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(pathlib.Path(folder) / PREPROCESSOR_FILE, json.dumps(self.config.to_json_dict(), indent=2) + "\n")

    @overload
    def __call__(
        self,
        waveforms: ArrayLike,
        sampling_rate: int | None = ...,
        *,
        max_length: int | None = ...,
        return_attention_mask: Literal[False] = ...,
        key: int | None = ...,
    ) -> np.ndarray: ...

    @overload
    def __call__(
        self,
        waveforms: ArrayLike,
        sampling_rate: int | None = ...,
        *,
        max_length: int | None = ...,
        return_attention_mask: Literal[True],
        key: int | None = ...,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def __call__(
        self,
        waveforms: ArrayLike,
        sampling_rate: int | None = None,
        *,
        max_length: int | None = None,
        return_attention_mask: bool = False,
        key: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Compute normalised log-mel spectrograms.

        Args:
            waveforms: one waveform ([S] or [1, S]), a batch [B, S], or a sequence of waveforms of any lengths; NumPy,
                JAX or anything with `__array__`; floating point in [-1, 1], mono.
            sampling_rate: Hz of `waveforms`; without it there is a warning, as a wrong rate cannot be detected.
            max_length: T for this call; None for the configured one.
            return_attention_mask: also return the number of valid frames. The field of the same name in the
                configuration has no effect, as in transformers.
            key: seed for `dither`; None for fresh noise in each call.

        Returns:
            [B, T, F] float32; with `return_attention_mask` also the valid frames [B] int32, for `lengths` of
            `ast_jax.apply`.

        Raises:
            ValueError: wrong rate, wrong shape, integer samples, NaN or Inf samples, or no samples at all.

        Warns:
            UserWarning: no sampling rate, or a waveform longer than `max_length` frames, which is cropped to its start.
        """
        config = self.config if max_length is None else self.config.replace(max_length=max_length)
        if sampling_rate is None:
            warnings.warn(
                f"no sampling_rate given: the samples are taken to be at {config.sampling_rate} Hz", stacklevel=2
            )
        elif sampling_rate != config.sampling_rate:
            raise ValueError(
                f"sampling_rate: expected {config.sampling_rate} Hz, got {sampling_rate} Hz; "
                "resample first (ast_jax.read_audio does when it reads a file)"
            )
        batch = _split_batch(waveforms)
        generator = np.random.default_rng(key)
        spec = np.full((len(batch), config.max_length, config.num_mel_bins), config.padding_value, np.float32)
        lengths = np.zeros(len(batch), np.int32)
        for index, waveform in enumerate(batch):
            samples = _checked(waveform, f"waveform {index}")
            frames = kaldi.num_frames(samples.size, config)
            if frames > config.max_length:
                warnings.warn(
                    f"waveform {index} has {frames} frames; only the first {config.max_length} "
                    f"({config.max_seconds:.2f} s) are used",
                    stacklevel=2,
                )
            lengths[index] = min(frames, config.max_length)
            noise = None
            if config.dither:
                noise = generator.standard_normal((lengths[index], config.window_samples)).astype(np.float32)
            spec[index, : lengths[index]] = kaldi.log_mel(samples[: config.max_samples], config, np, noise)
        spec = normalize(spec, config).astype(np.float32)
        return (spec, lengths) if return_attention_mask else spec


def _checked(waveform: Any, name: str) -> np.ndarray:
    """Return a waveform [S] as float32, checked to be finite and not empty."""
    samples = np.asarray(_as_samples(waveform, np.float32))
    if samples.size == 0:
        raise ValueError(f"{name}: expected at least one sample, got none")
    _check_finite(samples, name)
    return samples


def _check_finite(samples: np.ndarray, name: str) -> None:
    """Refuse NaN and Inf; minimum and maximum show them without a temporary array."""
    if not (np.isfinite(samples.min()) and np.isfinite(samples.max())):
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        raise ValueError(f"{name}: expected finite samples, got {bad} NaN or Inf among {samples.size}")


def _split_batch(waveforms: Any) -> list[Any]:
    """Return the waveforms [S] of a batch or a sequence."""
    if isinstance(waveforms, Sequence) and not hasattr(waveforms, "__array__"):
        if len(waveforms) == 0:
            raise ValueError("waveforms: expected at least one waveform, got an empty sequence")
        if np.ndim(waveforms[0]) == 0:  # a plain list of numbers is one waveform
            return [np.asarray(waveforms)]
        return [_single(np.asarray(waveform), f"waveform {index}") for index, waveform in enumerate(waveforms)]
    array = np.asarray(waveforms)
    if array.ndim != 2:
        return [_single(array, "waveforms")]
    if array.shape[0] == 0 or array.shape[0] > array.shape[1] > 0:
        raise ValueError(
            f"waveforms: expected a batch of shape (b, samples) with one sound per row, got shape {array.shape}; "
            "average channels, or transpose columns, first"
        )
    return list(array)


def _single(array: np.ndarray, name: str) -> np.ndarray:
    """Return [S] from [S] or [1, S]."""
    if array.ndim == 2 and array.shape[0] == 1:
        return array[0]
    if array.ndim != 1:
        raise ValueError(
            f"{name}: expected mono sound of shape (samples,), (1, samples) or a batch (b, samples), "
            f"got shape {array.shape}"
        )
    return array
