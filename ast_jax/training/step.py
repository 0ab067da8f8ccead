"""Training: the state, and the step for one device's share of a batch.

The step is written for one device and averages its gradients over a named axis where there is one. Random keys fold in
the seed, the step and an example's place in the whole batch, never the device, so that a run is the same on 1 and on 8.
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
    """Refuse settings that the architecture or its kind of labels cannot have; `train_step` calls this too.

    Raises:
        ValueError: more frozen blocks than there are, no patch left, or smoothed labels in a regression.
    """
    layers = config.num_hidden_layers
    if training.freeze_layers > layers:
        raise ValueError(f"freeze_layers: expected 0 to {layers}, the model's blocks, got {training.freeze_layers}")
    augment.patchout_size(config.grid, *_patchout(training))
    smooth(np.zeros((1, config.num_labels)), training.label_smoothing, config)


def _patchout(training: TrainConfig) -> tuple[int, int, int]:
    """Return how many rows, columns and further patches are left out."""
    return training.patchout_frequency, training.patchout_time, training.patchout


def augmented_features(
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
    spec = _log_mel(batch, frontend, _fold(keys, 0))
    if config.frequency_shift or config.time_shift:
        shift = functools.partial(
            augment.shift_spec, frequency_shift=config.frequency_shift, time_shift=config.time_shift
        )
        spec = jax.vmap(shift)(_fold(keys, 4), spec)
    if config.frequency_mask or config.time_mask:
        bounds = config.frequency_mask * strength, config.time_mask * strength
        spec = jax.vmap(augment.mask_spec, in_axes=(0, 0, None, None))(_fold(keys, 1), spec, *bounds)
    spec = normalize(spec, frontend)
    if config.noise:
        spec = jax.vmap(augment.noise_and_roll)(_fold(keys, 2), spec)
    return spec


def _fold(keys: jax.Array, use: int) -> jax.Array:
    """Return keys [B] for one of their uses: 0 dither, 1 masks, 2 noise, 3 dropout, 4 shifts, 5 patchout."""
    return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def _log_mel(batch: dict[str, jax.Array], frontend: FrontendConfig, keys: jax.Array) -> jax.Array:
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
    attention_implementation: str = "auto",
) -> tuple[TrainState, jax.Array]:
    """Take one optimizer step on one device's share of the batch, or on the whole of it.

    Args:
        state: before the step.
        batch: "waveform" [b, S], "num_samples" [b], "labels" [b, C] and "global_index" [b], each example's
            index in the whole batch.
        config: the architecture.
        frontend: the features.
        training: augmentation, what learns, and how it is computed.
        optimizer: from `make_optimizer`.
        steps_per_epoch: for the ramp of the augmentation.
        axis: name of the axis to average gradients and loss over; None where the batch is whole.
        attention_implementation: see `ast_jax.model.attention.dot_product_attention`.

    Returns:
        The state after the step, and the mean loss over the whole batch.

    Raises:
        ValueError: the settings do not fit the architecture, or b does not divide by `grad_accum_steps`.
    """
    check_fit(training, config)
    ramp_steps = training.ramp_epochs * steps_per_epoch
    strength = jnp.minimum(1.0, state.step / ramp_steps) if ramp_steps else jnp.ones(())
    step_key = jax.random.fold_in(jax.random.key(training.seed), state.step)
    fixed = {part: tree for part, tree in state.params.items() if part in frozen_modules(training)}
    learning = {part: tree for part, tree in state.params.items() if part not in fixed}

    def mean_loss(learning: Any, batch: dict[str, jax.Array]) -> jax.Array:
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(batch["global_index"])
        spec = augmented_features(keys, batch, frontend, training, strength)
        logits = _logits({**fixed, **learning}, spec, keys, config, training, attention_implementation)
        return loss(logits, smooth(batch["labels"], training.label_smoothing, config), config)

    # By what learns alone, so that there is no backward pass below it.
    value, gradients = _accumulated(jax.value_and_grad(mean_loss), learning, batch, training.grad_accum_steps)
    if axis is not None:
        value, gradients = jax.lax.pmean((value, gradients), axis)
    gradients = {**gradients, **jax.tree.map(jnp.zeros_like, fixed)}
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = {**optax.apply_updates(state.params, updates), **fixed}
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
    """Run the model in training on [b, T, F] with a key for each example; return [b, C]."""
    patch_indices = None
    if any(dropped := _patchout(training)):
        patch_indices = jax.vmap(lambda key: augment.patchout_tokens(key, config.grid, *dropped))(_fold(keys, 5))
    forward = functools.partial(
        model.apply, params, config=config, train=True, rematerialize=training.rematerialize,
        dtype=jnp.bfloat16 if training.dtype == "bfloat16" else None, attention_implementation=attention,
    )  # fmt: skip
    if not (config.hidden_dropout_prob or config.attention_probs_dropout_prob):
        return forward(spec, patch_indices=patch_indices)

    def one(spec: jax.Array, patch_indices: jax.Array | None, key: jax.Array) -> jax.Array:
        return forward(spec, patch_indices=patch_indices, rngs={"dropout": key})

    return jax.vmap(one)(spec, patch_indices, _fold(keys, 3))


def _accumulated(
    value_and_grad: Callable[..., Any], learning: Any, batch: dict[str, jax.Array], parts: int
) -> tuple[jax.Array, Any]:
    """Return the mean loss and its gradient over a batch that is taken in equal parts, one after another.

    A part takes every so many-th example, so that a batch that lies split over devices has its parts split as well.
    """
    if parts == 1:
        return value_and_grad(learning, batch)
    size = len(batch["global_index"])
    if size % parts:
        raise ValueError(f"grad_accum_steps: expected a divisor of the {size} examples of a device, got {parts}")
    in_parts = jax.tree.map(lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(learning, part)), None

    shapes = jax.eval_shape(value_and_grad, learning, jax.tree.map(lambda x: x[0], in_parts))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(add, nothing, in_parts)
    return jax.tree.map(lambda x: x / parts, total)


def eval_step(params: Any, batch: dict[str, jax.Array], *, config: ASTConfig, frontend: FrontendConfig) -> jax.Array:
    """Return logits [b, C] of one device's share of the batch, without augmentation or dither."""
    spec = normalize(padded_log_mel(batch["waveform"], batch["num_samples"], frontend.replace(dither=0.0)), frontend)
    return model.apply(params, spec, config)
