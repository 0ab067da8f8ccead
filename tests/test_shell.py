"""Shell commands of the README and docs/ run unchanged in bash, with stand-ins for files and a microphone.

Commands of the other pages run in this process, in test_pages.py and test_docs.py.
"""

import os
import pathlib
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import urllib.request

import jax
import numpy as np
import pytest
import soundfile
from command_line import ONE_DEVICE
from pages import DOCS, NOT_RUN, PAGES, RUN_WHOLE, SOUNDS, blocks, commands

import ast_jax

ROOT = DOCS.parent
ALL = [(path.stem, number) for path in [ROOT / "README.md", *PAGES] for number in range(len(blocks(path, "sh")))]
RUN = {  # (page, block): replacements for placeholders of several names
    ("README", 2): {"FILE...": "FILE FOLDER/siren.flac", "MODEL...": "RUN RUN/best", "RUN...": "RUN RUN/best"},
    ("converting", 0): {},
    ("finetuning", 1): {"1e-5 1e-4 3e-4 1e-3 3e-3 1e-2": "1e-3", "0 1 2": "0 1"},
    ("finetuning", 2): {"mismatched": "run-1e-3-0/best"},
    ("finetuning", 3): {},
    ("finetuning", 4): {},
    ("sliding-windows", 4): {},
    ("tpu", 2): {},
    ("tpu", 5): {},
}
WRITTEN = {
    ("README", 2): [
        "out.csv",
        "labels.txt",
        "vectors.npz",
        "why.png",
        "out.stablehlo",
        "RUN/best",
        "CHECKPOINT/params",
    ],
    ("converting", 0): ["ast/verification.json", "short/params", "back/config.json", "back.pth"],
    ("finetuning", 1): ["run-1e-3-0/best", "run-1e-3-1/best"],
    ("finetuning", 3): ["RUN/folds.csv"],
    ("finetuning", 4): ["RUN/results.json"],
    ("sliding-windows", 4): ["film.txt"],
    ("tpu", 2): ["RUN/best"],
    ("tpu", 5): ["run2/best", "process0.txt"],
}
ELSEWHERE = {
    ("README", 0): "test_a_fresh_install, with a network",
    ("README", 1): "these tests",
    ("demo", 0): "test_the_page_is_served, except for the installation",
    ("finetuning", 0): "test_docs.py",
    ("finetuning", 5): "by hand: needs a synthesizer and half an hour",
    ("padding", 1): "by hand: needs downloaded data and minutes",
    ("tpu", 0): "nowhere: needs a Google Cloud account",
    ("tpu", 1): "nowhere: needs a TPU",
    ("tpu", 3): "nowhere: needs several TPU hosts",
    ("tpu", 4): "the next block is the same on one machine",
    **{
        ("speed", number): "by hand: minutes each; test_benchmark.py runs small versions of most"
        for number in range(len(blocks("speed.md", "sh")))
    },
}


def runs_in_process(block):
    """Whether test_pages.py runs all commands of a block."""
    lines = block.replace("\\\n", " ").splitlines()
    piped = any(" | " in line for line in lines) or any("-" in arguments for arguments in commands(block))
    return not piped and all(line.startswith("ast-jax ") for line in lines)


QUICKER = "--epochs 1 --linear-probe --workers 0"  # for training commands


def test_every_command_runs_or_has_a_reason_not_to():
    pages = [(name, number) for name, number in ALL if name in RUN_WHOLE and name not in NOT_RUN]
    in_process = {(name, number) for name, number in pages if runs_in_process(blocks(f"{name}.md", "sh")[number])}
    assert RUN.keys() | ELSEWHERE.keys() | in_process == set(ALL)
    assert not RUN.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The example data of the fine-tuning page."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(blocks("finetuning.md", "python")[0], "finetuning.md", "exec"), {})
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for PATH: ast-jax of this tree, and stand-ins for arecord and ffmpeg that write to a pipe."""
    folder = tmp_path_factory.mktemp("programs")
    samples = np.concatenate([ast_jax.read_audio(SOUNDS / f"{name}.flac") for name in ("speech", "siren")])
    raw = (samples * 32767).astype("<i2").tobytes()
    endless = 0xFFFFFFFF  # unknown lengths
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", endless, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    note = struct.pack("<4sI4s4sI14s", b"LIST", 26, b"INFO", b"ISFT", 14, b"Lavf60.16.100\0")
    (folder / "raw").write_bytes(raw)
    (folder / "wav").write_bytes(header + note + struct.pack("<4sI", b"data", endless) + raw)
    scripts = {
        "ast-jax": f'case "$*" in finetune*) set -- "$@" {QUICKER};; esac\n'
        f'exec {sys.executable} -m ast_jax.cli.main "$@"',
        "arecord": f"exec cat {folder}/wav",
        "ffmpeg": f'case "$*" in *s16le*) exec cat {folder}/raw;; *) exec cat {folder}/wav;; esac',
    }
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def workdir(data, tmp_path, monkeypatch):
    """A working directory with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    tiny = pathlib.Path(ast_jax.__file__).parent / "models" / "sounds-tiny"
    for name, target in {
        "FILE": SOUNDS / "speech.flac", "FOLDER": SOUNDS, "DATA": data / "sounds", "sounds": data / "sounds",
        "unheard": data / "unheard", "MODEL": tiny, "M": tiny, "AUDIOSET-MODEL": tiny,
    }.items():  # fmt: skip
        pathlib.Path(name).symlink_to(target)
    config = ast_jax.PRESETS["tiny"](num_labels=527, num_hidden_layers=12)
    params = ast_jax.init(jax.random.key(0), config)
    original = ast_jax.Checkpoint(params, config, ast_jax.FrontendConfig(mean=-4.2677393, std=4.5689974))
    ast_jax.to_torch(original, "audioset_10_10_0.4593.pth", format="original")
    ast_jax.to_torch(original, "SRC", format="huggingface")
    pathlib.Path("names.txt").write_text("rain\nwind\n")
    return tmp_path


def esc50():
    """Write a data set in ESC-50's layout: five folds of three classes, four clips each."""
    rng = np.random.default_rng(0)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    audio = pathlib.Path("ESC-50-master", "audio")
    audio.mkdir(parents=True)
    for fold in range(1, 6):
        for target, category in ((0, "dog"), (7, "rooster"), (42, "siren")):
            for take in "ABCD":  # more than a batch
                name = f"{fold}-{100 + fold}-{take}-{target}.wav"
                soundfile.write(audio / name, rng.standard_normal(44100) / 8, 44100)
                lines.append(f"{name},{fold},{target},{category},True,{100 + fold},{take}")
    (audio.parent / "meta").mkdir()
    (audio.parent / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")


def environment(programs):
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "XLA_FLAGS": ONE_DEVICE}


def script_of(page, number):
    """Return a block with its placeholders replaced, and without the demo, which runs until it is stopped."""
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    text = blocks(path, "sh")[number]
    for word, names in RUN[page, number].items():
        assert word in text
        text = text.replace(word, names)
    return re.sub(r"^ast-jax demo .*\n", "", text, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), [key for key in RUN if key != ("finetuning", 2)], ids=lambda key: str(key))
def test_commands_run(page, number, workdir, programs):
    script = script_of(page, number)
    if page == "finetuning" and number == 1:
        script += script_of(page, 2)  # evaluates one of the models trained by the first block
    if "ESC-50" in script:
        esc50()
    script = f"set -euo pipefail\n{script}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(programs), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not [name for name in WRITTEN[page, number] if not (workdir / name).exists()]
    if page == "sliding-windows":
        assert "Speech" in done.stdout
        assert "Siren" in (workdir / "film.txt").read_text()


@pytest.mark.browser
@pytest.mark.parametrize("command", re.findall(r"^ast-jax (demo.*)$", "\n".join(blocks("demo.md", "sh")), re.MULTILINE))
def test_the_page_is_served(command, workdir):
    shutil.copytree("MODEL", "RUN/best")
    address = f"http://127.0.0.1:{(re.findall(r'--port (.*)', command) or ['7860'])[0]}"
    arguments = [sys.executable, "-m", "ast_jax.cli.main", *command.split()]
    env = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout.readline() == f"{address}  (Ctrl-C ends it)\n"
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert "ast_jax" in answer.read().decode()
            second = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=120)
            assert second.returncode == 1
            assert second.stderr.startswith(f"ast-jax: {address.removeprefix('http://')}: ")
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.kill()


@pytest.mark.network
def test_a_fresh_install(tmp_path):
    """The README's first command, in a clone of the repository."""
    (command,) = blocks(ROOT / "README.md", "sh")[0].splitlines()
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_", "PYTHON"))}
    done = subprocess.run(["bash", "-c", command], cwd=copy, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Speech\n", done.stdout)
