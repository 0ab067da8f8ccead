"""The Audio Spectrogram Transformer in pure JAX/Flax.

The names below are the public API; each is imported from its module at first use, so that `import ast_jax` is instant.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ASTConfig": "config",
    "ASTFeatureExtractor": "features",
    "ASTForAudioClassification": "modules",
    "ASTModel": "modules",
    "ASTOutput": "modules",
    "AudioError": "audio",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "FrontendConfig": "config",
    "PRESETS": "config",
    "TrainConfig": "settings",
    "apply": "model",
    "classify": "predict",
    "encode": "model",
    "fbank": "features",
    "from_torch": "convert",
    "init": "model",
    "load": "checkpoint",
    "loss": "losses",
    "num_params": "model",
    "read_audio": "audio",
    "resize": "adapt",
    "save": "checkpoint",
    "to_torch": "revert",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
