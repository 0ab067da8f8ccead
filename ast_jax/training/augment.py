"""Augmentation of one example, as pure functions with explicit keys; `vmap` over examples and keys augments a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_ROLL = 10  # frames, in either direction


def mask_band(key: jax.Array, spec: jax.Array, max_width: jax.Array | float, axis: int) -> jax.Array:
    """Set one random band of `spec` [T, F] to zero along `axis` (SpecAugment).

    Drawn as by torchaudio: width uniform in [0, max_width), start uniform in [0, size - width). Masks are applied
    before normalisation, as in the original.
    """
    size = spec.shape[axis]
    width_key, start_key = jax.random.split(key)
    width = jax.random.uniform(width_key) * max_width
    start = jnp.floor(jax.random.uniform(start_key) * (size - width))
    position = jnp.arange(size)
    inside = (position >= start) & (position < start + jnp.floor(width))
    return jnp.where(inside[:, None] if axis == 0 else inside[None], 0.0, spec)


def mask_spec(
    key: jax.Array, spec: jax.Array, frequency_mask: jax.Array | float, time_mask: jax.Array | float
) -> jax.Array:
    """Mask one band of up to `frequency_mask` mel bins and one of up to `time_mask` frames of `spec` [T, F]."""
    frequency_key, time_key = jax.random.split(key)
    return mask_band(time_key, mask_band(frequency_key, spec, frequency_mask, 1), time_mask, 0)


def shift_spec(key: jax.Array, spec: jax.Array, frequency_shift: int, time_shift: int) -> jax.Array:
    """Shift `spec` [T, F] by up to `frequency_shift` mel bins and `time_shift` frames, in either direction.

    Along frequency the edge bin is repeated, along time the shift is circular.
    """
    frequency_key, time_key = jax.random.split(key)
    bins = jax.random.randint(frequency_key, (), -frequency_shift, frequency_shift + 1)
    frames = jax.random.randint(time_key, (), -time_shift, time_shift + 1)
    source = jnp.clip(jnp.arange(spec.shape[1]) - bins, 0, spec.shape[1] - 1)
    return jnp.roll(spec[:, source], frames, axis=0)


def noise_and_roll(key: jax.Array, spec: jax.Array) -> jax.Array:
    """Add uniform noise of a random level up to 0.1 to a normalised `spec` [T, F], and roll it by up to 10 frames."""
    noise_key, level_key, roll_key = jax.random.split(key, 3)
    noise = jax.random.uniform(noise_key, spec.shape, spec.dtype)
    level = jax.random.uniform(level_key, (), spec.dtype) / 10
    shift = jax.random.randint(roll_key, (), -MAX_ROLL, MAX_ROLL)
    return jnp.roll(spec + noise * level, shift, axis=0)


def num_kept_patches(grid: tuple[int, int], frequency: int, time: int, unstructured: int) -> int:
    """Return K, the number of patches of a grid (F', T') that patchout keeps.

    Raises:
        ValueError: no patch would remain.
    """
    for name, dropped, size in (("frequency", frequency, grid[0]), ("time", time, grid[1])):
        if dropped >= size:
            raise ValueError(
                f"patchout_{name}: expected 0 to {size - 1} of the patch grid's {size} along {name}, got {dropped}"
            )
    remaining = (grid[0] - frequency) * (grid[1] - time)
    if unstructured >= remaining:
        raise ValueError(
            f"patchout: expected 0 to {remaining - 1} of the {remaining} patches that remain, got {unstructured}"
        )
    return remaining - unstructured


def patchout_indices(key: jax.Array, grid: tuple[int, int], frequency: int, time: int, unstructured: int) -> jax.Array:
    """Draw the patches that a training step keeps (PaSST, Koutini et al. 2022, section 3.2).

    Args:
        key: random key.
        grid: rows and columns of patches (F', T').
        frequency: rows to drop (structured patchout).
        time: columns to drop (structured patchout).
        unstructured: individual patches to drop from the remaining ones (unstructured patchout).

    Returns:
        [K] ascending indices into the F' T' patches, frequency-major; K depends on the arguments, not on the key.

    Raises:
        ValueError: no patch would remain.
    """
    count = num_kept_patches(grid, frequency, time, unstructured)
    row_key, column_key, patch_key = jax.random.split(key, 3)
    rows = jax.random.permutation(row_key, grid[0])[frequency:]
    columns = jax.random.permutation(column_key, grid[1])[time:]
    patches = (rows[:, None] * grid[1] + columns[None]).ravel()
    return jnp.sort(jax.random.permutation(patch_key, patches)[:count])
