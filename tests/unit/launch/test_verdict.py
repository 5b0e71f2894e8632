"""What follows an attempt, told from its markers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from accrete.launch.cluster import attempts
from accrete.launch.cluster.node import require_progress
from accrete.launch.cluster.verdict import Outcome, conclude, judge
from accrete.launch.failures import report_failure
from accrete.pipeline import fence
from accrete.pipeline.errors import DataError, RunFolderError
from accrete.pipeline.run_dir import RunDir, write_json

AGAIN, FAILED, FINISHED = Outcome.AGAIN, Outcome.FAILED, Outcome.FINISHED


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def save(folder: RunDir, name: str) -> None:
    path = folder.checkpoints / name / "checkpoint.json"
    path.parent.mkdir()
    write_json(path, {})


def test_progress_is_ordered(folder: RunDir) -> None:
    seen = [attempts.read_progress(folder)]
    for name in ("stage-0-step-9", "stage-0-step-10", "stage-0", "stage-1-step-2", "stage-10"):
        save(folder, name)
        seen.append(attempts.read_progress(folder))
    save(folder, "stage-12.bad")  # put aside by somebody
    assert attempts.read_progress(folder) == seen[-1]
    part = folder.partial / "10" / "0.json"
    part.parent.mkdir(parents=True)
    write_json(part, [])
    seen.append(attempts.read_progress(folder))
    (folder.checkpoints / ".stage-11.part").mkdir()
    assert seen == sorted(seen)
    assert len(set(seen)) == len(seen)
    assert str(seen[0]) == "nothing saved yet"
    assert str(seen[2]) == "saved up to stage 0, step 10; 0 stages scored"


def test_a_finished_run_is_finished_whatever_else_happened(folder: RunDir) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    report_failure(folder, 0, DataError("late"))
    attempts.mark_finished(folder)
    assert judge(folder, "a.0", retries=2, ending="cancel").outcome is FINISHED


def test_an_interrupted_attempt_is_started_again(folder: RunDir) -> None:
    token = attempts.begin_attempt(folder, "a.0", {})
    save(folder, "stage-0-step-7")
    attempts.mark_interrupted(folder, token, "interrupted by SIGTERM")
    verdict = judge(folder, "a.0", retries=0)
    assert verdict.outcome is AGAIN
    assert "SIGTERM" in verdict.reason
    assert "stage 0, step 7" in verdict.reason
    assert judge(folder, "a.0", retries=0, ending="cancel").outcome is FAILED


def test_the_marker_of_an_earlier_attempt_does_not_count(folder: RunDir) -> None:
    old = attempts.begin_attempt(folder, "a.0", {})
    attempts.begin_attempt(folder, "a.1", {})
    attempts.mark_interrupted(folder, old, "interrupted by SIGTERM")
    assert "vanished" in judge(folder, "a.1", retries=2).reason


def test_a_reason_of_its_own_is_final(folder: RunDir) -> None:
    token = attempts.begin_attempt(folder, "a.0", {})
    report_failure(folder, 1, DataError("rows.jsonl:3: no output"))
    report_failure(folder, 0, RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4"))
    attempts.mark_interrupted(folder, token, "interrupted by SIGTERM")  # torchrun ends the others
    verdict = judge(folder, "a.0", retries=2)
    assert verdict.outcome is FAILED
    assert verdict.reason == "rank 1 failed: rows.jsonl:3: no output"


def test_a_rank_that_only_lost_its_peers_is_no_cause(folder: RunDir) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    report_failure(folder, 0, RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4"))
    assert judge(folder, "a.0", retries=2).outcome is AGAIN
    assert "lost node2" in judge(folder, "a.0", retries=2, lost="node2").reason


def said(folder: RunDir, kind: str, message: str) -> None:
    """Rank 0 has failed with an error that accrete did not expect."""
    report_failure(folder, 0, type(kind, (Exception,), {})(message))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RuntimeError", "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms"),
        ("RuntimeError", "Failed to recv, got 0 bytes. Connection was likely closed."),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled system error"),
        ("DistNetworkError", "The client socket has timed out after 60000ms while trying to ..."),
        ("DistNetworkError", "The server socket has failed to listen: Address already in use"),
        ("DistStoreError", "Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
        ("ConnectionResetError", "[Errno 104] Connection reset by peer"),
    ],
)
def test_what_a_rank_says_whose_peers_have_gone(folder: RunDir, kind: str, message: str) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    said(folder, kind, message)
    verdict = judge(folder, "a.0", retries=2)
    assert verdict.outcome is AGAIN
    assert f"rank 0 failed: {kind}: {message}" in verdict.reason


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RuntimeError", "[gloo/transport/tcp/device.cc:84] Unable to find address for: ib0"),
        ("DistBackendError", "NCCL error in: x.cpp:9, invalid usage (run with NCCL_DEBUG=WARN)"),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:9, unhandled cuda error"),
        ("FileNotFoundError", "[Errno 2] No such file or directory: '/big/store/rows.jsonl'"),
        ("KeyError", "'timeout'"),
        ("RuntimeError", "cannot restore the datastore's timeouts"),
        ("OutOfMemoryError", "CUDA out of memory while in gloo"),
    ],
)
def test_an_error_of_its_own_that_speaks_of_the_network(
    folder: RunDir, kind: str, message: str
) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    said(folder, kind, message)
    verdict = judge(folder, "a.0", retries=2)
    assert verdict.outcome is FAILED
    assert verdict.reason == f"rank 0 failed: {kind}: {message}"


def test_a_line_that_was_cut_off_does_not_take_the_next_one_along(folder: RunDir) -> None:
    attempts.note_submitted(folder)
    path = folder.launch / attempts.ATTEMPTS_FILE
    path.write_text(path.read_text() + '{"time": 1, "eve')
    attempts.begin_attempt(folder, "job.1", {})
    assert attempts.begun(folder, "job.1") is not None
    assert [line["event"] for line in attempts.read_attempts(folder)] == ["submitted", "begun"]


def test_an_attempt_that_never_began(folder: RunDir) -> None:
    verdict = judge(folder, "a.0", retries=1)
    assert verdict.outcome is AGAIN
    assert "no process of this attempt ever began" in verdict.reason


def test_no_endless_requeue_without_progress(folder: RunDir) -> None:
    attempts.note_submitted(folder)
    outcomes = []
    for number in range(3):
        attempts.begin_attempt(folder, f"a.{number}", {})
        outcomes.append(conclude(folder, f"a.{number}", retries=2, ending="limit"))
    assert [x.outcome for x in outcomes] == [AGAIN, AGAIN, FAILED]
    assert "3 attempts in a row have brought nothing" in outcomes[-1].reason
    # A person who launches it again starts the count anew; and so does progress.
    attempts.note_submitted(folder)
    for number in range(3, 7):
        attempts.begin_attempt(folder, f"a.{number}", {})
        save(folder, f"stage-0-step-{number}")
        assert conclude(folder, f"a.{number}", retries=0, ending="limit").outcome is AGAIN


def test_attempts_that_nobody_judged_count_too(folder: RunDir) -> None:
    """Slurm requeues by itself when a node dies: no script is left to judge."""
    for number in range(3):
        require_progress(folder, 2)
        attempts.begin_attempt(folder, f"a.{number}", {})
    with pytest.raises(RunFolderError, match="3 attempts in a row have brought nothing"):
        require_progress(folder, 2)
    save(folder, "stage-0-step-5")
    require_progress(folder, 2)


def test_an_attempt_that_was_taken_over_is_not_tried_again(folder: RunDir) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    attempts.begin_attempt(folder, "b.0", {})
    verdict = judge(folder, "a.0", retries=2)
    assert verdict.outcome is FAILED
    assert "b.0" in verdict.reason


def test_a_new_attempt_fences_the_old_one_off(folder: RunDir) -> None:
    old = fence.Fence(folder.owner, attempts.begin_attempt(folder, "a.0", {}))
    old.check()
    new = fence.Fence(folder.owner, attempts.begin_attempt(folder, "a.1", {}))
    new.check()
    old.check(always=False)  # the last look was a moment ago
    with pytest.raises(fence.FencedError, match=r"taken over by attempt a\.1"):
        old.check()
    fence.Fence(folder.owner, None).check()


def test_a_token_that_is_cut_is_read_again(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another node of some file systems sees a replaced file: as long as the old one was."""
    token = attempts.begin_attempt(folder, "a.10", {})
    whole = folder.owner.read_text()
    folder.owner.write_text(whole[:-2])
    looks = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            folder.owner.write_text(whole)

    monkeypatch.setattr(fence.time, "sleep", wait)
    assert fence.read_owner(folder.owner) == token
    assert len(looks) == 3
    folder.owner.write_text("by hand")  # no line break ever comes
    assert fence.read_owner(folder.owner, patience=0.0) == "by hand"


def test_going_on_by_hand_takes_the_run_over(folder: RunDir) -> None:
    assert attempts.take_over(folder) == {}
    old = fence.Fence(folder.owner, attempts.begin_attempt(folder, "slurm-1.0", {}))
    variables = attempts.take_over(folder)
    fence.Fence(folder.owner, variables["ACCRETE_TOKEN"]).check()
    with pytest.raises(fence.FencedError):
        old.check()


def test_scripts_read_the_exit_status(folder: RunDir) -> None:
    attempts.begin_attempt(folder, "a.0", {})
    command = [sys.executable, "-m", "accrete.launch.cluster.verdict", "--run-dir", folder.path]
    done = subprocess.run(
        [*command, "--attempt", "a.0", "--ending", "limit"], capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stdout.startswith("accrete: again: the time limit came")
    assert attempts.read_attempts(folder)[-1]["outcome"] == "again"
