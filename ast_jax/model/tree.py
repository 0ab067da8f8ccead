"""Parameter trees as {path: shape}, and the differences between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]
MAX_LISTED = 20  # names in each list; more would hide the first


def shapes_of(tree: Any) -> dict[str, Shape]:
    """Return the shape of every leaf by its path, "layers/mlp/fc1/kernel" for example."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}


def differences(expected: Mapping[str, Shape | None], got: Mapping[str, Shape]) -> str:
    """Describe how the names and shapes of two trees differ, in one line; empty where they do not.

    Args:
        expected: the shape of every name, None where any shape will do.
        got: what to compare with it.

    Returns:
        Sorted lists: "missing: a, b; unexpected: c; wrong shape: d (expected (2,), got (3,))".
    """
    common = sorted(expected.keys() & got.keys())
    lists = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(got.keys() - expected.keys()),
        "wrong shape": [
            f"{name} (expected {shape}, got {got[name]})"
            for name in common
            if (shape := expected[name]) is not None and shape != got[name]
        ],
    }
    return "; ".join(f"{title}: {_shortened(entries)}" for title, entries in lists.items() if entries)


def _shortened(entries: list[str]) -> str:
    """Join the first entries, and count the others."""
    more = f", and {len(entries) - MAX_LISTED} more" if len(entries) > MAX_LISTED else ""
    return ", ".join(entries[:MAX_LISTED]) + more
