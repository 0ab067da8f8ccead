"""Run `ast-jax` in a process of its own, or in this one, which is seconds faster."""

import contextlib
import os
import pathlib
import subprocess
import sys

import typer.testing

import ast_jax
from ast_jax.cli import main

# What a process of its own compiles with: as here, but for one device.
ONE_DEVICE = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"


def ast_cli(*arguments, cwd=None, encoding="utf-8", **environment):
    """Run the command line in a fresh process."""
    env = {**os.environ, "XLA_FLAGS": ONE_DEVICE, **environment}
    command = [sys.executable, "-m", "ast_jax.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding=encoding, env=env, timeout=300, cwd=cwd)


def in_process(*arguments, cwd="."):
    """Run the command line in this process, which is seconds faster."""
    with contextlib.chdir(cwd):
        result = typer.testing.CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)
