"""Every command in README and docs parses, its recipe loads, its make target and options exist.

Launches are rendered with `--dry-run`; `tests/cluster` starts such ones. What trains or plans is
run by `tests/recipes/test_documented_runs.py`, `doctor` and `fetch` by `test_documented_doctor.py`
beside it. The benchmarks take hours: their options are read by their own programs.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from documented import PAGES, ROOT, accrete_commands, inline_commands, lines, write_files
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.pipeline.config.load import load_recipe

COMMANDS = accrete_commands()
NAMES = [f"{page}-{' '.join(words)[:60]}" for page, words in COMMANDS]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the docs tell to write."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
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


def test_commands_in_running_text_parse():
    commands = inline_commands()
    assert len(commands) > 10
    for page, words in commands:
        try:
            parsed(words)
        except Exception as error:
            pytest.fail(f"{page}: accrete {' '.join(words)}: {error}")


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


TEXTS = [page.read_text() for page in (*PAGES, ROOT / "CONTRIBUTING.md")]
MAKEFILE = (ROOT / "Makefile").read_text()
BENCHES = dict(
    re.findall(r"^\t\$\(BIN\)/python tests/bench/(\w+)\.py \$\((\w+)\)$", MAKEFILE, re.MULTILINE)
)
"""The variable of each program that takes its options from one."""


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
    asked = {words[1] for _, words in lines() if words[0] == "make"}
    assert asked
    assert asked | set(make_targets_in_text()) <= targets


def make_targets_in_text() -> list[str]:
    return [target for text in TEXTS for target in re.findall(r"`make ([a-z0-9-]+)", text)]


def bench_calls() -> list[tuple[str, str]]:
    """Program and options of every benchmark that a page calls, in a block or in running text."""
    found = []
    for text in TEXTS:
        for program, variable in BENCHES.items():
            calls = re.findall(rf"{variable}='([^']*)'", text)
            calls += re.findall(rf"^python tests/bench/{program}\.py (.*)$", text, re.MULTILINE)
            found += [(program, call.replace("<kind>", "ewc_lora")) for call in calls]
    return found


@pytest.fixture
def benches(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))


def test_the_options_of_the_benchmarks_exist(benches):
    calls = bench_calls()
    assert {program for program, _ in calls} >= {"methods", "forecast", "results"}
    for program, call in calls:
        importlib.import_module(program).options(shlex.split(call))


def test_a_wrong_option_of_a_benchmark_would_be_seen(benches, capsys):
    """Control."""
    for program in BENCHES:
        with pytest.raises(SystemExit):
            importlib.import_module(program).options(["--no-such-option"])
        assert "--no-such-option" in capsys.readouterr().err


def test_a_wrong_command_would_be_seen(folder):
    """Control."""
    with pytest.raises(AssertionError, match="no command fly"):
        parsed(["fly", "slurm", "quickstart"])
    with pytest.raises(Exception, match="run-dri"):
        parsed(["run", "quickstart", "--run-dri", "x"])
    with pytest.raises(Exception, match="order9"):
        load_recipe("standard_cl/order9")
