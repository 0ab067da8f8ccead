"""Progress bars: what a terminal shows, and which command draws which bars."""

import contextlib
import gc
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pyte
import pytest
import rich.progress
import soundfile
from command_line import ONE_DEVICE
from pages import SOUNDS

import ast_jax
from ast_jax.audio.streams import Live
from ast_jax.checkpoints.pytorch.pipeline import convert_to
from ast_jax.cli.main import app
from ast_jax.cli.results import FileProgress, header_duration
from ast_jax.data import datasets
from ast_jax.inference.sliding_window import WindowOutput
from ast_jax.runtime.progress import hidden_bars, progress_display, step, track

SCRIPT = """
import os, sys
from ast_jax.runtime.progress import hidden_bars, progress_display, step, track
"""
CLI = "import sys; from ast_jax.cli.main import app; app(sys.argv[1:])\n"


class Terminal:
    """A terminal of 300 columns, and a Python script that runs in it."""

    def __init__(self, code, *arguments, **streams):
        self.screen = pyte.Screen(300, 30)
        self.stream = pyte.ByteStream(self.screen)
        self.seen, self.lock = b"", threading.Lock()
        self.master, self.slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "300", "LINES": "30", "XLA_FLAGS": ONE_DEVICE}
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


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """Take a stream for stderr that is a terminal, on which no bar must be left."""
    stream = FakeTerminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        yield stream
    screen = pyte.Screen(80, 24)
    screen.set_mode(pyte.modes.LNM)  # a line feed returns the carriage, as terminals have it
    pyte.Stream(screen).feed(stream.getvalue())
    assert "━" not in "".join(screen.display)


class Opened(list):
    """Descriptions of the tasks that were added, and what they were added to."""

    bars = None

    def tasks(self):
        """Return the open tasks: description, count and total."""
        return [(task.description, task.completed, task.total) for task in self.bars.tasks] if self.bars else []


@pytest.fixture
def opened(monkeypatch):
    opened, add_task = Opened(), rich.progress.Progress.add_task

    def record(self, description, **options):
        opened.append(description)
        opened.bars = self
        return add_task(self, description, **options)

    monkeypatch.setattr(rich.progress.Progress, "add_task", record)
    yield opened
    assert opened.tasks() == []


@pytest.fixture
def tiny():
    config = ast_jax.PRESETS["tiny"](num_labels=3, max_length=32, num_hidden_layers=1)
    return ast_jax.Checkpoint(ast_jax.init(jax.random.key(0), config), config, ast_jax.FrontendConfig(max_length=32))


def names_of(lines):
    return [line.split(" ")[0] for line in lines]


def test_bars_stand_under_each_other_and_what_is_printed_above():
    script = f"""{SCRIPT}
print("before")
with progress_display():
    with step("outer", 3) as advance:
        advance(1)
        input()
        with step("[red]inner[/red]"):
            input()
        with hidden_bars():
            print("a result")
            print("a\\tmessage " + 250 * "x", file=sys.stderr)
        advance(1)
        input()
    print("after the bar")
print("after")
"""
    terminal = Terminal(script)
    terminal.go_on_when(lambda lines: names_of(lines) == ["before", "outer"] and " 1/3 " in lines[1])
    terminal.go_on_when(lambda lines: names_of(lines) == ["before", "outer", "[red]inner[/red]"])
    printed = ["before", "a result", f"a       message {250 * 'x'}"]
    terminal.go_on_when(lambda lines: lines[:3] == printed and names_of(lines[3:]) == ["outer"] and " 2/3 " in lines[3])
    status, lines = terminal.end()
    assert (status, lines) == (0, [*printed, "after the bar", "after"])
    assert b"?25l" not in terminal.seen  # the cursor stays: a process that is killed could not show it again


def test_several_bars_return_below_what_is_printed():
    """Without erasing it."""
    script = f"""{SCRIPT}
with progress_display(), step("outer"), step("inner"):
    input()
    for number in range(20):
        with hidden_bars():
            print("result", number)
    input()
"""
    terminal = Terminal(script)
    terminal.go_on_when(lambda lines: names_of(lines) == ["outer", "inner"])
    results = [f"result {number}" for number in range(20)]
    terminal.go_on_when(lambda lines: lines[:20] == results and names_of(lines[20:]) == ["outer", "inner"])
    assert terminal.end() == (0, results)


def test_without_a_display_nothing_is_drawn():
    """As for those who call the library."""
    terminal = Terminal(f"{SCRIPT}\nfor _ in track(range(3), 'items', 3): input()")
    for _ in range(3):
        terminal.go_on_when(lambda lines: not lines)
    assert terminal.end() == (0, [])
    assert terminal.seen == b""


def test_an_error_erases_the_bars():
    terminal = Terminal(
        f"{SCRIPT}\nwith progress_display(), step('outer'), step('inner'):\n    input()\n    raise SystemExit(3)"
    )
    terminal.go_on_when(lambda lines: names_of(lines) == ["outer", "inner"])
    assert terminal.end() == (3, [])


def test_ctrl_c_erases_the_bars():
    script = f"""{SCRIPT}
import time
from ast_jax.cli.common import user_errors
with user_errors():
    for _ in track(range(3), "items", 3):
        time.sleep(60)
"""
    terminal = Terminal(script)
    terminal.go_on_when(lambda lines: names_of(lines) == ["items"])
    for _ in range(5):  # one in a destructor is lost: `main`, which this script does not call, sends it again
        terminal.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(timeout=15)
            break
    status, lines = terminal.end()
    assert status != 0
    assert lines[0] == "ast-jax: stopped"
    assert "items" not in names_of(lines)


def test_a_fork_draws_nothing():
    """Nor waits for the lock of a thread that only its parent has."""
    script = f"""{SCRIPT}
with progress_display(), step("outer"):
    for number in range(20):
        child = os.fork()
        if not child:
            for _ in track(range(3), "forked", 3):
                with hidden_bars():
                    pass
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    input()
"""
    terminal = Terminal(script)
    terminal.go_on_when(lambda lines: names_of(lines) == ["outer"])
    assert terminal.end() == (0, [])
    assert b"forked" not in terminal.seen


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
    assert b"sounds" in terminal.seen
    assert [json.loads(line)["file"] for line in lines if line[0] == "{"] == [str(files[0]), str(files[2])]
    assert len(lines) == 3
    assert lines[1].startswith(f"ast-jax: {files[1]}: ")


def test_bars_are_not_among_the_results(files, tmp_path):
    """Neither on stdout, where that is no terminal, nor on stderr where that is none."""
    plain = subprocess.run(
        [sys.executable, "-c", CLI, "classify", *files],
        capture_output=True,
        env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
    )
    terminal = Terminal(CLI, "classify", *files, stdout=subprocess.PIPE)
    assert terminal.process.stdout.read() == plain.stdout
    status, lines = terminal.end()
    assert status == plain.returncode == 1
    assert b"sounds" in terminal.seen
    assert lines == plain.stderr.decode().splitlines()
    assert len(lines) == 1


def test_messages_stand_above_the_bar(files, tmp_path):
    terminal = Terminal(CLI, "embed", *files, "-o", tmp_path / "e.npz")
    status, lines = terminal.end()
    assert status == 1
    assert re.search(r"sounds .*━.*[01]/3", terminal.seen.decode())
    assert len(lines) == 2
    assert lines[0].startswith(f"ast-jax: {files[1]}: ")
    assert lines[1] == f"{tmp_path / 'e.npz'}: embeddings of 2 files"


class NoTerminal:
    """What can be written to, and nothing else."""

    def write(self, text):
        pass

    def flush(self):
        pass


@pytest.mark.parametrize("stderr", [None, NoTerminal()], ids=["none", "only written to"])
def test_without_a_stderr(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_display():
        assert list(track(range(3), "three", 3)) == [0, 1, 2]


def test_with_a_stderr_that_is_closed():
    closed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.stderr.close()\n{CLI}", "classify", SOUNDS / "speech.flac", "-k", "1"],
        stdout=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
    )  # fmt: skip
    assert closed.returncode == 0
    assert b"Speech" in closed.stdout


def test_a_stderr_that_is_closed_meanwhile(monkeypatch):
    """As when the terminal is gone."""
    gone = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", gone)
    with progress_display(), step("a step"):
        gone.close()
        with hidden_bars():
            pass
        assert list(track(range(3), "three", 3)) == [0, 1, 2]


def test_bars_that_the_garbage_collector_closes_stop_nothing():
    """It may do so while rich holds a lock that the drawing thread waits for, in either thread."""
    with terminal() as stream, progress_display():
        for number in range(200):
            abandoned = [track(range(3), f"bar {number}", 3)]
            next(abandoned[0])
            abandoned.append(abandoned)
            with hidden_bars():
                pass
        del abandoned
        gc.collect()
    assert "bar 1" in stream.getvalue()


def test_streams_are_left_as_they_are():
    """So that code that redirects them meanwhile gets them back."""
    with terminal() as stream:
        out = sys.stdout
        with progress_display(), contextlib.redirect_stderr(io.StringIO()) as other, step("a step"):
            assert sys.stdout is out
            assert sys.stderr is other
        assert (sys.stderr, sys.stdout) == (stream, out)
    assert "a step" in stream.getvalue()
    assert other.getvalue() == ""


def test_a_display_within_another_is_the_same(opened):
    with terminal():
        with progress_display(), step("outer"):
            bars = opened.bars
            with progress_display(), step("inner"):
                assert opened.bars is bars
            assert opened.tasks() == [("outer", 0, None)]
        with step("afterwards"):
            assert opened == ["outer", "inner"]


def test_other_threads_have_none(opened):
    """As those that decode, which are many."""
    with terminal(), progress_display():
        thread = threading.Thread(target=lambda: list(track(range(2), "a thread's", 2)))
        thread.start()
        thread.join()
        assert list(track(range(2), "ours", 2)) == [0, 1]
    assert opened == ["ours"]


def test_a_long_file_has_a_bar_of_its_seconds(opened):
    """Of as many as its header says."""
    speech = SOUNDS / "speech.flac"
    files = FileProgress()
    seconds = []

    def results():
        for second in range(3):
            files.on_window(WindowOutput(second, second + 1.0, np.zeros(2), speech))
            seconds.append(opened.tasks()[1:])
        yield "speech.flac"
        files.on_window(WindowOutput(0.0, 2.0, np.zeros(2), np.zeros(9)))
        seconds.append(opened.tasks()[1:])
        yield "array"

    with terminal(), progress_display():
        for done, _ in enumerate(files.track(results(), 2)):
            assert opened.tasks() == [("sounds", done, 2)]  # results are printed now
    whole = soundfile.info(speech).duration
    assert seconds == [*([("seconds", done, whole)] for done in (1, 2, 3)), []]


def test_a_pipe_has_no_bar(opened, tiny):
    """Its windows are printed as they come, and its length is not known; nor is a named pipe opened again."""
    there, here = os.pipe()
    os.write(here, (np.random.default_rng(0).standard_normal(16000) * 1000).astype("<i2").tobytes())
    os.close(here)
    with terminal(), progress_display():
        (found,) = ast_jax.analyze_each(Live(there, "s16le"), tiny)
    os.close(there)
    assert len(found.times) > 1
    assert opened == []


def test_the_length_of_a_named_pipe_is_not_asked_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert header_duration(tmp_path / "pipe") is None


@pytest.fixture
def folder(tmp_path):
    """A data set of two labels with four sounds each: one batch of a sound a device."""
    folder = tmp_path / "sounds"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for number in range(4):
            sound = np.random.default_rng([ord(label), number]).standard_normal(80000) / 8
            soundfile.write(folder / label / f"{number}.wav", sound, 16000)
    return folder


def test_the_library_draws_no_single_step(opened, tiny, folder, tmp_path):
    """Even within a display: the command names what it waits for."""
    with terminal(), progress_display():
        ast_jax.init(jax.random.key(0), tiny.config)
        datasets.read_dataset(folder)
        ast_jax.save(tmp_path / "model", tiny)
        ast_jax.load(tmp_path / "model")
        convert_to(tmp_path / "model", tmp_path / "hf", "huggingface", check=True)
        ast_jax.export(tiny, tmp_path / "out.stablehlo", platforms=["cpu"])
    assert opened == []


@pytest.fixture
def drawn_by(opened):
    """Run a command line and return the descriptions of its bars."""

    def run(*arguments):
        opened.clear()
        with terminal(), contextlib.suppress(SystemExit):
            app([*map(str, arguments)], standalone_mode=False)
        return list(dict.fromkeys(opened))

    return run


@pytest.mark.usefixtures("quick_compilation")
def test_every_command_that_may_take_long_draws_a_bar(drawn_by, tiny, folder, tmp_path, capsys):
    """Beside the two below."""
    model, sound = tmp_path / "model", folder / "a" / "0.wav"
    ast_jax.save(model, tiny)
    windows = ["loading the model", "sounds", "seconds"]
    assert drawn_by("classify", sound, "-m", model) == windows
    when = drawn_by("classify", sound, "-m", model, "--picture", tmp_path / "when.png")
    assert when == [*windows, "drawing the picture", "spectrogram"]
    assert drawn_by("embed", sound, "-m", model, "-o", tmp_path / "e.npz") == windows
    why = drawn_by("explain", sound, "-m", model, "-o", tmp_path / "why.png", "--cells", 1, 16)
    assert why == ["loading the model", "explaining", "drawing the picture"]
    assert drawn_by("convert", model, tmp_path / "hf", "--to", "huggingface") == ["converting"]
    assert drawn_by("info", model) == ["loading the model"]
    assert drawn_by("export", model, tmp_path / "out.stablehlo", "--platforms", "cpu") == ["exporting"]
    assert drawn_by("average", model, model, "-o", tmp_path / "mean") == ["loading models", "averaging"]
    assert drawn_by("check-data", folder) == ["reading the data set", "sounds"]
    assert drawn_by("stats", folder) == ["reading the data set", "features"]
    out, _ = capsys.readouterr()
    assert "━" not in out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_training_and_evaluation_draw_bars(drawn_by, tiny, folder, tmp_path):
    ast_jax.save(tmp_path / "model", tiny)
    options = ("--init", tmp_path / "model", "--validation-data", folder, "--batch-size", 8, "--epochs", 1)
    trained = drawn_by("finetune", folder, "-o", tmp_path / "run", *options)
    assert trained == ["fine-tuning", "epoch 1/1", "evaluation batches", "metrics by class"]
    measured = drawn_by("evaluate", tmp_path / "run", folder, "--split", "all")
    assert measured == ["evaluating", "evaluation batches", "metrics by class"]
