"""Fine-tune on the same data with `ast-jax finetune` and with a plain PyTorch loop, and compare accuracy and speed.

    python tools/compare_finetuning.py DATA --output FOLDER --seeds 0 1 2

DATA is a folder with a manifest.csv that has the splits train, validation and test and one label a clip, such as
tools/instruments_data.py writes. Every run is a process of its own, the seeds in turn:

- shipped: `ast-jax finetune --init sounds-tiny`, the model that comes with the package;
- shipped-augmented: the same with mixup, masks and shifts;
- scratch: `ast-jax finetune` with random weights of an architecture that transformers has, too (square patches);
- scratch-augmented: the same with mixup, masks and shifts;
- pytorch: transformers' ASTForAudioClassification of that architecture, trained as its users do it.

All have the same clips, epochs, batch size, Adam (L2 5e-7, betas 0.95 and 0.999), learning rate (warm-up of one epoch,
then a cosine to zero), input (256 frames x 128 mel bins, one mean and deviation) and loss (cross-entropy), leave out
the last, short batch of an epoch, and keep the epoch that is best on the validation split. All are measured on the test
split by `ast-jax evaluate`, which reads transformers' folders; what transformers says of its own stands beside it.

Clips a second are the clips of an epoch over its seconds, validation included, the median of all epochs but the first,
in which ast-jax compiles. `ast-jax` decodes files and computes features in every epoch. PyTorch has its features
computed once, before its clock starts, by transformers' ASTFeatureExtractor; how fast one more epoch is in which they
are computed batch by batch, in the same process, stands in brackets. Every method may use all cores.

Writes FOLDER/results.json and FOLDER/results.md. What FOLDER has of a run with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import soundfile

ARCHITECTURE = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512,
    "patch_size": 16, "frequency_stride": 16, "time_stride": 16, "max_length": 256, "num_mel_bins": 128,
}  # fmt: skip
MEAN, STD = -7.4451, 5.3368  # of sounds-tiny
RATE = 16_000
WEIGHT_DECAY, BETAS = 5e-7, (0.95, 0.999)
AUGMENTED = [
    "--mixup", "0.5", "--frequency-mask", "24", "--time-mask", "48", "--frequency-shift", "8", "--time-shift", "32",
]  # fmt: skip
METHODS = {
    "shipped": ["--init", "sounds-tiny"],
    "shipped-augmented": ["--init", "sounds-tiny", *AUGMENTED],
    "scratch": ["--architecture", "ARCHITECTURE"],
    "scratch-augmented": ["--architecture", "ARCHITECTURE", *AUGMENTED],
    "pytorch": [],
}
TITLES = {
    "shipped": "`ast-jax finetune --init sounds-tiny`",
    "shipped-augmented": "`ast-jax finetune --init sounds-tiny`, augmented",
    "scratch": "`ast-jax finetune` from scratch",
    "scratch-augmented": "`ast-jax finetune` from scratch, augmented",
    "pytorch": "PyTorch and transformers from scratch",
}

Settings = dict[str, Any]


# --------------------------------------------------------------- PyTorch


def read_split(data: pathlib.Path, split: str) -> tuple[list[np.ndarray], list[str]]:
    """The waveforms and labels of a split."""
    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [soundfile.read(str(data / row["path"]), dtype="float32")[0] for row in rows], [row["label"] for row in rows]


def torch_run(settings: Settings, output: pathlib.Path) -> None:
    """Train with PyTorch and transformers; writes the best epoch's model to output/best and output/torch.json."""
    import torch

    if spec := importlib.util.find_spec("torchaudio"):
        # transformers takes its filter bank, which is pure Python, from torchaudio where that is installed; torchaudio
        # itself does not load beside every build of PyTorch, so the package around the filter bank stays empty.
        sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)
    import transformers
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(settings["seed"])
    data = pathlib.Path(settings["data"])
    extractor = transformers.ASTFeatureExtractor(
        sampling_rate=RATE, num_mel_bins=ARCHITECTURE["num_mel_bins"], max_length=ARCHITECTURE["max_length"],
        mean=MEAN, std=STD,
    )  # fmt: skip

    def features(waves: Iterable[np.ndarray]) -> torch.Tensor:
        return extractor(list(waves), sampling_rate=RATE, return_tensors="pt")["input_values"]

    splits = {split: read_split(data, split) for split in ("train", "validation", "test")}
    names = sorted(set(splits["train"][1]))
    targets = {split: torch.tensor([names.index(label) for label in labels]) for split, (_, labels) in splits.items()}
    began = time.perf_counter()
    inputs = {split: features(waves) for split, (waves, _) in splits.items()}
    feature_seconds = time.perf_counter() - began

    config = transformers.ASTConfig(
        **ARCHITECTURE, num_labels=len(names), id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    model = transformers.ASTForAudioClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), settings["learning_rate"], BETAS, weight_decay=WEIGHT_DECAY)
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    loader = DataLoader(
        TensorDataset(torch.arange(len(targets["train"])), targets["train"]), batch_size, shuffle=True, drop_last=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, len(loader), epochs * len(loader))
    )

    def train_epoch(precomputed: bool) -> None:
        model.train()
        for rows, labels in loader:
            values = inputs["train"][rows] if precomputed else features(splits["train"][0][row] for row in rows)
            optimizer.zero_grad()
            model(input_values=values, labels=labels).loss.backward()
            optimizer.step()
            scheduler.step()

    @torch.no_grad()
    def accuracy(split: str) -> float:
        model.eval()
        logits = torch.cat([model(input_values=part).logits for part in inputs[split].split(batch_size)])
        return (logits.argmax(1) == targets[split]).double().mean().item()

    seconds, scores = [], []
    for _ in range(epochs):
        began = time.perf_counter()
        train_epoch(precomputed=True)
        scores.append(accuracy("validation"))
        seconds.append(time.perf_counter() - began)
        if scores[-1] > max(scores[:-1], default=-1.0):
            model.save_pretrained(output / "best")
            extractor.save_pretrained(output / "best")
            test_accuracy = accuracy("test")
    began = time.perf_counter()
    train_epoch(precomputed=False)
    accuracy("validation")
    content = {
        "seconds": seconds, "validation": scores, "transformers_test_accuracy": test_accuracy,
        "feature_seconds": feature_seconds, "seconds_with_features": time.perf_counter() - began,
    }  # fmt: skip
    (output / "torch.json").write_text(json.dumps(content), encoding="utf-8")


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its peak: linear warm-up, then a cosine to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1)))
    return cosine * min((step + 1) / warmup, 1.0)


# ------------------------------------------------------------------ runs


def run(name: str, settings: Settings, output: pathlib.Path) -> dict[str, Any]:
    """Train and measure one method with one seed, in processes of their own, or read what an earlier call measured.

    Returns:
        `settings`, `accuracy` on the test split, `seconds` of each epoch, `total_seconds` of the process that trained,
        and for "pytorch" what `torch_run` adds.

    Raises:
        SystemExit: a process failed; what it said stands on stderr.
    """
    result = output / "result.json"
    if result.is_file() and (known := json.loads(result.read_text(encoding="utf-8")))["settings"] == settings:
        return known
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (output / "architecture.json").write_text(json.dumps(ARCHITECTURE), encoding="utf-8")
    began = time.perf_counter()
    if name == "pytorch":
        succeed([sys.executable, __file__, "--torch-run", output / "settings.json"])
        content = json.loads((output / "torch.json").read_text(encoding="utf-8"))
        best = output / "best"
    else:
        start = [output / "architecture.json" if word == "ARCHITECTURE" else word for word in METHODS[name]]
        input_statistics = [] if "--init" in start else ["--mean", MEAN, "--std", STD]
        epoch_steps = count_clips(pathlib.Path(settings["data"])) // settings["batch_size"]
        succeed([
            *ast_jax("finetune"), settings["data"], "--output", output / "run", *start, *input_statistics,
            "--epochs", settings["epochs"], "--batch-size", settings["batch_size"],
            "--learning-rate", settings["learning_rate"], "--schedule", "cosine", "--warmup-steps", epoch_steps,
            "--weight-decay", WEIGHT_DECAY, "--seed", settings["seed"],
        ])  # fmt: skip
        with (output / "run" / "metrics.csv").open(encoding="utf-8", newline="") as file:
            content = {"seconds": [float(row["seconds"]) for row in csv.DictReader(file)]}
        best = output / "run" / "best"
    content |= {"settings": settings, "total_seconds": time.perf_counter() - began}
    report = json.loads(succeed([*ast_jax("evaluate"), best, settings["data"], "--split", "test", "--json"]))
    content["accuracy"] = report["reports"][str(best)]["metrics"]["accuracy"]
    result.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def ast_jax(command: str) -> list[str]:
    """The words that start one of the package's commands."""
    return [sys.executable, "-m", "ast_jax.cli.main", command]


def succeed(command: list[Any]) -> str:
    """Run a command and return what it prints; where it fails, stop with what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def count_clips(data: pathlib.Path) -> int:
    """How many clips the training split has."""
    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return sum(row["split"] == "train" for row in csv.DictReader(file))


# --------------------------------------------------------------- results


def summary(runs: list[dict[str, Any]], clips: int) -> dict[str, float]:
    """Mean and spread of a method over its seeds.

    Args:
        runs: what `run` returned, one a seed.
        clips: of the training split that an epoch uses.
    """
    accuracies = [one["accuracy"] for one in runs]
    found = {
        "accuracy": statistics.mean(accuracies),
        "accuracy_deviation": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
        "clips_per_second": statistics.mean(clips / statistics.median(one["seconds"][1:]) for one in runs),
        "first_epoch_seconds": statistics.mean(one["seconds"][0] for one in runs),
        "total_seconds": statistics.mean(one["total_seconds"] for one in runs),
    }
    if "seconds_with_features" in runs[0]:
        found["clips_per_second_with_features"] = statistics.mean(clips / one["seconds_with_features"] for one in runs)
    return found


def table(summaries: dict[str, dict[str, float]], runs: dict[str, list[dict[str, Any]]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| | test accuracy, % | by seed | training clips/s | first epoch, s | whole run, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in summaries.items():
        by_seed = ", ".join(f"{100 * one['accuracy']:.1f}" for one in runs[name])
        speed = f"{found['clips_per_second']:.0f}"
        if "clips_per_second_with_features" in found:
            speed += f" ({found['clips_per_second_with_features']:.0f} where features are computed in the epoch)"
        lines.append(
            f"| {TITLES[name]} | {100 * found['accuracy']:.1f} ± {100 * found['accuracy_deviation']:.1f} | {by_seed} "
            f"| {speed} | {found['first_epoch_seconds']:.1f} | {found['total_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> str:
    """What this runs on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DATA", nargs="?", help="the data set's folder")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--epochs", type=int, default=15, help="at least 2 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="its peak (default: %(default)s)")
    parser.add_argument("--torch-run", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_run:
        torch_run(json.loads(arguments.torch_run.read_text(encoding="utf-8")), arguments.torch_run.parent)
        return
    if arguments.data is None or arguments.output is None:
        parser.error("expected DATA and --output FOLDER")
    if not (arguments.data / "manifest.csv").is_file():
        parser.error(f"DATA: expected a folder with a manifest.csv, got {arguments.data}")
    if arguments.epochs < 2:
        parser.error("--epochs: expected at least 2, as the first is not timed")

    data = arguments.data.absolute()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.methods}
    for seed in arguments.seeds:
        for name in arguments.methods:
            settings = {
                "data": str(data), "seed": seed, "epochs": arguments.epochs, "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate, "options": METHODS[name], "architecture": ARCHITECTURE,
            }  # fmt: skip
            found = run(name, settings, arguments.output.absolute() / f"{name}-{seed}")
            runs[name].append(found)
            print(
                f"{name}, seed {seed}: test accuracy {found['accuracy']:.4f}, {found['total_seconds']:.0f} s",
                flush=True,
            )
    clips = count_clips(data) // arguments.batch_size * arguments.batch_size
    summaries = {name: summary(found, clips) for name, found in runs.items()}
    text = table(summaries, runs)
    print(f"\n{text}\n{machine()}")
    content = {"machine": machine(), "summaries": summaries, "runs": runs}
    (arguments.output / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "results.md").write_text(f"{text}\n{machine()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
