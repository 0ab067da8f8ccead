"""Commands and Python of the pages on using a model run; the migration tables are complete."""

import inspect
import re
import shutil

import numpy as np
import pytest
import soundfile
import transformers
from pages import NOT_RUN, PAGES, RUN_WHOLE, SOUNDS, blocks, commands, page
from typer.testing import CliRunner

import ast_jax
from ast_jax.audio.io import read_audio
from ast_jax.cli.main import app

LONG = ("jax", "embeddings", "explanations")  # more than ten seconds each, most of it compilation
WITHOUT_PYTHON = ("tpu", "speed", "demo", "api", "cli", "parity", "sounds-tiny")
MEETING = ("speech", "music", "siren", "speech_over_music", "telephone", "speech")  # as in the pictures of the pages


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with the files that the pages name."""
    sounds = [read_audio(SOUNDS / f"{name}.flac") for name in MEETING]
    soundfile.write(tmp_path / "meeting.flac", np.concatenate(sounds), 16000)
    shutil.copytree(SOUNDS, tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in RUN_WHOLE]
)
def test_a_page_runs(name, workdir):
    """All commands in turn, and all Python blocks in one namespace; test_shell.py runs the pipes into `-`."""
    if name not in NOT_RUN:
        for arguments in [one for block in blocks(f"{name}.md", "sh") for one in commands(block)]:
            if "-" not in arguments:
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, (arguments, result.output)
    namespace = {}
    for block in blocks(f"{name}.md", "python"):
        exec(compile(block, f"{name}.md", "exec"), namespace)


def test_every_page_runs_or_has_no_python():
    assert {path.stem for path in PAGES} == {*RUN_WHOLE, "finetuning", *WITHOUT_PYTHON}
    assert not [name for name in WITHOUT_PYTHON if blocks(f"{name}.md", "python")]


def test_the_page_on_sliding_windows_shows_the_output(workdir):
    (shown,) = re.findall(r"^```text\n(.*?)\n```", page("sliding-windows.md"), re.DOTALL | re.MULTILINE)
    printed = CliRunner().invoke(app, ["classify", "meeting.flac", "--top-k", "3"]).stdout.rstrip("\n")
    scores = r"\b0\.\d{3}\b"  # the last digit depends on the machine
    assert re.sub(scores, "score", printed) == re.sub(scores, "score", shown)


def test_migration_names_all_that_transformers_has():
    """The page names every class, configuration field, call argument and output field of transformers' AST."""
    text = page("migrating.md")
    module = transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer
    common = {"self", "args", "kwargs", "return", "return_tensors", "model_type", "transformers_version"}
    fields = set(transformers.ASTConfig().to_dict()) & set(vars(ast_jax.ASTConfig())) | {"id2label", "label2id"}
    extractor = set(inspect.signature(transformers.ASTFeatureExtractor.__init__).parameters)
    calls = set(inspect.signature(transformers.ASTFeatureExtractor.__call__).parameters)
    calls |= set(inspect.signature(module.ASTModel.forward).parameters)
    calls |= set(inspect.signature(module.ASTForAudioClassification.forward).parameters)
    for name in {*module.__all__, "ASTConfig", "ASTFeatureExtractor", *fields, *extractor, *calls} - common:
        assert f"`{name}" in text, name
