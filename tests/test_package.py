"""The package as a whole: lazy imports, no torch, public names, README and ARCHITECTURE."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import ast_jax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ast_jax"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py"))


def test_no_public_name_is_a_module():
    top = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path in MODULES}
    assert {"config", "model"} <= top
    assert not top & set(ast_jax.__all__)


@pytest.mark.parametrize("name", ast_jax.__all__)
def test_public_names_have_docstrings(name):
    value = getattr(ast_jax, name)
    assert value.__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No ast_jax attribute nonsense"):
        _ = ast_jax.nonsense


def test_import_is_lazy():
    code = (
        "import sys, ast_jax\n"
        "heavy = {'jax', 'numpy', 'flax', 'orbax', 'soundfile', 'librosa', 'torch'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "ast_jax.ASTConfig()\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_classifying_needs_neither_torch_nor_the_training_extra():
    sound = PACKAGE / "sounds" / "speech.flac"
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'grain', 'sklearn', 'librosa', 'matplotlib'): sys.modules[name] = None\n"
        f"from ast_jax.cli.main import app\napp(['classify', {str(sound)!r}], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Speech" in done.stdout


def test_base_install_has_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if "torch" in name]
    assert project["requires-python"] == ">=3.11"
    assert {"train", "gpu", "tpu", "test"} <= set(project["optional-dependencies"])


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_readme_python_runs(monkeypatch, capsys):
    """The README's code, block by block in one namespace, from the repository's root."""
    monkeypatch.chdir(ROOT)
    blocks = python_blocks("README.md")
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "Speech" in capsys.readouterr().out


def test_ci_calls_the_readmes_test_command():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^.*pip install -e '\.\[test\]' && (\S*pytest)$", readme, re.MULTILINE)
    assert f'\nstage "tests" {command}\n' in script


def test_architecture_names_every_module():
    """In the row of its package, which lists all modules of the package and no others."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(text.split()) < 1000
    rows = dict(re.findall(r"^\| `?([\w/]+?)/?`? \|.*\| ([^|]*\.py`) \|$", text, re.MULTILINE))
    folders = {"root": PACKAGE, **{path.relative_to(PACKAGE).as_posix(): path for path in PACKAGES}}
    assert rows.keys() == folders.keys()
    for name, folder in folders.items():
        assert set(re.findall(r"`(\w+\.py)`", rows[name])) == {path.name for path in MODULES if path.parent == folder}


def test_the_library_does_not_print():
    """Messages go through logging, warnings, or the command line."""
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert not re.search(r"\bprint\(|= print\b", path.read_text()), path


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
