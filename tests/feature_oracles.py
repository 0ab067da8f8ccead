"""Reference implementations of the log-mel features, and the bundled recordings.

`transformers_fbank` runs transformers' NumPy pipeline at any setting, in float64. On every setting and recording that
the tests use, it agrees to 7e-12 with `torchaudio.compliance.kaldi.fbank` of torchaudio 2.11 in float64, so torchaudio
itself is not needed. `kaldi_fbank` runs kaldi-native-fbank, Kaldi's own C++ code in float32.
"""

import functools
import pathlib
from unittest import mock

import kaldi_native_fbank
import numpy as np
from transformers import audio_utils
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as transformers_ast,  # noqa: F401  (for the tests)
)

import ast_jax
from ast_jax.audio.io import read_audio

RECORDINGS = sorted(
    path for path in (pathlib.Path(ast_jax.__file__).parent / "sounds").iterdir() if path.suffix in (".flac", ".ogg")
)
TRANSFORMERS_WINDOWS = {"hanning": "hann", "hamming": "hamming", "povey": "povey", "rectangular": "boxcar"}


class DoublePrecision:
    """NumPy with a complex64 of double precision: transformers rounds the spectrum to complex64."""

    complex64 = np.complex128

    def __getattr__(self, name):
        return getattr(np, name)


def transformers_bank(config, fft_length):
    """Return transformers' mel filter bank [fft_length / 2 + 1, F] in float64."""
    nyquist = config.sampling_rate / 2
    return audio_utils.mel_filter_bank(
        num_frequency_bins=fft_length // 2 + 1,
        num_mel_filters=config.num_mel_bins,
        min_frequency=config.low_freq,
        max_frequency=config.high_freq if config.high_freq > 0 else config.high_freq + nyquist,
        sampling_rate=config.sampling_rate,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )


def transformers_fbank(samples, config, dither=0.0):
    """Return log-mel [T, F] in float64; `dither` draws a frame at a time from NumPy's global generator."""
    length, hop = (  # in samples
        int(config.sampling_rate * milliseconds / 1000) for milliseconds in (config.frame_length, config.frame_shift)
    )
    fft_length = 1 << (length - 1).bit_length()
    if config.window_type == "blackman":  # transformers has none
        phase = 2 * np.pi * np.arange(length) / (length - 1)
        window = 0.42 - 0.5 * np.cos(phase) + 0.08 * np.cos(2 * phase)
    else:
        window = audio_utils.window_function(length, TRANSFORMERS_WINDOWS[config.window_type], periodic=False)
    bank = transformers_bank(config, fft_length)
    with mock.patch.object(audio_utils, "np", DoublePrecision()):
        return audio_utils.spectrogram(
            samples,
            window,
            frame_length=length,
            hop_length=hop,
            fft_length=fft_length,
            power=2.0,
            center=False,
            dither=dither,
            preemphasis=config.preemphasis_coefficient,
            mel_filters=bank,
            mel_floor=float(np.finfo(np.float32).eps),
            log_mel="log",
            remove_dc_offset=config.remove_dc_offset,
            dtype=np.float64,
        ).T


def kaldi_fbank(samples, config):
    """Return Kaldi's log-mel [T, F] in float32; it refuses a bank with an empty filter, as at 128 bins and 16 kHz."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = config.sampling_rate
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = config.window_type
    options.frame_opts.frame_length_ms = config.frame_length
    options.frame_opts.frame_shift_ms = config.frame_shift
    options.frame_opts.preemph_coeff = config.preemphasis_coefficient
    options.frame_opts.remove_dc_offset = config.remove_dc_offset
    options.mel_opts.num_bins = config.num_mel_bins
    options.mel_opts.low_freq = config.low_freq
    options.mel_opts.high_freq = config.high_freq
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(config.sampling_rate, samples.tolist())
    extractor.input_finished()
    frames = [extractor.get_frame(index) for index in range(extractor.num_frames_ready)]
    return np.stack(frames) if frames else np.zeros((0, config.num_mel_bins), np.float32)


@functools.cache
def recording(path):
    """Return a bundled recording as read-only samples at 16 kHz."""
    samples = read_audio(path)
    samples.setflags(write=False)
    return samples
