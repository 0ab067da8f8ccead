"""`convert_to`: read, convert, resize, write and verify; the command `ast-jax convert`."""

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
from ast_jax.checkpoints.pytorch.from_torch import convert, resize_converted
from ast_jax.checkpoints.pytorch.infer_config import Hints
from ast_jax.checkpoints.pytorch.parity import (
    VERIFICATION_FILE,
    Verification,
    verify,
    verify_exported,
    verify_saved,
)
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
    log: Callable[[str], None] = logger.info,
) -> Checkpoint:
    """Convert a checkpoint or PyTorch weights to a checkpoint folder or a PyTorch checkpoint, and report on it.

    Args:
        source: as for `load`.
        destination: path to write.
        target: "ast-jax", "huggingface" or "original".
        check: verify the conversion, and write the result as JSON in or beside the destination.
        hints: settings that PyTorch weights do not contain, see `from_torch`.
        mean: of the features; overrides the source's.
        std: likewise.
        changes: arguments of `resize`.
        log: called with each line or table of the report.

    Returns:
        The checkpoint that was written.

    Raises:
        ValueError: see `from_torch`, `resize`, `save` and `to_torch`; or verification failed, and nothing was written.
        OSError: files cannot be read or written.
    """
    destination, changes = pathlib.Path(destination), dict(changes or {})
    if target == OURS:
        check_folder(destination)
    else:
        check_destination(destination, target)
    path, verification = resolve(source), None
    if is_own(path):
        if hints:
            raise ValueError(
                f"{source}: expected no --source-… options, got some; a checkpoint of ast_jax contains its strides, "
                "input size and heads"
            )
        before = read_folder(path)
        checkpoint = _with_statistics(resize(before, **changes), mean, std)
        already_reported = len(before.provenance.report())
    else:
        weights = read_source(path, os.fspath(source))
        before = convert(weights, None, hints, mean, std)
        checkpoint, already_reported = resize_converted(before, **changes), 0
        verification = verify(weights, before) if check else None
    if verification is not None:
        if checkpoint.provenance.changes:
            compared = f"{verification.of}, before {'; '.join(checkpoint.provenance.changes)}"
            verification = dataclasses.replace(verification, of=compared)
        _require_passed(
            verification, f"{source}: the converted model differs from the source; nothing was written", log
        )
    notes: tuple[str, ...] = ()
    if target == OURS:
        checkpoint = _with_problem_type(checkpoint)
        save(destination, checkpoint)
    else:
        notes = to_torch(checkpoint, destination, format=target)
    labels = f"{checkpoint.config.num_labels} labels" if "classifier" in checkpoint.params else "no classifier"
    log(f"{destination}: {num_params(checkpoint.params):,} parameters, {labels}")
    for line in [*checkpoint.provenance.report()[already_reported:], *(f"note: {note}" for note in notes)]:
        log(f"  {line}")
    if check:
        _verify_destination(destination, target, checkpoint, verification, log)
    return checkpoint


def _with_statistics(checkpoint: Checkpoint, mean: float | None, std: float | None) -> Checkpoint:
    """Return a checkpoint with other mean and standard deviation of the features, noted in its provenance."""
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    frontend = checkpoint.frontend.replace(**given)
    if frontend == checkpoint.frontend:
        return checkpoint
    old = checkpoint.frontend
    change = f"normalisation from mean {old.mean:g}, std {old.std:g} to {frontend.mean:g}, {frontend.std:g}"
    return checkpoint.replace(
        frontend=frontend, provenance=checkpoint.provenance.changed(change, statistics_assumed=False)
    )


def _with_problem_type(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with an explicit problem type; its provenance keeps that the source had none."""
    config = checkpoint.config
    if config.problem_type is not None:
        return checkpoint
    return checkpoint.replace(
        config=config.replace(problem_type=config.resolved_problem_type),
        provenance=checkpoint.provenance.changed(problem_type_resolved=checkpoint.provenance.format is not None),
    )


def _require_passed(verification: Verification, message: str, log: Callable[[str], None]) -> None:
    """Report a failed verification and raise ValueError."""
    if not verification.passed:
        log(str(verification))
        raise ValueError(message)


def _verify_destination(
    destination: pathlib.Path,
    target: str,
    checkpoint: Checkpoint,
    verification: Verification | None,
    log: Callable[[str], None],
) -> None:
    """Read the destination back and compare it, report the verifications of source and destination, and write one."""
    if verification is not None:
        log(str(verification))
    elif target == OURS:
        log("the source is a checkpoint of ast_jax: there is no PyTorch model to compare with")
    if target == OURS:
        log(f"{verify_saved(destination, checkpoint)} arrays written and read back: none different")
    else:
        verification = verify_exported(destination, checkpoint)
        if not verification.passed:
            shutil.rmtree(destination) if destination.is_dir() else destination.unlink()
        _require_passed(verification, f"{destination}: the exported model differs from the source; it was removed", log)
        log(str(verification))
    if verification is not None:
        in_folder, beside = destination / VERIFICATION_FILE, destination.with_suffix(f".{VERIFICATION_FILE}")
        text = json.dumps(verification.to_json_dict(), indent=2, ensure_ascii=False) + "\n"
        write_text(in_folder if destination.is_dir() else beside, text)
