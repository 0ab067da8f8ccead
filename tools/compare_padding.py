"""Compare the padding modes for short sounds: mAP and time of a model on the test split, cut to several lengths.

    python tools/compare_padding.py DATA [--model sounds-tiny] [--condition clean] [--seconds 0.25 0.5 1 2]

DATA is a data set of `sounds_data.py build`. Each length has the middle of the same clips, those at least as long as
the longest length. Prints a Markdown table of macro mAP, and in brackets the time per clip (features and model, without
compilation).
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np
from ship_sounds_tiny import read_rows

import ast_jax
from ast_jax.audio.io import read_audio
from ast_jax.data import datasets
from ast_jax.inference.sliding_window import PADDING
from ast_jax.training import metrics


def clips(folder: pathlib.Path, model: ast_jax.Checkpoint, condition: str, longest: float):
    """Return the samples and labels [N, C] of the test clips that are at least `longest` seconds long."""
    rows = read_rows(folder)
    dataset = datasets.read_dataset(folder).reordered(model.config.labels)
    sounds, labels = [], []
    for example in dataset.splits["test"]:
        if rows[example.path.relative_to(folder).as_posix()]["condition"] != condition:
            continue
        samples = read_audio(example.path, model.frontend.sampling_rate)
        if len(samples) >= round(longest * model.frontend.sampling_rate):
            sounds.append(samples)
            labels.append(np.isin(np.arange(model.config.num_labels), example.targets))
    return sounds, np.array(labels, np.float32)


def middle(samples: np.ndarray, size: int) -> np.ndarray:
    """Return the middle `size` samples of a sound."""
    begin = (len(samples) - size) // 2
    return samples[begin : begin + size]


def scores_and_time(sounds: list[np.ndarray], model: ast_jax.Checkpoint, padding: str) -> tuple[np.ndarray, float]:
    """Return the scores [N, C] of sounds, and the seconds per sound."""

    def run(sounds: list[np.ndarray]) -> np.ndarray:
        rate = model.frontend.sampling_rate
        found = ast_jax.analyze_each(sounds, model, sampling_rate=rate, padding=padding)
        return np.array([analysis.scores[0] for analysis in found])

    run(sounds[:16])  # compiles
    began = time.perf_counter()
    scores = run(sounds)
    return scores, (time.perf_counter() - began) / len(sounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--model", default="sounds-tiny", help="model, as for ast-jax (default: %(default)s)")
    parser.add_argument(
        "--condition", default="clean", choices=["clean", "noisy"], help="condition of the clips (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="lengths (default: 0.25 0.5 1 2)"
    )
    options = parser.parse_args()
    model = ast_jax.load(options.model)
    sounds, labels = clips(options.data, model, options.condition, max(options.seconds))
    print(f"{len(sounds)} clips of {max(options.seconds):g} s or more, {options.condition}\n")
    print("| sound |", " | ".join(f"`{kind}`" for kind in PADDING), "|")
    print("|---" * (1 + len(PADDING)) + "|")
    for seconds in options.seconds:
        cut = [middle(samples, round(seconds * model.frontend.sampling_rate)) for samples in sounds]
        cells = []
        for kind in PADDING:
            scores, each = scores_and_time(cut, model, kind)
            precision = np.nanmean(metrics.average_precisions(scores, labels))
            cells.append(f"{precision:.3f} ({1000 * each:.1f} ms)")
        print(f"| {seconds:g} s |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
