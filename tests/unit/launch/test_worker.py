"""How a worker ends: with its status, whatever it can still write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from accrete.pipeline.run_dir import RunDir

WORKER = """
import atexit, os, sys
from accrete.launch import execute, worker
atexit.register(os.abort)  # the interpreter's farewell, which may wait for ever
def end(*arguments):
    print("done")
    {}
execute.execute = end
sys.argv = ["worker", "--run-dir", sys.argv[1]]
worker.main()
"""


def work(run: RunDir, last: str, out: IO[bytes] | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WORKER.format(last), str(run.path)],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )


def test_a_full_disk_under_its_output_does_not_make_a_failure_of_a_finished_run(
    tmp_path: Path,
) -> None:
    with Path("/dev/full").open("wb") as full:
        process = work(RunDir(tmp_path), "", full)
    assert process.returncode == 0


def test_where_no_word_of_a_failure_can_be_left_it_ends_all_the_same(tmp_path: Path) -> None:
    """As on a full disk. The launcher waits for the end, and so do the other ranks."""
    run = RunDir(tmp_path)
    run.logs.touch()  # no folder
    process = work(run, "raise MemoryError('the first cause')", subprocess.DEVNULL)
    assert process.returncode == 1
    assert "the first cause" in process.stderr
