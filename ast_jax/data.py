"""Examples to batches of waveforms, in an order that (seed, epoch) alone decides.

Batches hold waveforms, not features: those are computed on the device, inside the training step.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .audio import decode
from .augment import MIXUP_ALPHA, mix_waveforms
from .config import FrontendConfig
from .datasets import Example

Batch = dict[str, np.ndarray]


def load_example(example: Example, frontend: FrontendConfig) -> np.ndarray:
    """Return the beginning of a sound, at most as much as fills the model's input: [<= frontend.max_samples]."""
    sound = decode(example.path, frontend.sampling_rate, max_seconds=frontend.max_seconds)
    return sound.samples[: frontend.max_samples]


def make_item(
    waveform: np.ndarray, targets: dict[int, float], frontend: FrontendConfig, num_labels: int
) -> dict[str, Any]:
    """Return one example as fixed-size arrays: zero-padded waveform, its true length, and label weights [C]."""
    labels = np.zeros(num_labels, np.float32)
    for index, weight in targets.items():
        labels[index] = weight
    padded = np.zeros(frontend.max_samples, np.float32)
    padded[: len(waveform)] = waveform
    return {"waveform": padded, "num_samples": np.int32(len(waveform)), "labels": labels}


def train_batches(
    examples: Sequence[Example],
    frontend: FrontendConfig,
    num_labels: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    mixup: float = 0.0,
    ramp: tuple[float, float] = (1.0, 1.0),
    num_threads: int = 4,
) -> Iterator[Batch]:
    """Yield one epoch's batches in shuffled order; a short last batch is dropped.

    Args:
        examples: the training split.
        frontend: says rate and length.
        num_labels: C.
        batch_size: B, over all devices.
        seed: with `epoch` decides order and mixup, whatever the number of threads.
        epoch: counts from 0.
        mixup: probability that an example is mixed with another, drawn uniformly from all of them.
        ramp: factors on `mixup` at the start and the end of the epoch.
        num_threads: that decode ahead.

    Yields:
        {"waveform": [B, S], "num_samples": [B], "labels": [B, C]}.
    """
    import grain

    def load(position_and_index: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
        position, index = position_and_index
        waveform = load_example(examples[index], frontend)
        targets = collections.Counter(dict.fromkeys(examples[index].targets, 1.0))
        rate = mixup * np.interp(position / len(examples), (0, 1), ramp)
        if rng.random() < rate:
            partner = examples[rng.integers(len(examples))]
            weight = rng.beta(MIXUP_ALPHA, MIXUP_ALPHA)
            waveform = mix_waveforms(waveform, load_example(partner, frontend), weight)
            targets = collections.Counter({target: weight for target in targets})
            targets.update(dict.fromkeys(partner.targets, 1 - weight))
        return make_item(waveform, targets, frontend, num_labels)

    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    dataset = grain.MapDataset.source(list(enumerate(order.tolist())))
    dataset = dataset.seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] >> 1)).random_map(load)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    with contextlib.closing(iter(dataset.to_iter_dataset(options))) as batches:  # closing ends its threads
        yield from batches


def eval_batches(
    examples: Sequence[Example], frontend: FrontendConfig, num_labels: int, *, batch_size: int, num_threads: int = 4
) -> Iterator[tuple[Batch, int]]:
    """Yield all examples in order as batches of one size, each with how many of it are real.

    A short last batch is filled up with silence; cut its results to the second value.
    """
    import grain

    def load(example: Example) -> dict[str, Any]:
        return make_item(load_example(example, frontend), dict.fromkeys(example.targets, 1.0), frontend, num_labels)

    dataset = grain.MapDataset.source(examples).map(load).batch(batch_size)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    with contextlib.closing(iter(dataset.to_iter_dataset(options))) as batches:
        for batch in batches:
            real = len(batch["labels"])
            yield {key: _fill_up(value, batch_size) for key, value in batch.items()}, real


def _fill_up(array: np.ndarray, size: int) -> np.ndarray:
    """Pad the first axis with zeros to `size`."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))
