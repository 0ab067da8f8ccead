"""Learning rate schedules, and optimizers built from optax.

Parts of the model are named as the parameter tree's first level: embeddings, layers, layernorm, classifier.
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

    Warm-up and decay are factors side by side: an epoch at whose end the rate falls counts during warm-up too. The
    cosine alone begins where warm-up ends. As in the original, `warmup_hold` sets the rate at every so many steps to
    step / warmup_steps of the peak, which is 0 until the first of them.
    """
    return functools.partial(_rate, config=config, steps_per_epoch=steps_per_epoch, xp=jnp)


def epoch_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """Return the rate of each epoch's last step, in float64: what the original's logs have for each epoch."""
    last_steps = (np.arange(config.epochs) + 1) * steps_per_epoch - 1
    rates = _rate(last_steps, config, steps_per_epoch, np)
    return np.broadcast_to(rates, last_steps.shape).tolist()


def _rate(step: Any, config: TrainConfig, steps_per_epoch: int, xp: ModuleType) -> Any:
    """Compute the rate at a step in NumPy or `jax.numpy`; optax's own schedules know float32 only."""
    real = functools.partial(xp.asarray, dtype=float)  # float32 in JAX, but for x64
    step, rate = xp.asarray(step), real(config.learning_rate)
    if config.schedule == "step":
        falls = (step // steps_per_epoch - config.decay_start) // config.decay_step + 1
        rate = rate * config.decay_factor ** real(xp.maximum(falls, 0))
    elif config.schedule == "cosine":
        length = max(config.epochs * steps_per_epoch - config.warmup_steps, 1)
        done = xp.clip(real(step - config.warmup_steps) / length, 0.0, 1.0)
        rate = rate * 0.5 * (1 + xp.cos(np.pi * done))
    if not config.warmup_steps:
        return rate
    held = step // config.warmup_hold * config.warmup_hold if config.warmup_hold > 1 else step + 1
    return rate * xp.minimum(real(held) / config.warmup_steps, 1.0)


def frozen_modules(config: TrainConfig) -> frozenset[str]:
    """Return the parts of the model in which nothing learns, so that they need neither gradient nor state."""
    if config.linear_probe:
        return frozenset({"embeddings", "layers", "layernorm"})
    return frozenset({"embeddings"} if config.freeze_layers else ())


def rate_multipliers(config: TrainConfig, num_layers: int) -> dict[str, Any]:
    """Return what the learning rate is multiplied by in each part, for the blocks as a vector [L].

    From the head down every block has `layer_decay` times the rate of the next one, and the embeddings that of the
    first block (Clark et al. 2020, ELECTRA). `head_multiplier` is the original's option `head_lr`.
    """
    return {
        "embeddings": config.layer_decay ** (num_layers + 1),
        "layers": _learning_blocks(config, num_layers) * config.layer_decay ** np.arange(num_layers, 0, -1),
        "layernorm": 1.0,
        "classifier": config.head_multiplier,
    }


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of a parameter tree: torch's `Adam` (L2 in the gradient) or `AdamW`, with the schedule.

    What is frozen counts in no norm, gets updates of zero and, where it is a whole part, has no state. The gradient is
    clipped before any weight decay. The multipliers scale what Adam and a decoupled decay make of it, as the rates of
    torch's parameter groups do.
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    learning = optax.chain(
        *([_scale(lambda layers: {"layers": _learning_blocks(config, layers)})] if config.freeze_layers else []),
        *([optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []),
        *([adam, decay] if config.optimizer == "adamw" else [decay, adam]),
        _scale(functools.partial(rate_multipliers, config)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps_per_epoch)),
    )
    fixed = frozen_modules(config)
    return optax.chain(
        optax.masked(learning, lambda tree: {part: part not in fixed for part in tree}),
        optax.masked(optax.set_to_zero(), lambda tree: {part: part in fixed for part in tree}),
    )


def _learning_blocks(config: TrainConfig, num_layers: int) -> np.ndarray:
    """Return 0 for frozen blocks and 1 for the others [L]."""
    return (np.arange(num_layers) >= config.freeze_layers).astype(float)


def _scale(factors: Callable[[int], Mapping[str, Any]]) -> optax.GradientTransformation:
    """Multiply parts of the updates by `factors(L)`, a number or a vector over the blocks for each part it names."""

    def scale(updates: Mapping[str, Any], _: Any = None) -> dict[str, Any]:
        blocks = jax.tree.leaves(updates["layers"])  # [L, …] each; none where only the classifier learns
        of_part = factors(len(blocks[0]) if blocks else 0)

        def one(part: str, leaf: jax.Array) -> jax.Array:
            factor = jnp.asarray(of_part[part], leaf.dtype)
            return leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))

        return {
            part: jax.tree.map(functools.partial(one, part), tree) if part in of_part else tree
            for part, tree in updates.items()
        }

    return optax.stateless(scale)
