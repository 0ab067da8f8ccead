"""The commands `convert`, `info` and `export`."""

from __future__ import annotations

import enum
import json
import pathlib
from typing import Annotated

import typer

from ast_jax.cli.common import (
    MODEL_HELP,
    SIZE,
    FrequencyStride,
    MaxLength,
    NumMelBins,
    TimeStride,
    app,
    json_line,
    one_line,
    say,
    user_errors,
    wrong_usage,
)


class Target(enum.StrEnum):
    """Output formats of `convert`."""

    ast_jax = "ast-jax"
    huggingface = "huggingface"
    original = "original"


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face folder, PyTorch weights (.safetensors, .bin, .pth), Hub id, or checkpoint folder.",
        ),
    ],
    destination: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="DST", help="Output folder (a checkpoint there is replaced); a .pth file for --to original."
        ),
    ],
    to: Annotated[Target, typer.Option("--to", help="Output format.")] = Target.ast_jax,
    check: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Convert every tensor back and compare it bit by bit; where PyTorch is installed, also compare every "
            "layer's output with its model. The table is written to verification.json.",
        ),
    ] = False,
    max_length: MaxLength = None,
    num_mel_bins: NumMelBins = None,
    frequency_stride: FrequencyStride = None,
    time_stride: TimeStride = None,
    num_labels: Annotated[
        int | None,
        typer.Option("--num-labels", min=1, help="Number of labels; if not SRC's, a new classifier is initialised."),
    ] = None,
    labels: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--labels",
            help="File of class names for a new classifier: one name per line, JSON, or class_labels_indices.csv.",
        ),
    ] = None,
    keep_classifier: Annotated[
        bool, typer.Option("--keep-classifier", help="Keep SRC's classifier: --labels only renames its classes.")
    ] = False,
    mean: Annotated[
        float | None,
        typer.Option("--mean", help="Mean of the features; overrides SRC's."),
    ] = None,
    std: Annotated[
        float | None, typer.Option("--std", help="Standard deviation of the features; overrides SRC's.")
    ] = None,
    source_strides: Annotated[
        tuple[int, int] | None,
        typer.Option("--source-strides", help="Patch strides of SRC (frequency, time), if ambiguous."),
    ] = None,
    source_max_length: Annotated[
        int | None, typer.Option("--source-max-length", min=1, help="Input length of SRC in frames, if ambiguous.")
    ] = None,
    source_num_mel_bins: Annotated[
        int | None, typer.Option("--source-num-mel-bins", min=1, help="Mel bins of SRC. [default: 128]")
    ] = None,
    source_heads: Annotated[
        int | None, typer.Option("--source-heads", min=1, help="Attention heads of SRC. [default: width / 64]")
    ] = None,
) -> None:
    """Convert checkpoints from and to PyTorch.

    PyTorch is not needed. Every tensor is used, or reported with the reason why not. For another input the grid of
    position embeddings is centre-cropped or interpolated, as in the original repository.
    """
    with user_errors():
        from ast_jax.checkpoints.pytorch.infer_config import Hints
        from ast_jax.checkpoints.pytorch.pipeline import convert_to
        from ast_jax.labels import read_labels
        from ast_jax.runtime.progress import step

        size = (max_length, num_mel_bins, frequency_stride, time_stride)
        changes: dict[str, object] = dict(zip(SIZE, size, strict=True))
        changes |= {"num_labels": num_labels, "labels": read_labels(labels) if labels else None}
        changes["keep_classifier"] = keep_classifier
        hints = Hints(source_strides, source_max_length, source_num_mel_bins, source_heads)
        with step("converting"):
            convert_to(
                source, destination, to.value, check=check, hints=hints, mean=mean, std=std, changes=changes,
                log=say,
            )  # fmt: skip


@app.command()
def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the size, input, labels and origin of a model."""
    with user_errors():
        from ast_jax.checkpoints.load import load
        from ast_jax.model.functional import num_params
        from ast_jax.runtime.progress import step

        with step("loading the model"):
            checkpoint = load(model)
        config, frontend = checkpoint.config, checkpoint.frontend
        has_head = "classifier" in checkpoint.params
        if as_json:
            content = {
                "parameters": num_params(checkpoint.params),
                "config": config.to_json_dict(),
                "frontend": frontend.to_json_dict(),
                "provenance": checkpoint.provenance.to_json_dict(),
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
        for line in checkpoint.provenance.report():
            print(f"  {one_line(line)}")
        for key, value in checkpoint.metadata.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            more = " … (in full with --json)" if len(text) > MAX_METADATA_CHARS else ""
            print(f"  {key:13} {one_line(text[:MAX_METADATA_CHARS])}{more}")


MAX_METADATA_CHARS = 160  # shown of each entry


def _short_list(names: tuple[str, ...], limit: int = 12) -> str:
    """Join the first names, and count the others."""
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(map(one_line, names[:limit])) + more  # AudioSet's names contain commas


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Output file, .stablehlo.")],
    platforms: Annotated[
        str, typer.Option(help="Target platforms, comma-separated: cpu, cuda, rocm, tpu.")
    ] = "cpu,cuda,tpu",
) -> None:
    """Export a model as a StableHLO program.

    It runs with JAX alone and includes the features: samples to logits, for any batch size.
    """
    if output.suffix.lower() != ".stablehlo":
        wrong_usage(f"OUT: expected a name that ends in .stablehlo, got {output}")
    with user_errors():
        from ast_jax.checkpoints.load import load
        from ast_jax.inference.export import export as write_program
        from ast_jax.runtime.progress import step

        with step("exporting"):
            checkpoint = load(model)
            write_program(checkpoint, output, platforms=[name.strip() for name in platforms.split(",")])
        frontend = checkpoint.frontend
        print(
            f"{output}: {output.stat().st_size / 1e6:.1f} MB for {platforms}",
            f"  takes    waveform [b, {frontend.max_samples}] float32 at {frontend.sampling_rate} Hz, "
            "num_samples [b] int32",
            f"  returns  a dict of {checkpoint.config.num_labels} labels, each with its logits [b]",
            sep="\n",
        )
