"""Verification passes for correct conversions and fails for wrong ones."""

import builtins
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import torch_models
import torch_original
import transformers
import typer.testing
from flax.traverse_util import flatten_dict, unflatten_dict

import ast_jax
from ast_jax.checkpoints.pytorch import from_torch, parity
from ast_jax.checkpoints.pytorch.state_dicts import read_source
from ast_jax.cli import main

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return one small source of each format."""
    folder = tmp_path_factory.mktemp("sources")
    model = torch_models.saved_model(folder / "hf", "stride-10-10", num_hidden_layers=2)
    torch_models.saved_model(folder / "headless", "stride-10-10", cls=transformers.ASTModel, num_hidden_layers=1)
    (folder / "lone").mkdir()
    torch.save(model.state_dict(), folder / "lone" / "live.pth")
    original = torch_original.randomized(torch_original.OriginalAST(label_dim=5, input_tdim=128, depth=2))
    torch.save(torch.nn.DataParallel(original).state_dict(), folder / "lone" / "own_10_10_0.5.pth")
    torch.save({"model": torch_original.deit_state(depth=1, hw=14)}, folder / "lone" / "deit.pth")
    return folder


SOURCES = ["hf", "headless", "lone/live.pth", "lone/own_10_10_0.5.pth", "lone/deit.pth"]
LAYERS = {"hf": 2, "headless": 1, "lone/live.pth": 2, "lone/own_10_10_0.5.pth": 2, "lone/deit.pth": 1}


@pytest.mark.parametrize("name", SOURCES)
def test_every_stage_agrees_with_pytorch(name, files):
    found = read_source(files / name)
    proof = parity.verify(found, from_torch.convert(found))
    assert proof.passed
    assert proof.different == ()
    assert proof.summed == (("patch_embed.proj.weight",) if "deit" in name else ())
    unused = 4 if "own" in name or "deit" in name else 0
    assert proof.tensors == len(found.state) - len(proof.summed) - unused
    head = [] if name in ("headless", "lone/deit.pth") else ["logits"]
    layers = [f"layer {index + 1}" for index in range(LAYERS[name])]
    assert [stage.name for stage in proof.stages] == ["embeddings", *layers, "norm", "pooled", *head]
    assert all(stage.largest_value > 0.5 for stage in proof.stages)
    # Float32 rounding through one or two layers: far below the tolerance of `verify`, which is for twelve.
    assert max(stage.largest_difference / stage.largest_value for stage in proof.stages) < 1e-5


def changed(checkpoint, path, change):
    flat = dict(flatten_dict(checkpoint.params, sep="/"))
    flat[path] = change(flat[path])
    return checkpoint.replace(params=unflatten_dict(flat, sep="/"))


MISTAKES = {
    "one number": lambda c: changed(c, "layers/mlp/fc1/kernel", lambda x: x + np.eye(*x.shape[1:]).astype("f4")),
    "heads mixed up": lambda c: changed(c, "layers/attention/out/kernel", lambda x: x[:, ::-1]),
    "tokens swapped": lambda c: changed(c, "embeddings/position_embeddings", lambda x: x[[1, 0, *range(2, len(x))]]),
}


@pytest.mark.parametrize("name", ["hf", "lone/own_10_10_0.5.pth", "lone/deit.pth"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tensors_fail_both_checks(mistake, name, files):
    """In the tensors converted back and in the stages."""
    found = read_source(files / name)
    proof = parity.verify(found, MISTAKES[mistake](from_torch.convert(found)))
    assert proof.different
    assert not all(stage.passed for stage in proof.stages)
    assert not proof.passed
    assert "DIFFERS" in str(proof)
    assert f"{proof.different[0]} is different" in str(proof)


@pytest.mark.parametrize("name", ["hf", "lone/own_10_10_0.5.pth"])
@pytest.mark.parametrize(
    "mistake", [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-3}], ids=str
)
def test_another_architecture_fails_in_the_stages_only(mistake, name, files):
    """Even the tanh instead of the erf form of GELU."""
    found = read_source(files / name)
    checkpoint = from_torch.convert(found)
    proof = parity.verify(found, checkpoint.replace(config=checkpoint.config.replace(**mistake)))
    assert proof.different == ()
    assert proof.stages[0].passed
    assert not proof.passed


@pytest.mark.parametrize(("missing", "name"), [("torch", "lone/own_10_10_0.5.pth"), ("transformers", "hf")])
def test_without_pytorch_every_tensor_is_compared(missing, name, files, monkeypatch):
    real = builtins.__import__

    def refuse(module, *rest, **more):
        if module.split(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}", name=missing)
        return real(module, *rest, **more)

    found = read_source(files / name)
    checkpoint = from_torch.convert(found)
    monkeypatch.setattr(builtins, "__import__", refuse)
    proof = parity.verify(found, checkpoint)
    assert proof.passed
    assert proof.stages == ()
    assert proof.reference == f"none: {missing} is not installed or cannot be imported here"
    wrong = parity.verify(found, changed(checkpoint, "layernorm/bias", lambda x: x + 1))
    assert wrong.different == ("v.norm.bias" if "own" in name else "audio_spectrogram_transformer.layernorm.bias",)
    assert not wrong.passed


def test_a_broken_dependency_of_transformers(files, monkeypatch):
    """For example a torchaudio built for another PyTorch, which transformers tries to import."""

    class Transformers:
        def __getattr__(self, name):
            raise OSError("Could not load this library: torchaudio.so")

    found = read_source(files / "hf")
    monkeypatch.setitem(sys.modules, "transformers", Transformers())
    proof = parity.verify(found, from_torch.convert(found))
    assert proof.passed
    assert proof.reference == (
        "none: transformers (Could not load this library: torchaudio.so) is not installed or cannot be imported here"
    )


def run(*arguments):
    return typer.testing.CliRunner().invoke(main.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", SOURCES)
def test_convert_verify_prints_and_writes_the_table(name, files, tmp_path):
    done = run("convert", files / name, tmp_path / "out", "--verify")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert content["passed"] is True
    assert content["reference"].endswith(f"torch {torch.__version__}")
    assert f"{content['tensors']} tensors converted back: none different" in done.stdout
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    for stage in content["stages"]:
        assert f"{stage['largest_difference']:.2e}" in rows[stage["name"]]
        assert f"{stage['mean_difference']:.2e}" in rows[stage["name"]]
    assert "arrays written and read back: none different" in done.stdout
    ast_jax.load(tmp_path / "out")


def test_convert_verify_writes_nothing_if_the_models_differ(files, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", 0.0)  # so that rounding fails
    done = run("convert", files / "hf", tmp_path / "out", "--verify")
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout
    assert done.stderr.splitlines() == [
        f"ast-jax: {files / 'hf'}: the converted model differs from the source; nothing was written"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "name"), [("huggingface", "back"), ("original", "back.pth")])
def test_verify_reads_exports_back(target, name, files, tmp_path, monkeypatch):
    deep = torch_original.randomized(torch_original.OriginalAST(label_dim=5, input_tdim=128))
    torch.save(deep.state_dict(), tmp_path / "own_10_10_0.5.pth")
    done = run("convert", tmp_path / "own_10_10_0.5.pth", tmp_path / name, "--to", target, "--verify")
    assert done.exit_code == 0, done.output
    written = 203 if target == "huggingface" else 155  # query, key and value separate or fused
    assert "compared: own_10_10_0.5.pth\n155 tensors converted back: none different" in done.stdout
    assert f"compared: {name}\n{written} tensors converted back: none different" in done.stdout
    kept = "back/verification.json" if target == "huggingface" else "back.verification.json"
    content = json.loads((tmp_path / kept).read_text())
    assert content["passed"] is True
    assert content["of"] == name
    assert content["stages"][-1]["name"] == "logits"
    checkpoint = from_torch.convert(read_source(tmp_path / "own_10_10_0.5.pth"))
    proof = parity.verify_exported(tmp_path / name, changed(checkpoint, "layernorm/scale", lambda x: x * 2))
    assert len(proof.different) == 1
    assert [stage.name for stage in proof.stages if not stage.passed] == ["norm", "pooled", "logits"]


def test_a_wrong_export_is_removed(files, tmp_path, monkeypatch):
    ast_jax.save(tmp_path / "ours", ast_jax.load(files / "hf"))
    monkeypatch.setattr(parity, "TOLERANCE", 0.0)  # so that rounding fails
    done = run("convert", tmp_path / "ours", tmp_path / "hf", "--to", "huggingface", "--verify")
    assert done.exit_code == 1
    assert done.stderr.endswith(": the exported model differs from the source; it was removed\n")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_verification_lists_what_it_cannot_verify(files, tmp_path):
    lone = run("convert", files / "lone" / "own_10_10_0.5.pth", tmp_path / "a", "--verify", "--num-labels", "2")
    given = (
        "not verified, as the source does not contain them: strides, input size, heads, mean and standard deviation "
        "of the features"
    )
    assert given in lone.stdout
    assert "compared: own_10_10_0.5.pth, before classifier of 2 labels: initialised, untrained" in lone.stdout
    assert json.loads((tmp_path / "a" / "verification.json").read_text())["of"].startswith("own_10_10_0.5.pth, before")
    assert "not verified" not in run("convert", files / "hf", tmp_path / "b", "--verify").stdout
    torch_models.saved_model(tmp_path / "hf", "stride-10-10", num_hidden_layers=1, num_labels=35)
    attached = run("convert", tmp_path / "hf", tmp_path / "c", "--verify").stdout
    assert "not verified, as the source does not contain them: names of the labels" in attached.splitlines()
    again = run("convert", tmp_path / "c", tmp_path / "d", "--verify").stdout
    assert "the source is a checkpoint of ast_jax: there is no PyTorch model to compare with" in again


def test_saved_checkpoints_are_read_back_and_compared(files, tmp_path):
    checkpoint = ast_jax.load(files / "hf")
    ast_jax.save(tmp_path / "ours", checkpoint)
    assert parity.verify_saved(tmp_path / "ours", checkpoint) == 23
    other = changed(checkpoint, "layernorm/scale", lambda x: x * 2)
    other = other.replace(frontend=other.frontend.replace(mean=-1.0))
    with pytest.raises(ast_jax.CheckpointError, match=r"differs from what was saved: layernorm/scale, frontend$"):
        parity.verify_saved(tmp_path / "ours", other)


def test_json_has_every_field(files):
    found = read_source(files / "hf")
    proof = parity.verify(found, from_torch.convert(found))
    content = json.loads(json.dumps(proof.to_json_dict()))
    assert content.keys() == {field.name for field in dataclasses.fields(proof)} | {"tolerance", "passed"}
    assert len(content["stages"]) == len(proof.stages)


class Touch:
    """Create a file when unpickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return open, (self.name, "w")


@pytest.mark.slow
def test_in_an_environment_without_torch(files, tmp_path):
    """In a plain installation every format converts, verifies, and equals the conversion made here."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "plain"], check=True)
    python = tmp_path / "plain" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for index, name in enumerate(SOURCES):
        out = tmp_path / str(index)
        command = [tmp_path / "plain" / "bin" / "ast-jax", "convert", files / name, out, "--verify"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "reference: none: torch is not installed" in done.stdout
        assert "tensors converted back: none different" in done.stdout
        assert done.stderr == ""
        jax.tree.map(np.testing.assert_array_equal, ast_jax.load(out).params, ast_jax.load(files / name).params)
    torch.save({"a": Touch(str(tmp_path / "was-run"))}, tmp_path / "hostile.pth")
    command = [tmp_path / "plain" / "bin" / "ast-jax", "convert", tmp_path / "hostile.pth", tmp_path / "never"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "got io.open in the pickle, which was not run" in done.stderr
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "never").exists()
    back = [tmp_path / "plain" / "bin" / "ast-jax", "convert", tmp_path / "0", tmp_path / "hf", "--to", "huggingface"]
    assert subprocess.run(back, capture_output=True, env=environment, cwd=tmp_path).returncode == 0
    transformers.ASTForAudioClassification.from_pretrained(tmp_path / "hf")
