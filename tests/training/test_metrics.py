"""Metrics against their definitions as plain loops and against scikit-learn called another way, and their report."""

import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import sklearn.metrics
from rich.cells import cell_len

from ast_jax.config import ASTConfig
from ast_jax.training import metrics

MULTI, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
# The same sums in another order: a few units in the last place of numbers around one.
SAME = {"rtol": 0, "atol": 1e-12}


def config(kind, classes, **changes):
    return ASTConfig(num_labels=classes, problem_type=kind, **changes)


def multi_label(rng, examples=60, classes=7, levels=None):
    """Return logits, rounded to a few levels for ties, and labels with positives and negatives of every class."""
    logits = rng.normal(size=(examples, classes))
    if levels:
        logits = np.round(logits * levels) / levels
    labels = rng.random((examples, classes)) < 0.3
    labels[0], labels[1] = True, False
    return logits, labels


def single_label(rng, examples=60, classes=5):
    truth = np.concatenate([np.arange(classes), rng.integers(classes, size=examples - classes)])
    labels = np.eye(classes)[truth]
    return rng.normal(size=labels.shape) + labels, labels


def average_precision(truth, scores):
    """Return the mean of the precision at each score, weighted by the increase in recall."""
    found, area = 0, 0.0
    for score in sorted(set(scores), reverse=True):
        chosen = [positive for positive, other in zip(truth, scores, strict=True) if other >= score]
        area += (sum(chosen) - found) / sum(truth) * sum(chosen) / len(chosen)
        found = sum(chosen)
    return area


def auc(truth, scores):
    """Return the probability that a positive ranks above a negative; a tie counts as half."""
    pairs = [
        1.0 if above > below else 0.5 if above == below else 0.0
        for positive, above in zip(truth, scores, strict=True)
        if positive
        for negative, below in zip(truth, scores, strict=True)
        if not negative
    ]
    return sum(pairs) / len(pairs)


def precision_recall_f1(truth, predicted):
    """Return the three rates from counts, None for 0 / 0."""
    hits = said = true = 0
    for one, other in zip(truth, predicted, strict=True):
        hits, said, true = hits + bool(one and other), said + bool(other), true + bool(one)
    return [a / b if b else None for a, b in ((hits, said), (hits, true), (2 * hits, said + true))]


def three(entry):
    return [entry["precision"], entry["recall"], entry["f1"]]


@pytest.mark.parametrize("levels", [None, 2])
def test_curves_are_those_of_their_definitions(levels):
    logits, labels = multi_label(np.random.default_rng(0), levels=levels)
    columns = list(zip(labels.T.tolist(), logits.T.tolist(), strict=True))
    np.testing.assert_allclose(
        metrics.average_precisions(logits, labels), [average_precision(*column) for column in columns], **SAME
    )
    np.testing.assert_allclose(metrics.aucs(logits, labels), [auc(*column) for column in columns], **SAME)


def test_scores_that_are_all_equal_are_chance():
    labels = np.array([[1], [0], [0], [0]])
    assert metrics.average_precisions(np.zeros((4, 1)), labels) == [0.25]
    assert metrics.aucs(np.zeros((4, 1)), labels) == [0.5]


def test_only_the_order_of_the_logits_counts():
    logits, labels = multi_label(np.random.default_rng(1))
    order = np.random.default_rng(2).permutation(len(logits))
    for function in (metrics.average_precisions, metrics.aucs):
        expected = function(logits, labels)
        np.testing.assert_allclose(function(np.exp(3 * logits), labels), expected, **SAME)
        np.testing.assert_allclose(function(logits[order], labels[order]), expected, **SAME)


def test_classes_with_one_kind_of_example_have_no_curve_and_do_not_count_in_means():
    logits, labels = multi_label(np.random.default_rng(3))
    expected = metrics.evaluate_logits(logits, labels, config(MULTI, 7))
    wider = np.concatenate([labels, np.zeros((60, 1), bool), np.ones((60, 1), bool)], axis=1)
    spread = np.concatenate([logits, logits[:, :2]], axis=1)
    for function in (metrics.average_precisions, metrics.aucs):
        assert np.isnan(function(spread, wider)).tolist() == [False] * 7 + [True] * 2
    assert metrics.evaluate_logits(spread, wider, config(MULTI, 9)) == expected


def test_multi_label_means_are_those_of_scikit_learn():
    logits, labels = multi_label(np.random.default_rng(4), examples=500, classes=20)
    found = metrics.evaluate_logits(logits, labels, config(MULTI, 20))
    assert list(found) == ["mAP", "mAUC", "d_prime"]  # no accuracy: the first example has several labels
    scores = metrics.scores(logits, config(MULTI, 20))
    np.testing.assert_allclose(found["mAP"], sklearn.metrics.average_precision_score(labels, scores), **SAME)
    np.testing.assert_allclose(found["mAUC"], sklearn.metrics.roc_auc_score(labels, scores), **SAME)
    assert found["d_prime"] == metrics.d_prime(found["mAUC"])


def test_single_label_metrics_rank_by_the_softmax():
    logits, labels = single_label(np.random.default_rng(5), examples=300, classes=6)
    logits += np.random.default_rng(6).normal(scale=20, size=(300, 1))  # which the softmax does not see
    found = metrics.evaluate_logits(logits, labels, config(SINGLE, 6))
    assert list(found) == ["accuracy", "mAP", "mAUC", "d_prime"]
    truth, scores = labels.argmax(-1), metrics.scores(logits, config(SINGLE, 6))
    right = sum(int(max(range(6), key=row.__getitem__) == true) for row, true in zip(logits, truth, strict=True))
    np.testing.assert_allclose(found["accuracy"], right / 300, **SAME)
    expected = sklearn.metrics.roc_auc_score(truth, scores, multi_class="ovr")
    np.testing.assert_allclose(found["mAUC"], expected, **SAME)
    expected = sklearn.metrics.average_precision_score(truth, scores, average="macro")
    np.testing.assert_allclose(found["mAP"], expected, **SAME)


def test_multi_label_data_with_one_label_an_example_have_an_accuracy():
    """The original trains Speech Commands with binary cross-entropy and chooses by accuracy."""
    logits, labels = single_label(np.random.default_rng(7))
    found = metrics.evaluate_logits(logits, labels, config(MULTI, 5))
    assert list(found) == ["accuracy", "mAP", "mAUC", "d_prime"]
    assert found["accuracy"] == metrics.evaluate_logits(logits, labels, config(SINGLE, 5))["accuracy"]
    assert found["mAP"] == metrics.average_precisions(logits, labels).mean()  # by the logits, not by the softmax
    labels[0] = 0
    assert "accuracy" not in metrics.evaluate_logits(logits, labels, config(MULTI, 5))


def test_logits_so_large_that_their_sigmoids_are_equal_are_ranked():
    logits, labels = np.array([[50.0], [52.0], [51.0], [53.0]]), np.array([[0], [1], [0], [1]])
    assert metrics.scores(logits, config(MULTI, 1)).tolist() == [[1.0]] * 4
    assert metrics.evaluate_logits(logits, labels, config(MULTI, 1))["mAUC"] == 1.0


def test_regression_is_the_mean_squared_error():
    logits, labels = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])
    assert metrics.evaluate_logits(logits, labels, config(REGRESSION, 2)) == {"negative_mse": -13 / 4}
    found = metrics.report(logits, labels, config(REGRESSION, 2, id2label=("left", "right")))
    assert [entry["mean_squared_error"] for entry in found["classes"]] == [4.5, 2.0]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "regression" in metrics.report_lines(found)[0]
    assert metrics.report_lines(found)[-1].split() == ["right", "2"]


def test_one_example():
    logits, labels = np.array([[0.0, 2.0, 1.0]]), np.array([[0, 1, 0]])
    found = metrics.evaluate_logits(logits, labels, config(SINGLE, 3))
    assert found.pop("accuracy") == 1.0
    assert len(found) == 3
    assert all(math.isnan(value) for value in found.values())
    report = metrics.report(logits, labels, config(SINGLE, 3))
    assert report["metrics"] == {"accuracy": 1.0, "mAP": None, "mAUC": None, "d_prime": None}
    assert report["confusion"] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert three(report["macro"]) == [1.0, 1.0, 1.0]


def test_one_class():
    """A detector of one thing; scikit-learn takes a single column for something else."""
    logits, labels = np.array([[3.0], [-1.0], [2.0], [1.0]]), np.array([[1], [0], [0], [1]])
    report = metrics.report(logits, labels, config(MULTI, 1))
    expected = [2 / 3, 1.0, 0.8]
    for entry in (report["micro"], report["macro"], report["classes"][0]):
        np.testing.assert_allclose(three(entry), expected, **SAME)
    assert report["classes"][0]["auc"] == 0.75


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", [MULTI, SINGLE, REGRESSION])
def test_narrow_logits_count_as_the_numbers_they_stand_for(dtype, kind):
    logits, labels = single_label(np.random.default_rng(8))
    narrow = logits.astype(dtype)
    found = metrics.evaluate_logits(narrow, labels.astype(dtype), config(kind, 5))
    assert found == metrics.evaluate_logits(narrow.astype(np.float64), labels, config(kind, 5))


def test_scores_are_the_functions_of_the_problem_types():
    logits = np.array([[0.5, -1.25, 3.0], [2.0, 2.0, -4.0]], np.float32)
    sigmoids = [[1 / (1 + math.exp(-value)) for value in row] for row in logits.tolist()]
    softmaxes = [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in logits.tolist()]
    np.testing.assert_allclose(metrics.scores(logits, config(MULTI, 3)), sigmoids, **SAME)
    np.testing.assert_allclose(metrics.scores(logits, config(SINGLE, 3)), softmaxes, **SAME)
    assert metrics.scores(logits, config(REGRESSION, 3)).tolist() == logits.tolist()
    assert metrics.scores(logits, config(MULTI, 3)).dtype == np.float64


def test_scores_of_large_logits_neither_overflow_nor_vanish():
    large = np.array([[1000.0, -1000.0, 999.0]])
    assert metrics.scores(large, config(MULTI, 3)).tolist() == [[1.0, 0.0, 1.0]]
    np.testing.assert_allclose(
        metrics.scores(large, config(SINGLE, 3)), [[math.e / (1 + math.e), 0.0, 1 / (1 + math.e)]], **SAME
    )
    assert metrics.scores(np.array([[-700.0]]), config(MULTI, 1)) > 0


# Mean AUC and d' as the original's logs print them, for its single models and ensembles.
@pytest.mark.parametrize(
    ("area", "expected"),
    [
        (".97856", "2.8637"), (".974766", "2.766179"), (".974311", "2.755320"), (".973878", "2.745149"),
        (".973316", "2.732173"), (".972762", "2.719576"), (".973247", "2.730574"), (".979441", "2.888303"),
        (".980985", "2.933840"), (".96101", "2.49260"),
    ],
)  # fmt: skip
def test_d_prime_of_the_published_models(area, expected):
    """An AUC that rounds to the printed one has a d' that rounds to the printed one."""
    half_area, half = (0.5 * 10.0 ** -len(text.partition(".")[2]) for text in (area, expected))
    low, high = metrics.d_prime(float(area) - half_area), metrics.d_prime(float(area) + half_area)
    assert low - half <= float(expected) <= high + half
    assert high - low < 1e-3  # the interval says something


def test_d_prime_at_the_ends_and_outside():
    assert metrics.d_prime(0.5) == 0.0
    assert (metrics.d_prime(1.0), metrics.d_prime(0.0)) == (math.inf, -math.inf)
    assert math.isnan(metrics.d_prime(math.nan))
    # The distance of two unit normals by its definition: the area is the normal CDF of d' over the root of two.
    np.testing.assert_allclose(0.5 * (1 + math.erf(metrics.d_prime(0.9) / 2)), 0.9, **SAME)
    with pytest.raises(ValueError, match=r"auc: expected an AUC from 0 to 1, got 1\.5"):
        metrics.d_prime(1.5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_the_report_of_a_multi_label_model(threshold):
    logits, labels = multi_label(np.random.default_rng(9), examples=200)
    labels[:, 2] = False  # no positives
    logits[:, 4] = -50.0  # never said, unless everything is
    names = tuple("abcdefg")
    found = metrics.report(logits, labels, config(MULTI, 7, id2label=names), threshold)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    predicted = [[1 / (1 + math.exp(-value)) >= threshold for value in row] for row in logits.tolist()]
    assert (found["examples"], found["threshold"], found["ranked_classes"]) == (200, threshold, 6)
    assert found["confusion"] is None
    assert found["metrics"] == metrics.evaluate_logits(logits, labels, config(MULTI, 7))

    said = np.array(predicted)
    for index, entry in enumerate(found["classes"]):
        assert (entry["name"], entry["positives"]) == (names[index], labels[:, index].sum())
        expected = precision_recall_f1(labels[:, index], said[:, index])
        np.testing.assert_allclose(*(np.array(values, float) for values in (three(entry), expected)), **SAME)
    assert found["classes"][2]["average_precision"] is None
    assert found["classes"][2]["auc"] is None
    assert found["classes"][2]["recall"] is None
    assert (found["classes"][4]["precision"] is None) == (threshold > 0)

    np.testing.assert_allclose(
        np.array(three(found["micro"]), float),
        np.array(precision_recall_f1(labels.ravel(), said.ravel()), float),
        **SAME,
    )
    with_positives = [0, 1, 3, 4, 5, 6]
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, said, labels=with_positives, average="macro", zero_division=0
    )
    np.testing.assert_allclose(three(found["macro"]), expected[:3], **SAME)


def test_the_threshold_itself_is_a_yes():
    logits, labels = np.array([[0.0], [-1e-9]]), np.array([[1], [0]])  # scores of exactly a half, and of just below
    assert three(metrics.report(logits, labels, config(MULTI, 1))["micro"]) == [1.0, 1.0, 1.0]


def test_the_report_of_a_single_label_model():
    logits, labels = single_label(np.random.default_rng(10), examples=120)
    truth, best = labels.argmax(-1), logits.argmax(-1)
    found = metrics.report(logits, labels, config(SINGLE, 5))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["threshold"] is None
    counts = [[0] * 5 for _ in range(5)]
    for row, column in zip(truth, best, strict=True):
        counts[row][column] += 1
    assert found["confusion"] == counts
    assert [entry["positives"] for entry in found["classes"]] == [sum(row) for row in counts]
    by_class = sklearn.metrics.precision_recall_fscore_support(truth, best, zero_division=np.nan)[:3]
    np.testing.assert_allclose([three(entry) for entry in found["classes"]], np.transpose(by_class), **SAME)
    macro = sklearn.metrics.precision_recall_fscore_support(truth, best, average="macro", zero_division=0)[:3]
    np.testing.assert_allclose(three(found["macro"]), macro, **SAME)
    np.testing.assert_allclose(three(found["micro"]), [found["metrics"]["accuracy"]] * 3, **SAME)
    for index, entry in enumerate(found["classes"]):
        column = metrics.scores(logits, config(SINGLE, 5))[:, index].tolist()
        expected = average_precision(labels[:, index].tolist(), column), auc(labels[:, index].tolist(), column)
        np.testing.assert_allclose((entry["average_precision"], entry["auc"]), expected, **SAME)


def test_a_perfect_model_has_no_number_for_d_prime_in_json():
    labels = np.eye(3)
    assert metrics.evaluate_logits(labels, labels, config(SINGLE, 3))["d_prime"] == math.inf
    assert metrics.report(labels, labels, config(SINGLE, 3))["metrics"]["d_prime"] is None


def test_a_report_without_any_positive():
    found = metrics.report(np.ones((4, 2)), np.zeros((4, 2)), config(MULTI, 2))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert three(found["micro"]) == [0.0, None, 0.0]
    assert three(found["macro"]) == [None, None, None]
    assert metrics.report_lines(found)[-1] == "not ranked, without positives or without negatives: 2"


def test_lines_show_both_ends_and_the_most_frequent_confusions():
    labels = np.eye(4)[[0, 0, 0, 1, 1, 2, 2, 3]]
    best = [0, 1, 1, 1, 1, 3, 2, 3]
    names = ("brass\nand reeds", "犬の声", "violin", "x" * 50)
    found = metrics.report(3 * np.eye(4)[best], labels, config(SINGLE, 4, id2label=names))
    lines = metrics.report_lines(found)
    assert (
        lines[0]
        == "8 examples, 4 classes, single-label; precision, recall and F1 for the highest-scoring class; best AP first"
    )
    assert "accuracy 0.6250" in lines[1]
    assert lines[-2:] == ["2 of brass and reeds taken for 犬の声", f"1 of violin taken for {'x' * 50}"]
    start = next(index for index, line in enumerate(lines) if "precision" in line and index)
    table = lines[start : start + 7]
    assert [line.split()[0] for line in table[1:3]] == ["micro", "macro"]
    assert len({cell_len(line) for line in (table[0], *table[3:])}) == 1  # wide characters take two places
    shown = {" ".join(line.split()[:-6]) for line in table[3:]}
    assert shown == {"brass and reeds", "犬の声", "violin", "x" * 32}

    found = metrics.report(*multi_label(np.random.default_rng(11), classes=30), config(MULTI, 30))
    ranked = sorted(found["classes"], key=lambda entry: -entry["average_precision"])
    lines = metrics.report_lines(found, limit=5)
    assert lines[0].endswith("multi-label; precision, recall and F1 for score 0.5 or more; best AP first")
    expected = [entry["name"] for entry in (*ranked[:3], *ranked[-2:])]
    assert [line.split()[0] for line in lines[-6:] if not line.startswith("...")] == expected
    assert lines[-3] == "... 25 more between"
    assert len(metrics.report_lines(found, limit=30)) == len(lines) - 6 + 30


@pytest.mark.parametrize("function", [metrics.average_precisions, metrics.aucs])
def test_refusals_of_the_curves(function):
    with pytest.raises(ValueError, match=r"labels: expected the logits' shape \(4, 3\), got \(4, 2\)"):
        function(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"logits: expected shape \(N, C\) .* got \(4,\)"):
        function(np.zeros(4), np.zeros(4))


@pytest.mark.parametrize("kind", [MULTI, SINGLE, REGRESSION])
@pytest.mark.parametrize("function", [metrics.evaluate_logits, metrics.report])
def test_refusals(function, kind):
    good, labels = np.zeros((4, 3)), np.eye(3)[[0, 1, 2, 0]]

    def refused(logits, labels, message):
        with pytest.raises(ValueError, match=message) as caught:
            function(logits, labels, config(kind, 3))
        assert "\n" not in str(caught.value)

    spoilt = good.copy()
    spoilt[1, 1:] = np.nan, np.inf
    refused(spoilt, labels, r"logits: expected finite numbers, got 2 of 12 NaN or infinite; look at the model")
    refused(good, labels * np.nan, r"labels: expected finite numbers, got 12 of 12 NaN or infinite; look at the data")
    refused(good, labels[:3], r"labels: expected the logits' shape \(4, 3\), got \(3, 3\)")
    refused(good, labels.argmax(-1), r"labels: expected shape \(N, C\) .* got \(4,\)")
    refused(good[:, :2], labels, r"logits: expected shape \(N, 3\) .* got \(4, 2\)")
    refused(good[:0], labels[:0], r"with one example or more, got \(0, 3\)")
    if kind == SINGLE:
        refused(good, labels * [1, 1, 0], "labels: expected one class an example, got 1 of 4 examples with none")


def test_refusals_of_scores_thresholds_and_limits():
    with pytest.raises(ValueError, match="got 1 of 3 NaN"):
        metrics.scores(np.array([[0.0, np.nan, 0.0]]), config(MULTI, 3))
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold: expected a score from 0 to 1"):
            metrics.report(np.zeros((1, 3)), np.zeros((1, 3)), config(MULTI, 3), threshold)
    found = metrics.report(np.eye(3), np.eye(3), config(SINGLE, 3))
    with pytest.raises(ValueError, match="limit: expected 2 classes or more, got 1"):
        metrics.report_lines(found, limit=1)


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, ast_jax.training.metrics, ast_jax.training.plots; "
        "print([name for name in ('jax', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
