"""The local launcher with small fake workers: failures, signals, death of the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accrete.launch.failures import LaunchError
from accrete.launch.local import Patience, launch_local, worker_environment
from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.run_dir import RunDir

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from accrete.launch.failures import report_failure
from accrete.launch.worker import die_with_parent
from accrete.pipeline.errors import DataError, MethodError
from accrete.pipeline.run_dir import RunDir
die_with_parent()
rank = int(os.environ["RANK"])
run = RunDir(sys.argv[1])
(run.path / f"pid-{rank}").write_text(str(os.getpid()))
def fail(error):
    os._exit(report_failure(run, rank, error))
def others_started(count=2):
    while len(list(run.path.glob("pid-*"))) < count:
        time.sleep(0.01)
"""

LAUNCHER = """
import sys
from accrete.launch.failures import LaunchError
from accrete.launch.local import launch_local, Patience
from accrete.pipeline.run_dir import RunDir
run = RunDir(sys.argv[1])
try:
    with run.lock() as lock:
        launch_local(run, [str(run.path)], procs=2, device="cpu", lock=lock,
                     command=[sys.executable, sys.argv[2]],
                     patience=Patience(after_failure=0.3, after_signal=0.5,
                                       after_stop=float(sys.argv[3])))
except LaunchError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def worker_script(run: RunDir, body: str) -> Path:
    path = run.path.parent / "worker.py"
    path.write_text(PREAMBLE + body)
    return path


def launch(run: RunDir, body: str, procs: int = 2) -> None:
    launch_local(
        run,
        [str(run.path)],
        procs=procs,
        device="cpu",
        command=[sys.executable, str(worker_script(run, body))],
        patience=Patience(after_failure=0.3, after_signal=0.5),
    )


def start_launcher(run: RunDir, body: str, after_stop: float = 0.5) -> subprocess.Popen[str]:
    script = run.path.parent / "launcher.py"
    script.write_text(LAUNCHER)
    return subprocess.Popen(
        [
            sys.executable,
            str(script),
            str(run.path),
            str(worker_script(run, body)),
            str(after_stop),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def worker_pids(run: RunDir) -> list[int]:
    """Pids of both workers, once both have said theirs."""

    def texts() -> list[str]:
        return [path.read_text() for path in run.path.glob("pid-*")]

    wait_for(lambda: sum(bool(text) for text in texts()) == 2)
    return [int(text) for text in texts()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_success_and_the_environment_of_each_rank(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(
        run,
        """
import json
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM")
(run.path / f"env-{rank}").write_text(json.dumps({name: os.environ[name] for name in names}))
print("out of rank", rank)
print("err of rank", rank, file=sys.stderr)
""",
    )
    first, second = (json.loads((run.path / f"env-{rank}").read_text()) for rank in (0, 1))
    assert (first.pop("RANK"), first.pop("LOCAL_RANK")) == ("0", "0")
    assert (second.pop("RANK"), second.pop("LOCAL_RANK")) == ("1", "1")
    assert first == second
    assert (first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert first["DS_ACCELERATOR"] == "cpu"
    terminal = capfd.readouterr()
    assert terminal.out == "out of rank 0\n"
    assert terminal.err == "err of rank 0\n"
    assert run.rank_log(0).read_text() == "err of rank 0\n"
    assert "out of rank 1" in run.rank_log(1).read_text()
    assert "err of rank 1" in run.rank_log(1).read_text()


def test_the_users_own_thread_count_stands() -> None:
    assert worker_environment(2, "cpu", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    chosen = int(worker_environment(1, "cpu", {})["OMP_NUM_THREADS"])
    assert chosen == len(os.sched_getaffinity(0))
    assert worker_environment(4096, "cpu", {})["OMP_NUM_THREADS"] == "1"
    assert "DS_ACCELERATOR" not in worker_environment(1, "cuda", {})
    assert worker_environment(1, "cpu", {"HF_HOME": "/x"})["HF_HOME"] == "/x"


def test_one_failing_rank_ends_the_others_and_gives_its_message(run: RunDir) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(
            run,
            """
others_started()
if rank == 1:
    fail(DataError("tasks/a.jsonl:7: no field `output`."))
time.sleep(60)
""",
        )
    assert str(caught.value) == "tasks/a.jsonl:7: no field `output`."
    assert caught.value.exit_code == 2
    assert not any(alive(pid) for pid in worker_pids(run))


def test_the_first_failure_is_the_cause(run: RunDir) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(
            run,
            """
others_started()
if rank == 0:
    # Fails because of rank 1, but is noticed first: rank 1 takes its time to end.
    while not run.error_file(1).exists():
        time.sleep(0.01)
    fail(ConnectionError("peer closed the connection"))
report_failure(run, rank, MethodError("the Fisher is not finite"))
time.sleep(0.2)
os._exit(1)
""",
        )
    assert str(caught.value) == "the Fisher is not finite"
    assert caught.value.exit_code == 1


def test_an_unexpected_error_has_one_line_here_and_a_traceback_in_the_log(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(
            run,
            """
others_started()
if rank == 0:
    try:
        {}["key"]
    except KeyError as error:
        fail(error)
time.sleep(60)
""",
        )
    message = str(caught.value)
    assert message.startswith("rank 0 of 2 failed: KeyError: 'key'\n")
    assert str(run.rank_log(0)) in message
    assert "rank-*.log" in message
    assert caught.value.exit_code == 1
    assert "Traceback" not in capfd.readouterr().err
    assert "Traceback" in run.rank_log(0).read_text()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os._exit(7)", "status 7"),
    ],
)
def test_a_rank_that_dies_without_a_word(run: RunDir, end: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said) as caught:
        launch(run, f"others_started()\nif rank == 1:\n    {end}\ntime.sleep(60)\n")
    assert str(caught.value).startswith("rank 1 of 2 failed")
    assert caught.value.exit_code == 1


def test_an_old_error_file_is_not_taken_for_a_new_one(run: RunDir) -> None:
    run.error_file(0).write_text('{"time": 0, "message": "old"}')
    launch(run, "")
    assert not run.error_file(0).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_workers(run: RunDir, number: signal.Signals) -> None:
    launcher = start_launcher(
        run,
        """
def note(number, frame):
    (run.path / f"signal-{rank}").write_text(str(number))
    sys.exit(0)
for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(kind, note)
(run.path / f"ready-{rank}").touch()
time.sleep(60)
""",
    )
    wait_for(lambda: len(list(run.path.glob("ready-*"))) == 2)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number
    assert f"stopped by {number.name}" in errors
    assert "accrete resume" in errors
    assert [(run.path / f"signal-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_save_may_take_longer_than_an_end(run: RunDir, number: signal.Signals) -> None:
    script = """
def save(number, frame):
    time.sleep(1.5)
    (run.path / f"saved-{rank}").touch()
    sys.exit(0)
for kind in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(kind, save)
(run.path / f"ready-{rank}").touch()
time.sleep(60)
"""
    launcher = start_launcher(run, script, after_stop=20)
    wait_for(lambda: len(list(run.path.glob("ready-*"))) == 2)
    launcher.send_signal(number)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number
    assert len(list(run.path.glob("saved-*"))) == 2


def test_a_worker_deaf_to_signals_is_killed(run: RunDir) -> None:
    launcher = start_launcher(
        run,
        """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run.path / f"ready-{rank}").touch()
time.sleep(60)
""",
    )
    wait_for(lambda: len(list(run.path.glob("ready-*"))) == 2)
    pids = worker_pids(run)
    launcher.terminate()
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not any(alive(pid) for pid in pids)


def test_workers_die_with_a_killed_launcher_and_free_the_folder(run: RunDir) -> None:
    launcher = start_launcher(run, "time.sleep(60)")
    pids = worker_pids(run)
    with pytest.raises(RunFolderError, match=f"pid {launcher.pid}"), run.lock():
        pass
    launcher.kill()
    launcher.communicate(timeout=20)
    wait_for(lambda: not any(alive(pid) for pid in pids))
    with run.lock():
        pass


def test_a_worker_that_is_done_is_not_harmed_by_the_interpreters_end(run: RunDir) -> None:
    """A library's thread may abort there; the run is on disk, and its status must say so."""
    code = (
        "import atexit, os, sys\n"
        "from accrete.launch import execute, worker\n"
        "atexit.register(os.abort)\n"
        "execute.execute = lambda *arguments: print('done')\n"
        "sys.argv = ['worker', '--run-dir', sys.argv[1]]\n"
        "{}"
    )
    ends = {}
    for name, last in (("worker", "worker.main()"), ("control", "execute.execute()")):
        command = [sys.executable, "-c", code.format(last), str(run.path)]
        ends[name] = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ends["worker"].returncode == 0, ends["worker"].stderr
    assert ends["worker"].stdout == "done\n"
    assert ends["control"].returncode == -signal.SIGABRT
