"""Pages of docs/ and the README for tests: their code blocks and commands, and which pages run completely."""

import pathlib
import re
import shlex

import ast_jax

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
WITH_README = [*PAGES, DOCS.parent / "README.md"]
SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"
RUN_WHOLE = ("index", "jax", "sliding-windows", "padding", "embeddings", "explanations", "converting", "migrating")
NOT_RUN = ("converting",)  # pages whose commands run in test_shell.py, with stand-ins for files


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def commands(text):
    """Return the `ast-jax` commands of a shell block as lists of arguments, with a number for each variable."""
    lines = re.sub(r"\$\w+", "1", text.replace("\\\n", " ")).splitlines()
    lines = [line.split(" | ")[-1].strip() for line in lines]  # the last command of a pipe
    found = [line for line in lines if line.startswith("ast-jax ")]
    return [shlex.split(re.split(r"\s[>&]", line)[0], comments=True)[1:] for line in found]  # without redirections
