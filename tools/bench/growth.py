"""Measurement and figure of `benchmark.py growth`: time and memory by clip length and batch size."""

from __future__ import annotations

import pathlib
import time
from typing import Any

from bench.worker import peak_rss

SECONDS = (1, 3, 10, 30, 100, 300)
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_SECONDS = 3  # length of a clip when the batch size varies
FRAMES_A_SECOND = 100


def measure(preset: str, seconds: float, batch: int, backward: bool, rounds: int) -> dict[str, Any]:
    """Return the number of tokens, the seconds of the fastest run, temporary memory and peak memory in bytes.

    Args:
        preset: name of the architecture.
        seconds: length of a clip, one window.
        batch: batch size.
        backward: compute the gradient with respect to every parameter instead of the logits.
        rounds: runs after the first one.
    """
    import jax
    import numpy as np

    import ast_jax

    config = ast_jax.PRESETS[preset](max_length=max(16, int(seconds * FRAMES_A_SECOND)))
    params = ast_jax.init(jax.random.key(0), config)
    spec = np.random.default_rng(0).standard_normal((batch, config.max_length, config.num_mel_bins), np.float32)

    def forward(params: Any, spec: Any) -> jax.Array:
        return ast_jax.apply(params, spec, config)

    function = jax.grad(lambda params, spec: forward(params, spec).sum()) if backward else forward
    compiled = jax.jit(function).lower(params, spec).compile()
    taken = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(params, spec))
        taken.append(time.perf_counter() - start)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    return {
        "preset": preset, "clip_seconds": seconds, "batch": batch, "backward": backward, "tokens": config.num_tokens,
        "seconds": min(taken[1:] or taken), "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak_rss(),
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Write a PNG figure of time and memory by clip length and by batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    kinds = {
        "clip_seconds": ("clip length, s", [row for row in rows if row["batch"] == 1]),
        "batch": (
            f"clips of {BATCH_SECONDS} s in a batch",
            [row for row in rows if row["clip_seconds"] == BATCH_SECONDS],
        ),
    }
    for column, (name, (label, chosen)) in enumerate(kinds.items()):
        for row, (value, what, scale) in enumerate(
            (("seconds", "seconds", 1), ("temporary_bytes", "temporary memory, MiB", 1 << 20))
        ):
            axes = panels[row, column]
            for backward, color in ((False, "#0072B2"), (True, "#D55E00")):
                line = [one for one in chosen if one["backward"] == backward]
                points = [one[name] for one in line], [one[value] / scale for one in line]
                axes.loglog(*points, color=color, marker="o", markersize=4, label="gradient" if backward else "logits")
            axes.set(xlabel=label, ylabel=what)
            axes.set_xticks(sorted({one[name] for one in chosen}), minor=False)
            axes.set_xticklabels([f"{tick:g}" for tick in axes.get_xticks()])
            axes.minorticks_off()
            axes.grid(color="#dddddd", linewidth=0.6)
    panels[0, 0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, format="png")
