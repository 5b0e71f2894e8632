"""The command line where the machine, the shell or another start says no."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
import typer

from accrete.launch import api, cli, export, rebuild
from accrete.launch.branch import branch_recipe
from accrete.launch.commands.options import new_file
from accrete.launch.prepare import Prepared
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import ConfigError, RunFolderError
from accrete.pipeline.run_dir import RunDir

RECIPE = """\
name: small
model: tiny_t5
method: sequential
tasks:
  - {name: alpha, files: {train: a.jsonl, test: a.jsonl}}
  - {name: beta, files: {train: b.jsonl, test: b.jsonl}}
data: {format: files}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    return tmp_path


def accrete(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accrete", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def make_run(path: Path) -> RunDir:
    """A run whose two stages are finished, as far as a branch looks at it."""
    run = RunDir(path)
    run.create()
    load_recipe("small.yaml").dump_yaml(run.recipe)
    run.run.write_text("{}")
    for stage in (0, 1):
        folder = run.checkpoints / f"stage-{stage}"
        folder.mkdir()
        (folder / "checkpoint.json").write_text(json.dumps({"past": {}, "files": {}}))
    return run


@pytest.mark.parametrize("name", ["missing/x", ".", "device"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "device":
        os.mkfifo(here / name)
    make_run(here / "run")
    monkeypatch.setattr(rebuild, "rebuild", lambda *_: pytest.fail("loaded for nothing"))
    for command in (("score", "run"), ("compare", "run"), ("schema",)):
        assert accrete(monkeypatch, *command, "--out", name) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert name != "device" or (here / name).is_fifo()


def test_an_output_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert new_file(None) is None
    assert new_file(Path("~/x.json")) == here / "x.json"
    (here / "x.json").touch()
    assert new_file(Path("x.json")) == Path("x.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(typer.BadParameter, match="nothing can be written"):
        new_file(Path("x.json"))


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "Free space"), (errno.EACCES, "Ask for the right"), (errno.EROFS, "Ask for")],
)
def test_what_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, said: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(api, "load_recipe", refuse)
    assert accrete(monkeypatch, "run", "quickstart") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: /some/file: {os.strerror(number)}. {said}")
    assert error.count("\n") == 1


def test_other_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    monkeypatch.setattr(api, "load_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["accrete", "run", "quickstart"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_a_name_that_is_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accrete(monkeypatch, "run", "a" * 300 + ".yaml") == 1
    assert "Give a shorter one." in capsys.readouterr().err


def test_a_branch_of_the_working_directory_has_a_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def branch(run_dir: Path, stage: int, folder: Path, *_: str, procs: int | None) -> None:
        asked.append(folder)
        raise ConfigError("enough")

    monkeypatch.setattr(api, "branch", branch)
    (here / "one").mkdir()
    monkeypatch.chdir(here / "one")
    for given in (".", "../one", ".."):
        assert accrete(monkeypatch, "branch", given, "--from-stage", "1") == 2
    names = [folder.name.partition("-stage1-")[0] for folder in asked]
    assert names == ["one", "one", here.name]
    assert [folder.resolve().parent for folder in asked] == [here, here, here.parent]


def test_a_branch_takes_one_task_more(here: Path) -> None:
    run = make_run(here / "run")
    more = "{name: gamma, files: {train: c.jsonl, test: c.jsonl}}"
    config = branch_recipe(run, 1, [f"tasks.2={more}"]).config
    assert [task.name for task in config.tasks] == ["alpha", "beta", "gamma"]
    with pytest.raises(ConfigError, match=r"cannot change tasks 0 to 1 \(tasks\.2=\.\.\. adds one"):
        branch_recipe(run, 1, [f"tasks=[alpha, beta, {more}]"])


def prepared() -> Prepared:
    return Prepared(
        device="cpu", procs=1, model_path="m", tokenizer_path="m", seq2seq=True, tasks=[]
    )


def test_a_start_that_comes_second_leaves_the_first_ones_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found the folder free; the other one has the lock."""
    others: list[int] = []
    create = RunDir.create

    def create_together(self: RunDir) -> None:
        create(self)
        others.append(os.open(self.lock_file, os.O_RDWR | os.O_CREAT))
        fcntl.flock(others[0], fcntl.LOCK_EX)

    monkeypatch.setattr(api, "prepare", lambda *_: prepared())
    monkeypatch.setattr(RunDir, "create", create_together)
    try:
        with pytest.raises(RunFolderError, match="another process works in this run folder"):
            api.run(api.load_recipe("small.yaml"), here / "run")
        assert (here / "run" / "stages").is_dir()
    finally:
        os.close(others[0])


def test_the_home_folder_in_the_name_of_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setattr(api, "prepare", lambda *_: prepared())
    monkeypatch.setattr(api, "_launch", lambda folder, *_: pytest.fail(str(folder.path)))
    with pytest.raises(pytest.fail.Exception, match=str(here / "home" / "run")):
        api.run(api.load_recipe("small.yaml"), "~/run")
    assert not (here / "~").exists()


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_export_that_fails_leaves_no_half_model(
    here: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def fill(runner: object, folder: Path, *_: str) -> None:
        (folder / "model.safetensors").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_run(here / "run")
    monkeypatch.setattr(rebuild, "rebuild", lambda *_: None)
    monkeypatch.setattr(export, f"_write_{form}", fill)
    with pytest.raises(OSError, match="No space left"):
        export.export_stage(here / "run", here / "out", form=form)  # type: ignore[arg-type]
    assert sorted(os.listdir(here)) == ["run", "small.yaml"]
