"""Inference of the architecture from tensor shapes, file names and options."""

import json
import re
import shutil

import numpy as np
import pytest
import torch_models
import torch_original
import transformers
from torch_original import OriginalAST

import ast_jax
from ast_jax import CheckpointError
from ast_jax.checkpoints.pytorch.infer_config import Hints, config_from_shapes
from ast_jax.checkpoints.pytorch.names import DEIT, HF_PREFIX, LIVE, ORIGINAL

FITTING = {  # patches of the published models, and of shorter inputs: strides and frames
    1212: (10, 1024), 850: (12, 1024), 657: (14, 1024), 512: (16, 1024), 600: (10, 512), 144: (10, 128),
    300: (10, 256),
}  # fmt: skip
NAMED = {  # file name: patches, (strides, frames)
    "audioset_12_12_0.4467.pth": (850, (12, 12, 1024)),
    "audioset_10_10_0.4593.pth": (1212, (10, 10, 1024)),
    "mine_10_16_0.4.pth": (768, (10, 16, 1024)),  # ambiguous without the name
    "mine_16_16_0.4.pth": (768, (16, 16, 1536)),
    "some/folder_16_16_/mine_10_16.pth": (96, (10, 16, 128)),  # nothing published fits the shapes alone
    "some/audioset_10_16_0.4/mine.pth": (1212, (10, 10, 1024)),  # the name of the folder is not used
    # Numbers that cannot be strides are ignored.
    "audioset_12_12_0.4467.pt": (1212, (10, 10, 1024)),
    "run_2020_12_0.9.pth": (1212, (10, 10, 1024)),
    "mine_0_10_.pth": (1212, (10, 10, 1024)),
    # Strides above the patch size would leave gaps and fit any number of patches: widths, dates, epochs.
    "tiny_192_768.pth": (1212, (10, 10, 1024)),
    "ast_2024_128.pth": (144, (10, 10, 128)),
}
ASKED = [  # patches, source_strides, source_max_length, (strides, frames)
    (96, (10, 16), None, (10, 16, 128)),
    (768, (10, 16), None, (10, 16, 1024)),
    (768, None, 1540, (16, 16, 1540)),
    (768, (10, 16), 1030, (10, 16, 1030)),
    (1212, None, 1016, (10, 10, 1016)),  # the shortest and the longest input of 101 patches
    (1212, None, 1025, (10, 10, 1025)),
    (108, None, 100, (10, 10, 100)),  # not a multiple of 128
    (108, (10, 10), 105, (10, 10, 105)),
    (1, (200, 200), 16, (200, 200, 16)),  # the user may ask for gaps
]
MISFITS = [  # patches, source_strides, source_max_length, the alternatives in the message
    (1212, (12, 12), None, "10 10 with 1016 to 1025 frames"),
    (1212, (10, 10), 512, "10 10 with 1016 to 1025 frames"),
    (1212, None, 1015, "10 10 with 1016 to 1025 frames"),
    (1212, None, 1026, "10 10 with 1016 to 1025 frames"),
    (108, (10, 10), None, "10 10 with 96 to 105 frames, 14 14 with 170 to 183 frames"),  # not a multiple of 128
    (108, None, None, "10 10 with 96 to 105 frames, 14 14 with 170 to 183 frames"),
    (768, None, None, "10 10 with 646 to 655 frames, 16 16 with 1536 to 1551 frames"),  # or 10 16 with 1024
    (97, None, None, "none"),
    (0, None, None, "none"),
]


def state_of(patches, width=192, patch=(16, 16), layers=1, labels=7, bias=True):
    """Return a state dict with the original's names and the shapes that are read."""
    shapes = {
        "v.pos_embed": (1, 2 + patches, width), "v.patch_embed.proj.weight": (width, 1, *patch),
        "mlp_head.1.weight": (labels, width),
        **{f"v.blocks.{layer}.mlp.fc1.weight": (4 * width, width) for layer in range(layers)},
        **{f"v.blocks.{layer}.attn.qkv.bias": (3 * width,) for layer in range(layers if bias else 0)},
    }  # fmt: skip
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def read(state, strides=None, max_length=None, bins=None, heads=None, name="state dict", form=ORIGINAL, notes=None):
    has_head = any(row.source in state for row in form.head)
    hints = Hints(strides, max_length, bins, heads)
    return config_from_shapes(state, form, has_head, name, hints, [] if notes is None else notes)


def found(*arguments, **options):
    config = read(*arguments, **options)
    return config.frequency_stride, config.time_stride, config.max_length


def refused(*arguments, **options):
    """Return the one-line error message."""
    with pytest.raises(CheckpointError) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("patches", FITTING)
def test_published_shapes(patches):
    stride, frames = FITTING[patches]
    rows, columns = torch_original.grid_of(128, frames, stride, stride)
    assert rows * columns == patches
    notes = []
    assert found(state_of(patches), notes=notes) == (stride, stride, frames)
    assert any(note.startswith(f"strides {stride} {stride} and {frames} frames: as published") for note in notes)
    assert {"3 heads of 64 are assumed", "128 mel bins are assumed"} <= set(notes)


@pytest.mark.parametrize("name", NAMED)
def test_file_names(name):
    patches, want = NAMED[name]
    notes = []
    assert found(state_of(patches), name=name, notes=notes) == want
    by_name = re.search(rf"_{want[0]}_{want[1]}[_.][^/]*$", name)
    (note,) = (note for note in notes if note.startswith("strides"))
    assert (": from the file name" if by_name else ": as published") in note


@pytest.mark.parametrize(("patches", "strides", "max_length", "want"), ASKED)
def test_options(patches, strides, max_length, want):
    assert found(state_of(patches), strides, max_length) == want
    # They take precedence over a file name, even if that fits.
    assert found(state_of(patches), strides or want[:2], max_length or want[2], name="mine_16_16_.pth") == want


def test_lists_are_strides_too():
    assert found(state_of(96), [10, 16]) == (10, 16, 128)


@pytest.mark.parametrize(("patches", "strides", "max_length", "possible"), MISFITS)
def test_misfits(patches, strides, max_length, possible):
    message = refused(state_of(patches), strides, max_length, name="some/file.pth")
    assert message.startswith("some/file.pth: ")
    assert f"({patches} patches; with 128 mel bins possible: {possible})" in message
    assert "give them to `ast-jax convert`: --source-strides, --source-max-length" in message


def test_options_that_do_not_fit_are_reported():
    message = refused(state_of(1212), (12, 12), 1024)
    assert "the given strides and input length do not fit the weights (1212 patches; " in message
    notes = []
    read(state_of(108), max_length=100, notes=notes)
    assert "strides 10 10 and 100 frames: with the given length" in "; ".join(notes)


def test_alternatives_are_noted():
    """8 x 18 patches at strides of 16 are as many as 12 x 12 at 10: the published model is taken, with a note."""
    notes = []
    assert found(state_of(144), notes=notes) == (10, 10, 128)
    assert (
        "strides 10 10 and 128 frames: as published; 14 14 with 226 to 239 frames or 16 16 with 288 to 303 frames "
        "would fit too"
    ) in notes


@pytest.mark.parametrize(("fstride", "tstride", "frames"), [(16, 16, 300), (10, 16, 120), (12, 14, 500)])
def test_strides_of_the_name_are_kept_where_the_length_is_ambiguous(fstride, tstride, frames):
    """The strides of the file name are kept, and only the length is asked for."""
    rows, columns = torch_original.grid_of(128, frames, fstride, tstride)
    name = f"mine_{fstride}_{tstride}_0.4.pth"
    message = refused(state_of(rows * columns), name=name)
    assert f"possible: {fstride} {tstride} with " in message
    assert found(state_of(rows * columns), max_length=frames, name=name) == (fstride, tstride, frames)


def test_other_mel_bins_and_heads():
    rows, columns = torch_original.grid_of(64, 1024, 16, 16)
    notes = []
    config = read(state_of(rows * columns), (16, 16), 1024, 64, 6, notes=notes)
    assert (config.grid, config.num_mel_bins, config.num_attention_heads) == ((rows, columns), 64, 6)
    assert not any("assumed" in note for note in notes)
    assert "7 heads do not divide the width 192" in refused(state_of(144), heads=7)


@pytest.mark.parametrize("field", ["max_length", "num_mel_bins", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_invalid_hints(field, value):
    with pytest.raises(ValueError, match=f"source_{field}: expected a positive whole number, got {value!r}"):
        Hints(**{field: value})


def test_a_vision_transformer_without_distillation_token_is_refused():
    state = torch_original.deit_state(depth=1, hw=4)
    del state["dist_token"]
    assert "expected a distilled vision transformer, got one without dist_token" in refused(state, form=DEIT)


def test_an_unusual_depth_is_noted():
    notes = []
    read(state_of(144, layers=3), notes=notes)
    assert "3 layers; the published models have 12" in notes
    notes = []
    read(state_of(144, layers=12), notes=notes)
    assert not any("layers" in note for note in notes)


def test_ambiguities_list_the_alternatives():
    """Patches as high as the spectrogram give one row at any stride."""
    state = state_of(64, patch=(128, 2))
    message = refused(state)
    lengths = {10: "632 to 641", 12: "758 to 769", 14: "884 to 897", 16: "1010 to 1025"}
    possible = ", ".join(f"{stride} {stride} with {frames} frames" for stride, frames in lengths.items())
    assert f"(64 patches; with 128 mel bins possible: {possible})" in message
    assert found(state, max_length=768) == (12, 12, 768)
    assert found(state, (16, 16)) == (16, 16, 1024)
    assert read(state, (16, 16)).patch_size == (128, 2)


@pytest.mark.parametrize("strides", [(0, 10), (10, -1), (10,), (10, 10, 10), 10, ("10", "10"), (10.5, 10)], ids=str)
def test_invalid_strides(strides):
    with pytest.raises(ValueError, match="source_strides: expected two positive whole numbers, got "):
        read(state_of(1212), strides)


@pytest.mark.parametrize("side", [129, 138, 139, 200])
@pytest.mark.parametrize("patches", [7, 144])
def test_patches_higher_than_the_spectrogram(side, patches):
    refused(state_of(patches, patch=(side, 16)))


@pytest.mark.parametrize("width", [96, 200])
def test_width_that_heads_do_not_divide(width):
    message = refused(state_of(144, width))
    assert f"heads of 64 do not divide the width {width}; give their number to `ast-jax convert`" in message
    assert read(state_of(144, width), heads=4).num_attention_heads == 4


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("v.pos_embed", (146, 192)), ("v.patch_embed.proj.weight", (192, 256)), ("v.blocks.0.mlp.fc1.weight", (768,)),
        ("mlp_head.1.weight", (7, 0)), ("v.pos_embed", ()),
    ],
)  # fmt: skip
def test_tensors_of_another_rank(name, wrong):
    """The message has the name of the tensor in the file."""
    assert name in refused(state_of(144) | {name: np.zeros(wrong, np.float32)})


def test_imagenet_grids_are_square():
    state = torch_original.deit_state(depth=1, hw=5)
    config = read(state, form=DEIT)
    assert (config.grid, config.max_length, config.num_mel_bins) == ((5, 5), 80, 80)
    assert (config.layer_norm_eps, config.head_eps) == (1e-6, 1e-5)
    for patches in (24, 0):
        message = refused(state | {"pos_embed": np.zeros((1, 2 + patches, 192))}, form=DEIT)
        assert f"expected a square position grid, got {patches} positions" in message


@pytest.mark.parametrize("width", [64, 192, 384, 768])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_of_the_original(width, bias):
    config = read(state_of(144, width, layers=11, labels=35, bias=bias))
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (width, width // 64, 4 * width)
    assert (config.num_hidden_layers, config.num_labels, config.qkv_bias) == (11, 35, bias)
    assert (config.patch_size, config.layer_norm_eps, config.head_eps, config.hidden_act) == (16, 1e-6, 1e-5, "gelu")


def test_live_models_are_read_as_their_own_config_says():
    model = OriginalAST(label_dim=50, fstride=12, tstride=12, input_tdim=512, depth=2, width=384, heads=6)
    config = read(model.state_dict())
    assert (config.grid, config.num_labels, config.hidden_size, config.num_hidden_layers) == (model.grid, 50, 384, 2)
    for cls, form in (
        (transformers.ASTForAudioClassification, LIVE),
        (transformers.ASTModel, LIVE.with_prefix("")),
    ):
        own = torch_models.torch_config("stride-16-16", num_hidden_layers=2, qkv_bias=False)
        config = read(cls(own).state_dict(), form=form)
        values = config.to_json_dict()
        assert {key: values[key] for key in values if key != "num_labels"}.items() <= own.to_dict().items()
        assert values["num_labels"] == (7 if form.prefix == HF_PREFIX else 527)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a config.json, and the live model that was saved there."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, torch_models.saved_model(folder, "stride-10-10", num_hidden_layers=1)


@pytest.mark.parametrize("option", [{"source_strides": (10, 10)}, {"source_max_length": 128}], ids=str)
def test_options_beside_a_configuration(option, saved):
    """Options that are not needed are refused: with config, with config.json, and for square images."""
    folder, model = saved
    for source, config in (
        (model.state_dict(), ast_jax.load(folder).config), (folder, None), (model, None),
        (torch_original.deit_state(depth=1, hw=4), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="source_strides"):
            ast_jax.from_torch(source, config=config, **option)


def test_config_overrides_what_shapes_do_not_give():
    """Head width, eps, activation; an explicit config takes precedence over the model's own."""
    own = torch_models.torch_config("relu", num_hidden_layers=1, hidden_size=96, num_attention_heads=4)
    model = transformers.ASTForAudioClassification(own)
    with pytest.raises(CheckpointError, match="--source-heads"):
        ast_jax.from_torch(model.state_dict())
    whole = ast_jax.from_torch(model)
    checkpoint = ast_jax.from_torch(model.state_dict(), config=whole.config)
    assert checkpoint.config == whole.config
    kernels = [model.params["layers"]["attention"]["qkv"]["kernel"] for model in (checkpoint, whole)]
    np.testing.assert_array_equal(*kernels, strict=True)
    assert ast_jax.from_torch(model, config=whole.config.replace(layer_norm_eps=0.5)).config.layer_norm_eps == 0.5
    with pytest.raises(CheckpointError, match="wrong shape: audio_spectrogram_transformer"):
        ast_jax.from_torch(model, config=whole.config.replace(max_length=256))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**30), ("hidden_size", 3 * 10**16),
        ("intermediate_size", 10**20), ("max_length", 10**17), ("max_length", 10**30), ("num_mel_bins", 10**17),
    ],
)  # fmt: skip
def test_sizes_beyond_memory(field, value, saved, tmp_path):
    """They are refused before anything of that size is allocated or listed."""
    values = json.loads((saved[0] / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shutil.copy(saved[0] / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ast_jax.from_torch(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value)) < 5000
