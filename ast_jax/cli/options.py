"""Command-line options made from the fields of a configuration dataclass, and those that several commands share."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Annotated, Any

import typer
import typer.main

from ast_jax.cli.common import GroupedCommand

DATA_HELP = (
    "A folder per class; a manifest (CSV, TSV, JSONL: path, label, and split, start, end); the original's JSON; "
    "ESC-50 or Speech Commands as downloaded; a folder that Hugging Face's datasets saved."
)
ValidationData = Annotated[
    pathlib.Path | None, typer.Option("--validation-data", help="Validation split: another data set of any layout.")
]
TestData = Annotated[
    pathlib.Path | None, typer.Option("--test-data", help="Test split: another data set of any layout.")
]
LabelFile = Annotated[
    pathlib.Path | None,
    typer.Option("--labels", help="File that fixes names and order of labels; for the original's JSON its label CSV."),
]
Fold = Annotated[str | None, typer.Option("--fold", help="Cross-validation fold to validate on.")]


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Several processes of one run, which meet through `jax.distributed`."""

    distributed: bool = dataclasses.field(
        default=False, metadata={"help": "multi-host run whose processes find each other (TPU pod, SLURM)"}
    )
    coordinator: str | None = dataclasses.field(
        default=None, metadata={"help": "multi-host run: HOST:PORT of the first process"}
    )
    num_processes: int | None = dataclasses.field(
        default=None, metadata={"help": "multi-host run: number of processes, with --coordinator"}
    )
    process_id: int | None = dataclasses.field(
        default=None, metadata={"help": "multi-host run: number of this process, from 0, with --coordinator"}
    )


SPELLED = {
    "num_workers": "--workers", "validation": "--validation-data", "test": "--test-data", "label_file": "--labels",
}  # fmt: skip
ALIASES = {"learning_rate": ["--lr"]}
DEFAULTS = {"num_workers": "half of the cores"}  # on the command line; the library's default is its own


def command_with(*configs: type[Any]) -> type[GroupedCommand]:
    """Return a class of commands with an option for every field of some dataclasses; `given` reads them."""

    class ConfiguredCommand(GroupedCommand):
        """A command whose further options are the fields of dataclasses."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for config in configs:
                self.params += _options(config)

    return ConfiguredCommand


def given(context: typer.Context, config: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that were given on the command line, by name."""
    return dict(context.meta.get(_key(config), {}))


def words(values: dict[str, Any]) -> list[str]:
    """Return fields as the words of a command line."""
    found = []
    for name, value in values.items():
        option = option_name(name)
        if isinstance(value, bool):
            found.append(option if value else f"--no-{option[2:]}")
        else:
            found += [option, str(value)]
    return found


def option_name(field: str) -> str:
    """Return the option of a field."""
    return SPELLED.get(field, f"--{field.replace('_', '-')}")


def _key(config: type[Any]) -> str:
    return f"{__name__}.{config.__name__}"


def _options(config: type[Any]) -> list[Any]:
    """Return an option for each field of a dataclass, made by typer from a dataclass of optional fields."""
    hints = typing.get_type_hints(config)
    fields = [
        (field.name, Annotated[hints[field.name] | None, _info(config, field, hints[field.name] is bool)], None)
        for field in dataclasses.fields(config)
    ]
    app = typer.Typer(add_completion=False)
    app.command()(dataclasses.make_dataclass(f"{config.__name__}Options", fields))
    return typer.main.get_command(app).params


def _info(config: type[Any], field: dataclasses.Field[Any], is_flag: bool) -> Any:
    """Return the option of a field: its help comes from the field's metadata, its value goes to `given`."""
    name = option_name(field.name)
    names = [f"{name}/--no-{name[2:]}" if is_flag and config is not HostsConfig else name, *ALIASES.get(field.name, [])]
    default = ("on" if field.default else "off") if is_flag else DEFAULTS.get(field.name, field.default)
    shown = "" if default is None or config is HostsConfig else f" [default: {default}]"
    text = field.metadata["help"]

    def store(context: typer.Context, value: Any) -> Any:
        if value is not None:
            context.meta.setdefault(_key(config), {})[field.name] = value
        return value

    return typer.Option(
        *names, help=f"{text[0].upper()}{text[1:]}.{shown}", show_default=False, expose_value=False, callback=store,
        rich_help_panel=field.metadata.get("group", "Execution"),
    )  # fmt: skip
