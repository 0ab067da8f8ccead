"""Unusable input: messages, exit status, and that all other results are there."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from command_line import ONE_DEVICE, SOUNDS, ast_cli

import ast_jax

RATE = 16000
GOOD = SOUNDS / "siren.flac"
LIBMPG123 = re.compile(r"$|Note: |Warning: Xing|\[src/libmpg123/")  # which libsndfile holds, has its say of damaged MP3


def noise(seconds, channels=1):
    return 0.1 * np.random.default_rng(0).standard_normal((int(seconds * RATE), channels)).astype(np.float32)


def flac(path):
    soundfile.write(path, noise(20), RATE)


def truncated(path):
    flac(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def mp3(path):
    soundfile.write(path, noise(20), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_only(path):
    soundfile.write(path, np.zeros(0), RATE)


def with_bad_samples(path):
    samples = noise(1)
    samples[100:103, 0] = np.nan, np.inf, -np.inf
    soundfile.write(path, samples, RATE, subtype="FLOAT")


def wrong_length(path):
    """Write a header that claims a hundred times the size."""
    soundfile.write(path, noise(2), RATE)
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    (size,) = struct.unpack_from("<I", content, place)
    struct.pack_into("<I", content, place, 100 * size)
    path.write_bytes(content)


BAD = {  # file name: how it is made, message
    "text.wav": (lambda path: path.write_text("this is text"), "not a readable sound file (Format not recognised)"),
    "empty.wav": (lambda path: path.touch(), "the file is empty"),
    "header.wav": (header_only, "there are no samples in it"),
    "one.wav": (lambda path: soundfile.write(path, [0.5], RATE), "only 0.1 ms long; at least 25 ms are needed"),
    "nan.wav": (with_bad_samples, "3 of 16000 samples are NaN or Inf"),
    "folder.wav": (lambda path: path.mkdir(), "expected a folder with sound files, found none that ends in"),
    "missing.wav": (lambda path: None, "no such file"),
    "random.flac": (lambda path: path.write_bytes(b"fLaC" + bytes(range(256)) * 9), "not a readable sound file"),
    "noise.mp3": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not a readable sound file"),
}  # fmt: skip

USABLE = {  # file name: how it is made, range of its duration in seconds
    "truncated.mp3": (mp3, (9.5, 10.5)),
    "six.wav": (lambda path: soundfile.write(path, noise(2, 6), RATE), (2, 2)),
    "24 bit.wav": (lambda path: soundfile.write(path, noise(2), RATE, subtype="PCM_24"), (2, 2)),
    "float.wav": (lambda path: soundfile.write(path, noise(2), RATE, subtype="DOUBLE"), (2, 2)),
    "wrong length.wav": (wrong_length, (2, 2)),
    "naïve 名前 🎵.ogg": (lambda path: soundfile.write(path, noise(2), RATE), (2, 2)),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Run all of them in one command, each followed by a usable file."""
    folder = tmp_path_factory.mktemp("table")
    names = []
    for name, (make, _) in (BAD | USABLE).items():
        make(folder / name)
        names += [folder / name, GOOD]
    return folder, ast_cli("classify", *names, "--json")


def test_each_unusable_file_is_one_line_and_all_others_are_classified(table):
    folder, done = table
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not LIBMPG123.match(line)]
    assert len(lines) == len(BAD), done.stderr
    messages = {line.split(": ")[1]: line for line in lines}
    for name, (_, message) in BAD.items():
        assert messages[str(folder / name)].startswith(f"ast-jax: {folder / name}: {message}")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["file"] for result in results].count(str(GOOD)) == len(BAD | USABLE)
    assert len({json.dumps(result["predictions"]) for result in results if result["file"] == str(GOOD)}) == 1


def test_damaged_but_usable_files(table):
    folder, done = table
    results = {result["file"]: result for result in map(json.loads, done.stdout.splitlines())}
    for name, (_, (least, most)) in USABLE.items():
        assert least <= results[str(folder / name)]["duration_seconds"] <= most, name


def test_a_truncated_flac(tmp_path):
    """libsndfile reads to the end of the file; the duration is stated or it is an error, but never silence."""
    truncated(tmp_path / "half.flac")
    done = ast_cli("classify", tmp_path / "half.flac", GOOD, "--json")
    results = {result["file"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert str(GOOD) in results
    if done.returncode:
        assert done.stderr.startswith(f"ast-jax: {tmp_path / 'half.flac'}: not a readable sound file")
    else:
        assert 8 < results[str(tmp_path / "half.flac")]["duration_seconds"] < 11


def test_thirty_minutes(tmp_path):
    minute = noise(60)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", RATE, 1) as file:
        for _ in range(30):
            file.write(minute)
    done = ast_cli("classify", tmp_path / "long.flac", GOOD, "--json", "-k", "1")
    assert done.returncode == 0, done.stderr
    long, short = map(json.loads, done.stdout.splitlines())
    assert long["duration_seconds"] == 1800
    assert long["timeline"][-1]["end"] == 1800
    assert short["file"] == str(GOOD)


def test_a_thousand_files_ten_of_them_unusable(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    content = GOOD.read_bytes()
    bad = {f"{number:03} bad.flac" for number in range(5, 1000, 100)}
    for number in range(1000):
        name = f"{number:03} bad.flac" if f"{number:03} bad.flac" in bad else f"{number:03}.flac"
        (folder / name).write_bytes(b"bad" if name in bad else content)
    done = ast_cli("classify", folder, "--output", tmp_path / "out.jsonl", "-k", "1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 10
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [pathlib.Path(result["file"]).name for result in results] == sorted(path.name for path in folder.iterdir())
    assert {pathlib.Path(result["file"]).name for result in results if "error" in result} == bad
    assert all(result["predictions"][0]["label"] in ("Alarm", "Siren") for result in results if "error" not in result)


def limited(*arguments, stdout=subprocess.PIPE, wrapper=()):
    """Run the command line under limits."""
    command = [*wrapper, sys.executable, "-m", "ast_jax.cli.main", *map(str, arguments)]
    env = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, timeout=300)


def test_no_permission(tmp_path):
    """Without root's capability to override permissions."""
    shutil.copy(GOOD, tmp_path / "locked.flac")
    (tmp_path / "locked.flac").chmod(0)
    wrapper = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = limited("classify", tmp_path / "locked.flac", GOOD, "--json", wrapper=wrapper)
    assert done.returncode == 1
    assert done.stderr == f"ast-jax: {tmp_path / 'locked.flac'}: not a readable sound file (System error)\n"
    assert json.loads(done.stdout)["file"] == str(GOOD)
    folder = tmp_path / "shut"
    folder.mkdir()
    folder.chmod(0o555)
    done = limited("classify", GOOD, "--output", folder / "out.csv", wrapper=wrapper)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk(tmp_path):
    """By a limit on the file size, which fails writes like a full disk; the old table stays."""
    (tmp_path / "out.csv").write_text("old")
    done = limited("classify", GOOD, "--output", tmp_path / "out.csv", wrapper=["prlimit", "--fsize=50"])
    assert done.returncode == 1
    assert os.strerror(errno.EFBIG) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "out.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "w") as full:
        done = limited("classify", GOOD, stdout=full)
    assert done.returncode == 1
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_closed_pipe():
    command = [sys.executable, "-m", "ast_jax.cli.main", "classify", *[str(GOOD)] * 30]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_library_raises_the_message_of_the_command(tmp_path):
    for name in ("text.wav", "empty.wav", "one.wav"):
        make, message = BAD[name]
        make(tmp_path / name)
        with pytest.raises(ast_jax.AudioError) as raised:
            ast_jax.classify(tmp_path / name)
        assert message in str(raised.value)


@pytest.mark.slow
def test_ctrl_c_at_any_time(tmp_path):
    """Also during the import of JAX and XLA's compilation: one line, status 130, no crash."""
    sound = tmp_path / "long.wav"
    soundfile.write(sound, np.random.default_rng(0).standard_normal(600 * 16000) / 8, 16000)
    command = [sys.executable, "-m", "ast_jax.cli.main", "--no-program-cache", "classify", sound, "--hop", "0.02"]
    for delay in np.arange(0, 2.4, 0.2):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": ONE_DEVICE}
        ) as process:
            while "jaxlib" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:  # a library that was being imported swallowed it: once more
                process.send_signal(signal.SIGINT)
            message = process.stderr.read().decode()
        assert (process.returncode, message) == (130, "ast-jax: stopped\n")
