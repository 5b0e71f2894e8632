"""A real Slurm on a virtual cluster: limits, preemption, lost nodes, cancels, crashes, sweeps."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from virtual import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Slurm:
    """`accrete launch slurm` as typed on the login node."""

    def __init__(self, cluster, environment, folder: Path) -> None:
        self.cluster, self.environment = cluster, environment
        self.settings = self._write(folder / "virtual.yaml", step_seconds=0.1)
        self.slow = self._write(folder / "slow.yaml", step_seconds=0.25)

    def _write(self, path: Path, step_seconds: float) -> Path:
        content = {
            "nodes": 2,
            "procs_per_node": 1,
            "device": "cpu",
            "grace_s": 10,
            "retries": 5,
            "storage": {"local": str(self.cluster.local)},
            "env": {"STEP_SECONDS": str(step_seconds)},
        }
        path.write_text(json.dumps(content))
        return path

    def accrete(self, *words, check=True, **more):
        return self.cluster.run(
            "ctl",
            [sys.executable, "-m", "accrete.launch.cli", *words],
            env={**self.environment, **more},
            check=check,
        )

    def submit(self, recipe, run_dir, *words, settings: Path | None = None, **more) -> str:
        options = ("--cluster", settings or self.settings, "--run-dir", run_dir)
        done = self.accrete("launch", "slurm", recipe, *words, *options, **more)
        assert done.stdout.startswith("job "), done.stdout
        return done.stdout.split()[1].rstrip(":")

    def state(self, job: str) -> str:
        return self.cluster.job(job).get("JobState", "?")

    def wait(self, job: str, seconds: float, run_dir: Path) -> str:
        wait_until(lambda: self.state(job) in ENDED, seconds, lambda: story(run_dir))
        return self.state(job)

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])


@pytest.fixture(scope="module")
def slurm(vcluster, environment, tmp_path_factory) -> Slurm:
    return Slurm(vcluster, environment, tmp_path_factory.mktemp("settings"))


@pytest.fixture(autouse=True)
def _all_nodes(vcluster):
    vcluster.run("ctl", ["scancel", "--user", "root"])
    vcluster.wait_idle(3)


def story(run_dir: Path) -> str:
    """What a run folder says about its attempts."""
    files = [*sorted(run_dir.glob("launch/*.out")), run_dir / "launch" / "attempts.jsonl"]
    return "\n".join(f"--- {p.name}\n{p.read_text()[-4000:]}" for p in files if p.exists())


def attempts(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "launch" / "attempts.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == kind]


def events(run_dir: Path, kind: str) -> list[dict]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [x for x in map(json.loads, lines) if x["event"] == kind]


def test_cut_by_the_time_limit_and_robbed_of_a_node(
    slurm, recipe, undisturbed, require_same, tmp_path
):
    run = tmp_path / "run"
    job = slurm.submit(recipe, run, "--time", "1", settings=slurm.slow)
    wait_until(lambda: slurm.restarts(job) >= 1, 150, lambda: story(run))
    assert attempts(run, "judged")[0]["outcome"] == "again", story(run)
    assert "SIGUSR1" in attempts(run, "judged")[0]["reason"]
    # One limit is enough to see: the rest of the run gets more time.
    slurm.cluster.run("ctl", ["scontrol", "update", f"JobId={job}", "TimeLimit=30"])
    wait_until(lambda: len(attempts(run, "begun")) >= 2, 150, lambda: story(run))
    before = len(events(run, "checkpoint"))
    wait_until(lambda: len(events(run, "checkpoint")) > before, 120, lambda: story(run))
    slurm.cluster.kill("node2")
    try:
        assert slurm.wait(job, 300, run) == "COMPLETED", story(run)
        assert slurm.cluster.job(job)["NodeList"] == "node[1,3]"
    finally:
        slurm.cluster.boot("node2")
    require_same(run, undisturbed)
    # The last steps before the power went were not saved, and are made again: to the bit.
    assert not [x for x in events(run, "warning") if "replayed" in x["message"]]
    again = slurm.accrete("launch", "slurm", recipe, "--cluster", slurm.settings, "--run-dir", run)
    assert "finished" in again.stdout


def test_preempted_by_a_more_urgent_job(slurm, recipe, undisturbed, require_same, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit(recipe, run, "--time", "30")
    wait_until(lambda: events(run, "checkpoint"), 120, lambda: story(run))
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N3", "-t1", "-o", "/dev/null"]
    other = slurm.cluster.run("ctl", [*urgent, "--exclusive", "--wrap", "srun sleep 2"]).stdout
    assert slurm.wait(other.strip(), 120, run) == "COMPLETED"
    assert slurm.wait(job, 240, run) == "COMPLETED", story(run)
    assert slurm.restarts(job) == 1
    judged = attempts(run, "judged")
    assert [x["outcome"] for x in judged] == ["again", "finished"], story(run)
    assert "SIGTERM" in judged[0]["reason"]
    require_same(run, undisturbed)


def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm, recipe, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit(recipe, run, "--time", "30")
    wait_until(lambda: events(run, "step"), 120, lambda: story(run))
    twice = slurm.accrete(
        "launch", "slurm", recipe, "--cluster", slurm.settings, "--run-dir", run, check=False
    )
    assert twice.returncode == 2
    assert f"job {job} of this run is running already" in twice.stderr
    made = events(run, "step")[-1]["step"]
    slurm.cluster.run("ctl", ["scancel", job])
    assert slurm.wait(job, 60, run) == "CANCELLED"
    slurm.cluster.wait_idle(3)
    assert slurm.restarts(job) == 0
    saved = events(run, "checkpoint")[-1]
    assert saved["step"] >= made
    assert (run / saved["path"] / "checkpoint.json").is_file()


def test_a_crash_of_its_own_is_not_tried_again(slurm, recipe, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit(recipe, run, "train.learning_rate=1e30")
    assert slurm.wait(job, 120, run) == "FAILED", story(run)
    assert slurm.restarts(job) == 0
    judged = attempts(run, "judged")[-1]
    assert judged["outcome"] == "failed"
    assert "the weights were not changed" in judged["reason"]


def test_a_second_writer_is_fenced_off(slurm, recipe, undisturbed, require_same, tmp_path):
    """Slurm loses sight of a node whose processes live on, and starts the run elsewhere."""
    run = tmp_path / "run"
    options = ("--nodes", "1", "--procs-per-node", "2")
    job = slurm.submit(recipe, run, *options, "train.max_steps=600")
    wait_until(lambda: events(run, "checkpoint"), 120, lambda: story(run))
    old = slurm.cluster.job(job)["NodeList"]
    try:
        slurm.cluster.run(old, ["pkill", "-KILL", "-x", "slurmd"])
        wait_until(lambda: len(attempts(run, "begun")) == 2, 120, lambda: story(run))
        new = attempts(run, "begun")[1]["host"]
        assert new != old
        wait_until(
            lambda: not slurm.cluster.processes(old, "accrete.launch.worker"),
            20,
            "the old processes do not end",
        )
        wait_until(lambda: events(run, "resumed"), 120, lambda: story(run))
        assert slurm.cluster.processes(new, "accrete.launch.worker")
        assert slurm.state(job) == "RUNNING"
    finally:
        slurm.cluster.run("ctl", ["scancel", job])
        slurm.wait(job, 60, run)
        slurm.cluster.kill(old)
        slurm.cluster.boot(old)
    assert "was taken over by attempt" in (run / "logs" / "rank-0.log").read_text()
    steps = [(x["stage"], x["step"]) for x in events(run, "step")]
    assert len(steps) == len(set(steps))


FORBIDDEN = """#!/bin/bash
if [ "$1" = requeue ]; then echo "forbidden here" >&2; exit 1; fi
exec {scontrol} "$@"
"""


def test_a_sweep_learns_common_stages_once(slurm, recipe, require_same, tmp_path):
    """Two orders with the same first task: the second branches off from the first, which goes on in
    a job of its own after an interruption, for requeueing is forbidden."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(FORBIDDEN.format(scontrol=shutil.which("scontrol")))
    scontrol.chmod(0o755)
    content = json.loads(recipe.read_text())
    content["train"]["max_steps"] = 20
    first, second = tmp_path / "abc.yaml", tmp_path / "acb.yaml"
    first.write_text(json.dumps(content))
    one, two, three = content["tasks"]
    second.write_text(json.dumps({**content, "tasks": [one, three, two]}))
    sweep = ("--sweep", f"recipe={first},{second}", "--sweep", "seed=0")
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    job = slurm.submit(first, tmp_path / "sweep", *sweep, PATH=path)
    parent, last = (tmp_path / "sweep" / f"{name}-seed0" for name in ("abc", "acb"))
    wait_until(lambda: events(parent, "step"), 120, lambda: story(parent))
    slurm.cluster.run("ctl", ["scancel", "--signal=TERM", job])  # the trainers, as preemption does
    wait_until(lambda: len(attempts(parent, "queued")) == 2, 120, lambda: story(parent))
    wait_until(lambda: (last / "launch" / "finished.json").exists(), 240, lambda: story(last))
    assert [x["outcome"] for x in attempts(parent, "judged")] == ["again", "finished"]
    waited = [x["job"] for x in attempts(last, "queued")]
    assert len(waited) == 2, story(last)
    assert slurm.state(waited[0]) == "COMPLETED"
    assert json.loads((last / "lineage.json").read_text())["stage"] == 0
    trained = [(x["stage"], x["task"]) for x in events(last, "stage_started")]
    assert trained == [(0, "one"), (1, "three"), (2, "two")]
    assert len(attempts(last, "begun")) == 1
    alone = tmp_path / "alone"
    slurm.accrete("run", second, "--run-dir", alone)
    require_same(last, alone)


def test_elements_of_a_sweep_are_interrupted_one_by_one(slurm, recipe, tmp_path):
    """By its number alone Slurm takes one of the elements for the whole array."""
    sweep = tmp_path / "sweep"
    job = slurm.submit(recipe, sweep, "--sweep", "seed=0,1", "--nodes", "1", "--time", "30")
    runs = [sweep / "seed0", sweep / "seed1"]
    wait_until(lambda: all(events(run, "step") for run in runs), 120, lambda: story(runs[0]))
    name = f"slurm-{job.partition('_')[0]}.0"
    runs.sort(key=lambda run: attempts(run, "begun")[0]["attempt"] != name)
    first, other = runs
    assert attempts(first, "begun")[0]["attempt"] == name
    element = attempts(first, "queued")[0]["job"]
    slurm.cluster.run("ctl", ["scancel", "--batch", "--signal=USR1", element])
    outcomes = lambda run: [x["outcome"] for x in attempts(run, "judged")]  # noqa: E731
    ended = lambda: all(outcomes(run)[-1:] == ["finished"] for run in runs)  # noqa: E731
    wait_until(ended, 300, lambda: story(first) + story(other))
    assert outcomes(first) == ["again", "finished"]
    assert len(attempts(first, "queued")) == 1  # requeued, not followed by another job
    assert len(attempts(other, "begun")) == 1, story(other)


def test_bad_input_is_refused_before_anything_is_queued(slurm, recipe, tmp_path):
    run = tmp_path / "run"
    options = ("--cluster", slurm.settings, "--run-dir", run)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for words in (
        ("train.learning_rat=1",),
        (f"tasks.two.files.train={empty}",),
        ("--nodes", "99"),
    ):
        done = slurm.accrete("launch", "slurm", recipe, *words, *options, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not run.exists()
    assert slurm.cluster.run("ctl", ["squeue", "-h"]).stdout == ""
