"""Files and folders are there whole or as they were, and nothing is left beside them."""

import os
import stat

import pytest

from ast_jax.runtime.files import atomic_folder, remove_scratch, write_text


class Interrupted(BaseException):
    """Stands for Ctrl-C, which is no `Exception`."""


def interrupt(*_):
    raise Interrupted


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_text_writes_and_replaces(tmp_path):
    path = tmp_path / "config.json"
    write_text(path, "first, and longer than the second\n")
    write_text(str(path), "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    assert names(tmp_path) == ["config.json"]


def test_write_text_has_the_permissions_of_any_new_file(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("step", ["chmod", "replace"])
def test_write_text_interrupted_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "config.json"
    write_text(path, "old")
    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(Interrupted):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["config.json"]


def test_write_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "a lone surrogate: \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["config.json"]


def test_write_text_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "config.json", "new")
    assert names(tmp_path) == []


def fill(folder, content):
    (folder / "inner").mkdir()
    (folder / "inner" / "params").write_text(content)


def test_whole_folder_appears_at_the_end_with_its_parents(tmp_path):
    path = tmp_path / "runs" / "best"
    with atomic_folder(path) as folder:
        fill(folder, "new")
        assert not path.exists()
    assert (path / "inner" / "params").read_text() == "new"
    assert names(path.parent) == ["best"]


def test_whole_folder_replaces_a_folder_whole(tmp_path):
    path = tmp_path / "best"
    path.mkdir()
    (path / "only in the old one").write_text("old")
    with atomic_folder(path) as folder:
        fill(folder, "new")
        assert names(path) == ["only in the old one"]
    assert names(path) == ["inner"]
    assert names(tmp_path) == ["best"]


def test_whole_folder_is_relative_to_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with atomic_folder("best") as folder:
        fill(folder, "new")
        os.chdir("elsewhere")
    assert names(tmp_path) == ["best", "elsewhere"]


def fill_half(path, error):
    with atomic_folder(path) as folder:
        fill(folder, "half")
        raise error


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_interrupted_atomic_folder_keeps_the_old_content(tmp_path, error):
    path = tmp_path / "best"
    with pytest.raises(error):
        fill_half(path, error)
    assert names(tmp_path) == []
    with atomic_folder(path) as folder:
        fill(folder, "old")
    with pytest.raises(error):
        fill_half(path, error)
    assert (path / "inner" / "params").read_text() == "old"
    assert names(tmp_path) == ["best"]


def test_atomic_folder_restores_the_old_one_if_the_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "best"
    with atomic_folder(path) as folder:
        fill(folder, "old")
    replace = os.replace

    def refuse_new(source, target):
        if source.name == "new":
            raise Interrupted
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(Interrupted), atomic_folder(path) as folder:
        fill(folder, "new")
    assert (path / "inner" / "params").read_text() == "old"
    assert names(tmp_path) == ["best"]


def test_remove_scratch_removes_only_temporary_files_of_killed_writers(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # what a kill leaves: nothing is cleaned up
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
    with pytest.raises(Interrupted):
        fill_half(tmp_path / "best", Interrupted)
    with atomic_folder(tmp_path / "best") as folder:
        fill(folder, "old")
    replace = os.replace
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(Interrupted):
        write_text(tmp_path / "run.json", "half")
    monkeypatch.undo()
    (tmp_path / ".best.moved_0x").mkdir()
    replace(tmp_path / "best", tmp_path / ".best.moved_0x" / "old")
    others = [".best.abcd1234", ".best.12", ".notes.abcd1234", "best.abcd1234"]
    for name in others:
        (tmp_path / name / "mine").mkdir(parents=True)
    assert len(names(tmp_path)) == 4 + len(others)
    remove_scratch(tmp_path, r"best|run\.json")
    assert names(tmp_path) == sorted(["best", *others])
    assert (tmp_path / "best" / "inner" / "params").read_text() == "old"
