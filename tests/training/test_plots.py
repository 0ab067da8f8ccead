"""Figures: their content, that texts neither overlap nor leave the figure, and that files are complete PNGs."""

import math
import struct
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from ast_jax.config import ASTConfig
from ast_jax.labels import label_set
from ast_jax.runtime import figures
from ast_jax.training import metrics, plots

MULTI = "multi_label_classification"
LONG = (
    "acoustic piano (grand and upright), felt hammers, left",
    "acoustic piano (grand and upright), felt hammers, right",
)


def history(epochs, first=1, **columns):
    """Return rows whose columns are functions of the epoch, or the same throughout."""
    columns = {"learning_rate": 1e-4, "train_loss": lambda epoch: 1 / epoch, **columns, "seconds": 9.5}
    return [
        {"epoch": epoch} | {name: value(epoch) if callable(value) else value for name, value in columns.items()}
        for epoch in range(first, first + epochs)
    ]


def of_classes(size, examples=400):
    """Return a confusion matrix."""
    rng = np.random.default_rng(0)
    truth, other = rng.integers(size, size=(2, examples))
    counts = np.zeros((size, size), int)
    np.add.at(counts, (truth, np.where(rng.random(examples) < 0.8, truth, other)), 1)
    return counts.tolist()


def ranked_report(classes, names=(), **changes):
    """Return the report of a multi-label model that is better at classes with a higher index."""
    rng = np.random.default_rng(1)
    labels = rng.random((200, classes)) < 0.2
    logits = rng.normal(size=labels.shape) + labels * np.linspace(0, 3, classes)
    config = ASTConfig(num_labels=classes, id2label=names, problem_type=MULTI)
    return {**metrics.report(logits, labels, config), **changes}


def texts(figure):
    """Return the visible texts of a figure, after its layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.draw_without_rendering()
    beyond = [
        label  # of a tick outside the axis, which matplotlib keeps without drawing it
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for place, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    ]
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    return [text for text in found if text not in beyond]


def assert_inside_and_apart(figure):
    """Assert that no text leaves the figure and no two texts overlap, up to a pixel of rounding."""
    found = texts(figure)
    boxes = np.array([text.get_window_extent().get_points() for text in found])  # [n, low and high, x and y]
    low, high = boxes[:, 0], boxes[:, 1]
    outside = ((low < -1) | (high > figure.bbox.size + 1)).any(-1)
    assert not outside.any(), [found[index] for index in np.flatnonzero(outside)]
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # [n, n, x and y]
    overlapping = np.argwhere(np.triu((shared > 1).all(-1), 1))
    assert not overlapping.size, [(found[one], found[other]) for one, other in overlapping]


def lines(figure):
    """Return the values of each panel's lines by name, without the mark of the best epoch."""
    return {
        axes.get_title(): {
            line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_label()[0] != "_"
        }
        for axes in figure.axes
    }


def marks(figure):
    """Return the marked epoch, which is the same in every panel."""
    found = {line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"}
    assert len(found) <= 1
    return found.pop() if found else None


def png_size(path):
    """Return width and height of a PNG from its header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_curves_have_a_panel_for_each_quantity():
    rows = history(
        25, validation_loss=0.5, mAP=lambda epoch: 0.4 - abs(epoch - 17) / 100, cumulative_mAP=0.41, mAUC=0.9,
        d_prime=1.8, noise=7.0,
    )  # fmt: skip
    figure = plots.curves_figure(rows, "mAP")
    found = lines(figure)
    assert list(found) == ["loss", "mAP", "mAUC", "d prime", "learning rate"]
    assert found["loss"] == {"train loss": [row["train_loss"] for row in rows], "validation loss": [0.5] * 25}
    assert list(found["mAP"]) == ["mAP", "cumulative mAP"]
    assert found["learning rate"] == {"learning rate": [1e-4] * 25}
    written = [found.get_text() for found in texts(figure)]
    assert "best epoch 17: mAP 0.4" in written
    assert {"train loss", "validation loss", "cumulative mAP"} <= set(written)
    assert marks(figure) == 17
    assert_inside_and_apart(figure)


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_curves_of_few_and_many_epochs(epochs):
    figure = plots.curves_figure(history(epochs, accuracy=0.5, mAP=0.4, mAUC=0.7, d_prime=0.5), "accuracy")
    for axes in figure.axes:
        assert axes.lines[0].get_xdata().tolist() == list(range(1, epochs + 1))
        if epochs < 3:  # where a line shows little or nothing
            assert axes.lines[0].get_markevery() == list(range(epochs))
    assert_inside_and_apart(figure)
    for axes in figure.axes:
        first, last = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if first <= tick <= last]
        assert ticks == sorted({round(tick) for tick in ticks})  # there is no epoch 1.5
        assert ticks


@pytest.mark.parametrize("missing", [math.nan, math.inf, None, "absent"])
def test_missing_values_leave_gaps(missing):
    rows = history(50, accuracy=lambda epoch: 0.9 - epoch / 100)
    for row in rows[:30]:
        if row["epoch"] % 10:
            row["accuracy"] = missing
    if missing == "absent":
        rows = [{name: value for name, value in row.items() if value != "absent"} for row in rows]
    del rows[39]  # a whole epoch
    figure = plots.curves_figure(rows, "accuracy")
    known = np.isfinite(lines(figure)["accuracy"]["accuracy"])
    assert (np.flatnonzero(known) + 1).tolist() == [10, 20, *range(30, 40), *range(41, 51)]
    accuracy = next(axes for axes in figure.axes if axes.get_title() == "accuracy")
    assert accuracy.lines[0].get_markevery() == [9, 19]  # alone between gaps, where a line would not show them
    assert marks(figure) == 10


def test_the_best_epoch_is_by_the_named_column():
    def marked(metric, epochs=5, **columns):
        return marks(plots.curves_figure(history(epochs, **columns), metric))

    improves, worsens = (lambda epoch: epoch / 10), (lambda epoch: -epoch / 10)
    assert marked("accuracy", accuracy=improves, mAP=worsens) == 5
    assert marked("mAP", accuracy=improves, mAP=worsens) == 1
    assert marked("mAP", mAP=worsens, accuracy=improves) == 1
    assert marked("negative_mse", negative_mse=improves) == 5
    assert marked("train_loss", mAP=math.nan, mAUC=math.nan) == 5  # the loss falls
    assert marked("accuracy", accuracy=0.5) == 1  # the first of equals
    later = plots.curves_figure(history(5, first=21, accuracy=improves), "accuracy")
    assert marks(later) == 25
    assert later.axes[0].get_xlim() == (20.5, 25.5)
    for metric in ("train_loss", "mAP", None):  # without finite values, without the column, without a name
        assert marked(metric, epochs=2, train_loss=math.nan) is None


def test_refusals_of_curves():
    for rows in ([], [{"accuracy": 0.5}]):
        with pytest.raises(ValueError, match="history: expected one row or more, each with an epoch"):
            plots.curves_figure(rows)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 20])
def test_a_small_confusion_matrix_has_names_and_counts(size):
    counts, names = of_classes(size), [f"class {index}" for index in range(size)]
    figure = plots.confusion_figure(counts, names)
    written = [found.get_text() for found in texts(figure)]
    for name in names:
        assert written.count(name) == 2  # on both sides
    axes = figure.axes[0]
    cells = {found.get_position(): found.get_text() for found in axes.texts}
    assert cells == {(column, row): str(counts[row][column]) for row in range(size) for column in range(size)}
    right = sum(counts[index][index] for index in range(size)) / 400
    assert axes.get_title() == f"400 examples, accuracy {right:.1%}"
    assert_inside_and_apart(figure)


@pytest.mark.parametrize(("name", "size"), [("speech-commands", 35), ("esc50", 50)])
def test_a_confusion_matrix_of_a_known_set_has_its_names(name, size):
    labels = label_set(name).labels
    figure = plots.confusion_figure(of_classes(size, 2000), labels)
    written = [found.get_text() for found in texts(figure)]
    assert all(written.count(label) == 2 for label in labels)
    assert not figure.axes[0].texts
    assert_inside_and_apart(figure)


def test_a_confusion_matrix_of_very_many_classes_has_no_names():
    figure = plots.confusion_figure(of_classes(527), label_set("audioset").labels)
    axes = figure.axes[0]
    shares = figure.axes[1].get_yticklabels()
    written = [found.get_text() for found in texts(figure) if found not in shares]
    assert sorted(written) == [
        "400 examples, accuracy 81.5%",
        "predicted class",
        "share of the true class (square root scale)",
        "true class",
    ]
    assert_inside_and_apart(figure)
    assert axes.get_window_extent().width >= 2 * 527  # pixels: no class falls through


def test_names_are_written_as_they_are():
    names = ["Flöte", "犬の声", "$x_1$ costs 5$", "_hidden", "two\nlines", r"\frac", "100 %"]
    figure = plots.confusion_figure(of_classes(7), names)
    found = {text.get_text(): text for text in texts(figure)}
    assert {*names, "two lines"} - {"two\nlines"} <= found.keys()
    assert not found["$x_1$ costs 5$"].get_parse_math()
    assert_inside_and_apart(figure)


@pytest.mark.parametrize("size", [2, 40])
def test_long_names_are_cut_so_that_they_differ(size):
    names = [*LONG, *map(str, range(size - 2))]
    figure = plots.confusion_figure(of_classes(size), names)
    cut = {found.get_text() for found in texts(figure) if "…" in found.get_text()}
    assert len(cut) == 2
    assert all(len(name) == figures.NAME_LENGTH for name in cut)
    assert {name.rpartition(" ")[2] for name in cut} == {"left", "right"}
    assert_inside_and_apart(figure)


def test_shares_are_of_the_row_and_rows_without_examples_have_none():
    figure = plots.confusion_figure([[3, 1], [0, 0]], ["a", "b"])
    shares = figure.axes[0].images[0].get_array()
    assert shares[0].tolist() == [0.75, 0.25]
    assert shares.mask.tolist() == [[False, False], [True, True]]


def test_titles_begin_with_what_was_measured():
    figure = plots.confusion_figure(of_classes(3), list("abc"), "test, epoch 7")
    assert figure.axes[0].get_title().startswith("test, epoch 7\n400 examples, ")
    assert_inside_and_apart(figure)


def test_large_counts_fit_their_cells():
    figure = plots.confusion_figure(np.full((8, 8), 1_234_567), list("abcdefgh"))
    assert "1,234,567" in [found.get_text() for found in texts(figure)]
    assert_inside_and_apart(figure)
    cell = figure.axes[0].get_window_extent().width / 8
    assert all(found.get_window_extent().width < cell for found in figure.axes[0].texts)


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[1, 2]], ["a"], r"matrix: expected counts of shape \(C, C\), got shape \(1, 2\)"),
        ([1, 2], ["a"], r"got shape \(2,\)"),
        (np.zeros((0, 0)), [], r"got shape \(0, 0\)"),
        ([[1, -1], [0, 1]], ["a", "b"], "matrix: expected counts, none below 0, got -1"),
        ([[1, 0], [0, 1]], ["a"], "labels: expected 2 names for a 2 x 2 matrix, got 1"),
    ],
)
def test_refusals_of_confusion(matrix, names, message):
    with pytest.raises(ValueError, match=message):
        plots.confusion_figure(matrix, names)


def bars(figure):
    """Return the length of each bar by its name, from the top."""
    axes = figure.axes[0]
    names = {
        round(tick): label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    found = sorted(axes.patches, key=lambda bar: bar.get_y())
    return {names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in found}


@pytest.mark.parametrize("classes", [1, 5, 40])
def test_all_classes_have_bars_where_they_are_few(classes):
    report = ranked_report(classes)
    figure = plots.ranked_classes_figure(report)
    expected = {f"{entry['name']} ({entry['positives']})": entry["average_precision"] for entry in report["classes"]}
    found = bars(figure)
    assert found == expected
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert figure.axes[0].get_title() == f"mAP {report['metrics']['mAP']:.4f} (classes: {classes})"
    assert marks(figure) == report["metrics"]["mAP"]
    assert_inside_and_apart(figure)


def test_of_many_classes_both_ends_have_bars():
    labels = label_set("audioset").labels
    report = ranked_report(527, labels)
    for entry in report["classes"][100:130]:
        entry["average_precision"] = None
    figure = plots.ranked_classes_figure(report)
    ranked = sorted(
        (entry["average_precision"] for entry in report["classes"] if entry["average_precision"] is not None),
        reverse=True,
    )
    assert list(bars(figure).values()) == ranked[:20] + ranked[-20:]
    written = [found.get_text() for found in texts(figure)]
    assert "457 classes between" in written
    assert figure.axes[0].get_title().endswith("(classes: 497, left out: 30)")
    assert_inside_and_apart(figure)


def test_bars_of_names_of_all_kinds():
    names = ("Flöte", "犬の声", "$x_1$ costs 5$", "two\nlines", *LONG)
    figure = plots.ranked_classes_figure(ranked_report(6, names))
    written = " | ".join(found.get_text() for found in texts(figure))
    assert all(
        name in written for name in ("Flöte (", "犬の声 (", "$x_1$ costs 5$ (", "two lines (", "hammers, left (")
    )
    assert_inside_and_apart(figure)


def test_there_is_nothing_to_rank_without_average_precisions():
    nothing = metrics.report(np.zeros((2, 3)), np.zeros((2, 3)), ASTConfig(num_labels=3, problem_type=MULTI))
    regression = metrics.report(np.zeros((2, 3)), np.zeros((2, 3)), ASTConfig(num_labels=3, problem_type="regression"))
    for report in (nothing, regression):
        with pytest.raises(ValueError, match="report: expected a class with an average precision, got none"):
            plots.ranked_classes_figure(report)


WRITERS = {
    "curves": lambda path: plots.curves(history(3, accuracy=0.5), path, "accuracy"),
    "confusion": lambda path: plots.confusion(of_classes(3), ["a", "犬", "c"], path),
    "ranked_classes": lambda path: plots.ranked_classes(ranked_report(5), path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_pictures_are_whole_files_of_their_size(write, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    write(path)
    width, height = png_size(path)
    assert 300 < width < 2000
    assert 150 < height < 2000
    assert list(tmp_path.iterdir()) == [path]
    again = tmp_path / "again.PNG.old"  # whatever the ending says
    write(str(again))
    assert again.read_bytes() == path.read_bytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(figure, name, **_):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        WRITERS["curves"](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_without_matplotlib_the_command_that_installs_it_is_named(write, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'ast-jax\[plots\]'"):
        write(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_settings_of_the_user_neither_matter_nor_change(tmp_path):
    WRITERS["confusion"](tmp_path / "plain.png")
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black", "font.size": 30}):
        WRITERS["confusion"](tmp_path / "under.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "under.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_pyplot_and_displays_are_not_needed(tmp_path):
    code = (
        "import sys; from ast_jax.training import plots; plots.confusion([[1]], ['a'], sys.argv[1]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "picture.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_colours_differ_in_lightness_or_hue_without_red_and_green():
    """Every two line colours stay apart for someone without red cones (Viénot and others, 1999) too."""
    linear = np.array([matplotlib.colors.to_rgb(color) for color in plots.COLORS]) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    without_red = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    seen = linear @ (np.linalg.inv(to_lms) @ without_red @ to_lms).T
    seen = np.clip(seen, 0, 1) ** (1 / 2.2)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
    assert apart.min() > 0.1  # the two nearest of the first six that matplotlib would take are 0.04 apart
