"""Training against live transformers models: the losses, the gradient of every tensor, ten steps of torch's Adam."""

import copy
import functools
import tempfile

import jax
import numpy as np
import optax
import pytest
import torch
import torch_models

import ast_jax
from ast_jax import train
from ast_jax.checkpoint import flatten

PROBLEMS = {
    "single": ("single_label_classification", 7),
    "multi": ("multi_label_classification", 7),
    "regression": ("regression", 7),
    "regression of one": ("regression", 1),
}
BATCH = 3
# Relative. The losses are a mean of few terms near 1 and inherit the logits' roundings: some tens of 6e-8 in float32;
# of 1e-16 in float64, where 1e-9 would show any other formula.
LOSS_TOLERANCE = {np.float32: 1e-5, np.float64: 1e-9}
# By norm and tensor. Gradients pass the layers twice and sum over 146 tokens: a few hundred roundings of 6e-8 in
# float32; in float64 of 1e-16, with room to spare.
GRADIENT_TOLERANCE = {np.float32: 1e-4, np.float64: 1e-12}
# Of the largest norm; smaller tensors are compared with this. Softmax does not see the key bias: its true gradient is
# zero, what there is of it is rounding (2e-8 of the largest in float32), and no ratio of two such means anything. A
# tolerance times the floor is above that rounding, and the floor is a fifth or less of every other tensor.
FLOOR = 1e-3


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    if request.param == np.float64:
        request.getfixturevalue("x64")
    return request.param


def live(folder, problem, dtype, name="stride-10-10"):
    """Return a live model, and its parameters and config as loaded here."""
    kind, classes = PROBLEMS[problem]
    model = torch_models.saved_model(folder, name, num_hidden_layers=2, problem_type=kind, num_labels=classes)
    model.set_attn_implementation("sdpa")  # eager attention asks for a softmax in float32 even in a float64 model
    checkpoint = ast_jax.load(folder)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    return model.to(torch.float64 if dtype == np.float64 else torch.float32), params, checkpoint.config


def make_batch(problem, config, dtype, seed=1):
    rng = np.random.default_rng(seed)
    shape = (BATCH, config.num_labels)
    labels = {
        "single": rng.integers(0, config.num_labels, BATCH),
        "multi": rng.random(shape).astype(dtype),  # as mixup makes them
        "regression": rng.standard_normal(shape).astype(dtype),
        "regression of one": rng.standard_normal(BATCH).astype(dtype),
    }[problem]
    return torch_models.random_spec(config, BATCH, seed).astype(dtype), labels


def torch_loss(model, spec, labels):
    return model(torch.from_numpy(spec), labels=torch.from_numpy(labels)).loss


@functools.lru_cache
def value_and_grad(config):
    def mean_loss(params, spec, labels):
        return ast_jax.loss(ast_jax.apply(params, spec, config), labels, config)

    return jax.jit(jax.value_and_grad(mean_loss))


def relative(got, want):
    return abs(float(got) - want) / abs(want)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_equal_transformers(problem, dtype, tmp_path):
    model, params, config = live(tmp_path, problem, dtype)
    batch = make_batch(problem, config, dtype)
    value, _ = value_and_grad(config)(params, *batch)
    assert value.dtype == dtype
    assert relative(value, torch_loss(model, *batch).item()) < LOSS_TOLERANCE[dtype]


def binary(logits, labels):
    return optax.sigmoid_binary_cross_entropy(logits, labels)


WRONG_LOSSES = {
    "binary for cross-entropy": ("single", lambda z, y: binary(z, jax.nn.one_hot(y, 7)).mean()),
    "mean over classes too": ("single", lambda z, y: optax.softmax_cross_entropy(z, jax.nn.one_hot(y, 7)).mean() / 7),
    "cross-entropy for binary": ("multi", lambda z, y: optax.softmax_cross_entropy(z, y).mean()),
    "sigmoid twice": ("multi", lambda z, y: binary(jax.nn.sigmoid(z), y).mean()),
    "sum over classes": ("multi", lambda z, y: binary(z, y).sum(1).mean()),
    "half of the square": ("regression", lambda z, y: optax.l2_loss(z, y).mean()),
    "sum over outputs": ("regression", lambda z, y: ((z - y) ** 2).sum(1).mean()),
    "every output with every label": ("regression of one", lambda z, y: ((z - y) ** 2).mean()),  # [B, 1] - [B]
}


@pytest.mark.parametrize("mistake", WRONG_LOSSES)
def test_wrong_losses_are_seen(mistake, tmp_path):
    """In float32, whose tolerance is the wider one."""
    problem, wrong_loss = WRONG_LOSSES[mistake]
    model, params, config = live(tmp_path, problem, np.float32)
    spec, labels = make_batch(problem, config, np.float32)
    want = torch_loss(model, spec, labels).item()
    logits = ast_jax.apply(params, spec, config)
    assert relative(ast_jax.loss(logits, labels, config), want) < LOSS_TOLERANCE[np.float32]
    assert relative(wrong_loss(logits, labels), want) > LOSS_TOLERANCE[np.float32]


def tensors(params):
    """Return {name: array} of a parameter tree cut into the tensors that torch has: by layer, query, key and value."""
    found = {}
    for path, leaf in flatten(params).items():
        if not path.startswith("layers/"):
            found[path] = np.asarray(leaf)
            continue
        for layer, part in enumerate(np.asarray(leaf)):
            if "/qkv/" in path:  # [D, 3, H, K] or [3, H, K]
                split = {which: part.take(index, -3) for index, which in enumerate(("query", "key", "value"))}
                found |= {f"{path} {layer} {which}": tensor for which, tensor in split.items()}
            else:
                found[f"{path} {layer}"] = part
    return found


def is_key_bias(name):
    return "qkv/bias" in name and name.endswith("key")


def torch_tensors(model, values, folder):
    """Return {name: array} of a torch tensor for each parameter, brought here as if they were the weights."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, value in zip(carrier.parameters(), values, strict=True):
            parameter.copy_(value)
    carrier.save_pretrained(folder)
    found = tensors(ast_jax.from_torch(folder).params)
    assert len(found) == len(list(model.parameters()))
    return found


def torch_gradients(model, batch, folder):
    model.zero_grad()
    torch_loss(model, *batch).backward()
    return torch_tensors(model, [parameter.grad for parameter in model.parameters()], folder)


def gradient_differences(got, want):
    """Return {name: difference by norm}, relative to the tensor's own norm or the floor."""
    assert got.keys() == want.keys()
    norms = {name: np.linalg.norm(tensor) for name, tensor in want.items()}
    floor = FLOOR * max(norms.values())
    for name, norm in norms.items():
        assert is_key_bias(name) or norm > 5 * floor, name
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype
    return {name: np.linalg.norm(got[name] - want[name]) / max(norm, floor) for name, norm in norms.items()}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_equal_torch(problem, dtype, tmp_path):
    model, params, config = live(tmp_path, problem, dtype)
    batch = make_batch(problem, config, dtype)
    _, gradients = value_and_grad(config)(params, *batch)
    found = gradient_differences(tensors(gradients), torch_gradients(model, batch, tmp_path / "gradients"))
    assert sum(map(is_key_bias, found)) == config.num_hidden_layers
    assert max(found.values()) < GRADIENT_TOLERANCE[dtype], found


def test_wrong_gradients_are_seen(tmp_path):
    """In float32, whose tolerance is the wider one: another activation, and any one tensor off by a thousandth."""
    model, params, config = live(tmp_path, "multi", np.float32)
    batch = make_batch("multi", config, np.float32)
    want = torch_gradients(model, batch, tmp_path / "gradients")
    _, gradients = value_and_grad(config.replace(hidden_act="gelu_new"))(params, *batch)
    assert max(gradient_differences(tensors(gradients), want).values()) > GRADIENT_TOLERANCE[np.float32]
    _, gradients = value_and_grad(config)(params, *batch)
    got = tensors(gradients)
    for name, tensor in got.items():
        found = gradient_differences({**got, name: 1.001 * tensor}, want)
        assert is_key_bias(name) or found[name] > GRADIENT_TOLERANCE[np.float32], name


# Epochs of two steps; warm-up over four of them, halved at the end of epochs 2, 3 and 4. Powers of two and quarters,
# because `learning_rate_schedule` computes in float32 with x64 too: others would differ by 6e-8 of a step.
RECIPE = {
    "learning_rate": 2.0**-10, "warmup_steps": 4, "decay_start": 2, "decay_step": 1, "decay_factor": 0.5, "epochs": 5,
}  # fmt: skip
RATES = 2.0**-10 * np.array([1 / 4, 1 / 2, 3 / 4, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8])
# Absolute, of parameters near 1. Adam's eps is 1e-8: roundings of the gradients, 1e-16 each element, become 1e-8 of a
# step of 1e-3 where a gradient is nearly zero, and less elsewhere; ten steps, each from where the last one led, stay
# below 1e-9.
STEPS_TOLERANCE = 1e-9


@functools.lru_cache
def torch_run(problem, name):
    """Return the parameters at the start, config, batches, and torch's tensors after ten steps of the original's Adam."""
    with tempfile.TemporaryDirectory() as folder:
        model, params, config = live(folder, problem, np.float64, name)
        batches = [make_batch(problem, config, np.float64, seed) for seed in range(len(RATES))]
        adam = torch.optim.Adam(model.parameters(), betas=(0.95, 0.999), weight_decay=5e-7)
        for rate, batch in zip(RATES, batches, strict=True):
            adam.param_groups[0]["lr"] = float(rate)
            adam.zero_grad()
            torch_loss(model, *batch).backward()
            adam.step()
        return params, config, batches, torch_tensors(model, model.parameters(), f"{folder}/after")


def steps_difference(problem, name, optimizer):
    """Return the largest difference after ten steps with an optimizer."""
    params, config, batches, want = torch_run(problem, name)
    opt_state = train.init_state(params, optimizer, train.TrainConfig()).opt_state

    @jax.jit
    def step(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    before = tensors(params)
    for batch in batches:
        _, gradients = value_and_grad(config)(params, *batch)
        params, opt_state = step(params, opt_state, gradients)
    got = tensors(params)
    assert got.keys() == want.keys()
    assert min(np.abs(want[key] - before[key]).max() for key in want) > 1e-4  # every tensor went somewhere
    return max(np.abs(got[key] - want[key]).max() for key in want)


# The key bias too, which Adam would drive by rounding alone in float32: here the rounding of its zero gradient, 1e-17,
# is far below both eps and the L2 term. That term alone moves it.
@pytest.mark.parametrize(("problem", "name"), [("single", "stride-10-10"), ("multi", "no-qkv-bias")])
def test_ten_steps_equal_torch(problem, name, x64):
    optimizer = train.make_optimizer(train.TrainConfig(**RECIPE), steps_per_epoch=2)
    assert steps_difference(problem, name, optimizer) < STEPS_TOLERANCE


def other(**changes):
    return train.make_optimizer(train.TrainConfig(**{**RECIPE, **changes}), steps_per_epoch=2)


def adamw():
    schedule = train.learning_rate_schedule(train.TrainConfig(**RECIPE), steps_per_epoch=2)
    return optax.adamw(schedule, 0.95, 0.999, weight_decay=5e-7)


WRONG_OPTIMIZERS = {
    "AdamW": adamw,
    "no weight decay": functools.partial(other, weight_decay=0.0),
    "another beta1": functools.partial(other, beta1=0.9),
    "another beta2": functools.partial(other, beta2=0.99),
    "shorter warm-up": functools.partial(other, warmup_steps=2),
    "decay an epoch late": functools.partial(other, decay_start=3),
}


# Without a key bias: alone it would show AdamW and the missing L2, and nothing else is to be left to it.
@pytest.mark.parametrize("mistake", WRONG_OPTIMIZERS)
def test_wrong_optimizers_are_seen(mistake, x64):
    assert steps_difference("multi", "no-qkv-bias", WRONG_OPTIMIZERS[mistake]()) > 1000 * STEPS_TOLERANCE
