"""`Provenance` is typed, hashable and written to `ast_jax.json`; older folders without it still load."""

import json
import pickle

import jax
import numpy as np
import pytest
import torch
import torch_original

import ast_jax
from ast_jax.checkpoints.provenance import Provenance, SourceFormat, split_origin

FULL = Provenance(
    source="deit.pth", format=SourceFormat.DEIT, num_tensors=23, ignored=(("head.bias", "unused"),), dtype="bfloat16",
    other_dtypes=(("cls_token", "float32"),), statistics_assumed=True, problem_type_resolved=True, grid_resized=True,
    notes=("3 heads of 64 are assumed",), changes=("input 224 bins x 224 frames",),
)  # fmt: skip
# The metadata that `convert` and `resize` wrote before `Provenance`.
CONVERSION = {
    "format": "distilled vision transformer (DeiT, timm's names)", "tensors": 23, "ignored": {"head.bias": "unused"},
    "notes": ["3 heads of 64 are assumed"], "statistics_assumed": True, "dtype": "bfloat16",
    "other_dtypes": {"cls_token": "float32"}, "problem_type_resolved": True,
}  # fmt: skip
OLD = {
    "converted_from": "deit.pth", "conversion": CONVERSION, "adapted": ["input 224 bins x 224 frames"], "note": "mine",
}  # fmt: skip


@pytest.mark.parametrize("provenance", [Provenance(), FULL], ids=["native", "converted"])
def test_json_round_trip(provenance):
    kept = json.loads(json.dumps(provenance.to_json_dict()))
    assert Provenance.from_json_dict(kept) == provenance
    assert hash(Provenance.from_json_dict(kept)) == hash(provenance)
    assert split_origin({"note": "mine", "provenance": kept}) == (provenance, {"note": "mine"})
    assert (kept == {}) == (provenance == Provenance())  # only what differs from the defaults is written


def test_older_metadata_is_read():
    assert split_origin(OLD) == (FULL, {"note": "mine"})
    without = {name: value for name, value in CONVERSION.items() if name != "problem_type_resolved"}
    provenance, rest = split_origin({"converted_from": "ast", "conversion": without | {"format": "Hugging Face"}})
    assert (provenance.source, provenance.format, rest) == ("ast", SourceFormat.HUGGING_FACE, {})
    assert (provenance.problem_type_resolved, provenance.grid_resized, provenance.imagenet_only) == (False,) * 3
    assert split_origin({"adapted": ["once"], "epoch": 3})[0] == Provenance(changes=("once",), grid_resized=True)


@pytest.mark.parametrize("metadata", [{}, {"conversion": "mine"}, {"conversion": {"format": "mp3"}, "adapted": "yes"}])
def test_other_metadata_stays_free_form(metadata):
    assert split_origin(metadata) == (Provenance(), metadata)


def test_every_old_format_is_known():
    for kind in SourceFormat:
        provenance, _ = split_origin({"conversion": CONVERSION | {"format": kind.description}})
        assert provenance.format is kind


def test_a_checkpoint_is_static_in_its_provenance():
    checkpoint = ast_jax.load("sounds-tiny").replace(provenance=FULL)
    assert len(jax.tree.leaves(checkpoint)) == len(jax.tree.leaves(checkpoint.params))
    traced = jax.jit(lambda c: c)(checkpoint)
    assert traced.provenance == FULL  # hashable, so that jit takes it
    assert pickle.loads(pickle.dumps(checkpoint)).provenance == FULL
    params, _, _ = checkpoint
    assert params is checkpoint.params


def test_shipped_model_is_not_converted():
    checkpoint = ast_jax.load("sounds-tiny")
    assert checkpoint.provenance == Provenance()
    assert checkpoint.metadata["name"] == "sounds-tiny"


def test_an_old_folder_of_an_imagenet_model(tmp_path):
    """It loads with its provenance, and its position grid cannot be resized a second time."""
    torch.save(torch_original.deit_state(width=64, depth=1, heads=1, hw=14), tmp_path / "deit.pth")
    ast_jax.save(tmp_path / "model", ast_jax.load(tmp_path / "deit.pth"))
    new = ast_jax.load(tmp_path / "model")
    path = tmp_path / "model" / "ast_jax.json"
    path.write_text(json.dumps({"format": 1, "metadata": OLD}))
    old = ast_jax.load(tmp_path / "model")
    assert (old.provenance, old.metadata) == (FULL, {"note": "mine"})
    with pytest.raises(ValueError, match="already resized to 12x101"):
        ast_jax.resize(old, max_length=128)
    ast_jax.save(tmp_path / "again", old)
    again = ast_jax.load(tmp_path / "again")
    assert (again.provenance, again.metadata) == (FULL, {"note": "mine"})
    jax.tree.map(np.testing.assert_array_equal, again.params, new.params)


@pytest.mark.parametrize(
    "kept", [{"format": "mp3"}, {"colour": "red"}, 3, {"ignored": ["a"]}, {"notes": 3}, {"other_dtypes": 3}], ids=str
)
def test_a_damaged_provenance_is_refused(kept, tmp_path):
    ast_jax.save(tmp_path / "model", ast_jax.load("sounds-tiny"))
    path = tmp_path / "model" / "ast_jax.json"
    path.write_text(json.dumps({"format": 1, "metadata": {"provenance": kept}}))
    with pytest.raises(ast_jax.CheckpointError, match=r"ast_jax\.json: provenance: expected the fields of Provenance"):
        ast_jax.load(tmp_path / "model")
