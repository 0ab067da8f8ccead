"""The benchmark: significant changes, disagreeing results, and a run of every command."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


def row(contender, median, spread=0.02, case="forward"):
    return {
        "case": case, "contender": contender, "median": median,
        "low": median * (1 - spread), "high": median * (1 + spread),
    }  # fmt: skip


def test_only_changes_beyond_the_spread_are_listed(tools):
    from bench import report

    old = {("forward", name): row(name, 1.0) for name in ("ast_jax", "PyTorch")}
    lines = {
        (1.03, 1.0): [], (0.97, 1.0): [], (1.10, 1.0): [(True, "forward: ast_jax takes 10% more time")],
        (0.80, 1.0): [(False, "forward: ast_jax takes 20% less time")],
        (1.0, 1.3): [(False, "forward: PyTorch takes 30% more time")],
    }  # fmt: skip
    for (ours, theirs), expected in lines.items():
        assert list(report.changes(old, [row("ast_jax", ours), row("PyTorch", theirs)])) == expected
    wide = [row("ast_jax", 1.10, 0.2)]
    assert list(report.changes(old, wide)) == [], "quartiles that overlap"
    assert list(report.changes(old, [row("ast_jax", 9.0, case="another")])) == []
    narrow = {("forward", "ast_jax"): row("ast_jax", 1.0, 0.001)}
    assert list(report.changes(narrow, [row("ast_jax", 1.02, 0.001)])) == [], "less than a busy machine's noise"


def test_results_are_written_and_compared(tools, tmp_path, capsys):
    from bench import report

    report.finish([row("ast_jax", 1.0)], "here", tmp_path / "old.json", None, more=1)
    assert json.loads((tmp_path / "old.json").read_text())["more"] == 1
    report.finish([row("ast_jax", 1.01)], "here", None, tmp_path / "old.json")
    assert "no change beyond the spread" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        report.finish([row("ast_jax", 2.0)], "there", None, tmp_path / "old.json")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "is of another machine: here" in printed
    assert "ast_jax takes 100% more time" in printed
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(SystemExit, match="expected results that --json wrote"):
        report.finish([row("ast_jax", 2.0)], "here", None, tmp_path / "bad.json")


def test_results_that_differ_are_not_timed(tools):
    from bench import worker

    good = {"one": np.array([1.0, 2.0]), "other": np.array([1.0, 2.0001])}
    assert worker.check_agreement(good, 1e-3)["other"] == pytest.approx(5e-5)
    for wrong in (np.array([1.0, 2.1]), np.array([1.0, np.nan])):
        with pytest.raises(SystemExit, match="do not agree"):
            worker.check_agreement({**good, "wrong": wrong}, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["forward", "--preset", "tiny", "--max-length", "32", "--batch-size", "2"], "torch.compile"),
        (["features", "--seconds", "0.5"], "transformers"),
        (["cold-start"], "of the pipeline's time"),
        (["files", "--count", "100"], "of that rate"),
        (
            ["gpu", "--device", "cpu", "--preset", "tiny", "--max-length", "32", "--batch-size", "2",
             "--train-batch-size", "2"],
            "bfloat16         differ by at most",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_every_command_runs(arguments, said, tmp_path):
    command = [
        sys.executable,
        str(TOOLS / "benchmark.py"),
        *arguments,
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    results = json.loads((tmp_path / "out").read_text())["results"]
    assert all(entry["low"] <= entry["median"] <= entry["high"] for entry in results)
    assert any(entry["contender"].startswith("ast") for entry in results)
