"""Runs that go on in a new job, for none may be requeued, and branches that wait for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accrete.launch.cluster import attempts, chain, slurm
from accrete.launch.cluster.request import Branch, make_request, write_files
from accrete.launch.cluster.settings import ClusterConfig
from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.run_dir import RunDir


class PaperQueue:
    """Slurm's queue: jobs with their state, and what was submitted."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.asked: list[tuple[Path, list[str]]] = []

    def submit(self, script: Path, options: list[str]) -> str:
        self.asked.append((script, options))
        return str(100 + len(self.asked))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> PaperQueue:
    queue = PaperQueue()
    monkeypatch.setattr(slurm, "submit", queue.submit)
    monkeypatch.setattr(slurm, "job_state", queue.states.get)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    return queue


@pytest.fixture
def parent(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "parent")
    folder.launch.mkdir(parents=True)
    return folder


@pytest.fixture
def branch(parent: RunDir, tmp_path: Path) -> RunDir:
    request = make_request(
        "quickstart", [], tmp_path / "branch", ClusterConfig(), Branch(parent=parent.path, stage=1)
    )
    write_files(request, slurm.render(request))
    return request.folder


def test_the_new_job_is_noted(queue: PaperQueue, parent: RunDir) -> None:
    attempts.note_queued(parent, "7")
    assert chain.go_on(parent) == 0
    assert queue.asked == [(parent.launch / "job.sbatch", ["--dependency=afterany:7"])]
    assert attempts.queued_job(parent) == "101"


def test_an_element_of_an_array_is_followed_by_a_job_of_its_own(
    queue: PaperQueue, parent: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert chain.go_on(parent) == 0
    assert queue.asked == [(parent.launch / "job.sbatch", ["--dependency=afterany:7_2"])]


def test_a_new_job_is_no_element_and_has_not_been_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch would hand it this job's place and count, which its script reads."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv >{tmp_path}/variables\necho '8;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_ID"):
        monkeypatch.setenv(f"SLURM_{name}", "7")
    assert slurm.submit(tmp_path / "job.sbatch") == "8"
    given = (tmp_path / "variables").read_text()
    assert "SLURM_JOB_ID=7" in given
    assert "SLURM_ARRAY" not in given
    assert "SLURM_RESTART_COUNT" not in given


def test_a_branch_waits_for_its_parents_next_job(
    queue: PaperQueue, parent: RunDir, branch: RunDir
) -> None:
    attempts.note_queued(parent, "41_0")
    attempts.note_queued(parent, "50")
    queue.states["50"] = "PENDING"
    assert chain.await_parent(branch, 0) == 75
    options = ["--kill-on-invalid-dep=yes", "--dependency=afterok:50"]
    assert queue.asked == [(branch.launch / "job.sbatch", options)]
    assert attempts.queued_job(branch) == "101"


def test_a_branch_begins(queue: PaperQueue, parent: RunDir, branch: RunDir) -> None:
    attempts.note_queued(parent, "41_0")
    with pytest.raises(RunFolderError, match=r"after stage 1 .* no job works on it"):
        chain.await_parent(branch, 0)
    stage = parent.checkpoints / "stage-1" / "checkpoint.json"
    stage.parent.mkdir(parents=True)
    stage.touch()
    assert chain.await_parent(branch, 0) == 0  # started by hand, after its parent has failed
    queue.states["41_0"] = "COMPLETING"
    attempts.mark_finished(parent)
    assert chain.await_parent(branch, 0) == 0
    assert queue.asked == []


def test_a_branch_that_has_begun_needs_its_parent_no_more(
    queue: PaperQueue, branch: RunDir
) -> None:
    branch.recipe.touch()
    branch.run.touch()
    assert chain.await_parent(branch, 0) == 0
