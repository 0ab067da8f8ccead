"""Training state, training step and evaluation step, each written for one device's share of the batch.

The step averages gradients over a named axis if there is one. Random keys fold in the seed, the step and an example's
index in the whole batch, never the device, so a run on 1 device equals a run on 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.model import functional as model
from ast_jax.model.losses import loss, smooth
from ast_jax.training import augment
from ast_jax.training.config import TrainConfig
from ast_jax.training.optimizers import frozen_modules


@struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
        step: number of optimizer steps taken, an int32 scalar.
        params: parameter tree.
        opt_state: optimizer state.
        ema_params: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and save: the moving average if there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(params: Any, optimizer: optax.GradientTransformation, config: TrainConfig) -> TrainState:
    """Return the state before the first step."""
    ema_params = jax.tree.map(jnp.array, params) if config.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params)


def check_fit(training: TrainConfig, config: ASTConfig) -> None:
    """Check training settings against the architecture and its problem type; `train_step` calls this too.

    Raises:
        ValueError: more frozen layers than the model has, patchout that leaves no patch, or label smoothing in a
            regression.
    """
    layers = config.num_hidden_layers
    if training.freeze_layers > layers:
        raise ValueError(f"freeze_layers: expected 0 to {layers}, the model's layers, got {training.freeze_layers}")
    augment.num_kept_patches(config.grid, *_patchout(training))
    smooth(np.zeros((1, config.num_labels)), training.label_smoothing, config)


def _patchout(training: TrainConfig) -> tuple[int, int, int]:
    """Return the numbers of rows, of columns and of further single patches that patchout drops."""
    return training.patchout_frequency, training.patchout_time, training.patchout


def augmented_features(
    keys: jax.Array, batch: dict[str, jax.Array], frontend: FrontendConfig, config: TrainConfig, strength: jax.Array
) -> jax.Array:
    """Compute augmented, normalised features on the device.

    Args:
        keys: [B], one for each example.
        batch: "waveform" [B, S] and "num_samples" [B].
        frontend: feature settings.
        config: augmentation settings.
        strength: scalar in [0, 1] that scales the maximum mask widths.

    Returns:
        [B, T, F].
    """
    spec = _log_mel(batch, frontend, _fold(keys, 0))
    if config.frequency_shift or config.time_shift:
        shift = functools.partial(
            augment.shift_spec, frequency_shift=config.frequency_shift, time_shift=config.time_shift
        )
        spec = jax.vmap(shift)(_fold(keys, 4), spec)
    if config.frequency_mask or config.time_mask:
        widths = config.frequency_mask * strength, config.time_mask * strength
        spec = jax.vmap(augment.mask_spec, in_axes=(0, 0, None, None))(_fold(keys, 1), spec, *widths)
    spec = normalize(spec, frontend)
    if config.noise:
        spec = jax.vmap(augment.noise_and_roll)(_fold(keys, 2), spec)
    return spec


def _fold(keys: jax.Array, use: int) -> jax.Array:
    """Return keys [B] for one purpose: 0 dither, 1 masks, 2 noise, 3 dropout, 4 shifts, 5 patchout."""
    return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def _log_mel(batch: dict[str, jax.Array], frontend: FrontendConfig, keys: jax.Array) -> jax.Array:
    """Return log-mel features [B, T, F] of a batch, not normalised; keys [B] are used for dither only."""
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
    attention_implementation: str = "auto",
) -> tuple[TrainState, jax.Array]:
    """Take one optimizer step on one device's share of the batch, or on the whole batch.

    Args:
        state: state before the step.
        batch: "waveform" [b, S], "num_samples" [b], "labels" [b, C] and "global_index" [b], each example's index in
            the whole batch.
        config: architecture.
        frontend: feature settings.
        training: training settings.
        optimizer: from `make_optimizer`.
        steps_per_epoch: converts `ramp_epochs` to steps.
        axis: name of the axis to average gradients and loss over; None if the batch is whole.
        attention_implementation: see `ast_jax.model.attention.dot_product_attention`.

    Returns:
        The state after the step, and the mean loss over the whole batch.

    Raises:
        ValueError: the settings do not fit the architecture, or b is not divisible by `grad_accum_steps`.
    """
    check_fit(training, config)
    ramp_steps = training.ramp_epochs * steps_per_epoch
    strength = jnp.minimum(1.0, state.step / ramp_steps) if ramp_steps else jnp.ones(())
    step_key = jax.random.fold_in(jax.random.key(training.seed), state.step)
    frozen = {name: tree for name, tree in state.params.items() if name in frozen_modules(training)}
    trainable = {name: tree for name, tree in state.params.items() if name not in frozen}

    def mean_loss(trainable: Any, batch: dict[str, jax.Array]) -> jax.Array:
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(batch["global_index"])
        spec = augmented_features(keys, batch, frontend, training, strength)
        logits = _logits({**frozen, **trainable}, spec, keys, config, training, attention_implementation)
        return loss(logits, smooth(batch["labels"], training.label_smoothing, config), config)

    # With respect to the trainable modules only, so that the backward pass ends at the lowest of them.
    value, gradients = _accumulate(jax.value_and_grad(mean_loss), trainable, batch, training.grad_accum_steps)
    if axis is not None:
        value, gradients = jax.lax.pmean((value, gradients), axis)
    gradients = {**gradients, **jax.tree.map(jnp.zeros_like, frozen)}
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = {**optax.apply_updates(state.params, updates), **frozen}
    ema_params = state.ema_params
    if training.ema_decay:  # a lower decay at first, so that the initial parameters are soon forgotten
        count = state.step.astype(float)
        rate = 1 - jnp.minimum(training.ema_decay, (count + 1) / (count + 10))
        # In this form frozen parameters keep every bit.
        ema_params = jax.tree.map(lambda ema, new: ema + (rate * (new - ema)).astype(ema.dtype), ema_params, params)
    return TrainState(state.step + 1, params, opt_state, ema_params), value


def _logits(
    params: Any, spec: jax.Array, keys: jax.Array, config: ASTConfig, training: TrainConfig, attention: str
) -> jax.Array:
    """Return logits [b, C] of features [b, T, F] in training mode, with a key for each example."""
    patch_indices = None
    if any(dropped := _patchout(training)):
        patch_indices = jax.vmap(lambda key: augment.patchout_indices(key, config.grid, *dropped))(_fold(keys, 5))
    forward = functools.partial(
        model.apply, params, config=config, train=True, rematerialize=training.rematerialize,
        dtype=jnp.bfloat16 if training.dtype == "bfloat16" else None, attention_implementation=attention,
    )  # fmt: skip
    if not (config.hidden_dropout_prob or config.attention_probs_dropout_prob):
        return forward(spec, patch_indices=patch_indices)

    def one(spec: jax.Array, patch_indices: jax.Array | None, key: jax.Array) -> jax.Array:
        return forward(spec, patch_indices=patch_indices, rngs={"dropout": key})

    return jax.vmap(one)(spec, patch_indices, _fold(keys, 3))


def _accumulate(
    value_and_grad: Callable[..., Any], params: Any, batch: dict[str, jax.Array], steps: int
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch and its gradient, accumulated over `steps` microbatches.

    Microbatch i has the examples i, i + steps, i + 2 * steps, …: a batch that is sharded over devices then has
    microbatches that are sharded too.
    """
    if steps == 1:
        return value_and_grad(params, batch)
    size = len(batch["global_index"])
    if size % steps:
        raise ValueError(f"grad_accum_steps: expected a divisor of the {size} examples of a device, got {steps}")
    microbatches = jax.tree.map(lambda x: x.reshape(size // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, microbatch: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch)), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda x: x / steps, total)


def eval_step(params: Any, batch: dict[str, jax.Array], *, config: ASTConfig, frontend: FrontendConfig) -> jax.Array:
    """Return logits [b, C] of one device's share of the batch, without augmentation and dither."""
    spec = normalize(padded_log_mel(batch["waveform"], batch["num_samples"], frontend.replace(dither=0.0)), frontend)
    return model.apply(params, spec, config)
