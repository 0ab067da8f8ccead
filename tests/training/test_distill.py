"""Distillation: softened targets, teachers of both kinds on 8 devices, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from jax import export

import ast_jax
from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.config import FrontendConfig
from ast_jax.data import datasets
from ast_jax.model import losses
from ast_jax.training import distill, evaluate, finetune
from ast_jax.training.config import TrainConfig
from ast_jax.training.parallel import DataParallel

LABELS = ("a", "b", "c")
STUDENT = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_length=32, num_mel_bins=32,
    frequency_stride=16, time_stride=16, num_labels=3, id2label=LABELS, problem_type="multi_label_classification",
)  # fmt: skip
FRONTEND = FrontendConfig(max_length=32, num_mel_bins=32)
SINGLE = STUDENT.replace(problem_type="single_label_classification")


def write_program(path, labels=LABELS, slope=1.0):
    """Export a program whose logit of label i is (i + 1) * slope * the sum of squares of the waveform."""

    def program(waveform, num_samples):
        inside = jnp.arange(waveform.shape[1])[None] < num_samples[:, None]
        energy = jnp.where(inside, jnp.square(waveform), 0.0).sum(1)
        return {label: (index + 1) * slope * energy for index, label in enumerate(labels)}

    b = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((*b, FRONTEND.max_samples), jnp.float32),
        jax.ShapeDtypeStruct(b, jnp.int32),
    )
    path.write_bytes(export.export(jax.jit(program))(*shapes).serialize())
    return path


def some_batch(size=16):
    rng = np.random.default_rng(0)
    return {
        "waveform": (0.1 * rng.standard_normal((size, FRONTEND.max_samples))).astype(np.float32),
        "num_samples": rng.integers(400, FRONTEND.max_samples, size).astype(np.int32),
    }


@pytest.mark.parametrize(
    ("config", "scores_of"), [(STUDENT, jax.nn.sigmoid), (SINGLE, jax.nn.softmax)], ids=["sigmoid", "softmax"]
)
def test_softened_targets_are_the_weighted_mean_of_two_losses(config, scores_of, x64):
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(0, 3, (2, 5, 3))
    labels = np.eye(3)[rng.integers(0, 3, 5)]
    got = losses.loss(logits, distill.soften(labels, teacher, 0.3, config), config)
    want = 0.7 * losses.loss(logits, labels, config) + 0.3 * losses.loss(logits, scores_of(teacher), config)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    extreme = distill.soften(labels, np.array([[1e4, -1e4, 0.0]] * 5), 1.0, config)
    assert np.isfinite(extreme).all()


def test_a_program_teaches_on_every_device(tmp_path):
    teacher = distill.load_teacher(write_program(tmp_path / "t.stablehlo"), STUDENT, FRONTEND)
    parallel = DataParallel()
    batch = some_batch()
    got = parallel.compile_eval_step(teacher.logits)(parallel.replicate(teacher.params), batch)
    energy = [np.square(wave[:count]).sum() for wave, count in zip(*batch.values(), strict=True)]
    np.testing.assert_allclose(got, np.outer(energy, [1, 2, 3]), rtol=1e-4)  # sums of 5,360 squares in float32


@pytest.mark.parametrize("max_length", [16, pytest.param(48, marks=pytest.mark.slow)])
def test_a_model_of_another_length_and_with_more_labels_teaches(max_length, tmp_path):
    names = ("c", "x", "a", "b")
    config = STUDENT.replace(max_length=max_length, num_labels=4, id2label=names)
    frontend = FRONTEND.replace(max_length=max_length)
    params = ast_jax.init(jax.random.key(3), config)
    save(tmp_path / "t", Checkpoint(params, config, frontend))
    teacher = distill.load_teacher(tmp_path / "t", STUDENT, FRONTEND)
    batch = some_batch(3)
    got = jax.jit(teacher.logits)(teacher.params, batch)
    extractor = ast_jax.ASTFeatureExtractor(frontend)
    sounds = [wave[:count][: frontend.max_samples] for wave, count in zip(*batch.values(), strict=True)]
    spec = extractor(sounds, sampling_rate=16000)
    want = np.asarray(ast_jax.apply(params, spec, config))[:, [2, 3, 0]]
    np.testing.assert_allclose(got, want, atol=1e-4)  # float32 features on the device and on the host


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three classes of 12 short sounds, a folder each."""
    root = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for label in LABELS:
        (root / label).mkdir()
        for index in range(12):
            soundfile.write(root / label / f"{index}.wav", 0.1 * rng.standard_normal(4000), 16000)
    return root


@pytest.mark.slow
def test_a_student_learns_the_teacher_and_resumes(sounds, tmp_path):
    """Labels are random: the student can learn to predict "c" for everything from the teacher only."""
    program = write_program(tmp_path / "t.stablehlo", ("b", "a", "c"), slope=1.0)
    settings = TrainConfig(batch_size=16, epochs=4, learning_rate=3e-3, teacher_weight=1.0)
    stopped = []

    def stop(line):
        if line.startswith("epoch 2"):
            raise KeyboardInterrupt
        stopped.append(line)

    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(sounds, tmp_path / "run", training=settings, architecture=STUDENT, teacher=program, log=stop)
    best = ast_jax.load(finetune.resume(tmp_path / "run", log=lambda _: None).best)
    whole = ast_jax.load(
        finetune.finetune(
            sounds, tmp_path / "whole", training=settings, architecture=STUDENT, teacher=program, log=lambda _: None
        ).best
    )
    jax.tree.map(np.testing.assert_array_equal, best.params, whole.params)
    assert best.metadata["teacher"] == "t.stablehlo"
    last = evaluate.predict(best, datasets.read_dataset(sounds).splits["train"][:16], 16).logits
    assert (last.argmax(1) == 2).all()
    program.unlink()
    with pytest.raises(FileNotFoundError):
        finetune.resume(tmp_path / "run", log=lambda _: None)


def test_teachers_that_do_not_fit_are_refused(sounds, tmp_path):
    (tmp_path / "bad.stablehlo").write_bytes(b"not a program")
    with pytest.raises(ValueError, match=r"bad\.stablehlo: not a program"):
        distill.load_teacher(tmp_path / "bad.stablehlo", STUDENT, FRONTEND)
    with pytest.raises(ValueError, match="lacks b, c"):
        distill.load_teacher(write_program(tmp_path / "few.stablehlo", ("a",)), STUDENT, FRONTEND)
    one = jax.ShapeDtypeStruct((2, 100), jnp.float32)
    (tmp_path / "one.stablehlo").write_bytes(export.export(jax.jit(jnp.sin))(one).serialize())
    with pytest.raises(ValueError, match="1 inputs and a"):
        distill.load_teacher(tmp_path / "one.stablehlo", STUDENT, FRONTEND)
    config = dataclasses.replace(FRONTEND, sampling_rate=8000)
    save(tmp_path / "slow", Checkpoint(ast_jax.init(jax.random.key(0), STUDENT), STUDENT, config))
    with pytest.raises(ValueError, match="16000 Hz, got one for 8000"):
        distill.load_teacher(tmp_path / "slow", STUDENT, FRONTEND)
    with pytest.raises(ValueError, match="lacks b, c"):
        finetune.finetune(
            sounds, tmp_path / "no", training=TrainConfig(batch_size=16), architecture=STUDENT,
            teacher=tmp_path / "few.stablehlo", log=lambda _: None,
        )  # fmt: skip
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda wave, count: {label: wave.mean() for label in LABELS}, r"expected floating-point logits \[2\] for a"),
        (lambda wave, count: {label: count for label in LABELS}, r"expected floating-point logits \[2\] for a"),
        (lambda wave, count: {"a": {"b": wave.mean(1)}, "c": wave.mean(1)}, "expected a function of|lacks b"),
    ],
    ids=["one for the batch", "whole numbers", "nested"],
)
def test_programs_with_other_outputs_are_refused(tmp_path, program, message):
    shapes = (jax.ShapeDtypeStruct((2, FRONTEND.max_samples), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32))
    (tmp_path / "t.stablehlo").write_bytes(export.export(jax.jit(program))(*shapes).serialize())
    with pytest.raises(ValueError, match=message):
        distill.load_teacher(tmp_path / "t.stablehlo", STUDENT, FRONTEND, 2)


def test_programs_for_other_inputs_and_machines_are_refused(tmp_path):
    path = write_program(tmp_path / "t.stablehlo")
    with pytest.raises(ValueError, match=r"t\.stablehlo: does not take waveform \[2, 10320\]"):
        distill.load_teacher(path, STUDENT, FRONTEND.replace(max_length=63), 2)
    shapes = (jax.ShapeDtypeStruct((2, FRONTEND.max_samples), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32))
    program = jax.jit(lambda wave, count: {label: wave.mean(1) for label in LABELS})
    path.write_bytes(export.export(program, platforms=["tpu"])(*shapes).serialize())
    with pytest.raises(ValueError, match="exported for tpu, but this machine runs on cpu; export it again"):
        distill.load_teacher(path, STUDENT, FRONTEND, 2)
