"""Training against live transformers models: losses, the gradient of every tensor, ten steps of torch's optimizers."""

import copy
import dataclasses
import functools
import tempfile

import jax
import numpy as np
import optax
import pytest
import torch
import torch_models
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax.training import optimizers
from ast_jax.training.config import TrainConfig

PROBLEMS = {  # problem type, outputs, query, key and value with a bias
    "single": ("single_label_classification", 7, True), "multi": ("multi_label_classification", 7, True),
    "regression": ("regression", 7, True), "regression of one": ("regression", 1, False),
}  # fmt: skip
# Relative. The losses, means of a few terms near 1, inherit the logits' roundings: some tens of 6e-8 in float32, of
# 1e-16 in float64, where 1e-9 leaves room to spare.
LOSS_TOLERANCE = {np.float32: 1e-5, np.float64: 1e-9}
# By norm, tensor by tensor. Gradients pass the layers twice and are summed over 66 tokens: some hundreds of roundings
# of 6e-8 in float32; in float64 of 1e-16, with room to spare.
GRADIENT_TOLERANCE = {np.float32: 5e-5, np.float64: 1e-12}
# Of the largest norm; a smaller tensor is compared with this. Softmax does not see the key bias: its true gradient is
# zero and what there is of it is rounding (2e-8 of the largest in float32), so no ratio of two such means anything. The
# tolerance times the floor is above that rounding, and the floor is at most a fifth of any other tensor.
FLOOR = 2e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's threads wait for one another; beside other processes two took three times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def live(folder, problem, dtype):
    """Return a live model, and its parameters and config as loaded here."""
    kind, outputs, bias = PROBLEMS[problem]
    changes = {"max_length": 128, "num_hidden_layers": 2, "problem_type": kind, "num_labels": outputs, "qkv_bias": bias}
    model = torch_models.saved_model(folder, "stride-16-16", **changes)
    model.set_attn_implementation("sdpa")  # eager attention asks for a softmax in float32 even in a float64 model
    checkpoint = ast_jax.load(folder)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    return model.to(torch.float64 if dtype == np.float64 else torch.float32), params, checkpoint.config


def make_batch(problem, config, dtype, seed=1):
    rng = np.random.default_rng(seed)
    shape = (3, config.num_labels)
    labels = {
        "single": rng.integers(0, config.num_labels, 3),
        "multi": rng.random(shape).astype(dtype),  # soft, as mixup makes them
        "regression": rng.standard_normal(shape).astype(dtype),
        "regression of one": rng.standard_normal(3).astype(dtype),
    }[problem]
    return torch_models.random_spec(config, 3, seed).astype(dtype), labels


@functools.lru_cache
def compiled(config):
    return jax.jit(functools.partial(ast_jax.apply, config=config))


def value_and_grad(params, batch, config, loss=ast_jax.loss):
    """Return the loss and its gradients; the model is compiled once for all problems, the loss is not."""
    spec, labels = batch
    apply = compiled(config.replace(problem_type=None))
    return jax.value_and_grad(lambda params: loss(apply(params, spec), labels, config))(params)


def tensors(params):
    """Return {name: array}, a parameter tree cut into the tensors that torch has: by layer, query, key and value."""
    found = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        if not path.startswith("layers/"):
            found[path] = np.asarray(leaf)
            continue
        for layer, part in enumerate(np.asarray(leaf)):
            if "/qkv/" in path:  # [D, 3, H, K] or [3, H, K]
                found |= {f"{path} {layer} {which}": part.take(i, -3) for i, which in enumerate("qkv")}
            else:
                found[f"{path} {layer}"] = part
    return found


def is_key_bias(name):
    return "qkv/bias" in name and name.endswith("k")


def torch_tensors(model, values, folder):
    """Return {name: array} of torch tensors, one for each parameter, brought here as if they were the weights."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, value in zip(carrier.parameters(), values, strict=True):
            parameter.copy_(value)
    carrier.save_pretrained(folder)
    found = tensors(ast_jax.from_torch(folder).params)
    assert len(found) == len(list(model.parameters()))
    return found


def torch_backward(model, spec, labels):
    """Return the loss; the gradients are left at the parameters."""
    loss = model(torch.from_numpy(spec), labels=torch.from_numpy(labels)).loss
    model.zero_grad()
    loss.backward()
    return loss.item()


def torch_value_and_grad(model, batch, folder):
    value = torch_backward(model, *batch)
    return value, torch_tensors(model, [parameter.grad for parameter in model.parameters()], folder)


def gradient_differences(got, want):
    """Return {name: norm of the difference}, relative to the tensor's own norm or the floor."""
    assert got.keys() == want.keys()
    norms = {name: np.linalg.norm(tensor) for name, tensor in want.items()}
    floor = FLOOR * max(norms.values())
    for name, norm in norms.items():
        assert is_key_bias(name) or norm > 5 * floor, name
        assert (got[name].shape, got[name].dtype) == (want[name].shape, want[name].dtype)
    return {name: np.linalg.norm(got[name] - want[name]) / max(norm, floor) for name, norm in norms.items()}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_and_gradients_equal_torch(problem, dtype, tmp_path, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    model, params, config = live(tmp_path, problem, dtype)
    batch = make_batch(problem, config, dtype)
    value, gradients = value_and_grad(params, batch, config)
    want_value, want_gradients = torch_value_and_grad(model, batch, tmp_path / "gradients")
    assert value.dtype == dtype
    assert float(value) == pytest.approx(want_value, rel=LOSS_TOLERANCE[dtype], abs=0)
    found = gradient_differences(tensors(gradients), want_gradients)
    assert sum(map(is_key_bias, found)) == config.num_hidden_layers * config.qkv_bias
    assert max(found.values()) < GRADIENT_TOLERANCE[dtype], found


binary = optax.sigmoid_binary_cross_entropy
WRONG_LOSSES = {
    "binary for cross-entropy": ("single", lambda z, y, _: binary(z, jax.nn.one_hot(y, 7)).mean()),
    "cross-entropy for binary": ("multi", lambda z, y, _: optax.softmax_cross_entropy(z, y).mean()),
    "sigmoid twice": ("multi", lambda z, y, _: binary(jax.nn.sigmoid(z), y).mean()),
    "sum over classes": ("multi", lambda z, y, _: binary(z, y).sum(1).mean()),
    "sum over outputs": ("regression", lambda z, y, _: ((z - y) ** 2).sum(1).mean()),
    "each output with every label": (
        "regression of one",
        lambda z, y, _: ((z - y[None]) ** 2).mean(),
    ),  # [B, 1] - [1, B]
}


@pytest.mark.parametrize("mistake", WRONG_LOSSES)
def test_wrong_losses_are_seen(mistake, tmp_path):
    """By value and by gradient, in float32, whose tolerances are the wider ones."""
    problem, wrong_loss = WRONG_LOSSES[mistake]
    model, params, config = live(tmp_path, problem, np.float32)
    batch = make_batch(problem, config, np.float32)
    value, gradients = value_and_grad(params, batch, config, wrong_loss)
    want_value, want_gradients = torch_value_and_grad(model, batch, tmp_path / "gradients")
    assert float(value) != pytest.approx(want_value, rel=LOSS_TOLERANCE[np.float32], abs=0)
    assert max(gradient_differences(tensors(gradients), want_gradients).values()) > GRADIENT_TOLERANCE[np.float32]


def test_one_wrong_gradient_is_seen(tmp_path):
    """Any tensor a thousandth off."""
    model, params, config = live(tmp_path, "multi", np.float32)
    batch = make_batch("multi", config, np.float32)
    _, want = torch_value_and_grad(model, batch, tmp_path / "gradients")
    got = tensors(value_and_grad(params, batch, config)[1])
    for name, tensor in got.items():
        found = gradient_differences({**got, name: np.float32(1.001) * tensor}, want)
        assert is_key_bias(name) or found[name] > GRADIENT_TOLERANCE[np.float32], name


# Epochs of two steps: warm-up over four steps, halved at the end of epochs 2, 3 and 4. The rest are the defaults, which
# are the original's.
PEAK = 1e-3
RECIPE = TrainConfig(learning_rate=PEAK, warmup_steps=4, decay_start=2, decay_step=1, decay_factor=0.5, epochs=5)
RATES = [PEAK * factor for factor in (1 / 4, 1 / 2, 3 / 4, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8)]
BY_LAYER = dataclasses.replace(RECIPE, optimizer="adamw", weight_decay=0.05, layer_decay=0.75, head_multiplier=10.0)
# Absolute, of parameters near 1. Adam divides by 1e-8 (its eps) at the least, so that the gradients' roundings, 1e-16
# an element, become 1e-8 of a step of 1e-3; ten steps, each from where the last one led, stay below 1e-9.
STEPS_TOLERANCE = 1e-9


def multiplier(name):
    """Return what a torch parameter's rate is multiplied by in `BY_LAYER`, for two blocks: by the definition."""
    if name.startswith("classifier."):
        return 10.0
    if ".embeddings." in name:
        return 0.75**3
    return {"0": 0.75**2, "1": 0.75}[name.split(".")[2]] if ".layers." in name else 1.0


@functools.lru_cache
def torch_run(problem, training):
    """Return parameters and config at the start, the batches, and torch's tensors after the steps of its optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        model, params, config = live(folder, problem, np.float64)
        batches = [make_batch(problem, config, np.float64, seed) for seed in range(len(RATES))]
        multipliers = [multiplier(name) if training == BY_LAYER else 1.0 for name, _ in model.named_parameters()]
        optimizer = (torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam)(
            [{"params": [parameter]} for parameter in model.parameters()],
            betas=(0.95, 0.999), weight_decay=training.weight_decay,
        )  # fmt: skip
        for rate, batch in zip(RATES, batches, strict=True):
            for group, factor in zip(optimizer.param_groups, multipliers, strict=True):
                group["lr"] = rate * factor
            torch_backward(model, *batch)
            optimizer.step()
        return params, config, batches, torch_tensors(model, model.parameters(), f"{folder}/after")


def steps_difference(problem, optimizer, training=RECIPE):
    """Return the largest difference in any parameter after ten steps with an optimizer."""
    params, config, batches, want = torch_run(problem, training)
    before, opt_state = tensors(params), jax.jit(optimizer.init)(params)
    for batch in batches:
        _, gradients = value_and_grad(params, batch, config)
        updates, opt_state = jax.jit(optimizer.update)(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    got = tensors(params)
    assert got.keys() == want.keys()
    assert min(np.abs(want[key] - before[key]).max() for key in want) > 1e-4  # every tensor went somewhere
    return max(np.abs(got[key] - want[key]).max() for key in want)


def recipe(training=RECIPE, **changes):
    return optimizers.make_optimizer(dataclasses.replace(training, **changes), steps_per_epoch=2)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_ten_steps_equal_torch(problem, x64):
    """The key bias too: the rounding of its zero gradient, in float64, is far below the L2 term and Adam's eps."""
    assert steps_difference(problem, recipe()) < STEPS_TOLERANCE


WRONG_OPTIMIZERS = {
    "AdamW": lambda: optax.adamw(optimizers.learning_rate_schedule(RECIPE, 2), 0.95, 0.999, weight_decay=5e-7),
    "another beta1": lambda: recipe(beta1=0.9),
    "another beta2": lambda: recipe(beta2=0.99),
    "shorter warm-up": lambda: recipe(warmup_steps=2),
    "decay an epoch late": lambda: recipe(decay_start=3),
}


@pytest.mark.parametrize("mistake", WRONG_OPTIMIZERS)
def test_wrong_optimizers_are_seen(mistake, x64):
    """Without a key bias, which the L2 term alone moves and which by itself would show AdamW."""
    assert steps_difference("regression of one", WRONG_OPTIMIZERS[mistake]()) > 1000 * STEPS_TOLERANCE


def test_ten_steps_with_a_rate_for_every_layer_equal_torchs_parameter_groups(x64):
    """AdamW with its decay apart, which by itself moves a key bias too little to be seen: hence without one."""
    assert steps_difference("regression of one", recipe(BY_LAYER), BY_LAYER) < STEPS_TOLERANCE


@pytest.mark.parametrize("changes", [{"layer_decay": 0.74}, {"head_multiplier": 9.0}, {"optimizer": "adam"}], ids=str)
def test_wrong_rates_of_layers_are_seen(changes, x64):
    found = steps_difference("regression of one", recipe(BY_LAYER, **changes), BY_LAYER)
    assert found > 1000 * STEPS_TOLERANCE
