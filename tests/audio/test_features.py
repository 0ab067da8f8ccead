"""The feature extractor: inputs, errors, padding, normalisation, and equality with transformers' extractor."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from feature_oracles import RECORDINGS, kaldi_fbank, recording, transformers_ast

from ast_jax import ASTFeatureExtractor, FrontendConfig, fbank
from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.config import PREPROCESSOR_FILE

RATE = 16000
# Data sets' mean and deviation, the value of padding, and the value of digital silence (REFERENCE numbers of the
# original's recipes: padding is 0 before normalisation, so it is louder than silence).
DATA_SETS = {
    "AudioSet": (-4.2677393, 4.5689974, 0.467032, -1.277594),
    "ESC-50": (-6.6268077, 5.358466, 0.618349, -0.869239),
    "Speech Commands": (-6.845978, 5.5654526, 0.615042, -0.817221),
}
# The contract of the filter bank, "median 1e-5, 99.9 % 1e-3, all 1e-2", divided by 2 std = 9.1 and rounded up.
MEDIAN, MOST, ALL = 2e-6, 2e-4, 2e-3


def noise(count=8000, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def extract(waveforms, **options):
    """Call an extractor of 64 frames, which is enough for `noise()`'s 48."""
    return ASTFeatureExtractor(max_length=64)(waveforms, sampling_rate=RATE, **options)


class WithArray:
    """Anything that NumPy can read, such as another library's array."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


ONE_SOUND = {
    "NumPy float32": lambda x: x,
    "NumPy float64": lambda x: x.astype(np.float64),
    "row": lambda x: x[None],
    "list of one": lambda x: [x],
    "tuple of one": lambda x: (x,),
    "list of one row": lambda x: [x[None]],
    "list of floats": lambda x: x.tolist(),
    "list of a list of floats": lambda x: [x.tolist()],
    "JAX array": jnp.asarray,
    "list of a JAX array": lambda x: [jnp.asarray(x)],
    "torch tensor": torch.from_numpy,
    "list of a torch tensor": lambda x: [torch.from_numpy(x)],
    "object with __array__": WithArray,
    "not contiguous": lambda x: np.repeat(x, 2)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32),
}


@pytest.mark.parametrize("convert", ONE_SOUND.values(), ids=ONE_SOUND)
def test_one_sound_in_any_form(convert):
    got = extract(convert(noise()))
    assert type(got) is np.ndarray
    assert got.dtype == np.float32
    assert got.shape == (1, 64, 128)
    want = normalize(fbank(noise()), FrontendConfig())
    # `float32` of a Python float, and (x - mean) / (2 std), round in the last digit only
    np.testing.assert_allclose(got[0, :48], want, rtol=0, atol=1e-6)


def test_float16_is_computed_in_float32():
    half = noise().astype(np.float16)
    np.testing.assert_array_equal(extract(half), extract(half.astype(np.float32)))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, torch.from_numpy, list, WithArray])
def test_batch_equals_singles(convert):
    batch = np.stack([noise(seed=seed) for seed in range(3)])
    got = extract(convert(batch))
    assert got.shape == (3, 64, 128)
    for index in range(3):
        np.testing.assert_array_equal(got[index], extract(batch[index])[0])


def test_sounds_of_different_lengths():
    waveforms = [noise(8000), noise(100, 1), jnp.asarray(noise(4000, 2)), torch.from_numpy(noise(400, 3))]
    got, lengths = extract(waveforms, return_attention_mask=True)
    assert got.shape == (4, 64, 128)
    assert lengths.tolist() == [48, 1, 23, 1]
    for index, waveform in enumerate(waveforms):
        np.testing.assert_array_equal(got[index], extract(waveform)[0])


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (np.zeros((2, 1, 400), np.float32), r"expected mono .* got shape \(2, 1, 400\)"),
        ([np.zeros((2, 400), np.float32)], r"waveform 0: expected mono .* got shape \(2, 400\)"),
        (np.float32(0), r"expected mono .* got shape \(\)"),
        (np.zeros((16000, 2), np.float32), r"expected a batch of shape \(b, samples\) .* got shape \(16000, 2\)"),
        (np.zeros((16000, 1), np.float32), r"expected a batch of shape \(b, samples\) .* got shape \(16000, 1\)"),
        (np.zeros((0, 16000), np.float32), r"expected a batch of shape \(b, samples\) .* got shape \(0, 16000\)"),
        ([], "expected at least one waveform, got an empty sequence"),
        (np.zeros(0, np.float32), "expected at least one sample, got none"),
        (np.zeros((2, 0), np.float32), "expected at least one sample, got none"),
        ([noise(), np.zeros(0, np.float32)], "waveform 1: expected at least one sample, got none"),
        (np.ones(400, np.int16), "expected floating-point samples .* got int16; divide 16-bit integers by 32768"),
        ([1, 2, 3], "expected floating-point samples .* got int64"),
        ([np.ones(400, np.int16)], "expected floating-point samples .* got int16"),
        (jnp.ones(400, jnp.int32), "expected floating-point samples .* got int32"),
        (torch.ones(400, dtype=torch.int16), "expected floating-point samples .* got int16"),
        ([0.5, None], "expected floating-point samples .* got object"),
        ("dog.wav", "expected floating-point samples .* got <U"),
    ],
)
def test_invalid_waveforms_are_refused(waveforms, message):
    with pytest.raises(ValueError, match=message):
        extract(waveforms)


def test_nan_and_inf_are_counted():
    sound = noise()
    sound[[3, 30, 300]] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"waveform 1: expected finite samples, got 3 NaN or Inf among 8000"):
        extract([noise(), sound])


def test_wrong_rate_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"expected 16000 Hz, got 44100 Hz; resample first"):
        ASTFeatureExtractor()(noise(), sampling_rate=44100)
    with pytest.raises(ValueError, match=r"expected 8000 Hz, got 16000 Hz"):
        ASTFeatureExtractor(sampling_rate=8000)(noise(), sampling_rate=16000)


def test_missing_rate_warns_where_it_was_called():
    with pytest.warns(UserWarning, match="no sampling_rate given: the samples are taken to be at 16000 Hz") as caught:
        got = ASTFeatureExtractor(max_length=64)(noise())
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, extract(noise()))


def test_too_long_warns_and_equals_the_cut_sound():
    """64 frames are 400 + 63 * 160 samples; one frame more needs 160 samples more."""
    fits = 400 + 63 * 160
    sound = noise(fits + 160)
    want = extract(sound[:fits])  # without a warning, which would be an error here
    np.testing.assert_array_equal(extract(sound[:-1]), want)
    with pytest.warns(UserWarning, match=r"waveform 0 has 65 frames; only the first 64 \(0\.66 s\) are used") as caught:
        got, lengths = extract(sound, return_attention_mask=True)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, want)
    assert lengths.tolist() == [64]


def test_max_length_of_one_call():
    extractor = ASTFeatureExtractor(max_length=64)
    got = extractor(noise(), sampling_rate=RATE, max_length=100)
    assert got.shape == (1, 100, 128)
    np.testing.assert_array_equal(got[:, :64], extract(noise()))
    with pytest.warns(UserWarning, match="waveform 0 has 48 frames; only the first 20"):
        cut = extractor(noise(), sampling_rate=RATE, max_length=20)
    # a product of 20 rows may add in another order than one of 48: the last digit
    np.testing.assert_allclose(cut, extract(noise())[:, :20], rtol=0, atol=1e-6)
    assert extractor.config.max_length == 64
    with pytest.raises(ValueError, match="max_length: expected a positive number, got 0"):
        extractor(noise(), sampling_rate=RATE, max_length=0)


def test_attention_mask_is_returned_by_call():
    """The configured choice has no effect, as in transformers, so that the result is an array."""
    extractor = ASTFeatureExtractor(max_length=64, return_attention_mask=True)
    spec, lengths = extractor(noise(), sampling_rate=RATE, return_attention_mask=True)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [48]
    for options in ({}, {"return_attention_mask": False}):
        got = extractor(noise(), sampling_rate=RATE, **options)
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, spec)
    theirs = transformers_ast.ASTFeatureExtractor(max_length=64, return_attention_mask=True)
    assert set(theirs(noise(), sampling_rate=RATE)) == {"input_values"}
    padding = normalize(np.zeros((), np.float32), extractor.config)
    assert (spec[0, 48:] == np.float32(padding)).all()
    assert (spec[0, 47] != np.float32(padding)).all()


@pytest.mark.parametrize("name", DATA_SETS)
def test_padding_and_silence(name):
    mean, std, padding, silence = DATA_SETS[name]
    got = ASTFeatureExtractor(mean=mean, std=std, max_length=64)(np.zeros(8000, np.float32), sampling_rate=RATE)
    # the numbers above have six decimals
    np.testing.assert_allclose(got[0, :48], silence, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[0, 48:], padding, rtol=0, atol=1e-6)


def test_padding_value_and_no_normalisation():
    got = ASTFeatureExtractor(do_normalize=False, padding_value=-3.0, max_length=64)(noise(), sampling_rate=RATE)
    np.testing.assert_array_equal(got[0, :48], fbank(noise()))
    assert (got[0, 48:] == -3).all()
    normal = ASTFeatureExtractor(padding_value=-3.0, max_length=64)(noise(), sampling_rate=RATE)
    np.testing.assert_allclose(normal, (got + 4.2677393) / (2 * 4.5689974), rtol=0, atol=1e-6)


def test_other_settings_reach_the_filter_bank():
    fields = {"sampling_rate": 8000, "num_mel_bins": 40, "frame_length": 32.0, "window_type": "povey"}
    extractor = ASTFeatureExtractor(FrontendConfig(max_length=100, **fields), do_normalize=False)
    got = extractor(noise(), sampling_rate=8000)
    want = fbank(noise(), **fields)
    assert got.shape == (1, 100, 40)
    np.testing.assert_array_equal(got[0, : len(want)], want)


def test_dither_is_determined_by_its_key():
    extractor = ASTFeatureExtractor(dither=0.1, max_length=64)
    first, again, other = (extractor(noise(), sampling_rate=RATE, key=key) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[0, :48] != other[0, :48]).mean() > 0.9
    pair = extractor([noise(), noise()], sampling_rate=RATE, key=0)
    assert (pair[0, :48] != pair[1, :48]).mean() > 0.9, "each sound of a batch has noise of its own"


def assert_within_the_contract(got, want, length, share=0.999):
    difference = np.abs(got - want)[0]
    assert np.median(difference[:length]) < MEDIAN
    assert (difference[:length] < MOST).mean() >= share
    assert difference.max() < ALL
    assert difference[length:].max() < 1e-6, "padding is a constant, rounded once"


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.name)
def test_equals_transformers_on_recordings(file):
    """transformers' NumPy path, which computes in float64 but for the spectrum and the result."""
    samples = recording(file)
    want = transformers_ast.ASTFeatureExtractor()(samples.copy(), sampling_rate=RATE, return_tensors="np")
    got, lengths = ASTFeatureExtractor()(samples, sampling_rate=RATE, return_attention_mask=True)
    assert got.shape == want["input_values"].shape == (1, 1024, 128)
    assert_within_the_contract(got, want["input_values"], lengths[0])


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.name)
def test_equals_kaldi_on_recordings(file):
    """kaldi-native-fbank in float32, padded and normalised as the original does it, at 80 bins."""
    frontend = FrontendConfig(num_mel_bins=80)
    want = np.zeros((1, 1024, 80), np.float32)
    found = kaldi_fbank(recording(file), frontend)
    want[0, : len(found)] = found
    want = (want - frontend.mean) / (2 * frontend.std)
    got, lengths = ASTFeatureExtractor(frontend)(recording(file), sampling_rate=RATE, return_attention_mask=True)
    assert got.shape == want.shape
    # The siren is nearly a pure tone: see SPEECH_AND_MUSIC in test_fbank.py.
    assert_within_the_contract(got, want, lengths[0], 0.997 if file.stem == "siren" else 0.999)


def test_equals_transformers_on_a_list_and_other_settings():
    fields = {"mean": -6.8, "std": 5.5, "max_length": 40, "num_mel_bins": 64}
    waveforms = [noise(4000), noise(5000, 1), noise(400, 2)]
    want = transformers_ast.ASTFeatureExtractor(**fields)(waveforms, sampling_rate=RATE, return_tensors="np")
    got = ASTFeatureExtractor(**fields)(waveforms, sampling_rate=RATE)
    assert np.abs(got - want["input_values"]).max() < MOST  # on noise no value is ill-conditioned


def test_transformers_reads_our_file(tmp_path):
    frontend = FrontendConfig(mean=-6.8, std=5.5, max_length=512, num_mel_bins=64, return_attention_mask=True)
    ASTFeatureExtractor(frontend).save_pretrained(tmp_path / "new" / "folder")
    loaded = transformers_ast.ASTFeatureExtractor.from_pretrained(tmp_path / "new" / "folder")
    for name in ("feature_size", "sampling_rate", "padding_value", "num_mel_bins", "max_length", "do_normalize", "mean",
                 "std", "return_attention_mask"):  # fmt: skip
        assert getattr(loaded, name) == getattr(frontend, name), name
    loaded.save_pretrained(tmp_path)
    back = ASTFeatureExtractor.from_pretrained(tmp_path).config
    assert back.replace(unknown_keys="{}") == frontend


def test_we_read_the_file_of_transformers(tmp_path):
    transformers_ast.ASTFeatureExtractor(mean=-6.8, std=5.5, max_length=512).save_pretrained(tmp_path)
    before = json.loads((tmp_path / PREPROCESSOR_FILE).read_text())
    extractor = ASTFeatureExtractor.from_pretrained(str(tmp_path))
    config = extractor.config
    assert (config.mean, config.std, config.max_length, config.sampling_rate) == (-6.8, 5.5, 512, 16000)
    extractor.save_pretrained(tmp_path)
    after = json.loads((tmp_path / PREPROCESSOR_FILE).read_text())
    assert {key: after[key] for key in before} == before, "keys that are not ours are kept"
    assert "padding_side" in before
    assert ASTFeatureExtractor.from_pretrained(tmp_path).config == config


def test_a_file_of_another_extractor_is_refused(tmp_path):
    (tmp_path / PREPROCESSOR_FILE).write_text('{"feature_extractor_type": "WhisperFeatureExtractor"}')
    with pytest.raises(ValueError, match=r"expected 'ASTFeatureExtractor', got 'WhisperFeatureExtractor'"):
        ASTFeatureExtractor.from_pretrained(tmp_path)


def test_repr_shows_the_settings():
    assert re.match(r"ASTFeatureExtractor\(FrontendConfig\(.*max_length=64", repr(ASTFeatureExtractor(max_length=64)))


def test_padded_log_mel_equals_the_extractor():
    """On the device, before normalisation, for a batch of mixed lengths with one shorter than a frame."""
    config = FrontendConfig(max_length=64, do_normalize=False, padding_value=0.25)
    counts = [100, 399, 400, 559, 560, 8000, config.max_samples]
    waveforms = [noise(count, seed) for seed, count in enumerate(counts)]
    padded = np.stack([np.pad(waveform, (0, config.max_samples - len(waveform))) for waveform in waveforms])
    on_device = jax.jit(padded_log_mel, static_argnames="config")
    got = np.asarray(on_device(jnp.asarray(padded), jnp.asarray(counts), config=config))
    want, lengths = ASTFeatureExtractor(config)(waveforms, sampling_rate=RATE, return_attention_mask=True)
    assert lengths.tolist() == [1, 1, 1, 1, 2, 48, 64]
    assert got.shape == want.shape
    assert got.dtype == np.float32
    # two float32 FFTs on noise, where no value is ill-conditioned: the contract's 1e-3
    assert np.abs(got - want).max() < 1e-3
    for row, length in zip(got, lengths, strict=True):
        assert (row[length:] == 0.25).all()
        assert (row[:length] != 0.25).all()


def test_normalize_is_the_same_on_the_device():
    config = FrontendConfig()
    spec = fbank(noise())
    np.testing.assert_allclose(normalize(jnp.asarray(spec), config), normalize(spec, config), rtol=0, atol=1e-6)
    assert normalize(spec, config.replace(do_normalize=False)) is spec
