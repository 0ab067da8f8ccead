"""What ast_jax costs beside what people would use instead: time and memory, in turn, medians and spread.

python tools/benchmark.py forward            # the base model's forward pass on this CPU
python tools/benchmark.py train              # a step of training on this CPU
python tools/benchmark.py features           # log-mel features of ten seconds of sound, and of 64 such clips
python tools/benchmark.py cold-start         # one recording in a fresh process
python tools/benchmark.py files              # many files: rate and memory
python tools/benchmark.py growth             # time and memory by length and batch, with a figure
python tools/benchmark.py gpu                # inference and training in bfloat16 on a GPU
python tools/benchmark.py convert            # the base model from PyTorch files, and its checkpoint loaded

Each takes --json FILE, and all but growth take --against FILE to say what has moved since that was written.
Results are compared before anything is timed. PyTorch and transformers come with the extra
`test`; ONNX Runtime (onnxruntime, onnx, onnxscript) and OpenVINO (openvino) are measured where they are installed.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import bench_features
import bench_files
import bench_growth
import bench_models
import bench_report
import bench_worker
import numpy as np
import typer
from bench_worker import MIB

app = typer.Typer(add_completion=False, help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
# Relative to the largest result: float32's rounding adds up over twelve layers to less than a thousandth of this.
TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.1  # 8 bits a number, over twelve layers
PRODUCT_SIZE = 3072  # of the square matrices whose product gives the peak

Rounds = Annotated[int, typer.Option(min=1, help="How often each takes its turn.")]
JsonFile = Annotated[pathlib.Path | None, typer.Option("--json", help="Also write the numbers here.")]
Against = Annotated[
    pathlib.Path | None,
    typer.Option("--against", help="Numbers that were written earlier: say what is beyond their spread."),
]


@app.command()
def forward(
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "base",
    max_length: Annotated[int, typer.Option(min=16, help="Frames of a clip.")] = 1024,
    batch_sizes: Annotated[list[int] | None, typer.Option("--batch-size", help="Default: 1 and 8.")] = None,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time the forward pass in float32: ast_jax, PyTorch eager and compiled, ONNX Runtime, OpenVINO.

    And in bfloat16, where the CPU may have units for it: ast_jax.
    """
    contenders = {
        "ast_jax": "ast_jax_forward", "PyTorch": "torch_eager", "torch.compile": "torch_compiled",
        "ONNX Runtime": "onnx_runtime", "OpenVINO": "openvino", "ast_jax, bfloat16": "ast_jax_forward_bfloat16",
    }  # fmt: skip
    cases = [(preset, max_length, size) for size in batch_sizes or [1, 8]]
    _compare_models("forward", contenders, cases, 1, rounds, json_file, against)


@app.command()
def train(
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time a step of training in float32: tiny at 128 frames, batch 32, and base at 512 frames, batch 2."""
    contenders = {"ast_jax": "ast_jax_train", "PyTorch": "torch_train"}
    _compare_models("train", contenders, [("tiny", 128, 32), ("base", 512, 2)], 3, rounds, json_file, against)


@app.command()
def features(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a clip.")] = 10.0,
    rounds: Rounds = 7,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time log-mel features of a clip, and of 64: ast_jax in NumPy and jitted, torchaudio, transformers' NumPy path.

    Times are relative to torchaudio's, or to transformers' where torchaudio is not installed.
    """
    reference = "torchaudio" if importlib.util.find_spec("torchaudio") else "transformers"
    contenders = {
        "torchaudio": "torchaudio_fbank", "ast_jax NumPy": "numpy_fbank", "ast_jax extractor": "numpy_extractor",
        "ast_jax jit": "jitted_fbank", "transformers": "transformers_extractor",
    }  # fmt: skip
    machine = bench_worker.machine()
    print(machine)
    rows = []
    for batch, repeats in ((1, 20), (64, 1)):
        title = f"features, {seconds:g} s, batch {batch}"
        print(f"{title}; {rounds} rounds of {repeats}")
        with tempfile.TemporaryDirectory() as scratch:
            path = pathlib.Path(scratch) / "waveforms.npy"
            bench_features.write_waveforms(path, batch, seconds)
            wanted = {
                name: (f"bench_features.{function}", {"waveforms": str(path)}) for name, function in contenders.items()
            }
            found = _measure(wanted, rounds, reference, repeats)
        print(f"{'':<18}{'ms a clip':>10}{'quartiles':>18}{'of ' + reference:>16}{'MiB':>7}{'differs':>9}")
        for name, row in found.items():
            rows.append({"case": title, "contender": name, **row})
            low, middle, high = (1e3 * row[key] / batch for key in ("low", "median", "high"))
            share = row["median"] / found[reference]["median"]
            print(
                f"{name:<18}{middle:>10.2f}{f'{low:.2f} to {high:.2f}':>18}{share:>16.3f}"
                f"{row['peak_bytes'] / MIB:>7.0f}{row['difference']:>9.0e}"
            )
    bench_report.finish(rows, machine, json_file, against)


@app.command("cold-start")
def cold_start(
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time `ast-jax classify` of a shipped recording in a fresh process, beside transformers' pipeline.

    Both have the same weights on the disk, of the shipped model's size but with patches that transformers takes. The
    first run of each, in which ours compiles, is told apart.
    """
    import ast_jax

    sound = pathlib.Path(ast_jax.__file__).parent / "sounds" / "siren.flac"
    machine = bench_worker.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(bench_files.write_models, folder / "ours", folder / "theirs").result()
        commands = {
            "ast-jax classify": bench_files.classify_command(sound, "-k", "1", "--model", folder / "ours"),
            "transformers pipeline": bench_files.pipeline_command(folder / "theirs", sound),
            "ast-jax, shipped model": bench_files.classify_command(sound, "-k", "1"),
        }
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        first = {name: bench_files.run(command, **cache) for name, command in commands.items()}
        labels = {name: printed.split()[-1] for name, (_, printed, _) in first.items()}
        if labels["ast-jax classify"] != labels["transformers pipeline"]:
            raise SystemExit(f"the results do not agree: {labels}")
        peaks = dict.fromkeys(commands, 0)
        for _ in range(rounds):
            for name, command in commands.items():
                taken, _, peak = bench_files.run(command, **cache)
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
    print(f"{machine}; {sound.name}, {rounds} fresh processes each, in turn")
    print(f"{'':<24}{'seconds':>9}{'quartiles':>16}{'first':>8}{'MiB':>7}")
    rows = []
    for name, taken in seconds.items():
        row = {"case": "cold start", "contender": name, **bench_worker.spread(taken), "seconds": taken,
               "first_seconds": first[name][0], "peak_bytes": peaks[name]}  # fmt: skip
        rows.append(row)
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        print(
            f"{name:<24}{row['median']:>9.2f}{quartiles:>16}{row['first_seconds']:>8.2f}{row['peak_bytes'] / MIB:>7.0f}"
        )
    print(f"ast-jax takes {rows[0]['median'] / rows[1]['median']:.2f} of the pipeline's time")
    bench_report.finish(rows, machine, json_file, against)


@app.command()
def files(
    count: Annotated[int, typer.Option(min=100, help="Files of the larger folder, for memory.")] = 2000,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time the shipped model on many files: the parts alone, and together as `classify` does; memory by their number.

    Three seconds of stereo at 44.1 kHz in FLAC. What the parts allow on a CPU is decoding spread over the cores and the
    model on all of them, one after the other; on an accelerator the slower of the two.
    """
    machine = bench_worker.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        bench_files.write_sounds(folder / "some", 200)
        found = bench_files.in_process("measure_parts", str(folder / "some"), rounds)
        peaks = {}
        for number in (count // 10, count):
            bench_files.write_sounds(folder / str(number), number)
            command = bench_files.classify_command(folder / str(number), "--output", folder / "out.csv")
            taken, _, peaks[number] = bench_files.run(command)
            lines = len((folder / "out.csv").read_text(encoding="utf-8").splitlines()) - 1
            if lines != number:
                raise SystemExit(f"expected {number} rows, found {lines}")
            print(f"ast-jax classify of {number} files: {taken:.1f} s, peak memory {peaks[number] / MIB:.0f} MiB")
    parts = {name: bench_worker.spread(values) for name, values in found["seconds"].items()}
    decode, compute = parts["decode"]["median"] / found["cores"], parts["compute"]["median"]
    allowed = decode + compute if found["platform"] == "cpu" else max(decode, compute)
    print(f"{machine}; ms a file, medians of {rounds} rounds of 200 files (quartiles)")
    for name, row in parts.items():
        print(f"{name:<12}{1e3 * row['median']:>8.2f}  ({1e3 * row['low']:.2f} to {1e3 * row['high']:.2f})")
    print(f"the parts allow {1e3 * allowed:.2f}; of that rate {allowed / parts['together']['median']:.0%} is reached")
    rows = [{"case": "files", "contender": f"ast-jax {name}", **row} for name, row in parts.items()]
    bench_report.finish(rows, machine, json_file, against, peak_bytes={str(key): value for key, value in peaks.items()})


@app.command()
def growth(
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1, help="Runs after the first, up to 30 s of sound.")] = 2,
    longest: Annotated[
        bool, typer.Option("--longest", help="Only the logits of the base model for 5 minutes.")
    ] = False,
    figure: Annotated[pathlib.Path | None, typer.Option("--figure", help="Draw them in this PNG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how time and memory grow with the length of a clip (1 s to 5 min) and with the size of a batch."""
    by_length = [(preset, seconds, 1) for seconds in bench_growth.SECONDS]
    by_batch = [(preset, bench_growth.BATCH_SECONDS, batch) for batch in bench_growth.BATCHES[1:]]
    cases = [(*case, backward) for case in by_length + by_batch for backward in (False, True)]
    if longest:
        cases = [("base", bench_growth.SECONDS[-1], 1, False)]
    machine = bench_worker.machine()
    print(f"{machine}\n{'':<8}{'sound, s':>9}{'batch':>7}{'tokens':>8}{'':>10}{'seconds':>9}{'MiB':>7}{'peak MiB':>10}")
    rows = []
    for case in cases:
        row = bench_growth.in_process(*case, rounds if case[1] < bench_growth.SECONDS[-2] else 0)
        rows.append(row)
        print(
            f"{row['preset']:<8}{row['clip_seconds']:>9g}{row['batch']:>7}{row['tokens']:>8}"
            f"{'gradient' if row['backward'] else 'logits':>10}{row['seconds']:>9.2f}"
            f"{row['temporary_bytes'] / MIB:>7.0f}{row['peak_bytes'] / MIB:>10.0f}",
            flush=True,
        )
    if figure is not None:
        bench_growth.draw(rows, f"{preset} model in float32, {machine}", figure)
    bench_report.finish(rows, machine, json_file, None)


@app.command()
def gpu(
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "base",
    max_length: Annotated[int, typer.Option(min=16, help="Frames of a clip.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a forward pass.")] = 64,
    train_batch_size: Annotated[int, typer.Option(min=1, help="Clips of a training step.")] = 32,
    device: Annotated[str, typer.Option(help="PyTorch's name of it; with cpu this only shows that it runs.")] = "cuda",
    rounds: Rounds = 7,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time inference and training in bfloat16 on a GPU beside PyTorch, and compare its numbers with this CPU's.

    Needs JAX and PyTorch that both see the GPU. It also tells what features on the device cost (waveforms to logits
    beside spectrograms to logits), how far float32 logits are from the CPU's with every product in full, and bfloat16
    logits from float32's.
    """
    half = {"dtype": "bfloat16"}
    torch_half = {**half, "device": device}
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both have to find room on it
    inference = {
        "PyTorch": ("torch_eager", torch_half), "torch.compile": ("torch_compiled", torch_half),
        "ast_jax": ("ast_jax_forward", half), "ast_jax waveforms": ("ast_jax_waveforms", half),
    }  # fmt: skip
    training = {
        "PyTorch": ("torch_train", torch_half), "torch.compile": ("torch_train_compiled", torch_half),
        "ast_jax": ("ast_jax_train", half),
    }  # fmt: skip
    peak = _product_peak(size=8192 if device == "cuda" else PRODUCT_SIZE, dtype="bfloat16", device=device)
    machine = f"{_device_name(device)}, {bench_worker.machine()}"
    print(f"{machine}; bfloat16 matrix products: {peak / 1e12:.2f} TFLOP/s")
    rows = []
    for title, contenders, batch, passes in (
        ("forward", inference, batch_size, 1), ("train", training, train_batch_size, 3),
    ):  # fmt: skip
        case = f"gpu {title}, {preset}, {max_length} frames, batch {batch}, bfloat16"
        rows += _one_case(case, contenders, (preset, max_length, batch), passes, rounds, peak, BFLOAT16_TOLERANCE)
    _drift(preset, max_length)
    bench_report.finish(rows, machine, json_file, against, product_flops=peak)


def _drift(preset: str, max_length: int) -> None:
    """Print how far the device's logits are from those of this CPU, for two clips."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, inputs = _write_case(pathlib.Path(scratch), preset, max_length, 2)
        arguments = {"folder": folder, "inputs": inputs}
        wanted = {
            "CPU, float32": ("bench_models.ast_jax_exact", arguments, {"JAX_PLATFORMS": "cpu"}),
            "float32 in full": ("bench_models.ast_jax_exact", arguments, {}),
            "float32": ("bench_models.ast_jax_forward", arguments, {}),
            "bfloat16": ("bench_models.ast_jax_forward", {**arguments, "dtype": "bfloat16"}, {}),
        }
        logits = {}
        for name, (function, given, environment) in wanted.items():
            with bench_worker.Worker(function, given, environment) as worker:
                logits[name] = worker.result()[0]
        reference = logits.pop("CPU, float32")
        print(f"logits beside the CPU's in float32, whose largest is {np.abs(reference).max():.3g}:")
        for name, found in logits.items():
            print(f"  {name:<16} differ by at most {np.abs(found - reference).max():.1e}")


def _device_name(device: str) -> str:
    """Return the name of the accelerator that JAX runs on, or of PyTorch's device where it runs on none."""
    code = "import jax; print(jax.devices()[0].device_kind, 'JAX', jax.__version__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return f"{done.stdout.strip()} ({device})"


def _compare_models(
    title: str,
    contenders: dict[str, str],
    cases: list[tuple[str, int, int]],
    passes: int,
    rounds: int,
    json_file: pathlib.Path | None,
    against: pathlib.Path | None,
) -> None:
    """Measure contenders on models of (preset, frames, batch size); print a table, and write it.

    Args:
        title: the command.
        contenders: functions of `bench_models` by the name to print.
        cases: the models.
        passes: forward passes whose operations one run takes.
        rounds: turns.
        json_file: where to write.
        against: what to compare with.
    """
    peak = _product_peak()
    print(f"{bench_worker.machine()}; matrix products of {PRODUCT_SIZE}: {peak / 1e9:.0f} GFLOP/s")
    results = []
    for preset, frames, batch in cases:
        case = f"{title}, {preset}, {frames} frames, batch {batch}, float32"
        given = {name: (function, {}) for name, function in contenders.items()}
        results += _one_case(case, given, (preset, frames, batch), passes, rounds, peak, TOLERANCE)
    bench_report.finish(results, bench_worker.machine(), json_file, against, product_flops=peak)


def _one_case(
    case: str,
    contenders: dict[str, tuple[str, dict[str, Any]]],
    model: tuple[str, int, int],
    passes: int,
    rounds: int,
    peak: float,
    tolerance: float,
) -> list[dict[str, Any]]:
    """Measure contenders (functions and arguments by name) on a model, print a table and return its rows."""
    preset, frames, batch = model
    print(f"{case}; {rounds} rounds")
    titles = f"{'ms a clip':>10}{'quartiles':>18}{'clips/s':>9}{'of peak':>9}{'first, s':>10}{'MiB':>7}"
    print(f"{'':<18}{titles}{'differs':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, inputs = _write_case(pathlib.Path(scratch), preset, frames, batch)
        wanted = {
            name: (f"bench_models.{function}", {"folder": folder, "inputs": inputs, **arguments})
            for name, (function, arguments) in contenders.items()
        }
        rows = _measure(wanted, rounds, "PyTorch", 1, tolerance)
        operations = passes * bench_models.operations(folder)
    for name, row in rows.items():
        row |= {"case": case, "contender": name}
        row["share_of_peak"] = operations * batch / row["median"] / peak
        low, middle, high = (1e3 * row[key] / batch for key in ("low", "median", "high"))
        print(
            f"{name:<18}{_digits(middle):>10}{f'{_digits(low)} to {_digits(high)}':>18}{1e3 / middle:>9.2f}"
            f"{row['share_of_peak']:>9.0%}{row['first_seconds']:>10.1f}{row['peak_bytes'] / MIB:>7.0f}"
            f"{row['difference']:>9.0e}"
        )
    return list(rows.values())


def _digits(value: float) -> str:
    """Return four digits of a number."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _write_case(scratch: pathlib.Path, preset: str, frames: int, batch: int) -> tuple[str, str]:
    """Write a model and its input by another process: this one stays small, as a child's peak begins with it."""
    folder, inputs = scratch / "model", scratch / "inputs.npy"
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        other.submit(bench_models.write_case, folder, inputs, preset, frames, batch).result()
    return str(folder), str(inputs)


def _measure(
    contenders: dict[str, tuple[str, dict[str, Any]]],
    rounds: int,
    reference: str,
    repeats: int,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """Return for each contender that can be had here: seconds of a run and of the first, memory, how it differs."""
    with bench_worker.workers(contenders, print) as started:
        if reference not in started:
            raise SystemExit(f"{reference} cannot be had here, and with nothing to compare with nothing is timed")
        first = {name: worker.result() for name, worker in started.items()}
        ordered = {reference: first[reference][0], **{name: result for name, (result, _) in first.items()}}
        same_input = {name: result for name, result in ordered.items() if "waveforms" not in name}
        coarse = {name: result for name, result in same_input.items() if "bfloat16" in name or name == reference}
        fine = {name: result for name, result in same_input.items() if "bfloat16" not in name}
        differences = bench_worker.check_agreement(coarse, BFLOAT16_TOLERANCE)
        differences |= bench_worker.check_agreement(fine, tolerance)
        bench_worker.time_in_turn(started, 1, repeats)  # what is compiled or tuned at the second run is no steady time
        seconds = bench_worker.time_in_turn(started, rounds, repeats)
        return {
            name: {
                **bench_worker.spread(seconds[name]), "first_seconds": first[name][1], "seconds": seconds[name],
                "peak_bytes": worker.peak_memory(), "difference": differences.get(name, math.nan),
            }
            for name, worker in started.items()
        }  # fmt: skip


def _product_peak(size: int = PRODUCT_SIZE, dtype: str = "float32", device: str = "cpu") -> float:
    """Return the most operations a second that JAX or PyTorch reach in products of large square matrices."""
    shape = {"size": size, "dtype": dtype}
    contenders = {
        "JAX": ("bench_models.jax_product", shape),
        "PyTorch": ("bench_models.torch_product", {**shape, "device": device}),
    }
    with bench_worker.workers(contenders, print) as started:
        bench_worker.time_in_turn(started, 1, 2)
        seconds = bench_worker.time_in_turn(started, 3, 3)
    return 2 * size**3 / min(min(values) for values in seconds.values())


@app.command()
def convert(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each kind, in turn.")] = 5,
    scratch: Annotated[
        pathlib.Path | None, typer.Option(help="Where to put 1.5 GB of files; default: the system's.")
    ] = None,
    json_file: JsonFile = None,
    against: Against = None,
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
    results = {
        name: {
            **bench_worker.spread([row["seconds"] for row in rows]), "seconds": [row["seconds"] for row in rows],
            "peak_bytes": max(row["peak_bytes"] for row in rows),
        }
        for name, rows in found.items()
    }  # fmt: skip
    print(f"{'':<28}{'seconds':>9}{'fastest':>9}{'slowest':>9}{'peak MiB':>10}")
    for name, row in results.items():
        fastest, slowest = min(row["seconds"]), max(row["seconds"])
        print(f"{name:<28}{row['median']:>9.2f}{fastest:>9.2f}{slowest:>9.2f}{row['peak_bytes'] / MIB:>10.0f}")
    print(f"{repeats} measurements each; {bench_worker.machine()}")
    rows = [{"case": "convert", "contender": f"ast_jax, {name}", **row} for name, row in results.items()]
    bench_report.finish(rows, bench_worker.machine(), json_file, against)


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
    from ast_jax.model import functional as model  # noqa: F401

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


if __name__ == "__main__":
    app()
