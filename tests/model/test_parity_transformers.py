"""Parity with transformers models with random weights: every output, float32 and float64; mutations are detected."""

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_models
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

import ast_jax

# Relative to the largest value. float32: a few hundred roundings of 6e-8 through the layers; float64: those of 1e-16,
# and eps 1e-12, leave 1e-9 with room to spare.
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}


def relative(got, want):
    """Return the largest difference relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def torch_outputs(model, spec, dtype, implementation):
    model = model.to(torch.float64 if dtype == np.float64 else torch.float32)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        body = model.audio_spectrogram_transformer(
            torch.from_numpy(spec.astype(dtype)), output_hidden_states=True, output_attentions=implementation == "eager"
        )
        logits = model.classifier(body.pooler_output)
    return body, logits.numpy()


def compare(folder, model, dtype, implementation):
    """Return the largest relative difference of each kind of output."""
    checkpoint = ast_jax.load(folder)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    spec = torch_models.random_spec(checkpoint.config)
    body, want_logits = torch_outputs(model, spec, dtype, implementation)
    logits = ast_jax.apply(params, spec.astype(dtype), checkpoint.config)
    out = ast_jax.encode(
        params, spec.astype(dtype), checkpoint.config, output_hidden_states=True, output_attentions=True
    )
    assert logits.dtype == dtype
    layers = checkpoint.config.num_hidden_layers
    assert len(body.hidden_states) == layers + 1 == len(out.hidden_states)
    found = {"logits": relative(logits, want_logits), "pooled": relative(out.pooler_output, body.pooler_output)}
    found["last"] = relative(out.last_hidden_state, body.last_hidden_state)
    for index in range(layers + 1):
        found[f"hidden {index}"] = relative(out.hidden_states[index], body.hidden_states[index])
    maps = {}
    if implementation == "eager":
        assert len(body.attentions) == layers == len(out.attentions)  # transformers can return an empty tuple
        maps = {index: relative(out.attentions[index], body.attentions[index]) for index in range(layers)}
    return found, maps


@pytest.mark.parametrize("name", torch_models.CONFIGS)
def test_float32_outputs_equal_transformers(name, tmp_path):
    model = torch_models.saved_model(tmp_path, name)
    found, maps = compare(tmp_path, model, np.float32, "eager")
    assert max(found.values()) < TOLERANCE[np.float32], found
    assert max(maps.values()) < TOLERANCE[np.float32], maps


IN_FLOAT64 = ("stride-10-10", "stride-10-16", "other-eps")  # the others take as long again, and are in the slow tier


@pytest.mark.parametrize(
    "name",
    [name if name in IN_FLOAT64 else pytest.param(name, marks=pytest.mark.slow) for name in torch_models.CONFIGS],
)
def test_float64_outputs_equal_transformers(name, tmp_path, x64, monkeypatch):
    model = torch_models.saved_model(tmp_path, name)
    found, _ = compare(tmp_path, model, np.float64, "sdpa")
    assert max(found.values()) < TOLERANCE[np.float64], found
    # Only eager attention returns maps, and it asks for a softmax in float32 even in a float64 model: not here.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim=None, **_: softmax(scores, dim))
    found, maps = compare(tmp_path, model, np.float64, "eager")
    assert max(found.values()) < TOLERANCE[np.float64], found
    assert max(maps.values()) < TOLERANCE[np.float64], maps


def swap(params, path_parts, first, second, axis):
    """Return params with two slices along an axis of one leaf swapped."""
    flat = dict(flatten_dict(params, sep="/"))
    leaf = flat[path_parts].copy()
    index = np.arange(leaf.shape[axis])
    index[[first, second]] = index[[second, first]]
    flat[path_parts] = leaf.take(index, axis)
    return unflatten_dict(flat, sep="/")


def transposed_grid(params, config):
    positions = params["embeddings"]["position_embeddings"]
    rows, columns = config.grid
    grid = positions[2:].reshape(rows, columns, -1).swapaxes(0, 1).reshape(rows * columns, -1)
    embeddings = {**params["embeddings"], "position_embeddings": np.concatenate([positions[:2], grid])}
    return {**params, "embeddings": embeddings}


def swapped_tokens(params):
    embeddings = params["embeddings"]
    return {
        **params,
        "embeddings": {
            **embeddings,
            "cls_token": embeddings["distillation_token"],
            "distillation_token": embeddings["cls_token"],
        },
    }


MUTATIONS = {
    "tanh GELU": lambda c: c.replace(config=c.config.replace(hidden_act="gelu_new")),
    "another eps": lambda c: c.replace(config=c.config.replace(layer_norm_eps=1e-6)),
    "q and k swapped": lambda c: c.replace(
        params=swap(swap(c.params, "layers/attention/qkv/kernel", 0, 1, 2), "layers/attention/qkv/bias", 0, 1, 1)
    ),
    "grid transposed": lambda c: c.replace(params=transposed_grid(c.params, c.config)),
    "tokens swapped": lambda c: c.replace(params=swapped_tokens(c.params)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mutations_are_detected(mutation, dtype, tmp_path, x64):
    """Each mutation changes the logits by more than the tolerance of the parity test."""
    model = torch_models.saved_model(tmp_path, "stride-10-10")
    checkpoint = MUTATIONS[mutation](ast_jax.load(tmp_path))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    spec = torch_models.random_spec(checkpoint.config)
    _, want = torch_outputs(model, spec, dtype, "sdpa")
    moved = relative(ast_jax.apply(params, spec.astype(dtype), checkpoint.config), want)
    if mutation == "another eps" and dtype == np.float32:
        # 1e-6 against 1e-12 under variances near 1 is below float32's own rounding: only float64 can see it.
        assert moved < TOLERANCE[np.float32]
    else:
        assert moved > TOLERANCE[dtype]


def test_headless_model(tmp_path):
    model = torch_models.saved_model(tmp_path, "stride-10-10", cls=transformers.ASTModel)
    checkpoint = ast_jax.load(tmp_path)
    assert "classifier" not in checkpoint.params
    spec = torch_models.random_spec(checkpoint.config).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(spec)).pooler_output
    assert relative(ast_jax.encode(checkpoint.params, spec, checkpoint.config).pooler_output, want) < 1e-4
    with pytest.raises(ValueError, match="headless"):
        ast_jax.apply(checkpoint.params, spec, checkpoint.config)


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float16, np.float32),
    ],
    ids=str,
)
def test_tensors_are_read_exactly(dtype, loaded, tmp_path):
    """Bit for bit, also float64 without x64; half precision is converted to float32, which is exact."""
    model = torch_models.saved_model(tmp_path, "stride-10-10", num_hidden_layers=1).to(dtype)
    model.save_pretrained(tmp_path)
    params = flatten_dict(ast_jax.load(tmp_path).params, sep="/")
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(loaded)}
    want = model.classifier.dense.weight.detach().to(torch.float64).numpy().T
    np.testing.assert_array_equal(params["classifier/dense/kernel"], want)
    query = model.audio_spectrogram_transformer.state_dict()
    key = next(name for name in query if name.startswith("layers.0") and name.endswith("k_proj.bias"))
    want = query[key].to(torch.float64).numpy().reshape(3, -1)
    np.testing.assert_array_equal(params["layers/attention/qkv/bias"][0, 1], want)


def test_integer_tensors_are_refused(tmp_path):
    torch_models.saved_model(tmp_path, "stride-10-10", num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "classifier.dense.bias": torch.zeros(7, dtype=torch.int64)}, path)
    with pytest.raises(
        ast_jax.CheckpointError, match=r"classifier.dense.bias: expected one of bfloat16, .*, got int64"
    ):
        ast_jax.load(tmp_path)


@pytest.mark.slow
def test_published_size_equals_transformers(tmp_path):
    """The paper's model: 12 layers of width 768, 1,214 tokens, 527 labels."""
    shape = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    model = torch_models.saved_model(tmp_path, "long", **shape, frequency_stride=10, num_labels=527)
    checkpoint = ast_jax.load(tmp_path)
    assert ast_jax.num_params(checkpoint.params) == 86_594_063
    spec = torch_models.random_spec(checkpoint.config, batch=1).astype(np.float32)
    _, want = torch_outputs(model, spec, np.float32, "sdpa")
    assert relative(ast_jax.apply(checkpoint.params, spec, checkpoint.config), want) < TOLERANCE[np.float32]
