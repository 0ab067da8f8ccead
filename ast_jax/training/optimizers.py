"""Learning rate schedules, and optimizers built from optax.

Modules are the first level of the parameter tree: embeddings, layers, layernorm, classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ast_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0 at the start of training.

    The rate is the product of warm-up and decay: epochs count towards the decay during warm-up too. Only the cosine
    decay starts after warm-up. As in the original, `warmup_hold` updates the rate every `warmup_hold` steps, to
    step / warmup_steps of the peak; it is 0 until the first update.
    """
    return functools.partial(_rate, config=config, steps_per_epoch=steps_per_epoch, xp=jnp)


def epoch_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """Return the learning rate at each epoch's last step, in float64; the original logs these."""
    last_steps = (np.arange(config.epochs) + 1) * steps_per_epoch - 1
    rates = _rate(last_steps, config, steps_per_epoch, np)
    return np.broadcast_to(rates, last_steps.shape).tolist()


def _rate(step: Any, config: TrainConfig, steps_per_epoch: int, xp: ModuleType) -> Any:
    """Compute the rate at a step with NumPy or `jax.numpy`; optax's own schedules are float32 only."""
    real = functools.partial(xp.asarray, dtype=float)  # float32 in JAX, unless x64 is enabled
    step, rate = xp.asarray(step), real(config.learning_rate)
    if config.schedule == "step":
        decays = (step // steps_per_epoch - config.decay_start) // config.decay_step + 1
        rate = rate * config.decay_factor ** real(xp.maximum(decays, 0))
    elif config.schedule == "cosine":
        decay_steps = max(config.epochs * steps_per_epoch - config.warmup_steps, 1)
        progress = xp.clip(real(step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        rate = rate * 0.5 * (1 + xp.cos(np.pi * progress))
    if not config.warmup_steps:
        return rate
    held = step // config.warmup_hold * config.warmup_hold if config.warmup_hold > 1 else step + 1
    return rate * xp.minimum(real(held) / config.warmup_steps, 1.0)


def frozen_modules(config: TrainConfig) -> frozenset[str]:
    """Return the modules that are frozen entirely and need neither gradients nor optimizer state."""
    if config.linear_probe:
        return frozenset({"embeddings", "layers", "layernorm"})
    return frozenset({"embeddings"} if config.freeze_layers else ())


def rate_multipliers(config: TrainConfig, num_layers: int) -> dict[str, Any]:
    """Return the learning rate multiplier of each module, for the layers a vector [L].

    With layer-wise decay (Clark et al. 2020, ELECTRA) each layer has `layer_decay` times the rate of the layer above
    it, and the embeddings `layer_decay` times that of the first layer. `head_multiplier` is the original's `head_lr`.
    """
    return {
        "embeddings": config.layer_decay ** (num_layers + 1),
        "layers": _trainable_layers(config, num_layers) * config.layer_decay ** np.arange(num_layers, 0, -1),
        "layernorm": 1.0,
        "classifier": config.head_multiplier,
    }


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of a parameter tree: torch's `Adam` (L2 penalty) or `AdamW`, with the schedule.

    Frozen parameters do not count towards the gradient norm and get updates of zero; frozen modules have no optimizer
    state. Gradients are clipped before weight decay. The multipliers scale the updates of Adam and of decoupled weight
    decay, as the rates of torch's parameter groups do.
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    trainable = optax.chain(
        *([_scale(lambda layers: {"layers": _trainable_layers(config, layers)})] if config.freeze_layers else []),
        *([optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []),
        *([adam, decay] if config.optimizer == "adamw" else [decay, adam]),
        _scale(functools.partial(rate_multipliers, config)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps_per_epoch)),
    )
    frozen = frozen_modules(config)
    return optax.chain(
        optax.masked(trainable, lambda tree: {module: module not in frozen for module in tree}),
        optax.masked(optax.set_to_zero(), lambda tree: {module: module in frozen for module in tree}),
    )


def _trainable_layers(config: TrainConfig, num_layers: int) -> np.ndarray:
    """Return 0 for frozen layers and 1 for the others [L]."""
    return (np.arange(num_layers) >= config.freeze_layers).astype(float)


def _scale(factors: Callable[[int], Mapping[str, Any]]) -> optax.GradientTransformation:
    """Scale updates by `factors(L)`, which has a number or a vector [L] for each module that is scaled."""

    def scale(updates: Mapping[str, Any], _: Any = None) -> dict[str, Any]:
        layers = jax.tree.leaves(updates["layers"])  # [L, …] each; none if the layers are masked out
        by_module = factors(len(layers[0]) if layers else 0)

        def one(module: str, leaf: jax.Array) -> jax.Array:
            factor = jnp.asarray(by_module[module], leaf.dtype)
            return leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))

        return {
            module: jax.tree.map(functools.partial(one, module), tree) if module in by_module else tree
            for module, tree in updates.items()
        }

    return optax.stateless(scale)
