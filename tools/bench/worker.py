"""Subprocesses of a benchmark: contenders that stay alive and are timed in turn, and single calls in a fresh process.

A contender is a function `module.name(**arguments)` of this package that prepares everything and returns the work to
time: a function without arguments that blocks until its result is there and returns it as a NumPy array. All contenders
are prepared before the first is timed, and timed alternately, so that load on the machine affects all of them.
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
PAUSE = 0.3  # seconds before a contender runs: threads of the previous one may still spin
TOOLS = pathlib.Path(__file__).parents[1]


class Worker:
    """Handle of a contender's process."""

    def __init__(self, contender: str, arguments: dict[str, Any], environment: Mapping[str, str] | None = None):
        """Start the process and prepare the contender in it.

        Args:
            contender: "module.function" of this package.
            arguments: JSON-serialisable keyword arguments of the function.
            environment: environment variables to set.

        Raises:
            RuntimeError: preparation failed; the message is the last line of its stderr.
        """
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            _command("serve", contender, arguments),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=TOOLS,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.preparation = self._answer()["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> tuple[np.ndarray, float]:
        """Run once; return the result and the seconds, which include compilation in the first run."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "result.npy"
            answer = self._ask("result", str(path))
            return np.load(path), answer["seconds"]

    def time(self, repeats: int) -> list[float]:
        """Run several times and return the seconds of each."""
        time.sleep(PAUSE)
        return self._ask("time", str(repeats))["seconds"]

    def peak_memory(self) -> int:
        """Return the peak memory of the process in bytes: the accelerator's memory if it uses one."""
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
            raise RuntimeError((self._errors.read().strip().splitlines() or ["ended without a message"])[-1])
        return json.loads(line)


@contextlib.contextmanager
def workers(
    contenders: dict[str, tuple[str, dict[str, Any]]], say: Callable[[str], None]
) -> Iterator[dict[str, Worker]]:
    """Start the contenders one after another; report and skip those that are not available here."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, (contender, arguments) in contenders.items():
            try:
                started[name] = stack.enter_context(Worker(contender, arguments))
            except RuntimeError as error:
                say(f"{name}: skipped ({error})")
        yield started


def in_process(function: str, *arguments: Any) -> Any:
    """Call "module.function" of this package in a fresh process and return its JSON-serialisable result."""
    command = _command("call", function, arguments)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=TOOLS)
    return json.loads(done.stdout)


def check_agreement(results: Mapping[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """Compare all results with the first one.

    Returns:
        The maximum absolute difference of each, relative to the maximum of the first.

    Raises:
        SystemExit: a difference exceeds the tolerance.
    """
    reference = next(iter(results.values()))
    scale = np.abs(reference).max()
    found = {name: float(np.abs(result - reference).max() / scale) for name, result in results.items()}
    wrong = {name: difference for name, difference in found.items() if not difference <= tolerance}
    if wrong:
        raise SystemExit(f"the results do not agree within {tolerance:g}: {wrong}")
    return found


def time_in_turn(workers: Mapping[str, Worker], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each contender: in each round, `repeats` runs of each in turn."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name] += worker.time(repeats)
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the median and the quartiles, "low" and "high"."""
    array = np.array(list(values))
    return {
        "median": float(np.median(array)),
        "low": float(np.percentile(array, 25)), "high": float(np.percentile(array, 75)),
    }  # fmt: skip


def elapsed(work: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Describe the machine: cores, CPU and Python version."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{num_cores()} cores of {name}, Python {platform.python_version()}"


def peak_rss() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _command(mode: str, function: str, arguments: Any) -> list[str]:
    """Return the command of a subprocess, to run in TOOLS: there `bench` is importable."""
    return [sys.executable, "-W", "ignore", "-m", "bench.worker", mode, function, json.dumps(arguments)]


def _function(name: str) -> Callable[..., Any]:
    """Import "module.function" of this package."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"bench.{module}"), function)


def _serve(contender: str, arguments: dict[str, Any]) -> None:
    """Prepare a contender, then answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    start = time.perf_counter()
    work = _function(contender)(**arguments)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(seconds=time.perf_counter() - start)
    for line in sys.stdin:
        what, detail = json.loads(line)
        if what == "result":
            start = time.perf_counter()
            result = work()
            taken = time.perf_counter() - start
            np.save(detail, result)
            answer(seconds=taken)
        elif what == "time":
            answer(seconds=[elapsed(work) for _ in range(int(detail))])
        else:
            answer(bytes=_device_peak() or peak_rss())


def _device_peak() -> int:
    """Return the peak memory of this process on the accelerator in bytes, 0 without one."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and jax.default_backend() != "cpu":
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0


if __name__ == "__main__":
    mode, name, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if mode == "serve":
        _serve(name, given)
    else:
        print(json.dumps(_function(name)(*given)))
