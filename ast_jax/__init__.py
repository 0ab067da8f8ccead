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
    "Analysis": "timeline",
    "AudioError": "audio",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "Embedding": "embeddings",
    "Explanation": "explanations",
    "FrontendConfig": "config",
    "Live": "streams",
    "PRESETS": "config",
    "Program": "programs",
    "Segment": "timeline",
    "TrainConfig": "settings",
    "analyze": "predict",
    "analyze_each": "predict",
    "apply": "model",
    "classify": "predict",
    "embed": "embeddings",
    "embed_each": "embeddings",
    "encode": "model",
    "explain": "explanations",
    "export": "programs",
    "fbank": "features",
    "from_torch": "convert",
    "init": "model",
    "load": "checkpoint",
    "load_program": "programs",
    "loss": "losses",
    "num_params": "model",
    "read_audio": "audio",
    "resize": "adapt",
    "save": "checkpoint",
    "to_torch": "revert",
    "wave_to_logits": "programs",
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
