"""Waveform mixup: weights, lengths, and subtraction of the mean."""

import numpy as np

from ast_jax.data.mixup import mix_waveforms


def test_mix_waveforms():
    first, second = np.array([1.0, 2.0, 3.0, 6.0], np.float32), np.array([4.0, 0.0], np.float32)
    mixed = mix_waveforms(first, second, 0.75)
    want = 0.75 * (first - 3) + 0.25 * np.array([2.0, -2.0, 0, 0])
    np.testing.assert_allclose(mixed, want - want.mean(), rtol=1e-6)
    assert len(mix_waveforms(second, first, 0.5)) == 2
