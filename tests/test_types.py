"""The public API as mypy sees it in a user's code, and as it is at run time: the same names, lazily imported."""

import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
from pages import WITH_README, blocks

import ast_jax

STUB = pathlib.Path(ast_jax.__file__).with_suffix(".pyi")
ERROR = re.compile(r"(?P<file>\w+\.py):(?P<line>\d+): error: .*\[(?P<code>[\w-]+)\]$")

# A user's module. A comment `# error: codes` has the errors that mypy must report on its line; there may be no others.
USER = """\
from typing import assert_type

import ast_jax
import jax
import jax.numpy as jnp
import numpy as np
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

waveform = ast_jax.read_audio("a.wav", 16000)
assert_type(waveform, np.ndarray)
extract = ast_jax.ASTFeatureExtractor(max_length=512)
assert_type(extract(waveform, sampling_rate=16000), np.ndarray)
assert_type(extract([waveform, waveform[:8000]], sampling_rate=16000), np.ndarray)
assert_type(extract(waveform, 16000, return_attention_mask=True), tuple[np.ndarray, np.ndarray])
assert_type(ast_jax.fbank(waveform, num_mel_bins=64), np.ndarray)
assert_type(ast_jax.fbank(jnp.asarray(waveform)), jax.Array)
ast_jax.fbank("a.wav")  # error: type-var

params = ast_jax.init(jax.random.key(0), config)
spec = jnp.zeros((2, 1024, 128))
assert_type(ast_jax.apply(params, spec, config), jax.Array)
assert_type(ast_jax.apply(params, spec, lengths=jnp.array([3, 4]), dtype=jnp.bfloat16), jax.Array)
assert_type(ast_jax.apply(params, extract(waveform, 16000), lengths=[90]), jax.Array)
assert_type(ast_jax.encode(params, spec, config), ast_jax.ASTOutput)
assert_type(ast_jax.loss(jnp.zeros((2, 2)), jnp.zeros(2, int), config), jax.Array)
ast_jax.apply(params, spec, config, training=True)  # error: call-arg
ast_jax.init(0, config)  # error: arg-type

assert_type(ast_jax.classify("a.wav", ckpt, top_k=3), list[tuple[str, float]])
assert_type(ast_jax.classify(waveform, sampling_rate=16000, window=5.0), list[tuple[str, float]])
assert_type(ast_jax.classify(["a.wav", "b.wav"], "sounds-tiny"), list[list[tuple[str, float]]])
assert_type(ast_jax.analyze(b"RIFF"), ast_jax.Analysis)
assert_type(ast_jax.analyze(["a.wav", waveform], padding="mask"), list[ast_jax.Analysis])
assert_type(ast_jax.embed(jnp.asarray(waveform), layer=-1), ast_jax.Embedding)
assert_type(ast_jax.embed(("a.wav", "b.wav")), list[ast_jax.Embedding])
assert_type(ast_jax.explain("a.wav").labels, tuple[str, ...])
ast_jax.classify("a.wav", nonsense=1)  # error: call-overload
ast_jax.classify(3)  # error: call-overload
ast_jax.embed("a.wav", pool=1)  # error: call-overload
assert_type(ast_jax.load_program("a.zip")(np.zeros((1, 16000))), jax.Array)

data = ast_jax.DatasetConfig("DATA", fold=1)
training = ast_jax.TrainConfig(epochs=3, learning_rate=1e-4)
run = ast_jax.finetune(data, "RUN", init="sounds-tiny", training=training, execution=ast_jax.ExecutionConfig())
assert_type(run, ast_jax.Run)
assert_type(ast_jax.resume("RUN"), ast_jax.Run)
assert_type(ast_jax.evaluate(["RUN"], data), ast_jax.Evaluation)
ast_jax.TrainConfig(epoch=3)  # error: call-arg
ast_jax.finetune(data, "RUN", batch_size=3)  # error: call-arg
"""


def test_mypy_knows_the_public_types(tmp_path):
    """In the user's module above, and in the Python of README and docs, where there are no errors."""
    (tmp_path / "user.py").write_text(USER)
    pages = {f"page_{path.stem.replace('-', '_')}.py": "\n".join(blocks(path, "python")) for path in WITH_README}
    for name, code in pages.items():
        (tmp_path / name).write_text(code)
    options = [
        "--no-implicit-reexport", "--check-untyped-defs", "--ignore-missing-imports", "--allow-redefinition",
        "--disable-error-code=union-attr",  # of JAX's `memory_analysis`
    ]  # fmt: skip
    command = [sys.executable, "-m", "mypy", *options, "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    done = subprocess.run([*command, "user.py", *pages], cwd=tmp_path, capture_output=True, text=True)
    matches = filter(None, map(ERROR.match, done.stdout.splitlines()))
    found = {(match["file"], int(match["line"]), match["code"]) for match in matches}
    lines = [(number, line.partition("# error: ")[2]) for number, line in enumerate(USER.splitlines(), 1)]
    want = {("user.py", number, code) for number, codes in lines if codes for code in codes.split(", ")}
    assert found == want, done.stdout + done.stderr


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
