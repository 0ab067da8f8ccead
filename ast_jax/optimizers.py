"""Learning rate schedules and optimizers, built from optax."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from .settings import TrainConfig


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
