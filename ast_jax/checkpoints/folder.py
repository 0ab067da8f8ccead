"""`Checkpoint`, and the folder that holds one: parameters, architecture, frontend and origin.

FOLDER/
  params/                    the parameter tree, an Orbax PyTree checkpoint
  config.json                architecture, labels and problem type, in the format of transformers
  preprocessor_config.json   the frontend, in the format of transformers
  ast_jax.json               {"format": 1, "metadata": {..., "provenance": {...}}}: the origin of the weights
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ast_jax.checkpoints.locate import FORMAT_FILE, is_own
from ast_jax.checkpoints.provenance import Provenance, split_origin
from ast_jax.checkpoints.tree import CheckpointError, as_checkpoint_errors, check_shapes, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, ASTConfig, FrontendConfig, read_config, read_json
from ast_jax.model.functional import param_shapes
from ast_jax.model.tree import shapes_of
from ast_jax.runtime.files import atomic_folder, write_text

FORMAT = 1
PARAMS_FOLDER = "params"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", "frontend", "metadata_json", "provenance"],
)
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters, architecture and frontend of a model; unpacks to `params, config, frontend`.

    A pytree whose leaves are the params; all other fields are static.

    Attributes:
        params: nested dict of arrays, format 1.
        config: the architecture.
        frontend: settings of the features.
        metadata_json: free-form information on the origin (data, figures, licences), as JSON text because static
            fields must be hashable.
        provenance: what the weights were converted from and how they were changed since.
    """

    params: Mapping[str, Any]
    config: ASTConfig
    frontend: FrontendConfig
    metadata_json: str = "{}"
    provenance: Provenance = dataclasses.field(default_factory=Provenance)

    def __iter__(self) -> Iterator[Any]:
        """Unpack to params, config and frontend."""
        return iter((self.params, self.config, self.frontend))

    @property
    def metadata(self) -> dict[str, Any]:
        """Free-form information on the origin: data, figures, licences."""
        return json.loads(self.metadata_json)

    @property
    def origin(self) -> dict[str, Any]:
        """Metadata and provenance as one JSON object: `metadata` in `ast_jax.json`."""
        return {**self.metadata, "provenance": self.provenance.to_json_dict()}

    def replace(self, **changes: Any) -> Checkpoint:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder atomically, replacing a checkpoint that is already there.

    Raises:
        ValueError: the params or the frontend do not fit the config, or `folder` holds something other than a
            checkpoint.
        OSError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    check_destination(folder)
    check_frontend(checkpoint.frontend, checkpoint.config, str(folder))
    check_params(checkpoint.params, checkpoint.config, str(folder))
    with atomic_folder(folder) as new:
        write_numpy(new / PARAMS_FOLDER, jax.tree.map(np.asarray, dict(checkpoint.params)))
        # Orbax's marker for object stores contains the path of the temporary folder.
        (new / PARAMS_FOLDER / "commit_success.txt").unlink(missing_ok=True)
        description = {"format": FORMAT, "metadata": checkpoint.origin}
        for name, content in (
            (CONFIG_FILE, checkpoint.config.to_json_dict()),
            (PREPROCESSOR_FILE, checkpoint.frontend.to_json_dict()),
            (FORMAT_FILE, description),
        ):
            write_text(new / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_destination(folder: pathlib.Path) -> None:
    """Check that a checkpoint can be written to a folder.

    Raises:
        CheckpointError: it holds something other than a checkpoint.
    """
    if folder.exists() and not (folder.is_dir() and (is_own(folder) or not any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: expected a new folder or a checkpoint to replace, got something else")


def read_folder(folder: pathlib.Path) -> Checkpoint:
    """Read a checkpoint folder; arrays are NumPy, half precision is widened to float32.

    Raises:
        CheckpointError: not a checkpoint of a known format, or params, config and frontend do not fit together.
    """
    with as_checkpoint_errors():
        description = read_json(folder / FORMAT_FILE)
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {description.get('format')!r}")
    if not isinstance(description.get("metadata", {}), dict):
        raise CheckpointError(f"{folder / FORMAT_FILE}: expected an object under metadata")
    try:
        provenance, metadata = split_origin(description.get("metadata", {}))
    except ValueError as error:
        raise CheckpointError(f"{folder / FORMAT_FILE}: {error}") from error
    with as_checkpoint_errors():
        config = read_config(ASTConfig, folder / CONFIG_FILE)
        frontend = read_config(FrontendConfig, folder / PREPROCESSOR_FILE)
    check_frontend(frontend, config, str(folder))
    params = jax.tree.map(widen, restore_numpy(folder / PARAMS_FOLDER))
    check_params(params, config, str(folder))
    return Checkpoint(params, config, frontend, json.dumps(metadata), provenance)


def write_numpy(folder: pathlib.Path, tree: Any) -> None:
    """Write an Orbax PyTree, uncompressed: compression saves a tenth of the size and takes many times as long."""
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def _checkpointer() -> Any:
    """Return an Orbax checkpointer for this process alone; the default one synchronises with all other processes."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence Orbax's warnings, such as that a state has no metrics or an item no metadata file of its own."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def restore_numpy(folder: pathlib.Path) -> Any:
    """Restore an Orbax PyTree as NumPy arrays, whatever devices it was saved from.

    Raises:
        CheckpointError: missing or damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with quiet_orbax(), _checkpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
            # Without restore_type Orbax asks for the device topology of the machine that saved.
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(folder.absolute(), restore_args=arguments)
    except Exception as error:  # Orbax and TensorStore raise many types for missing and damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: the parameters cannot be read ({reason[:200]})") from error


def check_params(params: Mapping[str, Any], config: ASTConfig, name: str) -> None:
    """Compare the parameter tree with the architecture; the classifier may be missing.

    Raises:
        CheckpointError: with sorted lists of what is missing, unexpected and of the wrong shape.
    """
    expected, got = shapes_of(param_shapes(config)), shapes_of(params)
    if not any(path.startswith("classifier/") for path in got):
        expected = {path: shape for path, shape in expected.items() if not path.startswith("classifier/")}
    check_shapes(name, expected, got)


def check_frontend(frontend: FrontendConfig, config: ASTConfig, name: str) -> None:
    """Compare the size of the features with the input of the model.

    Raises:
        CheckpointError: they differ.
    """
    for field in ("max_length", "num_mel_bins"):
        expected, got = getattr(config, field), getattr(frontend, field)
        if expected != got:
            raise CheckpointError(
                f"{name}: the features do not fit the model: {CONFIG_FILE} has {field} {expected}, "
                f"{PREPROCESSOR_FILE} {got}; set both to the value that the model was trained with"
            )
