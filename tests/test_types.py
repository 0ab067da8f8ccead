"""The public API as mypy sees it in a user's code, and as it is at run time: the same names, lazily imported."""

import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import ast_jax

STUB = pathlib.Path(ast_jax.__file__).with_suffix(".pyi")
ERROR = re.compile(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$")

# A user's module. A comment `# error: codes` has the errors that mypy must report on its line; there may be no others.
USER = """\
from typing import assert_type

import ast_jax
import jax
import jax.numpy as jnp
from ast_jax import Checkpoint, load

ckpt = load("sounds-tiny")
assert_type(ckpt, Checkpoint)
x: int = ast_jax.load("a", nonsense=1)  # error: assignment, call-arg
load("a", max_length=512, labels=["a", "b"])
load("a", max_length="512")  # error: arg-type
assert_type(ast_jax.from_torch("a", mean=-4.0, num_labels=2), Checkpoint)
ast_jax.from_torch("a", nonsense=1)  # error: call-arg
ast_jax.nonsense  # error: attr-defined
from ast_jax import nothing  # error: attr-defined

config = ast_jax.ASTConfig(num_labels=2, problem_type="single_label_classification")
assert_type(config.resolved_problem_type, ast_jax.ProblemType)
ast_jax.ASTConfig(num_label=2)  # error: call-arg
ast_jax.ASTConfig(num_labels="2")  # error: arg-type

params = ast_jax.init(jax.random.key(0), config)
spec = jnp.zeros((2, 1024, 128))
assert_type(ast_jax.apply(params, spec, config), jax.Array)
assert_type(ast_jax.apply(params, spec, lengths=jnp.array([3, 4]), dtype=jnp.bfloat16), jax.Array)
assert_type(ast_jax.encode(params, spec, config), ast_jax.ASTOutput)
assert_type(ast_jax.loss(jnp.zeros((2, 2)), jnp.zeros(2, int), config), jax.Array)
ast_jax.apply(params, spec, config, training=True)  # error: call-arg
ast_jax.init(0, config)  # error: arg-type
"""


def test_mypy_knows_the_public_types(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = {(int(line), code) for line, code in filter(None, map(_error, done.stdout.splitlines()))}
    lines = [(number, line.partition("# error: ")[2]) for number, line in enumerate(USER.splitlines(), 1)]
    want = {(number, code) for number, codes in lines if codes for code in codes.split(", ")}
    assert found == want, done.stdout + done.stderr


def _error(line):
    match = ERROR.match(line)
    return match and match.groups()


@pytest.mark.parametrize("name", ast_jax.__all__)
def test_the_stub_names_the_module_that_defines(name):
    """Else a name would be imported by a detour, and pickled and documented under another."""
    (module,) = re.findall(rf"^from \.([\w.]+) import {name} as {name}$", STUB.read_text(), re.MULTILINE)
    value = getattr(ast_jax, name)
    assert value is getattr(importlib.import_module(f"ast_jax.{module}"), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == f"ast_jax.{module}"


def test_the_stub_has_imports_and_the_version_only():
    lines = [line for line in STUB.read_text().splitlines() if not re.match(r"from \.[\w.]+ import (\w+) as \1$", line)]
    assert list(filter(None, lines)) == ["__version__: str"]
