"""The training step: independent of devices and gradient accumulation; frozen modules; lowering for accelerators."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ast_jax
from ast_jax.config import FrontendConfig
from ast_jax.model import losses
from ast_jax.training import optimizers
from ast_jax.training import step as train
from ast_jax.training.config import TrainConfig
from ast_jax.training.parallel import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=4,
    problem_type="multi_label_classification", max_length=32, num_mel_bins=32, patch_size=8, frequency_stride=8,
    time_stride=8,
)  # fmt: skip
FRONTEND = FrontendConfig(max_length=32, num_mel_bins=32)
AUGMENTED = TrainConfig(
    batch_size=16, learning_rate=1e-3, weight_decay=1e-6, frequency_mask=8, time_mask=8, noise=True, warmup_steps=3,
    frequency_shift=3, time_shift=5, ema_decay=0.9, ramp_epochs=1.0, schedule="cosine", epochs=2,
)  # fmt: skip
# Every setting of a step except the linear probe, which excludes frozen layers.
EVERYTHING = dataclasses.replace(
    AUGMENTED, optimizer="adamw", layer_decay=0.8, head_multiplier=3.0, freeze_layers=1, max_grad_norm=0.5,
    grad_accum_steps=2,
    label_smoothing=0.1, patchout_frequency=1, patchout_time=1, patchout=2, rematerialize=True, warmup_steps=4,
    warmup_hold=2,
)  # fmt: skip
PLAIN = TrainConfig(batch_size=16, learning_rate=3e-3, schedule="constant", beta1=0.9, ema_decay=0.3)
HALF = dataclasses.replace(PLAIN, dtype="bfloat16", label_smoothing=0.3)
STEPS_PER_EPOCH = 5
FORWARD = jax.jit(functools.partial(train.eval_step, config=CONFIG, frontend=FRONTEND))


def batches(count, size=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "waveform": (0.1 * rng.standard_normal((size, FRONTEND.max_samples))).astype(dtype),
            "num_samples": rng.integers(100, FRONTEND.max_samples, size).astype(np.int32),
            "labels": (rng.random((size, CONFIG.num_labels)) < 0.4).astype(dtype),
        }


def whole(batch):
    """Return a whole batch as one device takes it, with global indices."""
    return {**batch, "global_index": np.arange(len(batch["labels"]), dtype=np.int32)}


def make_step(training, config=CONFIG):
    return functools.partial(
        train.train_step, config=config, frontend=FRONTEND, training=training,
        optimizer=optimizers.make_optimizer(training, STEPS_PER_EPOCH), steps_per_epoch=STEPS_PER_EPOCH,
    )  # fmt: skip


@functools.lru_cache
def compiled(training):
    return jax.jit(make_step(training))


@functools.lru_cache
def drawn(config):
    return jax.tree.map(np.asarray, ast_jax.init(jax.random.key(0), config))


def start(training, config=CONFIG, dtype=np.float32):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), drawn(config))
    return train.init_state(params, optimizers.make_optimizer(training, STEPS_PER_EPOCH), training)


def run(training, config=CONFIG, steps=10, dtype=np.float64, method=None):
    """Return the state and the losses after some steps, in one program, or with one of `METHODS` on eight devices."""
    state, values = start(training, config, dtype), []
    if method is None:
        step = jax.jit(make_step(training, config))
    else:
        parallel = METHODS[method](jax.devices())
        step, state = parallel.compile_train_step(make_step(training, config)), parallel.replicate(state)
    for batch in batches(steps, dtype=dtype):
        state, value = step(state, batch if method else whole(batch))
        values.append(float(value))
    return parallel.unreplicate(state) if method else state, values


def assert_same_state(got, want):
    """Compare to 1e-9: float64 sums in another order, 1e-16 each, through a few steps of Adam."""
    for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-9, err_msg=jax.tree_util.keystr(path))


def changed(before, after):
    """Return the paths of the leaves in which any bit changed, for stacked layers one path for each layer."""
    paths = set()
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        pairs = enumerate(zip(old, new, strict=True)) if name.startswith("layers/") else [("", (old, new))]
        paths |= {f"{name} {block}".strip() for block, (a, b) in pairs if a.tobytes() != b.tobytes()}
    return paths


DROPOUT = CONFIG.replace(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(scope="module")
def undivided():
    """Return parameters, and the state and losses after ten steps without accumulation and rematerialisation."""
    jax.config.update("jax_enable_x64", True)
    training = dataclasses.replace(EVERYTHING, grad_accum_steps=1, rematerialize=False)
    before, (state, values) = start(training, DROPOUT, np.float64).params, run(training, DROPOUT)
    jax.config.update("jax_enable_x64", False)
    return jax.tree.map(np.asarray, before), jax.tree.map(np.asarray, state), values


@pytest.mark.parametrize("method", ["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def test_gradient_accumulation_on_eight_devices_gives_the_run_of_one(method, undivided, x64):
    """With every augmentation, patchout and dropout; each device accumulates over its two examples.

    The key bias too, whose true gradient is zero: rounding is far below Adam's eps of 1e-8, and stays there as long as
    learning rate × weight decay / eps, by which each step multiplies it, is below 1.
    """
    assert jax.local_device_count() == 8
    state, values = run(EVERYTHING, DROPOUT, method=method)
    _, want, want_values = undivided
    np.testing.assert_allclose(values, want_values, rtol=1e-9)
    assert int(state.step) == int(want.step) == 10
    assert_same_state(state, want)


def test_frozen_parameters_keep_every_bit_and_the_others_change(undivided):
    """In the moving average too; with frozen embeddings and one frozen layer of two."""
    before, state, _ = undivided
    names = changed(jax.tree.map(np.zeros_like, before), jax.tree.map(np.ones_like, before))
    frozen = {name for name in names if name.startswith("embeddings/") or name.endswith(" 0")}
    assert len(frozen) == 5 + 12
    assert changed(before, state.params) == names - frozen
    assert changed(before, state.ema_params) == names - frozen
    assert changed(state.params, state.ema_params) == names - frozen
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float64)}


def test_linear_probe_changes_the_classifier_only_and_has_no_backward_pass_below():
    """The classifier's update equals full training's; matrix products are the forward pass's and the head's."""
    probe, batch = dataclasses.replace(PLAIN, linear_probe=True), whole(next(batches(1)))
    before, step = start(probe), compiled(probe)
    after, value = step(before, batch)
    assert changed(before.params, after.params) == changed(before.ema_params, after.ema_params)
    assert changed(before.params, after.params) == {
        "classifier/dense/bias", "classifier/dense/kernel", "classifier/layernorm/bias", "classifier/layernorm/scale",
    }  # fmt: skip
    full, full_value = compiled(PLAIN)(start(PLAIN), batch)
    assert float(value) == pytest.approx(float(full_value), rel=1e-5)
    heads = (jax.tree.leaves(done.params["classifier"]) for done in (after, full))
    for one, other in zip(*heads, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)  # a hundredth of the step; float32 in two programs
    inputs = {name: batch[name] for name in ("waveform", "num_samples")}
    texts = str(step.trace(before, batch).jaxpr), str(FORWARD.trace(before.params, inputs).jaxpr)
    products = [text.count("dot_general[") + text.count("conv_general_dilated[") for text in texts]
    assert products[0] == products[1] + 2  # the gradient of the kernel, and of what the dense layer takes


def test_gradient_accumulation_saves_memory():
    """Temporary memory of the compiled step, beside its arguments."""

    def memory(training):
        program = compiled(training).lower(start(training), whole(next(batches(1)))).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(dataclasses.replace(PLAIN, grad_accum_steps=8)) < 0.5 * memory(PLAIN)


def test_patchout_shortens_the_sequence_of_tokens():
    """Of 16 patches a row, a column and two more are dropped: 7 and the two prefix tokens remain in every layer."""
    text = {}
    for name, training in (("all", AUGMENTED), ("some", dataclasses.replace(EVERYTHING, grad_accum_steps=1))):
        text[name] = jax.jit(make_step(training)).lower(start(training), whole(next(batches(1)))).as_text()
    assert "tensor<16x18x64xf32>" in text["all"]  # [B, N, M]
    assert "tensor<16x9x64xf32>" in text["some"]
    assert "x18x64x" not in text["some"]


@pytest.fixture
def model_call(monkeypatch):
    """Return a function that takes a step on blank features and returns the options that reach the model."""

    class SeenError(Exception):
        pass

    def apply(params, spec, **options):
        raise SeenError(options)

    def call(training, **options):
        with pytest.raises(SeenError) as caught:
            make_step(training)(start(training), whole(next(batches(1))), **options)
        return caught.value.args[0]

    monkeypatch.setattr(train, "augmented_features", lambda *_: jnp.zeros((16, 32, 32)))
    monkeypatch.setattr(train.model, "apply", apply)
    return call


def test_every_example_keeps_its_own_patches(model_call):
    """And the other options of the model follow the settings."""
    training = dataclasses.replace(EVERYTHING, grad_accum_steps=1, dtype="bfloat16")
    given = model_call(training, attention_implementation="chunked")
    assert given["patch_indices"].shape == (16, 7)
    assert len(np.unique(given["patch_indices"], axis=0)) > 10
    assert (given["train"], given["rematerialize"], given["dtype"]) == (True, True, jnp.bfloat16)
    assert given["attention_implementation"] == "chunked"
    given = model_call(PLAIN)
    assert (given["patch_indices"], given["rematerialize"], given["dtype"]) == (None, False, None)
    assert given["attention_implementation"] == "auto"


def test_bfloat16_is_for_the_computation_only():
    batch = whole(next(batches(1)))
    step, state = compiled(HALF), start(HALF)
    after, value = step(state, batch)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((after.params, after.ema_params)))
    assert {leaf.dtype for leaf in jax.tree.leaves(after.opt_state)} == {np.dtype(np.float32), np.dtype(np.int32)}
    assert value.dtype == np.float32
    lines = [line for line in step.lower(state, batch).as_text().splitlines() if "stablehlo.dot_general" in line]
    # In float32: the mel filters (by either way), the head, and the softmax's share of attention's backward pass.
    assert sum("bf16" in line for line in lines) > 2 * sum("bf16" not in line for line in lines)


def test_labels_are_smoothed():
    """Without augmentation the loss is that of the evaluation logits; the head's are large and right."""
    state, batch = start(HALF), whole(next(batches(1)))
    state.params["classifier"]["dense"]["kernel"] *= 50
    logits = FORWARD(state.params, {name: batch[name] for name in ("waveform", "num_samples")})
    batch["labels"] = np.asarray(logits > 0, np.float32)
    want = losses.loss(logits, losses.smooth(batch["labels"], 0.3, CONFIG), CONFIG)
    _, value = compiled(HALF)(state, batch)
    assert float(value) == pytest.approx(float(want), abs=0.05)  # bfloat16 keeps 8 bits: 4e-3 of logits of about 5
    assert abs(float(losses.loss(logits, batch["labels"], CONFIG)) - float(want)) > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_layers": 3}, "freeze_layers: expected 0 to 2, the model's layers, got 3"),
        ({"patchout_frequency": 4}, "patchout_frequency: expected 0 to 3 of the patch grid's 4"),
        ({"patchout": 16}, "patchout: expected 0 to 15"),
        ({"grad_accum_steps": 8}, "grad_accum_steps: expected a divisor of the 4 examples of a device, got 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    training = TrainConfig(batch_size=16, **changes)
    state = start(TrainConfig())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_step(training), state, whole(next(batches(1, size=4))))


def test_settings_are_checked_without_a_step():
    regression = CONFIG.replace(problem_type="regression")
    train.check_fit(EVERYTHING, CONFIG)
    train.check_fit(dataclasses.replace(EVERYTHING, label_smoothing=0.0), regression)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 for regression"):
        train.check_fit(EVERYTHING, regression)
    with pytest.raises(ValueError, match="freeze_layers: expected 0 to 2"):
        train.check_fit(TrainConfig(freeze_layers=3), CONFIG)


def test_training_learns():
    """The same four tones with random labels at every step: the model can overfit them."""
    step, state = compiled(PLAIN), start(PLAIN)
    seconds = np.arange(FRONTEND.max_samples) / FRONTEND.sampling_rate
    tones = np.sin(2 * np.pi * np.array([[200], [600], [2000], [6000]]) * seconds)
    batch = {
        "waveform": np.tile(0.1 * tones.astype(np.float32), (4, 1)),
        "num_samples": np.full(16, FRONTEND.max_samples, np.int32),
        "labels": np.tile(next(batches(1, size=4))["labels"], (4, 1)),
    }
    values = []
    for _ in range(80):
        state, value = step(state, whole(batch))
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_train_step_lowers_for_accelerators(platform):
    """Features, augmentation, gradient and update with every setting, lowered for TPU and GPU without one."""
    training = dataclasses.replace(EVERYTHING, dtype="bfloat16")
    drawn(DROPOUT)  # outside of the trace: its arrays are NumPy's
    state = jax.eval_shape(functools.partial(start, training, DROPOUT))
    lowered = (
        jax.jit(make_step(training, DROPOUT))
        .trace(state, whole(next(batches(1))))
        .lower(lowering_platforms=(platform,))
    )
    text = lowered.as_text()
    assert "fft" in text
    assert "dot_general" in text
    assert "bf16" in text


def test_losses_equal_torch():
    rng = np.random.default_rng(0)
    logits, soft = rng.standard_normal((6, 4)).astype(np.float32), rng.random((6, 4)).astype(np.float32)
    index = rng.integers(0, 4, 6)
    t_logits, t_soft = torch.from_numpy(logits), torch.from_numpy(soft)
    single = CONFIG.replace(problem_type="single_label_classification")
    regression = CONFIG.replace(problem_type="regression")
    functional = torch.nn.functional
    cases = [
        (single, index, functional.cross_entropy(t_logits, torch.from_numpy(index))),
        (single, soft / soft.sum(1, keepdims=True), functional.cross_entropy(t_logits, t_soft / t_soft.sum(1, True))),
        (CONFIG, soft, functional.binary_cross_entropy_with_logits(t_logits, t_soft)),
        (regression, soft, functional.mse_loss(t_logits, t_soft)),
    ]
    for config, labels, want in cases:
        np.testing.assert_allclose(losses.loss(logits, labels, config), float(want), rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected shape \(6, 4\)"):
        losses.loss(logits, soft[:, :3], CONFIG)
    with pytest.raises(ValueError, match="class indices"):
        losses.loss(logits, soft[:, 0], single)
    for wrong, said in ((-1, "-1 to"), (4, "to 4")):
        out = np.array([wrong, 0, 1, 2, 3, 1])
        with pytest.raises(ValueError, match=rf"expected class indices from 0 to 3, got .*{said}"):
            losses.loss(logits, out, single)
        assert np.isnan(jax.jit(functools.partial(losses.loss, config=single))(logits, out))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_smoothed_losses_equal_torch(share):
    """Cross-entropy with torch's own option; binary cross-entropy by definition, half on either side."""
    rng = np.random.default_rng(0)
    logits, soft = rng.standard_normal((6, 4)).astype(np.float32), rng.random((6, 4)).astype(np.float32)
    soft /= soft.sum(1, keepdims=True)
    single = CONFIG.replace(problem_type="single_label_classification")
    functional, (t_logits, t_soft) = torch.nn.functional, map(torch.from_numpy, (logits, soft))
    want = functional.cross_entropy(t_logits, t_soft, label_smoothing=share)
    np.testing.assert_allclose(losses.loss(logits, losses.smooth(soft, share, single), single), want, rtol=1e-6)
    want = functional.binary_cross_entropy_with_logits(t_logits, (1 - share) * t_soft + share / 2)
    np.testing.assert_allclose(losses.loss(logits, losses.smooth(soft, share, CONFIG), CONFIG), want, rtol=1e-6)
    assert losses.smooth(soft, 0.0, single) is soft


@pytest.mark.parametrize(("ramp_epochs", "first", "later"), [(0.0, 1.0, 1.0), (2.0, 0.0, 0.3)])
def test_masks_grow_over_the_ramp_and_have_full_strength_without_one(ramp_epochs, first, later, monkeypatch):
    class SeenError(Exception):
        pass

    def augmented_features(keys, batch, frontend, config, strength):
        raise SeenError(float(strength))

    monkeypatch.setattr(train, "augmented_features", augmented_features)
    training = dataclasses.replace(AUGMENTED, ramp_epochs=ramp_epochs)
    for step, wanted in ((0, first), (3, later)):
        state = start(training).replace(step=jnp.asarray(step))
        with pytest.raises(SeenError) as caught:
            make_step(training)(state, whole(next(batches(1))))
        assert caught.value.args[0] == pytest.approx(wanted)


@pytest.mark.parametrize("field", ["frequency_shift", "time_shift", "frequency_mask", "noise"])
def test_every_augmentation_changes_the_features(field):
    batch = next(batches(1))
    keys = jax.random.split(jax.random.key(0), 16)
    plain, changed = (
        train.augmented_features(keys, batch, FRONTEND, TrainConfig(**settings), jnp.ones(()))
        for settings in ({}, {field: AUGMENTED.frequency_shift if field != "noise" else True})
    )
    assert plain.shape == changed.shape
    assert np.abs(changed - plain).max() > 1e-3


def test_moving_average_of_the_parameters():
    """Against the definition, to the float32 rounding of values near 1, a few times over."""
    step, state = compiled(PLAIN), start(PLAIN)
    want = state.params
    for number, batch in enumerate(batches(5)):
        state, _ = step(state, whole(batch))
        decay = min(0.3, (number + 1) / (number + 10))
        want = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, want, state.params)
    assert state.eval_params is state.ema_params
    for got, leaf in zip(jax.tree.leaves(state.eval_params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-6)
    moved = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), state.eval_params, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    none = start(TrainConfig())
    assert none.eval_params is none.params
