"""Against the original repository's class with random weights: every stage, what its constructor makes of others' weights.

The class is `torch_original.OriginalAST`, with the original's parameter names and eps values.
"""

import jax
import numpy as np
import pytest
import torch
import torch_models
import torch_original
from torch_original import OriginalAST

import ast_jax
from ast_jax.model import param_shapes

# Relative to the largest value. float32: a few hundred roundings of 6e-8 through the layers; float64: those of 1e-16,
# which the worst conditioned of the norms makes some 1e-13, so that 1e-9 has room to spare and sees every eps.
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # and heads, of the original's sizes
PREFIXES = {"plain": "", "DataParallel": "module."}
CASES = {  # arguments of the constructor
    "10-10, 128 frames": {"input_tdim": 128, "label_dim": 35, "depth": 3},
    "12-12, 512 frames": {"input_tdim": 512, "fstride": 12, "tstride": 12, "label_dim": 50, "depth": 2},
    "16-16, 1024 frames": {"fstride": 16, "tstride": 16, "depth": 2},
    "10-10, 1024 frames": {"depth": 1, "label_dim": 7},
    "small, 14-14, 256 frames": {
        "input_tdim": 256, "fstride": 14, "tstride": 14, "label_dim": 7, "depth": 2, "width": 384, "heads": 6,
    },
    "base, 10-10, 128 frames": {"input_tdim": 128, "label_dim": 35, "depth": 2, "width": 768, "heads": 12},
}  # fmt: skip
INPUTS = [  # frames, bins, strides in frequency and time
    (128, 128, 10, 10), (998, 64, 10, 10), (1400, 160, 10, 10), (300, 200, 12, 14), (1100, 100, 16, 16),
]  # fmt: skip


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


def original_stages(model, spec):
    """Return every stage as NumPy; the model's dtype becomes that of spec."""
    with torch.no_grad():
        stages = model.to(torch.from_numpy(spec).dtype).features(torch.from_numpy(spec))
    return {name: value.numpy() for name, value in stages.items()}


def our_stages(checkpoint, spec):
    """Return the same in JAX, by the same names, computed in the dtype of spec."""
    params = jax.tree.map(lambda leaf: leaf.astype(spec.dtype), checkpoint.params)
    out = ast_jax.encode(params, spec, checkpoint.config, output_hidden_states=True)
    stages = {f"block {index}": state for index, state in enumerate(out.hidden_states[1:])}
    stages |= {"embeddings": out.hidden_states[0], "norm": out.last_hidden_state, "pooled": out.pooler_output}
    if "classifier" in params:
        stages["logits"] = ast_jax.apply(params, spec, checkpoint.config)
    assert {stage.dtype for stage in stages.values()} == {spec.dtype}
    return stages


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_the_original(case, prefix, tmp_path, x64):
    arguments = CASES[case]
    model = randomized(**arguments)
    checkpoint = ast_jax.load(saved(tmp_path, model.state_dict(), prefix))
    config = checkpoint.config
    assert config.grid == model.grid
    assert config.max_length == arguments.get("input_tdim", 1024)
    assert (config.layer_norm_eps, config.head_eps) == (torch_original.BODY_EPS, torch_original.HEAD_EPS)
    for dtype in TOLERANCE:
        spec = torch_models.random_spec(config).astype(dtype)
        want, got = original_stages(model, spec), our_stages(checkpoint, spec)
        assert len(want) == 4 + arguments["depth"]
        assert got.keys() == want.keys()
        found = {name: relative(got[name], want[name]) for name in want}
        assert max(found.values()) < TOLERANCE[dtype], (dtype, found)


def test_float64_weights_are_read_as_they_are(tmp_path, x64):
    model = randomized(input_tdim=128, depth=1, label_dim=7).double()
    torch_original.randomized(model, seed=1)  # anew, as the first draw was rounded to float32
    checkpoint = ast_jax.load(saved(tmp_path, model.state_dict()))
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {np.dtype(np.float64)}
    spec = torch_models.random_spec(checkpoint.config)
    assert relative(our_stages(checkpoint, spec)["logits"], original_stages(model, spec)["logits"]) < 1e-9


@pytest.mark.parametrize(
    ("frames", "labels", "count"), [(1024, 527, 86_594_063), (128, 35, 85_395_491), (512, 50, 85_757_234)]
)
def test_number_of_parameters(frames, labels, count):
    """All the original's but those of the two ImageNet heads, which it carries along and never calls."""
    with torch.device("meta"):
        original = OriginalAST(label_dim=labels, input_tdim=frames, width=768, heads=12)
    in_all = sum(parameter.numel() for parameter in original.parameters())
    assert in_all - 2 * (768 * 1000 + 1000) == in_all - 1_538_000 == count
    config = ast_jax.PRESETS["base"](max_length=frames, num_labels=labels)
    assert ast_jax.num_params(param_shapes(config)) == count


def exchanged(state, first, second):
    return {**state, first: state[second], second: state[first]}


def queries_and_keys_exchanged(state):
    """Exchange the first two of the three parts of the first block's qkv."""
    names = ("v.blocks.0.attn.qkv.weight", "v.blocks.0.attn.qkv.bias")
    parts = {name: state[name].chunk(3) for name in names}
    return {**state, **{name: torch.cat([key, query, value]) for name, (query, key, value) in parts.items()}}


def grid_transposed(state):
    positions = state["v.pos_embed"]
    grid = positions[:, 2:].unflatten(1, (12, -1)).transpose(1, 2).flatten(1, 2)
    return {**state, "v.pos_embed": torch.cat([positions[:, :2], grid], dim=1)}


MUTATIONS = {  # of what we read, by the weights or by the configuration
    "nothing": (lambda state: state, {}),
    "body eps 1e-12": (lambda state: state, {"layer_norm_eps": 1e-12}),
    "head eps 1e-6": (lambda state: state, {"head_layer_norm_eps": 1e-6}),
    "one eps": (lambda state: state, {"head_layer_norm_eps": None}),
    "tanh GELU": (lambda state: state, {"hidden_act": "gelu_new"}),
    "q and k swapped": (queries_and_keys_exchanged, {}),
    "tokens swapped": (lambda state: exchanged(state, "v.cls_token", "v.dist_token"), {}),
    "norms swapped": (lambda state: exchanged(state, "v.blocks.0.norm1.bias", "v.blocks.0.norm2.bias"), {}),
    "ImageNet head read": (lambda state: {**state, "mlp_head.0.weight": state["v.norm.weight"]}, {}),
    "grid transposed": (grid_transposed, {}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(mutation, tmp_path, x64):
    """Each mistake moves the logits past the float64 tolerance of the parity test, so that test would go red."""
    model = randomized(**CASES["10-10, 128 frames"])
    change, fields = MUTATIONS[mutation]
    checkpoint = ast_jax.load(saved(tmp_path, change(model.state_dict())))
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(**fields))
    spec = torch_models.random_spec(checkpoint.config)
    moved = relative(our_stages(checkpoint, spec)["logits"], original_stages(model, spec)["logits"])
    assert (moved > TOLERANCE[np.float64]) == (mutation != "nothing"), moved


def assert_starts_alike(start, state, path, shape, **size):
    """Compare what the original's constructor and `load` make of a state for another input, but for the new head."""
    frames, bins, frequency, time = shape
    original = start(
        state, input_tdim=frames, input_fdim=bins, fstride=frequency, tstride=time, label_dim=5, **size
    )  # fmt: skip
    loaded = ast_jax.load(
        path, max_length=frames, num_mel_bins=bins, frequency_stride=frequency, time_stride=time, num_labels=5
    )
    assert loaded.config.grid == original.grid
    spec = torch_models.random_spec(loaded.config, batch=1).astype(np.float32)
    want, got = original_stages(original, spec), our_stages(loaded, spec)
    del want["logits"]
    found = {name: relative(got[name], want[name]) for name in want}
    assert max(found.values()) < TOLERANCE[np.float32], found


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_audioset_model_at_another_input_starts_as_the_original_does(shape, size, tmp_path):
    width, heads = WIDTHS[size]
    sizes = {"width": width, "heads": heads, "depth": 1}
    state = randomized(**sizes).state_dict()
    prefix = "module." if size == "small" else ""
    assert_starts_alike(OriginalAST.from_audioset, state, saved(tmp_path, state, prefix), shape, **sizes)


@pytest.mark.parametrize("hw", [24, 14])
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_imagenet_model_starts_as_the_original_does(shape, size, hw, tmp_path):
    width, heads = WIDTHS[size]
    sizes = {"width": width, "heads": heads, "depth": 1}
    state = torch_original.deit_state(**sizes, hw=hw)
    assert_starts_alike(OriginalAST.from_imagenet, state, saved(tmp_path, state), shape, **sizes)
