"""The command line: `ast-jax`. JAX is imported when a command runs, not for `--help`."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from typing import Any

from ast_jax.cli import common, finetune, inference, measure, models  # noqa: F401 (which register commands)
from ast_jax.cli.common import app


def main() -> None:
    """Run the command line; a user's error is one line on stderr and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    sys.unraisablehook = _interrupt_again
    try:
        app()
    finally:
        if common.interrupted:  # XLA may still compile, and would crash in the ruins of an interpreter that ends
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(common.EXIT_INTERRUPTED)


def _interrupt_again(ignored: Any) -> None:
    """Send Ctrl-C once more where it was lost: in a callback of the garbage collector (JAX has one) or a destructor."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    main()
