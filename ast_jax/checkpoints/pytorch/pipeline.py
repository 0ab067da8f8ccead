"""A conversion from end to end: read, adapt, write, and prove; what `ast-jax convert` does."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from ast_jax.checkpoints.folder import Checkpoint, read_folder, save
from ast_jax.checkpoints.folder import check_destination as check_folder
from ast_jax.checkpoints.locate import is_own, resolve
from ast_jax.checkpoints.pytorch.from_torch import convert, fit
from ast_jax.checkpoints.pytorch.infer_config import Hints
from ast_jax.checkpoints.pytorch.parity import VERIFICATION_FILE, Verification, read_back, verify, verify_written
from ast_jax.checkpoints.pytorch.state_dicts import read_source
from ast_jax.checkpoints.pytorch.to_torch import check_destination, to_torch
from ast_jax.checkpoints.resize import resize
from ast_jax.model.functional import num_params
from ast_jax.runtime.files import write_text

logger = logging.getLogger(__name__)
OURS = "ast-jax"


def convert_to(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: str = OURS,
    *,
    check: bool = False,
    hints: Hints = Hints(),  # noqa: B008 (frozen)
    mean: float | None = None,
    std: float | None = None,
    changes: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Checkpoint:
    """Convert weights of any kind to a checkpoint folder or to a PyTorch checkpoint, and say what was found.

    Args:
        source: what `load` takes.
        destination: where to write.
        target: "ast-jax", "huggingface" or "original".
        check: prove it, and keep the proof as JSON in or beside the destination.
        hints: what PyTorch weights do not tell, see `from_torch`.
        mean: of the features; in place of what a checkpoint of ours has.
        std: likewise.
        changes: arguments of `resize`.
        say: where the report goes, a line or a table at a time.

    Returns:
        What was written.

    Raises:
        ValueError: see `from_torch`, `resize`, `save` and `to_torch`; or the proof failed, and nothing is left behind.
        OSError: files cannot be read or written.
    """
    destination, changes = pathlib.Path(destination), dict(changes or {})
    if target == OURS:
        check_folder(destination)
    else:
        check_destination(destination, target)
    path, proof = resolve(source), None
    if is_own(path):
        if hints:
            raise ValueError(f"{source}: is a checkpoint of ast_jax, which tells its strides, length and heads itself")
        before = read_folder(path)
        checkpoint = _with_statistics(resize(before, **changes), mean, std)
        told = len(before.provenance.report())
    else:
        found = read_source(path, os.fspath(source))
        before = convert(found, None, hints, mean, std)
        checkpoint, told = fit(before, **changes), 0
        proof = verify(found, before) if check else None
    if proof is not None:
        if checkpoint.provenance.changes:
            proof = dataclasses.replace(proof, of=f"{proof.of}, before {'; '.join(checkpoint.provenance.changes)}")
        _require(proof, f"{source}: does not give the same numbers after conversion; nothing was written", say)
    notes: tuple[str, ...] = ()
    if target == OURS:
        checkpoint = _with_problem_type(checkpoint)
        save(destination, checkpoint)
    else:
        notes = to_torch(checkpoint, destination, format=target)
    labels = f"{checkpoint.config.num_labels} labels" if "classifier" in checkpoint.params else "no classifier"
    say(f"{destination}: {num_params(checkpoint.params):,} parameters, {labels}")
    for line in [*checkpoint.provenance.report()[told:], *(f"note: {note}" for note in notes)]:
        say(f"  {line}")
    if check:
        _prove(destination, target, checkpoint, proof, say)
    return checkpoint


def _with_statistics(checkpoint: Checkpoint, mean: float | None, std: float | None) -> Checkpoint:
    """Return a checkpoint of ours with other statistics of its features, and a word of it in the metadata."""
    told = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    frontend = checkpoint.frontend.replace(**told)
    if frontend == checkpoint.frontend:
        return checkpoint
    old = checkpoint.frontend
    change = f"normalisation from mean {old.mean:g}, std {old.std:g} to {frontend.mean:g}, {frontend.std:g}"
    return checkpoint.replace(
        frontend=frontend, provenance=checkpoint.provenance.changed(change, statistics_assumed=False)
    )


def _with_problem_type(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that says what its labels mean, and remembers that its source did not."""
    config = checkpoint.config
    if config.problem_type is not None:
        return checkpoint
    return checkpoint.replace(
        config=config.replace(problem_type=config.resolved_problem_type),
        provenance=checkpoint.provenance.changed(problem_type_resolved=checkpoint.provenance.format is not None),
    )


def _require(proof: Verification, message: str, say: Callable[[str], None]) -> None:
    if not proof.passed:
        say(str(proof))
        raise ValueError(message)


def _prove(
    destination: pathlib.Path,
    target: str,
    checkpoint: Checkpoint,
    proof: Verification | None,
    say: Callable[[str], None],
) -> None:
    """Compare what was written with what should have been, print the proofs and keep one."""
    if proof is not None:
        say(str(proof))
    elif target == OURS:
        say("the source is a checkpoint of ast_jax: there is no PyTorch model to compare with")
    if target == OURS:
        say(f"{read_back(destination, checkpoint)} arrays written and read back: none different")
    else:
        proof = verify_written(destination, checkpoint)
        if not proof.passed:
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
        _require(proof, f"{destination}: does not give the same numbers; it was removed", say)
        say(str(proof))
    if proof is not None:
        beside = destination.with_suffix(f".{VERIFICATION_FILE}")
        kept = destination / VERIFICATION_FILE if destination.is_dir() else beside
        write_text(kept, json.dumps(proof.to_json_dict(), indent=2, ensure_ascii=False) + "\n")
