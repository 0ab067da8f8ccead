"""Cross-validation: a run a fold, all of them resumable, and a table whose figures are the runs' own."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile

import ast_jax
from ast_jax.cli.main import app
from ast_jax.data.datasets import DataError, DatasetConfig
from ast_jax.training import crossval, finetune, plots, run_folder, states
from ast_jax.training.config import TrainConfig
from ast_jax.training.parallel import DataParallel
from ast_jax.training.states import Record

TINY = ast_jax.ASTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=32, num_mel_bins=32,
    frequency_stride=16, time_stride=16,
)  # fmt: skip
SETTINGS = TrainConfig(batch_size=8, epochs=2)


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """A model that goes by loudness, and steps that change nothing."""
    monkeypatch.setattr(DataParallel, "compile_train_step", lambda *_: lambda state, batch: (state, np.float32(1)))
    monkeypatch.setattr(DataParallel, "compile_eval_step", lambda *_: lambda params, batch: batch["waveform"][:, :2])
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    monkeypatch.setattr(plots, "confusion", lambda *_: None)


@pytest.fixture
def folded(tmp_path):
    """Thirty sounds in three folds; in fold 2 the model is wrong once in five."""
    rows = [["path", "label", "fold"]]
    for index in range(30):
        fold, label = index % 3 + 1, index // 3 % 2
        wrong = fold == 2 and index < 6
        sound = np.zeros(4000)
        sound[(1 - label) if wrong else label :: 2] = 0.5
        soundfile.write(tmp_path / f"{index}.wav", sound, 16000, subtype="FLOAT")
        rows.append([f"{index}.wav", "ab"[label], str(fold)])
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_every_fold_is_validated_on_once_and_the_table_is_theirs(folded, tmp_path):
    said = []
    initial = ast_jax.load("sounds-tiny")
    rows = crossval.cross_validate(folded, tmp_path / "run", training=SETTINGS, init=initial, log=said.append).table
    assert [row["fold"] for row in rows] == ["1", "2", "3", "mean"]
    assert [row["last"] for row in rows[:3]] == [1.0, 0.8, 1.0]
    assert rows[3]["last"] == pytest.approx(2.8 / 3)
    assert {row["metric"] for row in rows} == {"accuracy"}
    for fold in "123":
        record = states.read_record(states.newest_state(tmp_path / "run" / f"fold-{fold}"))
        assert record.sizes == [20, 10]
        assert run_folder.read_run(tmp_path / "run" / f"fold-{fold}").data.fold == fold
    assert json.loads((tmp_path / "run" / "folds.json").read_text()) == rows
    with (tmp_path / "run" / "folds.csv").open() as file:
        assert [float(row["last"]) for row in csv.DictReader(file)] == [row["last"] for row in rows]
    assert [line for line in said if line.startswith("fold ")] == [f"fold {fold} ({fold} of 3)" for fold in "123"]
    assert said[-4].split() == ["1", "1.0000", "1.0000", "(epoch", "1)"]
    assert said[-1].split() == ["mean", "0.9333", "0.9333"]


@pytest.mark.slow
def test_it_goes_on_with_the_fold_that_was_stopped(folded, tmp_path, monkeypatch):
    publish, calls = run_folder.publish, []

    def stop_in_fold_2(run, folder, params, record):
        calls.append(folder.name)
        if calls.count("fold-2") == 1 and folder.name == "fold-2":
            raise KeyboardInterrupt
        publish(run, folder, params, record)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "publish", stop_in_fold_2)
        with pytest.raises(KeyboardInterrupt):
            crossval.cross_validate(folded, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)
    assert crossval.is_cross_validation(tmp_path / "run")
    assert list(crossval.CrossValidation(tmp_path / "run").folds) == ["1", "2"]
    assert crossval.CrossValidation(tmp_path / "run").folds["1"].config.training == SETTINGS
    assert not (tmp_path / "run" / "fold-3").exists()
    said = []
    rows = crossval.resume_cross_validation(tmp_path / "run", log=said.append).table
    assert [row["last"] for row in rows[:3]] == [1.0, 0.8, 1.0]
    assert "resuming after epoch 1 of 2, step 2" in said
    assert run_folder.read_run(tmp_path / "run" / "fold-3").config.hidden_size == TINY.hidden_size
    done = crossval.resume_cross_validation(tmp_path / "run", log=lambda _: None)
    assert done.table == rows  # all done: nothing but the table


@pytest.mark.slow
def test_paths_are_kept_from_wherever_it_was_started(folded, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("b\na\n")
    monkeypatch.chdir(tmp_path)
    data = DatasetConfig("manifest.csv", label_file="names.txt")
    crossval.cross_validate(data, "run", training=SETTINGS, architecture=TINY, log=print)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(crossval.resume_cross_validation(tmp_path / "run", log=lambda _: None).table) == 4
    assert ast_jax.load(tmp_path / "run" / "fold-1" / "best").config.labels == ("b", "a")
    (tmp_path / "names.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(FileNotFoundError, match="names"):
        crossval.resume_cross_validation(tmp_path / "run", log=lambda _: None)
    source = tmp_path / "manifest.csv"
    moved = DatasetConfig(source, label_file=tmp_path / "moved.txt")
    crossval.resume_cross_validation(tmp_path / "run", moved, log=lambda _: None)
    assert len(crossval.resume_cross_validation(tmp_path / "run", log=lambda _: None).table) == 4  # which is kept
    with pytest.raises(ValueError, match="validation: expected the new path of a source of this run"):
        crossval.resume_cross_validation(tmp_path / "run", DatasetConfig(source, validation=tmp_path))


@pytest.mark.slow
def test_more_epochs_for_every_fold(folded, tmp_path, capsys):
    """By the command line: the folds that are finished, and those that have not begun."""
    crossval.cross_validate(folded, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)
    shutil.rmtree(tmp_path / "run" / "fold-3")
    with pytest.raises(SystemExit) as stopped:
        app(["resume", str(tmp_path / "run"), "--epochs", "3", "--workers", "0"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "mean"
    whole = crossval.CrossValidation(tmp_path / "run")
    assert {fold: len(run.metrics) for fold, run in whole.folds.items()} == {"1": 3, "2": 3, "3": 3}
    assert {run.config.training.epochs for run in whole.folds.values()} == {3}
    with pytest.raises(SystemExit) as stopped:
        app(["resume", str(tmp_path / "run"), "--epochs", "2"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "ast-jax: epochs: expected 3 or more, which are trained already, got 2\n"


@pytest.mark.slow
def test_more_epochs_hold_for_every_fold_after_a_stop(folded, tmp_path):
    """The number is kept: it need not be given again."""
    crossval.cross_validate(folded, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)

    def stop_in_fold_2(line):
        if line == "fold 2 (2 of 3)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crossval.resume_cross_validation(tmp_path / "run", epochs=3, log=stop_in_fold_2)
    whole = crossval.resume_cross_validation(tmp_path / "run", log=lambda _: None)
    assert {fold: len(run.metrics) for fold, run in whole.folds.items()} == {"1": 3, "2": 3, "3": 3}


def test_a_start_that_fails_in_its_first_fold_leaves_the_folder_free(folded, tmp_path):
    big = TrainConfig(batch_size=800)
    with pytest.raises(DataError, match="less than one batch of 800"):
        crossval.cross_validate(folded, tmp_path / "run", training=big, init="sounds-tiny", log=lambda _: None)
    assert list((tmp_path / "run").iterdir()) == []


def test_table_of_last_and_best():
    records = {
        "1": [{"epoch": 1, "accuracy": 0.5}, {"epoch": 2, "accuracy": 0.9}, {"epoch": 3, "accuracy": 0.7}],
        "2": [{"epoch": 1, "accuracy": 0.6}],
    }
    records = {fold: Record(history=history, metric="accuracy") for fold, history in records.items()}
    rows = crossval.table(records)
    assert [(row["last"], row["best"], row["best_epoch"]) for row in rows[:2]] == [(0.7, 0.9, 2), (0.6, 0.6, 1)]
    assert (rows[2]["last"], rows[2]["best"]) == (pytest.approx(0.65), pytest.approx(0.75))
    assert crossval.table({}) == []


def test_refusals(folded, tmp_path):
    for name in "ab":
        (tmp_path / "unfolded" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "unfolded" / name / "1.wav", np.ones(4000) / 2, 16000)
    with pytest.raises(DataError, match="expected a data set with folds"):
        crossval.cross_validate(tmp_path / "unfolded", tmp_path / "run", training=SETTINGS, architecture=TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        crossval.cross_validate(folded, tmp_path / "full", training=SETTINGS, architecture=TINY)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / crossval.PLAN_FILE).write_text("{}")
    with pytest.raises(ValueError, match="expected the file as finetune wrote it"):
        crossval.resume_cross_validation(tmp_path / "bad")
    with pytest.raises(ValueError, match="holds a cross-validation; continue it with"):
        finetune.resume(tmp_path / "bad")
