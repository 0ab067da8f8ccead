"""Training: the step on 8 devices is the step on 1, the schedules are the original's, the whole step lowers."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ast_jax
from ast_jax import augment, losses, optimizers, train
from ast_jax.config import FrontendConfig
from ast_jax.parallel import DataParallel
from ast_jax.settings import TrainConfig

CONFIG = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=4,
    problem_type="multi_label_classification", max_length=32, num_mel_bins=32, frequency_stride=16, time_stride=16,
)  # fmt: skip
FRONTEND = FrontendConfig(max_length=32, num_mel_bins=32)
AUGMENTED = TrainConfig(
    batch_size=16, learning_rate=1e-3, weight_decay=1e-6, frequency_mask=8, time_mask=8, noise=True, warmup_steps=3,
    frequency_shift=3, time_shift=5, ema=0.9, ramp_epochs=1.0, schedule="cosine", epochs=2,
)  # fmt: skip


def batches(count, size=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "waveform": (0.1 * rng.standard_normal((size, FRONTEND.max_samples))).astype(dtype),
            "num_samples": rng.integers(100, FRONTEND.max_samples, size).astype(np.int32),
            "labels": (rng.random((size, CONFIG.num_labels)) < 0.4).astype(dtype),
        }


def make_step(optimizer, config=CONFIG, training=AUGMENTED):
    return functools.partial(
        train.train_step, config=config, frontend=FRONTEND, training=training, optimizer=optimizer, steps_per_epoch=5
    )


def start(optimizer, config=CONFIG, dtype=np.float64):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), ast_jax.init(jax.random.key(0), config))
    return train.init_state(params, optimizer, AUGMENTED)


def run(devices, config=CONFIG, steps=10):
    """Return the state and the losses after some steps on so many devices, in float64."""
    optimizer = optimizers.make_optimizer(AUGMENTED, steps_per_epoch=5)
    parallel = DataParallel(jax.devices()[:devices])
    step = parallel.wrap_train(make_step(optimizer, config))
    state = parallel.replicate(start(optimizer, config))
    values = []
    for batch in batches(steps, dtype=np.float64):
        state, value = step(state, batch)
        assert value.devices() == {jax.devices()[0]}  # no program over all devices to fetch it
        values.append(float(value))
    return parallel.unreplicate(state), values


def assert_same_state(got, want):
    """Compare to 1e-9: float64 sums in another order, 1e-16 each, through a few steps of Adam."""
    for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_eight_devices_give_the_run_of_one(dropout, x64):
    """Augmentation, dropout and all.

    The key bias too, whose true gradient is zero: rounding is far below Adam's eps of 1e-8, and stays there as long as
    learning rate × weight decay / eps, by which each step multiplies it, is below 1.
    """
    config = CONFIG.replace(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    assert jax.local_device_count() == 8
    one, one_losses = run(1, config)
    eight, eight_losses = run(8, config)
    np.testing.assert_allclose(eight_losses, one_losses, rtol=1e-9)
    assert int(one.step) == int(eight.step) == 10
    assert_same_state(eight, one)
    before = ast_jax.init(jax.random.key(0), config)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(before), strict=True):
        assert a.dtype == np.float64
        assert np.abs(a - b).max() > 1e-4  # the run went somewhere


def test_every_device_has_other_examples(x64):
    """Two devices do what one program without `pmap` does with the whole batch."""
    optimizer = optimizers.make_optimizer(AUGMENTED, steps_per_epoch=5)
    step, state = jax.jit(make_step(optimizer)), start(optimizer)
    for batch in batches(2, dtype=np.float64):
        state, _ = step(state, {**batch, "position": np.arange(16)})
    two, _ = run(2, steps=2)
    assert_same_state(two, state)


def test_training_learns():
    """Four tones with labels at random, again and again: the optimizer can bring the loss to nothing."""
    training = TrainConfig(learning_rate=3e-3, schedule="constant", beta1=0.9)
    optimizer = optimizers.make_optimizer(training, steps_per_epoch=5)
    step, state = jax.jit(make_step(optimizer, training=training)), start(optimizer, dtype=np.float32)
    seconds = np.arange(FRONTEND.max_samples) / FRONTEND.sampling_rate
    tones = np.sin(2 * np.pi * np.array([[200], [600], [2000], [6000]]) * seconds)
    batch = {
        **next(batches(1, size=4)), "waveform": 0.1 * tones.astype(np.float32),
        "num_samples": np.full(4, FRONTEND.max_samples), "position": np.arange(4),
    }  # fmt: skip
    values = []
    for _ in range(80):
        state, value = step(state, batch)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]


def test_evaluation_is_exact_on_eight_devices():
    params = ast_jax.init(jax.random.key(0), CONFIG)
    batch = next(batches(1))
    batch.pop("labels")
    results = []
    for count in (1, 8):
        parallel = DataParallel(jax.devices()[:count])
        step = parallel.wrap_eval(functools.partial(train.eval_step, config=CONFIG, frontend=FRONTEND))
        results.append(step(parallel.replicate(params), batch))
    assert results[0].shape == (16, 4)
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)  # float32 roundings of other batch shapes


def test_indivisible_batch_names_the_nearest():
    with pytest.raises(ValueError, match="12 does not divide over 8 devices; the nearest are 8 or 16"):
        DataParallel(jax.devices()).check_batch_size(12)
    with pytest.raises(ValueError, match="nearest are 8"):
        DataParallel(jax.devices()).check_batch_size(3)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_train_step_lowers_for_accelerators(platform):
    """Features, augmentation, gradient and update in one program, for machines that are not here."""
    optimizer = optimizers.make_optimizer(AUGMENTED, 100)
    step = jax.jit(
        functools.partial(
            train.train_step, config=CONFIG, frontend=FRONTEND, training=AUGMENTED, optimizer=optimizer,
            steps_per_epoch=100,
        )
    )  # fmt: skip
    state = jax.eval_shape(lambda: train.init_state(ast_jax.init(jax.random.key(0), CONFIG), optimizer, AUGMENTED))
    batch = {**next(batches(1)), "position": np.arange(16, dtype=np.int32)}
    lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert "fft" in text
    assert "dot_general" in text


def logged_rates(training, steps_per_epoch=100):
    schedule = optimizers.learning_rate_schedule(training, steps_per_epoch)
    return [float(schedule(epoch * steps_per_epoch + steps_per_epoch // 2)) for epoch in range(training.epochs)]


def test_step_schedule_gives_the_published_learning_rates():
    full = TrainConfig(epochs=5, learning_rate=1e-5, decay_start=2, decay_step=1, decay_factor=0.5)
    np.testing.assert_allclose(logged_rates(full), [1e-5, 1e-5, 5e-6, 2.5e-6, 1.25e-6], rtol=1e-5)
    balanced = TrainConfig(epochs=25, learning_rate=5e-5, decay_start=10, decay_step=5, decay_factor=0.5)
    rates = logged_rates(balanced)
    np.testing.assert_allclose([rates[9], rates[19], rates[24]], [5e-5, 1.25e-5, 6.25e-6], rtol=1e-5)
    esc50 = TrainConfig(epochs=25, learning_rate=1e-5, decay_start=5, decay_step=1, decay_factor=0.85)
    np.testing.assert_allclose(logged_rates(esc50)[21], 6.3113e-7, rtol=1e-4)


def test_warm_up_is_linear_and_does_not_move_the_decay():
    training = TrainConfig(epochs=4, learning_rate=1.0, warmup_steps=10, decay_start=2, decay_step=1)
    schedule = optimizers.learning_rate_schedule(training, 100)
    np.testing.assert_allclose([schedule(step) for step in (0, 4, 9, 10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([schedule(step) for step in (199, 201, 301)], [1.0, 0.5, 0.25], rtol=1e-6)
    cosine = optimizers.learning_rate_schedule(dataclasses.replace(training, schedule="cosine"), 100)
    np.testing.assert_allclose([cosine(step) for step in (4, 10, 205, 400)], [0.5, 1.0, 0.5, 0.0], atol=1e-6)


def test_every_fall_counts_however_long_the_warm_up():
    """Falls at 200, 300 and 400 lie within a warm-up of 450 steps: an eighth of the rate is left after it."""
    training = TrainConfig(epochs=5, learning_rate=1.0, warmup_steps=450, decay_start=2, decay_step=1)
    schedule = jax.jit(optimizers.learning_rate_schedule(training, 100))
    np.testing.assert_allclose([schedule(step) for step in (449, 450, 499)], 0.125, rtol=1e-6)
    np.testing.assert_allclose([schedule(step) for step in (199, 200)], [200 / 450, 0.5 * 201 / 450], rtol=1e-6)


def test_optimizer_is_torch_adam_with_l2():
    """Not AdamW: the decay goes through the moments."""
    training = TrainConfig(learning_rate=1e-2, weight_decay=0.1, schedule="constant")
    optimizer = optimizers.make_optimizer(training, 10)
    start = np.array([1.0, -2.0, 0.5], np.float32)
    params, parameter = jnp.asarray(start), torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.Adam([parameter], lr=1e-2, betas=(0.95, 0.999), weight_decay=0.1)
    state = optimizer.init(params)
    for step in range(20):
        gradient = np.sin(np.arange(3, dtype=np.float32) + step)
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = params + updates
        parameter.grad = torch.from_numpy(gradient)
        reference.step()
    np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=1e-5)  # 20 float32 updates


@pytest.mark.parametrize(
    "bad",
    [
        {"mixup": 1.5}, {"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"schedule": "linear"},
        {"decay_factor": 0.0}, {"beta1": 1.0}, {"time_mask": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}: .* out of range; expected"):
        TrainConfig(**bad)


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


@pytest.mark.parametrize(("ramp_epochs", "first", "later"), [(0.0, 1.0, 1.0), (2.0, 0.0, 0.3)])
def test_masks_grow_over_the_ramp_and_are_whole_without_one(ramp_epochs, first, later, monkeypatch):
    class SeenError(Exception):
        pass

    def prepare(keys, batch, frontend, config, strength):
        raise SeenError(float(strength))

    monkeypatch.setattr(train, "prepare", prepare)
    training = dataclasses.replace(AUGMENTED, ramp_epochs=ramp_epochs)
    optimizer = optimizers.make_optimizer(training, steps_per_epoch=5)
    batch = {**next(batches(1)), "position": np.arange(16)}
    for step, wanted in ((0, first), (3, later)):
        state = start(optimizer, dtype=np.float32).replace(step=jnp.asarray(step))
        with pytest.raises(SeenError) as caught:
            make_step(optimizer, training=training)(state, batch)
        assert caught.value.args[0] == pytest.approx(wanted)


def test_masks_are_bands_of_at_most_the_asked_width():
    keys = jax.random.split(jax.random.key(0), 300)
    spec = jnp.ones((64, 32))
    masked = np.asarray(jax.vmap(lambda key: augment.mask_spec(key, spec, 8, 20))(keys)) == 0
    bins, frames = masked.all(1), masked.all(2)  # a masked bin is zero in every frame
    assert bins.sum(1).max() == 7  # floor of less than 8
    assert 17 <= frames.sum(1).max() <= 19
    assert (masked == (bins[:, None, :] | frames[:, :, None])).all()  # nothing else is touched
    for band in (*bins, *frames):
        assert np.abs(np.diff(band.astype(int), prepend=0, append=0)).sum() in (0, 2)  # one band
    assert abs(bins.sum(1).mean() - 3.5) < 0.5  # floor of uniform [0, 8): mean 3.5, 300 draws
    none = augment.mask_spec(keys[0], spec, 0.0, 0.0)
    np.testing.assert_array_equal(none, spec)


def test_shift_repeats_the_edge_bin_and_turns_time_round():
    spec = jnp.arange(20.0)[:, None] * 100 + jnp.arange(16.0)  # a value says where it came from
    shifts = set()
    for key in jax.random.split(jax.random.key(2), 300):
        out = np.asarray(augment.shift_spec(key, spec, 3, 2))
        frames, bins = (out // 100).astype(int), (out % 100).astype(int)
        time, pitch = int(-frames[0, 0] % 20), 8 - int(bins[0, 8])
        np.testing.assert_array_equal(frames[:, 0], np.roll(np.arange(20), time))
        np.testing.assert_array_equal(bins[0], np.clip(np.arange(16) - pitch, 0, 15))
        assert (frames == frames[:, :1]).all()
        assert (bins == bins[:1]).all()
        shifts.add((time if time < 10 else time - 20, pitch))
    assert shifts == {(time, pitch) for time in range(-2, 3) for pitch in range(-3, 4)}  # 35 pairs, 300 draws
    np.testing.assert_array_equal(augment.shift_spec(key, spec, 0, 0), spec)


@pytest.mark.parametrize("field", ["frequency_shift", "time_shift", "frequency_mask", "noise"])
def test_every_augmentation_changes_the_features(field):
    batch = next(batches(1))
    keys = jax.random.split(jax.random.key(0), 16)
    plain, changed = (
        train.prepare(keys, batch, FRONTEND, TrainConfig(**settings), jnp.ones(()))
        for settings in ({}, {field: AUGMENTED.frequency_shift if field != "noise" else True})
    )
    assert plain.shape == changed.shape
    assert np.abs(changed - plain).max() > 1e-3


def test_moving_average_of_the_parameters(x64):
    """Against the definition, in float64: rounding only."""
    optimizer = optimizers.make_optimizer(AUGMENTED, steps_per_epoch=5)
    step = jax.jit(make_step(optimizer))
    state = start(optimizer)
    want = state.params
    for number, batch in enumerate(batches(8, dtype=np.float64)):
        state, _ = step(state, {**batch, "position": np.arange(16, dtype=np.int32)})
        decay = min(0.9, (number + 1) / (number + 10))
        want = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, want, state.params)
    assert state.kept is state.average
    assert_same_state(state.kept, want)
    moved = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), state.kept, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    none = train.init_state(state.params, optimizer, TrainConfig())
    assert none.kept is none.params


def test_noise_and_roll():
    spec = jnp.arange(64.0)[:, None] * jnp.ones(32) * 100
    for key in jax.random.split(jax.random.key(1), 20):
        out = np.asarray(augment.noise_and_roll(key, spec))
        shift = round(float(out[0].mean()) / 100)
        rolled = np.roll(np.asarray(spec), -shift, 0)
        assert min(shift, 64 - shift) <= 10
        assert (out - rolled).min() >= -1e-3  # float32 at 6,400
        assert (out - rolled).max() <= 0.1 + 1e-3


def test_mix_waveforms():
    first, second = np.array([1.0, 2.0, 3.0, 6.0], np.float32), np.array([4.0, 0.0], np.float32)
    mixed = augment.mix_waveforms(first, second, 0.75)
    want = 0.75 * (first - 3) + 0.25 * np.array([2.0, -2.0, 0, 0])
    np.testing.assert_allclose(mixed, want - want.mean(), rtol=1e-6)
    assert len(augment.mix_waveforms(second, first, 0.5)) == 2


@pytest.mark.parametrize("changes", [{"seed": 2**31}, {"time_shift": 10**20}, {"learning_rate": float("inf")}])
def test_numbers_that_no_array_holds_are_refused(changes):
    with pytest.raises(ValueError, match="expected a number below 2\\*\\*31"):
        TrainConfig(**changes)
