"""From a name to a path: a local folder or file, a shipped model, or a download from the Hub."""

from __future__ import annotations

import os
import pathlib

from ast_jax.checkpoints.tree import CheckpointError

FORMAT_FILE = "ast_jax.json"
SHIPPED = pathlib.Path(__file__).parents[1] / "models"


def shipped_models() -> list[str]:
    """Return the names of the models in this package."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / FORMAT_FILE).is_file()) if SHIPPED.is_dir() else []


def is_own(path: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint folder of this package."""
    return (path / FORMAT_FILE).is_file()


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a local folder or file, of a shipped model, or of the download of a Hub id.

    Raises:
        CheckpointError: none of these.
        ConnectionError: a Hub id, and the Hub cannot be reached.
    """
    path = pathlib.Path(source)
    if path.is_dir() or path.is_file():
        return path
    name = os.fspath(source)
    if name in shipped_models():
        return SHIPPED / name
    if name.count("/") == 1 and not name.startswith(("/", "./", "../", "~")) and not path.exists():
        from ast_jax.checkpoints.hub import download

        return download(name)
    raise CheckpointError(
        f"{name}: expected a shipped model ({', '.join(shipped_models()) or 'none'}), "
        "a checkpoint folder, PyTorch weights or a Hub id like owner/name, got none of these"
    )
