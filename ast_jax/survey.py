"""What there is to know of a data set before training on it: bad files, lengths, statistics of the features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import kaldi
from .audio import AudioError, header_seconds
from .config import FrontendConfig
from .data import load_example
from .datasets import DataError, Example


def check_headers(examples: Sequence[Example], frontend: FrontendConfig) -> int:
    """Return how many sounds are longer than the model's input, by their headers.

    Raises:
        DataError: some are not sound files; the message counts them and says what is wrong with the first.
    """
    bad, longer = [], 0
    for example in examples:
        try:
            longer += header_seconds(example.path) > frontend.max_seconds
        except AudioError as error:
            bad.append(error)
    if bad:
        raise DataError(f"{len(bad)} of {len(examples)} files cannot be used, the first is {bad[0]}")
    return longer


def statistics(
    examples: Sequence[Example], frontend: FrontendConfig, limit: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation of the log-mel values of up to `limit` examples, padding left out.

    Raises:
        DataError: the sounds are silent, so that there is no deviation.
    """
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    count, total, squares = 0, 0.0, 0.0
    for index in chosen:
        values = kaldi.log_mel(load_example(examples[index], frontend), frontend).astype(np.float64)
        count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
    mean = float(total / count)
    variance = squares / count - mean**2
    if not variance > 0:
        raise DataError(f"all of {len(chosen)} training sounds hold the same throughout, as silence does")
    return mean, float(np.sqrt(variance))
