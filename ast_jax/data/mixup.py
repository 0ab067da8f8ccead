"""Mixup of waveforms, on the host, as the original mixes before it computes features."""

from __future__ import annotations

import numpy as np

MIXUP_ALPHA = 10.0  # the paper's Beta(10, 10)


def mix_waveforms(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Return weight * first + (1 - weight) * second, each and the sum freed of its mean (on the host).

    The second waveform is cut or zero-padded to the first's length, as in the original.
    """
    second = second[: len(first)] - second.mean()
    mixed = weight * (first - first.mean())
    mixed[: len(second)] += (1 - weight) * second
    return mixed - mixed.mean()
