"""The command line: `ast-jax`. JAX is imported when a command runs, not for `--help`."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from typing import Any

from ast_jax.cli import common, finetune, inference, measure, models  # noqa: F401 (they register commands)
from ast_jax.cli.common import app


def main() -> None:
    """Run the command line; users' errors are one line on stderr and a non-zero exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold undecodable bytes
    sys.unraisablehook = _interrupt_again
    try:
        app()
    finally:
        if common.interrupted:  # threads of XLA that still compile crash while the interpreter finalizes
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(common.EXIT_INTERRUPTED)


def _interrupt_again(ignored: Any) -> None:
    """Send SIGINT again where KeyboardInterrupt was lost: in a callback of the garbage collector, or a destructor."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    main()
