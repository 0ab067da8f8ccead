"""Shared by all commands: the app, common options, errors as one line, printing beside progress bars."""

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

interrupted = False  # by Ctrl-C, while a command ran
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # the shells' 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE

app = typer.Typer(
    name="ast-jax",
    help="The Audio Spectrogram Transformer in JAX: classify audio, convert checkpoints, fine-tune.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables truncate option names in a narrow terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class GroupedCommand(typer.core.TyperCommand):
    """A command whose `--help` groups the options by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by heading, headings in order of first use."""
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
MaxLength = Annotated[int | None, typer.Option("--max-length", min=16, help="Input length in frames of 10 ms.")]
NumMelBins = Annotated[int | None, typer.Option("--num-mel-bins", min=16, help="Number of mel bins.")]
FrequencyStride = Annotated[
    int | None, typer.Option("--frequency-stride", min=1, help="Patch stride along frequency, in mel bins.")
]
TimeStride = Annotated[int | None, typer.Option("--time-stride", min=1, help="Patch stride along time, in frames.")]


@contextlib.contextmanager
def user_errors(bars: bool = True) -> Iterator[None]:
    """Report the library's exceptions for users as one line on stderr with exit status 1; draw progress bars."""
    global interrupted
    try:
        _import_jax()
        with progress_display() if bars else contextlib.nullcontext():
            yield
    except BrokenPipeError:  # the reader of stdout has closed it, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, else Python reports it again at exit
        raise typer.Exit(EXIT_PIPE) from None
    except (ValueError, OSError, FloatingPointError) as error:
        complain(str(error).replace("\n", " "))
        raise typer.Exit(1) from None
    except RuntimeError as error:  # XLA has no class of its own for this error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        complain(f"the device is out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size or model")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        interrupted = True
        complain("stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _import_jax() -> None:
    """Import JAX with SIGINT blocked: nanobind crashes when it frees a module whose import was interrupted."""
    blocked = hasattr(signal, "pthread_sigmask") and signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import jax  # noqa: F401
    finally:
        if blocked is not False:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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
    """Return a text with control characters (line breaks included) and undecodable bytes escaped."""
    special = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(special, lambda match: match[0].encode("unicode_escape").decode(), text)


def json_line(content: Any, indent: int | None = None) -> str:
    """Return JSON text, with non-ASCII characters escaped only where stdout's encoding lacks them."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(content, indent=indent)
    return text


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache in the user's cache folder, for small programs too.

    To be called before JAX is imported. JAX_COMPILATION_CACHE_DIR takes precedence; a read-only folder is not used.
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
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # then it compiles


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
            help="Persistent compilation cache, in the user's cache folder or JAX_COMPILATION_CACHE_DIR.",
        ),
    ] = True,
) -> None:
    """Handle the options before a command."""
    if program_cache:
        enable_compilation_cache()
    else:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
