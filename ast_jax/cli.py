"""The command line: parsing and messages only. JAX is imported when a command runs, not for `--help`."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for SIGINT
EXIT_PIPE = 141  # and for SIGPIPE

app = typer.Typer(
    name="ast-jax",
    help="The Audio Spectrogram Transformer in JAX: name what is in a sound, convert checkpoints, fine-tune.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "Name of a shipped model, a checkpoint folder, PyTorch weights (folder or file), or a Hub id."


class Schedule(enum.StrEnum):
    """Learning rate schedules."""

    constant = "constant"
    step = "step"
    cosine = "cosine"


class ProblemType(enum.StrEnum):
    """What the labels mean."""

    single_label = "single_label_classification"
    multi_label = "multi_label_classification"


class Target(enum.StrEnum):
    """What `convert` writes."""

    ast_jax = "ast-jax"
    huggingface = "huggingface"
    original = "original"


_SIZE = ("max_length", "num_mel_bins", "frequency_stride", "time_stride")
MaxLength = Annotated[int | None, typer.Option("--max-length", min=16, help="Another input length, frames of 10 ms.")]
NumMelBins = Annotated[int | None, typer.Option("--num-mel-bins", min=16, help="Another number of mel bins.")]
FrequencyStride = Annotated[
    int | None, typer.Option("--frequency-stride", min=1, help="Another step between patches in mel bins.")
]
TimeStride = Annotated[int | None, typer.Option("--time-stride", min=1, help="Another step between patches in frames.")]


def main() -> None:
    """Run the command line; a user's error is one line on stderr and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    app()


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turn the library's exceptions for users into one line on stderr and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, or Python would complain of it once more at its end
        raise typer.Exit(EXIT_PIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:
        _complain(str(error).replace("\n", " "))
        raise typer.Exit(1) from None
    except RuntimeError as error:  # XLA's, which has no class of its own for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _complain(f"the device is out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size or model")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _complain("stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _complain(message: str) -> None:
    """Print one line on stderr."""
    print(f"ast-jax: {_one_line(message)}", file=sys.stderr, flush=True)


def _wrong_usage(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    _complain(message)
    raise typer.Exit(EXIT_USAGE)


def _one_line(text: str) -> str:
    """Return a text with its control characters, line ends among them, and undecodable bytes escaped."""
    special = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(special, lambda match: match[0].encode("unicode_escape").decode(), text)


def _as_json(content: Any, indent: int | None = None) -> str:
    """Return JSON text that stdout can take: other characters than ASCII as they are where it has them."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(content, indent=indent)
    return text


def _print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        import importlib.metadata

        print(f"ast-jax {importlib.metadata.version('ast-jax')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take what comes before a command."""


@app.command()
def classify(
    files: Annotated[list[str], typer.Argument(help="Sound files: WAV, FLAC, OGG or MP3, any rate and channels.")],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "sounds-tiny",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many labels to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each file.")] = False,
) -> None:
    """Name what is in sound files.

    Scores are probabilities, of each label for itself where the model is multi-label. A file that is longer than the
    model's input is heard from its beginning, and the output says how much. A bad file is one line on stderr; the
    others still print, and the exit status is 1.
    """
    failed = False
    with _user_errors():
        from .checkpoint import is_own, load
        from .predict import classify_each

        checkpoint = load(model)
        if pathlib.Path(model).exists() and not is_own(pathlib.Path(model)):
            for note in checkpoint.metadata["conversion"]["notes"]:
                _complain(f"{model}: {note}")
        for result in classify_each(files, checkpoint, top_k=top_k):
            if result.error:
                failed = True
                _complain(result.error)
            elif as_json:
                print(_as_json(_result_json(result)), flush=True)
            else:
                heard = f"  (first {result.used:.2f} s of {result.duration:.2f} s)" if result.cut else ""
                lines = [f"  {score:6.3f}  {_one_line(label)}" for label, score in result.predictions]
                print(f"{_one_line(result.source)}{heard}", *lines, sep="\n", flush=True)
    if failed:
        raise typer.Exit(1)


def _result_json(result: Any) -> dict[str, Any]:
    """Return a result as what `--json` prints."""
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
    """Convert a PyTorch checkpoint to a checkpoint folder of ast_jax, or back; no PyTorch needed.

    Every tensor is used or named with the reason why not. Another input fits the position embeddings to it: cut from
    the middle or interpolated, as the original does.
    """
    with _user_errors():
        from .conversion import convert_to
        from .labels import read_labels
        from .shapes import Hints

        changes = dict(zip(_SIZE, (max_length, num_mel_bins, frequency_stride, time_stride), strict=True))
        changes |= {"num_labels": num_labels, "labels": read_labels(labels) if labels else None}
        changes["keep_classifier"] = keep_classifier
        hints = Hints(source_strides, source_max_length, source_num_mel_bins, source_heads)
        convert_to(
            source, destination, to.value, check=check, hints=hints, mean=mean, std=std, changes=changes,
            say=lambda text: print(*map(_one_line, text.splitlines()), sep="\n", flush=True),
        )  # fmt: skip


@app.command()
def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model is: its size, its input, its labels and where its weights came from."""
    with _user_errors():
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
            print(_as_json(content, indent=2))
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
            print(f"  {_one_line(line)}")
        for key, value in checkpoint.metadata.items():
            if key in ("converted_from", "conversion", "adapted"):
                continue  # told above
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            more = " … (whole with --json)" if len(text) > LONGEST else ""
            print(f"  {key:13} {_one_line(text[:LONGEST])}{more}")


LONGEST = 160  # characters of a line of metadata


def _short_list(names: tuple[str, ...], limit: int = 12) -> str:
    """Return the first names, and how many more there are."""
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(map(_one_line, names[:limit])) + more  # AudioSet's names have commas in them


@app.command()
def finetune(
    context: typer.Context,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The run's folder.")],
    data: Annotated[
        pathlib.Path | None,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="A folder per class, or a CSV: path,label[,split]. With --resume: where it lies now, if it was moved.",
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="Model to start from (as --model of classify); default: from scratch.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option("--architecture", help="From scratch: tiny (default), small, base, or a config.json."),
    ] = None,
    max_length: MaxLength = None,
    num_mel_bins: NumMelBins = None,
    frequency_stride: FrequencyStride = None,
    time_stride: TimeStride = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output after its last saved epoch.")
    ] = False,
    problem_type: Annotated[
        ProblemType | None, typer.Option("--problem-type", help="Default: multi-label if any file has several labels.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Over all devices.")] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 1e-4,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate, after warm-up.")] = Schedule.step,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 0,
    decay_start: Annotated[
        int, typer.Option(min=0, help="Step schedule: first epoch after which the rate falls.")
    ] = 10,
    decay_step: Annotated[int, typer.Option(min=1, help="Step schedule: epochs from one fall to the next.")] = 5,
    decay_factor: Annotated[float, typer.Option(help="Step schedule: what the rate is multiplied by.")] = 0.5,
    weight_decay: Annotated[float, typer.Option(min=0, help="L2 in the gradient, as torch's Adam.")] = 5e-7,
    mixup: Annotated[float, typer.Option(min=0, max=1, help="Share of examples mixed with another.")] = 0.0,
    frequency_mask: Annotated[int, typer.Option(min=0, help="SpecAugment: upper bound in mel bins.")] = 0,
    time_mask: Annotated[int, typer.Option(min=0, help="SpecAugment: upper bound in frames.")] = 0,
    frequency_shift: Annotated[int, typer.Option(min=0, help="Move spectra by up to this many mel bins.")] = 0,
    time_shift: Annotated[int, typer.Option(min=0, help="Move sounds by up to this many frames, end to start.")] = 0,
    noise: Annotated[bool, typer.Option("--noise", help="Add noise and roll in time.")] = False,
    ramp_epochs: Annotated[
        float, typer.Option(min=0, help="Epochs over which mixup and masks grow to full strength.")
    ] = 0.0,
    ema: Annotated[
        float, typer.Option(help="Decay a step of the parameters' moving average, which then is kept; 0: none.")
    ] = 0.0,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model, or jax.export program (*.stablehlo), whose scores soften the labels."),
    ] = None,
    teacher_weight: Annotated[float, typer.Option(min=0, max=1, help="Share of the teacher's scores.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train on your own sounds; needs the extra `train`.

    Every epoch is saved: after a kill or Ctrl-C, --output RUN --resume goes on after the last saved epoch with the
    settings that the run was started with. RUN/best is the checkpoint of the best epoch on the validation split.
    """
    settings = {
        "batch_size": batch_size, "epochs": epochs, "learning_rate": learning_rate, "schedule": schedule.value,
        "warmup_steps": warmup_steps, "decay_start": decay_start, "decay_step": decay_step,
        "decay_factor": decay_factor, "weight_decay": weight_decay, "mixup": mixup, "frequency_mask": frequency_mask,
        "time_mask": time_mask, "frequency_shift": frequency_shift, "time_shift": time_shift, "noise": noise,
        "ramp_epochs": ramp_epochs, "ema": ema, "teacher_weight": teacher_weight, "seed": seed,
    }  # fmt: skip
    size = dict(zip(_SIZE, (max_length, num_mel_bins, frequency_stride, time_stride), strict=True))
    start = {
        "init": init, "architecture": architecture, **size,
        "problem_type": problem_type.value if problem_type else None, "teacher": teacher,
    }  # fmt: skip
    if data is None and not resume:
        _wrong_usage("finetune: expected DATA, a folder per class or a CSV, got none")
    if init and architecture:
        _wrong_usage("--init: brings its own architecture; leave out --architecture")
    with _user_errors():
        _need_train_extra()
        from . import finetune as loop
        from .checkpoint import load
        from .settings import TrainConfig

        try:
            training = TrainConfig(**settings)
        except ValueError as error:
            _wrong_usage(_option(*str(error).split(":", 1)))
        try:
            if resume:
                given = {name for name in settings if context.get_parameter_source(name).name == "COMMANDLINE"}
                asked = {**{name: settings[name] for name in given}, **start}
                _refuse_contradictions(output, loop.read_run(output), asked)
                best = loop.resume(output, data)
            else:
                best = loop.start(
                    data, output, training,
                    architecture=_architecture(architecture or "tiny", size),
                    initial=load(init, **size) if init else None,
                    problem_type=start["problem_type"],
                    teacher=teacher,
                )  # fmt: skip
        except KeyboardInterrupt:
            command = shlex.join(["ast-jax", "finetune", "--output", str(output), "--resume"])
            _complain(f"stopped; go on with: {command}" if loop.can_resume(output) else "stopped")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        print(f"best epoch: {json.dumps(best.metadata['epoch'])}")
        print(f"checkpoint: {output / 'best'}")


def _refuse_contradictions(output: pathlib.Path, run: Any, asked: dict[str, Any]) -> None:
    """Say which of the options given together with --resume (None: not given) the run was not started with."""
    size = {name: getattr(run.config, name) for name in _SIZE}
    has = {**vars(run.training), **size, "problem_type": run.config.problem_type}
    if asked["teacher"]:
        names = asked["teacher"], str(pathlib.Path(asked["teacher"]).absolute())
        has["teacher"] = asked["teacher"] if run.teacher in names else None
    if asked["architecture"]:
        own = {name: getattr(run.config, name) for name in ("num_labels", "id2label", "problem_type")}
        same = _architecture(asked["architecture"], size).replace(**own) == run.config
        has["architecture"] = asked["architecture"] if same else None
    if asked["init"]:
        from .checkpoint import load

        same = load(asked["init"], **size).metadata == run.metadata.get("trained_from")
        has["init"] = asked["init"] if same else None
    wrong = sorted(_option(name) for name, value in asked.items() if value is not None and value != has[name])
    if wrong:
        _wrong_usage(
            f"--resume: goes on with the settings that the run in {output} was started with, which are other than "
            f"these; leave out {', '.join(wrong)}"
        )


def _option(name: str, *message: str) -> str:
    """Return a setting's name as the command line has it, and what is said of it."""
    return ":".join([f"--{name.replace('_', '-')}", *message])


def _architecture(name: str, size: dict[str, int | None]) -> Any:
    """Return the `ASTConfig` of a preset or of a `config.json`, with the input that is asked for."""
    from .checkpoint import read_config
    from .config import PRESETS, ASTConfig

    if name in PRESETS:
        config = PRESETS[name]()
    elif pathlib.Path(name).is_file():
        config = read_config(ASTConfig, pathlib.Path(name))
    else:
        _wrong_usage(f"--architecture: expected {', '.join(PRESETS)} or a config.json, got {name!r}")
    return config.replace(**{name: value for name, value in size.items() if value is not None})


def _need_train_extra() -> None:
    """Say which command installs what training needs, where it is missing."""
    import importlib.util

    missing = [name for name in ("grain", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"finetune needs {' and '.join(missing)}; install it with: pip install 'ast-jax[train]'")


if __name__ == "__main__":
    main()
