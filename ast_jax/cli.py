"""The command line: `ast-jax`. JAX is imported when a command runs, not for `--help`."""

from __future__ import annotations

import io
import sys

from . import cli_listening, cli_measuring, cli_models, cli_training  # noqa: F401 (they register their commands)
from .cli_common import app


def main() -> None:
    """Run the command line; a user's error is one line on stderr and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    app()


if __name__ == "__main__":
    main()
