"""What the tests of the features compare with: torchaudio's Kaldi, transformers' extractor, and shipped recordings.

torchaudio does not import beside a CPU build of PyTorch, but its `compliance/kaldi.py` is pure Python: it is imported
under an empty stand-in for the package around it. transformers takes a torchaudio that is installed for one that
imports, so its extractor is imported under the same stand-in, and with that runs on torchaudio's filter bank.
"""

import contextlib
import functools
import importlib
import importlib.util
import pathlib
import sys

import ast_jax
from ast_jax.audio.io import read_audio

RECORDINGS = sorted(
    path for path in (pathlib.Path(ast_jax.__file__).parent / "sounds").iterdir() if path.suffix in (".flac", ".ogg")
)


@contextlib.contextmanager
def torchaudio_not_executed():
    """Let submodules of torchaudio be imported without running `torchaudio/__init__.py`."""
    sys.modules["torchaudio"] = importlib.util.module_from_spec(importlib.util.find_spec("torchaudio"))
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]


with torchaudio_not_executed():
    torchaudio_kaldi = importlib.import_module("torchaudio.compliance.kaldi")
    transformers_ast = importlib.import_module(
        "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer"
    )


@functools.cache
def recording(path):
    """Return a shipped recording as read-only samples at 16 kHz."""
    samples = read_audio(path)
    samples.setflags(write=False)
    return samples
