"""Commands, files and measurements of `benchmark.py cold-start` and `files`."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

from bench.worker import elapsed, num_cores

PIPELINE = """
import importlib.util, sys
spec = importlib.util.find_spec("torchaudio")
if spec:  # transformers uses its pure-Python fbank only; the package does not load with every build of PyTorch
    sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)
import soundfile
from transformers import pipeline
samples, rate = soundfile.read(sys.argv[2], dtype="float32")
found = pipeline("audio-classification", model=sys.argv[1])({"raw": samples, "sampling_rate": rate})
print(found[0]["label"])
"""
DIFFERENT = 50  # files that are written; the others of a folder are hard links to them
SECONDS, RATE = 2.5, 44100  # one window of the shipped model


def write_models(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Write a model of the shipped one's size with random weights and square patches for ast_jax and transformers."""
    import jax

    import ast_jax

    shipped = ast_jax.load("sounds-tiny")
    config = shipped.config.replace(patch_size=16, frequency_stride=16, time_stride=16)
    params = jax.device_get(ast_jax.init(jax.random.key(0), config))
    kernel = np.random.default_rng(0).standard_normal((config.hidden_size, config.num_labels), np.float32)
    params["classifier"]["dense"]["kernel"] = kernel  # large, so that the scores differ clearly
    checkpoint = shipped.replace(params=params, config=config)
    ast_jax.save(ours, checkpoint)
    ast_jax.to_torch(checkpoint, theirs)


def classify_command(*arguments: Any) -> list[str]:
    """Return an `ast-jax classify` command."""
    return [sys.executable, "-m", "ast_jax.cli.main", "classify", *map(str, arguments)]


def pipeline_command(model: pathlib.Path, sound: pathlib.Path) -> list[str]:
    """Return a command that prints the top label of transformers' pipeline."""
    return [sys.executable, "-W", "ignore", "-c", PIPELINE, str(model), str(sound)]


def run(command: list[str], **environment: str) -> tuple[float, str, int]:
    """Run a command; return its seconds of wall time, its stdout, and its peak memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
    )
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: exit status {process.returncode}")
    return seconds, printed, used.ru_maxrss * 1024


def write_sounds(folder: pathlib.Path, count: int) -> None:
    """Write FLAC files of 2.5 s in stereo at 44.1 kHz, tones with noise; beyond the first `DIFFERENT`, hard links."""
    import soundfile

    folder.mkdir()
    times = np.arange(int(SECONDS * RATE)) / RATE
    for number in range(count):
        path = folder / f"{number:05d}.flac"
        if number >= DIFFERENT:
            os.link(folder / f"{number % DIFFERENT:05d}.flac", path)
            continue
        rng = np.random.default_rng(number)
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 5000) * times)
        soundfile.write(path, tone[:, None] + 0.02 * rng.standard_normal((len(times), 2)), RATE)


def measure_parts(folder: str, rounds: int) -> dict[str, Any]:
    """Return the seconds per file of decoding in one thread, of the model, and of both together in `analyze_each`.

    Args:
        folder: folder of audio files.
        rounds: number of measurements of each, in turn.

    Returns:
        "seconds", lists by "decode", "compute" and "together"; "cores"; "platform" of JAX.
    """
    import jax

    import ast_jax
    from ast_jax.audio import io as audio
    from ast_jax.inference import sliding_window

    paths = sorted(pathlib.Path(folder).iterdir())
    checkpoint = ast_jax.load("sounds-tiny")
    config, frontend = checkpoint.config, checkpoint.frontend
    batch_size = sliding_window.default_batch_size()
    params = jax.device_put(checkpoint.params)
    samples = audio.decode(paths[0], frontend.sampling_rate, frontend.max_seconds).samples[: frontend.max_samples]
    waveforms = np.tile(np.pad(samples, (0, frontend.max_samples - len(samples))), (batch_size, 1))
    inputs = waveforms, np.full(batch_size, len(samples), np.int32)
    chunk_size = sliding_window.chunk_size(batch_size, config)

    def decode() -> None:
        for path in paths:
            audio.decode(path, frontend.sampling_rate, frontend.max_seconds)

    def compute() -> None:
        for _ in range(len(paths) // batch_size):
            logits = sliding_window.forward_batch(params, inputs, config, frontend, chunk_size=chunk_size)
            jax.block_until_ready(logits)

    def together() -> None:
        assert not any(result.error for result in ast_jax.analyze_each(paths, checkpoint))

    work = {"decode": decode, "compute": compute, "together": together}
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            seconds[name].append(elapsed(function) / len(paths))
    return {"seconds": seconds, "cores": num_cores(), "platform": jax.default_backend()}
