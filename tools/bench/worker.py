"""Contenders of a benchmark, each in a process of its own, timed in turn.

A contender is a function `module.name(**arguments)` that prepares everything and returns the work to time, a function
without arguments that returns its result as a NumPy array once that is there. The processes stay while the others are
timed, so that all see the same minutes of the machine, and none is timed while another prepares itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

MIB = 1 << 20
PAUSE = 0.3  # seconds before a contender runs: threads of the one before may spin for a while


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, contender: str, arguments: dict[str, Any], environment: Mapping[str, str] | None = None):
        """Start the process and prepare the contender in it.

        Args:
            contender: "module.function", the module in this folder.
            arguments: of the function, as JSON can hold them.
            environment: variables to set.

        Raises:
            RuntimeError: it could not be prepared; the message has the last line of what it said.
        """
        command = [sys.executable, "-W", "ignore", __file__, contender, json.dumps(arguments)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.preparation = self._answer()["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> tuple[np.ndarray, float]:
        """Run once; return the result and the seconds it took, which are compilation where this is the first time."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "result.npy"
            answer = self._ask("result", str(path))
            return np.load(path), answer["seconds"]

    def time(self, repeats: int) -> list[float]:
        """Run several times and return the seconds of each."""
        time.sleep(PAUSE)
        return self._ask("time", str(repeats))["seconds"]

    def peak_memory(self) -> int:
        """Return the most bytes that the process has had in memory: an accelerator's, where it uses one."""
        return self._ask("memory", "")["bytes"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, what: str, detail: str) -> dict[str, Any]:
        self._process.stdin.write(f"{json.dumps([what, detail])}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError((self._errors.read().strip().splitlines() or ["ended without a word"])[-1])
        return json.loads(line)


@contextlib.contextmanager
def workers(
    contenders: dict[str, tuple[str, dict[str, Any]]], say: Callable[[str], None]
) -> Iterator[dict[str, Worker]]:
    """Start the contenders, one after another; those that cannot be had here are told and left out."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, (contender, arguments) in contenders.items():
            try:
                started[name] = stack.enter_context(Worker(contender, arguments))
            except RuntimeError as error:
                say(f"{name}: left out ({error})")
        yield started


def check_agreement(results: Mapping[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """Compare all results with the first one's.

    Returns:
        The largest difference of each, relative to the first one's largest value.

    Raises:
        SystemExit: one of them is another result; nothing is to be timed then.
    """
    reference = next(iter(results.values()))
    scale = np.abs(reference).max()
    found = {name: float(np.abs(result - reference).max() / scale) for name, result in results.items()}
    wrong = {name: difference for name, difference in found.items() if not difference <= tolerance}
    if wrong:
        raise SystemExit(f"the results do not agree within {tolerance:g}: {wrong}")
    return found


def time_in_turn(workers: Mapping[str, Worker], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each contender: `repeats` in a row, `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name] += worker.time(repeats)
    return seconds


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Return median and quartiles."""
    values = np.array(list(seconds))
    return {
        "median": float(np.median(values)),
        "low": float(np.percentile(values, 25)), "high": float(np.percentile(values, 75)),
    }  # fmt: skip


def machine() -> str:
    """Say what this was measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}, Python {platform.python_version()}"


def _serve(contender: str, arguments: str) -> None:
    """Prepare a contender, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    module, function = contender.split(".")
    start = time.perf_counter()
    work = getattr(importlib.import_module(module), function)(**json.loads(arguments))

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(seconds=time.perf_counter() - start)
    for line in sys.stdin:
        what, detail = json.loads(line)
        if what == "result":
            start = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - start
            np.save(detail, result)
            answer(seconds=seconds)
        elif what == "time":
            answer(seconds=[_seconds(work) for _ in range(int(detail))])
        else:
            answer(bytes=_device_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _device_peak() -> int:
    """Return the most bytes of an accelerator's memory that this process has held; 0 where it uses none."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and jax.default_backend() != "cpu":
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    _serve(*sys.argv[1:])
