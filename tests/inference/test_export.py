"""`wave_to_logits`, and its export to a file."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ast_jax
from ast_jax.training import distill

SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"


@pytest.fixture(scope="module")
def model():
    return ast_jax.load("sounds-tiny")


@pytest.fixture(scope="module")
def waveforms(model):
    size = model.frontend.max_samples
    return np.stack([ast_jax.read_audio(SOUNDS / f"{name}.flac")[:size] for name in ("speech", "music", "telephone")])


def by_the_extractor(model, waveforms):
    spec = ast_jax.ASTFeatureExtractor(model.frontend)(list(waveforms), 16000)
    return np.asarray(ast_jax.apply(model.params, spec, model.config))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "tiny.stablehlo"
    ast_jax.export(model, path)
    return path


def test_equals_the_extractor_and_apply(model, waveforms):
    logits = jax.jit(ast_jax.wave_to_logits(*model))
    want = by_the_extractor(model, waveforms)
    np.testing.assert_allclose(logits(waveforms), want, atol=2e-4)  # float32 logarithms of small powers, two FFTs
    np.testing.assert_allclose(logits(waveforms[1]), want[1], atol=2e-4)
    short = by_the_extractor(model, waveforms[:, :9000])
    np.testing.assert_allclose(logits(waveforms[:, :9000]), short, atol=2e-4)
    np.testing.assert_allclose(logits(waveforms, np.array([9000] * 3)), short, atol=2e-4)
    np.testing.assert_allclose(logits(waveforms[0], 9000), short[0], atol=2e-4)


def test_vmap_and_pmap(model, waveforms):
    function = ast_jax.wave_to_logits(*model)
    want = by_the_extractor(model, waveforms)
    np.testing.assert_allclose(jax.vmap(function)(waveforms), want, atol=2e-4)
    assert jax.device_count() == 8
    shards = np.tile(waveforms, (8, 1, 1))[:8]  # [8, 3, S]
    out = jax.pmap(function)(shards)
    assert out.shape == (8, 3, 8)
    np.testing.assert_allclose(out[5], want, atol=2e-4)


def test_gradient_with_respect_to_samples(model, waveforms, x64):
    """Against central differences, in float64."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params)
    logits = ast_jax.wave_to_logits(params, model.config, model.frontend)
    sound = jnp.asarray(waveforms[0, :6000], jnp.float64)
    value = jax.jit(lambda sound: logits(sound)[7])
    gradient = jax.jit(jax.grad(lambda sound: logits(sound)[7]))(sound)
    assert gradient.shape == sound.shape
    direction = np.random.default_rng(0).standard_normal(sound.shape)
    step = 1e-9  # far below the samples, as the logarithm of a small power is far from straight
    numeric = (value(sound + step * direction) - value(sound - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient @ direction, numeric, rtol=1e-5)  # the second derivative times the step


def test_dither_is_switched_off(model, waveforms):
    dithered = ast_jax.wave_to_logits(model.params, model.config, model.frontend.replace(dither=0.1))
    np.testing.assert_allclose(dithered(waveforms[0]), by_the_extractor(model, waveforms[:1])[0], atol=2e-4)


def test_samples_beyond_the_valid_ones_have_no_effect(model, waveforms):
    """Even if the sound is shorter than a frame."""
    logits = ast_jax.wave_to_logits(*model)
    for count in (200, 9000):
        zeros = waveforms[0].copy()
        zeros[count:] = 0
        np.testing.assert_allclose(logits(waveforms[0], count), logits(zeros, count), atol=1e-6)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (
            np.zeros((1, 2, 3), np.float32),
            r"expected floating-point samples \[S\] or \[B, S\], got float32 \(1, 2, 3\)",
        ),
        (np.zeros(500, np.int16), "expected floating-point samples"),
        (np.zeros(0, np.float32), "expected 1 to 41200 samples .* got 0"),
        (np.zeros(41_201, np.float32), r"expected 1 to 41200 samples \(2.575 s\), got 41201; split longer sounds"),
    ],
)
def test_invalid_samples(model, waveform, message):
    with pytest.raises(ValueError, match=message):
        ast_jax.wave_to_logits(*model)(waveform)


def test_a_model_without_a_classifier(model):
    body = {name: part for name, part in model.params.items() if name != "classifier"}
    with pytest.raises(ValueError, match="params: expected a classifier"):
        ast_jax.wave_to_logits(body, model.config, model.frontend)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_exported_programs_take_any_batch_size(model, waveforms, exported, batch):
    program = ast_jax.load_program(exported)
    assert program.exported.platforms == ("cpu", "cuda", "tpu")
    assert program.num_samples == model.frontend.max_samples
    sounds = np.tile(waveforms, (3, 1))[:batch]
    want = by_the_extractor(model, sounds)
    got = program(sounds)
    assert got.shape == (batch, 8)
    order = [model.config.labels.index(label) for label in program.labels]
    np.testing.assert_allclose(got, want[:, order], atol=2e-4)
    np.testing.assert_allclose(
        program(sounds[:, :9000]), by_the_extractor(model, sounds[:, :9000])[:, order], atol=2e-4
    )


def test_logits_are_keyed_by_label(model, waveforms, tmp_path):
    """So the order of the classes does not matter."""
    names = ("zebra", "yak", "x ray", "Wolf", "vole", "ünder", "tiger", "1")
    renamed = model.replace(config=model.config.replace(id2label=names))
    ast_jax.export(renamed, tmp_path / "renamed.stablehlo", platforms=["cpu"])
    program = ast_jax.load_program(tmp_path / "renamed.stablehlo")
    got = dict(zip(program.labels, np.asarray(program(waveforms))[0], strict=True))
    want = dict(zip(names, by_the_extractor(model, waveforms)[0], strict=True))
    assert got == pytest.approx(want, abs=2e-4)


def test_programs_need_jax_only(exported):
    """And flatbuffers: the example of the documentation, in a process that imports neither ast_jax nor Flax."""
    code = (
        "import sys, jax, numpy as np\n"
        "from jax import export\n"
        f"program = export.deserialize(bytearray(open({str(exported)!r}, 'rb').read()))\n"
        "logits = program.call(np.zeros((2, 41200), np.float32), np.array([41200, 9000], np.int32))\n"
        "print(logits['Silence'].shape, float(logits['Silence'][0]) > float(logits['Speech'][0]))\n"
        "assert not {'flax', 'ast_jax', 'orbax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(2,) True\n", done.stderr


def test_programs_as_teachers(model, waveforms, exported):
    student = model.config.replace(id2label=("Speech", "Music"), num_labels=2)
    teacher = distill.load_teacher(exported, student, model.frontend, batch_size=3)
    batch = {"waveform": waveforms, "num_samples": np.full(3, waveforms.shape[1], np.int32)}
    want = by_the_extractor(model, waveforms)[:, [model.config.labels.index(name) for name in ("Speech", "Music")]]
    np.testing.assert_allclose(teacher.logits(teacher.params, batch), want, atol=2e-4)


def test_invalid_exports(model, tmp_path):
    with pytest.raises(ValueError, match="platforms: expected some of cpu, cuda, rocm, tpu, got metal"):
        ast_jax.export(model, tmp_path / "a", platforms=["cpu", "metal"])
    twice = model.replace(config=model.config.replace(id2label=("a", "a", *"bcdefg")))
    with pytest.raises(ValueError, match="labels: expected unique names"):
        ast_jax.export(twice, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_invalid_program_files(tmp_path):
    (tmp_path / "text.stablehlo").write_text("no program")
    with pytest.raises(ValueError, match=r"text\.stablehlo: not a program that jax\.export of this version can read"):
        ast_jax.load_program(tmp_path / "text.stablehlo")
    one = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((2,), np.float32))
    (tmp_path / "one.stablehlo").write_bytes(one.serialize())
    with pytest.raises(ValueError, match=r"one\.stablehlo: expected a function of \(waveform, num_samples\)"):
        ast_jax.load_program(tmp_path / "one.stablehlo")
    with pytest.raises(FileNotFoundError):
        ast_jax.load_program(tmp_path / "none.stablehlo")


def test_invalid_shapes_of_a_program(exported):
    program = ast_jax.load_program(exported)
    with pytest.raises(ValueError, match=r"waveforms: expected \[B, 1 to 41200\], got \(41200,\)"):
        program(np.zeros(41200, np.float32))
