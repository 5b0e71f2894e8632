"""Real ssh between network namespaces: cut links, lost machines, Ctrl-C, a killed launcher."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from virtual import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

SILENCE_S = 10
GRACE_S = 20
ENGINE = "torch.distributed.run"


class Hosts:
    """`accrete launch hosts` as typed on the login node."""

    def __init__(self, cluster, environment, settings: Path) -> None:
        self.cluster, self.environment, self.settings = cluster, environment, settings

    def start(self, recipe, run_dir: Path, hosts: str, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "accrete.launch.cli", "launch", "hosts", recipe]
        options = ["--hosts", hosts, "--cluster", self.settings, "--run-dir", run_dir]
        output = (run_dir.parent / "launcher.log").open("a")
        return self.cluster.popen(
            "ctl",
            [*command, *options, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # As in a terminal: what a shell starts in the background ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def signal(self, name: str) -> None:
        """To the command itself, as a terminal sends it."""
        self.cluster.run("ctl", ["pkill", f"-{name}", "-f", "accrete.launch.cli launch hosts"])

    def left(self, *nodes: str) -> list[str]:
        """Processes of the run on these nodes; a cut link does not keep anybody from looking."""
        marks = (ENGINE, "accrete.launch", "launch/node.sh")
        return [line for n in nodes for mark in marks for line in self.cluster.processes(n, mark)]


@pytest.fixture(scope="module")
def hosts(vcluster, environment, tmp_path_factory) -> Hosts:
    settings = tmp_path_factory.mktemp("settings") / "hosts.yaml"
    content = {
        "procs_per_node": 1,
        "device": "cpu",
        "grace_s": GRACE_S,
        "storage": {"local": str(vcluster.local), "cache": environment["ACCRETE_CACHE"]},
        "env": {"OMP_NUM_THREADS": "1"},
        "hosts": {"ssh_options": [f"-F {vcluster.ssh_config}"], "silence_s": SILENCE_S},
    }
    settings.write_text(json.dumps(content))
    return Hosts(vcluster, environment, settings)


def story(run: Path) -> str:
    files = [run.parent / "launcher.log", run / "launch" / "attempts.jsonl"]
    files += sorted(run.glob("logs/node-*.log"))
    return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in files if p.exists())


def lines(path: Path, kind: str) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [x for x in found if x["event"] == kind]


def attempts(run: Path, kind: str) -> list[dict]:
    return lines(run / "launch" / "attempts.jsonl", kind)


def wait_for_checkpoint(run: Path, more_than: int = 0) -> int:
    def count() -> int:
        return len(lines(run / "events.jsonl", "checkpoint"))

    wait_until(lambda: count() > more_than, 240, lambda: story(run))
    return count()


def ended(launcher: subprocess.Popen, seconds: float, run: Path) -> int:
    wait_until(lambda: launcher.poll() is not None, seconds, lambda: story(run))
    return launcher.returncode


def test_a_cut_link_leaves_nobody_behind_and_the_run_goes_on_when_it_is_healed(
    hosts, recipe, undisturbed, require_same, tmp_path
):
    run = tmp_path / "run"
    launcher = hosts.start(recipe, run, "node1,node2")
    wait_for_checkpoint(run)
    began = time.monotonic()
    hosts.cluster.cut("node2")
    try:
        # Nobody can tell node2 anything any more: it ends its processes by itself.
        limit = SILENCE_S + GRACE_S + 15
        wait_until(lambda: not hosts.left("node1", "node2"), limit, lambda: story(run))
        print(f"no process left {time.monotonic() - began:.0f} s after the cut")
        wait_until(lambda: attempts(run, "judged"), 30, lambda: story(run))
        assert "node2" in attempts(run, "judged")[0]["reason"], story(run)
        assert launcher.poll() is None, story(run)
    finally:
        hosts.cluster.heal("node2")
    assert ended(launcher, 400, run) == 0, story(run)
    assert [x["outcome"] for x in attempts(run, "judged")] == ["again", "finished"]
    assert not hosts.left("ctl", "node1", "node2")
    require_same(run, undisturbed)


def test_ctrl_c_saves_and_the_same_command_goes_on_with_a_spare_for_a_dead_machine(
    hosts, recipe, undisturbed, require_same, tmp_path
):
    run = tmp_path / "run"
    words = (recipe, run, "node1,node2,node3", "--nodes", "2")
    launcher = hosts.start(*words)
    saved = wait_for_checkpoint(run)
    hosts.signal("INT")
    assert ended(launcher, GRACE_S + 40, run) == 130, story(run)
    assert not hosts.left("ctl", "node1", "node2", "node3")
    assert (run / "launch" / "interrupted.json").exists(), story(run)
    assert "same command" in (tmp_path / "launcher.log").read_text()

    launcher = hosts.start(*words)
    wait_for_checkpoint(run, more_than=saved + 1)
    hosts.cluster.kill("node2")
    try:
        assert ended(launcher, 400, run) == 0, story(run)
        assert not hosts.left("ctl", "node1", "node3")
    finally:
        hosts.cluster.boot("node2")
    assert "lost node2" in attempts(run, "judged")[1]["reason"], story(run)
    assert "node1 node3" in (tmp_path / "launcher.log").read_text()
    require_same(run, undisturbed)


def test_a_launcher_that_is_killed_takes_all_nodes_with_it(hosts, recipe, tmp_path):
    run = tmp_path / "run"
    launcher = hosts.start(recipe, run, "node1,node2")
    wait_until(lambda: lines(run / "events.jsonl", "step"), 240, lambda: story(run))
    hosts.signal("KILL")
    launcher.wait(timeout=20)
    wait_until(lambda: not hosts.left("ctl", "node1", "node2"), 60, lambda: story(run))
    assert (run / "launch" / "interrupted.json").exists(), story(run)


def test_a_machine_that_is_not_there_and_a_folder_that_is_not_shared(hosts, recipe, tmp_path):
    run = tmp_path / "run"
    launcher = hosts.start(recipe, run, "node1,node9")
    assert ended(launcher, 120, run) == 75, story(run)
    assert "no answer from node9" in (tmp_path / "launcher.log").read_text()

    unshared = hosts.cluster.local / "run"  # each node has a folder of its own there
    launcher = hosts.start(recipe, unshared, "node1,node2")
    assert ended(launcher, 120, tmp_path / "run") == 2
    log = (hosts.cluster.local / "launcher.log").read_text()
    assert "node1 does not see" in log
    assert "file system that all share" in log
