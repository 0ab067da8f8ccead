"""`resize`: the position grid against the original's constructor, the frontend, the labels and the provenance."""

import itertools
import json

import jax
import numpy as np
import pytest
import torch
import torch_models
import torch_original
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax.checkpoints.folder import check_params
from ast_jax.checkpoints.provenance import Provenance
from ast_jax.checkpoints.resize import resize_positions
from ast_jax.model.functional import param_shapes

AUDIOSET, GRIDS = torch_original.AUDIOSET_GRID, (torch_original.AUDIOSET_GRID, (24, 24), (14, 14))
# Positions are in [0, 1), so an error is at most that of the interpolation weight. float64: coordinates up to 101 are
# rounded to 1.4e-14, three times. float32: PyTorch computes the coordinates in float32, with a relative rounding of the
# scale of 6e-8, and of 4e-6 in the product and the sum: 1.4e-5 along time and a quarter of that along frequency.
GRID_TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}

CONFIG = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3, max_length=64,
    num_mel_bins=48, id2label=("Speech", "Music", "Beep"), problem_type="multi_label_classification",
)  # fmt: skip
EVERYTHING = {"max_length": 96, "num_mel_bins": 30, "frequency_stride": 3, "time_stride": 20}
INPUTS = (
    {"max_length": 40}, {"max_length": 101}, {"num_mel_bins": 32}, {"num_mel_bins": 80}, {"frequency_stride": 4},
    {"time_stride": 16}, {"max_length": 16, "num_mel_bins": 16}, EVERYTHING,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(CONFIG))
    frontend = ast_jax.FrontendConfig(max_length=64, num_mel_bins=48, mean=-6.5, std=5.25)
    metadata = json.dumps({"trained_on": "nothing"})
    return ast_jax.Checkpoint(params, CONFIG, frontend, metadata, Provenance(changes=("once",)))


def positions_of(grid, dtype=np.float64, width=3):
    return np.random.default_rng(1).uniform(size=(2 + grid[0] * grid[1], width)).astype(dtype)


def assert_same_params(got, want, but="nothing"):
    """Assert that all leaves are identical except those under a path, which must differ."""
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        assert leaf.dtype == want[path].dtype
        same = leaf.shape == want[path].shape and (leaf == want[path]).all()
        assert same != path.startswith(but), path


def assert_same(got, want):
    assert_same_params(got.params, want.params)
    assert (got.config, got.frontend, got.metadata) == (want.config, want.frontend, want.metadata)
    assert got.provenance == want.provenance


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("old", GRIDS, ids=str)
def test_every_grid_equals_the_original(old, dtype):
    """All pairs from 1 x 1 to twice the pretrained grid: 4,848 for AudioSet's."""
    positions, differences = positions_of(old, dtype), {}
    for new in itertools.product(range(1, 2 * old[0] + 1), range(1, 2 * old[1] + 1)):
        want = torch_original.resized_positions(torch.from_numpy(positions)[None], old, new)[0].numpy()
        got = resize_positions(positions, old, new)
        assert got.shape == want.shape == (2 + new[0] * new[1], 3)
        assert got.dtype == dtype
        differences[new] = np.abs(got - want).max()
    assert len(differences) == 4 * old[0] * old[1]
    worst = max(differences, key=differences.get)
    assert differences[worst] < GRID_TOLERANCE[dtype], (worst, differences[worst])


@pytest.mark.parametrize("old", GRIDS, ids=str)
def test_same_grid_and_prefix_tokens_are_unchanged(old):
    positions = positions_of(old)
    np.testing.assert_array_equal(resize_positions(positions, old, old), positions)
    for new in ((1, 1), (2 * old[0], 3), (5, 2 * old[1]), (30, 300)):
        np.testing.assert_array_equal(resize_positions(positions, old, new)[:2], positions[:2])


@pytest.mark.parametrize("old", GRIDS, ids=str)
def test_crops_start_where_the_originals_do(old):
    """The position of the cell (f, t) is (f, t), so that the first remaining one gives the start of the crop."""
    cells = np.stack(np.meshgrid(*map(np.arange, old), indexing="ij"), axis=-1)
    positions = np.concatenate([np.full((2, 2), -1), cells.reshape(-1, 2)])
    half = {12: 6, 101: 50, 24: 12, 14: 7}
    for rows, columns in itertools.product(range(1, old[0] + 1), range(1, old[1] + 1)):
        got = resize_positions(positions, old, (rows, columns))[2:].reshape(rows, columns, 2)
        start = np.array([half[old[0]] - rows // 2, half[old[1]] - columns // 2])
        np.testing.assert_array_equal(got, cells[:rows, :columns] + start)


def test_constants_are_unchanged_and_axes_are_independent():
    flat = np.full((2 + 12 * 101, 3), 0.7)
    for new in ((13, 102), (24, 50), (7, 202), (23, 151)):
        np.testing.assert_allclose(resize_positions(flat, AUDIOSET, new), 0.7, rtol=1e-15)  # one rounding in the sum
        positions = positions_of(AUDIOSET)
        want = resize_positions(positions, AUDIOSET, new)
        time_first = resize_positions(resize_positions(positions, AUDIOSET, (12, new[1])), (12, new[1]), new)
        frequency_first = resize_positions(resize_positions(positions, AUDIOSET, (new[0], 101)), (new[0], 101), new)
        np.testing.assert_array_equal(time_first, want)
        np.testing.assert_allclose(frequency_first, want, atol=1e-15)  # sums of values below 1 in another order


@pytest.mark.parametrize("changes", INPUTS, ids=str)
def test_resized_model_has_the_new_input(changes, checkpoint):
    before = jax.tree.map(np.copy, checkpoint)
    resized = ast_jax.resize(checkpoint, **changes)
    assert resized.config == CONFIG.replace(**changes)
    size = {"max_length": resized.config.max_length, "num_mel_bins": resized.config.num_mel_bins}
    assert resized.frontend == checkpoint.frontend.replace(**size)
    assert_same_params(resized.params, checkpoint.params, "embeddings/position_embeddings")
    old, new = CONFIG.grid, resized.config.grid
    want = resize_positions(before.params["embeddings"]["position_embeddings"], old, new)
    np.testing.assert_array_equal(resized.params["embeddings"]["position_embeddings"], want)
    spec = torch_models.random_spec(resized.config).astype(np.float32)
    assert jax.eval_shape(lambda: ast_jax.apply(resized.params, spec, resized.config)).shape == (2, 3)

    words = [("cropped", "unchanged", "interpolated")[1 + (b > a) - (b < a)] for a, b in zip(old, new, strict=True)]
    told = (
        f"input 48 bins x 64 frames at strides 10, 10 to {size['num_mel_bins']} x {size['max_length']} at "
        f"{resized.config.frequency_stride}, {resized.config.time_stride}: position grid {old[0]}x{old[1]} to "
        f"{new[0]}x{new[1]} (frequency {words[0]}, time {words[1]})"
    )
    assert resized.metadata == {"trained_on": "nothing"}
    assert resized.provenance == Provenance(changes=("once", told), grid_resized=old != new)
    assert_same(checkpoint, before)


SAME = ({}, {"max_length": 64, "time_stride": 10}, {"num_labels": 3}, {"labels": list(CONFIG.id2label), "seed": 5})


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_without_changes_the_same_object_is_returned(changes, checkpoint):
    assert ast_jax.resize(checkpoint, **changes) is checkpoint


def test_default_names_keep_the_classifier_of_an_unnamed_model(checkpoint):
    unnamed = checkpoint.replace(config=CONFIG.replace(id2label=()))
    resized = ast_jax.resize(unnamed, labels=unnamed.config.labels)  # LABEL_0, LABEL_1, LABEL_2
    assert_same_params(resized.params, checkpoint.params)


def test_another_length_with_the_same_grid_keeps_the_positions(checkpoint):
    resized = ast_jax.resize(checkpoint, max_length=65)
    assert (resized.config.max_length, resized.frontend.max_length) == (65, 65)
    assert_same_params(resized.params, checkpoint.params)
    assert resized.provenance.changes[-1].endswith("4x5 to 4x5 (frequency unchanged, time unchanged)")


MISTAKES = [
    ({"max_length": 15}, r"patch_size: expected 1 to 15 frames, got 16"),
    ({"num_mel_bins": 15}, r"patch_size: expected 1 to 15 mel bins, got 16"),
    ({"num_labels": 3, "labels": ("a", "b")}, r"num_labels: expected 2, the number of labels, got 3"),
    ({"labels": ()}, r"labels: expected at least one name and no duplicates, got \(\)"),
    ({"labels": ("a", "b", "a")}, r"labels: expected at least one name and no duplicates, got \('a', 'b', 'a'\)"),
    ({"keep_classifier": True}, "keep_classifier: expected labels, a name for each of the model's 3 classes, got 0"),
    ({"labels": ("a", "b"), "keep_classifier": True}, "a name for each of the model's 3 classes, got 2"),
    ({"labels": ("a", 2)}, r"id2label: expected a string, got 2"),
    ({"labels": "audioset"}, r"labels: expected .*, got 'audioset'"),  # a string, not eight one-letter names
    ({"max_length": 64.5}, r"max_length: expected an integer, got 64\.5"),
    *(
        ({name: value}, rf"{name}: expected at least 1, got {value}")
        for name in ("max_length", "num_mel_bins", "frequency_stride", "time_stride", "num_labels")
        for value in (0, -1)
    ),
]
OTHER_LABELS = [  # changes, names in the resized model
    ({"num_labels": 5}, ()),
    ({"labels": ["a", "b", "c", "d", "e"]}, ("a", "b", "c", "d", "e")),
    ({"labels": ("a", "b"), "num_labels": 2}, ("a", "b")),
    ({"labels": ("Music", "Speech", "Beep")}, ("Music", "Speech", "Beep")),  # the same number of labels
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=str)
def test_mistakes_say_what_is_wrong(changes, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        ast_jax.resize(checkpoint, **changes)


def test_keep_classifier_renames_the_classes(checkpoint):
    named = ast_jax.resize(checkpoint, labels=("x", "y", "z"), keep_classifier=True)
    assert named.config == CONFIG.replace(id2label=("x", "y", "z"))  # problem_type is unchanged too
    assert named.params["classifier"] is checkpoint.params["classifier"]
    assert named.provenance.changes[-1] == "labels renamed"


@pytest.mark.parametrize(("changes", "names"), OTHER_LABELS, ids=str)
def test_other_labels_initialise_a_new_classifier(changes, names, checkpoint):
    resized = ast_jax.resize(checkpoint, **changes)
    count = len(names) or 5
    assert resized.config == CONFIG.replace(num_labels=count, id2label=names, problem_type=None)
    assert resized.frontend == checkpoint.frontend
    assert_same_params(resized.params, checkpoint.params, "classifier/")
    check_params(resized.params, resized.config, "of the right shapes")
    # `initializer_range`; from at least 64 samples, 0.4 is four standard errors.
    assert resized.params["classifier"]["dense"]["kernel"].std() == pytest.approx(0.02, rel=0.4)
    assert resized.provenance.changes[1:] == (f"classifier of {count} labels: initialised, untrained",)
    assert_same(ast_jax.resize(checkpoint, **changes), resized)
    other = ast_jax.resize(checkpoint, **changes, seed=1).params
    assert_same_params(other, resized.params, "classifier/dense/kernel")


def test_headless_model_gets_a_classifier_of_its_dtype(checkpoint):
    body = {name: part for name, part in checkpoint.params.items() if name != "classifier"}
    headless = checkpoint.replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float64), body))
    assert "classifier" not in ast_jax.resize(headless, max_length=96).params
    resized = ast_jax.resize(headless, num_labels=3)  # as in its configuration
    assert resized.params["classifier"]["dense"]["kernel"].shape == (32, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(resized.params)} == {np.dtype(np.float64)}
    assert (resized.config.id2label, resized.config.problem_type) == ((), None)


def test_resized_model_is_saved_and_loaded(checkpoint, tmp_path):
    resized = ast_jax.resize(checkpoint, **EVERYTHING, labels=("yes", "no"))
    assert len(resized.provenance.changes) == 3  # the one of the fixture, the input and the labels
    ast_jax.save(tmp_path / "model", resized)
    loaded = ast_jax.load(tmp_path / "model")
    assert_same(loaded, resized)
    spec = torch_models.random_spec(loaded.config).astype(np.float32)
    logits = jax.jit(lambda params: ast_jax.apply(params, spec, loaded.config))(loaded.params)
    assert logits.shape == (2, 2)


@pytest.mark.parametrize("kind", ["own", "Hugging Face", "original"])
def test_load_with_changes_equals_resize_after_load(kind, checkpoint, tmp_path):
    path = tmp_path / "model"
    if kind == "own":
        ast_jax.save(path, checkpoint)
    elif kind == "Hugging Face":
        torch_models.saved_model(path, "stride-10-10", num_hidden_layers=1)
    else:
        original = torch_original.OriginalAST(label_dim=35, input_tdim=128, width=64, depth=1, heads=1)
        path = tmp_path / "model.pth"
        torch.save(torch_original.randomized(original).state_dict(), path)
    plain = ast_jax.load(path)
    for changes in ({"max_length": 200, "num_labels": 4}, {"num_mel_bins": 80, "time_stride": 7, "labels": ("x", "y")}):
        loaded = ast_jax.load(path, **changes, seed=7)
        assert_same(loaded, ast_jax.resize(plain, **changes, seed=7))
        assert loaded.config.num_labels == len(changes.get("labels", "four"))
        assert loaded.provenance.changes
    assert_same(ast_jax.load(path, max_length=None, labels=None), plain)


def test_an_imagenet_grid_is_resized_once(tmp_path):
    """Resizing a resized grid again would differ from the original's initialisation, so it is refused."""
    torch.save(torch_original.deit_state(width=64, depth=1, heads=1, hw=14), tmp_path / "deit.pth")
    ast_jax.save(tmp_path / "full", ast_jax.load(tmp_path / "deit.pth"))
    with pytest.raises(ValueError, match="position grid of this ImageNet model was already resized to 12x101"):
        ast_jax.load(tmp_path / "full", max_length=128)
    labelled = ast_jax.load(tmp_path / "full", num_labels=3)  # the same grid
    assert labelled.config.num_labels == 3
