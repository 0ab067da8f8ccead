"""`finetune` on generated sounds, end to end: it learns, survives a kill, and refuses what it cannot use."""

import csv
import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import soundfile
import torch
import torch_original
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax.checkpoints.folder import restore_numpy
from ast_jax.config import FrontendConfig
from ast_jax.data import audit, datasets
from ast_jax.data.datasets import DatasetConfig
from ast_jax.runtime import tables
from ast_jax.runtime.files import exclusive_lock
from ast_jax.runtime.signals import Terminated, defer_signals
from ast_jax.training import evaluate, extras, finetune, input_pipeline, metrics, plots, run_folder, states, trainer
from ast_jax.training.config import ExecutionConfig, TrainConfig
from ast_jax.training.parallel import DataParallel

TINY = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_length=48, num_mel_bins=32,
    frequency_stride=16, time_stride=16,
)  # fmt: skip
SETTINGS = TrainConfig(
    batch_size=16,
    epochs=3,
    learning_rate=3e-3,
    mixup=0.5,
    time_mask=6,
    frequency_mask=4,
    frequency_shift=2,
    time_shift=4,
    noise=True,
    ramp_epochs=1.0,
    ema_decay=0.8,
)
TONES = {"low": 300.0, "high": 2500.0, "hiss": 0.0}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_sounds(root, seed, count):
    """Write short sounds of three classes, a folder each."""
    rng = np.random.default_rng(seed)
    for name, frequency in TONES.items():
        (root / name).mkdir()
        for index in range(count):
            time_axis = np.arange(rng.integers(4000, 7900)) / 16000
            sound = 0.3 * rng.standard_normal(len(time_axis)) if not frequency else np.zeros(len(time_axis))
            sound += 0.3 * np.sin(2 * np.pi * frequency * rng.uniform(0.8, 1.2) * time_axis) * bool(frequency)
            soundfile.write(root / name / f"{index}.wav", sound, 16000)
    return root


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three classes of 30 short sounds."""
    return write_sounds(tmp_path_factory.mktemp("sounds"), 0, 30)


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    said, rows = [], []
    done = finetune.finetune(sounds, folder, training=SETTINGS, architecture=TINY, metrics=rows.append, log=said.append)
    return folder, ast_jax.load(done.best), said, rows


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


FILES = {
    "best", "confusion.png", "curves.png", "metrics.csv", "metrics.json", "results.json", "run.json", "states",
    "tensorboard",
}  # fmt: skip


def states_of(folder):
    return sorted(int(path.name) for path in (folder / "states").iterdir())


def test_run_folder(run):
    folder, best, said, _ = run
    rows = read_metrics(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    wanted = {
        "learning_rate",
        "validation_loss",
        "accuracy",
        "mAP",
        "mAUC",
        "d_prime",
        "cumulative_accuracy",
        "seconds",
    }
    assert wanted <= rows[0].keys()
    assert {path.name for path in folder.iterdir()} == FILES
    assert best.config.labels == ("high", "hiss", "low")
    assert best.config.problem_type == "single_label_classification"
    accuracies = [float(row["accuracy"]) for row in rows]
    assert best.metadata["epoch"]["accuracy"] == max(accuracies)
    assert any("81 training examples, 9 for validation" in line for line in said)
    assert best.frontend.mean != FrontendConfig().mean  # measured on the data
    best_epoch = accuracies.index(max(accuracies)) + 1
    assert states_of(folder) == sorted({6 * best_epoch, 18})  # five steps and the epoch's end: the best and the last


def test_metrics_are_the_same_in_every_form(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folder, _, said, _ = run
    rows, told = read_metrics(folder), json.loads((folder / "metrics.json").read_text())
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for name in ("train_loss", "accuracy", "learning_rate"):
        values = [float(row[name]) for row in rows]
        assert [row[name] for row in told] == values
        events = board.Tensors(name)
        assert [event.step for event in events] == [1, 2, 3]
        stored = [float(make_ndarray(event.tensor_proto)) for event in events]
        np.testing.assert_allclose(stored, values, rtol=1e-6)  # as float32
        assert any(line.startswith("epoch 1, ") and f"{name} {values[0]:.4g}" in line for line in said)
    results = json.loads((folder / "results.json").read_text())
    assert results["last"] == told[-1]
    assert results["validation"]["best"]["metrics"]["accuracy"] == results["best"]["accuracy"]
    assert sum(map(sum, results["validation"]["best"]["confusion"])) == 9


def test_a_run_learns_more_than_its_examples(run, tmp_path):
    """Of 60 new sounds a model that guesses gets 36 right once in 48,000 times; 15 steps with augmentation reach 40."""
    evaluation = ast_jax.evaluate(ast_jax.Run(run[0]), write_sounds(tmp_path, 1, 20), split="all", batch_size=16)
    assert evaluation.examples == 60
    assert evaluation.reports[str(run[0])]["metrics"]["accuracy"] >= 0.6


def test_checkpoint_classifies(run, sounds):
    folder, best, _, _ = run
    names = [str(sounds / name / "3.wav") for name in TONES]
    predictions = ast_jax.classify(names, folder / "best", top_k=3)
    for prediction in predictions:
        assert abs(sum(score for _, score in prediction) - 1) < 1e-5
    validation = datasets.read_dataset(sounds).splits["validation"]
    logits, labels = evaluate.predict(best, validation, batch_size=8).measured()
    assert logits.shape == labels.shape == (9, 3)
    # Both compute features and model on the device, in float32 and in batches of other sizes.
    example = datasets.read_dataset(sounds).splits["validation"][4]
    scores = dict(ast_jax.classify(example.path, best, top_k=3))
    want = np.exp(logits[4] - logits[4].max())
    np.testing.assert_allclose([scores[name] for name in best.config.labels], want / want.sum(), atol=1e-5)


def test_same_seed_same_run(run, sounds, tmp_path):
    _, best, _, _ = run
    again = ast_jax.load(
        finetune.finetune(sounds, tmp_path / "again", training=SETTINGS, architecture=TINY, log=lambda _: None).best
    )
    for path, leaf in flatten_dict(again.params, sep="/").items():
        np.testing.assert_array_equal(leaf, flatten_dict(best.params, sep="/")[path])


@pytest.mark.slow
def test_averages_over_epochs(sounds, tmp_path):
    """Of the weights from an epoch on, and of the scores so far: recomputed from the epochs' own checkpoints."""
    folder = tmp_path / "run"
    settings = dataclasses.replace(SETTINGS, average_from=2)
    finetune.finetune(sounds, folder, training=settings, architecture=TINY, keep_epochs=True, log=lambda _: None)
    epochs = [ast_jax.load(folder / "epochs" / f"{number:04d}") for number in (1, 2, 3)]
    average = ast_jax.load(folder / "average")
    for name, leaf in flatten_dict(average.params, sep="/").items():
        want = np.mean([flatten_dict(one.params, sep="/")[name] for one in epochs[1:]], axis=0)
        np.testing.assert_allclose(leaf, want, atol=1e-6, err_msg=name)  # float32, in another order
    assert average.metadata["epoch"] == {"averaged_epochs": [2, 3]}
    examples = datasets.read_dataset(sounds).splits["validation"]
    found = [evaluate.predict(one, examples, 16) for one in epochs]
    for number, row in enumerate(read_metrics(folder), 1):
        scores = np.mean([metrics.scores(one.logits, TINY.replace(
            num_labels=3, problem_type="single_label_classification")) for one in found[:number]], axis=0)  # fmt: skip
        accuracy = (scores.argmax(1) == found[0].labels.argmax(1)).mean()
        assert float(row["cumulative_accuracy"]) == pytest.approx(accuracy)
    results = json.loads((folder / "results.json").read_text())
    whole = evaluate.predict(average, examples, 16)
    assert results["validation"]["average"]["metrics"]["accuracy"] == pytest.approx(
        (whole.logits.argmax(1) == whole.labels.argmax(1)).mean()
    )
    assert (
        ast_jax.load(folder / "epochs" / "0003").metadata["epoch"]
        == json.loads((folder / "metrics.json").read_text())[2]
    )


def test_patience_ends_a_run_that_gets_no_better(sounds, tmp_path, no_compiling):
    settings = TrainConfig(batch_size=40, epochs=9, patience=2)
    finetune.finetune(sounds, tmp_path / "run", training=settings, architecture=TINY, log=lambda _: None)
    assert len(read_metrics(tmp_path / "run")) == 3  # the first was as good as any
    said = []
    finetune.resume(tmp_path / "run", log=said.append)
    assert "the run is finished" in said[0]


def test_metrics_go_to_the_callback_and_the_run(run):
    """Row by row as the epochs end, as the run folder has them later."""
    folder, _, _, rows = run
    done = ast_jax.Run(folder)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in done.metrics]
    assert done.results["last"] == done.metrics[-1]
    assert done.best == folder / "best"
    assert done.config.training == SETTINGS
    with pytest.raises(ValueError, match="not written yet; continue the run"):
        ast_jax.Run(folder / "states").metrics  # noqa: B018 (it raises)


def test_more_epochs_are_those_of_a_longer_run(run, sounds, tmp_path):
    short = finetune.finetune(
        sounds, tmp_path / "run", training=SETTINGS.replace(epochs=2), architecture=TINY, log=lambda _: None
    )
    assert short.results["epochs"] == 2
    longer = finetune.resume(short.folder, epochs=3, log=lambda _: None)
    assert longer.results["epochs"] == 3
    assert longer.config.training == SETTINGS
    assert_same_state(short.folder, run[0])


@pytest.mark.parametrize(
    ("changes", "done", "epochs", "message"),
    [
        ({"schedule": "cosine"}, 3, 5, "its cosine schedule has ended: its learning rate is zero"),
        ({"schedule": "cosine"}, 1, 5, "its cosine schedule spans the epochs it was started with"),
        ({"schedule": "constant"}, 2, 1, "expected 2 or more, which are trained already, got 1"),
        ({"epochs": 9, "patience": 2}, 3, 12, r"early stopping \(patience 2\) has ended the run after epoch 3"),
    ],
)
def test_epochs_that_the_schedule_cannot_have(changes, done, epochs, message):
    training = TrainConfig(**{"epochs": 3, **changes})
    history = [{"epoch": epoch, "accuracy": 0.5} for epoch in range(1, done + 1)]
    record = states.Record(history=history, metric="accuracy")
    with pytest.raises(ValueError, match=message):
        finetune.with_epochs(training, record, epochs)
    assert finetune.with_epochs(training, record, training.epochs) is training


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def raise_killed(*_):
    raise Killed


@pytest.fixture(scope="module")
def killed_once(sounds, tmp_path_factory):
    """A run killed after the state of its first epoch was saved, before anything else, with scratch beside it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "save", raise_killed)
        with pytest.raises(Killed):
            finetune.finetune(sounds, folder, training=SETTINGS, architecture=TINY, log=lambda _: None)
    assert states_of(folder) == [6]
    assert {path.name for path in folder.iterdir()} == {"run.json", "states", "tensorboard"}
    (folder / ".best.abcdefgh" / "new").mkdir(parents=True)
    (folder / ".metrics.csv.abcdefgh").touch()
    (folder / "states" / "12.orbax-checkpoint-tmp").mkdir()
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    return shutil.copytree(killed_once, tmp_path / "killed")


@pytest.fixture
def no_compiling(monkeypatch):
    """Steps that change nothing, where only what happens around them counts."""
    monkeypatch.setattr(DataParallel, "compile_train_step", lambda *_: lambda state, batch: (state, np.float32(1)))
    monkeypatch.setattr(DataParallel, "compile_eval_step", lambda *_: lambda params, batch: batch["waveform"][:, :3])
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    monkeypatch.setattr(plots, "confusion", lambda *_: None)


def assert_same_state(folder, other):
    """Bit for bit, whatever way led there."""
    ours, theirs = (restore_numpy(states.newest_state(one) / "arrays") for one in (folder, other))
    assert ours.keys() == theirs.keys()
    for key, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[key])
    without_time = [[{**row, "seconds": 0} for row in read_metrics(which)] for which in (folder, other)]
    assert without_time[0] == without_time[1]
    best = [ast_jax.load(which / "best").metadata["epoch"]["epoch"] for which in (folder, other)]
    assert best[0] == best[1]


def test_resume_gives_the_uninterrupted_run(run, killed):
    folder, _, _, _ = run
    seen = []

    def stop_at_once(line):
        seen.append(line)
        if "training examples" in line:
            raise Killed

    with pytest.raises(Killed):
        finetune.resume(killed, log=stop_at_once)
    assert seen[0] == "resuming after epoch 1 of 3, step 5"
    assert {path.name for path in killed.iterdir()} == FILES - {"confusion.png", "curves.png", "results.json"}
    assert states_of(killed) == [6]
    assert [row["epoch"] for row in read_metrics(killed)] == ["1"]
    assert ast_jax.load(killed / "best").metadata["epoch"]["epoch"] == 1
    finetune.resume(killed, log=seen.append)
    assert {path.name for path in killed.iterdir()} == FILES
    assert_same_state(killed, folder)
    assert states_of(killed) == states_of(folder)


def test_best_stays_when_a_run_goes_on_within_an_epoch(sounds, tmp_path, monkeypatch):
    """The state's parameters are of the epoch under way then, and not the best epoch's."""
    take = trainer.Trainer._train_step

    def interrupt_at_step_8(self, batch):
        if self.record.step == 8:
            os.kill(os.getpid(), signal.SIGINT)
        take(self, batch)

    def stop(line):
        if "training examples" in line:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_train_step", interrupt_at_step_8)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(sounds, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)
    before = ast_jax.load(tmp_path / "run" / "best")
    assert states_of(tmp_path / "run") == [6, 10]  # steps and finished epochs
    with pytest.raises(Killed):
        finetune.resume(tmp_path / "run", log=stop)
    jax.tree.map(np.testing.assert_array_equal, ast_jax.load(tmp_path / "run" / "best").params, before.params)


@pytest.mark.parametrize(
    ("devices", "method"),
    [pytest.param(1, "pmap", marks=pytest.mark.slow), pytest.param(2, "jit", marks=pytest.mark.slow)],
)
def test_a_state_of_eight_devices_goes_on_with_fewer(killed, run, devices, method):
    """Saved and loaded as NumPy; sums over devices are in another order, so that the figures agree and not the bits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.jax, "devices", lambda: jax.local_devices()[:devices])
        best = ast_jax.load(
            finetune.resume(killed, execution=ExecutionConfig(parallel=method), log=lambda _: None).best
        )
    assert len(read_metrics(killed)) == 3
    losses = [[float(row["train_loss"]) for row in read_metrics(one)] for one in (killed, run[0])]
    np.testing.assert_allclose(*losses, rtol=1e-3)  # ten steps of Adam from float32 roundings
    assert best.config == run[1].config


@pytest.mark.parametrize("where", ["step", "validation", "saving", "best"])
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, Terminated), pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow)],
)
def test_signals_are_deferred_to_where_stopping_is_safe(
    where, number, error, sounds, tmp_path, monkeypatch, no_compiling
):
    """Whatever is under way when one comes is finished, a state is saved, and the run goes on from there."""
    module, name = {
        "step": (trainer.Trainer, "_train_step"), "validation": (input_pipeline, "eval_batches"),
        "saving": (states.States, "save"),
        "best": (run_folder, "save"),
    }[where]  # fmt: skip
    original, calls = getattr(module, name), []

    def interrupt_and_go_on(*arguments, **settings):
        calls.append(where)
        if len(calls) == 2 or where in ("validation", "best"):
            os.kill(os.getpid(), number)
        return original(*arguments, **settings)

    settings = TrainConfig(batch_size=40, epochs=3)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        patched.setattr(module, name, interrupt_and_go_on)
        with pytest.raises(error):
            finetune.finetune(sounds, tmp_path / "run", training=settings, architecture=TINY, log=lambda _: None)
    record = states.read_record(states.newest_state(tmp_path / "run"))
    stopped = {"step": (2, 0), "validation": (0, 0), "saving": (2, 1), "best": (2, 1)}[where]
    assert (record.step, len(record.history)) == stopped
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    finetune.resume(tmp_path / "run", log=lambda _: None)
    assert len(read_metrics(tmp_path / "run")) == 3


def test_a_second_signal_stops_at_once():
    with defer_signals() as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came() == signal.SIGINT
        with pytest.raises(Terminated) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


def test_resume_where_the_data_were_moved(killed, sounds, tmp_path, monkeypatch):
    settings = json.loads((killed / "run.json").read_text())
    gone = {**settings, "data": {"source": str(tmp_path / "gone")}}
    (killed / "run.json").write_text(json.dumps(gone))
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        finetune.resume(killed)
    for name in ("low", "high"):
        shutil.copytree(sounds / name, tmp_path / "two" / name)
    with pytest.raises(datasets.DataError, match="labels are no longer"):
        finetune.resume(killed, tmp_path / "two")
    shutil.copytree(sounds, tmp_path / "fewer", ignore=lambda folder, names: [n for n in names if n[0] == "1"])
    with pytest.raises(datasets.DataError, match="give it the data it was started with"):
        finetune.resume(killed, tmp_path / "fewer")
    assert json.loads((killed / "run.json").read_text()) == gone
    with pytest.raises(ValueError, match="test: expected the new path of a source of this run"):
        finetune.resume(killed, DatasetConfig(sounds, test=sounds))
    with pytest.raises(ValueError, match="fold: expected the new path"):
        finetune.resume(killed, DatasetConfig(sounds, fold="1"))
    monkeypatch.chdir(sounds.parent)
    monkeypatch.setattr(run_folder, "publish", raise_killed)
    with pytest.raises(Killed):
        finetune.resume(killed, sounds.name)
    assert json.loads((killed / "run.json").read_text()) == settings


def test_resume_where_the_test_data_were_moved(killed, sounds, tmp_path, monkeypatch):
    settings = json.loads((killed / "run.json").read_text())
    settings["data"]["test"] = str(tmp_path / "gone")
    (killed / "run.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        finetune.resume(killed)
    monkeypatch.setattr(run_folder, "publish", raise_killed)
    with pytest.raises(Killed):
        finetune.resume(killed, DatasetConfig(sounds, test=sounds))
    kept = json.loads((killed / "run.json").read_text())["data"]
    assert kept == {**settings["data"], "test": str(sounds)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"data": {"source": "x"}}'),
        ("run.json", '{"data": {"source": 3}, "metadata": {}, "teacher": null}'),
        ("states/18/record/metadata", ""),
        ("states/18/record/metadata", "3"),
        ("states/18/record/metadata", '{"step": "x"}'),
        ("states/18/record/metadata", '{"history": [{"train_loss": "x"}, {"train_loss": 1}]}'),
    ],
)
def test_damaged_run_folders_are_one_line(name, text, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    (copy / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{name}: expected the file as finetune wrote it, got a damaged file \(."
    ) as found:
        finetune.resume(copy)
    assert "\n" not in str(found.value)


def test_a_state_that_does_not_fit_is_one_line(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=r"states/18: expected what run\.json describes"):
        finetune.resume(copy)


def test_without_validation_it_says_what_chooses_the_best(sounds, tmp_path, no_compiling):
    manifest = tmp_path / "list.csv"
    rows = [[str(sounds / name / f"{index}.wav"), name, "train"] for name in TONES for index in range(6)]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    said = []
    settings = TrainConfig(batch_size=8, epochs=1)
    best = ast_jax.load(
        finetune.finetune(manifest, tmp_path / "run", training=settings, architecture=TINY, log=said.append).best
    )
    assert "no validation examples: the best epoch will be the one with the lowest training loss" in said
    assert set(best.metadata["epoch"]) == {"epoch", "learning_rate", "train_loss", "seconds"}


def test_the_kept_parameters_are_the_moving_average(run):
    folder, best, _, _ = run
    leaves = restore_numpy(states.newest_state(folder) / "arrays")
    last = len(read_metrics(folder)) == best.metadata["epoch"]["epoch"]
    state = folder / "states" / str(6 * best.metadata["epoch"]["epoch"])
    leaves = leaves if last else restore_numpy(state / "arrays")
    shape = best.params["classifier"]["dense"]["kernel"].shape
    kernels = [leaf for leaf in leaves.values() if leaf.shape == shape]
    assert len(kernels) == 4  # parameters, two moments, and their moving average
    equal = [bool((kernel == best.params["classifier"]["dense"]["kernel"]).all()) for kernel in kernels]
    assert sum(equal) == 1
    assert not equal[0]  # which is not what the optimizer works on


def test_a_validation_split_that_measures_nothing_says_what_chooses_the_best(sounds, tmp_path, no_compiling):
    """Every validation example has every label, so no average precision is defined: the lowest loss is the best."""
    names = list(TONES)
    rows = [[str(sounds / name / f"{index}.wav"), name, "train"] for name in names for index in range(6)]
    rows += [[str(sounds / names[0] / "6.wav"), ";".join(names), "validation"]]
    manifest = tmp_path / "list.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    said = []
    settings = TrainConfig(batch_size=8, epochs=2)
    best = ast_jax.load(
        finetune.finetune(manifest, tmp_path / "run", training=settings, architecture=TINY, log=said.append).best
    )
    assert sum("the best epoch will be the one with the lowest training loss" in line for line in said) == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert best.metadata["epoch"]["train_loss"] == min(losses)
    falling = [{"epoch": n, "train_loss": 1 / n, "mAP": math.nan, "mAUC": math.nan} for n in (1, 2)]
    metric = states.selection_metric({"mAP": math.nan, "mAUC": math.nan})
    assert metric == "train_loss"
    assert states.Record(history=falling, metric=metric).last_is_best
    assert not states.Record(history=falling[::-1], metric=metric).last_is_best


def test_a_run_folder_is_one_process_s(run, sounds, tmp_path):
    """A lock belongs to an open file, so that a second one in the same process is refused like another process's."""
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    with (
        exclusive_lock(copy),
        pytest.raises(ValueError, match="run: another process is using it; wait for it or stop it"),
    ):
        finetune.resume(copy, log=lambda _: None)
    assert ast_jax.load(finetune.resume(copy, log=lambda _: None).best).metadata == ast_jax.load(copy / "best").metadata
    (tmp_path / "new").mkdir()
    with exclusive_lock(tmp_path / "new"), pytest.raises(ValueError, match="new: another process is using it"):
        finetune.finetune(sounds, tmp_path / "new", training=TrainConfig(batch_size=8), architecture=TINY)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_init_keeps_body_and_matching_head(run, sounds, tmp_path):
    _, best, _, _ = run
    frozen = TrainConfig(batch_size=16, epochs=1, learning_rate=1e-12)
    same = ast_jax.load(
        finetune.finetune(sounds, tmp_path / "same", training=frozen, init=best, log=lambda _: None).best
    )
    np.testing.assert_allclose(
        same.params["classifier"]["dense"]["kernel"], best.params["classifier"]["dense"]["kernel"], atol=1e-6
    )  # a rate of 1e-12 moves nothing by more
    two = tmp_path / "two"
    for name in ("low", "high"):
        shutil.copytree(sounds / name, two / name)
    other = ast_jax.load(
        finetune.finetune(two, tmp_path / "other", training=frozen, init=best, log=lambda _: None).best
    )
    assert other.config.labels == ("high", "low")
    assert other.params["classifier"]["dense"]["kernel"].shape == (32, 2)
    np.testing.assert_allclose(other.params["layernorm"]["scale"], best.params["layernorm"]["scale"], atol=1e-6)
    assert other.frontend == best.frontend


@pytest.mark.slow
def test_several_labels_by_manifest(sounds, tmp_path, no_compiling):
    rows = [["path", "label", "split"]]
    for name in TONES:
        for index in range(12):
            label = f"{name};Beep, bleep" if index % 2 else name
            rows.append([str(sounds / name / f"{index}.wav"), label, ["train", "val", "test"][index % 3]])
    manifest = tmp_path / "list.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DataParallel, "compile_eval_step", lambda *_: lambda params, batch: batch["waveform"][:, :4])
        best = ast_jax.load(
            finetune.finetune(
                manifest,
                tmp_path / "run",
                training=TrainConfig(batch_size=8, epochs=1),
                architecture=TINY,
                log=lambda _: None,
            ).best
        )
    assert best.config.problem_type == "multi_label_classification"
    assert "mAP" in best.metadata["epoch"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["best"]["examples"] == 12
    assert (tmp_path / "run" / "classes.png").is_file()
    with pytest.raises(datasets.DataError, match="several labels"):
        finetune.finetune(
            manifest, tmp_path / "no", training=SETTINGS, architecture=TINY, problem_type="single_label_classification"
        )


def test_other_refusals(run, sounds, tmp_path):
    folder, _, _, _ = run
    with pytest.raises(ValueError, match="already holds a run"):
        finetune.finetune(sounds, folder, training=SETTINGS, architecture=TINY)
    with pytest.raises(ValueError, match="expected a run folder"):
        finetune.resume(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        datasets.read_dataset(tmp_path / "none")
    with pytest.raises(datasets.DataError, match="less than one batch of 800"):
        finetune.finetune(
            sounds, tmp_path / "big", training=TrainConfig(batch_size=800), architecture=TINY, log=lambda _: None
        )


def test_refused_starts_leave_nothing_and_other_things_stay(sounds, tmp_path):
    with pytest.raises(datasets.DataError):
        finetune.finetune(sounds, tmp_path / "big", training=TrainConfig(batch_size=800), architecture=TINY)
    assert not (tmp_path / "big").exists()
    (tmp_path / "state-of-the-art").mkdir()
    with pytest.raises(ValueError, match="new or empty folder"):
        finetune.finetune(sounds, tmp_path, training=SETTINGS, architecture=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["state-of-the-art"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".run.json.abcdefgh").touch()  # of a start that was killed
    with pytest.raises(datasets.DataError):
        finetune.finetune(sounds, tmp_path / "new", training=TrainConfig(batch_size=800), architecture=TINY)


def test_ignored_files_are_named_and_hidden_ones_skipped(sounds, tmp_path, no_compiling):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    (copy / "low" / "._0.wav").write_bytes(b"what macOS leaves")
    (copy / ".cache").mkdir()
    shutil.copy(copy / "low" / "0.wav", copy / ".cache" / "0.wav")
    (copy / "low" / "talk.m4a").touch()
    shutil.copy(copy / "low" / "0.wav", copy / "loose.wav")
    dataset = datasets.read_dataset(copy)
    assert dataset.ignored == (copy / "loose.wav", copy / "low" / "talk.m4a")
    assert sum(map(len, dataset.splits.values())) == 90
    said = []
    finetune.finetune(copy, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=said.append)
    assert f"ignored: 2 files that are no sound files of a class, the first is {copy / 'loose.wav'}" in said


def test_sounds_that_are_longer_than_the_input_are_counted(sounds, tmp_path, no_compiling):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    for number in range(2):
        soundfile.write(copy / "low" / f"long{number}.flac", np.full(16000, 0.1), 16000)
    said = []
    finetune.finetune(copy, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=said.append)
    assert "2 of 92 sounds are longer than the model's input: their first 0.49 s are used" in said


@pytest.fixture
def with_bad(sounds, tmp_path):
    """A copy with a file that is no sound, one that is too short, and one whose NaN shows when it is decoded."""
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    (copy / "high" / "7.wav").write_text("no sound")
    soundfile.write(copy / "low" / "8.wav", np.zeros(100), 16000)
    sound, _ = soundfile.read(copy / "hiss" / "5.wav")
    sound[10] = np.nan
    soundfile.write(copy / "hiss" / "5.wav", sound, 16000, subtype="FLOAT")
    return copy


def test_bad_files_are_skipped_counted_and_listed(with_bad, tmp_path, no_compiling):
    said = []
    settings = TrainConfig(batch_size=8, epochs=2)
    finetune.finetune(with_bad, tmp_path / "run", training=settings, architecture=TINY, log=said.append)
    (headers,) = [line for line in said if "cannot be used and will be skipped" in line]
    assert headers.startswith("2 of 90 files cannot be used and will be skipped, the first is ")
    with (tmp_path / "run" / "skipped.csv").open() as file:
        listed = {pathlib.Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert listed.keys() == {"7.wav", "8.wav", "5.wav"}
    assert "NaN or Inf" in listed["5.wav"]
    assert sum(line.startswith("skipped: ") for line in said) == 3


@pytest.mark.slow
def test_bad_sounds_of_other_splits_and_parts_of_files_are_listed_one_by_one(sounds, tmp_path, no_compiling):
    """By file and place; with `strict` they stop the run wherever they are."""
    soundfile.write(tmp_path / "long.wav", np.full(48000, 0.1), 16000)
    (tmp_path / "bad.wav").write_text("no sound")
    lines = ["path,label,split,start,end"]
    for name in TONES:
        lines += [f"{sounds / name / f'{index}.wav'},{name},{'train' if index < 8 else 'val'},," for index in range(10)]
    lines += [f"long.wav,low,train,{start},{start + 0.4}" for start in (4, 5, 6)]  # beyond its end
    lines += ["bad.wav,low,val,,", "bad.wav,high,test,,", f"{sounds / 'low' / '11.wav'},low,test,,"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    settings = TrainConfig(batch_size=8, epochs=3)
    finetune.finetune(tmp_path / "m.csv", tmp_path / "run", training=settings, architecture=TINY, log=lambda _: None)
    with (tmp_path / "run" / "skipped.csv").open() as file:
        listed = [pathlib.Path(row["path"]).name for row in csv.DictReader(file)]
    assert sorted(listed) == ["bad.wav", *(f"long.wav, {start} s to {start + 0.4:g} s" for start in (4, 5, 6))]
    lines = [line for line in lines if not line.startswith("long.wav")]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    settings = dataclasses.replace(settings, strict=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(audit, "check_headers", lambda *_, **__: audit.Headers(0, 0, []))
        with pytest.raises(datasets.DataError, match=r"bad\.wav: not a readable sound file"):
            finetune.finetune(
                tmp_path / "m.csv", tmp_path / "strict", training=settings, architecture=TINY, log=lambda _: None
            )


def test_metrics_that_come_and_go_do_not_spoil_a_run(tmp_path):
    history = [{"epoch": 1, "train_loss": 2.0, "mAP": 0.5}, {"epoch": 2, "train_loss": 1.0, "mAP": math.nan},
               {"epoch": 3, "train_loss": 0.5, "accuracy": 0.7, "mAP": 0.4}]  # fmt: skip
    record = states.Record(history=history, metric="mAP")
    assert record.best_row is history[0]  # by the metric that the first epoch chose, whatever others have
    assert not states.Record(history=history[:2], metric="mAP").last_is_best
    assert tables.csv_text(history).splitlines()[0] == "epoch,train_loss,mAP,accuracy"
    assert states.Record.from_json_dict(dataclasses.asdict(record)).best_row == history[0]


def test_best_is_mended_from_the_best_state(run, tmp_path):
    """As where a kill came between a state and the checkpoint that belongs to it."""
    copy = shutil.copytree(run[0], tmp_path / "run")
    for path in ("best", "results.json"):
        (shutil.rmtree if path == "best" else pathlib.Path.unlink)(copy / path)
    finetune.resume(copy, log=lambda _: None)
    jax.tree.map(np.testing.assert_array_equal, ast_jax.load(copy / "best").params, run[1].params)
    assert ast_jax.load(copy / "best").metadata == run[1].metadata


@pytest.mark.slow
def test_a_full_disk_in_the_first_epoch_leaves_something_to_go_on_with(sounds, tmp_path, no_compiling, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save", full)
        with pytest.raises(
            OSError, match=r"run: cannot be written \(No space left on device\); .* free some space and"
        ):
            finetune.finetune(
                sounds, tmp_path / "run", training=TrainConfig(epochs=2), architecture=TINY, log=lambda _: None
            )
    finetune.resume(tmp_path / "run", log=lambda _: None)
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_signal_after_the_last_epoch_stops_too(sounds, tmp_path, no_compiling, monkeypatch):
    """Of a cross-validation the next fold must not begin."""
    finish = trainer.Trainer._finish

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_finish", interrupt)
        with pytest.raises(Terminated):
            finetune.finetune(
                sounds, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=lambda _: None
            )
    finetune.resume(tmp_path / "run", log=lambda _: None)
    assert (tmp_path / "run" / "results.json").exists()


def test_strict_stops_at_bad_files(with_bad, tmp_path, no_compiling):
    strict = TrainConfig(batch_size=8, epochs=1, strict=True)
    with pytest.raises(
        datasets.DataError, match=r"2 of 90 files cannot be used, the first is .*7\.wav: not a readable"
    ):
        finetune.finetune(with_bad, tmp_path / "run", training=strict, architecture=TINY, log=lambda _: None)
    assert not (tmp_path / "run").exists()
    for name in ("high/7.wav", "low/8.wav"):
        (with_bad / name).unlink()
    with pytest.raises(datasets.DataError, match=r"5\.wav: 1 of \d+ samples are NaN or Inf; repair or remove it"):
        finetune.finetune(
            with_bad, tmp_path / "run", training=strict, architecture=TINY, statistics=(-7.0, 4.0), log=lambda _: None
        )
    assert list((tmp_path / "run").iterdir()) == []


def test_data_that_are_gone_are_told_from_a_few_bad_files(sounds, tmp_path, no_compiling, monkeypatch):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    monkeypatch.setattr(
        trainer.Trainer,
        "_train_epochs",
        lambda self, real=trainer.Trainer._train_epochs: (shutil.rmtree(copy), real(self)),
    )
    with pytest.raises(datasets.DataError, match=r"8 sounds in a row cannot be read, the last is .*; are they there\?"):
        finetune.finetune(
            copy, tmp_path / "run", training=TrainConfig(batch_size=8), architecture=TINY, log=lambda _: None
        )


def test_any_error_in_the_first_epoch_leaves_the_folder_free(sounds, tmp_path, no_compiling, monkeypatch):
    """The device's too, which are RuntimeErrors."""

    def exhausted(state, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(DataParallel, "compile_train_step", lambda *_: exhausted)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            finetune.finetune(sounds, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=print)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_start_killed_before_its_first_state_leaves_the_folder_free(run, sounds, tmp_path, no_compiling):
    (tmp_path / "run").mkdir()
    shutil.copy(run[0] / "run.json", tmp_path / "run")
    finetune.finetune(sounds, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=lambda _: None)
    assert (tmp_path / "run" / "best").is_dir()


def test_somebody_s_own_file_of_that_name_stays(run, sounds, tmp_path):
    for name, text in (("own", "{}"), ("beside", (run[0] / "run.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "beside" / "notes.txt").write_text("mine")
    for name in ("own", "beside"):
        before = {path.name: path.read_text() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            finetune.finetune(sounds, tmp_path / name, training=SETTINGS, architecture=TINY, log=lambda _: None)
        assert {path.name: path.read_text() for path in (tmp_path / name).iterdir()} == before


def test_a_run_that_came_while_the_data_were_read_is_left_alone(run, sounds, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real = audit.statistics

    def slow(*arguments, **settings):
        shutil.copytree(run[0], folder)
        return real(*arguments, **settings)

    monkeypatch.setattr(audit, "statistics", slow)
    with pytest.raises(ValueError, match="already holds a run"):
        finetune.finetune(sounds, folder, training=SETTINGS, architecture=TINY, log=lambda _: None)
    assert run_folder.read_run(folder) == run_folder.read_run(run[0])
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in run[0].iterdir())


def test_sounds_that_are_all_silent_are_refused(sounds, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            soundfile.write(tmp_path / name / f"{index}.wav", np.zeros(8000), 16000)
    with pytest.raises(datasets.DataError, match="are equal, as in silence"):
        finetune.finetune(tmp_path, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)


def test_a_loss_that_is_not_finite_names_the_step_and_its_files(sounds, tmp_path, monkeypatch, no_compiling):
    losses = iter([1.0] * 7 + [math.nan] * 30)
    monkeypatch.setattr(
        DataParallel, "compile_train_step", lambda *_: lambda state, batch: (state, np.float32(next(losses)))
    )
    with pytest.raises(FloatingPointError, match=r"not finite at step 7 \(epoch 2\), whose batch is ") as found:
        finetune.finetune(sounds, tmp_path / "run", training=SETTINGS, architecture=TINY, log=lambda _: None)
    dataset = datasets.read_dataset(sounds)
    frontend = FrontendConfig(max_length=48, num_mel_bins=32)
    batch = list(input_pipeline.train_batches(dataset.splits["train"], frontend, 3, SETTINGS))[7]
    named = [str(dataset.splits["train"][number].path) for number in batch["example"]]
    assert f"whose batch is {', '.join(named[:8])} and 8 more; " in str(found.value)
    assert states_of(tmp_path / "run") == [6]  # of epoch 1: the good one
    assert read_metrics(tmp_path / "run")[0]["train_loss"] == "1.0"


def test_parameters_that_are_not_finite_are_not_saved(sounds, tmp_path, no_compiling, monkeypatch):
    def spoil(tree):
        return tree.replace(params=jax.tree.map(lambda leaf: leaf[0] * np.nan, tree.params))

    monkeypatch.setattr(DataParallel, "unreplicate", staticmethod(spoil))
    with pytest.raises(FloatingPointError, match="the parameters are not finite after step 1;"):
        finetune.finetune(
            sounds, tmp_path / "run", training=TrainConfig(epochs=1), architecture=TINY, log=lambda _: None
        )
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_an_imagenet_start_takes_its_statistics_and_its_head_from_the_data(sounds, tmp_path):
    """A DeiT file through `load` at the length of the data, as `--init deit.pth --max-length 48` does it."""
    torch.save(torch_original.deit_state(width=64, depth=1, heads=1, hw=14), tmp_path / "deit.pth")
    size = {"max_length": 48, "num_mel_bins": 32}
    initial = ast_jax.load(tmp_path / "deit.pth", **size)
    settings = TrainConfig(batch_size=16, epochs=1, learning_rate=0.001)
    best = ast_jax.load(
        finetune.finetune(sounds, tmp_path / "run", training=settings, init=initial, log=lambda _: None).best
    )
    assert best.config.grid == (2, 4)
    assert best.config.labels == ("high", "hiss", "low")
    measured = audit.statistics(datasets.read_dataset(sounds).splits["train"], FrontendConfig(**size))[:2]
    np.testing.assert_allclose((best.frontend.mean, best.frontend.std), measured, atol=1e-4)  # four decimals are kept
    moved = (
        flatten_dict(best.params, sep="/")["embeddings/projection/kernel"]
        - initial.params["embeddings"]["projection"]["kernel"]
    )
    assert 0 < np.abs(moved).max() < 0.02  # five steps of Adam at 0.001 from there
    # Given statistics are kept.
    told = ast_jax.from_torch(tmp_path / "deit.pth", mean=-7.0, std=3.0, **size)
    said = []
    again = ast_jax.load(
        finetune.finetune(sounds, tmp_path / "told", training=settings, init=told, log=said.append).best
    )
    assert (again.frontend.mean, again.frontend.std) == (-7.0, 3.0)
    assert "the initial checkpoint: features are normalised with mean -7 and std 3: as given" in said
    again = ast_jax.load(
        finetune.finetune(sounds, tmp_path / "again", training=settings, init=best, log=lambda _: None).best
    )
    assert again.frontend == best.frontend  # and so are those of a model that was trained on audio


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": {"epochs": 2}}, r"training: expected TrainConfig\(\.\.\.\) or None, got \{'epochs': 2\}"),
        ({"architecture": "tiny"}, r"architecture: expected ASTConfig\(\.\.\.\) or None, got 'tiny'"),
        ({"execution": 3}, r"execution: expected ExecutionConfig\(\.\.\.\), got 3"),
        ({"problem_type": "x"}, "problem_type: expected one of single_label_classification, .*, or None, got 'x'"),
        ({"statistics": (1,)}, r"statistics: expected the pair \(mean, standard deviation\), got \(1,\)"),
        ({"metrics": 3}, "metrics: expected a function of one argument, got 3"),
        ({"init": "sounds-tiny", "architecture": TINY}, "init and architecture: expected one of them, got both"),
        ({"recipe": "imagenet"}, "recipe: expected audioset-full, .*, got 'imagenet'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_before_the_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ast_jax.finetune(tmp_path / "no data", tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_stands_for_its_folder(run, tmp_path):
    done = ast_jax.Run(str(run[0]))
    assert done.best == run[0] / "best"
    assert os.fspath(done) == str(run[0])
    with pytest.raises(ValueError, match=r"expected an integer, got '7'"):
        finetune.with_epochs(SETTINGS, states.Record(), "7")
    (tmp_path / "cross_validation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a cross-validation; continue it with ast_jax\.resume_cross_valid"):
        ast_jax.resume(tmp_path)
    with pytest.raises(ValueError, match=r"it is a single run: continue it with ast_jax\.resume"):
        ast_jax.resume_cross_validation(done)


def test_an_error_in_the_metrics_callback_ends_the_run_after_the_save(sounds, tmp_path, no_compiling):
    def fail(row):
        raise KeyError("tracker")

    with pytest.raises(KeyError, match="tracker"):
        finetune.finetune(
            sounds, tmp_path / "run", training=TrainConfig(epochs=2), architecture=TINY, metrics=fail,
            log=lambda _: None,
        )  # fmt: skip
    finetune.resume(tmp_path / "run", log=lambda _: None)
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == ["1", "2"]


def test_training_without_its_extra_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(extras.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ValueError, match=r"^training needs no-such-package; install with: pip install 'ast-jax\[tra"):
        ast_jax.finetune(tmp_path, tmp_path / "run")
