"""Training: the state, and the step for one device.

The step is written for one device and averages its gradients over a named axis where there is one. Random keys fold in
the seed, the step and an example's place in the whole batch, never the device, so that a run is the same on 1 and on 8.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from . import augment, model
from .config import ASTConfig, FrontendConfig
from .features import normalize, padded_log_mel
from .losses import loss
from .settings import TrainConfig


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
