"""The command line before any work begins: quick, light, complete."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from accrete.launch.completion import complete_recipe, complete_run

ACCRETE = Path(sys.executable).with_name("accrete")
COMMANDS = (
    *("run", "resume", "branch", "plan", "recipes", "methods", "schema"),
    *("score", "compare", "report", "export", "doctor", "fetch", "launch"),
)
HEAVY = {"torch", "transformers", "datasets", "peft", "pandas", "deepspeed", "numpy", "jinja2"}


def imported_by(*commands: tuple[str, ...]) -> set[str]:
    """Top-level modules in memory when the command line has answered each of `commands`."""
    code = (
        "import json, sys\n"
        "from accrete.launch.cli import main\n"
        f"for command in {list(commands)!r}:\n"
        "    sys.argv = ['accrete', *command]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.count("Usage:") == len(commands)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy() -> None:
    modules = imported_by(("--help",), *((name, "--help") for name in COMMANDS))
    assert {"typer", "accrete"} <= modules
    assert not modules & HEAVY


def test_help_is_quick() -> None:
    def seconds() -> float:
        # Of work, not on the clock: it reads no network and waits for nothing, but a machine that
        # does other things too makes it wait.
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([ACCRETE, "--help"], check=True, capture_output=True, timeout=60)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    seconds()  # the first one may compile bytecode
    assert min(seconds() for _ in range(5)) < 0.5


def test_help_names_every_command() -> None:
    done = subprocess.run([ACCRETE, "--help"], check=True, capture_output=True, text=True)
    for name in COMMANDS:
        assert f" {name} " in done.stdout


def test_version() -> None:
    done = subprocess.run([ACCRETE, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("accrete 0.")


def test_completion_script_for_the_shell() -> None:
    environment = {**os.environ, "_ACCRETE_COMPLETE": "complete_bash"}
    environment.update(COMP_WORDS="accrete re", COMP_CWORD="1")
    done = subprocess.run([ACCRETE], capture_output=True, text=True, env=environment, check=True)
    assert {"resume", "report"} <= set(done.stdout.split())


def test_recipes_and_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more").mkdir()
    monkeypatch.setattr(
        "accrete.pipeline.config.library.recipe_names",
        lambda: ["quickstart", "standard_cl/order1"],
    )
    assert complete_recipe("") == ["quickstart", "standard_cl/order1", "mine.yaml", "more/"]
    assert complete_recipe("st") == ["standard_cl/order1"]
    assert complete_recipe("mi") == ["mine.yaml"]
    assert complete_recipe("nowhere/x") == []


def test_run_folders_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").touch()
    assert complete_run("ru") == ["runs/"]
    assert "runs/one" in complete_run("runs/")
    assert "runs/two" not in complete_run("runs/")
    assert complete_run(f"{tmp_path}/ru") == [f"{tmp_path}/runs/"]
