"""The run folder: names, atomic writes, who may take it, the lock."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.records import Event, Recorder
from accrete.pipeline.run_dir import RunDir, read_json, write_json, write_text


def make_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.create()
    run.recipe.write_text("name: x\n")
    write_json(run.run, {"name": "x"})
    return run


def test_names_follow_the_contract(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    stage = run.stage(12)
    names = [
        *(run.recipe, run.run, run.prepared, run.events, run.matrix, run.report),
        *(stage.adapter, stage.predictions, stage.score, run.checkpoints, run.logs),
    ]
    assert [str(path.relative_to(run.path)) for path in names] == [
        *("recipe.yaml", "run.json", "prepared.json", "events.jsonl", "matrix.json", "report.html"),
        *("stages/12/adapter", "stages/12/predictions.jsonl", "stages/12/score.json"),
        *("checkpoints", "logs"),
    ]
    assert not run.path.exists()


def test_writes_are_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1.5, math.nan]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert read_json(path) == {"a": [1.5, None]}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert os.listdir(tmp_path) == ["x.json"]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"x\.json.*missing"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"x\.json.*not valid JSON"):
        read_json(tmp_path / "x.json")


def test_create_takes_a_new_or_empty_folder_only(tmp_path: Path) -> None:
    RunDir(tmp_path / "deep" / "new").create()
    (tmp_path / "empty").mkdir()
    RunDir(tmp_path / "empty").create()
    make_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"accrete resume .*run"):
        RunDir(tmp_path / "run").create()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        RunDir(tmp_path / "other").create()
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="a file of this name"):
        RunDir(tmp_path / "file").create()


def test_require_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run").require_run()
    with pytest.raises(RunFolderError, match="does not exist"):
        RunDir(tmp_path / "nothing").require_run()
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunDir(tmp_path).require_run()


def test_only_a_run_that_never_started_is_removed(tmp_path: Path) -> None:
    fresh = make_run(tmp_path / "fresh")
    assert fresh.remove_if_empty_run()
    assert not fresh.path.exists()

    (tmp_path / "mine").mkdir()
    mine = make_run(tmp_path / "mine")
    assert mine.remove_if_empty_run()
    assert os.listdir(tmp_path / "mine") == []

    started = make_run(tmp_path / "started")
    with Recorder(started.events) as recorder:
        recorder.emit(Event.RUN_STARTED)
        recorder.emit(Event.STAGE_STARTED, stage=0)
    assert not started.remove_if_empty_run()

    saved = make_run(tmp_path / "saved")
    (saved.checkpoints / "stage-0").mkdir()
    assert not saved.remove_if_empty_run()
    assert saved.is_run()


def test_a_start_that_failed_leaves_what_its_launcher_wrote(tmp_path: Path) -> None:
    """A launcher on several machines renders scripts and opens the nodes' logs before."""
    run = RunDir(tmp_path)
    for folder in (run.launch, run.logs):
        folder.mkdir()
        (folder / "before").touch()
    run = make_run(tmp_path)
    run.discard()
    assert sorted(os.listdir(tmp_path)) == ["launch", "logs"]
    assert all((folder / "before").is_file() for folder in (run.launch, run.logs))


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (
        run.lock(),
        pytest.raises(RunFolderError, match=rf"pid {os.getpid()} on \S+"),
        RunDir(run.path).lock(),
    ):
        pass
    with run.lock():
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.lock_file.mkdir()
    with pytest.raises(RunFolderError, match=r"run: cannot open \.lock .*directory"), run.lock():
        pass


def test_a_worker_that_inherits_the_lock_keeps_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with run.lock() as descriptor:
        worker = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,)
        )
    try:
        with pytest.raises(RunFolderError, match="another process"), run.lock():
            pass
    finally:
        worker.communicate(b"\n", timeout=30)
    with run.lock():
        pass
