"""Batches: independent of workers and of the step to resume from; unreadable files replaced; bounded memory."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from ast_jax.config import FrontendConfig
from ast_jax.data.datasets import Example
from ast_jax.training import input_pipeline
from ast_jax.training.config import TrainConfig

FRONTEND = FrontendConfig(max_length=20, num_mel_bins=32)
SETTINGS = TrainConfig(batch_size=4, epochs=3, mixup=0.5, ramp_epochs=1.0, seed=5)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Eleven files of a constant each, different for each, so that a batch shows which file it came from."""
    folder = tmp_path_factory.mktemp("sounds")
    made = []
    for index in range(11):
        path = folder / f"{index}.wav"
        soundfile.write(path, np.full(1000 + 100 * index, (index + 1) / 100), 16000, subtype="FLOAT")
        made.append(Example(path, (index % 3,)))
    return made


def batches(examples, training=SETTINGS, **options):
    return list(input_pipeline.train_batches(examples, FRONTEND, 3, training, **options))


def assert_equal(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(examples):
    return batches(examples)


def test_every_epoch_draws_each_sound_at_most_once_in_another_order(whole):
    assert len(whole) == 3 * (11 // 4)
    epochs = [np.concatenate([batch["example"] for batch in whole[first : first + 2]]) for first in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert not all((epochs[0] == epoch).all() for epoch in epochs)
    assert {key: array.shape for key, array in whole[0].items()} == {
        "waveform": (4, FRONTEND.max_samples), "num_samples": (4,), "labels": (4, 3), "example": (4,),
        "skipped": (4, input_pipeline.MAX_SKIPPED),
    }  # fmt: skip


def test_another_seed_is_another_run(examples, whole):
    other = batches(examples, TrainConfig(batch_size=4, epochs=3, seed=6))
    assert any((a["example"] != b["example"]).any() for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(examples, whole, num_workers):
    assert_equal(batches(examples, num_workers=num_workers), whole)


@pytest.mark.parametrize("first_step", [1, 3, 6])
def test_a_run_resumes_from_any_step(examples, whole, first_step):
    assert_equal(batches(examples, first_step=first_step), whole[first_step:])


def test_two_processes_load_the_two_halves(examples, whole):
    halves = [batches(examples, rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    joined = [
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*halves, strict=True)
    ]
    assert_equal(joined, whole)


def test_mixup_takes_its_share_with_its_weights(examples):
    """A mixture of constant waveforms is zero, as means are removed; labels are the Beta(10, 10) weights."""
    training = TrainConfig(batch_size=11, epochs=60, mixup=0.4)
    found = batches(examples, training)
    labels = np.concatenate([batch["labels"] for batch in found])
    mixed = np.concatenate([np.abs(batch["waveform"]).max(-1) < 1e-6 for batch in found])
    assert 0.35 < mixed.mean() < 0.45  # 660 draws at 0.4: standard deviation 0.019
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    weights = labels[mixed].max(-1)
    weights = weights[weights < 1]  # partners of the same class add up to one
    assert abs((weights - 0.5).mean() - 0.088) < 0.02  # E|w - 1/2| of Beta(10, 10)
    unmixed = batches(examples, TrainConfig(batch_size=11, epochs=1))[0]
    np.testing.assert_allclose(unmixed["waveform"][:, 0], (unmixed["example"] + 1) / 100, atol=1e-6)
    assert (unmixed["num_samples"] == 1000 + 100 * unmixed["example"]).all()


def test_mixup_grows_over_the_ramp(examples):
    training = TrainConfig(batch_size=11, epochs=40, mixup=1.0, ramp_epochs=40.0)
    mixed = [(np.abs(batch["waveform"]).max(-1) < 1e-6).mean() for batch in batches(examples, training)]
    assert mixed[0] == 0.0
    assert np.mean(mixed[:10]) < 0.3 < 0.7 < np.mean(mixed[-10:])


def test_balanced_sampling_draws_rare_labels_as_often(examples):
    rare = [Example(example.path, (0 if index else 1,)) for index, example in enumerate(examples)]
    training = TrainConfig(batch_size=11, epochs=40, balanced_sampling=True)
    labels = np.concatenate([batch["labels"] for batch in batches(rare, training)])
    assert abs(labels[:, 1].mean() - 0.5) < 0.08  # 440 draws of one half: standard deviation 0.024


@pytest.fixture
def with_bad(examples, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    return [*examples, Example(tmp_path / "bad.wav", (0,)), Example(tmp_path / "gone.wav", (1,))]


def test_unreadable_files_are_replaced_and_listed(with_bad):
    training = TrainConfig(batch_size=13, epochs=4, mixup=0.5)
    found = batches(with_bad, training)
    assert all((batch["example"] < 11).all() for batch in found)
    skipped = np.concatenate([batch["skipped"].ravel() for batch in found])
    assert set(skipped.tolist()) == {-1, 11, 12}
    assert_equal(batches(with_bad, training, first_step=2), found[2:])  # with the same replacements


def test_nothing_readable_is_seen_in_the_batch(with_bad):
    only = with_bad[-2:]
    (batch,) = batches(only, TrainConfig(batch_size=2, epochs=1))
    assert (batch["skipped"] >= 0).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_has_every_sound_once_in_order(with_bad, num_workers):
    found = list(input_pipeline.eval_batches(with_bad, FRONTEND, 3, batch_size=4, passes=2, num_workers=num_workers))
    assert len(found) == 2 * 4
    for one in (found[:4], found[4:]):
        usable = np.concatenate([batch["usable"] for batch in one])
        assert usable.tolist() == [True] * 11 + [False] * 2 + [False] * 3
        lengths = np.concatenate([batch["num_samples"] for batch in one])[:11]
        assert lengths.tolist() == [1000 + 100 * index for index in range(11)]


def test_packed_examples_are_the_examples():
    examples = [
        Example(pathlib.Path("ä b/\udcff.wav"), (3, 5), 1.5, 2.5),
        Example(pathlib.Path("/c"), (), row=7),
        Example(pathlib.Path("d.wav"), (0,)),
    ]
    packed = input_pipeline.PackedExamples(examples)
    assert list(packed) == examples
    assert packed.targets() == [(3, 5), (), (0,)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_is_bounded_however_many_batches_wait(num_workers, tmp_path):
    """Prefetching stops while the consumer waits, and consumed batches are freed."""
    path, frontend, batch_bytes = tmp_path / "long.wav", FrontendConfig(), 16 * 4 * 164_080
    assert batch_bytes == 16 * 4 * frontend.max_samples
    soundfile.write(path, np.full(160_000, 0.1), 16000)
    examples = [Example(path, (0,))] * 16
    before = _memory()
    stream = input_pipeline.train_batches(
        examples, frontend, 1, TrainConfig(batch_size=16, epochs=300), num_workers=num_workers
    )
    next(stream)
    waiting = _settled_memory()
    # Threads keep 8 batches and work on 4 more; two processes keep 6 each and work on 2. A process itself takes up to
    # 150 MB, and so do this one's imports. All 300 batches are 3.1 GB.
    assert waiting - before < 16 * batch_bytes + (1 + num_workers) * 150e6
    for _ in range(60):
        next(stream)
    # Both are taken with all queues full. The allocator keeps a few freed blocks; of 60 batches, fewer than 10 stay.
    assert _settled_memory() - waiting < 10 * batch_bytes
    stream.close()


def _settled_memory():
    """Return `_memory()` once it has not changed for a second, when prefetching has stopped; wait at most a minute."""
    seen, still = _memory(), 0
    for _ in range(300):
        time.sleep(0.2)
        now = _memory()
        still = still + 1 if abs(now - seen) < 1e6 else 0
        seen = now
        if still == 5:
            break
    return seen


def _memory():
    """Return the memory of this process and its children in bytes; shared memory counts once.

    File-backed pages, such as libraries, are excluded: their share changes as other processes start and end.
    """
    rollups = [pathlib.Path(f"/proc/{pid}/smaps_rollup") for pid in [os.getpid(), *_children(os.getpid())]]
    taken = [re.findall(r"^Pss_(?:Anon|Shmem): +([0-9]+) kB", rollup.read_text(), re.M) for rollup in rollups]
    assert all(len(kinds) == 2 for kinds in taken)
    return sum(int(kilobytes) for kinds in taken for kilobytes in kinds) * 1024


def test_workers_end_with_a_parent_that_was_killed(examples, tmp_path):
    """After SIGKILL the parent cannot stop its workers; they exit by themselves, and their shared memory is freed."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, pathlib\n"
        "from ast_jax.config import FrontendConfig\n"
        "from ast_jax.data.datasets import Example\n"
        "from ast_jax.training import input_pipeline\n"
        "from ast_jax.training.config import TrainConfig\n"
        "if __name__ == '__main__':\n"
        f"    examples = [Example(pathlib.Path({str(examples[0].path)!r}), (0,))] * 4\n"
        "    frontend = FrontendConfig(max_length=20, num_mel_bins=32)\n"
        "    training = TrainConfig(batch_size=4, epochs=9999)\n"
        "    stream = input_pipeline.train_batches(examples, frontend, 3, training, num_workers=1)\n"
        "    next(stream)\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, str(script)], **pipes, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = _children(parent.pid)
        assert children
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _children(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _runs(pid):
    try:
        os.kill(pid, 0)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
