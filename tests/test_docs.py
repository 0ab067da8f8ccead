"""Pages in docs/ agree with the code: examples run, options, recipes, links and figures are right."""

import json
import re

import pytest
import soundfile
import typer
from pages import DECISIONS, DOCS, WITH_README, blocks, commands, page
from typer.testing import CliRunner

import ast_jax
from ast_jax.cli.main import app
from ast_jax.data import datasets
from ast_jax.training.recipes import RECIPES

SHORTER = {"finetune": ["--epochs", "1", "--linear-probe", "--workers", "0"]}  # extra arguments of a command


def is_training(block):
    return "ast_jax.finetune(" in block


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Run the fine-tuning page from top to bottom but for the training in Python; return the output of each command."""
    folder = tmp_path_factory.mktemp("docs")
    first, *others = blocks("finetuning.md", "python")
    printed, namespace = {}, {"ast_jax": ast_jax}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(first, "finetuning.md", "exec"), namespace)
        for arguments in commands(blocks("finetuning.md", "sh")[0]):
            result = CliRunner().invoke(app, [*arguments, *SHORTER.get(arguments[0], [])])
            assert result.exit_code == 0, (arguments, result.output)
            printed[arguments[0]] = result.stdout
        for block in others:
            if not is_training(block):
                exec(compile(block, "finetuning.md", "exec"), namespace)
    return printed


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_page_trains_from_python(tmp_path, monkeypatch, capsys):
    """The fifteen lines as they stand, after the example data."""
    data, *others = blocks("finetuning.md", "python")
    (training,) = filter(is_training, others)
    assert len([line for line in training.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    for block in (data, training):
        exec(compile(block, "finetuning.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert [row["epoch"] for row in ast_jax.Run("python-run").metrics] == [1, 2, 3]
    assert "100 sounds of the split test" in printed


@pytest.mark.usefixtures("quick_compilation")
def test_finetuning_page_runs(outputs):
    assert list(outputs) == ["check-data", "stats", "finetune", "evaluate", "classify"]
    assert "falling" in outputs["classify"]
    assert "100 sounds of the split test" in outputs["evaluate"]


@pytest.mark.usefixtures("quick_compilation")
def test_finetuning_page_shows_the_output(outputs):
    """Of the two commands that do not train, line by line."""
    (shown,) = re.findall(r"^```text\n(examples .*?)^```", page("finetuning.md"), re.DOTALL | re.MULTILINE)
    assert set(shown.splitlines()) <= {*outputs["check-data"].splitlines(), *outputs["stats"].splitlines()}


def listed():
    """Return the example files of the page on fine-tuning by name."""
    return dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", page("finetuning.md"), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "labels", "splits"),
    [
        ("manifest.csv", ("rain", "wind"), {"train": [(0, 1), (1,)], "validation": [(0,)], "test": [()]}),
        ("parts.jsonl", ("rain", "wind"), {"train": [(0, 1), (1,)], "validation": [(0,)], "test": []}),
        ("train_data.json", ("Rain", "Wind"), {"train": [(0, 1), (1,)], "validation": [], "test": []}),
    ],
)
def test_example_files_are_read(name, labels, splits, tmp_path):
    files = listed()
    assert set(files) == {"manifest.csv", "parts.jsonl", "train_data.json", "class_labels_indices.csv"}
    for other in {name, *({"class_labels_indices.csv"} if name.endswith(".json") else ())}:
        (tmp_path / other).write_text(files[other])
    for path in re.findall(r"[\w/]+\.wav", files[name]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / path, [0.0] * 16, 16000)
    kept = {"validation": str(tmp_path / name)} if name.endswith(".json") else {}  # else one is held out
    dataset = datasets.read_dataset(datasets.DatasetConfig(tmp_path / name, **kept))
    assert dataset.labels == labels
    for split, targets in splits.items():
        if not (kept and split == "validation"):
            assert [example.targets for example in dataset.splits[split]] == targets


def test_recipes_table_equals_the_code():
    """The rows with settings, for all four recipes."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page("finetuning.md").splitlines()]
    (header,) = [row for row in rows if set(RECIPES) <= set(row)]
    table = {row[0]: row[1:] for row in rows if len(row) == len(header) and row[0] in header_rows()}
    assert set(table) == header_rows()
    for name, recipe in RECIPES.items():
        settings = {**vars(recipe.settings()), **recipe.frontend}
        for key, cells in table.items():
            assert as_value(cells[header.index(name) - 1]) == settings[key], (name, key)
        loss = recipe.problem_type.removesuffix("_classification").replace("_", "-")
        assert next(row for row in rows if row[0] == "loss")[header.index(name)] == loss


def as_value(shown):
    return {"yes": True, "no": False}[shown] if shown in ("yes", "no") else float(shown)


def header_rows():
    """Return the settings that have a row: those of any recipe, except the ones that all share."""
    shared = {"optimizer", "beta1", "beta2", "weight_decay", "schedule", "warmup_hold"}
    return {key for recipe in RECIPES.values() for key in {*recipe.training, *recipe.frontend}} - shared


@pytest.mark.parametrize("path", [*WITH_README, *DECISIONS], ids=lambda path: path.stem)
def test_options_exist(path, monkeypatch):
    """Every --option on a page exists in ast-jax or the benchmark, except those of gcloud and other programs."""
    monkeypatch.syspath_prepend(DOCS.parent / "tools")
    import benchmark

    known = {"--help"}
    for program in map(typer.main.get_command, (app, benchmark.app)):
        for command in (program, *program.commands.values()):
            known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    text = re.sub(r"^ *(gcloud|python3|git) .*?[^\\]$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^.*tools/compare_.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`(gcloud|tensorboard|pip install) [^`]*`|--xla_force_host_platform_device_count", "", text)
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert not found - known


@pytest.mark.parametrize("path", WITH_README, ids=lambda path: path.stem)
def test_commands_parse(path):
    """Every `ast-jax` command in a shell block has valid options, whatever its files."""
    root = typer.main.get_command(app)
    for arguments in [one for block in blocks(path, "sh") for one in commands(block)]:
        command = root.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize(
    "path",
    [*WITH_README, *DECISIONS, *(DOCS.parent / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"))],
    ids=lambda path: path.stem,
)
def test_link_targets_exist(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)", prose):
        assert target in ("http", "https") or (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", [*WITH_README, *DECISIONS, DOCS.parent / "CONTRIBUTING.md"], ids=lambda path: path.stem
)
def test_modules_and_tests_named_on_a_page_exist(path):
    root = DOCS.parent
    for name in re.findall(r"\b(?:\w+/)+\w+\.(?:py|ipynb)\b", path.read_text()):
        assert (root / name).exists() or (root / "ast_jax" / name).exists(), name


def test_the_api_page_names_all_that_is_public():
    """Each name once, as users import it."""
    named = [line.removeprefix("::: ") for line in page("api.md").splitlines() if line.startswith(":::")]
    assert sorted(named) == sorted(f"ast_jax.{name}" for name in ast_jax.__all__)


def test_decisions_are_numbered_short_and_listed():
    pages = [path for path in DECISIONS if path.name != "index.md"]
    assert [int(path.name[:3]) for path in pages] == list(range(1, len(pages) + 1))
    index, navigation = page("decisions/index.md"), (DOCS.parent / "mkdocs.yml").read_text()
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Choice", "Cost"], path.name
        assert 100 <= len(text.split()) <= 250, path.name
        assert f"[{path.name[:3]} {text.splitlines()[0].removeprefix('# ')}]({path.name})" in index
        assert f"decisions/{path.name}\n" in navigation
        assert "```" not in text  # code of these pages would not run in tests


def test_json_on_the_page_is_json():
    for name, text in listed().items():
        for line in text.splitlines() if name.endswith((".json", ".jsonl")) else ():
            json.loads(line)
