"""Progress bars: what a terminal shows, of what takes a while, and of everything that may."""

import contextlib
import gc
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pyte
import pytest
import soundfile
from pages import SOUNDS

import ast_jax
from ast_jax.audio.streams import Live
from ast_jax.checkpoints.pytorch.pipeline import convert_to
from ast_jax.data import datasets
from ast_jax.inference import pictures, sliding_window
from ast_jax.inference.sliding_window import End, Part
from ast_jax.runtime import progress
from ast_jax.training import evaluate

AT_ONCE = "import rich.live, rich.progress; from ast_jax import progress; progress.PATIENCE, progress.TICK = 0, 0.01\n"
CLI = AT_ONCE + "import sys; from ast_jax.cli.main import app; app(sys.argv[1:])\n"


class Terminal:
    """A terminal of 300 columns, and a Python script that runs in it."""

    def __init__(self, code, *arguments, **streams):
        self.screen = pyte.Screen(300, 30)
        self.stream = pyte.ByteStream(self.screen)
        self.seen, self.lock = b"", threading.Lock()
        self.master, self.slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "300", "LINES": "30", "XLA_FLAGS": ""}
        streams = {"stdin": subprocess.PIPE, "stdout": self.slave, "stderr": self.slave, **streams}
        self.process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, **streams)
        os.close(self.slave)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self.master, 1 << 16):
                with self.lock:
                    self.seen += data
                    self.stream.feed(data)

    def lines(self):
        with self.lock:
            return [line.rstrip() for line in self.screen.display if line.strip()]

    def go_on_when(self, wanted):
        """Wait until the screen is as wanted, and have the script go on."""
        deadline = time.monotonic() + 60
        while not wanted(self.lines()):
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.02)
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self):
        """Return the status and the screen in the end."""
        status = self.process.wait(timeout=120)
        self.reader.join(timeout=30)
        os.close(self.master)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status, self.lines()


@pytest.fixture
def opened(monkeypatch):
    """Stderr is taken for a terminal; the titles of bars that were opened, while none is drawn."""
    titles = []
    monkeypatch.setattr(progress, "_is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "_wake_up", lambda: titles.append(progress._open[-1].title))
    yield titles
    assert progress._open == []


@pytest.fixture
def tiny():
    config = ast_jax.PRESETS["tiny"](num_labels=3, max_length=32, num_hidden_layers=1)
    return ast_jax.Checkpoint(ast_jax.init(jax.random.key(0), config), config, ast_jax.FrontendConfig(max_length=32))


def names_of(lines):
    return [line.split(" ")[0] for line in lines]


def test_bars_stand_under_each_other_and_what_is_printed_above():
    script = f"""{AT_ONCE}
print("before")
with progress.progress("outer", 3) as advance:
    advance(1)
    input()
    with progress.progress("[red]inner[/red]"):
        input()
    with progress.aside():
        print("a result")
        print("a\\tmessage " + 250 * "x", file=sys.stderr)
    advance(1)
    input()
print("after")
"""
    terminal = Terminal("import sys\n" + script)
    terminal.go_on_when(lambda lines: names_of(lines) == ["before", "outer"] and " 1/3 " in lines[1])
    terminal.go_on_when(lambda lines: names_of(lines) == ["before", "outer", "[red]inner[/red]"])
    printed = ["before", "a result", f"a       message {250 * 'x'}"]
    terminal.go_on_when(lambda lines: lines[:3] == printed and names_of(lines[3:]) == ["outer"] and " 2/3 " in lines[3])
    status, lines = terminal.end()
    assert (status, lines) == (0, [*printed, "after"])
    assert b"?25l" not in terminal.seen  # the cursor stays: one who is killed could not bring it back


def test_what_is_over_soon_has_none():
    terminal = Terminal("from ast_jax import progress\nfor _ in progress.track(range(3), 'quick', 3): input()")
    for _ in range(3):
        terminal.go_on_when(lambda lines: not lines)
    assert terminal.end() == (0, [])
    assert terminal.seen == b""


def test_an_error_takes_the_bars_away():
    terminal = Terminal(
        f"{AT_ONCE}\nwith progress.progress('outer'), progress.progress('inner'):\n    input()\n    raise SystemExit(3)"
    )
    terminal.go_on_when(lambda lines: names_of(lines) == ["outer", "inner"])
    assert terminal.end() == (3, [])


@pytest.fixture
def files(tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    long = np.concatenate([ast_jax.read_audio(SOUNDS / "speech.flac")] * 12)
    soundfile.write(tmp_path / "[red]long.wav", long, 16000)
    return [tmp_path / "[red]long.wav", tmp_path / "bad.wav", SOUNDS / "siren.flac"]


def test_results_on_a_terminal_are_whole(files):
    terminal = Terminal(CLI, "classify", *files, "--json", "-k", "1", "--threshold", "2")
    status, lines = terminal.end()
    assert status == 1
    assert b"seconds heard" in terminal.seen
    assert [json.loads(line)["file"] for line in lines if line[0] == "{"] == [str(files[0]), str(files[2])]
    assert len(lines) == 3
    assert lines[1].startswith(f"ast-jax: {files[1]}: ")


def test_bars_are_not_among_the_results(files, tmp_path):
    """Neither on stdout, where that is no terminal, nor on stderr where that is none."""
    plain = subprocess.run(
        [sys.executable, "-c", CLI, "classify", *files], capture_output=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    terminal = Terminal(CLI, "classify", *files, stdout=subprocess.PIPE)
    assert terminal.process.stdout.read() == plain.stdout
    status, lines = terminal.end()
    assert status == plain.returncode == 1
    assert b"seconds heard" in terminal.seen
    assert lines == plain.stderr.decode().splitlines()
    assert len(lines) == 1


def test_messages_stand_above_the_bar(files, tmp_path):
    terminal = Terminal(CLI, "embed", *files, "-o", tmp_path / "e.npz")
    status, lines = terminal.end()
    assert status == 1
    assert re.search(r"sounds +\S+━.* [01]/3 ", terminal.seen.decode())
    assert len(lines) == 2
    assert lines[0].startswith(f"ast-jax: {files[1]}: ")
    assert lines[1] == f"{tmp_path / 'e.npz'}: the vectors of 2 sounds"


class NoTerminal:
    """What can be written to, and nothing else."""

    def write(self, text):
        pass

    def flush(self):
        pass


@pytest.mark.parametrize("stderr", [None, NoTerminal()], ids=["none", "only written to"])
def test_without_a_stderr(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(progress.track(range(3), "three", 3)) == [0, 1, 2]


def test_with_a_stderr_that_is_closed():
    closed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.stderr.close()\n{CLI}", "classify", SOUNDS / "speech.flac", "-k", "1"],
        stdout=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert closed.returncode == 0
    assert b"Speech" in closed.stdout


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_that_the_garbage_collector_closes_stop_nothing(monkeypatch):
    """It may do so in the thread that draws, too, in the middle of drawing."""
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(progress, "TICK", 0.001)
    began = time.monotonic()
    for number in range(200):
        abandoned = [progress.track(range(3), f"bar {number}", 3)]
        next(abandoned[0])
        abandoned.append(abandoned)
        time.sleep(0.002)
    del abandoned
    while progress._open and time.monotonic() - began < 60:  # the other thread may be collecting
        gc.collect()
    assert progress._open == []
    assert "bar 1" in sys.stderr.getvalue()


def test_streams_are_left_as_they_are(monkeypatch):
    """So that one who redirects them meanwhile gets them back."""
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    before, out = sys.stderr, sys.stdout
    with progress.progress("a step"), contextlib.redirect_stderr(io.StringIO()) as other:
        deadline = time.monotonic() + 60
        while "a step" not in before.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (sys.stderr, sys.stdout) == (before, out)
    assert "a step" in before.getvalue()
    assert other.getvalue() == ""


def test_other_threads_have_none(opened):
    """As those of the demo's server, which may be many."""
    thread = threading.Thread(target=lambda: list(progress.track(range(2), "a thread's", 2)))
    thread.start()
    thread.join()
    assert list(progress.track(range(2), "ours", 2)) == [0, 1]
    assert list(progress.track(range(1), "a single one", 1)) == [0]
    assert opened == ["ours"]


def test_a_sound_says_how_far_it_is_heard(opened):
    """Of as many seconds as its header says, where it is a file."""
    speech = SOUNDS / "speech.flac"
    parts = [Part(second, second + 1.0, np.zeros(2), speech) for second in range(3)]
    counts = []

    def events():
        for event in [*parts, End("speech.flac", 3.0), Part(0.0, 2.0, np.zeros(2), np.zeros(9)), End("array", 2.0)]:
            (bar,) = progress._open
            counts.append((bar.done, bar.total()))
            yield event

    for _ in sliding_window.by_sound(events()):
        assert progress._open == []  # what is printed now has the terminal for itself
    whole = soundfile.info(speech).duration
    assert counts == [(0, None), (1, whole), (2, whole), (3, whole), (0, None), (2, None)]


def test_a_pipe_that_is_heard_has_none(opened, tiny):
    """Its windows are printed as they come, and nobody knows how long it is; nor is a named pipe opened once more."""
    there, here = os.pipe()
    os.write(here, (np.random.default_rng(0).standard_normal(16000) * 1000).astype("<i2").tobytes())
    os.close(here)
    opened.clear()
    (found,) = ast_jax.analyze_each(Live(there, "s16le"), tiny)
    os.close(there)
    assert len(found.times) > 1
    assert set(opened) == {"compilation"}


def test_the_length_of_a_named_pipe_is_not_asked_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert sliding_window._seconds(Part(0.0, 1.0, np.zeros(2), tmp_path / "pipe")) is None


@pytest.mark.usefixtures("quick_compilation")
def test_all_that_may_take_long_has_one(opened, tiny, tmp_path):
    """Beside training, evaluation and surveys of data sets, which count steps and sounds."""
    sound = np.random.default_rng(0).standard_normal(80000).astype(np.float32) / 8
    folder = tmp_path / "sounds"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        soundfile.write(folder / label / "1.wav", sound, 16000)

    def titles(do):
        opened.clear()
        result = do()
        return list(dict.fromkeys(opened)), result

    assert titles(lambda: ast_jax.init(jax.random.key(0), tiny.config))[0] == ["drawing weights"]
    assert titles(lambda: datasets.read_dataset(folder))[0] == ["reading the data set"]
    assert titles(lambda: ast_jax.save(tmp_path / "model", tiny))[0] == ["writing the model"]
    found, model = titles(lambda: ast_jax.load(tmp_path / "model"))
    assert found == ["reading the model"]
    assert titles(lambda: evaluate.average([model, model]))[0] == ["averaging"]
    assert titles(lambda: convert_to(tmp_path / "model", tmp_path / "hf", "huggingface"))[0] == [
        "conversion", "reading the model", "writing the model",
    ]  # fmt: skip
    assert titles(lambda: convert_to(tmp_path / "hf", tmp_path / "back", check=True))[0] == [
        "conversion", "reading weights", "comparison", "writing the model", "reading the model",
    ]  # fmt: skip
    assert titles(lambda: ast_jax.export(model, tmp_path / "out.stablehlo", platforms=["cpu"]))[0] == ["export"]
    source = folder / "a" / "1.wav"
    heard = ["seconds heard", "compilation"]
    found, analysis = titles(lambda: ast_jax.analyze(source, model))
    assert found == heard
    assert titles(lambda: ast_jax.embed(source, model))[0] == heard
    found, _ = titles(lambda: ast_jax.explain(source, model, cells=(1, 16)))
    assert found == ["explanation", *heard, "scores", "rollout and saliency", "occlusion"]
    found, _ = titles(lambda: pictures.timeline_picture(analysis, model.frontend, tmp_path / "when.png", 0.5))
    assert found == ["spectrogram"]
