"""Embeddings: each layer and pooling against `encode`, receptive fields of patches, and the files."""

import pathlib

import jax
import numpy as np
import pyarrow.parquet
import pytest

import ast_jax
from ast_jax.audio import fbank
from ast_jax.inference.embeddings import Embedding, embed_each, patch_extents
from ast_jax.inference.vectors import columns_of, vector_table

SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"
RATE = 16000


@pytest.fixture(scope="module")
def model():
    """A model with rectangular, overlapping patches and three layers."""
    config = ast_jax.ASTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, max_length=100,
        num_mel_bins=64, patch_size=(16, 8), frequency_stride=12, time_stride=6, num_labels=4,
    )  # fmt: skip
    frontend = ast_jax.FrontendConfig(num_mel_bins=64, max_length=100)
    return ast_jax.Checkpoint(ast_jax.init(jax.random.key(0), config), config, frontend)


@pytest.fixture(scope="module")
def sound(model):
    return ast_jax.read_audio(SOUNDS / "speech.flac")[: model.frontend.max_samples]


@pytest.fixture(scope="module")
def encoded(model, sound):
    spec = ast_jax.ASTFeatureExtractor(model.frontend)(sound, RATE)
    return ast_jax.encode(model.params, spec, model.config, output_hidden_states=True)


@pytest.mark.parametrize("layer", [None, 0, 1, 2, 3, -1, -4])
@pytest.mark.parametrize("pool", ["pooled", "cls", "mean", "none"])
def test_layers_and_pools(model, sound, encoded, layer, pool):
    tokens = np.asarray(encoded.last_hidden_state if layer is None else encoded.hidden_states[layer])[0]
    rows, columns = model.config.grid
    want = {
        "pooled": tokens[:2].mean(0), "cls": tokens[0], "mean": tokens[2:].mean(0),
        "none": tokens[2:].reshape(rows, columns, -1),
    }[pool]  # fmt: skip
    found = ast_jax.embed(sound, model, sampling_rate=RATE, layer=layer, pool=pool)
    assert found.values.shape == (1, *want.shape)
    np.testing.assert_allclose(found.values[0], want, atol=2e-5)  # float32 roundings of another program
    assert found.times.tolist() == [[0, len(sound) / RATE]]
    np.testing.assert_allclose(found.clip, want.reshape(-1, 48).mean(0), atol=2e-5)


def test_receptive_fields_of_patches(model):
    """Seconds from counted frames, Hz from the non-zero filters."""
    config, frontend = model.config, model.frontend
    times, hertz = patch_extents(config, frontend)
    assert config.grid == (5, 16)
    assert times.shape == (16, 2)
    assert times[0].tolist() == [0, (7 * 160 + 400) / RATE]
    assert times[1, 0] == 6 * 160 / RATE
    assert times[-1, 1] <= frontend.max_seconds
    fine = fbank.mel_bank(64, 2**16, RATE, frontend.low_freq, frontend.top_frequency)
    frequencies = np.arange(len(fine)) * RATE / 2**16
    for row, (low, high) in enumerate(hertz):
        passed = frequencies[fine[:, 12 * row : 12 * row + 16].any(1)]
        assert abs(passed[0] - low) < 0.5  # the bins of this FFT are 0.24 Hz wide
        assert abs(passed[-1] - high) < 0.5


def test_patches_of_a_short_sound_end_with_it(model, sound):
    found = ast_jax.embed(sound[:8000], model, sampling_rate=RATE, pool="none")
    assert found.values.shape == (1, 5, 9, 48)
    assert found.patch_times[-1, 0] < 0.5 <= found.patch_times[-1, 0] + 6 * 160 / RATE
    own = ast_jax.embed(sound[:8000], model, sampling_rate=RATE, pool="none", padding="own-length")
    assert own.values.shape == (1, 5, 7, 48)  # 48 frames hold whole patches of 8 at steps of 6 seven times


def test_masked_mean_leaves_padding_out(model, sound):
    short = sound[:8000]
    spec, lengths = ast_jax.ASTFeatureExtractor(model.frontend)(short, RATE, return_attention_mask=True)
    tokens = np.asarray(ast_jax.encode(model.params, spec, model.config, lengths=lengths).last_hidden_state)[0, 2:]
    want = tokens.reshape(5, 16, -1)[:, :7].reshape(35, -1).mean(0)
    got = ast_jax.embed(short, model, sampling_rate=RATE, pool="mean", padding="mask").values[0]
    np.testing.assert_allclose(got, want, atol=2e-5)  # float32 roundings


def test_windows_of_a_long_sound(model):
    path = SOUNDS / "music.flac"
    found, again = ast_jax.embed([path, path], model, hop=0.5)
    assert found.values.shape == (len(found.times), 48)
    np.testing.assert_allclose(found.values, again.values, atol=1e-5)
    np.testing.assert_allclose(found.clip, found.values.mean(0), atol=1e-6)
    second = ast_jax.read_audio(path)[8000:][: model.frontend.max_samples]
    alone = ast_jax.embed(second, model, sampling_rate=RATE).values[0]
    np.testing.assert_allclose(found.values[1], alone, atol=1e-5)
    longer = ast_jax.embed(path, model, window=2 * model.frontend.max_seconds, hop=1.0)
    halves = [ast_jax.read_audio(path)[start:][: model.frontend.max_samples] for start in (0, 16240)]
    want = np.mean([ast_jax.embed(half, model, sampling_rate=RATE).values[0] for half in halves], axis=0)
    np.testing.assert_allclose(longer.values[0], want, atol=1e-5)


def test_a_model_without_a_classifier(model, sound):
    body = model.replace(params={name: part for name, part in model.params.items() if name != "classifier"})
    want, got = (ast_jax.embed(sound, each, sampling_rate=RATE).values for each in (model, body))
    np.testing.assert_array_equal(got, want)


def test_an_unusable_sound_does_not_affect_the_others(model, sound):
    found = list(embed_each([sound, np.full(16000, np.nan), sound], model, sampling_rate=RATE))
    assert [each.error is None for each in found] == [True, False, True]
    with pytest.raises(ast_jax.AudioError, match="16000 of 16000 samples are NaN or Inf"):
        ast_jax.embed(np.full(16000, np.nan), model, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layer: expected 0 to 3, or -1 to -4 from the end, got 4"),
        ({"layer": -5}, "layer: expected 0 to 3"),
        ({"pool": "max"}, "pool: expected one of pooled, cls, mean, none, got 'max'"),
        ({"pool": "none", "window": 3.0}, "window: expected at most the model's input of 1.015 s for a vector of each"),
    ],
)
def test_invalid_options(model, sound, options, message):
    with pytest.raises(ValueError, match=message):
        ast_jax.embed(sound, model, sampling_rate=RATE, **options)


def test_nearest_neighbours_are_of_the_same_recording():
    """By cosine similarity of windows."""
    names = ["speech.flac", "music.flac"]
    found = ast_jax.embed([SOUNDS / name for name in names], "sounds-tiny", window=1.5, hop=1.0)
    vectors = np.concatenate([each.values for each in found])
    kinds = np.repeat(np.arange(2), [len(each.values) for each in found])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearness = vectors @ vectors.T
    np.fill_diagonal(nearness, -1)
    assert (kinds[nearness.argmax(1)] == kinds).all()


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_tables(tmp_path, model, sound, ending):
    path = tmp_path / f"vectors.{ending}"
    found = list(embed_each([sound, sound[:8000]], model, sampling_rate=RATE, pool="none"))
    with vector_table(path) as table:
        for each in found:
            table.write(each)
    if ending == "npz":
        with np.load(path) as file:
            columns = dict(file)
    else:
        read = pyarrow.parquet.read_table(path)
        columns = {name: np.array(read[name].to_pylist(), np.float32 if name == "embedding" else None)
                   for name in read.column_names}  # fmt: skip
    assert list(columns) == ["source", "start", "end", "low", "high", "embedding"]
    assert columns["embedding"].shape == (5 * 16 + 5 * 9, 48)
    np.testing.assert_array_equal(columns["embedding"][:80], found[0].values.reshape(80, 48))
    assert columns["start"][17] == found[0].patch_times[1, 0]  # row 1, column 1
    assert columns["high"][17] == found[0].patch_frequencies[1, 1]
    assert sorted(tmp_path.iterdir()) == [path]


def test_one_row_per_clip():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = Embedding("a b.wav", values, np.array([[0, 1], [0.5, 1.5], [1, 2.0]]))
    columns = columns_of(found, whole=True)
    assert {name: column.tolist() for name, column in columns.items()} == {
        "source": ["a b.wav"], "start": [0], "end": [2], "embedding": [[2, 3]],
    }  # fmt: skip
    assert columns_of(found)["end"].tolist() == [1, 1.5, 2]


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_tables_are_written_atomically(tmp_path, ending):
    def fail():
        with vector_table(tmp_path / f"vectors.{ending}") as table:
            table.write(Embedding("a", np.zeros((1, 2), np.float32), np.zeros((1, 2))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
