"""Atomic writes of files and folders: to a temporary neighbour first, then renamed; and a lock on a folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically: neither a reader nor a crash leaves half of it."""
    with atomic_file(path) as name:
        name.write_text(text, encoding="utf-8")


def check_folder_of(path: str | os.PathLike[str]) -> None:
    """Check before long work that its output can be written.

    Raises:
        FileNotFoundError: the parent folder of `path` does not exist.
    """
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield the path of a temporary file; it replaces `path` when the block ends without an exception."""
    path = pathlib.Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # it names the temporary file
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
def atomic_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary folder; it replaces `path` when the block ends without an exception."""
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
def exclusive_lock(folder: str | pathlib.Path) -> Iterator[None]:
    """Lock a folder against other processes; the lock ends with the process.

    Systems and file systems without locks are not protected.

    Raises:
        ValueError: another process holds the lock.
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
            raise ValueError(f"{folder}: another process is using it; wait for it or stop it") from error
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        os.close(handle)


def remove_scratch(folder: str | pathlib.Path, pattern: str) -> None:
    """Remove temporary files and folders of killed writers, of targets whose full name matches `pattern`.

    Only entries in the form of `write_text` and `atomic_folder` are removed: a file, or a folder that contains nothing
    but "new" and "old". An old folder that was moved away without its replacement in place is restored.
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
    """Return the process's umask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
