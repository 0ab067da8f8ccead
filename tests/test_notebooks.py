"""The notebooks' code runs from top to bottom, as a user's kernel would run it."""

import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in read_cells(path))
    environment = {"MPLBACKEND": "agg", "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = "".join(
        "".join(output["text"])
        for cell in read_cells(path)
        for output in cell["outputs"]
        if output.get("name") == "stdout"
    )
    assert done.stdout == printed  # what the repository shows is what the code prints


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed_in_order(path):
    counts = [cell["execution_count"] for cell in read_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
