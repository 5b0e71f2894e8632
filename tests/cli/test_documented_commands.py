"""Every command in README and docs parses, its recipe loads, its make target exists.

What the commands then do is tested on small models in `tests/runs`, `tests/cli`, `tests/recipes`,
`tests/cluster`; launches of the docs are rendered here with `--dry-run`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.pipeline.config.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VARIABLES = {"$seed": "0", "$method": "sequential"}
"""What the loops of the docs go through, by one value each."""


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def lines() -> list[tuple[str, list[str]]]:
    """Page and words of every command line in a shell block."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                for name, value in VARIABLES.items():
                    line = line.replace(name, value)
                words = shlex.split(line, comments=True)
                if words:
                    found.append((page.name, words))
    return found


def accrete_commands() -> list[tuple[str, list[str]]]:
    """Page and arguments of every `accrete ...`, whatever stands before it on its line."""
    found = []
    for page, words in lines():
        for number, word in enumerate(words):
            if word in ("accrete", ".venv/bin/accrete"):
                found.append((page, words[number + 1 :]))
                break
    return found


COMMANDS = accrete_commands()
NAMES = [f"{page}-{' '.join(words)[:60]}" for page, words in COMMANDS]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the docs tell to write."""
    monkeypatch.chdir(tmp_path)
    [own] = [b for b in blocks(ROOT / "README.md", "yaml") if b.startswith("# mine.yaml")]
    (tmp_path / "mine.yaml").write_text(own)
    code = next(b for b in blocks(ROOT / "docs" / "new-method.md", "python") if "class Hold" in b)
    (tmp_path / "hold.py").write_text(code)
    cluster = next(b for b in blocks(ROOT / "docs" / "clusters.md", "yaml") if "\nk8s:" in b)
    (tmp_path / "my_k8s.yaml").write_text(cluster)
    (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
    return tmp_path


def parsed(words: list[str]) -> dict[str, object]:
    """The values that the command line gives the function behind a command."""
    command = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    return command.make_context(name, words).params


def test_the_pages_are_read():
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "quickstart.md", "results.md", "clusters.md", "new-method.md"} <= pages


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=NAMES)
def test_a_command_of_the_docs(folder, page, words):
    values = parsed(words)
    recipe = values.get("recipe")
    if recipe is not None:
        assert load_recipe(str(recipe), list(values.get("overrides") or ())).config.tasks


LAUNCHES = [(page, words) for page, words in COMMANDS if words[0] == "launch"]


@pytest.mark.parametrize(("page", "words"), LAUNCHES, ids=[n for n in NAMES if "-launch" in n])
def test_a_launch_of_the_docs_renders(folder, page, words):
    more = [] if "--dry-run" in words else ["--dry-run"]
    if "--run-dir" not in words:
        more += ["--run-dir", "runs/one"]
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "accrete" in result.output
    assert not list(folder.glob("runs/*/run.json")), "something was started"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    asked = {words[1] for _, words in lines() if words[0] == "make"}
    assert asked
    assert asked <= targets


def test_a_wrong_command_would_be_seen(folder):
    """Control."""
    with pytest.raises(AssertionError, match="no command fly"):
        parsed(["fly", "slurm", "quickstart"])
    with pytest.raises(Exception, match="run-dri"):
        parsed(["run", "quickstart", "--run-dri", "x"])
    with pytest.raises(Exception, match="order9"):
        load_recipe("standard_cl/order9")
