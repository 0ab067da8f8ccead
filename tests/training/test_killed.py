"""Real processes that are killed, stopped and starved: whatever happens, no run is lost and none is another."""

import csv
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from command_line import ONE_DEVICE

import ast_jax
from ast_jax.checkpoints.folder import restore_numpy
from ast_jax.training import states

ARCHITECTURE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 32,
    "num_mel_bins": 32, "frequency_stride": 16, "time_stride": 16,
}  # fmt: skip
EPOCHS = 8
# Fewer optimisations, for speed: what is compared was compiled in the same way.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two classes of 20 short sounds."""
    root = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name in ("hiss", "hum"):
        (root / name).mkdir()
        for index in range(20):
            sound = 0.2 * rng.standard_normal(4000)
            soundfile.write(root / name / f"{index}.wav", np.cumsum(sound) / 20 if name == "hum" else sound, 16000)
    (root.parent / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    return root


MAIN = [sys.executable, "-m", "ast_jax.cli.main"]
OFTEN = ["--workers", "0", "--save-minutes", "1e-6"]  # a save after every step, so that a kill often falls into one


def resume(output):
    return [*MAIN, "resume", str(output), *OFTEN]


def fresh(sounds, output, beside=None):
    return [
        *MAIN, "finetune", str(sounds), "--output", str(output), *OFTEN,
        "--architecture", str((beside or sounds.parent) / "architecture.json"), "--epochs", str(EPOCHS),
        "--batch-size", "8",
        "--mixup", "0.5", "--time-mask", "4", "--noise", "--ema-decay", "0.9", "--average-from", "3", "--lr", "1e-3",
    ]  # fmt: skip


def start(arguments, **options):
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def undisturbed(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, stdout, stderr = finish(start(fresh(sounds, folder)))
    assert (code, stderr) == (0, ""), stderr
    assert f"checkpoint: {folder / 'best'}" in stdout
    return folder


def wait_for(condition, process):
    """Wait until something has happened in a process that is still running."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def saved(folder):
    return states.newest_state(folder) is not None


def is_saving(folder):
    return any("orbax-checkpoint-tmp" in path.name for path in (folder / "states").glob("*"))


def assert_same_run(folder, other):
    """Every array bit for bit, and every figure but the seconds."""
    arrays = [restore_numpy(states.newest_state(one) / "arrays") for one in (folder, other)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, leaf in arrays[0].items():
        np.testing.assert_array_equal(leaf, arrays[1][name])
    tables = []
    for one in (folder, other):
        with (one / "metrics.csv").open() as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    for name in ("best", "average"):
        ours, theirs = (ast_jax.load(one / name).params["classifier"]["dense"]["kernel"] for one in (folder, other))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 12])
def test_sigkill_at_any_instant_changes_nothing(kills, undisturbed, sounds, tmp_path):
    """At random moments and, every second time, in the middle of a save."""
    chance, folder, moments = random.Random(kills), tmp_path / "run", []
    for number in range(kills):
        resumed = saved(folder)
        process = start(resume(folder) if resumed else fresh(sounds, folder))
        before = states.newest_state(folder)
        wait_for(lambda: states.newest_state(folder) != before or (folder / "results.json").exists(), process)  # noqa: B023
        if number % 2:
            wait_for(lambda: is_saving(folder), process)
        else:
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        moments.append((int(states.newest_state(folder).name), is_saving(folder)))
    assert process.returncode == -signal.SIGKILL
    assert moments == sorted(moments, key=lambda moment: moment[0])  # no kill took the run back
    assert moments[0][0] < moments[-1][0] < 4 * EPOCHS + EPOCHS
    assert any(in_save for _, in_save in moments)
    code, stdout, stderr = finish(start(resume(folder)))
    assert (code, stderr) == (0, ""), stderr
    assert "resuming after epoch" in stdout
    assert_same_run(folder, undisturbed)
    assert not is_saving(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_go_on(number, status, undisturbed, sounds, tmp_path):
    folder = tmp_path / "stopped here"
    process = start(fresh(sounds, folder))
    wait_for(lambda: saved(folder) and states.newest_state(folder).name != "0", process)
    process.send_signal(number)
    code, _, stderr = finish(process)
    assert code == status
    same = "--workers 0 --save-minutes 1e-06"  # what it was told of this machine
    assert stderr == f"ast-jax: stopped; continue with: ast-jax resume '{folder}' {same}\n"
    if number == signal.SIGTERM:
        assert finish(start(resume(folder)))[0] == 0
        assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_whole(undisturbed, sounds, tmp_path):
    """No file may grow beyond a few bytes from some moment on, which is what a full disk does to a writer."""
    folder = tmp_path / "run"
    process = start(fresh(sounds, folder))
    wait_for(lambda: saved(folder) and states.newest_state(folder).name != "0", process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    code, _, stderr = finish(process)
    assert code == 1
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("ast-jax: ")
    assert "File too large" in stderr
    assert finish(start(resume(folder)))[0] == 0
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_one_line(sounds):
    """Nobody, root neither, can make a folder in /proc."""
    output = pathlib.Path("/proc/ast_jax_run")
    code, stdout, stderr = finish(start(fresh(sounds, output)))
    assert code == 1
    assert len(stderr.splitlines()) == 1, stderr
    assert str(output) in stderr
    assert "Traceback" not in stdout + stderr


def start_two(arguments, folder, cwd=(None, None)):
    """Start the same command twice, as two processes of one run with two devices each, in folders of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**ENVIRONMENT, "XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=2"}
    meeting = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    pair = []
    for number in (0, 1):
        with (folder / f"{number}.out").open("w") as stdout, (folder / f"{number}.err").open("w") as stderr:
            own = [*arguments, *meeting, str(number)]
            pair.append(subprocess.Popen(own, env=environment, stdout=stdout, stderr=stderr, cwd=cwd[number]))
    return pair


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_read_ends_both(sounds, tmp_path):
    """Neither waits for the other until JAX gives up."""
    places = [tmp_path / "has them", tmp_path / "has none"]
    for place in places:
        place.mkdir()
    shutil.copytree(sounds, places[0] / "data")
    pair = start_two(fresh("data", tmp_path / "run", sounds.parent), tmp_path, cwd=places)
    assert [process.wait(timeout=60) for process in pair] == [1, 1]
    told = [(tmp_path / f"{number}.err").read_text().splitlines()[-1] for number in (0, 1)]
    assert told == ["ast-jax: process 1: data: no such file or folder", "ast-jax: data: no such file or folder"]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(undisturbed, sounds, tmp_path):
    """SIGTERM to one of them: both save at the same step, and the two, later, end where one alone ends."""
    folder = tmp_path / "run"
    pair = start_two(fresh(sounds, folder), tmp_path)
    wait_for(lambda: saved(folder) and states.newest_state(folder).name != "0", pair[0])
    pair[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in pair] == [143, 143]
    for number in (0, 1):
        told = (tmp_path / f"{number}.err").read_text()
        assert f"ast-jax resume {folder} --workers 0 --save-minutes 1e-06 --coordinator" in told
    assert states.read_record(states.newest_state(folder)).step > 0
    pair = start_two(resume(folder), tmp_path)
    assert [process.wait(timeout=300) for process in pair] == [0, 0], (tmp_path / "0.err").read_text()
    assert "resuming after epoch" in (tmp_path / "0.out").read_text()
    assert "resuming after epoch" not in (tmp_path / "1.out").read_text()  # the first speaks for both
    losses = []
    for one in (folder, undisturbed):
        with (one / "metrics.csv").open() as file:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == EPOCHS
    np.testing.assert_allclose(*losses, rtol=1e-3)  # float32 sums in another order, through 32 steps of Adam
