"""Kaldi's log-mel filter bank, for NumPy on the host and `jax.numpy` inside `jit`.

The settings are those of Kaldi's `compute-fbank-feats` as the original AST calls it through torchaudio: samples in
[-1, 1], frames that lie wholly inside the signal (`--snip-edges=true`), an FFT at the next power of two, a power
spectrum, and a floor of float32 epsilon before the logarithm. There are two implementations, of whole arrays for the
device and in place for the host; tests compare them with each other and with Kaldi.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from ast_jax.config import FrontendConfig

MEL_FLOOR = float(np.finfo(np.float32).eps)  # 1.1920929e-07: digital silence becomes log(floor) = -15.942385
POVEY_EXPONENT = 0.85
BLACKMAN_COEFFICIENT = 0.42
# Frames per block in NumPy. Its arrays stay below 128 KiB, above which glibc's malloc may map fresh pages at every
# call; the page faults would cost more than the computation.
BLOCK = 60
BAND = 32  # mel filters per product in NumPy: most of the whole bank is zeros

Array = Any  # a NumPy array, a JAX array or a tracer


def num_frames(num_samples: Array, config: FrontendConfig) -> Array:
    """Return the number of frames of a signal: 1 + (n - window) // shift, at least 1."""
    window, shift = config.window_samples, config.shift_samples
    frames = 1 + (num_samples - window) // shift
    return max(frames, 1) if isinstance(frames, int) else frames.clip(1)


def cut_frames(waveform: Array, config: FrontendConfig, xp: ModuleType) -> Array:
    """Split [..., S] into overlapping frames [..., T, W]; a signal shorter than a frame is zero-padded to one."""
    window, shift = config.window_samples, config.shift_samples
    missing = window - waveform.shape[-1]
    if missing > 0:
        waveform = xp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, missing)])
    if xp is np:
        return np.lib.stride_tricks.sliding_window_view(waveform, window, axis=-1)[..., ::shift, :]
    frames, spans = num_frames(waveform.shape[-1], config), -(-window // shift)  # shifts per frame
    length = (frames - 1 + spans) * shift
    waveform = xp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, max(0, length - waveform.shape[-1]))])
    rows = waveform[..., :length].reshape(*waveform.shape[:-1], -1, shift)  # [..., shifts, shift]
    return xp.concatenate([rows[..., k : k + frames, :] for k in range(spans)], axis=-1)[..., :window]


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


def hz_to_mel(frequency: Array) -> Array:
    """Return 1127 ln(1 + f / 700), Kaldi's mel scale."""
    return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)


def mel_edges(config: FrontendConfig) -> np.ndarray:
    """Return the corner frequencies [F + 2] in Hz: filter i rises from i, peaks at i + 1 and falls to i + 2."""
    low, high = hz_to_mel(config.low_freq), hz_to_mel(config.top_frequency)
    mel = low + (high - low) * np.arange(config.num_mel_bins + 2) / (config.num_mel_bins + 1)
    return 700.0 * np.expm1(mel / 1127.0)


@functools.lru_cache(maxsize=16)
def mel_bank(num_mel_bins: int, fft_size: int, sampling_rate: int, low_freq: float, high_freq: float) -> np.ndarray:
    """Return the triangular filters [1 + fft_size / 2, F] in float64, linear in mel, with peak 1 (no area norm).

    A filter narrower than the FFT's resolution may contain no FFT bin: mel bin 3 of 128 at 16 kHz is such a one and
    always at the floor, as in Kaldi and torchaudio. The Nyquist bin is in no filter.
    """
    low, high = hz_to_mel(low_freq), hz_to_mel(high_freq)
    edges = low + (high - low) * np.arange(num_mel_bins + 2) / (num_mel_bins + 1)  # [F + 2]
    mel = hz_to_mel(np.arange(fft_size // 2) * sampling_rate / fft_size)[:, None]  # [bins, 1]
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel - left) / (center - left)
    falling = (right - mel) / (right - center)
    return np.pad(np.maximum(0.0, np.minimum(rising, falling)), ((0, 1), (0, 0)))


def log_mel(waveform: Array, config: FrontendConfig, xp: ModuleType = np, noise: Array | None = None) -> Array:
    """Return log-mel energies [..., T, F] of a waveform [..., S], in the waveform's dtype, not normalised.

    Per frame: dither, mean removal (Kaldi `--remove-dc-offset`), pre-emphasis x[i] - c x[i-1] with x[-1] = x[0]
    (`--preemphasis-coefficient`), window, power spectrum at the next power of two, mel bank, floor, logarithm. On a CPU
    one waveform is computed at a time, which is several times faster than the whole batch.

    Args:
        waveform: samples in [-1, 1].
        config: the filter bank's settings.
        xp: `numpy` or `jax.numpy`.
        noise: standard normal samples [..., T, W], scaled by `config.dither`; required unless that is 0.
    """
    if config.dither and noise is None:
        raise ValueError("dither: expected random samples, got none; pass `key` (or `seed`), or set dither to 0")
    if xp is np:
        return _on_host(waveform, config, noise)
    if waveform.ndim == 1:
        return _on_device(waveform, config, xp, noise)
    import jax

    def one_by_one(waveform: Array, noise: Array | None) -> Array:
        return jax.lax.map(lambda one: log_mel(one[0], config, xp, one[1]), (waveform, noise))

    def together(waveform: Array, noise: Array | None) -> Array:
        return _on_device(waveform, config, xp, noise)

    return jax.lax.platform_dependent(waveform, noise, cpu=one_by_one, default=together)


def _on_host(waveform: np.ndarray, config: FrontendConfig, noise: np.ndarray | None) -> np.ndarray:
    """Return log-mel energies [..., T, F] in NumPy, `BLOCK` frames at a time in preallocated buffers."""
    dtype, window = waveform.dtype, config.window_samples
    frames = num_frames(waveform.shape[-1], config)
    fft_size = _fft_size(window)
    taper, _ = _constants(config, dtype)
    scratch = np.zeros((min(BLOCK, frames), fft_size), dtype)  # zero beyond the window
    delayed = np.empty((len(scratch), window), dtype)
    spectra = np.empty((len(scratch), 1 + fft_size // 2), np.result_type(dtype, np.complex64))
    energies = np.empty((*waveform.shape[:-1], frames, config.num_mel_bins), dtype)
    for index in np.ndindex(waveform.shape[:-1]):
        framed = cut_frames(waveform[index], config, np)
        if noise is not None and config.dither:
            framed = framed + noise[index] * config.dither
        means = framed.mean(-1, keepdims=True) if config.remove_dc_offset else np.zeros((frames, 1), dtype)
        for start in range(0, frames, BLOCK):
            piece = slice(start, min(start + BLOCK, frames))
            rows = slice(0, piece.stop - start)
            block = scratch[rows, :window]
            np.subtract(framed[piece], means[piece], out=block)
            if config.preemphasis_coefficient:
                previous = delayed[rows]
                np.multiply(block[:, :-1], config.preemphasis_coefficient, out=previous[:, 1:])
                np.multiply(block[:, 0], config.preemphasis_coefficient, out=previous[:, 0])
                block -= previous
            block *= taper
            np.fft.rfft(scratch[rows], out=spectra[rows])
            parts = spectra[rows].view(dtype)  # real, imaginary, real, ...
            np.multiply(parts, parts, out=parts)
            found = energies[index][piece]
            for columns, filters, weights in _bands(config, dtype):
                np.matmul(parts[:, columns], weights, out=found[:, filters])
            np.maximum(found, MEL_FLOOR, out=found)
            np.log(found, out=found)
    return energies


def _on_device(waveform: Array, config: FrontendConfig, xp: ModuleType, noise: Array | None) -> Array:
    """Return log-mel energies [..., T, F] in `jax.numpy`, all frames at once."""
    taper, bank = _constants(config, waveform.dtype)
    frames = cut_frames(waveform, config, xp)  # [..., T, W]
    if noise is not None and config.dither:
        frames = frames + noise * config.dither
    if config.remove_dc_offset:
        frames = frames - frames.mean(-1, keepdims=True)
    if config.preemphasis_coefficient:
        previous = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
        frames = frames - config.preemphasis_coefficient * previous
    taper = taper.reshape((1,) * (frames.ndim - 1) + taper.shape)
    spectrum = xp.fft.rfft(frames * taper, n=_fft_size(config.window_samples))  # [..., T, 1 + fft_size / 2]
    power = spectrum.real**2 + spectrum.imag**2
    # At full precision: GPUs and TPUs would round the operands, which the logarithm of a small power exposes.
    energies = xp.matmul(power, bank, precision="highest")
    return xp.log(xp.maximum(energies, MEL_FLOOR))  # [..., T, F]


def _fft_size(window: int) -> int:
    """Return the next power of two."""
    return 1 << (window - 1).bit_length()


@functools.lru_cache(maxsize=16)
def _constants(config: FrontendConfig, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the window [W] and the mel bank [1 + fft_size / 2, F]."""
    window = config.window_samples
    taper = window_function(config.window_type, window)
    bank = mel_bank(config.num_mel_bins, _fft_size(window), config.sampling_rate, config.low_freq, config.top_frequency)
    return taper.astype(dtype), bank.astype(dtype)


@functools.lru_cache(maxsize=16)
def _bands(config: FrontendConfig, dtype: np.dtype) -> list[tuple[slice, slice, np.ndarray]]:
    """Return the mel bank as bands of adjacent filters, each restricted to its non-zero FFT bins.

    A band holds the columns of [T, 2 + fft_size] that it needs, in which the squared real and imaginary parts of a bin
    are adjacent; its filters; and their weights, with every row repeated twice.
    """
    _, bank = _constants(config, dtype)
    found = []
    for start in range(0, config.num_mel_bins, BAND):
        filters = slice(start, start + BAND)
        used = np.flatnonzero(bank[:, filters].any(-1))
        first, last = (used[0], used[-1] + 1) if len(used) else (0, 1)
        found.append((slice(2 * first, 2 * last), filters, np.repeat(bank[first:last, filters], 2, axis=0)))
    return found
