"""Checkpoint folders: everything inference needs in one place, and names that resolve to one.

FOLDER/
  params/                    the parameter tree, an Orbax PyTree checkpoint
  config.json                the architecture, labels and problem type, as transformers writes them
  preprocessor_config.json   the frontend, likewise
  ast_jax.json               {"format": 1, "metadata": {...}}: where the weights came from
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from ast_jax.audio.features import PREPROCESSOR_FILE
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.runtime.files import whole_folder, write_text
from ast_jax.runtime.progress import progress

FORMAT = 1
FORMAT_FILE = "ast_jax.json"
CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"
LONGEST_LIST = 20  # of what does not fit: more would hide the beginning
SHIPPED = pathlib.Path(__file__).parents[1] / "models"


_Config = TypeVar("_Config", ASTConfig, FrontendConfig)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", "frontend", "metadata_json"],
)
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with all it needs; unpacks to `params, config, frontend`, and is a pytree whose leaves are the params.

    Attributes:
        params: nested dict of arrays, format 1.
        config: the architecture.
        frontend: how sound becomes its input.
        metadata_json: where the weights came from, as JSON text (so that the static part stays hashable).
    """

    params: Mapping[str, Any]
    config: ASTConfig
    frontend: FrontendConfig
    metadata_json: str = "{}"

    def __iter__(self) -> Iterator[Any]:
        """Unpack to params, config and frontend."""
        return iter((self.params, self.config, self.frontend))

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the weights came from: source, data, figures, licences."""
        return json.loads(self.metadata_json)

    def replace(self, **changes: Any) -> Checkpoint:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / FORMAT_FILE).is_file()) if SHIPPED.is_dir() else []


@progress("writing the model")
def save(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder, whole or not at all; a checkpoint already there is replaced.

    Raises:
        ValueError: the params or the frontend do not fit the config, or `folder` holds something else than a
            checkpoint.
        OSError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    check_destination(folder)
    check_frontend(checkpoint.frontend, checkpoint.config, str(folder))
    check_params(checkpoint.params, checkpoint.config, str(folder))
    with whole_folder(folder) as new:
        write_numpy(new / PARAMS_FOLDER, jax.tree.map(np.asarray, dict(checkpoint.params)))
        # A note of Orbax for object stores, which would carry the name of the scratch folder into the checkpoint.
        (new / PARAMS_FOLDER / "commit_success.txt").unlink(missing_ok=True)
        description = {"format": FORMAT, "metadata": checkpoint.metadata}
        for name, content in (
            (CONFIG_FILE, checkpoint.config.to_json_dict()),
            (PREPROCESSOR_FILE, checkpoint.frontend.to_json_dict()),
            (FORMAT_FILE, description),
        ):
            write_text(new / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_destination(folder: pathlib.Path) -> None:
    """Refuse a place where a checkpoint cannot be written.

    Raises:
        CheckpointError: it holds something else.
    """
    if folder.exists() and not (folder.is_dir() and (is_own(folder) or not any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: expected a new folder or a checkpoint to replace, got something else")


def load(source: str | os.PathLike[str], **changes: Any) -> Checkpoint:
    """Load a model: the name of a shipped one, a checkpoint folder, a Hub id, or PyTorch weights (see `from_torch`).

    The arrays are NumPy, whatever devices wrote them; half precision on disk becomes float32.

    Args:
        source: a name, a folder, or a file of weights.
        **changes: another input or other labels: `max_length`, `num_mel_bins`, `frequency_stride`, `time_stride`,
            `num_labels`, `labels`; see `resize`.

    Raises:
        CheckpointError: nothing there, or it is not a checkpoint of a known format, or its parts do not fit.
        ConnectionError: a Hub id, and the Hub cannot be reached.
    """
    path = resolve(source)
    if is_own(path):
        from ast_jax.checkpoints.resize import resize

        return resize(_load(path), **changes)
    from ast_jax.checkpoints.pytorch.from_torch import from_torch
    from ast_jax.checkpoints.pytorch.state_dicts import read_source

    return from_torch(read_source(path, os.fspath(source)), **changes)


def loaded(model: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """Return a checkpoint that is loaded already, or load what else is given."""
    return model if isinstance(model, Checkpoint) else load(model)


def is_own(path: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint of this package, as against PyTorch weights."""
    return (path / FORMAT_FILE).is_file()


@progress("reading the model")
def _load(folder: pathlib.Path) -> Checkpoint:
    """Read a checkpoint folder."""
    description = read_json(folder / FORMAT_FILE)
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {description.get('format')!r}")
    if not isinstance(description.get("metadata", {}), dict):
        raise CheckpointError(f"{folder / FORMAT_FILE}: expected an object under metadata")
    config = read_config(ASTConfig, folder / CONFIG_FILE)
    frontend = read_config(FrontendConfig, folder / PREPROCESSOR_FILE)
    check_frontend(frontend, config, str(folder))
    params = jax.tree.map(widen, restore_numpy(folder / PARAMS_FOLDER))
    check_params(params, config, str(folder))
    return Checkpoint(params, config, frontend, json.dumps(description.get("metadata", {})))


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
    """Return what a name stands for: a local folder or file, a shipped model, or a Hub id's download."""
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
        f"{name}: expected a shipped model ({', '.join(shipped_models()) or 'none here'}), "
        "a checkpoint folder, PyTorch weights or a Hub id like owner/name, got none of these"
    )


def write_numpy(folder: pathlib.Path, tree: Any) -> None:
    """Write an Orbax PyTree; uncompressed, as weights shrink by a tenth and take many times as long to write."""
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def _checkpointer() -> Any:
    """Return what reads and writes a tree in this process alone: of several, Orbax's own would wait for the others."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def restore_numpy(folder: pathlib.Path) -> Any:
    """Restore an Orbax PyTree to NumPy arrays, without regard to the devices that wrote it.

    Raises:
        CheckpointError: missing or damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
            # restore_type: a plain restore would want the topology of the machine that saved.
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(folder.absolute(), restore_args=arguments)
    except Exception as error:  # orbax and tensorstore raise many kinds for missing and damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: the parameters cannot be read ({reason[:200]})") from error


def check_params(params: Mapping[str, Any], config: ASTConfig, name: str) -> None:
    """Compare the tree with what `config` makes; the classifier may be missing.

    Raises:
        CheckpointError: with sorted lists of what is missing, unexpected and misshaped.
    """
    from ast_jax.model.functional import param_shapes

    expected, got = flatten(param_shapes(config)), flatten(params)
    if not any(path.startswith("classifier/") for path in got):
        expected = {path: leaf for path, leaf in expected.items() if not path.startswith("classifier/")}
    raise_differences(
        name,
        missing=expected.keys() - got.keys(),
        unexpected=got.keys() - expected.keys(),
        misshaped={
            path: (expected[path].shape, got[path].shape)
            for path in expected.keys() & got.keys()
            if tuple(expected[path].shape) != tuple(got[path].shape)
        },
    )


def check_frontend(frontend: FrontendConfig, config: ASTConfig, name: str) -> None:
    """Compare the features' size with the model's input.

    Raises:
        CheckpointError: they differ.
    """
    for field in ("max_length", "num_mel_bins"):
        wanted, got = getattr(config, field), getattr(frontend, field)
        if wanted != got:
            raise CheckpointError(
                f"{name}: the features do not fit the model: {CONFIG_FILE} has {field} {wanted}, "
                f"{PREPROCESSOR_FILE} {got}; set both to the model's own"
            )


def raise_differences(name: str, missing: Any, unexpected: Any, misshaped: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise one error with titled, sorted lists, or return where all of them are empty."""
    shapes = [f"{path} (expected {tuple(want)}, got {tuple(got)})" for path, (want, got) in sorted(misshaped.items())]
    titled = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": shapes}
    lists = []
    for title, entries in titled.items():
        more = f", and {len(entries) - LONGEST_LIST} more" if len(entries) > LONGEST_LIST else ""
        if entries:
            lists.append(f"{title}: {', '.join(entries[:LONGEST_LIST])}{more}")
    if lists:
        raise CheckpointError(f"{name}: the weights do not fit the configuration; {'; '.join(lists)}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a/b/c": leaf} of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def widen(array: Any) -> np.ndarray:
    """Return float32 for half precision, anything else as it is."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def read_config(kind: type[_Config], path: pathlib.Path) -> _Config:
    """Read `config.json` or `preprocessor_config.json`.

    Raises:
        CheckpointError: missing, not a JSON object, or a value of the wrong type or out of its range.
    """
    content = read_json(path)
    try:
        return kind.from_json_dict(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
