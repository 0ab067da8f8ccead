"""The packages that training needs beyond the base install."""

from __future__ import annotations

import importlib.util

PACKAGES = {"grain": "grain", "sklearn": "scikit-learn", "tensorboard": "tensorboard", "matplotlib": "matplotlib"}


def require_train_extra(what: str) -> None:
    """Check that the extra `train` is installed.

    Raises:
        ValueError: packages are missing; the message names them and the command that installs them.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise ValueError(f"{what} needs {names}; install with: pip install 'ast-jax[train]'")
