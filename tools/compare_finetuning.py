"""Compare accuracy and speed of fine-tuning on the same data: `ast-jax finetune` and a plain PyTorch loop.

    python tools/compare_finetuning.py DATA --output FOLDER --seeds 0 1 2

DATA is a folder with a manifest.csv that has the splits train, validation and test and one label per clip, such as
tools/instruments_data.py writes. Each method runs in a process of its own, once per seed:

- shipped: `ast-jax finetune --init sounds-tiny`, from the model of the package;
- shipped-augmented: the same with mixup, SpecAugment and shifts;
- scratch: `ast-jax finetune` from random weights, in an architecture that transformers supports (square patches);
- scratch-augmented: the same with mixup, SpecAugment and shifts;
- pytorch: transformers' ASTForAudioClassification of that architecture in a PyTorch training loop.

All have the same clips, epochs, batch size, Adam (L2 penalty 5e-7, betas 0.95 and 0.999), learning rate (warm-up of one
epoch, then cosine decay to zero), input (256 frames x 128 mel bins, the same mean and standard deviation) and loss
(cross-entropy), drop the last, short batch of an epoch, and select the best epoch on the validation split. Test
accuracy is measured by `ast-jax evaluate` for all, which reads transformers' folders; transformers' own figure is in
the results.

Clips/s are the clips of an epoch divided by its seconds with validation, the median over epochs without the first, in
which ast-jax compiles. `ast-jax` decodes files and computes features in every epoch. For PyTorch, features are computed
once by transformers' ASTFeatureExtractor and not timed; in brackets is the speed of one more epoch in which they are
computed batch by batch in the same process. Every method may use all cores.

Writes FOLDER/results.json and FOLDER/results.md. Runs whose results with the same settings are in FOLDER are not
repeated.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import soundfile
from bench.worker import machine, num_cores

ARCHITECTURE = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512,
    "patch_size": 16, "frequency_stride": 16, "time_stride": 16, "max_length": 256, "num_mel_bins": 128,
}  # fmt: skip
MEAN, STD = -7.4451, 5.3368  # those of sounds-tiny
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
    """Return the waveforms and labels of a split."""
    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [soundfile.read(str(data / row["path"]), dtype="float32")[0] for row in rows], [row["label"] for row in rows]


def torch_run(settings: Settings, output: pathlib.Path) -> None:
    """Train with PyTorch and transformers; write the best epoch's model to output/best, and output/torch.json."""
    import torch

    if spec := importlib.util.find_spec("torchaudio"):
        # transformers uses torchaudio's pure-Python fbank if it is installed; the package itself does not load with
        # every build of PyTorch, and is therefore left empty.
        sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)
    import transformers
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(num_cores())
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
    """Return the learning rate of a step (from 0) relative to its peak: linear warm-up, then cosine decay to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1)))
    return cosine * min((step + 1) / warmup, 1.0)


# ------------------------------------------------------------------ runs


def run(name: str, settings: Settings, output: pathlib.Path) -> dict[str, Any]:
    """Train and evaluate one method with one seed in processes of their own, or read the results of an earlier call.

    Returns:
        `settings`, `accuracy` on the test split, `seconds` of each epoch, `total_seconds` of the training process,
        and for "pytorch" the results of `torch_run`.

    Raises:
        SystemExit: a process failed; the message has the end of its stderr.
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
    """Return the beginning of an `ast-jax` command line."""
    return [sys.executable, "-m", "ast_jax.cli.main", command]


def succeed(command: list[Any]) -> str:
    """Run a command and return its stdout; if it fails, exit with its stderr."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def count_clips(data: pathlib.Path) -> int:
    """Return the number of clips of the training split."""
    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return sum(row["split"] == "train" for row in csv.DictReader(file))


# --------------------------------------------------------------- results


def summary(runs: list[dict[str, Any]], clips: int) -> dict[str, float]:
    """Return means and standard deviation of a method over its seeds.

    Args:
        runs: results of `run`, one per seed.
        clips: number of training clips per epoch.
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
    """Return the results as a Markdown table."""
    lines = [
        "| | test accuracy, % | by seed | training clips/s | first epoch, s | whole run, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in summaries.items():
        by_seed = ", ".join(f"{100 * one['accuracy']:.1f}" for one in runs[name])
        speed = f"{found['clips_per_second']:.0f}"
        if "clips_per_second_with_features" in found:
            speed += f" ({found['clips_per_second_with_features']:.0f} with features computed in the epoch)"
        lines.append(
            f"| {TITLES[name]} | {100 * found['accuracy']:.1f} ± {100 * found['accuracy_deviation']:.1f} | {by_seed} "
            f"| {speed} | {found['first_epoch_seconds']:.1f} | {found['total_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="DATA", nargs="?", help="folder of the data set")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="folder of runs and results")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method per seed (default: 0 1 2)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run (default: all)"
    )
    parser.add_argument("--epochs", type=int, default=15, help="number of epochs, at least 2 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
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
