"""What every command of the command line shares: the app, errors as one line, and text that fits one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from ast_jax.runtime.progress import hidden_bars, progress_display

interrupted = False  # by Ctrl-C, in the middle of something
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for SIGINT
EXIT_PIPE = 141  # and for SIGPIPE

app = typer.Typer(
    name="ast-jax",
    help="The Audio Spectrogram Transformer in JAX: name what is in a sound, convert checkpoints, fine-tune.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # whose tables cut the names of options short in a narrow terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class GroupedCommand(typer.core.TyperCommand):
    """A command whose `--help` lists the options under the headings that they were given."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by heading, in the order in which the headings come."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in sorted(self.get_params(ctx), key=lambda parameter: parameter.param_type_name):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            record = parameter.get_help_record(ctx)
            if record:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


MODEL_HELP = "Name of a shipped model, a checkpoint folder, PyTorch weights (folder or file), or a Hub id."

SIZE = ("max_length", "num_mel_bins", "frequency_stride", "time_stride")
MaxLength = Annotated[int | None, typer.Option("--max-length", min=16, help="Another input length, frames of 10 ms.")]
NumMelBins = Annotated[int | None, typer.Option("--num-mel-bins", min=16, help="Another number of mel bins.")]
FrequencyStride = Annotated[
    int | None, typer.Option("--frequency-stride", min=1, help="Another step between patches in mel bins.")
]
TimeStride = Annotated[int | None, typer.Option("--time-stride", min=1, help="Another step between patches in frames.")]


@contextlib.contextmanager
def user_errors(bars: bool = True) -> Iterator[None]:
    """Turn the library's exceptions for users into one line on stderr and exit status 1; draw progress bars."""
    global interrupted
    try:
        _import_jax()
        with progress_display() if bars else contextlib.nullcontext():
            yield
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, or Python would complain of it once more at its end
        raise typer.Exit(EXIT_PIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:
        complain(str(error).replace("\n", " "))
        raise typer.Exit(1) from None
    except RuntimeError as error:  # XLA's, which has no class of its own for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        complain(f"the device is out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size or model")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        interrupted = True
        complain("stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _import_jax() -> None:
    """Import what every command needs with Ctrl-C held back: an interrupted import of JAX ends in a segmentation fault.

    It is nanobind's, in freeing a module that is not complete.
    """
    held = hasattr(signal, "pthread_sigmask") and signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import jax  # noqa: F401
    finally:
        if held is not False:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def complain(message: str) -> None:
    """Print one line on stderr."""
    with hidden_bars():
        print(f"ast-jax: {one_line(message)}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print lines on stdout, each with its control characters escaped."""
    write_out("\n".join(map(one_line, text.splitlines())))


def write_out(text: str) -> None:
    """Print a text on stdout, above the progress bars."""
    with hidden_bars():
        print(text, flush=True)


def wrong_usage(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    complain(message)
    raise typer.Exit(EXIT_USAGE)


def one_line(text: str) -> str:
    """Return a text with its control characters, line ends among them, and undecodable bytes escaped."""
    special = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(special, lambda match: match[0].encode("unicode_escape").decode(), text)


def json_line(content: Any, indent: int | None = None) -> str:
    """Return JSON text that stdout can take: other characters than ASCII as they are where it has them."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(content, indent=indent)
    return text


def keep_programs() -> None:
    """Have JAX keep what it compiles, small programs too, in the user's cache folder; its own variables go before.

    To be called before JAX is imported. Where nothing can be written, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import platformdirs

    folder = platformdirs.user_cache_path("ast-jax") / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it compiles then


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
    program_cache: Annotated[
        bool,
        typer.Option(
            "--program-cache/--no-program-cache",
            help="Keep compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.",
        ),
    ] = True,
) -> None:
    """Take what comes before a command."""
    if program_cache:
        keep_programs()
    else:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
