"""The filter bank against transformers' and Kaldi's own (kaldi-native-fbank), on both paths, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_oracles import RECORDINGS, kaldi_fbank, recording, transformers_bank, transformers_fbank

from ast_jax import fbank
from ast_jax.audio import fbank as kaldi
from ast_jax.config import FrontendConfig

CONFIG = FrontendConfig()
FLOOR = np.float32(-15.942385)  # log of float32 epsilon

# The contract in float32. An FFT of 512 points in float32 leaves errors of about 1e-7 of a frame's largest power in
# every bin, which the logarithm enlarges where a bin is quiet next to a loud one. torchaudio's float32 rounding
# against its own float64 reaches 5e-3 on such values, so nobody's float32 can be held to less.
MEDIAN, MOST, ALL = 1e-5, 1e-3, 1e-2
# The contract in float64 is 1e-3; measured are 1e-11, so what is left is roundings of 1e-16 before the logarithm.
FLOAT64 = 1e-9
# On white noise no bin is quiet next to a loud one, so float32 itself agrees this well.
ON_NOISE = 1e-3

PATHS = ["numpy", "jit"]
# The contract is for speech and music. The siren has nothing above 5.5 kHz, where float32 rounds what is left: for it,
# see `test_float32_is_as_near_the_truth_as_torchaudio`.
SPEECH_AND_MUSIC = [file for file in RECORDINGS if file.stem != "siren"]
# The rounding of torchaudio 2.11 in float32 against its own float64, measured on these recordings: the share of values
# that differ by less than MOST, the largest difference, and the mean.
TORCHAUDIO_FLOAT32 = {
    "music": (1.0, 4.71e-4, 5.64e-6),
    "siren": (0.9897, 5.64e-3, 5.12e-5),
    "speech": (1.0, 5.04e-4, 6.33e-6),
    "speech_over_music": (1.0, 3.19e-4, 4.91e-6),
    "telephone": (1.0, 4.75e-4, 2.82e-6),
}
# Settings under which no filter is empty, as kaldi-native-fbank demands.
NONE_EMPTY = {
    "40 bins": {"num_mel_bins": 40},
    "64 bins": {"num_mel_bins": 64},
    "80 bins": {"num_mel_bins": 80},
    "80 bins, povey": {"num_mel_bins": 80, "window_type": "povey"},
    "80 bins, hamming": {"num_mel_bins": 80, "window_type": "hamming"},
    "80 bins, rectangular": {"num_mel_bins": 80, "window_type": "rectangular"},
    "80 bins, blackman": {"num_mel_bins": 80, "window_type": "blackman"},
    "128 bins": {"frame_length": 50.0, "frame_shift": 5.0},
    "128 bins from 300 Hz": {"low_freq": 300.0, "high_freq": 7600.0},
    "from the Nyquist frequency": {"num_mel_bins": 80, "high_freq": -400.0},
    "from 0 Hz": {"num_mel_bins": 80, "low_freq": 0.0},
    "no pre-emphasis": {"num_mel_bins": 80, "preemphasis_coefficient": 0.0},
    "offset kept": {"num_mel_bins": 80, "remove_dc_offset": False},
    "8 kHz": {"sampling_rate": 8000, "num_mel_bins": 40},
    "44.1 kHz": {"sampling_rate": 44100, "num_mel_bins": 64},
}


@functools.cache
def jitted(config):
    return jax.jit(functools.partial(kaldi.log_mel, config=config, xp=jnp))


def ours(samples, config, path):
    """Return log-mel [T, F] as a NumPy array from the NumPy or the JAX implementation."""
    if path == "numpy":
        return kaldi.log_mel(samples, config)
    return np.asarray(jitted(config)(samples))


def noise(count, seed=0, dtype=np.float32):
    """Return white noise with an offset, so that DC removal has an effect."""
    return (0.1 * np.random.default_rng(seed).standard_normal(count) + 0.05).astype(dtype)


def test_recordings_exist():
    assert len(SPEECH_AND_MUSIC) >= 3


def assert_within_the_contract(got, want):
    assert got.shape == want.shape
    assert got.dtype == np.float32
    difference = np.abs(got - want)
    assert np.median(difference) < MEDIAN
    assert (difference < MOST).mean() >= 0.999
    assert difference.max() < ALL


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", SPEECH_AND_MUSIC, ids=lambda file: file.name)
def test_float32_equals_transformers_on_speech_and_music(file, path):
    assert_within_the_contract(ours(recording(file), CONFIG, path), transformers_fbank(recording(file), CONFIG))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", SPEECH_AND_MUSIC, ids=lambda file: file.name)
def test_float32_equals_kaldi_on_speech_and_music(file, path):
    """At 80 bins; both compute in float32, with different roundings."""
    config = CONFIG.replace(num_mel_bins=80)
    assert_within_the_contract(ours(recording(file), config, path), kaldi_fbank(recording(file), config))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.name)
def test_float32_is_as_near_the_truth_as_torchaudio(file, path):
    """The truth being float64; this holds for the siren too."""
    got = np.abs(ours(recording(file), CONFIG, path) - transformers_fbank(recording(file), CONFIG))
    share, largest, mean = TORCHAUDIO_FLOAT32[file.stem]
    assert np.median(got) < MEDIAN
    assert (got < MOST).mean() >= min(0.999, share)
    assert got.max() < max(ALL, largest)
    assert got.mean() < mean


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.name)
def test_float32_is_as_near_the_truth_as_kaldi(file, path):
    config = CONFIG.replace(num_mel_bins=80)
    truth = transformers_fbank(recording(file), config)
    got = np.abs(ours(recording(file), config, path) - truth)
    reference = np.abs(kaldi_fbank(recording(file), config) - truth)
    assert (got < MOST).mean() >= min(0.999, (reference < MOST).mean())
    assert got.max() < max(ALL, reference.max())
    assert got.mean() < reference.mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.name)
def test_float64_equals_transformers_on_recordings(file, path, x64):
    samples = recording(file).astype(np.float64)
    got, want = ours(samples, CONFIG, path), transformers_fbank(samples, CONFIG)
    assert got.dtype == want.dtype == np.float64
    assert got.shape == want.shape
    assert np.abs(got - want).max() < FLOAT64


OPTIONS = {
    "hanning": {},
    "hamming": {"window_type": "hamming"},
    "povey": {"window_type": "povey"},
    "rectangular": {"window_type": "rectangular"},
    "blackman": {"window_type": "blackman"},
    "long frames": {"frame_length": 32.0, "frame_shift": 12.5},
    "frames past 512 samples": {"frame_length": 50.0, "frame_shift": 5.0},
    "40 bins": {"num_mel_bins": 40},
    "64 bins": {"num_mel_bins": 64},
    "80 bins": {"num_mel_bins": 80},
    "band": {"low_freq": 100.0, "high_freq": 7000.0},
    "from the Nyquist frequency": {"high_freq": -400.0},
    "from 0 Hz": {"low_freq": 0.0},
    "no pre-emphasis": {"preemphasis_coefficient": 0.0},
    "another pre-emphasis": {"preemphasis_coefficient": 0.5},
    "offset kept": {"remove_dc_offset": False},
    "8 kHz": {"sampling_rate": 8000, "num_mel_bins": 40},
    "44.1 kHz": {"sampling_rate": 44100, "num_mel_bins": 64},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_equal_transformers(options, path):
    config = CONFIG.replace(**options)
    samples = noise(8000)
    got, want = ours(samples, config, path), transformers_fbank(samples, config)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < ON_NOISE
    if options:
        assert np.abs(np.mean(got) - np.mean(ours(samples, CONFIG, path))) > ON_NOISE or got.shape[1] != 128, (
            "the option changes nothing, so this comparison shows nothing"
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_equal_transformers_in_float64(options):
    config = CONFIG.replace(**options)
    samples = noise(8000, dtype=np.float64)
    assert np.abs(ours(samples, config, "numpy") - transformers_fbank(samples, config)).max() < FLOAT64


@pytest.mark.parametrize("options", NONE_EMPTY.values(), ids=NONE_EMPTY)
def test_options_equal_kaldi(options):
    config = CONFIG.replace(**options)
    got, want = ours(noise(16000), config, "numpy"), kaldi_fbank(noise(16000), config)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < ON_NOISE


def test_public_fbank_passes_every_option():
    options = {"num_mel_bins": 40, "frame_length": 20.0, "frame_shift": 8.0, "low_freq": 50.0, "high_freq": -100.0,
               "window_type": "povey", "preemphasis_coefficient": 0.9, "remove_dc_offset": False}  # fmt: skip
    config = CONFIG.replace(sampling_rate=22050, **options)
    got = fbank(noise(4000), sampling_rate=22050, **options)
    assert np.abs(got - transformers_fbank(noise(4000), config)).max() < ON_NOISE
    assert np.abs(got - kaldi_fbank(noise(4000), config)).max() < ON_NOISE


def test_frame_counts_equal_kaldi():
    """For each length from one frame to eleven, by all three functions that count frames."""
    lengths = np.arange(400, 2001)
    waveform = np.zeros(2000, np.float32)
    few_bins = CONFIG.replace(num_mel_bins=10)
    want = [len(kaldi_fbank(waveform[:length], few_bins)) for length in lengths]
    assert [kaldi.num_frames(int(length), CONFIG) for length in lengths] == want
    assert kaldi.num_frames(jnp.asarray(lengths), CONFIG).tolist() == want
    assert [len(kaldi.cut_frames(waveform[:length], CONFIG, np)) for length in lengths] == want
    for length, count in zip(lengths.tolist(), want, strict=True):
        cut = functools.partial(kaldi.cut_frames, config=CONFIG, xp=jnp)
        assert jax.eval_shape(cut, jax.ShapeDtypeStruct((length,), np.float32)).shape == (count, 400)


@pytest.mark.parametrize(("seconds", "frames"), [(1.0, 98), (10.0, 998), (10.24, 1022)])
def test_known_frame_counts(seconds, frames):
    assert fbank(np.zeros(round(16000 * seconds), np.float32)).shape == (frames, 128)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 200, 399])
def test_less_than_one_frame_is_padded_to_one(count, path):
    """Kaldi makes no frame of it; ours is documented to return the features of the zero-padded frame."""
    got = ours(noise(count), CONFIG, path)
    assert got.shape == (1, 128)
    assert kaldi_fbank(noise(count), CONFIG.replace(num_mel_bins=80)).shape == (0, 80)
    want = transformers_fbank(np.pad(noise(count), (0, 400 - count)), CONFIG)
    assert np.abs(got - want).max() < ON_NOISE


@pytest.mark.parametrize("path", PATHS)
def test_samples_after_the_last_whole_frame_are_not_used(path):
    samples = noise(400 + 160 + 159)
    changed = samples.copy()
    changed[560:] = 1.0
    got = ours(samples, CONFIG, path)
    assert len(got) == 2
    np.testing.assert_array_equal(ours(changed, CONFIG, path), got)
    changed[559] = 1.0
    assert (ours(changed, CONFIG, path)[1] != got[1]).any()


@pytest.mark.parametrize("path", PATHS)
def test_silence_is_the_floor(path):
    got = ours(np.zeros(16000, np.float32), CONFIG, path)
    assert got.shape == (98, 128)
    assert (got == FLOOR).all()


@pytest.mark.parametrize("path", PATHS)
def test_mel_bin_3_is_always_the_floor(path):
    """At 128 bins and 16 kHz that filter lies between two FFT bins, in transformers as here; it is the only one."""
    got = ours(noise(16000), CONFIG, path)
    assert (got[:, 3] == FLOOR).all()
    assert (got.max(0) > FLOOR).sum() == 127
    assert (transformers_fbank(noise(16000), CONFIG)[:, 3].astype(np.float32) == FLOOR).all()


@pytest.mark.parametrize("num_mel_bins", [40, 64, 80, 128])
def test_mel_bank_equals_transformers(num_mel_bins):
    want = transformers_bank(CONFIG.replace(num_mel_bins=num_mel_bins), 512)
    got = kaldi.mel_bank(num_mel_bins, 512, 16000, 20.0, 8000.0)
    # float64 roundings of mel values up to 2840 are 5e-13, divided by filters at least 22 mel wide
    np.testing.assert_allclose(got[:-1], want[:-1], rtol=0, atol=1e-12)
    assert (got[-1] == 0).all(), "the Nyquist bin belongs to no filter"


@pytest.mark.parametrize("path", PATHS)
def test_batch_equals_single(path):
    """The order of float32 additions may differ with the batch, so up to the contract on noise."""
    batch = np.stack([noise(4000, seed) for seed in range(6)]).reshape(2, 3, 4000)
    got = ours(batch, CONFIG, path)
    assert got.shape == (2, 3, 23, 128)
    for row in range(2):
        for column in range(3):
            single = ours(batch[row, column], CONFIG, path)
            assert np.abs(got[row, column] - single).max() < ON_NOISE / 10


def test_jit_equals_numpy_in_float64(x64):
    samples = noise(16000, dtype=np.float64)
    # roundings of 2e-16 through an FFT of 512 points and a sum over 257, under a logarithm
    np.testing.assert_allclose(ours(samples, CONFIG, "jit"), ours(samples, CONFIG, "numpy"), rtol=0, atol=1e-9)


def test_jax_array_gives_jax_array_and_numpy_gives_numpy():
    assert isinstance(fbank(noise(800)), np.ndarray)
    assert isinstance(fbank(jnp.asarray(noise(800))), jax.Array)
    got = jax.jit(fbank)(jnp.asarray(noise(800)))
    assert np.abs(np.asarray(got) - fbank(noise(800))).max() < ON_NOISE


def test_gradient_is_finite_and_right(x64):
    samples = jnp.asarray(noise(1600, dtype=np.float64))
    direction = jnp.asarray(noise(1600, seed=1, dtype=np.float64))

    def mean(waveform):
        return fbank(waveform, dtype=np.float64).mean()

    slope = jax.grad(mean)(samples) @ direction
    step = 1e-6
    want = (mean(samples + step * direction) - mean(samples - step * direction)) / (2 * step)
    # a central difference with step 1e-6 is off by its square and by 1e-15 / 1e-6
    np.testing.assert_allclose(slope, want, rtol=1e-6)
    assert np.isfinite(jax.grad(mean)(jnp.zeros(1600))).all(), "at the floor of silence"


@pytest.mark.parametrize("path", PATHS)
def test_dither_equals_transformers_with_the_same_noise(path, monkeypatch):
    config = CONFIG.replace(dither=0.01)
    drawn = np.random.default_rng(0).standard_normal((23, 400), np.float32)
    rows = iter(drawn)
    monkeypatch.setattr(np.random, "randn", lambda count: next(rows))
    want = transformers_fbank(noise(4000), config, dither=0.01)
    assert next(rows, None) is None
    xp = np if path == "numpy" else jnp
    got = kaldi.log_mel(xp.asarray(noise(4000)), config, xp, xp.asarray(drawn))
    assert np.abs(np.asarray(got) - want).max() < ON_NOISE


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_dither_has_the_configured_strength(convert):
    """Under a rectangular window noise of deviation d has the power W d² in every FFT bin."""
    key = 0 if convert is np.asarray else jax.random.key(0)
    got = fbank(
        convert(np.zeros(160000, np.float32)), dither=0.01, key=key, window_type="rectangular",
        preemphasis_coefficient=0.0, remove_dc_offset=False,
    )  # fmt: skip
    want = 400 * 0.01**2 * kaldi.mel_bank(128, 512, 16000, 20.0, 8000.0).sum(0)
    power = np.delete(np.exp(np.asarray(got, np.float64)).mean(0), 3)
    # each of 998 frames gives a power whose deviation is its mean: 1/sqrt(998 / 2.5 overlaps) is 5 %, and 127 bins
    # should all lie within 5 deviations, their mean within 1 %
    ratio = power / np.delete(want, 3)
    assert np.abs(ratio - 1).max() < 0.25
    assert abs(ratio.mean() - 1) < 0.02


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_dither_is_determined_by_its_key(convert):
    keys = (0, 1) if convert is np.asarray else (jax.random.key(0), jax.random.key(1))
    samples = convert(noise(4000))
    first = fbank(samples, dither=0.1, key=keys[0])
    assert (np.asarray(fbank(samples, dither=0.1, key=keys[0])) == np.asarray(first)).all()
    assert (np.asarray(fbank(samples, dither=0.1, key=keys[1])) != np.asarray(first)).any()
    with pytest.raises(ValueError, match=r"dither: expected .* got none; pass `key`"):
        fbank(samples, dither=0.1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, bool])
def test_integers_are_refused(dtype):
    for samples in (np.ones(400, dtype), jnp.ones(400, dtype), np.ones(400, dtype).tolist()):
        with pytest.raises(ValueError, match=r"expected floating-point samples in \[-1, 1\], got (u?int|bool)"):
            fbank(samples)


def test_float16_is_computed_in_float32():
    samples = noise(1600).astype(np.float16)
    got = fbank(samples)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, fbank(samples.astype(np.float32)))
    assert fbank(samples, dtype=np.float64).dtype == np.float64


def test_no_samples_are_refused():
    for samples in (np.zeros(0, np.float32), np.zeros((2, 0), np.float32), np.float32(0)):
        with pytest.raises(ValueError, match=r"expected at least one sample, got shape"):
            fbank(samples)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"window_type": "hann"}, "window_type: expected one of hanning, .* got 'hann'"),
        ({"high_freq": 9000.0}, r"low_freq and high_freq: expected 0 <= low < high <= 8000 Hz, got \(20.0, 9000.0\)"),
        ({"low_freq": 8000.0}, r"expected 0 <= low < high <= 8000 Hz, got \(8000.0, 8000.0\)"),
        ({"frame_shift": 0.01}, "frame_shift: expected at least one sample, got '0.01 ms'"),
        ({"num_mel_bins": 0}, "num_mel_bins: expected a positive number, got 0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        fbank(noise(400), **option)


def test_columns_and_non_finite_samples_are_refused():
    sound = np.zeros(1600, np.float32)
    with pytest.raises(ValueError, match=r"expected samples along the last axis, got shape \(1600, 2\)"):
        fbank(np.stack([sound, sound], axis=1))
    sound[3] = np.inf
    with pytest.raises(ValueError, match="expected finite samples, got 1 NaN or Inf among 1600"):
        fbank(sound)
