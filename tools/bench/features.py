"""Contenders of `benchmark.py features`: log-mel features of the same waveforms, not normalised.

`waveforms` is a NumPy file of float32 samples [B, S] in [-1, 1] at 16 kHz.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import numpy as np

Work = Callable[[], np.ndarray]
SAMPLING_RATE = 16000


def numpy_fbank(waveforms: str) -> Work:
    """Run `fbank` in NumPy."""
    import ast_jax

    clips = np.load(waveforms)
    return lambda: ast_jax.fbank(clips)


def numpy_extractor(waveforms: str) -> Work:
    """Run the feature extractor on the whole batch, in NumPy."""
    import ast_jax

    clips = np.load(waveforms)
    extractor = ast_jax.ASTFeatureExtractor(max_length=_frames(clips), do_normalize=False, return_attention_mask=False)
    return lambda: extractor(clips, SAMPLING_RATE)


def jitted_fbank(waveforms: str) -> Work:
    """Run jitted `fbank` on the whole batch."""
    import jax

    import ast_jax

    clips = jax.device_put(np.load(waveforms))
    compute = jax.jit(ast_jax.fbank)
    return lambda: np.asarray(compute(clips))


def torchaudio_fbank(waveforms: str) -> Work:
    """Run torchaudio's Kaldi fbank with the original's settings, clip by clip.

    Only its pure-Python module is imported: the package itself does not load with every build of PyTorch.
    """
    import torch

    spec = importlib.util.find_spec("torchaudio")
    if spec is None:
        raise ImportError("torchaudio is not installed; `pip install --no-deps torchaudio` suffices")
    sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)
    kaldi = importlib.import_module("torchaudio.compliance.kaldi")
    clips = torch.from_numpy(np.load(waveforms))

    @torch.inference_mode()
    def work() -> np.ndarray:
        found = [
            kaldi.fbank(
                clip[None], htk_compat=True, sample_frequency=SAMPLING_RATE, use_energy=False, window_type="hanning",
                num_mel_bins=128, dither=0.0, frame_shift=10,
            )
            for clip in clips
        ]  # fmt: skip
        return torch.stack(found).numpy()

    return work


def transformers_extractor(waveforms: str) -> Work:
    """Run transformers' feature extractor in NumPy, as it does without torchaudio."""
    name = "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer"
    sys.modules["torchaudio"] = None  # type: ignore[assignment]  # as if it were not installed
    module = importlib.import_module(name)
    clips = np.load(waveforms)
    extractor = module.ASTFeatureExtractor(max_length=_frames(clips), do_normalize=False)
    clips = list(clips)
    return lambda: np.stack(extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="np")["input_values"])


def write_waveforms(path: pathlib.Path, batch: int, seconds: float) -> None:
    """Write clips of tones with noise."""
    rng = np.random.default_rng(0)
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tones = np.sin(2 * np.pi * rng.uniform(100, 7000, (batch, 1)) * time)
    np.save(path, (0.3 * tones + 0.03 * rng.standard_normal(tones.shape)).astype(np.float32))


def _frames(clips: np.ndarray) -> int:
    return 1 + (clips.shape[1] - 400) // 160
