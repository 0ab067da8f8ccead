"""Against the original repository's class with random weights: every stage, and every start its constructor makes.

The class is `torch_original.OriginalAST`, with the original's parameter names and eps values.
"""

import functools

import jax
import numpy as np
import pytest
import torch
import torch_original
from torch_original import OriginalAST

import ast_jax
from ast_jax.model.functional import param_shapes

# Relative to the largest value. float32: a few hundred roundings of 6e-8 through the layers; float64: as many of 1e-16,
# and 1e-9 has room to spare while the least of the mistakes below, an eps of the body, moves the logits by 3e-7.
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}
SIZES = {  # the original's, of few layers
    "tiny": {"width": 192, "heads": 3}, "small": {"width": 384, "heads": 6}, "base": {"width": 768, "heads": 12},
}  # fmt: skip
CASES = {  # arguments of the constructor
    "10-10, 128 frames": {"input_tdim": 128, "label_dim": 35, "depth": 3},
    "12-12, 256 frames": {
        "input_tdim": 256,
        "label_dim": 9,
        "fstride": 12,
        "tstride": 12,
        "depth": 2,
        **SIZES["small"],
    },
    "16-16, 1024 frames": {"fstride": 16, "tstride": 16, "depth": 2},
}
INPUTS = {  # (frames, bins, strides in frequency and time): size
    (200, 112, 10, 16): "tiny",  # 10 x 12 patches: AudioSet's 12 x 101 and both of ImageNet's are cut on both axes
    (1400, 160, 10, 10): "tiny",  # 15 x 139: AudioSet's grows on both axes, 24 x 24 is cut and grows
    (400, 264, 10, 10): "small",  # 25 x 39: both of ImageNet's grow on both axes
    (300, 200, 12, 14): "base",  # 16 x 21: 14 x 14 grows, 24 x 24 is cut
}
STARTS = ("AudioSet", "ImageNet 24x24", "ImageNet 14x14")


def relative(got, want):
    """Return the largest difference relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def randomized(**arguments):
    return torch_original.randomized(OriginalAST(**arguments))


def saved(folder, state, prefix=""):
    torch.save({prefix + name: tensor for name, tensor in state.items()}, folder / "ast.pth")
    return folder / "ast.pth"


def random_spec(config, dtype):
    """Return random features [B, T, F] at the scale of normalised ones."""
    return np.random.default_rng(1).standard_normal((1, config.max_length, config.num_mel_bins)).astype(dtype)


def original_stages(model, spec):
    """Return the output of each stage as NumPy, computed in the dtype of spec."""
    with torch.no_grad():
        stages = model.to(torch.from_numpy(spec).dtype).features(torch.from_numpy(spec))
    return {name: value.numpy() for name, value in stages.items()}


@functools.partial(jax.jit, static_argnames="config")
def our_stages(params, spec, config):
    """Return the same stages of the JAX model."""
    out = ast_jax.encode(params, spec, config, output_hidden_states=True)
    stages = {f"block {index}": state for index, state in enumerate(out.hidden_states[1:])}
    stages |= {"embeddings": out.hidden_states[0], "norm": out.last_hidden_state, "pooled": out.pooler_output}
    return {**stages, "logits": ast_jax.apply(params, spec, config)}


def differences(model, checkpoint, dtype):
    """Return the relative difference of every stage, computed in a dtype."""
    spec = random_spec(checkpoint.config, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    want, got = original_stages(model, spec), our_stages(params, spec, checkpoint.config)
    assert got.keys() == want.keys()
    assert {stage.dtype for stage in got.values()} == {np.dtype(dtype)}
    return {name: relative(got[name], want[name]) for name in want}


@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_the_original(case, tmp_path, x64):
    arguments = CASES[case]
    model = randomized(**arguments)
    checkpoint = ast_jax.load(saved(tmp_path, model.state_dict()))
    config = checkpoint.config
    assert config.grid == model.grid
    assert config.max_length == arguments.get("input_tdim", 1024)
    assert (config.layer_norm_eps, config.head_eps) == (torch_original.BODY_EPS, torch_original.HEAD_EPS)
    for dtype in TOLERANCE:
        found = differences(model, checkpoint, dtype)
        assert len(found) == 4 + arguments["depth"]
        assert max(found.values()) < TOLERANCE[dtype], (dtype, found)


def test_names_with_the_prefix_module(tmp_path):
    state = randomized(input_tdim=128, label_dim=7, depth=1).state_dict()
    plain = ast_jax.load(saved(tmp_path, state))
    parallel = ast_jax.load(saved(tmp_path, state, "module."))
    assert (parallel.config, parallel.frontend) == (plain.config, plain.frontend)
    jax.tree.map(np.testing.assert_array_equal, parallel.params, plain.params)


@pytest.mark.parametrize(
    ("frames", "labels", "count"), [(1024, 527, 86_594_063), (128, 35, 85_395_491), (512, 50, 85_757_234)]
)
def test_number_of_parameters(frames, labels, count):
    """All of the original's except the two ImageNet heads, which it never calls."""
    with torch.device("meta"):
        original = OriginalAST(label_dim=labels, input_tdim=frames, width=768, heads=12)
    in_all = sum(parameter.numel() for parameter in original.parameters())
    assert in_all - 2 * (768 * 1000 + 1000) == in_all - 1_538_000 == count
    config = ast_jax.PRESETS["base"](max_length=frames, num_labels=labels)
    assert ast_jax.num_params(param_shapes(config)) == count


def exchanged(state, first, second):
    return {**state, first: state[second], second: state[first]}


def queries_and_keys_exchanged(state):
    """Swap query and key in the first block's qkv."""
    names = ("v.blocks.0.attn.qkv.weight", "v.blocks.0.attn.qkv.bias")
    parts = {name: state[name].chunk(3) for name in names}
    return {**state, **{name: torch.cat([key, query, value]) for name, (query, key, value) in parts.items()}}


def grid_transposed(state):
    positions = state["v.pos_embed"]
    grid = positions[:, 2:].unflatten(1, (12, -1)).transpose(1, 2).flatten(1, 2)
    return {**state, "v.pos_embed": torch.cat([positions[:, :2], grid], dim=1)}


MUTATIONS = {  # of the weights that are read, and of the configuration
    "nothing": (dict, {}),
    "body eps 1e-12": (dict, {"layer_norm_eps": 1e-12}),
    "head eps 1e-6": (dict, {"head_layer_norm_eps": 1e-6}),
    "tanh GELU": (dict, {"hidden_act": "gelu_new"}),
    "q and k swapped": (queries_and_keys_exchanged, {}),
    "tokens swapped": (lambda state: exchanged(state, "v.cls_token", "v.dist_token"), {}),
    "norms swapped": (lambda state: exchanged(state, "v.blocks.0.norm1.bias", "v.blocks.0.norm2.bias"), {}),
    "grid transposed": (grid_transposed, {}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_detected(mutation, tmp_path, x64):
    """Each mutation changes the logits by more than the float64 tolerance of the parity test."""
    model = torch_original.randomized(OriginalAST(**CASES["10-10, 128 frames"]).double())
    change, fields = MUTATIONS[mutation]
    checkpoint = ast_jax.load(saved(tmp_path, change(model.state_dict())))
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {np.dtype(np.float64)}  # read as they are
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(**fields))
    moved = differences(model, checkpoint, np.float64)["logits"]
    assert (moved > TOLERANCE[np.float64]) == (mutation != "nothing"), moved


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_initial_weights_for_another_input_equal_the_originals(shape, start, tmp_path):
    """All stages before the head, which is random in both, of the original's constructor and of `load`."""
    frames, bins, frequency, time = shape
    sizes = {**SIZES[INPUTS[shape]], "depth": 1}
    theirs = {"input_tdim": frames, "input_fdim": bins, "fstride": frequency, "tstride": time, "label_dim": 5, **sizes}
    if start.startswith("AudioSet"):
        state = randomized(**sizes).state_dict()
        path = saved(tmp_path, state)
        original = OriginalAST.from_audioset(state, **theirs)
    else:
        state = torch_original.deit_state(**sizes, hw=int(start[-2:]))
        path = saved(tmp_path, state)
        original = OriginalAST.from_imagenet(state, **theirs)
    loaded = ast_jax.load(
        path, max_length=frames, num_mel_bins=bins, frequency_stride=frequency, time_stride=time, num_labels=5
    )
    assert loaded.config.grid == original.grid
    found = differences(original, loaded, np.float32)
    del found["logits"]
    assert max(found.values()) < TOLERANCE[np.float32], found
