"""Commands on sounds: classify, embed, explain."""

from __future__ import annotations

import contextlib
import enum
import pathlib
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ast_jax.cli.common import MODEL_HELP, app, complain, one_line, user_errors, wrong_usage
from ast_jax.cli.results import results_writer, timeline_writer, window_printer

if TYPE_CHECKING:
    from ast_jax.checkpoints.folder import Checkpoint

STDIN = "-"


class Aggregate(enum.StrEnum):
    """How the scores of windows become one."""

    mean = "mean"
    max = "max"


class Padding(enum.StrEnum):
    """What fills a window that is shorter than the model's input."""

    zero = "zero"
    repeat = "repeat"
    mask = "mask"
    own_length = "own-length"


class Encoding(enum.StrEnum):
    """Samples without a header, by ffmpeg's names."""

    s16le = "s16le"
    s16be = "s16be"
    s24le = "s24le"
    s32le = "s32le"
    f32le = "f32le"
    f64le = "f64le"
    u8 = "u8"
    alaw = "alaw"
    mulaw = "mulaw"


Files = Annotated[
    list[str],
    typer.Argument(
        help="Sound files: WAV, FLAC, OGG or MP3, any rate, length and channels; folders of such files; or - for WAV "
        "or raw samples from the standard input."
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Window = Annotated[
    float | None,
    typer.Option("--window", help="Seconds that are scored together.", show_default="the model's input"),
]
Hop = Annotated[
    float | None, typer.Option("--hop", help="Seconds from one window to the next.", show_default="half a window")
]
Pad = Annotated[
    Padding,
    typer.Option(
        "--pad",
        help="What is shorter than the model's input is filled with zeros, as the original does, or with itself; or "
        "the rest is masked; or the model runs at the sound's own length.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows that go through the model together.", show_default="8 on CPU, 64")
]


@app.command()
def classify(
    files: Files,
    model: Model = "sounds-tiny",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many labels to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each file.")] = False,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="Write a row for each file, in order, to this CSV or JSONL instead."),
    ] = None,
    window: Window = None,
    hop: Hop = None,
    aggregate: Annotated[
        Aggregate, typer.Option(help="How the scores of windows become those of the whole.")
    ] = Aggregate.mean,
    pad: Pad = Padding.zero,
    timeline: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Write what is heard when, a row for each stretch, to this CSV or JSONL; or as a label track for "
            "Audacity to this .txt."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Score that makes a stretch.")] = 0.5,
    low: Annotated[
        float | None,
        typer.Option(help="Score down to which a stretch goes on.", show_default="0.6 of the threshold"),
    ] = None,
    picture: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the stretches under the spectrogram, of one file, to this PNG.")
    ] = None,
    raw: Annotated[
        Encoding | None, typer.Option(help="The standard input has samples without a header, encoded like this.")
    ] = None,
    rate: Annotated[int | None, typer.Option(min=1, help="Hz of these samples.", show_default="16000")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of these samples.", show_default="1")] = None,
    batch_size: BatchSize = None,
) -> None:
    """Name what is in sound files, and when.

    Scores are probabilities, of each label for itself where the model is multi-label. A sound that is longer than the
    model's input is heard in windows to its end; its scores are their mean, and a list says what is heard when. A bad
    file is one line on stderr; the others still print, and the exit status is 1.
    """
    _check_ending("--output", output, (".csv", ".jsonl"))
    _check_ending("--timeline", timeline, (".csv", ".jsonl", ".txt"))
    _check_ending("--picture", picture, (".png",))
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
        wrong_usage("--rate and --channels: expected --raw beside them; a header says its own")
    written = [path.resolve() for path in (output, timeline, picture) if path]
    if len(set(written)) < len(written):
        wrong_usage("--output, --timeline, --picture: expected a file for each, got one for two of them")
    failed = False
    with user_errors():
        _check_places(output, timeline)
        if picture:
            from ast_jax.inference.pictures import check_place

            check_place(picture)
        from ast_jax.audio.streams import Live
        from ast_jax.inference.predict import analyze_each
        from ast_jax.runtime.progress import step, track

        checkpoint = _loaded(model)
        live = files == [STDIN]
        names, failed = ([], False) if live else _all_sounds(files)
        if not live and not names:
            raise typer.Exit(1)
        if (picture or (timeline and timeline.suffix.lower() == ".txt")) and not live and len(names) != 1:
            wrong_usage(f"{'--picture' if picture else '--timeline .txt'}: expected one file, got {len(names)}")
        sources = Live(0, raw and raw.value, rate or 16000, channels or 1, stop=_until_ctrl_c()) if live else names
        tell = window_printer(checkpoint, top_k, as_json) if live and not output else lambda part: None
        with contextlib.ExitStack() as outputs:
            cut = (threshold, low)
            top_k = min(top_k, checkpoint.config.num_labels)
            write = outputs.enter_context(results_writer(output, as_json, top_k, cut))
            write_timeline = outputs.enter_context(timeline_writer(timeline, cut))
            results = analyze_each(
                sources, checkpoint, window=window, hop=hop, aggregate=aggregate.value, padding=pad.value,
                batch_size=batch_size, tell=tell,
            )  # fmt: skip
            for found in results if live else track(results, "sounds", len(names)):
                if found.error:
                    failed = True
                    complain(found.error)
                write(found)
                write_timeline(found)
        if picture and not failed:
            from ast_jax.inference.pictures import timeline_picture

            with step("drawing the picture"):
                timeline_picture(found, checkpoint.frontend, picture, *cut)
    if failed:
        raise typer.Exit(1)


def _until_ctrl_c() -> Callable[[], bool]:
    """Return whether Ctrl-C was pressed, which from now on ends what is heard and not the command, the first time."""
    pressed: list[int] = []

    def press(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, press)
    return lambda: bool(pressed)


def _check_ending(option: str, path: pathlib.Path | None, endings: tuple[str, ...]) -> None:
    """Refuse a name that ends in none of these."""
    if path and path.suffix.lower() not in endings:
        *most, last = endings
        known = f"{', '.join(most)} or {last}" if most else last
        wrong_usage(f"{option}: expected a name that ends in {known}, got {path}")


def _check_places(*paths: pathlib.Path | None) -> None:
    """Refuse what could not be written in the end."""
    from ast_jax.runtime.files import check_folder_of

    for path in paths:
        if path:
            check_folder_of(path)


def _loaded(model: str) -> Checkpoint:
    """Load a model, and tell what was assumed of weights that are not ours."""
    from ast_jax.checkpoints.load import load
    from ast_jax.checkpoints.locate import is_own
    from ast_jax.runtime.progress import step

    with step("loading the model"):
        checkpoint = load(model)
    if pathlib.Path(model).exists() and not is_own(pathlib.Path(model)):
        for note in checkpoint.provenance.notes:
            complain(f"{model}: {note}")
    return checkpoint


def _all_sounds(files: list[str]) -> tuple[list[str], bool]:
    """Return the files, those in folders among them, and whether a folder was bad: that does not lose the others."""
    names, failed = [], False
    for file in files:
        try:
            names += _sounds(file)
        except (ValueError, OSError) as error:
            failed = True
            complain(str(error))
    return names, failed


def _sounds(name: str) -> list[str]:
    """Return the sound files in a folder and the folders in it; of anything else its name, which may yet be a file's.

    Raises:
        ValueError: a folder without any.
    """
    if not pathlib.Path(name).is_dir():
        return [name]
    from ast_jax.data.records import AUDIO_SUFFIXES, visible_files

    found = [str(path) for path in visible_files(pathlib.Path(name)) if path.suffix.lower() in AUDIO_SUFFIXES]
    if not found:
        endings = ", ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{name}: expected a folder with sound files, found none that ends in {endings}")
    return found


class Pool(enum.StrEnum):
    """Which vector says what a window is like."""

    pooled = "pooled"
    cls = "cls"
    mean = "mean"
    none = "none"


class Per(enum.StrEnum):
    """What has a row of its own."""

    window = "window"
    clip = "clip"


@app.command()
def embed(
    files: Annotated[
        list[str],
        typer.Argument(help="Sound files: WAV, FLAC, OGG or MP3, any rate, length and channels; and folders."),
    ],
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="The .npz or .parquet to write: a row for each vector.")
    ],
    model: Model = "sounds-tiny",
    layer: Annotated[
        int | None,
        typer.Option(
            help="After how many blocks; 0 for the embeddings, -1 for the last block.",
            show_default="the last, and the final norm",
        ),
    ] = None,
    pool: Annotated[
        Pool,
        typer.Option(
            help="What the classifier takes (the mean of both tokens), the class token, the mean of all patches, or a "
            "row for every patch, with its times and frequencies."
        ),
    ] = Pool.pooled,
    per: Annotated[
        Per, typer.Option(help="A row for every window of a sound, or one for the whole, their mean.")
    ] = Per.window,
    window: Window = None,
    hop: Hop = None,
    pad: Pad = Padding.zero,
    batch_size: BatchSize = None,
) -> None:
    """Turn sounds into vectors, to search or group them by.

    A bad file is one line on stderr; the others are still written, and the exit status is 1.
    """
    _check_ending("--output", output, (".npz", ".parquet"))
    if STDIN in files:
        wrong_usage(f"{STDIN}: expected files, got the standard input, which only classify hears")
    failed = False
    with user_errors():
        _check_places(output)
        from ast_jax.inference.embeddings import embed_each
        from ast_jax.inference.vectors import vector_table
        from ast_jax.runtime.progress import track

        checkpoint = _loaded(model)
        names, failed = _all_sounds(files)
        if not names:
            raise typer.Exit(1)
        sounds = 0
        with vector_table(output) as write:
            results = embed_each(
                names, checkpoint, layer=layer, pool=pool.value, window=window, hop=hop, padding=pad.value,
                batch_size=batch_size,
            )  # fmt: skip
            for found in track(results, "sounds", len(names)):
                if found.error:
                    failed = True
                    complain(found.error)
                else:
                    write(found, whole=per is Per.clip)
                    sounds += 1
            if not sounds:
                raise ValueError(f"{output}: not written, as no sound could be heard")
        print(f"{output}: the vectors of {sounds} sound{'' if sounds == 1 else 's'}")
    if failed:
        raise typer.Exit(1)


@app.command()
def explain(
    file: Annotated[str, typer.Argument(help="A sound file: WAV, FLAC, OGG or MP3, any rate, length and channels.")],
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The picture to write, a .png.")],
    model: Model = "sounds-tiny",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="A label to explain (several: again).", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Else how many of the best.")] = 3,
    start: Annotated[
        float | None,
        typer.Option(
            help="Where in a long sound, in seconds.", show_default="the window in which the best label is heard best"
        ),
    ] = None,
    cells: Annotated[
        tuple[int, int],
        typer.Option(help="How many cells of frequency and time occlusion takes out, one at a time."),
    ] = (8, 16),
    arrays: Annotated[
        pathlib.Path | None, typer.Option(help="Also write what is drawn as arrays, to this .npz.")
    ] = None,
) -> None:
    """Draw what in a sound speaks for its labels.

    Three ways: attention rollout, gradient saliency, and occlusion.
    """
    _check_ending("--output", output, (".png",))
    _check_ending("--arrays", arrays, (".npz",))
    with user_errors():
        _check_places(output, arrays)
        from ast_jax.inference.explanations import explain as look_into
        from ast_jax.inference.pictures import explanation_picture
        from ast_jax.runtime.progress import step

        checkpoint = _loaded(model)
        with step("explaining"):
            found = look_into(
                file, checkpoint, labels=label or None, top_k=min(top_k, checkpoint.config.num_labels), start=start,
                cells=cells,
            )  # fmt: skip
        with step("drawing the picture"):
            explanation_picture(found, output)
        if arrays:
            from ast_jax.inference.vectors import write_arrays

            write_arrays(arrays, found)
        print(f"{one_line(file)}: {found.duration:.2f} s from {found.start:.2f} s on, explained in {output}")
        for name, score in zip(found.labels, found.scores, strict=True):
            print(f"  {score:6.3f}  {one_line(name)}")


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help=f"{MODEL_HELP} Several: again.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in, and anyone there use it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 for any that is free.")] = 7860,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest upload.")] = 50,
    max_minutes: Annotated[float, typer.Option(min=0.01, help="Longest sound.")] = 10.0,
) -> None:
    """Serve a page to try models on; needs the extra `demo`."""
    with user_errors(bars=False):  # requests would draw them
        from ast_jax.cli.demo import Limits, serve

        serve(
            list(model or []), Limits(max_megabytes, max_minutes), host, port,
            tell=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
        )  # fmt: skip
