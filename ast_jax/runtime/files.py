"""Files and folders that are written whole or not at all: to a neighbour first, then moved into place."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step, so that no reader and no crash ever sees half of it."""
    with whole_file(path) as name:
        name.write_text(text, encoding="utf-8")


def check_folder_of(path: str | os.PathLike[str]) -> None:
    """Refuse to begin what could not be written in the end.

    Raises:
        FileNotFoundError: the folder that `path` is to be in is not there.
    """
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield the name of a new file to fill; it takes the place of `path` when the block ends without an exception."""
    path = pathlib.Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # which names a file that nobody asked for
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    os.close(handle)
    try:
        yield pathlib.Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a new folder to fill; it takes the place of `path` when the block ends without an exception."""
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        filled = scratch / "new"
        filled.mkdir()
        yield filled
        if path.exists():
            os.replace(path, scratch / "old")
        try:
            os.replace(filled, path)
        except BaseException:
            if (scratch / "old").exists():
                os.replace(scratch / "old", path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def sole_use(folder: str | pathlib.Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for the same; a killed process lets go.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is at work in it; wait for it or stop it") from error
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        os.close(handle)


def remove_scratch(folder: str | pathlib.Path, pattern: str) -> None:
    """Remove what writers that were killed left beside the files and folders whose whole name matches `pattern`.

    Only what looks as `write_text` and `whole_folder` leave it goes: a file, or a folder with nothing but "new" and
    "old". An old folder that had been moved away for a new one that never came is put back.
    """
    folder = pathlib.Path(folder)
    for path in folder.iterdir():
        match = re.fullmatch(rf"\.({pattern})\.[a-z0-9_]{{8}}", path.name)  # tempfile's eight characters
        if not match or path.is_symlink():
            continue
        if path.is_file():
            path.unlink()
        elif path.is_dir() and {entry.name for entry in path.iterdir()} <= {"new", "old"}:
            if (path / "old").exists() and not (folder / match[1]).exists():
                os.replace(path / "old", folder / match[1])
            shutil.rmtree(path)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
