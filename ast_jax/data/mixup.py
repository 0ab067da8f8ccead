"""Waveform mixup on the host; the original mixes waveforms, not features."""

from __future__ import annotations

import numpy as np

MIXUP_ALPHA = 10.0  # the paper's Beta(10, 10)


def mix_waveforms(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Return weight * first + (1 - weight) * second; the mean of each and of the sum is subtracted.

    As in the original, the second waveform is truncated or zero-padded to the length of the first.
    """
    second = second[: len(first)] - second.mean()
    mixed = weight * (first - first.mean())
    mixed[: len(second)] += (1 - weight) * second
    return mixed - mixed.mean()
