"""Checkpoint folders: everything inference needs in one place.

FOLDER/
  params/                    the parameter tree, an Orbax PyTree checkpoint
  config.json                the architecture, labels and problem type, as transformers writes them
  preprocessor_config.json   the frontend, likewise
  ast_jax.json               {"format": 1, "metadata": {..., "provenance": {...}}}: where the weights came from
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ast_jax.checkpoints.locate import FORMAT_FILE, is_own
from ast_jax.checkpoints.provenance import Provenance, split_origin
from ast_jax.checkpoints.tree import CheckpointError, as_checkpoint_errors, raise_differences, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, ASTConfig, FrontendConfig, read_config, read_json
from ast_jax.model.functional import param_shapes
from ast_jax.runtime.files import whole_folder, write_text

FORMAT = 1
PARAMS_FOLDER = "params"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", "frontend", "metadata_json", "provenance"],
)
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with all it needs; unpacks to `params, config, frontend`, and is a pytree whose leaves are the params.

    Attributes:
        params: nested dict of arrays, format 1.
        config: the architecture.
        frontend: how sound becomes its input.
        metadata_json: free-form information on the origin (data, figures, licences), as JSON text because the static
            part of a pytree must be hashable.
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
        description = {"format": FORMAT, "metadata": checkpoint.origin}
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


def read_folder(folder: pathlib.Path) -> Checkpoint:
    """Read a checkpoint folder; the arrays are NumPy, half precision widened to float32.

    Raises:
        CheckpointError: it is not a checkpoint of a known format, or its parts do not fit.
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
    expected, got = flatten_dict(param_shapes(config), sep="/"), flatten_dict(params, sep="/")
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
