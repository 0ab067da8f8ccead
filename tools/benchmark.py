"""What ast_jax costs: time and memory, each measurement in a fresh process, several in turn, medians and spread.

python tools/benchmark.py convert            # the base model from PyTorch files, and its checkpoint loaded
python tools/benchmark.py convert --json FILE
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
MIB = 1 << 20


@app.callback()
def _commands() -> None:
    """Keep `convert` a command of its own, as others will follow."""


@app.command()
def convert(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each kind, in turn.")] = 5,
    scratch: Annotated[
        pathlib.Path | None, typer.Option(help="Where to put 1.5 GB of files; default: the system's.")
    ] = None,
    json_file: Annotated[pathlib.Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Convert the base model (86.6 million parameters, 527 labels) from both kinds of file, and load the result.

    The weights are drawn at random. Imports are done before the clock starts; memory is the process's peak, imports
    and the mapped source file included.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = pathlib.Path(folder)
        _in_fresh_process("make", str(place), "")  # this process stays small: a child's peak begins with its parent's
        kinds = {
            "safetensors to checkpoint": ("convert", place / "hf", place / "from_safetensors"),
            ".pth to checkpoint": ("convert", place / "audioset_10_10.pth", place / "from_pth"),
            "load the checkpoint, first": ("load", place / "from_safetensors", 1),
            "load the checkpoint, again": ("load", place / "from_safetensors", 2),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, arguments in kinds.items():
                if arguments[0] == "convert":
                    shutil.rmtree(arguments[2], ignore_errors=True)
                found[name].append(_in_fresh_process(*map(str, arguments)))
    results = {name: _summary(rows) for name, rows in found.items()}
    print(f"{'':<28}{'seconds':>9}{'fastest':>9}{'slowest':>9}{'peak MiB':>10}")
    for name, row in results.items():
        print(f"{name:<28}{row['median']:>9.2f}{row['fastest']:>9.2f}{row['slowest']:>9.2f}{row['peak_mib']:>10.0f}")
    print(f"{repeats} measurements each; {_machine()}")
    if json_file:
        content = {"machine": _machine(), "repeats": repeats, "results": results}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _make_sources(place: pathlib.Path) -> None:
    """Write the base model with random weights as PyTorch users have it, without PyTorch."""
    import jax

    import ast_jax

    config = ast_jax.PRESETS["base"]()
    params = jax.tree.map(lambda leaf: leaf.copy(), jax.device_get(ast_jax.init(jax.random.key(0), config)))
    checkpoint = ast_jax.Checkpoint(params, config, ast_jax.FrontendConfig())
    ast_jax.to_torch(checkpoint, place / "hf")
    ast_jax.to_torch(checkpoint, place / "audioset_10_10.pth", format="original")


def _in_fresh_process(*arguments: str) -> dict[str, float]:
    """Run `measure` in a process of its own and return what it prints."""
    os.sync()  # what earlier measurements wrote goes to the disk before this one, not during it
    command = [sys.executable, __file__, "measure", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@app.command(hidden=True)
def measure(what: str, source: str, detail: str) -> None:
    """Measure one thing in this process; the tool calls itself with this."""
    import orbax.checkpoint  # noqa: F401
    import safetensors  # noqa: F401

    import ast_jax
    from ast_jax import convert, model, revert  # noqa: F401

    seconds = 0.0
    if what == "make":
        _make_sources(pathlib.Path(source))
    elif what == "convert":
        seconds = _seconds(lambda: ast_jax.save(detail, ast_jax.load(source)))
    else:
        seconds = [_seconds(lambda: ast_jax.load(source)) for _ in range(int(detail))][-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    seconds = [row["seconds"] for row in rows]
    return {
        "median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds),
        "peak_mib": max(row["peak_bytes"] for row in rows) / MIB,
    }  # fmt: skip


def _machine() -> str:
    """Say what this was measured on."""
    import jax

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}, Python {platform.python_version()}, JAX {jax.__version__}"


if __name__ == "__main__":
    app()
