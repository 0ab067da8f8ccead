"""The command line: what is printed where, and the exit status; in a process of its own where that can matter."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torch_models
import torch_original
import typer.testing
from command_line import SOUNDS, ast_cli, in_process
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax.cli import common, main
from ast_jax.data.datasets import DatasetConfig
from ast_jax.training import crossval, finetune, recipes, run_folder
from ast_jax.training.config import ExecutionConfig, TrainConfig


def imported(done):
    """Return the modules that a process imported, with PYTHONPROFILEIMPORTTIME in its environment."""
    return {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_classify_imports_what_it_needs():
    done = ast_cli("classify", SOUNDS / "siren.flac", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert {"jax", "flax", "orbax.checkpoint", "soundfile", "ast_jax.inference.predict"} <= imported(done)
    others = {"optax", "grain", "sklearn", "scipy", "matplotlib", "librosa", "torch", "transformers", "tensorboard"}
    assert not others & {name.split(".")[0] for name in imported(done)}
    assert not {
        "ast_jax.training.step",
        "ast_jax.training.trainer",
        "ast_jax.checkpoints.pytorch.from_torch",
        "ast_jax.training.metrics",
    } & imported(done)


def test_classify_prints_scores_and_durations():
    done = ast_cli("classify", SOUNDS / "speech.flac", SOUNDS / "music.flac", "--top-k", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    heard = "  (5.00 s in 3 windows of 2.58 s every 1.29 s; their mean)"
    assert lines[0] == f"{SOUNDS / 'speech.flac'}{heard}"
    score, label = lines[1].split(maxsplit=1)
    assert label == "Speech"
    assert float(score) > 0.5
    assert lines[4].split() == ["0.00", "to", "5.00", "s", lines[4].split()[4], "Speech"]
    assert lines[5] == f"{SOUNDS / 'music.flac'}{heard}"
    assert lines[6].split(maxsplit=1)[1] == "Music"


def test_bad_files_are_a_line_each_and_the_others_print(tmp_path):
    text = tmp_path / "notes.wav"
    text.write_text("this is not sound")
    done = ast_cli("classify", text, SOUNDS / "speech.flac", tmp_path / "none.wav", SOUNDS / "music.flac", "--json")
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"ast-jax: {text}: not a readable sound file")
    assert errors[1] == f"ast-jax: {tmp_path / 'none.wav'}: no such file"
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["file"] for result in results] == [str(SOUNDS / "speech.flac"), str(SOUNDS / "music.flac")]
    assert results[0]["windows"] == 3
    assert results[0]["duration_seconds"] == 5.0
    assert [entry["label"] for entry in results[0]["timeline"]] == ["Speech"]
    assert results[0]["predictions"][0]["label"] == "Speech"
    assert len(results[0]["predictions"]) == 5


def test_more_files_than_a_batch_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    names = []
    for index in range(11):
        names.append(tmp_path / f"{index} ü.wav")
        soundfile.write(names[-1], 0.1 * rng.standard_normal(8000), 16000)
    names[4].write_bytes(b"RIFF")
    done = in_process("classify", *names, "--json", "-k", "1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    files = [json.loads(line)["file"] for line in done.stdout.splitlines()]
    assert files == [str(name) for index, name in enumerate(names) if index != 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify"],
        ["classify", "a.wav", "--top-k", "0"],
        ["classify", "a.wav", "--nonsense"],
        ["nonsense"],
        ["finetune", "data"],
        ["finetune", "data", "--output", "run", "--mixup", "2"],
        ["finetune", "data", "--output", "run", "--schedule", "linear"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments):
    done = in_process(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--lr", "0"], "--learning-rate: 0.0 is out of range; expected more than 0"),
        (["x", "--epochs", "10000"], "--epochs: 10000 is out of range; expected 1 to 9999"),
        (["x", "--decay-factor", "0"], "--decay-factor: 0.0 is out of range; expected a number in (0, 1]"),
        (["x", "--optimizer", "sgd"], "--optimizer: 'sgd' is out of range; expected one of adam, adamw"),
        (["x", "--patchout", "-1"], "--patchout: -1 is out of range; expected 0 or more"),
        (
            ["x", "--recipe", "imagenet"],
            "--recipe: expected audioset-full, audioset-balanced, esc50, speechcommands, got",
        ),
        (["x", "--recipe", "esc50", "--mixup", "1.5"], "--mixup: 1.5 is out of range; expected a number in [0, 1]"),
        (["x", "--mean", "1"], "--mean and --std: expected both or none, got one"),
        (["x", "--num-processes", "0"], "--num-processes: expected 1 or more, got 0"),
        (["x", "--num-processes", "2"], "--num-processes and --process-id: expected with --coordinator only"),
        (["x", "--architecture", "huge"], "--architecture: expected tiny, small, base or a config.json, got 'huge'"),
        (["x", "--init", "y", "--architecture", "tiny"], "--init: has its own architecture; leave out"),
        (["x", "--cross-validate", "--fold", "1"], "--fold: every fold of DATA is held out once"),
        (["x", "--recipe", "esc50", "--validation-data", "y"], "as the recipe wants it; add --no-cross-validate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_of_finetune_is_one_line(arguments, message, tmp_path):
    done = in_process("finetune", *arguments, "--output", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_resume_rejects_training_settings(tmp_path):
    """A run keeps its settings; only epochs, execution and the path of the data may change."""
    config = ast_jax.PRESETS["tiny"](num_labels=2, id2label=("a", "b"), problem_type="single_label_classification")
    run = run_folder.RunConfig(
        DatasetConfig(tmp_path / "gone"), config, ast_jax.FrontendConfig(), TrainConfig(), {"trained_from": "scratch"}
    )
    (tmp_path / "run.json").write_text(run.to_json())
    done = in_process("resume", tmp_path, "--epochs", "40", "--parallel", "jit", "--workers", "2")
    assert done.returncode == 1
    assert done.stderr == f"ast-jax: {tmp_path}: stopped before anything was saved; start it again in a new folder\n"
    for option in ("--learning-rate", "--init", "--fold", "--recipe", "--max-length", "--mixup", "--output"):
        done = in_process("resume", tmp_path, option, "1")
        assert done.returncode == 2
        assert f"No such option: {option}" in done.stderr
    done = in_process("resume", tmp_path, "--test-data", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("ast-jax: --test-data: expected the new path of a source of this run")
    done = in_process("resume", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr == f"ast-jax: {tmp_path / 'nothing'}: expected a run folder to resume, found no run.json in it\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "config.json: expected a JSON object, got list"),
        ("{", "config.json: expected a JSON file"),
        ('{"hidden_size": "wide"}', "config.json: hidden_size: expected an integer, got 'wide'"),
    ],
)
def test_an_invalid_architecture_is_one_line(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    done = in_process("finetune", "x", "--output", "run", "--architecture", "config.json", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"ast-jax: {message}")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_file_names_that_cannot_be_encoded(encoding, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/a\nb\xff\xc3\xbc.wav")
    shown = f"{tmp_path}/a\\nb\\udcff" + {"utf-8": "ü", "ascii": "\\xfc"}[encoding] + ".wav"
    pathlib.Path(name).write_bytes((SOUNDS / "speech.flac").read_bytes())
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = ast_cli("classify", name, name + "x", "-k", "1", encoding=encoding, **environment)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == f"{shown}  (5.00 s in 3 windows of 2.58 s every 1.29 s; their mean)"
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == f"ast-jax: {shown}x: no such file\n"
    done = ast_cli("classify", name, "--json", encoding=encoding, **environment)
    assert json.loads(done.stdout)["file"] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.wav", "--model", "no-such-model"], "no-such-model: expected a shipped model (sounds-tiny)"),
        (["info", "no-such-model"], "no-such-model: expected a shipped model (sounds-tiny)"),
        (["convert", "no-such-folder", "out"], "no-such-folder: expected a shipped model"),
        (["finetune", "no-such-data", "--output", "run"], "no-such-data: no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(arguments, message, tmp_path):
    done = ast_cli(*arguments, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


OTHERS = {  # a value other than the default for every setting
    "batch_size": 12, "grad_accum_steps": 2, "epochs": 3, "patience": 2, "optimizer": "adamw", "learning_rate": 1e-3,
    "schedule": "cosine", "warmup_steps": 50, "warmup_hold": 5, "decay_start": 2, "decay_step": 3, "decay_factor": 0.3,
    "layer_decay": 0.8, "head_multiplier": 10.0, "freeze_layers": 1, "linear_probe": False, "weight_decay": 1e-4,
    "max_grad_norm": 1.0, "beta1": 0.9, "beta2": 0.99, "balanced_sampling": True, "mixup": 0.25,
    "frequency_mask": 7, "time_mask": 9,
    "frequency_shift": 2, "time_shift": 4, "noise": True, "ramp_epochs": 1.5, "patchout_frequency": 1,
    "patchout_time": 2, "patchout": 3, "label_smoothing": 0.1, "teacher_weight": 0.75, "ema_decay": 0.9,
    "average_from": 2, "rematerialize": True, "dtype": "bfloat16", "strict": True, "seed": 11,
}  # fmt: skip


def as_options(settings):
    """Return settings as command-line arguments."""
    for name, value in settings.items():
        option = name.replace("_", "-")
        yield from (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )


@pytest.fixture
def asked(monkeypatch):
    """Records the arguments that the command line passes to the library."""
    seen = {}

    def start_run(data, output, init, plan, execution, metrics, log):
        seen.update(data=data, output=output, init=init, plan=plan, execution=execution)
        output.mkdir()
        (output / "results.json").write_text('{"best": {"epoch": 1}}')
        return run_folder.Run(output)

    monkeypatch.setattr(finetune, "start_run", start_run)
    monkeypatch.setattr(crossval, "cross_validate", lambda *arguments, **others: seen.update(folds=(arguments, others)))
    return seen


def test_finetune_passes_every_option_on(asked, tmp_path):
    """All but the multi-host options, which have tests of their own."""
    command = ["finetune", "data", "-o", tmp_path / "run", "--init", "sounds-tiny", "--teacher", "t.stablehlo"]
    command += ["--problem-type", "multi_label_classification", "--max-length", "128", "--mean", "-5", "--std", "4"]
    command += ["--validation-data", "v", "--test-data", "t", "--labels", "l.csv", "--fold", "3", "--keep-epochs"]
    command += ["--parallel", "jit", "--workers", "3", "--save-minutes", "2.5", *as_options(OTHERS)]
    done = in_process(*command)
    assert done.returncode == 0, done.stderr
    plan = asked["plan"]
    assert plan.training == TrainConfig(**OTHERS)
    assert asked["output"] == tmp_path / "run"
    assert (plan.teacher, plan.problem_type) == ("t.stablehlo", "multi_label_classification")
    assert asked["init"].config == ast_jax.load("sounds-tiny").config.replace(max_length=128)
    assert plan.statistics == (-5, 4)
    assert asked["data"] == DatasetConfig("data", validation="v", test="t", label_file="l.csv", fold="3")
    assert plan.keep_epochs
    assert asked["execution"] == ExecutionConfig("jit", 3, 2.5)
    same = {name for name, value in OTHERS.items() if getattr(TrainConfig(), name) == value}
    assert same == {"linear_probe"}  # which excludes freeze_layers
    assert OTHERS.keys() == vars(TrainConfig()).keys()


def test_linear_probe_reaches_the_library(asked, tmp_path):
    done = in_process("finetune", "data", "-o", tmp_path / "run", "--linear-probe")
    assert done.returncode == 0, done.stderr
    assert asked["plan"].training == TrainConfig(linear_probe=True)
    assert asked["plan"].architecture == ast_jax.PRESETS["tiny"]()
    assert asked["execution"] == ExecutionConfig(num_workers=None)
    assert done.stdout == f"the best: epoch 1\ncheckpoint: {tmp_path / 'run' / 'best'}\n"


def test_a_recipe_is_printed_and_can_be_overridden(asked, tmp_path):
    options = ["--recipe", "speechcommands", "--epochs", "3", "--no-noise"]
    done = in_process("finetune", "data", "-o", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split(maxsplit=1)) for line in done.stdout.splitlines()}
    assert {("epochs", "3 (recipe: 30)"), ("noise", "False (recipe: True)"), ("learning_rate", "0.00025")} <= lines
    recipe, plan = recipes.RECIPES["speechcommands"], asked["plan"]
    assert plan.training == recipe.settings(epochs=3, noise=False)
    assert plan.statistics == (-6.845978, 5.5654526)
    assert plan.architecture.max_length == 128
    assert plan.problem_type == "multi_label_classification"
    assert plan.recipe == "speechcommands"


@pytest.mark.parametrize(("init", "rate"), [(None, 1e-4), ("sounds-tiny", 1e-5)])
def test_esc50_recipe_cross_validates_with_the_learning_rate_of_its_init(init, rate, asked, tmp_path):
    command = ["finetune", "data", "-o", tmp_path / "run", "--recipe", "esc50", *(["--init", init] if init else [])]
    done = in_process(*command)
    assert done.returncode == 0, done.stderr
    (data, output), others = asked["folds"]
    assert (data, output) == (DatasetConfig("data"), tmp_path / "run")
    assert others["training"] == recipes.RECIPES["esc50"].settings(learning_rate=rate)
    assert others["recipe"] == "esc50"
    assert (others["init"] is None) == (init is None)
    done = in_process(*command, "--fold", "2")
    assert done.returncode == 0, done.stderr
    assert asked["data"].fold == "2"  # one fold alone is a run of its own


def test_out_of_memory_is_one_line(monkeypatch, tmp_path):
    def start(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    monkeypatch.setattr(finetune, "finetune", start)
    done = typer.testing.CliRunner().invoke(main.app, ["finetune", "data", "-o", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "ast-jax: the device is out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; "
        "try a smaller --batch-size or model"
    ]


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "ast_jax.cli.main", "classify", *[str(SOUNDS / "speech.flac")] * 20]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == common.EXIT_PIPE


def test_labels_print_as_one_line(tmp_path):
    model = ast_jax.load("sounds-tiny")
    labels = ("a\n  0.999  b", *model.config.labels[1:])
    ast_jax.save(tmp_path / "model", model.replace(config=model.config.replace(id2label=labels)))
    done = in_process("classify", SOUNDS / "speech.flac", "--model", tmp_path / "model", "-k", str(len(labels)))
    assert len(done.stdout.splitlines()) == 1 + len(labels) + 1
    assert "a\\n  0.999  b" in done.stdout


def test_hub_id_from_the_cache(tmp_path):
    """A snapshot in the cache of huggingface_hub, created by hand, is loaded without a network."""
    torch_models.saved_model(tmp_path / "made", "stride-10-10", num_hidden_layers=1)
    repository = tmp_path / "hub" / "models--someone--ast-small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    shutil.copytree(tmp_path / "made", repository / "snapshots" / "0123456789abcdef")
    done = ast_cli("info", "someone/ast-small", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("someone/ast-small: ")
    assert "1 layers" in done.stdout


def test_hub_id_without_a_network_is_one_line(tmp_path):
    done = ast_cli("info", "MIT/ast-finetuned-audioset-10-10-0.4593", HF_HUB_OFFLINE="1", HF_HOME=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "the Hugging Face Hub cannot be reached" in done.stderr


def test_convert_info_and_classify_a_hugging_face_folder(tmp_path):
    torch_models.saved_model(tmp_path / "hf", "stride-16-16", max_length=128, num_hidden_layers=1)
    done = in_process("convert", tmp_path / "hf", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'}: 509,383 parameters, 7 labels",
        "  hf: Hugging Face, float32",
        "  tensors: 27 used, 0 ignored",
    ]
    shown = in_process("info", tmp_path / "out")
    assert "1 layers, width 192, 3 heads" in shown.stdout
    assert "LABEL_0; LABEL_1" in shown.stdout
    assert json.loads(in_process("info", tmp_path / "out", "--json").stdout)["config"]["problem_type"] == (
        "single_label_classification"
    )
    by_folder = [
        in_process("classify", SOUNDS / "speech.flac", "--model", tmp_path / name, "--json", "-k", "7")
        for name in ("hf", "out")
    ]
    assert by_folder[0].returncode == 0, by_folder[0].stderr
    assert by_folder[0].stdout == by_folder[1].stdout
    scores = [entry["score"] for entry in json.loads(by_folder[0].stdout)["predictions"]]
    assert sum(scores) == pytest.approx(1, abs=1e-5)  # single-label: softmax
    assert scores == sorted(scores, reverse=True)


def test_convert_to_another_input_and_other_labels(tmp_path):
    """Every option of `resize` and its line in the report, from a checkpoint folder as from the source."""
    torch_models.saved_model(tmp_path / "hf", "stride-10-10", num_hidden_layers=1)
    (tmp_path / "names.txt").write_text("rain\nwind\n")
    options = ["--max-length", "200", "--num-mel-bins", "64", "--frequency-stride", "12", "--time-stride", "16",
               "--labels", tmp_path / "names.txt", "--mean", "-5.5", "--std", "4.25"]  # fmt: skip
    done = in_process("convert", tmp_path / "hf", tmp_path / "direct", *options)
    assert done.returncode == 0, done.stderr
    changed = [line for line in done.stdout.splitlines() if line.startswith("  changed: ")]
    assert changed == [
        "  changed: input 128 bins x 128 frames at strides 10, 10 to 64 x 200 at 12, 16: position grid 12x12 to 5x12 "
        "(frequency cropped, time unchanged)",
        "  changed: classifier of 2 labels: initialised, untrained",
    ]
    assert "mean -5.5 and std 4.25: as given, the source has mean -4.26774 and std 4.569" in done.stdout
    checkpoint = ast_jax.load(tmp_path / "direct")
    config, frontend = checkpoint.config, checkpoint.frontend
    assert (config.max_length, config.num_mel_bins, config.frequency_stride, config.time_stride) == (200, 64, 12, 16)
    assert config.labels == ("rain", "wind")
    assert (frontend.max_length, frontend.num_mel_bins, frontend.mean, frontend.std) == (200, 64, -5.5, 4.25)
    assert in_process("convert", tmp_path / "hf", tmp_path / "ours").returncode == 0
    done = in_process("convert", tmp_path / "ours", tmp_path / "later", *options)
    told = [*changed, "  changed: normalisation from mean -4.26774, std 4.569 to -5.5, 4.25"]
    assert done.stdout.splitlines()[1:] == told  # earlier changes are not reported again
    later = ast_jax.load(tmp_path / "later")
    assert (later.config, later.frontend) == (config, frontend)
    for path, leaf in flatten_dict(later.params, sep="/").items():
        np.testing.assert_array_equal(leaf, flatten_dict(checkpoint.params, sep="/")[path])


def test_convert_names_the_option_for_a_setting_that_shapes_do_not_determine(tmp_path):
    model = torch_original.OriginalAST(label_dim=2, input_tdim=100, depth=1)  # 100 frames are not a multiple of 128
    torch.save(model.state_dict(), tmp_path / "own.pth")
    done = in_process("convert", tmp_path / "own.pth", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "108 patches; with 128 mel bins possible: 10 10 with 96 to 105 frames" in done.stderr
    assert "give them to `ast-jax convert`: --source-strides, --source-max-length" in done.stderr
    assert not (tmp_path / "out").exists()
    said = ["--source-strides", "10", "10", "--source-max-length", "100"]
    assert in_process("convert", tmp_path / "own.pth", tmp_path / "out", *said).returncode == 0
    assert ast_jax.load(tmp_path / "out").config.max_length == 100
    done = in_process("convert", tmp_path / "out", tmp_path / "again", *said)
    assert done.returncode == 1
    assert "a checkpoint of ast_jax contains its strides, input size and heads" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sounds-tiny", "out", "--max-length", "16", "--time-stride", "0"], None),
        (["sounds-tiny", "out", "--labels", "none.txt"], "none.txt"),
        (["sounds-tiny", "out", "--num-labels", "3", "--labels", "two.txt"], "num_labels: expected 2, the number of"),
        (["sounds-tiny", "out", "--to", "huggingface"], "transformers has square patches only"),
        (["sounds-tiny", "out", "--to", "original"], "expected a name that ends in .pth"),
        (["sounds-tiny", "out.pth", "--to", "original"], "the model has width 128 with 2 heads"),
        (["two.txt", "out"], "two.txt: expected a state dict that torch.save wrote, got a damaged or another file"),
        (["sounds-tiny", "out", "--std", "0"], "std: expected a positive number, got 0.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_errors_are_one_line_and_leave_no_files(arguments, message, tmp_path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    done = in_process("convert", *arguments, cwd=tmp_path)
    assert done.returncode == (1 if message else 2)
    if message:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]


def test_config_keys_are_restored_by_the_command_line(tmp_path):
    torch_models.saved_model(tmp_path / "hf", "stride-10-10", num_hidden_layers=1)
    want = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"our_own": [1], "problem_type": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(want))
    for source, target, kind in (
        ("hf", "direct", "huggingface"),
        ("hf", "ours", "ast-jax"),
        ("ours", "back", "huggingface"),
    ):
        assert in_process("convert", tmp_path / source, tmp_path / target, "--to", kind).returncode == 0
    assert ast_jax.load(tmp_path / "ours").config.problem_type == "single_label_classification"  # resolved
    for target in ("direct", "back"):
        got = json.loads((tmp_path / target / "config.json").read_text())
        assert {key: got.get(key, "missing") for key in want} == want


def test_given_statistics_are_reported(tmp_path):
    model = torch_original.OriginalAST(label_dim=2, input_tdim=128, depth=1)
    torch.save(model.state_dict(), tmp_path / "own_10_10_.pth")
    done = in_process("convert", tmp_path / "own_10_10_.pth", tmp_path / "a", "--mean", "-5", "--std", "3")
    assert "  note: features are normalised with mean -5 and std 3: as given" in done.stdout.splitlines()
    done = in_process("convert", tmp_path / "a", tmp_path / "b", "--std", "4")
    assert done.stdout.splitlines()[1:] == ["  changed: normalisation from mean -5, std 3 to -5, 4"]
    done = in_process("convert", tmp_path / "own_10_10_.pth", tmp_path / "c")
    assert "std 4.569: assumed, AudioSet's" in done.stdout
    # Assumptions are reported wherever the file is used.
    done = in_process("classify", SOUNDS / "telephone.flac", "--model", tmp_path / "own_10_10_.pth", "-k", "1")
    assert done.returncode == 0
    assert "own_10_10_.pth: features are normalised with mean -4.26774 and std 4.569: assumed, AudioSet" in done.stderr
    assert in_process("classify", SOUNDS / "telephone.flac", "--model", tmp_path / "c").stderr == ""


def test_a_headless_model_has_no_labels(tmp_path):
    torch.save(torch_original.deit_state(width=64, depth=1, heads=1, hw=14), tmp_path / "deit.pth")
    done = in_process("convert", tmp_path / "deit.pth", tmp_path / "out")
    assert done.stdout.splitlines()[0].endswith("parameters, no classifier")
    shown = in_process("info", tmp_path / "out").stdout
    assert "labels        no classifier" in shown
    assert "note: ImageNet initialisation" in shown


def test_a_run_folder_as_a_model_names_its_checkpoint(tmp_path):
    ast_jax.save(tmp_path / "run" / "best", ast_jax.load("sounds-tiny"))
    done = in_process("classify", SOUNDS / "speech.flac", "--model", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.endswith(f"found no config.json in it; the checkpoint of a run is {tmp_path / 'run' / 'best'}\n")


def test_version():
    done = ast_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"ast-jax {importlib.metadata.version('ast-jax')}\n")


def test_info_of_the_shipped_model():
    done = ast_cli("info", "sounds-tiny")
    assert done.returncode == 0, done.stderr
    assert "869,000 parameters" in done.stdout
    assert "multi_label_classification" in done.stdout


@pytest.mark.parametrize(
    "command",
    [[], ["classify"], ["embed"], ["explain"], ["convert"], ["export"], ["info"], ["finetune"], ["resume"]],
    ids=str,
)
def test_help_lists_the_options_and_imports_no_jax(command):
    done = ast_cli(*command, "--help", COLUMNS="200", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    for word in {
        "": (),
        "finetune": ("--recipe", "--mixup", "--init"),
        "resume": ("--epochs", "--workers"),
        "classify": ("--top-k", "--json", "--model", "--window", "--hop", "--pad", "--timeline", "--picture"),
        "embed": ("--layer", "--pool", "--per"),
        "explain": ("--label", "--cells", "--arrays"),
        "export": ("--platforms",),
        "convert": ("--to", "--verify", "--max-length", "--labels", "--source-strides"),
    }.get(command[0] if command else "", ()):
        assert word in done.stdout
    modules = imported(done)
    assert "typer" in modules
    heavy = {"jax", "flax", "numpy", "orbax", "optax", "grain", "sklearn", "soundfile", "librosa", "torch"}
    assert not heavy & modules


def test_help_of_finetune_is_not_truncated_in_a_narrow_terminal():
    text = ast_cli("finetune", "--help", COLUMNS="80").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    headings = ("Augmentation and targets:", "Execution:")
    for name in ("--cross-validate / --no-cross-validate", "--frequency-stride", "--validation-data", *headings):
        assert name in text
    flowing = " ".join(text.split())
    assert "audioset-balanced" in flowing
    for field in dataclasses.fields(TrainConfig):
        name = f"--{field.name.replace('_', '-')}"
        said = flowing[flowing.index(f"{name} ") if f"{name} " in flowing else flowing.index(f"{name},") :]
        default = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
        assert said[said.index("[default: ") :].startswith(f"[default: {default}]"), name


def test_help_names_every_command_in_a_line():
    text = ast_cli("--help", COLUMNS="80").stdout
    assert "..." not in text.split("Commands:")[1]


def test_classify_takes_folders_and_writes_tables(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        shutil.copy(SOUNDS / "siren.flac", tmp_path / "sounds" / name / "siren.flac")
    (tmp_path / "sounds" / "a" / "bad.wav").write_text("no sound")
    (tmp_path / "sounds" / "a" / "notes.txt").write_text("no sound, and not called one")
    order = ["a/bad.wav", "a/siren.flac", "b/siren.flac"]
    files = [str(tmp_path / "sounds" / name) for name in order] + [str(SOUNDS / "speech.flac")]

    done = in_process(
        "classify", tmp_path / "sounds", SOUNDS / "speech.flac", "-k", "2", "--output", tmp_path / "out.csv"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "bad.wav: not a readable sound file" in done.stderr
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == files
    assert list(rows[0]) == [
        "file", "duration_seconds", "windows", "error", "label_1", "score_1", "label_2", "score_2",
    ]  # fmt: skip
    assert [row["windows"] for row in rows] == ["", "1", "1", "3"]
    assert "not a readable sound file" in rows[0]["error"]
    assert rows[1]["label_1"] in {"Siren", "Alarm"}
    assert rows[1]["label_2"] != rows[1]["label_1"]
    assert {**rows[2], "file": ""} == {**rows[1], "file": ""}
    assert rows[3]["label_1"] == "Speech"

    done = in_process("classify", *files, "-k", "2", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file"] for line in lines] == files
    assert lines[0]["error"] == rows[0]["error"]
    for line, row in zip(lines[1:], rows[1:], strict=True):
        assert line["predictions"][0] == {"label": row["label_1"], "score": float(row["score_1"])}


def test_classify_writes_tables_atomically(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, status, message in (
        ([tmp_path / "empty", "-o", tmp_path / "out.csv"], 1, "expected a folder with sound files, found none"),
        (
            [SOUNDS / "siren.flac", "-o", tmp_path / "out.txt"],
            2,
            "--output: expected a name that ends in .csv or .jsonl",
        ),
        ([SOUNDS / "siren.flac", "--json", "-o", tmp_path / "out.csv"], 2, "expected one of them"),
        ([SOUNDS / "siren.flac", "-o", tmp_path / "none" / "out.csv"], 1, "out.csv: no such folder"),
    ):
        done = in_process("classify", *arguments)
        assert done.returncode == status
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    done = in_process("classify", tmp_path / "empty", SOUNDS / "siren.flac", "-k", "1")
    assert done.returncode == 1
    assert "expected a folder with sound files, found none" in done.stderr
    assert "Alarm" in done.stdout, "a bad folder does not lose the others' results"


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    def run(home, *options):
        """Run in a new home; return the programs kept there."""
        command = ["-m", "ast_jax.cli.main", *options, "classify", str(SOUNDS / "siren.flac"), "-k", "1"]
        assert "Alarm" in python(home, *command)
        return programs(home)

    def python(home, *arguments):
        """Run without what the tests' own cache sets."""
        ours = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"}
        environment = {name: value for name, value in os.environ.items() if name not in ours} | {"HOME": str(home)}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def programs(home):
        return {path: path.stat().st_mtime_ns for path in pathlib.Path(home).rglob("*-cache")}

    (tmp_path / "home").mkdir()
    assert run(tmp_path / "home", "--no-program-cache") == {}
    kept = run(tmp_path / "home")
    assert kept
    assert run(tmp_path / "home") == kept
    code = (
        "from ast_jax.cli.common import enable_compilation_cache; enable_compilation_cache()\n"
        "import jax; jax.jit(lambda x: x + 1)(1.0)"
    )
    python(tmp_path / "home", "-c", code)
    assert len(programs(tmp_path / "home")) > len(kept)  # one that compiles in no time, too
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == {}
