"""Whole splits, ensembles of models of different strides, averages of weights; and the commands for them."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile
import typer.testing

import ast_jax
from ast_jax.checkpoints.folder import Checkpoint, save
from ast_jax.cli import main
from ast_jax.config import FrontendConfig
from ast_jax.data import datasets
from ast_jax.training import evaluate, metrics, run_folder
from ast_jax.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
LABELS = ("a", "b", "c")


def checkpoint(seed, labels=LABELS, problem_type="multi_label_classification", **changes):
    config = ast_jax.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=48,
        num_mel_bins=32, frequency_stride=16, time_stride=16, num_labels=len(labels), id2label=labels,
        problem_type=problem_type, initializer_range=1.0,
    ).replace(**changes)  # fmt: skip
    frontend = FrontendConfig(max_length=config.max_length, num_mel_bins=32)
    return Checkpoint(ast_jax.init(jax.random.key(seed), config), config, frontend)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models with common labels that differ in strides, length and label order; one has a further label."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "one", checkpoint(0))
    save(folder / "two", checkpoint(1, time_stride=8, max_length=64))
    save(folder / "three", checkpoint(2, ("z", "c", "b", "a")))
    return [str(folder / name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty-one files, one of them not audio; with batches of eight the last one is partial."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = ["path,label,split"]
    for index in range(21):
        sound = 0.1 * rng.standard_normal(rng.integers(2000, 9000))
        soundfile.write(folder / f"{index}.wav", np.cumsum(sound) / 10 if index % 2 else sound, 16000)
        lines.append(f"{index}.wav,{';'.join(np.array(LABELS)[rng.random(3) < 0.5])},{'test' if index else 'train'}")
    (folder / "13.wav").write_text("no sound")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder


def logits_one_by_one(model, examples):
    """Return the logits from features on the host, one clip at a time."""
    params, config, frontend = model
    extract = ast_jax.ASTFeatureExtractor(frontend)
    apply = jax.jit(ast_jax.apply, static_argnames="config")
    sounds = [datasets.load_example(example, frontend) for example in examples]
    return np.concatenate([apply(params, extract(sound, sampling_rate=16000), config=config) for sound in sounds])


@pytest.mark.parametrize("batch_size", [8, 16])
def test_eight_devices_give_the_logits_of_single_clips(models, data, batch_size):
    model = ast_jax.load(models[0])
    examples = datasets.read_dataset(data).splits["test"]
    found = evaluate.predict(model, examples, batch_size)
    assert found.usable.tolist() == [index != 12 for index in range(20)]
    readable = [example for example in examples if example.path.name != "13.wav"]
    logits, labels = found.measured()
    np.testing.assert_allclose(logits, logits_one_by_one(model, readable), atol=2e-4)  # features on device and host
    for row, example in zip(labels, readable, strict=True):
        assert tuple(np.flatnonzero(row)) == example.targets
    again = evaluate.predict(model, examples, batch_size, num_workers=1)
    np.testing.assert_array_equal(again.logits, found.logits)


def test_no_readable_file_is_an_error(models, data):
    bad = [example for example in datasets.read_dataset(data).splits["test"] if example.path.name == "13.wav"]
    with pytest.raises(datasets.DataError, match="none of the 1 sounds to evaluate on can be read"):
        evaluate.predict(ast_jax.load(models[0]), bad, 8).measured()


def test_an_ensemble_is_the_mean_of_the_scores(models, data):
    measured = evaluate.evaluate(models, data, batch_size=8, threshold=0.4)
    assert (measured.split, measured.examples, measured.skipped) == ("test", 19, 1)
    assert list(measured.reports) == [*models, "ensemble"]
    assert measured.notes == (f"{models[2]}: the data have 3 of its 4 labels",)
    examples = [one for one in datasets.read_dataset(data).splits["test"] if one.path.name != "13.wav"]
    truth = np.array([[label in one.targets for label in range(3)] for one in examples])
    scores = []
    for name in models:
        model = ast_jax.load(name)
        columns = [model.config.labels.index(label) for label in LABELS]
        scores.append(1 / (1 + np.exp(-logits_one_by_one(model, examples)[:, columns])))
    for name, score in zip([*models, "ensemble"], [*scores, np.mean(scores, axis=0)], strict=True):
        found = measured.reports[name]
        np.testing.assert_allclose(found["metrics"]["mAP"], metrics.average_precisions(score, truth).mean(), atol=1e-6)
        for column, one in enumerate(found["classes"]):
            hits = ((score[:, column] >= 0.4) & truth[:, column]).sum()
            assert one["recall"] == pytest.approx(hits / truth[:, column].sum())


def test_a_run_is_evaluated_on_its_own_validation_split(models, tmp_path):
    """The split follows the run's seed or fold; runs with different splits have none in common."""
    rng = np.random.default_rng(0)
    lines = ["path,label,fold"]
    for index in range(40):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * rng.standard_normal(3000), 16000)
        lines.append(f"{index}.wav,{LABELS[index % 3]},{index % 4}")
    (tmp_path / "folds.csv").write_text("\n".join(lines))
    (tmp_path / "plain.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    for name, source, seed, fold in (("a", "plain", 3, None), ("b", "plain", 4, None), ("c", "folds", 0, "1")):
        one = checkpoint(0)
        where = datasets.DatasetConfig(tmp_path / f"{source}.csv", fold=fold)
        run = run_folder.RunConfig(where, one.config, one.frontend, TrainConfig(seed=seed), {})
        (tmp_path / name).mkdir()
        (tmp_path / name / run_folder.RUN_FILE).write_text(run.to_json())
        save(tmp_path / name / "best", one)
    for names, source, fold in (("a", "plain", None), ("c", "folds", "1")):
        found = evaluate.evaluate([tmp_path / name for name in names], tmp_path / f"{source}.csv", batch_size=8)
        want = datasets.read_dataset(
            datasets.DatasetConfig(tmp_path / f"{source}.csv", fold=fold), 3 if source == "plain" else 0
        )
        assert (found.split, found.examples) == ("validation", len(want.splits["validation"]))
        logits, labels = evaluate.predict(checkpoint(0), want.splits["validation"], 8).measured()
        assert found.reports[str(tmp_path / names)]["metrics"] == metrics.evaluate_logits(
            logits, labels, checkpoint(0).config
        )
    with pytest.raises(datasets.DataError, match="the runs held out different sounds"):
        evaluate.evaluate([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "plain.csv")
    single = checkpoint(1, problem_type="single_label_classification")
    save(tmp_path / "single", single)
    with pytest.raises(ValueError, match="expected models of one problem type"):
        evaluate.evaluate([models[0], str(tmp_path / "single")], tmp_path / "plain.csv", batch_size=8)


def test_scores_of_ensemble_logits_are_the_mean_scores():
    mean = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    for kind in ("multi_label_classification", "single_label_classification"):
        config = ast_jax.ASTConfig(num_labels=4, problem_type=kind)
        np.testing.assert_allclose(metrics.scores(evaluate._as_logits(mean, config), config), mean, atol=1e-12)
        extreme = np.array([[0.0, 1.0, 0.0, 0.0]])
        np.testing.assert_allclose(metrics.scores(evaluate._as_logits(extreme, config), config), extreme, atol=1e-12)


def test_an_average_is_the_mean_of_the_params():
    ones = [checkpoint(seed) for seed in range(3)]
    mean = evaluate.average(ones)
    kernels = [one.params["layers"]["mlp"]["fc1"]["kernel"] for one in ones]
    np.testing.assert_allclose(mean.params["layers"]["mlp"]["fc1"]["kernel"], np.mean(kernels, axis=0), atol=1e-7)
    assert mean.params["layernorm"]["scale"].dtype == np.float32
    assert len(mean.metadata["averaged"]) == 3
    with pytest.raises(ValueError, match="expected one checkpoint or more"):
        evaluate.average([])
    with pytest.raises(ValueError, match="checkpoint 2 has another config than the first"):
        evaluate.average([ones[0], checkpoint(0, time_stride=8)])


def invoke(*arguments):
    return typer.testing.CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def test_evaluate_on_the_command_line(models, data, tmp_path):
    done = invoke("evaluate", *models[:2], data, "--json", "--batch-size", 8, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["examples"] == 19
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert (tmp_path / "out" / "classes.png").is_file()
    done = invoke("evaluate", *models[:2], data, "--batch-size", 8)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "19 sounds of the split test, 1 more could not be read"
    mean = found["reports"]["ensemble"]["metrics"]["mAP"]
    assert any(f"mAP {mean:.4f}" in line for line in lines[lines.index("ensemble:") :])
    alone = found["reports"][models[0]]["metrics"]["mAP"]
    assert f"mAP {alone:.4f}" in lines[lines.index(f"{models[0]}:") + 1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["one"], 2, "evaluate: expected a model and a data set, got one of them"),
        (["one", "data", "--split", "validation"], 1, "the split validation has no sounds; choose another"),
        (["one", "data", "--split", "dev"], 1, "split: expected train, validation, test or all, got 'dev'"),
        (["one", "data", "--batch-size", "5"], 1, "5 does not divide over 8 devices; the nearest are 8"),
        (["other", "data"], 1, "the model does not know 3 of the data's 3 labels, the first is 'a'"),
        (["headless", "data"], 1, "has no classifier; fine-tune it first"),
    ],
)  # fmt: skip
def test_errors_of_evaluate_are_one_line(arguments, status, message, models, data, tmp_path):
    save(tmp_path / "other", checkpoint(0, ("x", "y")))
    headless = checkpoint(0)
    body = {name: part for name, part in headless.params.items() if name != "classifier"}
    save(tmp_path / "headless", headless.replace(params=body))
    places = {"one": models[0], "data": str(data), **{name: str(tmp_path / name) for name in ("other", "headless")}}
    done = invoke("evaluate", *(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == status
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_average_on_the_command_line(tmp_path):
    """Averages the best epochs of runs, or the epochs kept by --keep-epochs."""
    for number in (1, 2):
        run = tmp_path / f"run{number}"
        run.mkdir()
        (run / run_folder.RUN_FILE).touch()
        save(run / "best", checkpoint(number))
        for epoch in (3, 4):
            save(run / "epochs" / f"{epoch:04d}", checkpoint(10 * number + epoch))
    for options, seeds in (([], (1, 2)), (["--epochs", "3-4"], (13, 14, 23, 24)), (["--epochs", "4"], (14, 24))):
        done = invoke("average", tmp_path / "run1", tmp_path / "run2", "--output", tmp_path / "mean", *options)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"checkpoint: {tmp_path / 'mean'}, the mean of {len(seeds)}\n"
        want = np.mean([checkpoint(seed).params["classifier"]["dense"]["kernel"] for seed in seeds], axis=0)
        np.testing.assert_allclose(
            ast_jax.load(tmp_path / "mean").params["classifier"]["dense"]["kernel"], want, atol=1e-6
        )
    for epochs, message in (
        ("4-3", "epochs: expected FIRST-LAST, as 6-25, got '4-3'"),
        ("3-5", "1 of 3 epochs are not there, the first is "),
        ("3", "expected several models to average, got one; --epochs FIRST-LAST selects epochs of a run"),
    ):
        done = invoke("average", tmp_path / "run1", "--output", tmp_path / "no", "--epochs", epochs)
        assert done.exit_code == 1
        assert message in done.stderr
    done = invoke("average", tmp_path / "run3", "--output", tmp_path / "no", "--epochs", "3-4")
    assert (done.exit_code, "run3: expected a run folder" in done.stderr) == (1, True)
    assert not (tmp_path / "no").exists()


def test_a_run_folder_stands_for_its_best_checkpoint(models, data, tmp_path):
    shutil.copytree(models[0], tmp_path / "run" / "best")
    again = [str(tmp_path / "run" / "best"), str(tmp_path / "run" / "." / "best")]
    notes = [evaluate.evaluate(found, data, batch_size=8).notes for found in (again, models[:2])]
    assert [any("more than once" in note for note in found) for found in notes] == [True, False]
