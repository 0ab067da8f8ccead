"""Griffe extension for the API reference: documentation and defaults of dataclass fields that exist at run time only.

`mkdocs.yml` loads it. Griffe reads source code, but the fields of `TrainConfig` and `ExecutionConfig` have their
defaults in calls, and their docstrings are completed from the fields' metadata.
"""

import dataclasses
import importlib
import inspect
from typing import Any

import griffe

CLASSES = ("ast_jax.training.config.TrainConfig", "ast_jax.training.config.ExecutionConfig")


class RuntimeFields(griffe.Extension):
    """Replace the docstring and the fields' defaults of `CLASSES` by those at run time."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Run before griffe's own extension derives `__init__` from the fields."""
        for path in CLASSES:
            module, name = path.rsplit(".", 1)
            runtime, found = getattr(importlib.import_module(module), name), pkg[path.removeprefix(f"{pkg.path}.")]
            found.docstring.value = inspect.cleandoc(runtime.__doc__)
            for field in dataclasses.fields(runtime):
                found[field.name].value = repr(field.default)
