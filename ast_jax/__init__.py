"""The Audio Spectrogram Transformer in pure JAX/Flax.

The names below are the public API; each is imported from its module at first use, so that `import ast_jax` is instant.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ASTConfig": "config",
    "ASTFeatureExtractor": "audio.features",
    "ASTForAudioClassification": "model.modules",
    "ASTModel": "model.modules",
    "ASTOutput": "model.modules",
    "Analysis": "inference.timeline",
    "AudioError": "audio.io",
    "Checkpoint": "checkpoints.folder",
    "CheckpointError": "checkpoints.tree",
    "Embedding": "inference.embeddings",
    "Explanation": "inference.explanations",
    "FrontendConfig": "config",
    "Live": "audio.streams",
    "PRESETS": "config",
    "Program": "inference.export",
    "Segment": "inference.timeline",
    "TrainConfig": "training.config",
    "analyze": "inference.predict",
    "analyze_each": "inference.predict",
    "apply": "model.functional",
    "classify": "inference.predict",
    "embed": "inference.embeddings",
    "embed_each": "inference.embeddings",
    "encode": "model.functional",
    "explain": "inference.explanations",
    "export": "inference.export",
    "fbank": "audio.features",
    "from_torch": "checkpoints.pytorch.from_torch",
    "init": "model.functional",
    "load": "checkpoints.load",
    "load_program": "inference.export",
    "loss": "model.losses",
    "num_params": "model.functional",
    "read_audio": "audio.io",
    "resize": "checkpoints.resize",
    "save": "checkpoints.folder",
    "to_torch": "checkpoints.pytorch.to_torch",
    "wave_to_logits": "inference.export",
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
