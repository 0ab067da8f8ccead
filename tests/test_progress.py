"""Progress bars: on a terminal, of what takes a while, and of everything that may."""

import threading
import time

import jax
import numpy as np
import pytest
import soundfile
from test_docs import SOUNDS

import ast_jax
from ast_jax import datasets, evaluation, listening, pictures, progress
from ast_jax.conversion import convert_to
from ast_jax.listening import End, Part


class AtOnce:
    """A timer that does not wait, in the place of `threading.Timer`."""

    daemon = False

    def __init__(self, interval, function):
        self.function = function

    def start(self):
        self.function()

    def cancel(self):
        pass


@pytest.fixture
def terminal(monkeypatch):
    """Stderr is taken for a terminal, and bars are drawn at once."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "Timer", AtOnce)


@pytest.fixture
def tiny():
    config = ast_jax.PRESETS["tiny"](num_labels=3, max_length=32, num_hidden_layers=1)
    return ast_jax.Checkpoint(ast_jax.init(jax.random.key(0), config), config, ast_jax.FrontendConfig(max_length=32))


def test_a_bar_waits(monkeypatch, capsys):
    """It is drawn by a timer, so that a single long step has one too; and never where there is no terminal."""
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    for there in ("1", ""):
        monkeypatch.setenv("FORCE_COLOR", there)
        with progress.progress("a step"):
            deadline = time.monotonic() + (60 if there else 0.5)
            while progress._Bar.screen is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert ("a step" in capsys.readouterr().err) == bool(there)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "PATIENCE", 60)
    assert list(progress.track(range(3), "quick", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.mark.usefixtures("terminal")
def test_a_bar_counts(capsys):
    with progress.progress("epoch 1/2", 3) as advance:
        advance(1)
        advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1/2" in err
    assert "2/3" in err


@pytest.mark.usefixtures("terminal")
def test_a_bar_within_a_bar_is_drawn_under_it(capsys):
    for _ in progress.track(range(2), "outer", 2):
        assert list(progress.track(range(2), "inner", 2)) == [0, 1]
    err = capsys.readouterr().err
    assert err.index("outer") < err.index("inner")
    assert progress._Bar.screen is None


@pytest.mark.usefixtures("terminal")
def test_what_is_printed_meanwhile_stands_above(capsys):
    with progress.progress("outer", 2):
        print("a message", file=progress.sys.stderr)
        print("a result")
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert "a message\n" in err


@pytest.mark.usefixtures("terminal")
def test_an_error_ends_the_bar(capsys):
    with pytest.raises(KeyboardInterrupt), progress.progress("outer", 2):
        raise KeyboardInterrupt
    assert progress._Bar.screen is None
    assert list(progress.track(range(2), "again", 2)) == [0, 1]
    assert "again" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_other_threads_draw_none(capsys):
    """As those of the demo's server, which may be many."""
    thread = threading.Thread(target=lambda: list(progress.track(range(2), "a thread's", 2)))
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_a_long_sound_says_how_far_it_is_heard(capsys):
    """Of as many seconds as its header says; the bar is gone when its result is there."""
    speech = SOUNDS / "speech.flac"
    whole = round(soundfile.info(speech).duration)
    parts = [Part(second, second + 1.0, np.zeros(2), speech) for second in range(3)]
    events = [*parts, End("speech.flac", 3.0), Part(0.0, 2.0, np.zeros(2), np.zeros(9)), End("<ndarray>", 2.0)]
    bars = []
    for end, found in listening.by_sound(events):
        assert progress._Bar.screen is None
        bars.append((end.name, len(found), capsys.readouterr().err))
    assert [bar[:2] for bar in bars] == [("speech.flac", 3), ("<ndarray>", 1)]
    assert "seconds heard" in bars[0][2]
    assert f"3/{whole}" in bars[0][2]
    assert "/" not in bars[1][2].replace("-:--:--", "")  # samples: nobody has counted them


@pytest.mark.usefixtures("terminal")
def test_all_that_may_take_long_has_one(tiny, tmp_path, capsys):
    """Beside training, evaluation and surveys of data sets, which count steps and sounds."""
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32) / 8
    soundfile.write(tmp_path / "sound.wav", sound, 16000)
    folder = tmp_path / "sounds"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        soundfile.write(folder / label / "1.wav", sound, 16000)
    shown = {}

    def bars_of(name, do):
        result = do()
        shown[name] = capsys.readouterr().err
        return result

    bars_of("init", lambda: ast_jax.init(jax.random.key(0), tiny.config))
    bars_of("read_dataset", lambda: datasets.read_dataset(folder))
    bars_of("save", lambda: ast_jax.save(tmp_path / "model", tiny))
    model = bars_of("load", lambda: ast_jax.load(tmp_path / "model"))
    bars_of("average", lambda: evaluation.average([model, model]))
    bars_of("to_torch", lambda: convert_to(tmp_path / "model", tmp_path / "hf", "huggingface"))
    bars_of("convert", lambda: convert_to(tmp_path / "hf", tmp_path / "back", check=True))
    bars_of("export", lambda: ast_jax.export(model, tmp_path / "out.stablehlo", platforms=["cpu"]))
    found = bars_of("analyze", lambda: ast_jax.analyze(tmp_path / "sound.wav", model))
    bars_of("embed", lambda: ast_jax.embed(tmp_path / "sound.wav", model))
    bars_of("explain", lambda: ast_jax.explain(tmp_path / "sound.wav", model, cells=(1, 2)))
    bars_of("picture", lambda: pictures.timeline_picture(found, model.frontend, tmp_path / "when.png", 0.5))
    expected = {
        "init": ["drawing weights"],
        "read_dataset": ["reading the data set"],
        "save": ["writing the model"],
        "load": ["reading the model"],
        "average": ["averaging"],
        "to_torch": ["reading the model", "writing the model"],
        "convert": ["conversion", "comparison", "writing the model", "reading the model"],
        "export": ["export"],
        "analyze": ["compilation", "seconds heard"],
        "embed": ["compilation", "seconds heard"],
        "explain": ["seconds heard", "scores", "rollout and saliency", "occlusion"],
        "picture": ["spectrogram"],
    }
    missing = {name: [title for title in titles if title not in shown[name]] for name, titles in expected.items()}
    assert not {name: titles for name, titles in missing.items() if titles}
