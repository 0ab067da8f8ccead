"""Evaluate a run's best checkpoint on the test split and write it as the model that ships with the package.

    python tools/ship_sounds_tiny.py RUN/best DATA [--output ast_jax/models/sounds-tiny]

The test split has recordings of packages that are not in the training split. Prints the results as a Markdown table and
writes them, with the sources and licences of the data, to the checkpoint's metadata. Parameters are written in float16;
the results are those of the float16 parameters.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import pathlib

import jax
import numpy as np

import ast_jax
from ast_jax.data import datasets
from ast_jax.training import evaluate, metrics

OUTPUT = pathlib.Path(__file__).parent.parent / "ast_jax" / "models" / "sounds-tiny"
CONDITIONS = ("clean", "noisy")


def read_rows(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Return the manifest's rows by path."""
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def figures(logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, object]:
    """Return average precision and number of positives of each class with positives and negatives, and the mAP."""
    precisions = metrics.average_precisions(logits, labels)
    by_class = {
        name: {"average_precision": round(float(value), 4), "positives": int(count)}
        for name, value, count in zip(names, precisions, labels.sum(0), strict=True)
        if np.isfinite(value)
    }
    scores = [entry["average_precision"] for entry in by_class.values()]
    return {"clips": len(labels), "mAP": round(sum(scores) / len(scores), 4), "classes": by_class}


def measure(checkpoint: ast_jax.Checkpoint, folder: pathlib.Path) -> dict[str, dict[str, object]]:
    """Return the results for each condition of the test split."""
    rows = read_rows(folder)
    examples = datasets.read_dataset(folder).reordered(checkpoint.config.labels).splits["test"]
    conditions = np.array([rows[example.path.relative_to(folder).as_posix()]["condition"] for example in examples])
    logits, labels = evaluate.predict(checkpoint, examples, batch_size=32).measured()
    return {
        condition: figures(logits[conditions == condition], labels[conditions == condition], checkpoint.config.labels)
        for condition in CONDITIONS
    }


def sources(folder: pathlib.Path) -> list[dict[str, object]]:
    """Return for each source of the data its licences and its number of clips by split."""
    clips: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    licences: dict[str, set[str]] = collections.defaultdict(set)
    for row in read_rows(folder).values():
        names = row["source"].split("+")
        for name in names:
            clips[name][row["split"]] += 1
        if len(set(names)) == 1:  # a mixture's licence is that of its parts
            licences[names[0]].add(row["license"])
    return [{"package": name, "licences": sorted(licences[name]), "clips": dict(clips[name])} for name in sorted(clips)]


def origin(metadata: str | dict[str, object]) -> str | dict[str, object]:
    """Return the provenance of the initial model: "scratch", or its training metadata."""
    if isinstance(metadata, str):
        return metadata
    kept = {key: metadata[key] for key in ("name", "trained_by", "training", "epoch") if key in metadata}
    return {**kept, "trained_from": origin(metadata["trained_from"])}


def table(results: dict[str, dict[str, object]], names: tuple[str, ...]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| label | " + " | ".join(f"{c} ({results[c]['clips']} clips)" for c in CONDITIONS) + " |",
        "|---|---|---|",
    ]
    for name in names:
        cells = []
        for condition in CONDITIONS:
            entry = results[condition]["classes"].get(name)
            cells.append(f"{entry['average_precision']:.3f} ({entry['positives']})" if entry else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| **macro mAP** | " + " | ".join(f"**{results[c]['mAP']:.3f}**" for c in CONDITIONS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path, help="best checkpoint of the run")
    parser.add_argument("data", type=pathlib.Path, help="folder of the data set, with manifest.csv")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()

    trained = ast_jax.load(arguments.checkpoint)
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), trained.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(half)):
        parser.error("a parameter exceeds the range of float16")
    measured = trained.replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float32), half))
    results = measure(measured, arguments.data)
    print(table(results, trained.config.labels))
    metadata = {
        "name": "sounds-tiny",
        "license": "Apache-2.0",
        "trained_by": "ast-jax finetune; see tools/README.md",
        "trained_from": origin(trained.metadata["trained_from"]),
        "training": trained.metadata["training"],
        "epoch": trained.metadata["epoch"],
        "test": results,
        "sources": sources(arguments.data),
    }
    ast_jax.save(arguments.output, measured.replace(params=half, metadata_json=json.dumps(metadata)))
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"\n{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
