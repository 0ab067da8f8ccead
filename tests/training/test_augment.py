"""Augmentation of one example: what is drawn, what is left alone, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ast_jax.training import augment

pytestmark = pytest.mark.usefixtures("quick_compilation")

GRID = (4, 6)


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
    spec = jnp.arange(20.0)[:, None] * 100 + jnp.arange(16.0)[None]  # a value says where it came from
    shifts = set()
    keys = jax.random.split(jax.random.key(2), 300)
    for out in np.asarray(jax.vmap(lambda key: augment.shift_spec(key, spec, 3, 2))(keys)):
        frames, bins = (out // 100).astype(int), (out % 100).astype(int)
        time, pitch = int(-frames[0, 0] % 20), 8 - int(bins[0, 8])
        np.testing.assert_array_equal(frames[:, 0], np.roll(np.arange(20), time))
        np.testing.assert_array_equal(bins[0], np.clip(np.arange(16) - pitch, 0, 15))
        assert (frames == frames[:, :1]).all()
        assert (bins == bins[:1]).all()
        shifts.add((time if time < 10 else time - 20, pitch))
    assert shifts == {(time, pitch) for time in range(-2, 3) for pitch in range(-3, 4)}  # 35 pairs, 300 draws
    np.testing.assert_array_equal(augment.shift_spec(keys[0], spec, 0, 0), spec)


def test_noise_and_roll():
    spec = jnp.arange(64.0)[:, None] * jnp.ones((1, 32)) * 100
    keys = jax.random.split(jax.random.key(1), 20)
    for out in np.asarray(jax.vmap(augment.noise_and_roll, in_axes=(0, None))(keys, spec)):
        shift = round(float(out[0].mean()) / 100)
        rolled = np.roll(np.asarray(spec), -shift, 0)
        assert min(shift, 64 - shift) <= 10
        assert (out - rolled).min() >= -1e-3  # float32 at 6,400
        assert (out - rolled).max() <= 0.1 + 1e-3


@pytest.mark.parametrize("dropped", [(0, 0, 0), (1, 2, 0), (0, 0, 5), (2, 3, 1)], ids=str)
def test_patchout_keeps_whole_rows_and_columns_but_for_single_patches(dropped):
    frequency, time, single = dropped
    size = (4 - frequency) * (6 - time) - single
    draw = jax.jit(jax.vmap(lambda key: augment.patchout_indices(key, GRID, *dropped)))
    tokens = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert tokens.shape == (200, size)
    assert augment.num_kept_patches(GRID, *dropped) == size
    assert jnp.issubdtype(tokens.dtype, jnp.integer)
    assert (np.diff(tokens, axis=1) > 0).all()  # ascending, none twice
    assert tokens.min() >= 0
    assert tokens.max() < 24
    for kept in tokens:
        rows, columns = np.unique(kept // 6), np.unique(kept % 6)
        assert len(rows) <= 4 - frequency
        assert len(columns) <= 6 - time
        if not single:
            assert (len(rows), len(columns)) == (4 - frequency, 6 - time)
    if size < 24:  # each of 200 keys leaves out another part: every patch is kept, and left out, by some
        assert (np.bincount(tokens.ravel(), minlength=24) > 0).all()
        assert (np.bincount(tokens.ravel(), minlength=24) < 200).all()
    else:
        assert (tokens == np.arange(24)).all()


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ((4, 0, 0), "patchout_frequency: expected 0 to 3 of the patch grid's 4 along frequency, got 4"),
        ((0, 7, 0), "patchout_time: expected 0 to 5 of the patch grid's 6 along time, got 7"),
        ((1, 2, 12), "patchout: expected 0 to 11 of the 12 patches that remain, got 12"),
    ],
)
def test_patchout_leaves_something(dropped, message):
    with pytest.raises(ValueError, match=message):
        augment.patchout_indices(jax.random.key(0), GRID, *dropped)
