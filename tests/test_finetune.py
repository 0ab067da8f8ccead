"""`finetune` on generated sounds, end to end: it learns, survives a kill, and refuses what it cannot use."""

import csv
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile
import torch
import torch_original

import ast_jax
from ast_jax import data, datasets, finetune, metrics, optimizers, survey, train
from ast_jax.checkpoint import flatten
from ast_jax.config import FrontendConfig
from ast_jax.files import sole_use
from ast_jax.parallel import DataParallel
from ast_jax.settings import TrainConfig

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
    ema=0.8,
)
TONES = {"low": 300.0, "high": 2500.0, "hiss": 0.0}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three classes of 30 short sounds, a folder each."""
    root = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name, frequency in TONES.items():
        (root / name).mkdir()
        for index in range(30):
            time_axis = np.arange(rng.integers(4000, 7900)) / 16000
            sound = 0.3 * rng.standard_normal(len(time_axis)) if not frequency else np.zeros(len(time_axis))
            sound += 0.3 * np.sin(2 * np.pi * frequency * rng.uniform(0.8, 1.2) * time_axis) * bool(frequency)
            soundfile.write(root / name / f"{index}.wav", sound, 16000)
    return root


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    said = []
    best = finetune.start(sounds, folder, SETTINGS, architecture=TINY, say=said.append)
    return folder, best, said


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder(run):
    folder, best, said = run
    rows = read_metrics(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert {"learning_rate", "accuracy", "seconds"} <= rows[0].keys()
    assert sorted(path.name for path in folder.iterdir()) == ["best", "metrics.csv", "run.json", "state-0003"]
    assert best.config.labels == ("high", "hiss", "low")
    assert best.config.problem_type == "single_label_classification"
    accuracies = [float(row["accuracy"]) for row in rows]
    assert best.metadata["epoch"]["accuracy"] == max(accuracies)
    assert max(accuracies) >= 0.6  # chance is a third
    assert any("81 training examples, 9 for validation" in line for line in said)
    assert best.frontend.mean != FrontendConfig().mean  # measured on the data


def test_checkpoint_classifies(run, sounds):
    folder, best, _ = run
    names = [str(sounds / name / "3.wav") for name in TONES]
    predictions = ast_jax.classify(names, folder / "best", top_k=3)
    for prediction in predictions:
        assert abs(sum(score for _, score in prediction) - 1) < 1e-5
    logits, labels = finetune.evaluate(best, datasets.read_dataset(sounds).splits["validation"], batch_size=8)
    assert logits.shape == labels.shape == (9, 3)
    # Device and host paths compute the same: evaluate's features come from jit, classify's from NumPy.
    example = datasets.read_dataset(sounds).splits["validation"][4]
    scores = dict(ast_jax.classify(example.path, best, top_k=3))
    want = np.exp(logits[4] - logits[4].max())
    np.testing.assert_allclose([scores[name] for name in best.config.labels], want / want.sum(), atol=1e-3)


def test_same_seed_same_run(run, sounds, tmp_path):
    _, best, _ = run
    again = finetune.start(sounds, tmp_path / "again", SETTINGS, architecture=TINY, say=lambda _: None)
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(best.params)[path])


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def raise_killed(*_):
    raise Killed


@pytest.fixture(scope="module")
def killed_once(sounds, tmp_path_factory):
    """A run killed after the state of its first epoch was saved, before anything else, with scratch beside it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "save", raise_killed)
        with pytest.raises(Killed):
            finetune.start(sounds, folder, SETTINGS, architecture=TINY, say=lambda _: None)
    assert {path.name for path in folder.iterdir()} == {"run.json", "state-0000", "state-0001"}
    for name in (".best.abcdefgh", ".state-0002.01234567"):
        (folder / name / "new").mkdir(parents=True)
    (folder / ".metrics.csv.abcdefgh").touch()
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    return shutil.copytree(killed_once, tmp_path / "killed")


@pytest.fixture
def no_compiling(monkeypatch):
    """Steps that change nothing, where only what happens around them counts."""
    monkeypatch.setattr(DataParallel, "wrap_train", lambda *_: lambda state, batch: (state, np.float32(1)))
    monkeypatch.setattr(DataParallel, "wrap_eval", lambda *_: lambda params, batch: batch["waveform"][:, :3])


def test_resume_gives_the_uninterrupted_run(run, killed):
    folder, _, _ = run
    seen = []

    def stop_at_once(line):
        seen.append(line)
        if "training examples" in line:
            raise Killed

    with pytest.raises(Killed):
        finetune.resume(killed, say=stop_at_once)
    assert seen[0] == "going on after epoch 1 of 3"
    assert sorted(path.name for path in killed.iterdir()) == ["best", "metrics.csv", "run.json", "state-0001"]
    assert [row["epoch"] for row in read_metrics(killed)] == ["1"]
    assert ast_jax.load(killed / "best").metadata["epoch"]["epoch"] == 1
    finetune.resume(killed, say=seen.append)
    assert sorted(path.name for path in killed.iterdir()) == ["best", "metrics.csv", "run.json", "state-0003"]
    ours = finetune.restore_numpy(killed / "state-0003" / "state")
    theirs = finetune.restore_numpy(folder / "state-0003" / "state")
    assert ours.keys() == theirs.keys()
    for key, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[key])
    without_time = [[{**row, "seconds": 0} for row in read_metrics(which)] for which in (killed, folder)]
    assert without_time[0] == without_time[1]
    best = [ast_jax.load(which / "best").metadata["epoch"]["epoch"] for which in (killed, folder)]
    assert best[0] == best[1]


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ((data, "eval_batches"), "state-0000"),
        ((finetune, "_save_state"), "state-0001"),
        ((finetune, "save"), "state-0001"),
    ],
    ids=["validation", "state", "best"],
)
def test_ctrl_c_is_held_back_to_where_stopping_is_safe(
    where, kept, presses, sounds, tmp_path, monkeypatch, no_compiling
):
    """Whatever is under way when it comes: the first lets it finish, the second does not."""
    module, name = where
    original, finished = getattr(module, name), []

    def press_and_go_on(*arguments, **settings):
        if name != "_save_state" or arguments[2]:  # not at the start
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
            finished.append(name)
        return original(*arguments, **settings)

    monkeypatch.setattr(module, name, press_and_go_on)
    settings = TrainConfig(batch_size=40, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(sounds, tmp_path / "run", settings, architecture=TINY, say=lambda _: None)
    assert finished == [name] * (presses == 1)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    if presses == 1:
        assert names == {"run.json", kept} | ({"best", "metrics.csv"} if kept == "state-0001" else set())
    else:
        assert names <= {"run.json", "state-0000", "state-0001"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert finetune.can_resume(tmp_path / "run")


def test_resume_where_the_data_were_moved(killed, sounds, tmp_path, monkeypatch):
    settings = json.loads((killed / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps({**settings, "data": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        finetune.resume(killed)
    for name in ("low", "high"):
        shutil.copytree(sounds / name, tmp_path / "two" / name)
    with pytest.raises(datasets.DataError, match="labels are no longer"):
        finetune.resume(killed, tmp_path / "two")
    shutil.copytree(sounds, tmp_path / "fewer", ignore=lambda folder, names: [n for n in names if n[0] == "1"])
    with pytest.raises(datasets.DataError, match="give it the data it was started with"):
        finetune.resume(killed, tmp_path / "fewer")
    assert json.loads((killed / "run.json").read_text())["data"] == str(tmp_path / "gone")
    monkeypatch.chdir(sounds.parent)
    monkeypatch.setattr(finetune, "_publish", raise_killed)
    with pytest.raises(Killed):
        finetune.resume(killed, sounds.name)
    assert json.loads((killed / "run.json").read_text()) == {**settings, "data": str(sounds)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"data": "x"}'),
        ("run.json", '{"data": 3, "metadata": {}}'),
        ("state-0003/history.json", ""),
        ("state-0003/history.json", "3"),
        ("state-0003/history.json", "[]"),
        ("state-0003/history.json", '[{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]'),
        ("state-0003/history.json", '[{"train_loss": "x"}, {"train_loss": 1}, {"train_loss": 2}]'),
    ],
)
def test_damaged_run_folders_are_one_line(name, text, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    (copy / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{name}: expected the file as finetune wrote it, got a damaged one \(."
    ) as found:
        finetune.resume(copy)
    assert "\n" not in str(found.value)


def test_a_state_that_does_not_fit_is_one_line(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=r"state-0003: expected what run\.json describes"):
        finetune.resume(copy)


def test_without_validation_it_says_what_chooses_the_best(sounds, tmp_path, no_compiling):
    manifest = tmp_path / "list.csv"
    rows = [[str(sounds / name / f"{index}.wav"), name, "train"] for name in TONES for index in range(6)]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    said = []
    settings = TrainConfig(batch_size=8, epochs=1)
    best = finetune.start(manifest, tmp_path / "run", settings, architecture=TINY, say=said.append)
    assert "no validation examples: the best epoch will be the one with the lowest training loss" in said
    assert set(best.metadata["epoch"]) == {"epoch", "learning_rate", "train_loss", "seconds"}


def test_the_kept_parameters_are_the_moving_average(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    like = train.init_state(run[1].params, optimizers.make_optimizer(SETTINGS, 1), SETTINGS)
    state = finetune._restore_state(folder / "state-0003", like)
    stored = finetune.read_run(folder)
    rows = [{"epoch": 1, "train_loss": 1.0}]  # as if it were the first, which is the best so far
    finetune._publish(stored, folder, state.kept, rows)
    saved = flatten(ast_jax.load(folder / "best").params)
    average, last = flatten(state.average), flatten(state.params)
    for name, leaf in saved.items():
        np.testing.assert_array_equal(leaf, average[name])
    assert any((saved[name] != last[name]).any() for name in saved)


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
    best = finetune.start(manifest, tmp_path / "run", settings, architecture=TINY, say=said.append)
    assert sum("the best epoch will be the one with the lowest training loss" in line for line in said) == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert best.metadata["epoch"]["train_loss"] == min(losses)
    falling = [{"epoch": n, "train_loss": 1 / n, "mAP": math.nan, "mAUC": math.nan} for n in (1, 2)]
    assert finetune._is_best(falling)
    assert not finetune._is_best(falling[::-1])


def test_a_run_folder_is_one_process_s(run, sounds, tmp_path):
    """A lock belongs to an open file, so that a second one in the same process is refused like another process's."""
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    with (
        sole_use(copy),
        pytest.raises(ValueError, match="run: another process is at work in it; wait for it or stop it"),
    ):
        finetune.resume(copy, say=lambda _: None)
    assert finetune.resume(copy, say=lambda _: None).metadata == finetune.load(copy / "best").metadata
    (tmp_path / "new").mkdir()
    with sole_use(tmp_path / "new"), pytest.raises(ValueError, match="new: another process is at work in it"):
        finetune.start(sounds, tmp_path / "new", TrainConfig(batch_size=8), architecture=TINY)
    assert not list((tmp_path / "new").iterdir())


def test_killed_process_resumes(sounds, tmp_path):
    """SIGKILL in the middle of an epoch: the command goes on from the last saved one."""
    output = tmp_path / "killed"
    architecture = tmp_path / "config.json"
    architecture.write_text(json.dumps(TINY.to_json_dict()))
    command = [sys.executable, "-m", "ast_jax.cli", "finetune", str(sounds), "--output", str(output)]
    options = ["--architecture", str(architecture), "--epochs", "40", "--batch-size", "16"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)
    while finetune._newest_state(output) in (None, output / "state-0000"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    settings = json.loads((output / "run.json").read_text())
    done = int(finetune._newest_state(output).name.removeprefix("state-"))
    assert done < 40
    settings["training"]["epochs"] = done + 1
    (output / "run.json").write_text(json.dumps(settings))
    finished = subprocess.run(
        [*command, "--batch-size", "16", "--resume"], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert f"going on after epoch {done} of {done + 1}" in finished.stdout
    assert f"checkpoint: {output / 'best'}" in finished.stdout


def test_ctrl_c_stops_cleanly(sounds, tmp_path):
    output = tmp_path / "stopped here"
    command = [sys.executable, "-m", "ast_jax.cli", "finetune", str(sounds), "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--epochs", "400", "--max-length", "32", "--batch-size", "8"], env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "training examples" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == f"ast-jax: stopped; go on with: ast-jax finetune --output '{output}' --resume\n"


def test_init_keeps_body_and_matching_head(run, sounds, tmp_path):
    _, best, _ = run
    frozen = TrainConfig(batch_size=16, epochs=1, learning_rate=1e-12)
    same = finetune.start(sounds, tmp_path / "same", frozen, initial=best, say=lambda _: None)
    np.testing.assert_allclose(
        same.params["classifier"]["dense"]["kernel"], best.params["classifier"]["dense"]["kernel"], atol=1e-6
    )  # a rate of 1e-12 moves nothing by more
    two = tmp_path / "two"
    for name in ("low", "high"):
        shutil.copytree(sounds / name, two / name)
    other = finetune.start(two, tmp_path / "other", frozen, initial=best, say=lambda _: None)
    assert other.config.labels == ("high", "low")
    assert other.params["classifier"]["dense"]["kernel"].shape == (32, 2)
    np.testing.assert_allclose(other.params["layernorm"]["scale"], best.params["layernorm"]["scale"], atol=1e-6)
    assert other.frontend == best.frontend


def test_manifest_with_splits_and_several_labels(sounds, tmp_path):
    manifest = tmp_path / "list.csv"
    rows = [["path", "label", "split"]]
    for name in TONES:
        for index in range(12):
            label = f"{name};Beep, bleep" if index % 2 else name
            rows.append([str(sounds / name / f"{index}.wav"), label, ["train", "val", "test"][index % 3]])
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    dataset = datasets.read_dataset(manifest)
    assert dataset.labels == ("Beep, bleep", "high", "hiss", "low")
    assert {split: len(examples) for split, examples in dataset.splits.items()} == {
        "train": 12, "validation": 12, "test": 12,
    }  # fmt: skip
    assert dataset.multi_label
    best = finetune.start(
        manifest, tmp_path / "run", TrainConfig(batch_size=8, epochs=1), architecture=TINY, say=lambda _: None
    )
    assert best.config.problem_type == "multi_label_classification"
    assert "mAP" in best.metadata["epoch"]
    with pytest.raises(datasets.DataError, match="several labels"):
        finetune.start(
            manifest, tmp_path / "no", SETTINGS, architecture=TINY, problem_type="single_label_classification"
        )


def hold_out(*targets, seed=0):
    """Return the labels of what is kept and of what is held."""
    examples = [datasets.Example(pathlib.Path(str(number)), labels) for number, labels in enumerate(targets)]
    kept, held = datasets._hold_out(examples, seed)
    assert sorted(kept + held, key=lambda one: int(one.path.name)) == examples
    return ([example.targets for example in part] for part in (kept, held))


@pytest.mark.parametrize(("size", "wanted"), [(1, 0), (2, 1), (9, 1), (10, 1), (29, 2), (30, 3)])
def test_a_tenth_of_each_class_is_held_out(size, wanted):
    kept, held = hold_out(*[(0,)] * size, *[(1,)] * 50)
    assert (held.count((0,)), held.count((1,))) == (wanted, 5)
    assert kept.count((0,)) == size - wanted


def test_hold_out_gives_every_label_its_tenth_whatever_the_combinations():
    """200 examples with labels drawn one by one: most combinations are there a few times only."""
    rates = np.array([0.5, 0.3, 0.3, 0.2, 0.1, 0.02])
    drawn = np.random.default_rng(0).random((200, 6)) < rates
    targets = [tuple(np.flatnonzero(row).tolist()) for row in drawn]
    kept, held = hold_out(*targets)
    for label in range(6):
        total = drawn[:, label].sum()
        share = sum(label in one for one in held)
        assert max(1, total // 10) <= share <= total // 10 + 4  # some come along with rarer labels
    assert held.count(()) == targets.count(()) // 10
    assert list(hold_out(*targets)) == [kept, held]
    assert list(hold_out(*targets, seed=1)) != [kept, held]


def test_hold_out_leaves_every_label_something_to_learn_from():
    kept, held = hold_out((0, 1), (0, 2), (1,), (2,))  # holding (0, 1) for 1 and (0, 2) for 2 would take all of 0
    assert {label for one in kept for label in one} == {0, 1, 2}
    assert {label for one in held for label in one} == {0, 1, 2}


def test_batches_do_not_depend_on_threads(sounds):
    examples = datasets.read_dataset(sounds).splits["train"]
    frontend = FrontendConfig(max_length=48)
    arguments = {"batch_size": 16, "seed": 3, "epoch": 2, "mixup": 0.7}
    one = list(data.train_batches(examples, frontend, 3, **arguments, num_threads=1))
    many = list(data.train_batches(examples, frontend, 3, **arguments, num_threads=6))
    assert len(one) == len(many) == 81 // 16
    for a, b in zip(one, many, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    other = next(data.train_batches(examples, frontend, 3, **{**arguments, "epoch": 3}))
    assert not np.array_equal(other["waveform"], one[0]["waveform"])
    mixed = np.concatenate([batch["labels"] for batch in one])
    assert 0.3 < ((mixed > 0) & (mixed < 1)).any(1).mean() < 0.7  # two thirds of 0.7 have a partner of another class
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)


def test_eval_batches_fill_up_the_last(sounds):
    examples = datasets.read_dataset(sounds).splits["validation"]
    found = list(data.eval_batches(examples, FrontendConfig(max_length=48), 3, batch_size=4))
    assert [real for _, real in found] == [4, 4, 1]
    assert all(batch["waveform"].shape[0] == 4 for batch, _ in found)


def test_statistics_of_known_sound(tmp_path, sounds):
    examples = datasets.read_dataset(sounds).splits["train"][:5]
    frontend = FrontendConfig(max_length=48)
    values = np.concatenate([ast_jax.fbank(data.load_example(one, frontend)) for one in examples])
    mean, std = survey.statistics(examples, frontend)
    np.testing.assert_allclose([mean, std], [values.mean(), values.std()], rtol=1e-4)
    assert type(mean) is type(std) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.wav,x\n", "missing path"),
        ("path,label\nnone.wav,x\n", "1 of 1 files are missing"),
        ("path,label,split\na.wav,x,holdout\n", "line 2: expected split train, validation, test, got 'holdout'"),
        ("path,label\n", "found none"),
        ("path,label\na.wav\n", r"manifest\.csv, line 2: expected 2 fields as in the header, got 1$"),
        ("path,label\na.wav,x\n\na.wav,Beep, bleep\n", "line 4: expected 2 fields as in the header, got 3$"),
        ("path,label\n,x\n", "line 2: expected a path, got nothing"),
        (f"path,label\na.wav,{'x' * 200_000}\n", r"line 2: expected CSV \(field larger"),
        ("path,label,split\na.wav,x,test\n", "no example is in the split 'train'"),
        ("path,label\na.wav,x\n", "every sound has the one label 'x'; expected at least two classes"),
        ("path,label\na.wav,\n", "expected at least one label, but every sound's is empty"),
        ("path,label,path\na.wav,x,b.wav\n", "expected each column once, got several of path"),
    ],
)
def test_bad_manifests_are_refused(text, message, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 16000)
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(datasets.DataError, match=message):
        datasets.read_dataset(tmp_path)


def test_other_refusals(run, sounds, tmp_path):
    folder, _, _ = run
    with pytest.raises(ValueError, match="already holds a run"):
        finetune.start(sounds, folder, SETTINGS, architecture=TINY)
    with pytest.raises(ValueError, match="expected a run folder"):
        finetune.resume(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        datasets.read_dataset(tmp_path / "none")
    with pytest.raises(datasets.DataError, match="less than one batch of 800"):
        finetune.start(sounds, tmp_path / "big", TrainConfig(batch_size=800), architecture=TINY, say=lambda _: None)


def test_refused_starts_leave_nothing_and_other_things_stay(sounds, tmp_path):
    with pytest.raises(datasets.DataError):
        finetune.start(sounds, tmp_path / "big", TrainConfig(batch_size=800), architecture=TINY)
    assert not (tmp_path / "big").exists()
    (tmp_path / "state-of-the-art").mkdir()
    with pytest.raises(ValueError, match="new or empty folder"):
        finetune.start(sounds, tmp_path, SETTINGS, architecture=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["state-of-the-art"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".run.json.abcdefgh").touch()  # of a start that was killed
    with pytest.raises(datasets.DataError):
        finetune.start(sounds, tmp_path / "new", TrainConfig(batch_size=800), architecture=TINY)


def test_files_passed_over_are_named_and_hidden_ones_are_not_taken(sounds, tmp_path, no_compiling):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    (copy / "low" / "._0.wav").write_bytes(b"what macOS leaves")
    (copy / ".cache").mkdir()
    shutil.copy(copy / "low" / "0.wav", copy / ".cache" / "0.wav")
    (copy / "low" / "talk.m4a").touch()
    shutil.copy(copy / "low" / "0.wav", copy / "loose.wav")
    dataset = datasets.read_dataset(copy)
    assert dataset.passed_over == (copy / "loose.wav", copy / "low" / "talk.m4a")
    assert sum(map(len, dataset.splits.values())) == 90
    said = []
    finetune.start(copy, tmp_path / "run", TrainConfig(epochs=1), architecture=TINY, say=said.append)
    assert f"passed over: 2 files that are no sound files of a class, the first is {copy / 'loose.wav'}" in said


def test_sounds_that_are_longer_than_the_input_are_counted(sounds, tmp_path, no_compiling):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    for number in range(2):
        soundfile.write(copy / "low" / f"long{number}.flac", np.full(16000, 0.1), 16000)
    said = []
    finetune.start(copy, tmp_path / "run", TrainConfig(epochs=1), architecture=TINY, say=said.append)
    assert "2 of 92 sounds are longer than the model's input: their first 0.49 s are used" in said


def test_bad_files_are_found_before_training(sounds, tmp_path):
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    (copy / "high" / "7.wav").write_text("no sound")
    soundfile.write(copy / "low" / "8.wav", np.zeros(100), 16000)
    with pytest.raises(
        datasets.DataError, match=r"2 of 90 files cannot be used, the first is .*7\.wav: not a readable"
    ):
        finetune.start(copy, tmp_path / "run", SETTINGS, architecture=TINY, say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_first_epoch_leaves_the_folder_free(sounds, tmp_path, no_compiling):
    """NaN samples show only when they are decoded; without them the same command works."""
    copy = shutil.copytree(sounds, tmp_path / "sounds")
    sound, _ = soundfile.read(copy / "hiss" / "5.wav")
    sound[10] = np.nan
    soundfile.write(copy / "hiss" / "5.wav", sound, 16000, subtype="FLOAT")
    frontend_of = ast_jax.Checkpoint(
        ast_jax.init(jax.random.key(0), TINY), TINY, FrontendConfig(max_length=48, num_mel_bins=32)
    )
    settings = TrainConfig(epochs=1)
    with pytest.raises(ValueError, match=r"5\.wav: 1 of \d+ samples are NaN or Inf"):
        finetune.start(copy, tmp_path / "run", settings, initial=frontend_of, say=lambda _: None)
    assert list((tmp_path / "run").iterdir()) == []
    (copy / "hiss" / "5.wav").unlink()
    finetune.start(copy, tmp_path / "run", settings, initial=frontend_of, say=lambda _: None)
    assert (tmp_path / "run" / "best").is_dir()


def test_any_error_in_the_first_epoch_leaves_the_folder_free(sounds, tmp_path, no_compiling, monkeypatch):
    """The device's too, which are RuntimeErrors."""

    def exhausted(state, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(DataParallel, "wrap_train", lambda *_: exhausted)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            finetune.start(sounds, tmp_path / "run", TrainConfig(epochs=1), architecture=TINY, say=print)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_start_killed_before_its_first_state_leaves_the_folder_free(run, sounds, tmp_path, no_compiling):
    (tmp_path / "run").mkdir()
    shutil.copy(run[0] / "run.json", tmp_path / "run")
    finetune.start(sounds, tmp_path / "run", TrainConfig(epochs=1), architecture=TINY, say=lambda _: None)
    assert (tmp_path / "run" / "best").is_dir()


def test_somebody_s_own_file_of_that_name_stays(run, sounds, tmp_path):
    for name, text in (("own", "{}"), ("beside", (run[0] / "run.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "beside" / "notes.txt").write_text("mine")
    for name in ("own", "beside"):
        before = {path.name: path.read_text() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            finetune.start(sounds, tmp_path / name, SETTINGS, architecture=TINY, say=lambda _: None)
        assert {path.name: path.read_text() for path in (tmp_path / name).iterdir()} == before


def test_progress_bar_is_for_terminals(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
        with finetune._progress("epoch 1/2", 3) as advance:
            advance()
            advance()
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("epoch 1/2" in shown.err and "2/3" in shown.err) if terminal else shown.err == ""


def test_a_run_that_came_while_the_data_were_read_is_left_alone(run, sounds, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real = survey.statistics

    def slow(*arguments):
        shutil.copytree(run[0], folder)
        return real(*arguments)

    monkeypatch.setattr(survey, "statistics", slow)
    with pytest.raises(ValueError, match="already holds a run"):
        finetune.start(sounds, folder, SETTINGS, architecture=TINY, say=lambda _: None)
    assert finetune.read_run(folder) == finetune.read_run(run[0])
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in run[0].iterdir())


def test_a_class_may_be_a_link(sounds, tmp_path):
    for name in ("low", "high"):
        (tmp_path / name).symlink_to(sounds / name)
    assert datasets.read_dataset(tmp_path).labels == ("high", "low")


def test_sounds_that_are_all_silent_are_refused(sounds, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            soundfile.write(tmp_path / name / f"{index}.wav", np.zeros(8000), 16000)
    with pytest.raises(datasets.DataError, match="hold the same throughout, as silence does"):
        finetune.start(tmp_path, tmp_path / "run", SETTINGS, architecture=TINY, say=lambda _: None)


def test_parameters_that_are_not_finite_stop_the_run(sounds, tmp_path, no_compiling, monkeypatch):
    def spoil(self, tree):
        return tree.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, tree.params))

    monkeypatch.setattr(DataParallel, "unreplicate", spoil)
    with pytest.raises(FloatingPointError, match="the parameters are not finite at the end of epoch 1"):
        finetune.start(sounds, tmp_path / "run", TrainConfig(epochs=1), architecture=TINY, say=lambda _: None)
    assert list((tmp_path / "run").iterdir()) == []


def test_metrics_by_hand():
    config = TINY.replace(num_labels=2, problem_type="multi_label_classification")
    logits = np.array([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    labels = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])
    # class 0: positives at ranks 1 and 3: (1 + 2/3) / 2; class 1: at ranks 1 and 3 too
    found = metrics.evaluate_logits(logits, labels, config)
    np.testing.assert_allclose(found["mAP"], 5 / 6)
    np.testing.assert_allclose(found["mAUC"], 0.75)
    single = metrics.evaluate_logits(logits, labels, config.replace(problem_type="single_label_classification"))
    assert single == {"accuracy": 0.5}
    assert np.isnan(metrics.average_precisions(logits, np.ones((4, 2)))).all()


def test_an_imagenet_start_takes_its_statistics_and_its_head_from_the_data(sounds, tmp_path, monkeypatch):
    """A DeiT file through `load` at the length of the data, as `--init deit.pth --max-length 48` does it."""
    torch.save(torch_original.deit_state(width=64, depth=1, heads=1, hw=14), tmp_path / "deit.pth")
    size = {"max_length": 48, "num_mel_bins": 32}
    initial = ast_jax.load(tmp_path / "deit.pth", **size)
    settings = TrainConfig(batch_size=16, epochs=1, learning_rate=0.001)
    best = finetune.start(sounds, tmp_path / "run", settings, initial=initial, say=lambda _: None)
    assert best.config.grid == (2, 4)
    assert best.config.labels == ("high", "hiss", "low")
    measured = survey.statistics(datasets.read_dataset(sounds).splits["train"], FrontendConfig(**size))
    np.testing.assert_allclose((best.frontend.mean, best.frontend.std), measured, atol=1e-4)  # four decimals are kept
    moved = flatten(best.params)["embeddings/projection/kernel"] - initial.params["embeddings"]["projection"]["kernel"]
    assert 0 < np.abs(moved).max() < 0.02  # five steps of Adam at 0.001 from there
    # Statistics that were said are kept, which shows before the first step.
    told = ast_jax.from_torch(tmp_path / "deit.pth", mean=-7.0, std=3.0, **size)
    said = []
    monkeypatch.setattr(finetune, "_train", lambda run, *_: run)
    again = finetune.start(sounds, tmp_path / "told", settings, initial=told, say=said.append)
    assert (again.frontend.mean, again.frontend.std) == (-7.0, 3.0)
    assert "the model to start from: features are normalised with mean -7 and std 3: as said" in said
    again = finetune.start(sounds, tmp_path / "again", settings, initial=best, say=lambda _: None)
    assert again.frontend == best.frontend  # and so are those of what has heard sounds
