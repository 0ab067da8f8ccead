"""Training: optimizer, schedule, the step for one device, and the one place where `pmap` stands.

The step is written for one device and averages its gradients over a named axis where there is one. Random keys fold in
the seed, the step and an example's place in the whole batch, never the device, so that a run is the same on 1 and on 8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from . import augment, model
from .config import ASTConfig, FrontendConfig
from .features import normalize, padded_log_mel
from .losses import loss

SCHEDULES = ("constant", "step", "cosine")
AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the original's optimizer with no augmentation.

    Args:
        batch_size: over all devices.
        epochs: passes over the training split.
        learning_rate: after warm-up and before decay.
        schedule: "constant", "step" (as the original: at the end of epoch `decay_start` and of every `decay_step`
            epochs after it the rate is multiplied by `decay_factor`), or "cosine" to zero.
        warmup_steps: steps of linear warm-up.
        decay_start: epoch, counted from 1.
        decay_step: epochs.
        decay_factor: multiplier.
        weight_decay: L2 added to the gradient, as in torch's Adam; not AdamW.
        beta1: of Adam.
        beta2: of Adam.
        mixup: probability that an example is mixed with another.
        frequency_mask: upper bound of the masked mel bins.
        time_mask: upper bound of the masked frames.
        frequency_shift: upper bound of the mel bins that a spectrogram is moved by, either way.
        time_shift: the same in frames, the end coming round to the beginning.
        noise: whether to add noise and roll in time by up to 10 frames.
        ramp_epochs: epochs over which mixup and masks grow to full strength; 0 starts at full strength.
        ema: decay at each step of an exponential moving average of the parameters, which then is what is evaluated and
            kept; 0 evaluates and keeps the parameters themselves.
        teacher_weight: share of a teacher's scores in the targets, where there is a teacher.
        seed: of everything random.

    Raises:
        ValueError: a value out of its range.
    """

    batch_size: int = 32
    epochs: int = 25
    learning_rate: float = 1e-4
    schedule: str = "step"
    warmup_steps: int = 0
    decay_start: int = 10
    decay_step: int = 5
    decay_factor: float = 0.5
    weight_decay: float = 5e-7
    beta1: float = 0.95
    beta2: float = 0.999
    mixup: float = 0.0
    frequency_mask: int = 0
    time_mask: int = 0
    frequency_shift: int = 0
    time_shift: int = 0
    noise: bool = False
    ramp_epochs: float = 0.0
    ema: float = 0.0
    teacher_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks = {
            "batch_size": self.batch_size >= 1, "epochs": 1 <= self.epochs < 10_000,
            "learning_rate": self.learning_rate > 0,
            "warmup_steps": self.warmup_steps >= 0, "decay_start": self.decay_start >= 0,
            "decay_step": self.decay_step >= 1, "decay_factor": 0 < self.decay_factor <= 1,
            "weight_decay": self.weight_decay >= 0, "beta1": 0 <= self.beta1 < 1, "beta2": 0 <= self.beta2 < 1,
            "mixup": 0 <= self.mixup <= 1, "frequency_mask": self.frequency_mask >= 0, "time_mask": self.time_mask >= 0,
            "frequency_shift": self.frequency_shift >= 0, "time_shift": self.time_shift >= 0,
            "ramp_epochs": self.ramp_epochs >= 0, "ema": 0 <= self.ema < 1,
            "teacher_weight": 0 <= self.teacher_weight <= 1,
            "schedule": self.schedule in SCHEDULES, "seed": self.seed >= 0,
        }  # fmt: skip
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not -(2**31) < value < 2**31:
                raise ValueError(f"{name}: {value!r} is out of range; expected a number below 2**31")
        for name, good in checks.items():
            if not good:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is out of range; {_RANGES.get(name, 'see TrainConfig')}"
                )


_RANGES = {
    **dict.fromkeys(("batch_size", "decay_step"), "expected 1 or more"),
    "epochs": "expected 1 to 9999",
    **dict.fromkeys(
        (
            "warmup_steps",
            "decay_start",
            "weight_decay",
            "frequency_mask",
            "time_mask",
            "frequency_shift",
            "time_shift",
            "ramp_epochs",
            "seed",
        ),
        "expected 0 or more",
    ),
    **dict.fromkeys(("beta1", "beta2", "ema"), "expected a number in [0, 1)"),
    "learning_rate": "expected more than 0",
    "decay_factor": "expected a number in (0, 1]",
    "mixup": "expected a probability in [0, 1]",
    "teacher_weight": "expected a number in [0, 1]",
    "schedule": f"expected one of {', '.join(SCHEDULES)}",
}


@struct.dataclass
class TrainState:
    """What a step changes: step count, parameters, optimizer state and, where asked for, the parameters' average."""

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def kept(self) -> Any:
        """The parameters to evaluate and to keep: the average where there is one."""
        return self.params if self.average is None else self.average


def learning_rate_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0 at the start of training.

    Warm-up and decay are factors side by side: an epoch at whose end the rate falls counts during warm-up too. The
    cosine alone begins where warm-up ends.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(peak, max(config.epochs * steps_per_epoch - warmup, 1))

        def decayed(step: Any) -> Any:
            return cosine(jnp.maximum(step - warmup, 0))

    elif config.schedule == "step":
        epochs = range(config.decay_start, config.epochs, config.decay_step)
        decayed = optax.piecewise_constant_schedule(
            peak, {epoch * steps_per_epoch: config.decay_factor for epoch in epochs}
        )
    else:
        decayed = optax.constant_schedule(peak)
    if not warmup:
        return decayed
    return lambda step: decayed(step) * jnp.minimum((step + 1) / warmup, 1.0)


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return Adam with L2 in the gradient (torch's `Adam(weight_decay=…)`) and the schedule."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps_per_epoch)),
    )


def init_state(params: Any, optimizer: optax.GradientTransformation, config: TrainConfig) -> TrainState:
    """Return the state before the first step."""
    average = jax.tree.map(jnp.array, params) if config.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def prepare(
    keys: jax.Array, batch: dict[str, jax.Array], frontend: FrontendConfig, config: TrainConfig, strength: jax.Array
) -> jax.Array:
    """Compute augmented, normalised features on the device.

    Args:
        keys: [B], one an example.
        batch: "waveform" [B, S] and "num_samples" [B].
        frontend: the features' settings.
        config: the augmentation.
        strength: scalar in [0, 1] on the width of the masks.

    Returns:
        [B, T, F].
    """
    spec = features(batch, frontend, jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys))
    if config.frequency_shift or config.time_shift:
        shift_keys = jax.vmap(lambda key: jax.random.fold_in(key, 4))(keys)
        shift = functools.partial(
            augment.shift_spec, frequency_shift=config.frequency_shift, time_shift=config.time_shift
        )
        spec = jax.vmap(shift)(shift_keys, spec)
    if config.frequency_mask or config.time_mask:
        mask_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        bounds = config.frequency_mask * strength, config.time_mask * strength
        spec = jax.vmap(augment.mask_spec, in_axes=(0, 0, None, None))(mask_keys, spec, *bounds)
    spec = normalize(spec, frontend)
    if config.noise:
        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
        spec = jax.vmap(augment.noise_and_roll)(noise_keys, spec)
    return spec


def features(batch: dict[str, jax.Array], frontend: FrontendConfig, keys: jax.Array) -> jax.Array:
    """Return log-mel features [B, T, F] of a batch, not normalised; `keys` [B] serve dither only."""
    noise = None
    if frontend.dither:
        shape = (frontend.max_length, frontend.window_samples)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, batch["waveform"].dtype))(keys)
    return padded_log_mel(batch["waveform"], batch["num_samples"], frontend, noise)


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    config: ASTConfig,
    frontend: FrontendConfig,
    training: TrainConfig,
    optimizer: optax.GradientTransformation,
    steps_per_epoch: int,
    axis: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """Take one optimizer step on one device's share of the batch.

    Args:
        state: before the step.
        batch: "waveform" [b, S], "num_samples" [b], "labels" [b, C] and "position" [b], the place in the whole batch.
        config: the architecture.
        frontend: the features.
        training: augmentation and seed.
        optimizer: from `make_optimizer`.
        steps_per_epoch: for the ramp of the augmentation.
        axis: name of the axis to average gradients and loss over; None on one device.

    Returns:
        The state after the step, and the mean loss over the whole batch.
    """
    step_key = jax.random.fold_in(jax.random.key(training.seed), state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(batch["position"])
    ramp_steps = training.ramp_epochs * steps_per_epoch
    strength = jnp.minimum(1.0, state.step / ramp_steps) if ramp_steps else jnp.ones(())
    spec = prepare(keys, batch, frontend, training, strength)
    labels = batch["labels"]

    def mean_loss(params: Any) -> jax.Array:
        if config.hidden_dropout_prob or config.attention_probs_dropout_prob:  # a key for each example
            forward = functools.partial(model.apply, params, config=config, train=True)
            dropout_keys = jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys)
            logits = jax.vmap(lambda one, key: forward(one, rngs={"dropout": key}))(spec, dropout_keys)
        else:
            logits = model.apply(params, spec, config, train=True)
        return loss(logits, labels, config)

    value, gradients = jax.value_and_grad(mean_loss)(state.params)
    if axis is not None:
        value, gradients = jax.lax.pmean((value, gradients), axis)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if training.ema:  # the first steps weigh more: the start is no good average
        count = state.step.astype(float)
        decay = jnp.minimum(training.ema, (count + 1) / (count + 10))
        average = jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), average, params)
    return TrainState(state.step + 1, params, opt_state, average), value


def eval_step(params: Any, batch: dict[str, jax.Array], *, config: ASTConfig, frontend: FrontendConfig) -> jax.Array:
    """Return logits [b, C] of one device's share of the batch, without augmentation or dither."""
    spec = normalize(padded_log_mel(batch["waveform"], batch["num_samples"], frontend.replace(dither=0.0)), frontend)
    return model.apply(params, spec, config)


class DataParallel:
    """Run steps on all devices: state replicated, batch split along its first axis.

    This is the one place where `pmap` stands.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all local ones."""
        self.devices = list(devices or jax.local_devices())

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a global batch that does not divide over the devices, naming the nearest sizes that do."""
        count = len(self.devices)
        if batch_size % count:
            lower = batch_size // count * count
            sizes = f"{lower} or {lower + count}" if lower else str(count)
            raise ValueError(f"batch_size: {batch_size} does not divide over {count} devices; the nearest are {sizes}")

    def wrap_train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step on replicated state and a whole batch from `step(state, batch, axis=…)`."""
        mapped = jax.pmap(functools.partial(step, axis=AXIS), AXIS, devices=self.devices, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            position = np.arange(len(batch["labels"]), dtype=np.int32)
            state, value = mapped(state, self.split({**batch, "position": position}))
            # The first device's own copy: value[0] would be a program over all devices at every step.
            return state, value.addressable_shards[0].data.reshape(())

        return run

    def wrap_eval(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """Return a function of replicated params and a whole batch whose results are put together again."""
        mapped = jax.pmap(step, AXIS, devices=self.devices)

        def run(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
            results = np.asarray(mapped(params, self.split(batch)))
            return results.reshape(-1, *results.shape[2:])

        return run

    def split(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Split every array of a batch [B, …] into [devices, B / devices, …]."""
        return {key: value.reshape(len(self.devices), -1, *value.shape[1:]) for key, value in batch.items()}

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device, with a new first axis."""
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=self.devices)
        return copy(np.arange(len(self.devices)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return the first device's copy as NumPy arrays."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)
