"""Time and memory of ast_jax beside the alternatives, measured alternately; medians and quartiles.

Each command writes its results with --json FILE; all but growth list the changes since an earlier FILE with
--against FILE. Before anything is timed, the outputs of all contenders are checked for agreement. PyTorch and
transformers come with the extra `test`; ONNX Runtime (onnxruntime, onnx, onnxscript) and OpenVINO (openvino) are
measured if they are installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Annotated, Any

import numpy as np
import typer
from bench import features as bench_features
from bench import files as bench_files
from bench import growth as bench_growth
from bench import models as bench_models
from bench import report as bench_report
from bench import worker as bench_worker
from bench.worker import MIB, in_process

app = typer.Typer(add_completion=False, help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
# Relative to the maximum of the result: float32 rounding errors of twelve layers are less than a thousandth of this.
TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.1  # rounding errors of 8 bits over twelve layers
PRODUCT_SIZE = 3072  # of the square matrices whose product measures peak FLOP/s

Rounds = Annotated[int, typer.Option(min=1, help="Rounds, in each of which all contenders take their turn.")]
JsonFile = Annotated[pathlib.Path | None, typer.Option("--json", help="Write the results to this file.")]
Against = Annotated[
    pathlib.Path | None,
    typer.Option("--against", help="Results of an earlier --json: list significant changes."),
]


@app.command()
def forward(
    preset: Annotated[str, typer.Option(help="Architecture: tiny, small or base.")] = "base",
    max_length: Annotated[int, typer.Option(min=16, help="Frames per clip.")] = 1024,
    batch_sizes: Annotated[list[int] | None, typer.Option("--batch-size", help="Default: 1 and 8.")] = None,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time the forward pass in float32: ast_jax, PyTorch eager and compiled, ONNX Runtime, OpenVINO.

    ast_jax also in bfloat16, for CPUs with bfloat16 instructions.
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
    """Time a training step in float32: tiny with 128 frames and batch 32, base with 512 frames and batch 2."""
    contenders = {"ast_jax": "ast_jax_train", "PyTorch": "torch_train"}
    _compare_models("train", contenders, [("tiny", 128, 32), ("base", 512, 2)], 3, rounds, json_file, against)


@app.command()
def features(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a clip.")] = 10.0,
    rounds: Rounds = 7,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time log-mel features of a clip, and of 64: ast_jax in NumPy and jitted, torchaudio, transformers in NumPy.

    Times are relative to torchaudio's, or to transformers' if torchaudio is not installed.
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
            wanted = {name: (f"features.{function}", {"waveforms": str(path)}) for name, function in contenders.items()}
            found = _measure(wanted, rounds, reference, repeats)
        print(f"{'':<18}{'ms/clip':>10}{'quartiles':>18}{'of ' + reference:>16}{'MiB':>7}{'differs':>9}")
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

    Both load the same weights, of the shipped model's size but with square patches, as transformers needs. The first
    run of each, in which ast-jax compiles, is listed separately.
    """
    import ast_jax

    sound = pathlib.Path(ast_jax.__file__).parent / "sounds" / "siren.flac"
    machine = bench_worker.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        in_process("files.write_models", str(folder / "ours"), str(folder / "theirs"))
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
    count: Annotated[int, typer.Option(min=100, help="Number of files when memory is measured.")] = 2000,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time the shipped model on many files: decoding and model alone and together; peak memory by number of files.

    Files are FLAC of 2.5 s in stereo at 44.1 kHz. The achievable time per file is, on a CPU, that of decoding on all
    cores plus that of the model; on an accelerator the longer of the two.
    """
    machine = bench_worker.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        bench_files.write_sounds(folder / "some", 200)
        found = in_process("files.measure_parts", str(folder / "some"), rounds)
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
    print(f"{machine}; ms per file, medians of {rounds} rounds of 200 files (quartiles)")
    for name, row in parts.items():
        print(f"{name:<12}{1e3 * row['median']:>8.2f}  ({1e3 * row['low']:.2f} to {1e3 * row['high']:.2f})")
    reached = allowed / parts["together"]["median"]
    print(f"achievable: {1e3 * allowed:.2f} ms per file; together reaches {reached:.0%} of that rate")
    rows = [{"case": "files", "contender": f"ast-jax {name}", **row} for name, row in parts.items()]
    bench_report.finish(rows, machine, json_file, against, peak_bytes={str(key): value for key, value in peaks.items()})


@app.command()
def growth(
    preset: Annotated[str, typer.Option(help="Architecture: tiny, small or base.")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1, help="Runs after the first, for clips of up to 30 s.")] = 2,
    longest: Annotated[
        bool, typer.Option("--longest", help="Measure only the base model's logits of a clip of 5 minutes.")
    ] = False,
    figure: Annotated[pathlib.Path | None, typer.Option("--figure", help="Write a figure to this PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how time and memory grow with the length of a clip (1 s to 5 min) and with the batch size."""
    by_length = [(preset, seconds, 1) for seconds in bench_growth.SECONDS]
    by_batch = [(preset, bench_growth.BATCH_SECONDS, batch) for batch in bench_growth.BATCHES[1:]]
    cases = [(*case, backward) for case in by_length + by_batch for backward in (False, True)]
    if longest:
        cases = [("base", bench_growth.SECONDS[-1], 1, False)]
    machine = bench_worker.machine()
    print(f"{machine}\n{'':<8}{'clip, s':>9}{'batch':>7}{'tokens':>8}{'':>10}{'seconds':>9}{'MiB':>7}{'peak MiB':>10}")
    rows = []
    for case in cases:
        row = in_process("growth.measure", *case, rounds if case[1] < bench_growth.SECONDS[-2] else 0)
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
    preset: Annotated[str, typer.Option(help="Architecture: tiny, small or base.")] = "base",
    max_length: Annotated[int, typer.Option(min=16, help="Frames per clip.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the forward pass.")] = 64,
    train_batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the training step.")] = 32,
    device: Annotated[
        str, typer.Option(help="PyTorch's name of the device; cpu is for trying out the command.")
    ] = "cuda",
    rounds: Rounds = 7,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time inference and training in bfloat16 on a GPU beside PyTorch, and compare logits with this CPU's.

    Needs builds of JAX and PyTorch that support the GPU. Waveforms to logits beside features to logits shows the cost
    of features on the device. Logits of the GPU in float32 (at the default and at the highest matmul precision) and in
    bfloat16 are compared with float32 logits of the CPU.
    """
    half = {"dtype": "bfloat16"}
    torch_half = {**half, "device": device}
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX and PyTorch share its memory
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
    """Print the maximum difference of the device's logits from this CPU's, for two clips."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, inputs = _write_case(pathlib.Path(scratch), preset, max_length, 2)
        arguments = {"folder": folder, "inputs": inputs}
        wanted = {
            "CPU, float32": ("models.ast_jax_exact", arguments, {"JAX_PLATFORMS": "cpu"}),
            "float32, highest": ("models.ast_jax_exact", arguments, {}),
            "float32": ("models.ast_jax_forward", arguments, {}),
            "bfloat16": ("models.ast_jax_forward", {**arguments, "dtype": "bfloat16"}, {}),
        }
        logits = {}
        for name, (function, given, environment) in wanted.items():
            with bench_worker.Worker(function, given, environment) as worker:
                logits[name] = worker.result()[0]
        reference = logits.pop("CPU, float32")
        print(f"logits compared with the CPU's in float32 (maximum {np.abs(reference).max():.3g}):")
        for name, found in logits.items():
            print(f"  {name:<16} differ by at most {np.abs(found - reference).max():.1e}")


def _device_name(device: str) -> str:
    """Return the names of JAX's default device and of PyTorch's device."""
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
    """Measure contenders on models, print a table for each, write and compare the results.

    Args:
        title: name of the command.
        contenders: functions of `bench.models` by printed name.
        cases: (preset, frames, batch size) of each model.
        passes: FLOPs of one run, in forward passes.
        rounds: number of rounds.
        json_file: see `bench.report.finish`.
        against: see `bench.report.finish`.
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
    """Measure contenders (functions and arguments by printed name) on a model, print a table and return its rows."""
    preset, frames, batch = model
    print(f"{case}; {rounds} rounds")
    titles = f"{'ms/clip':>10}{'quartiles':>18}{'clips/s':>9}{'of peak':>9}{'first, s':>10}{'MiB':>7}"
    print(f"{'':<18}{titles}{'differs':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, inputs = _write_case(pathlib.Path(scratch), preset, frames, batch)
        wanted = {
            name: (f"models.{function}", {"folder": folder, "inputs": inputs, **arguments})
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
    """Return a number with four significant digits."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _write_case(scratch: pathlib.Path, preset: str, frames: int, batch: int) -> tuple[str, str]:
    """Write a model and its input in another process: a child's peak memory starts at that of this process."""
    folder, inputs = str(scratch / "model"), str(scratch / "inputs.npy")
    in_process("models.write_case", folder, inputs, preset, frames, batch)
    return folder, inputs


def _measure(
    contenders: dict[str, tuple[str, dict[str, Any]]],
    rounds: int,
    reference: str,
    repeats: int,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """Return times, peak memory and difference from the reference of each available contender."""
    with bench_worker.workers(contenders, print) as started:
        if reference not in started:
            raise SystemExit(
                f"{reference} is not available here, but the other results are compared with it; install it"
            )
        first = {name: worker.result() for name, worker in started.items()}
        ordered = {reference: first[reference][0], **{name: result for name, (result, _) in first.items()}}
        same_input = {name: result for name, result in ordered.items() if "waveforms" not in name}
        coarse = {name: result for name, result in same_input.items() if "bfloat16" in name or name == reference}
        fine = {name: result for name, result in same_input.items() if "bfloat16" not in name}
        differences = bench_worker.check_agreement(coarse, BFLOAT16_TOLERANCE)
        differences |= bench_worker.check_agreement(fine, tolerance)
        bench_worker.time_in_turn(started, 1, repeats)  # warm-up: the second run may still compile or tune
        seconds = bench_worker.time_in_turn(started, rounds, repeats)
        return {
            name: {
                **bench_worker.spread(seconds[name]), "first_seconds": first[name][1], "seconds": seconds[name],
                "peak_bytes": worker.peak_memory(), "difference": differences.get(name, math.nan),
            }
            for name, worker in started.items()
        }  # fmt: skip


def _product_peak(size: int = PRODUCT_SIZE, dtype: str = "float32", device: str = "cpu") -> float:
    """Return the higher FLOP/s of JAX and PyTorch in products of large square matrices."""
    shape = {"size": size, "dtype": dtype}
    contenders = {
        "JAX": ("models.jax_product", shape),
        "PyTorch": ("models.torch_product", {**shape, "device": device}),
    }
    with bench_worker.workers(contenders, print) as started:
        bench_worker.time_in_turn(started, 1, 2)
        seconds = bench_worker.time_in_turn(started, 3, 3)
    return 2 * size**3 / min(min(values) for values in seconds.values())


@app.command()
def convert(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each kind, in turn.")] = 5,
    scratch: Annotated[
        pathlib.Path | None, typer.Option(help="Folder for 1.5 GB of files (default: the system's).")
    ] = None,
    json_file: JsonFile = None,
    against: Against = None,
) -> None:
    """Time converting the base model (86.6 million parameters, 527 labels) from both file formats, and loading it.

    Weights are random. Imports are not timed; memory is the process's peak, with imports and the memory-mapped file.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = pathlib.Path(folder)
        in_process("convert.write_sources", str(place))  # a child's peak memory starts at that of this process
        kinds = {
            "safetensors to checkpoint": ("convert.convert", str(place / "hf"), str(place / "from_safetensors")),
            ".pth to checkpoint": ("convert.convert", str(place / "audioset_10_10.pth"), str(place / "from_pth")),
            "load the checkpoint, first": ("convert.load", str(place / "from_safetensors"), 1),
            "load the checkpoint, again": ("convert.load", str(place / "from_safetensors"), 2),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, arguments in kinds.items():
                if arguments[0] == "convert.convert":
                    shutil.rmtree(arguments[2], ignore_errors=True)
                os.sync()  # earlier writes must not go to the disk while this is timed
                found[name].append(in_process(*arguments))
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


if __name__ == "__main__":
    app()
