"""Kaldi's log-mel filter bank, one small function a step, written once for NumPy and `jax.numpy`.

Every step takes the array namespace `xp` (`numpy` on the host, `jax.numpy` inside jit) and arrays whose last axes are
frames [..., T, W], so batches need no loop. The settings are Kaldi's `compute-fbank-feats` as the original AST calls
them through torchaudio: samples in [-1, 1], frames that lie wholly inside the signal (`--snip-edges=true`), the FFT at
the next power of two, a power spectrum, and a floor of float32 epsilon under the logarithm.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from .config import FrontendConfig

MEL_FLOOR = float(np.finfo(np.float32).eps)  # 1.1920929e-07: digital silence becomes log(floor) = -15.942385
POVEY_EXPONENT = 0.85
BLACKMAN_COEFFICIENT = 0.42
BLOCK = 256  # frames that NumPy takes at a time: their samples and spectra fit a core's cache

Array = Any  # a NumPy array, a JAX array or a tracer


def num_frames(num_samples: Array, config: FrontendConfig) -> Array:
    """Return the frames in a signal: 1 + (n - window) // shift, and 1 for what is shorter than one window."""
    window, shift = config.window_samples, config.shift_samples
    frames = 1 + (num_samples - window) // shift
    return max(frames, 1) if isinstance(frames, int) else frames.clip(1)


def cut_frames(waveform: Array, config: FrontendConfig, xp: ModuleType) -> Array:
    """Cut [..., S] into overlapping frames [..., T, W]; a signal shorter than one frame is zero-padded to one."""
    window, shift = config.window_samples, config.shift_samples
    missing = window - waveform.shape[-1]
    if missing > 0:
        waveform = xp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, missing)])
    if xp is np:
        return np.lib.stride_tricks.sliding_window_view(waveform, window, axis=-1)[..., ::shift, :]
    frames, spans = num_frames(waveform.shape[-1], config), -(-window // shift)  # spans of a shift that a frame touches
    length = (frames - 1 + spans) * shift
    waveform = xp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, max(0, length - waveform.shape[-1]))])
    rows = waveform[..., :length].reshape(*waveform.shape[:-1], -1, shift)
    return xp.concatenate([rows[..., k : k + frames, :] for k in range(spans)], axis=-1)[..., :window]


def remove_dc(frames: Array) -> Array:
    """Subtract each frame's own mean (Kaldi `--remove-dc-offset`)."""
    return frames - frames.mean(-1, keepdims=True)


def preemphasize(frames: Array, coefficient: float, xp: ModuleType) -> Array:
    """Return x[i] - c x[i-1] within each frame, x[-1] being x[0] (Kaldi `--preemphasis-coefficient`)."""
    previous = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    return frames - coefficient * previous


@functools.lru_cache(maxsize=16)
def window_function(window_type: str, size: int) -> np.ndarray:
    """Return Kaldi's symmetric window [W] in float64 (`--window-type`)."""
    phase = 2 * np.pi * np.arange(size) / (size - 1)
    if window_type == "hanning":
        return 0.5 - 0.5 * np.cos(phase)
    if window_type == "hamming":
        return 0.54 - 0.46 * np.cos(phase)
    if window_type == "povey":
        return (0.5 - 0.5 * np.cos(phase)) ** POVEY_EXPONENT
    if window_type == "blackman":
        return BLACKMAN_COEFFICIENT - 0.5 * np.cos(phase) + (0.5 - BLACKMAN_COEFFICIENT) * np.cos(2 * phase)
    return np.ones(size)


def power_spectrum(frames: Array, xp: ModuleType) -> Array:
    """Return |FFT|² of frames zero-padded to the next power of two: [..., T, W] -> [..., T, 1 + fft_size / 2]."""
    fft_size = 1 << (frames.shape[-1] - 1).bit_length()
    spectrum = xp.fft.rfft(frames, n=fft_size)
    return spectrum.real**2 + spectrum.imag**2


def hz_to_mel(frequency: Array) -> Array:
    """Return 1127 ln(1 + f / 700), Kaldi's mel scale."""
    return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)


@functools.lru_cache(maxsize=16)
def mel_bank(num_mel_bins: int, fft_size: int, sampling_rate: int, low_freq: float, high_freq: float) -> np.ndarray:
    """Return the triangular filters [1 + fft_size / 2, F] in float64, linear in mel, of peak 1 and no area norm.

    A filter narrower than the FFT's resolution can hold no FFT bin: bin 3 of the 128 at 16 kHz does, and is always at
    the floor, as it is in Kaldi and torchaudio. The Nyquist bin belongs to no filter.
    """
    low, high = hz_to_mel(low_freq), hz_to_mel(high_freq)
    edges = low + (high - low) * np.arange(num_mel_bins + 2) / (num_mel_bins + 1)  # [F + 2]
    mel = hz_to_mel(np.arange(fft_size // 2) * sampling_rate / fft_size)[:, None]  # [bins, 1]
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel - left) / (center - left)
    falling = (right - mel) / (right - center)
    return np.pad(np.maximum(0.0, np.minimum(rising, falling)), ((0, 1), (0, 0)))


def matmul(left: Array, right: Array, xp: ModuleType) -> Array:
    """Multiply at full float32 precision: GPUs and TPUs would take fewer bits, which a log of small powers shows."""
    return left @ right if xp is np else xp.matmul(left, right, precision="highest")


def log_mel(waveform: Array, config: FrontendConfig, xp: ModuleType = np, noise: Array | None = None) -> Array:
    """Return log-mel energies [..., T, F] of a waveform [..., S], in the waveform's dtype, not normalised.

    On a CPU some frames of one waveform are computed at a time, which is several times faster than all at once.

    Args:
        waveform: samples in [-1, 1].
        config: the filter bank's settings.
        xp: `numpy` or `jax.numpy`.
        noise: standard normal samples [..., T, W], scaled by `config.dither`; needed only where that is not 0.
    """
    if xp is np:
        return _blocks(waveform, config, noise)
    if waveform.ndim == 1:
        return _log_mel(waveform, config, xp, noise)
    import jax

    def one_by_one(waveform: Array, noise: Array | None) -> Array:
        return jax.lax.map(lambda one: log_mel(one[0], config, xp, one[1]), (waveform, noise))

    def together(waveform: Array, noise: Array | None) -> Array:
        return _log_mel(waveform, config, xp, noise)

    return jax.lax.platform_dependent(waveform, noise, cpu=one_by_one, default=together)


def _blocks(waveform: np.ndarray, config: FrontendConfig, noise: np.ndarray | None) -> np.ndarray:
    """Return log-mel energies, `BLOCK` frames at a time, so that what lies between two steps stays in the cache."""
    frames, shift, window = num_frames(waveform.shape[-1], config), config.shift_samples, config.window_samples
    energies = np.empty((*waveform.shape[:-1], frames, config.num_mel_bins), waveform.dtype)
    for index in np.ndindex(waveform.shape[:-1]):
        for start in range(0, frames, BLOCK):
            stop = min(start + BLOCK, frames)
            piece = waveform[*index, start * shift : (stop - 1) * shift + window]
            energies[*index, start:stop] = _log_mel(
                piece, config, np, None if noise is None else noise[*index, start:stop]
            )
    return energies


def _log_mel(waveform: Array, config: FrontendConfig, xp: ModuleType, noise: Array | None) -> Array:
    """Return log-mel energies, all frames together."""
    dtype = waveform.dtype
    window = config.window_samples
    frames = cut_frames(waveform, config, xp)  # [..., T, W]
    if config.dither:
        if noise is None:
            raise ValueError("dither: expected random samples, got none; pass `key` (or `seed`), or set dither to 0")
        frames = frames + noise * config.dither
    if config.remove_dc_offset:
        frames = remove_dc(frames)
    if config.preemphasis_coefficient:
        frames = preemphasize(frames, config.preemphasis_coefficient, xp)
    frames = frames * window_function(config.window_type, window).astype(dtype)
    power = power_spectrum(frames, xp)  # [..., T, 1 + fft_size / 2]
    bank = mel_bank(config.num_mel_bins, 2 * (power.shape[-1] - 1), config.sampling_rate, config.low_freq,
                    config.top_frequency)  # fmt: skip
    return xp.log(xp.maximum(matmul(power, bank.astype(dtype), xp), MEL_FLOOR))  # [..., T, F]
