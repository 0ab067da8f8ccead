"""Learning rates by step and by epoch; optimizers against torch's, with parameter groups for layers and head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ast_jax.training import optimizers
from ast_jax.training.config import TrainConfig

LAYERS = 3
SCHEDULES = {
    "step": TrainConfig(epochs=9, learning_rate=2.5e-4, decay_start=2, decay_step=2, decay_factor=0.85),
    "cosine": TrainConfig(epochs=9, learning_rate=2.5e-4, schedule="cosine", warmup_steps=7),
    "constant": TrainConfig(epochs=9, learning_rate=2.5e-4, schedule="constant", warmup_steps=9, warmup_hold=4),
}


def test_warm_up_is_linear_and_does_not_move_the_decay():
    training = TrainConfig(epochs=4, learning_rate=1.0, warmup_steps=10, decay_start=2, decay_step=1)
    schedule = optimizers.learning_rate_schedule(training, 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 4, 9, 10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([schedule(step) for step in (199, 201, 301)], [1.0, 0.5, 0.25], rtol=1e-6)
    cosine = optimizers.learning_rate_schedule(dataclasses.replace(training, schedule="cosine"), 100)
    np.testing.assert_allclose([cosine(step) for step in (4, 10, 205, 400)], [0.5, 1.0, 0.5, 0.0], atol=1e-6)


def test_decays_during_warm_up_count():
    """Decays at steps 200, 300 and 400 of a warm-up of 450: an eighth of the rate remains after it."""
    training = TrainConfig(epochs=5, learning_rate=1.0, warmup_steps=450, decay_start=2, decay_step=1)
    schedule = jax.jit(optimizers.learning_rate_schedule(training, 100))
    np.testing.assert_allclose([schedule(step) for step in (449, 450, 499)], 0.125, rtol=1e-6)
    np.testing.assert_allclose([schedule(step) for step in (199, 200)], [200 / 450, 0.5 * 201 / 450], rtol=1e-6)


def test_warm_up_in_steps_is_the_originals():
    """At steps 0, 50, 100, … 1000 the rate is set to step / 1000 of the peak, and held until the next of them."""
    training = TrainConfig(epochs=1, learning_rate=1e-5, warmup_steps=1000, warmup_hold=50, schedule="constant")
    schedule = jax.jit(optimizers.learning_rate_schedule(training, 2000))
    want, rate = [], None
    for step in range(1200):
        if step <= 1000 and step % 50 == 0:
            rate = step / 1000 * 1e-5
        want.append(rate)
    np.testing.assert_allclose(schedule(np.arange(1200)), want, rtol=1e-6)  # float32
    smooth = dataclasses.replace(training, warmup_hold=1)
    np.testing.assert_allclose(optimizers.learning_rate_schedule(smooth, 2000)(np.arange(3)), [1e-8, 2e-8, 3e-8])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_exact_in_float64(name, x64):
    """The compiled schedule equals the host's, to a rounding error or two of powers and cosines in two libraries."""
    training, steps = SCHEDULES[name], np.arange(9) * 5 + 4
    rates = jax.jit(optimizers.learning_rate_schedule(training, 5))(steps.astype(np.int32))
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, optimizers.epoch_rates(training, 5), rtol=1e-15, atol=1e-19)


def test_epoch_rates_are_those_of_the_last_steps():
    """Steps 2, 5, 8 and 11 of a warm-up of 9, set at 0, 4 and 8; the next time, at 12, it is over."""
    rates = optimizers.epoch_rates(SCHEDULES["constant"], 3)
    np.testing.assert_allclose(np.divide(rates, 2.5e-4), [0, 4 / 9, 8 / 9, 8 / 9, *[1] * 5], rtol=1e-15)  # float64
    assert all(type(rate) is float for rate in rates)
    assert optimizers.epoch_rates(SCHEDULES["step"], 3) == [
        2.5e-4 * 0.85**falls for falls in (0, 0, 1, 1, 2, 2, 3, 3, 4)
    ]


def tree(rng):
    """Return a small parameter tree: two stacked tensors in the layers, one in the other modules."""
    shapes = {
        "embeddings": {"projection": (4, 2)}, "layers": {"mlp": {"kernel": (LAYERS, 3, 2), "bias": (LAYERS, 2)}},
        "layernorm": {"scale": (3,)}, "classifier": {"layernorm": {"bias": (2,)}, "dense": {"kernel": (2, 5)}},
    }  # fmt: skip
    return jax.tree.map(lambda shape: rng.standard_normal(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def torch_leaves(values):
    """Return the tree's tensors as torch would hold them, each with its module and its layer."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(values):
        part = path[0].key
        blocks = enumerate(leaf) if part == "layers" else [(None, leaf)]
        found += [(part, block, torch.from_numpy(np.array(tensor))) for block, tensor in blocks]
    return found


def torch_run(training, start, gradients, rate_of, clip=lambda tensors: None):
    """Return the tensors after torch's optimizer, with groups at the rate `rate_of(part, block)`, None for frozen."""
    leaves = torch_leaves(start)
    groups = [{"params": [leaf], "lr": rate_of(part, block)} for part, block, leaf in leaves]
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(
        [group for group in groups if group["lr"] is not None],
        betas=(training.beta1, training.beta2), weight_decay=training.weight_decay,
    )  # fmt: skip
    for gradient in gradients:
        for group, (_, _, value) in zip(groups, torch_leaves(gradient), strict=True):
            group["params"][0].grad = None if group["lr"] is None else value
        clip([leaf for _, _, leaf in leaves if leaf.grad is not None])
        optimizer.step()
    return [leaf.numpy() for _, _, leaf in leaves]


def run(training, start, gradients):
    """Return the tensors after `make_optimizer`'s steps, in float64, as `torch_run` does."""
    optimizer = optimizers.make_optimizer(training, 10)
    params, state = jax.tree.map(jnp.asarray, start), None
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return [leaf.numpy() for _, _, leaf in torch_leaves(params)]


def differences(got, want):
    return max(np.abs(one - other).max() for one, other in zip(got, want, strict=True))


RATE = 1e-2
# Ten steps of about 1e-2, the order of whose float64 operations differs: some tens of 1e-16.
TOLERANCE = 1e-13


def problem():
    rng = np.random.default_rng(0)
    return tree(rng), [tree(rng) for _ in range(10)]


def plain_rate(part, block):
    return RATE


def layer_rate(part, block):
    """Layer-wise decay of 0.75 and a head at ten times the rate by definition, for three layers."""
    of_part = {"embeddings": 0.75**4, "layernorm": 1.0, "classifier": 10.0}
    return RATE * (0.75 ** (LAYERS - block) if part == "layers" else of_part[part])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("rate_of", [plain_rate, layer_rate])
def test_optimizers_are_torchs(optimizer, rate_of, x64):
    """Adam with an L2 penalty and AdamW with decoupled weight decay, with one rate or with parameter groups."""
    changes = {"layer_decay": 0.75, "head_multiplier": 10.0} if rate_of is layer_rate else {}
    training = TrainConfig(optimizer=optimizer, learning_rate=RATE, weight_decay=0.1, schedule="constant", **changes)
    start, gradients = problem()
    want = torch_run(training, start, gradients, rate_of)
    assert differences(run(training, start, gradients), want) < TOLERANCE
    other = dataclasses.replace(training, optimizer={"adam": "adamw", "adamw": "adam"}[optimizer])
    assert differences(run(other, start, gradients), want) > 1e-3
    for wrong in ({"layer_decay": 0.7}, {"head_multiplier": 9.0}, {"weight_decay": 0.09}):
        assert differences(run(dataclasses.replace(training, **wrong), start, gradients), want) > 1e-4


def clip_to_one(tensors):
    """Scale torch's gradients to a norm of one, exactly: torch's own function adds 1e-6 to the norm."""
    norm = torch.sqrt(sum(torch.square(tensor.grad).sum() for tensor in tensors))
    assert norm > 1
    for tensor in tensors:
        tensor.grad = tensor.grad / norm


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, lambda part, block: False),
        ({"freeze_layers": 2}, lambda part, block: part == "embeddings" or (part == "layers" and block < 2)),
        ({"freeze_layers": LAYERS}, lambda part, block: part in ("embeddings", "layers")),
        ({"linear_probe": True}, lambda part, block: part != "classifier"),
    ],
    ids=["all", "two layers frozen", "all layers frozen", "linear probe"],
)
def test_only_trainable_parameters_are_clipped_and_updated(changes, frozen, x64):
    """As torch without gradients for frozen parameters; weight decay is large and would change them too."""
    training = TrainConfig(learning_rate=RATE, weight_decay=0.1, schedule="constant", max_grad_norm=1.0, **changes)
    start, gradients = problem()
    got = run(training, start, gradients)
    want = torch_run(training, start, gradients, lambda *which: None if frozen(*which) else RATE, clip_to_one)
    assert differences(got, want) < TOLERANCE
    moved = 0
    for (part, block, before), after in zip(torch_leaves(start), got, strict=True):
        same = np.array_equal(before.numpy(), after)
        assert same == frozen(part, block)
        moved += not same
    assert moved
    assert differences(run(dataclasses.replace(training, max_grad_norm=0.0), start, gradients), want) > 1e-4


def test_short_gradients_are_not_clipped(x64):
    training = TrainConfig(learning_rate=RATE, schedule="constant")
    start, gradients = problem()
    loose = dataclasses.replace(training, max_grad_norm=100.0)
    assert differences(run(loose, start, gradients), run(training, start, gradients)) < TOLERANCE


def test_optimizer_state_is_arrays_and_excludes_frozen_modules():
    start, _ = problem()
    sizes = {}
    for name, changes in (("all", {}), ("frozen", {"freeze_layers": 1}), ("probe", {"linear_probe": True})):
        state = optimizers.make_optimizer(TrainConfig(**changes), 10).init(jax.tree.map(jnp.asarray, start))
        leaves = jax.tree.leaves(state)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        sizes[name] = sum(leaf.size for leaf in leaves if leaf.ndim)
    assert sizes == {"all": 2 * (8 + 24 + 3 + 12), "frozen": 2 * (24 + 3 + 12), "probe": 2 * 12}
