"""Progress bars: on a terminal, of what takes a while, one at a time."""

import pytest

from ast_jax import progress


def shown(capsys, patience, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    with progress.progress("epoch 1/2", 3) as advance:
        advance(1)
        advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_bar_is_for_terminals_and_for_what_takes_a_while(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    err = shown(capsys, 0, monkeypatch)
    assert "epoch 1/2" in err
    assert "2/3" in err
    assert shown(capsys, 60, monkeypatch) == ""
    monkeypatch.setenv("FORCE_COLOR", "")
    assert shown(capsys, 0, monkeypatch) == ""


def test_a_bar_within_a_bar_is_not_drawn(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    for _ in progress.track(range(2), "outer", 2):
        assert list(progress.track(range(2), "inner", 2)) == [0, 1]
    err = capsys.readouterr().err
    assert "outer" in err
    assert "inner" not in err


def test_an_error_ends_the_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(KeyboardInterrupt), progress.progress("outer", 2):
        raise KeyboardInterrupt
    monkeypatch.setattr(progress, "PATIENCE", 0)
    assert list(progress.track(range(2), "again", 2)) == [0, 1]
    assert "again" in capsys.readouterr().err
