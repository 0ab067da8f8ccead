"""The commands `classify`, `embed`, `explain` and `demo`."""

from __future__ import annotations

import contextlib
import enum
import functools
import pathlib
import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ast_jax.cli.common import MODEL_HELP, app, complain, one_line, user_errors, wrong_usage
from ast_jax.cli.results import FileProgress, print_window, results_writer, timeline_writer

if TYPE_CHECKING:
    from ast_jax.checkpoints.folder import Checkpoint
    from ast_jax.inference.timeline import Analysis

STDIN = "-"


class Aggregate(enum.StrEnum):
    """Aggregation of window scores."""

    mean = "mean"
    max = "max"


class Padding(enum.StrEnum):
    """Padding of clips shorter than the model's input."""

    zero = "zero"
    repeat = "repeat"
    mask = "mask"
    own_length = "own-length"


class Encoding(enum.StrEnum):
    """Encodings of raw samples, by ffmpeg's names."""

    s16le = "s16le"
    s16be = "s16be"
    s24le = "s24le"
    s32le = "s32le"
    f32le = "f32le"
    f64le = "f64le"
    u8 = "u8"
    alaw = "alaw"
    mulaw = "mulaw"


class Pool(enum.StrEnum):
    """Pooling of tokens into a vector."""

    pooled = "pooled"
    cls = "cls"
    mean = "mean"
    none = "none"


class Per(enum.StrEnum):
    """Rows of a table of vectors."""

    window = "window"
    clip = "clip"


Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Window = Annotated[
    float | None,
    typer.Option("--window", help="Window length in seconds.", show_default="the model's input length"),
]
Hop = Annotated[
    float | None,
    typer.Option("--hop", help="Hop in seconds between the starts of two windows.", show_default="half a window"),
]
Pad = Annotated[
    Padding,
    typer.Option(
        "--pad",
        help="Padding of sounds shorter than the model's input: zeros, as the original does; copies of the sound; "
        "zeros masked in attention; or none, with the model run at the sound's own length.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Batch size, in windows.", show_default="8 on CPU, 64 elsewhere")
]


@app.command()
def classify(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Sound files (WAV, FLAC, OGG or MP3; any sampling rate, length and channels), folders of sound files, "
            "or - for WAV or raw samples on the standard input."
        ),
    ],
    model: Model = "sounds-tiny",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Top-k: number of labels to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="JSON output, one object per line and file.")] = False,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="Output table, .csv or .jsonl, with one row per file; nothing is printed."),
    ] = None,
    window: Window = None,
    hop: Hop = None,
    aggregate: Annotated[
        Aggregate, typer.Option(help="Aggregation of the window scores into scores of the whole sound.")
    ] = Aggregate.mean,
    pad: Pad = Padding.zero,
    timeline: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Timeline file with one row per segment, .csv or .jsonl; or .txt for an Audacity label track."
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Upper threshold of the timeline: score that a segment must reach.")
    ] = 0.5,
    low: Annotated[
        float | None,
        typer.Option(
            help="Lower threshold of the timeline: score down to which a segment continues.",
            show_default="0.6 of the upper",
        ),
    ] = None,
    picture: Annotated[
        pathlib.Path | None, typer.Option(help="Picture of one file, .png: the timeline below the spectrogram.")
    ] = None,
    raw: Annotated[
        Encoding | None, typer.Option(help="Encoding of raw samples on the standard input, which have no header.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Sampling rate of raw samples in Hz.", show_default="16000")
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of raw samples.", show_default="1")] = None,
    batch_size: BatchSize = None,
) -> None:
    """Print the labels of sound files, and a timeline of long ones.

    Scores are probabilities: sigmoid for multi-label models, softmax for single-label ones. A sound longer than the
    model's input is scored in sliding windows; its scores are aggregated over them, and a timeline lists the segments
    of each label. An unusable file is one line on stderr; the other files are still printed, and the exit status is 1.
    """
    _check_suffix("--output", output, (".csv", ".jsonl"))
    _check_suffix("--timeline", timeline, (".csv", ".jsonl", ".txt"))
    _check_suffix("--picture", picture, (".png",))
    if output and as_json:
        wrong_usage("--json prints and --output writes: expected one of them; a name that ends in .jsonl writes JSON")
    if low is not None and low > threshold:
        wrong_usage(f"--low: expected at most --threshold {threshold:g}, got {low:g}")
    if STDIN in files and len(files) > 1:
        wrong_usage(f"{STDIN}: expected the standard input alone, got {' '.join(files)}")
    if STDIN in files and picture:
        wrong_usage("--picture: expected a file, got the standard input, which cannot be read twice")
    if raw and files != [STDIN]:
        wrong_usage(f"--raw: expected {STDIN}, the standard input, got {', '.join(files)}")
    if (rate or channels) and not raw:
        wrong_usage("--rate and --channels: expected --raw with them; a header has its own")
    written = [path.resolve() for path in (output, timeline, picture) if path]
    if len(set(written)) < len(written):
        wrong_usage("--output, --timeline, --picture: expected a file for each, got one for two of them")
    with user_errors(), contextlib.ExitStack() as stack:
        _check_folders(output, timeline)
        if picture:
            from ast_jax.inference.pictures import check_place

            check_place(picture)
        from ast_jax.audio.streams import Live
        from ast_jax.inference.predict import analyze_each
        from ast_jax.runtime.progress import step
        from ast_jax.runtime.signals import defer_signals

        checkpoint = _loaded(model)
        top_k = min(top_k, checkpoint.config.num_labels)
        options: dict[str, Any] = {
            "window": window, "hop": hop, "aggregate": aggregate.value, "padding": pad.value, "batch_size": batch_size,
        }  # fmt: skip
        failed = False
        results: Iterable[Analysis]
        if files == [STDIN]:
            received = stack.enter_context(defer_signals((signal.SIGINT,)))  # Ctrl-C ends the stream, not the command
            stream = Live(
                0, raw and raw.value, rate or 16000, channels or 1, stop=lambda: received() is not None
            )  # fmt: skip
            printer = functools.partial(print_window, labels=checkpoint.config.labels, top_k=top_k, as_json=as_json)
            results = analyze_each(stream, checkpoint, on_window=None if output else printer, **options)
        else:
            names, failed = _sound_files(files)
            if (picture or (timeline and timeline.suffix.lower() == ".txt")) and len(names) != 1:
                option = "--picture" if picture else "--timeline .txt"
                wrong_usage(f"{option}: expected one file, got {len(names)}")
            progress = FileProgress()
            results = progress.track(
                analyze_each(names, checkpoint, on_window=progress.on_window, **options), len(names)
            )  # fmt: skip
        with contextlib.ExitStack() as outputs:
            thresholds = (threshold, low)
            write_result = outputs.enter_context(results_writer(output, as_json, top_k, thresholds))
            write_timeline = outputs.enter_context(timeline_writer(timeline, thresholds))
            for found in results:
                if found.error:
                    failed = True
                    complain(found.error)
                write_result(found)
                write_timeline(found)
        if picture and not failed:
            from ast_jax.inference.pictures import timeline_picture

            with step("drawing the picture"):
                timeline_picture(found, checkpoint.frontend, picture, *thresholds)
        if failed:
            raise typer.Exit(1)


@app.command()
def embed(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Sound files (WAV, FLAC, OGG or MP3; any sampling rate, length and channels), or folders of them."
        ),
    ],
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="Output table, .npz or .parquet, with one row per vector.")
    ],
    model: Model = "sounds-tiny",
    layer: Annotated[
        int | None,
        typer.Option(
            help="Layer, as a number of blocks; 0 for the embeddings, -1 for the last block.",
            show_default="the last block and the final norm",
        ),
    ] = None,
    pool: Annotated[
        Pool,
        typer.Option(
            help="Pooling: the mean of the class and the distillation token, which is the classifier's input; the "
            "class token; the mean of all patches; or none, with a row per patch and its times and frequencies."
        ),
    ] = Pool.pooled,
    per: Annotated[Per, typer.Option(help="Rows per window, or one per file with the mean over its windows.")] = (
        Per.window
    ),
    window: Window = None,
    hop: Hop = None,
    pad: Pad = Padding.zero,
    batch_size: BatchSize = None,
) -> None:
    """Compute embeddings of sound files, for search or clustering.

    An unusable file is one line on stderr; the other files are still written, and the exit status is 1.
    """
    _check_suffix("--output", output, (".npz", ".parquet"))
    if STDIN in files:
        wrong_usage(f"{STDIN}: expected files, got the standard input, which only classify reads")
    with user_errors():
        _check_folders(output)
        from ast_jax.inference.embeddings import embed_each
        from ast_jax.inference.vectors import vector_table

        checkpoint = _loaded(model)
        names, failed = _sound_files(files)
        progress, written = FileProgress(), 0
        with vector_table(output) as table:
            results = embed_each(
                names, checkpoint, layer=layer, pool=pool.value, window=window, hop=hop, padding=pad.value,
                batch_size=batch_size, on_window=progress.on_window,
            )  # fmt: skip
            for found in progress.track(results, len(names)):
                if found.error:
                    failed = True
                    complain(found.error)
                else:
                    table.write(found, whole=per is Per.clip)
                    written += 1
            if not written:
                raise ValueError(f"{output}: not written, as no file could be used")
        print(f"{output}: embeddings of {written} file{'' if written == 1 else 's'}")
        if failed:
            raise typer.Exit(1)


@app.command()
def explain(
    file: Annotated[
        str, typer.Argument(help="Sound file (WAV, FLAC, OGG or MP3; any sampling rate, length and channels).")
    ],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Picture to write, .png.")],
    model: Model = "sounds-tiny",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="Label to explain; may be repeated.", show_default=False)
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, help="Top-k: number of labels to explain without --label.")
    ] = 3,
    start: Annotated[
        float | None,
        typer.Option(help="Start of the window in seconds.", show_default="the window with the highest score"),
    ] = None,
    cells: Annotated[
        tuple[int, int], typer.Option(help="Occlusion grid: number of cells along frequency and time.")
    ] = (8, 16),
    arrays: Annotated[pathlib.Path | None, typer.Option(help="Arrays of the picture, as .npz.")] = None,
) -> None:
    """Draw attention rollout, saliency and occlusion of one window."""
    _check_suffix("--output", output, (".png",))
    _check_suffix("--arrays", arrays, (".npz",))
    with user_errors():
        _check_folders(arrays)
        from ast_jax.inference import explanations
        from ast_jax.inference.pictures import check_place, explanation_picture
        from ast_jax.inference.vectors import write_arrays
        from ast_jax.runtime.progress import step

        check_place(output)
        checkpoint = _loaded(model)
        with step("explaining"):
            found = explanations.explain(
                file, checkpoint, labels=label or None, top_k=min(top_k, checkpoint.config.num_labels), start=start,
                cells=cells,
            )  # fmt: skip
        with step("drawing the picture"):
            explanation_picture(found, output)
        if arrays:
            write_arrays(arrays, found)
        print(f"{one_line(file)}: {found.duration:.2f} s from {found.start:.2f} s on, explained in {output}")
        for name, score in zip(found.labels, found.scores, strict=True):
            print(f"  {score:6.3f}  {one_line(name)}")


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help=f"{MODEL_HELP} May be repeated.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Host address to listen on; 0.0.0.0 admits other machines, without authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 7860,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Maximum upload size in megabytes.")] = 50,
    max_minutes: Annotated[float, typer.Option(min=0.01, help="Maximum length of a sound in minutes.")] = 10.0,
) -> None:
    """Serve a web page to try models on; needs the extra `demo`."""
    with user_errors(bars=False):  # every request would draw some
        from ast_jax.cli.demo import Limits, serve

        serve(
            list(model or []), Limits(max_megabytes, max_minutes), host, port,
            tell=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
        )  # fmt: skip


def _check_suffix(option: str, path: pathlib.Path | None, suffixes: tuple[str, ...]) -> None:
    """Exit with status 2 if a file name has another suffix."""
    if path and path.suffix.lower() not in suffixes:
        *most, last = suffixes
        known = f"{', '.join(most)} or {last}" if most else last
        wrong_usage(f"{option}: expected a name that ends in {known}, got {path}")


def _check_folders(*paths: pathlib.Path | None) -> None:
    """Raise FileNotFoundError before the work begins if the folder of an output file does not exist."""
    from ast_jax.runtime.files import check_folder_of

    for path in paths:
        if path:
            check_folder_of(path)


def _loaded(model: str) -> Checkpoint:
    """Load a model; print the assumptions made about weights in PyTorch's formats."""
    from ast_jax.checkpoints.load import load
    from ast_jax.checkpoints.locate import is_own
    from ast_jax.runtime.progress import step

    with step("loading the model"):
        checkpoint = load(model)
    if pathlib.Path(model).exists() and not is_own(pathlib.Path(model)):
        for note in checkpoint.provenance.notes:
            complain(f"{model}: {note}")
    return checkpoint


def _sound_files(paths: list[str]) -> tuple[list[str], bool]:
    """Return the files and the sound files in folders, and whether a folder was unusable; exit if no file is left."""
    from ast_jax.data.records import sound_files

    names, failed = [], False
    for path in paths:
        try:
            names += sound_files(path)
        except (ValueError, OSError) as error:
            failed = True
            complain(str(error))
    if not names:
        raise typer.Exit(1)
    return names, failed
