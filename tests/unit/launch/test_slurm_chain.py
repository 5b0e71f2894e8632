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

SILENCE = "Unable to contact slurm controller"


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


def test_a_branch_does_not_take_silence_for_its_parents_end(
    queue: PaperQueue, parent: RunDir, branch: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts.note_queued(parent, "50")
    stage = parent.checkpoints / "stage-1" / "checkpoint.json"
    stage.parent.mkdir(parents=True)
    stage.touch()  # and the parent goes on
    states = iter([SILENCE, SILENCE, "RUNNING"])

    def job_state(job: str) -> str:
        state = next(states)
        if state is SILENCE:
            raise slurm.SlurmError(state)
        return state

    monkeypatch.setattr(slurm, "job_state", job_state)
    monkeypatch.setattr(chain.time, "sleep", lambda seconds: None)
    assert chain.await_parent(branch, 60) == 75
    states = iter([SILENCE] * 2)
    monkeypatch.setattr(chain.time, "monotonic", iter([0.0, 50.0, 61.0]).__next__)
    with pytest.raises(slurm.SlurmError, match=SILENCE):
        chain.await_parent(branch, 60)


def test_only_slurm_says_that_a_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answer(said: str, status: int) -> str | None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{said}\nexit {status}\n")
        (tmp_path / "squeue").chmod(0o755)
        return slurm.job_state("41_0")

    assert answer("echo RUNNING", 0) == "RUNNING"
    assert answer("", 0) is None
    assert answer("echo 'slurm_load_jobs error: Invalid job id specified' >&2", 1) is None
    with pytest.raises(slurm.SlurmError, match=f"whether job 41_0 is still there: .*{SILENCE}"):
        answer(f"echo 'slurm_load_jobs error: {SILENCE}' >&2", 1)


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
