"""The notebooks' code runs from top to bottom, as a user's kernel would run it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Values of the cell tagged `parameters`, with which a notebook that trains is done soon.
QUICK = {"finetune": {"CLIPS": {"train": 4, "validation": 2, "test": 2}, "EPOCHS": 3}}


def read_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", ())


def run(path, folder, **environment):
    """Run a notebook's cells, with other parameters where `QUICK` has some; return what it prints."""
    quick = "\n".join(f"{name} = {value!r}" for name, value in QUICK.get(path.stem, {}).items())
    code = "\n".join(quick if is_parameters(cell) else "".join(cell["source"]) for cell in read_cells(path))
    environment = {"MPLBACKEND": "agg", "PATH": "", "HOME": str(folder), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept(path):
    """Return what the repository shows as printed by a notebook."""
    outputs = [output for cell in read_cells(path) for output in cell["outputs"]]
    assert not [output for output in outputs if output.get("name") == "stderr" or output["output_type"] == "error"]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def test_there_are_notebooks():
    assert {"finetune", "inference"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in QUICK], ids=lambda path: path.stem)
def test_notebook_prints_what_the_repository_shows(path, tmp_path):
    assert run(path, tmp_path) == kept(path)


@pytest.mark.slow
def test_finetuning_notebook_runs_with_few_sounds(tmp_path):
    """Its figures depend on the number of sounds and epochs; that a stopped run goes on as if nothing was does not."""
    (path,) = [path for path in NOTEBOOKS if path.stem == "finetune"]
    cache = {name: value for name, value in os.environ.items() if name.startswith("JAX_") and "CACHE" in name}
    printed = run(path, tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="1", **cache)  # it compiles much and runs little
    for text in (printed, kept(path)):
        assert "equal to the run that was not stopped: True" in text
        assert "stopped; as a command it would end with status 143" in text
        assert "no problems" in text
    assert "24 training examples, 12 for validation, 6 labels" in printed
    assert "epoch 3, " in printed
    assert "epoch 4, " not in printed


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in QUICK], ids=lambda path: path.stem)
def test_parameters_are_those_of_the_tagged_cell(path):
    (cell,) = filter(is_parameters, read_cells(path))
    values = {}
    exec("".join(cell["source"]), values)
    assert values.keys() - {"__builtins__"} == QUICK[path.stem].keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed_in_order(path):
    counts = [cell["execution_count"] for cell in read_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
