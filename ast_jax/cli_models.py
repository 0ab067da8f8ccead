"""Commands on models and sounds: classify, convert, info."""

from __future__ import annotations

import contextlib
import csv
import enum
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from .cli_common import (
    MODEL_HELP,
    SIZE,
    FrequencyStride,
    MaxLength,
    NumMelBins,
    TimeStride,
    app,
    complain,
    json_line,
    one_line,
    user_errors,
    wrong_usage,
)


class Target(enum.StrEnum):
    """What `convert` writes."""

    ast_jax = "ast-jax"
    huggingface = "huggingface"
    original = "original"


@app.command()
def classify(
    files: Annotated[
        list[str],
        typer.Argument(help="Sound files: WAV, FLAC, OGG or MP3, any rate and channels; and folders of such files."),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "sounds-tiny",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many labels to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each file.")] = False,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="Write a row for each file, in order, to this CSV or JSONL instead."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sounds that go through the model together.", show_default="8 on CPU, 64")
    ] = None,
) -> None:
    """Name what is in sound files.

    Scores are probabilities, of each label for itself where the model is multi-label. A file that is longer than the
    model's input is heard from its beginning, and the output says how much. A bad file is one line on stderr; the
    others still print, and the exit status is 1.
    """
    if output and output.suffix.lower() not in (".csv", ".jsonl"):
        wrong_usage(f"--output: expected a name that ends in .csv or .jsonl, got {output}")
    if output and as_json:
        wrong_usage("--json prints and --output writes: expected one of them; a name that ends in .jsonl writes JSON")
    failed = False
    with user_errors():
        from .checkpoint import is_own, load
        from .predict import classify_each

        checkpoint = load(model)
        if pathlib.Path(model).exists() and not is_own(pathlib.Path(model)):
            for note in checkpoint.metadata["conversion"]["notes"]:
                complain(f"{model}: {note}")
        names = []
        for file in files:
            try:
                names += _sounds(file)
            except (ValueError, OSError) as error:  # one bad folder does not lose the others' results
                failed = True
                complain(str(error))
        if not names:
            raise typer.Exit(1)
        with _results_writer(output, as_json, min(top_k, checkpoint.config.num_labels)) as write:
            for result in classify_each(names, checkpoint, top_k=top_k, batch_size=batch_size):
                if result.error:
                    failed = True
                    complain(result.error)
                write(result)
    if failed:
        raise typer.Exit(1)


def _sounds(name: str) -> list[str]:
    """Return the sound files in a folder and the folders in it; of anything else its name, which may yet be a file's.

    Raises:
        ValueError: a folder without any.
    """
    if not pathlib.Path(name).is_dir():
        return [name]
    from .rows import AUDIO_SUFFIXES, visible_files

    found = [str(path) for path in visible_files(pathlib.Path(name)) if path.suffix.lower() in AUDIO_SUFFIXES]
    if not found:
        endings = ", ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{name}: expected a folder with sound files, found none that ends in {endings}")
    return found


@contextlib.contextmanager
def _results_writer(output: pathlib.Path | None, as_json: bool, labels: int) -> Iterator[Callable[[Any], None]]:
    """Yield what takes each result: to the terminal, or to a file that is there when all of them are in it."""
    if output is None:
        yield _print_json if as_json else _print_text
        return
    from .files import whole_file

    with whole_file(output) as path, path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if output.suffix.lower() == ".jsonl":
            yield lambda result: file.write(f"{json.dumps(_result_json(result), ensure_ascii=False)}\n")
        else:
            write_row = csv.writer(file).writerow
            best = [f"{what}_{place}" for place in range(1, labels + 1) for what in ("label", "score")]
            write_row(["file", "used_seconds", "duration_seconds", "error", *best])
            yield lambda result: write_row(_result_row(result))


def _print_json(result: Any) -> None:
    """Print a result as JSON, unless it is an error, which has been told."""
    if not result.error:
        print(json_line(_result_json(result)), flush=True)


def _print_text(result: Any) -> None:
    """Print a result for people, unless it is an error, which has been told."""
    if not result.error:
        heard = f"  (first {result.used:.2f} s of {result.duration:.2f} s)" if result.cut else ""
        lines = [f"  {score:6.3f}  {one_line(label)}" for label, score in result.predictions]
        print(f"{one_line(result.source)}{heard}", *lines, sep="\n", flush=True)


def _result_row(result: Any) -> list[Any]:
    """Return a result as a row of CSV."""
    if result.error:
        return [result.source, "", "", result.error]
    best = [entry for label, score in result.predictions for entry in (label, f"{score:.6f}")]
    return [result.source, f"{result.used:.3f}", f"{result.duration:.3f}", "", *best]


def _result_json(result: Any) -> dict[str, Any]:
    """Return a result as JSON has it; where there is an error, only that."""
    if result.error:
        return {"file": result.source, "error": result.error}
    return {
        "file": result.source,
        "used_seconds": round(result.used, 3),
        "duration_seconds": round(result.duration, 3),
        "predictions": [{"label": label, "score": round(score, 6)} for label, score in result.predictions],
    }


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face folder, file of PyTorch weights (.safetensors, .bin, .pth), Hub id, or checkpoint.",
        ),
    ],
    destination: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="DST", help="The folder to write (a checkpoint there is replaced); for --to original a .pth file."
        ),
    ],
    to: Annotated[Target, typer.Option("--to", help="What to write.")] = Target.ast_jax,
    check: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Turn every tensor back and compare; where PyTorch is installed, also run its model beside ours, "
            "layer by layer. The table is kept as verification.json.",
        ),
    ] = False,
    max_length: MaxLength = None,
    num_mel_bins: NumMelBins = None,
    frequency_stride: FrequencyStride = None,
    time_stride: TimeStride = None,
    num_labels: Annotated[
        int | None, typer.Option("--num-labels", min=1, help="Another number of labels than SRC's: a new classifier.")
    ] = None,
    labels: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--labels",
            help="File of label names for a new classifier: a name a line, JSON, or class_labels_indices.csv.",
        ),
    ] = None,
    keep_classifier: Annotated[
        bool, typer.Option("--keep-classifier", help="--labels are the right names of the classes SRC has already.")
    ] = False,
    mean: Annotated[
        float | None,
        typer.Option("--mean", help="Mean of the features: where SRC does not say it, or anew."),
    ] = None,
    std: Annotated[float | None, typer.Option("--std", help="Their standard deviation.")] = None,
    source_strides: Annotated[
        tuple[int, int] | None,
        typer.Option("--source-strides", help="Strides of SRC (frequency, time), where its shapes fit several."),
    ] = None,
    source_max_length: Annotated[
        int | None, typer.Option("--source-max-length", min=1, help="Frames of SRC's input, likewise.")
    ] = None,
    source_num_mel_bins: Annotated[
        int | None, typer.Option("--source-num-mel-bins", min=1, help="Mel bins of SRC's input; else 128 are assumed.")
    ] = None,
    source_heads: Annotated[
        int | None, typer.Option("--source-heads", min=1, help="Heads of SRC; else one for 64 of the width is assumed.")
    ] = None,
) -> None:
    """Convert a PyTorch checkpoint to ast_jax's, or back.

    No PyTorch is needed. Every tensor is used or named with the reason why not. Another input fits the position
    embeddings to it: cut from the middle or interpolated, as the original does.
    """
    with user_errors():
        from .conversion import convert_to
        from .labels import read_labels
        from .shapes import Hints

        changes = dict(zip(SIZE, (max_length, num_mel_bins, frequency_stride, time_stride), strict=True))
        changes |= {"num_labels": num_labels, "labels": read_labels(labels) if labels else None}
        changes["keep_classifier"] = keep_classifier
        hints = Hints(source_strides, source_max_length, source_num_mel_bins, source_heads)
        convert_to(
            source, destination, to.value, check=check, hints=hints, mean=mean, std=std, changes=changes,
            say=lambda text: print(*map(one_line, text.splitlines()), sep="\n", flush=True),
        )  # fmt: skip


@app.command()
def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model is: size, input, labels and origin."""
    with user_errors():
        from .checkpoint import load
        from .conversion import report
        from .model import num_params

        checkpoint = load(model)
        config, frontend = checkpoint.config, checkpoint.frontend
        has_head = "classifier" in checkpoint.params
        if as_json:
            content = {
                "parameters": num_params(checkpoint.params),
                "config": config.to_json_dict(),
                "frontend": frontend.to_json_dict(),
                "metadata": checkpoint.metadata,
            }
            print(json_line(content, indent=2))
            return
        rows, columns = config.grid
        frequency, time = config.patch_shape
        print(
            f"{model}: {num_params(checkpoint.params):,} parameters",
            f"  architecture  {config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"{config.num_attention_heads} heads, MLP {config.intermediate_size}",
            f"  input         {frontend.max_seconds:.2f} s at {frontend.sampling_rate} Hz: "
            f"{config.max_length} frames x {config.num_mel_bins} mel bins",
            f"  patches       {frequency} x {time}, strides {config.frequency_stride} and {config.time_stride}: "
            f"{rows} x {columns} grid, {config.num_tokens} tokens",
            f"  normalised    mean {frontend.mean:g}, standard deviation {frontend.std:g}",
            f"  labels        {config.num_labels}, {config.resolved_problem_type}: {_short_list(config.labels)}"
            if has_head
            else "  labels        no classifier",
            sep="\n",
        )
        for line in report(checkpoint.metadata):
            print(f"  {one_line(line)}")
        for key, value in checkpoint.metadata.items():
            if key in ("converted_from", "conversion", "adapted"):
                continue  # told above
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            more = " … (whole with --json)" if len(text) > LONGEST else ""
            print(f"  {key:13} {one_line(text[:LONGEST])}{more}")


LONGEST = 160  # characters of a line of metadata


def _short_list(names: tuple[str, ...], limit: int = 12) -> str:
    """Return the first names, and how many more there are."""
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(map(one_line, names[:limit])) + more  # AudioSet's names have commas in them
