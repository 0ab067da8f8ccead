"""Measurements of `benchmark.py convert`."""

from __future__ import annotations

import pathlib
from typing import Any

from bench.worker import elapsed, peak_rss


def write_sources(folder: str) -> None:
    """Write the base model with random weights in both PyTorch formats: safetensors and the original's `.pth`."""
    import jax

    import ast_jax

    place, config = pathlib.Path(folder), ast_jax.PRESETS["base"]()
    params = jax.tree.map(lambda leaf: leaf.copy(), jax.device_get(ast_jax.init(jax.random.key(0), config)))
    checkpoint = ast_jax.Checkpoint(params, config, ast_jax.FrontendConfig())
    ast_jax.to_torch(checkpoint, place / "hf")
    ast_jax.to_torch(checkpoint, place / "audioset_10_10.pth", format="original")


def convert(source: str, target: str) -> dict[str, Any]:
    """Return seconds and peak memory of a conversion to a checkpoint."""
    _import_everything()
    import ast_jax

    return {"seconds": elapsed(lambda: ast_jax.save(target, ast_jax.load(source))), "peak_bytes": peak_rss()}


def load(source: str, times: int) -> dict[str, Any]:
    """Load a checkpoint some times; return seconds of the last time, and peak memory."""
    _import_everything()
    import ast_jax

    return {"seconds": [elapsed(lambda: ast_jax.load(source)) for _ in range(times)][-1], "peak_bytes": peak_rss()}


def _import_everything() -> None:
    """Import what conversion and loading import, which is not timed."""
    import orbax.checkpoint  # noqa: F401
    import safetensors  # noqa: F401

    from ast_jax.model import functional  # noqa: F401
