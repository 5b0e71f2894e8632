"""Bad input: one message, exit status 2, no run folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from accrete.launch import api, cli
from accrete.pipeline.errors import CheckpointError, DataError

RECIPE = """\
name: small
model: tiny_t5
method: sequential
tasks: [alpha, beta]
data: {format: generated}
log: {console: quiet}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


def accrete(*arguments: str) -> int:
    """Exit status of a command."""
    old, sys.argv = sys.argv, ["accrete", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = old
    return 0


def test_unknown_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accrete("run", "standard_cl/order11", "--run-dir", "r") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no recipe `standard_cl/order11`")
    assert "standard_cl/order1" in error
    assert os.listdir(".") == ["small.yaml"]


def test_all_mistakes_at_once(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = accrete("run", recipe, "adapter.rnk=4", "train.learning_rate=fast", "--run-dir", "r")
    assert status == 2
    error = capsys.readouterr().err
    assert "rnk" in error
    assert "rank" in error
    assert "learning_rate" in error
    assert "Traceback" not in error
    assert os.listdir(".") == ["small.yaml"]


def test_usage_errors(recipe: str) -> None:
    assert accrete("run") == 2
    assert accrete("run", recipe, "--porcs", "2") == 2
    assert accrete("run", recipe, "--procs", "0") == 2
    assert accrete("fly") == 2


def test_a_taken_folder_is_refused_before_any_work(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "prepare", lambda *_: pytest.fail("prepared for nothing"))
    os.mkdir("r")
    Path("r/notes.txt").write_text("mine")
    assert accrete("run", recipe, "--run-dir", "r") == 2
    assert "not empty" in capsys.readouterr().err
    assert os.listdir("r") == ["notes.txt"]


@pytest.mark.parametrize("existed", [False, True])
def test_bad_rows_leave_no_folder(
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    existed: bool,
) -> None:
    def refuse(*_: object) -> None:
        raise DataError("alpha/train.jsonl:7: no field `output`.")

    monkeypatch.setattr(api, "prepare", refuse)
    if existed:
        os.mkdir("r")
    assert accrete("run", recipe, "--run-dir", "r") == 2
    assert capsys.readouterr().err == "error: alpha/train.jsonl:7: no field `output`.\n"
    assert sorted(os.listdir(".")) == ["r", "small.yaml"] if existed else ["small.yaml"]


def test_errors_that_are_not_the_users_end_with_1(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("no sound checkpoint is left")

    monkeypatch.setattr(api, "prepare", fail)
    assert accrete("run", recipe, "--run-dir", "r") == 1
    assert capsys.readouterr().err == "error: no sound checkpoint is left\n"


def test_ctrl_c_ends_with_130(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prepare", interrupt)
    assert accrete("run", recipe, "--run-dir", "r") == 130
    assert os.listdir(".") == ["small.yaml"]


def test_an_unforeseen_error_keeps_its_traceback(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "prepare", fail)
    with pytest.raises(ZeroDivisionError):  # python prints it and ends with status 1
        accrete("run", recipe, "--run-dir", "r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "does not exist"),
        ((".",), "not a run folder"),
        (("run", "train.learning_rate=1"), "engine.*, log.*, checkpoint.*"),
        (("run", "method=ewc_lora"), "cannot change method=ewc_lora"),
        (("run", "engineer.procs=2"), "cannot change"),
    ],
)
def test_resume_refuses(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    os.mkdir("run")
    Path("run/recipe.yaml").write_text(RECIPE)
    Path("run/run.json").write_text("{}")
    assert accrete("resume", *arguments) == 2
    assert said in capsys.readouterr().err


def test_settings_that_no_process_can_fulfil(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accrete.launch.environment.count_gpus", lambda: 0)
    assert accrete("run", recipe, "engine.device=cuda", "--run-dir", "r") == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert accrete("run", recipe, "engine.kind=plain", "--procs", "2", "--run-dir", "r") == 2
    assert "engine" in capsys.readouterr().err
    monkeypatch.setattr("accrete.launch.environment.count_gpus", lambda: 4)
    assert accrete("run", recipe, "--procs", "8", "--run-dir", "r") == 2
    assert "1 to 4" in capsys.readouterr().err
    assert os.listdir(".") == ["small.yaml"]
