"""hosts.sh and node.sh with an ssh and a trainer that only pretend: attempts, signals, lifeline."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.launch.cluster import hosts
from accrete.launch.cluster.request import LaunchRequest, make_request, write_files
from accrete.launch.cluster.settings import ClusterConfig, HostsConfig
from accrete.pipeline.errors import RunFolderError

SSH = """#!/bin/bash
# Drops the options, notes the host, and runs the command right here.
while :; do
  case $1 in
    -G) echo "hostname $2"; exit 0 ;;
    -o) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
host=$1
shift
if [ -e "{folder}/dead-$host" ]; then echo "ssh: connect to host $host: no route" >&2; exit 255; fi
export FAKE_HOST=$host
bash -c "$*" <&0 &
pid=$!
while kill -0 $pid 2>/dev/null; do
  if [ -e "{folder}/dead-$host" ]; then pkill -9 -P $pid; kill -9 $pid; exit 255; fi
  sleep 0.2
done </dev/null
wait $pid
"""

TRAINER = """#!/bin/bash
# In place of `python -m accrete.launch.cluster.node`: begins an attempt, then does what it is told.
trap 'touch "{folder}/saved-$NODE_RANK"; kill $!; exit 143' TERM
say() {{ printf '%s ' "$FAKE_HOST" "$NODE_RANK" "$NNODES" "$NPROC_PER_NODE" "$MASTER_ADDR"; }}
say >>"{folder}/places"
if [ "$NODE_RANK" = 0 ]; then
  {python} -c '
import sys
from accrete.launch.cluster import attempts
from accrete.pipeline.run_dir import RunDir
attempts.begin_attempt(RunDir(sys.argv[1]), sys.argv[2], {{}})' "{run}" "$ACCRETE_ATTEMPT"
fi
echo "output of $FAKE_HOST"
{body}
"""

FINISH = 'mkdir -p "{run}/launch"; echo "{{}}" >"{run}/launch/finished.json"'
WAIT = 'touch "{folder}/ready-$NODE_RANK"; sleep 60 & wait $!'


class Stage:
    """A run folder with rendered scripts, and fakes in front of the real programs."""

    def __init__(self, folder: Path, body: str, **settings: object) -> None:
        self.folder = folder
        self.run = folder / "run"
        values = {"folder": folder, "run": self.run, "python": sys.executable}
        self._program("bin/ssh", SSH.format(**values))
        self._program("trainer", TRAINER.format(body=body.format(**values), **values))
        cluster = ClusterConfig(
            nodes=2,
            grace_s=2,
            python=str(folder / "trainer"),
            hosts=HostsConfig(hosts=["one", "two", "three"], silence_s=2, wait_s=0),
        )
        self.request: LaunchRequest = make_request(
            "quickstart", [], self.run, replace(cluster, **settings)
        )
        write_files(self.request, hosts.render(self.request))
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def _program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.request.launch_dir / "hosts.sh")],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            # As in a terminal: a suite in the background ignores it, and bash cannot trap that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def node(self) -> subprocess.Popen[bytes]:
        """node.sh alone, with its lifeline in our hands."""
        words = ["one", "0", "2", "one", "29500", "attempt"]
        return subprocess.Popen(
            ["bash", str(self.request.launch_dir / "node.sh"), *words],
            env={**self.environment, "FAKE_HOST": "one"},
            stdin=subprocess.PIPE,
        )

    def places(self) -> list[str]:
        path = self.folder / "places"
        words = path.read_text().split() if path.exists() else []
        return [" ".join(words[i : i + 5]) for i in range(0, len(words), 5)]

    def outcomes(self) -> list[str]:
        lines = (self.run / "launch" / "attempts.jsonl").read_text().splitlines()
        return [x["outcome"] for x in map(json.loads, lines) if x["event"] == "judged"]


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


def test_every_node_gets_its_place_and_a_log(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FINISH, procs_per_node=3)
    done = stage.start()
    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert sorted(stage.places()) == ["one 0 2 3 one", "two 1 2 3 one"]
    assert stage.outcomes() == ["finished"]
    # Only the first node has the terminal; each has a log.
    assert "output of one" in said
    assert "output of two" not in said
    assert "output of one" in (stage.run / "logs" / "node-0.log").read_text()
    assert "output of two" in (stage.run / "logs" / "node-1.log").read_text()


def test_a_lost_machine_is_replaced_by_a_spare(tmp_path: Path) -> None:
    stage = Stage(tmp_path, '[ -e "{folder}/dead-two" ] || {{ ' + WAIT + "; }}\n" + FINISH)
    launcher = stage.start()
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    (tmp_path / "dead-two").touch()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, said
    assert sorted(stage.places()[2:]) == ["one 0 2 1 one", "three 1 2 1 one"]
    assert stage.outcomes() == ["again", "finished"]
    assert "lost two" in said


def test_too_few_machines(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FINISH)
    for host in ("two", "three"):
        (tmp_path / f"dead-{host}").touch()
    launcher = stage.start()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 75
    assert "no answer from two three (ssh: connect to host three: no route)" in said
    assert "the same command goes on" in said
    assert stage.places() == []


def test_a_failing_node_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PATIENCE_S", 1)
    body = 'if [ "$NODE_RANK" = 1 ]; then echo "no GPU here"; exit 1; fi; exec sleep 60'
    stage = Stage(tmp_path, body, retries=0)
    began = time.monotonic()
    launcher = stage.start()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, said
    assert time.monotonic() - began < 45
    assert "two ended with status 1: no GPU here" in said
    assert stage.outcomes()[-1] == "failed"


def test_ctrl_c_lets_the_nodes_save(tmp_path: Path) -> None:
    stage = Stage(tmp_path, WAIT)
    launcher = stage.start()
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, said
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert "the same command goes on from here" in said


def test_the_time_limit_lets_the_nodes_save(tmp_path: Path) -> None:
    stage = Stage(tmp_path, WAIT, time="0:06")
    launcher = stage.start()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, said
    assert "the time limit is near" in said
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_only_one_launcher_at_a_time(tmp_path: Path) -> None:
    stage = Stage(tmp_path, WAIT)
    first = stage.start()
    wait_for(stage.places)
    second = stage.start()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "another hosts.sh" in said
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_files_of_a_run_at_work_stay_as_they_are(tmp_path: Path, dry_run: bool) -> None:
    """Its machines read them at every attempt."""
    stage = Stage(tmp_path, FINISH)
    launch = stage.request.launch_dir
    before = {path.name: path.read_text() for path in launch.iterdir()}
    options = ["--hosts", "one,two", "--run-dir", str(stage.run), *(["--dry-run"] * dry_run)]
    command = ["launch", "hosts", "quickstart", "train.learning_rate=0.5", *options]
    with (launch / "hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = CliRunner().invoke(app, command)
    if dry_run:
        assert done.exit_code == 0
        assert "nodes=2" in done.stdout
        assert "a hosts.sh is at work on this run already" in done.stderr
    else:
        assert isinstance(done.exception, RunFolderError)
    assert {x.name: x.read_text() for x in launch.iterdir() if x.suffix != ".lock"} == before


@pytest.mark.parametrize(("status", "outcome"), [(9, 2), (1, 0), (127, 0)])
def test_a_file_system_without_locks(tmp_path: Path, status: int, outcome: int) -> None:
    """Only a lock that somebody else has is a reason to refuse."""
    stage = Stage(tmp_path, FINISH)
    stage._program("bin/flock", f"#!/bin/sh\nexit {status}\n")
    launcher = stage.start()
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == outcome, said
    assert ("another hosts.sh is at work" in said) == (outcome == 2)
    assert ("warning: " in said and "cannot be locked" in said) == (outcome == 0)


@pytest.mark.parametrize("silent", [True, False], ids=["silence", "end"])
def test_a_node_without_its_lifeline_ends_even_a_deaf_trainer(tmp_path: Path, silent: bool) -> None:
    stage = Stage(tmp_path, "trap '' TERM; touch {folder}/ready; exec sleep 60")
    node = stage.node()
    assert node.stdin is not None
    for _ in range(3):
        node.stdin.write(b"run\n")
        node.stdin.flush()
        time.sleep(0.5)
    wait_for((tmp_path / "ready").exists)
    assert node.poll() is None
    began = time.monotonic()
    if not silent:
        node.stdin.close()
    assert node.wait(timeout=120) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 20


def test_a_living_lifeline_keeps_a_node_going(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "sleep 4")
    node = stage.node()
    assert node.stdin is not None
    while node.poll() is None:
        node.stdin.write(b"run\n")
        node.stdin.flush()
        time.sleep(0.5)
    assert node.returncode == 0
