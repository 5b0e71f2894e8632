"""Every index of a rendered Indexed Job, run as an emulated pod, to the end of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pods import IndexedJob
from ruamel.yaml import YAML

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def submit(vcluster, environment, tmp_path):
    """Render with the command line, on a machine that sees nothing of the claim."""

    def render(recipe: Path, *words: str, **settings: object) -> IndexedJob:
        claim = tmp_path / "claim"
        claim.mkdir()
        file = tmp_path / "k8s.yaml"
        content = {
            "nodes": 2,
            "device": "cpu",
            "grace_s": 30,
            "python": sys.executable,
            "env": {"OMP_NUM_THREADS": "1"},
            "storage": {"local": str(vcluster.local)},
            "k8s": {"image": "accrete", "claim": "runs"},
            **settings,
        }
        file.write_text(json.dumps(content))
        command = [sys.executable, "-m", "accrete.launch.cli", "launch", "k8s", recipe, *words]
        options = ["--cluster", file, "--run-dir", tmp_path / "run", "--dry-run"]
        vcluster.run("ctl", [*command, *options], env=environment)
        manifest = list(YAML(typ="safe").load_all(tmp_path / "run" / "launch" / "k8s.yaml"))
        return IndexedJob(vcluster, manifest, claim, tmp_path / "pods")

    return render


def events(run: Path, kind: str) -> list[dict]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [x for x in found if x["event"] == kind]


def test_an_evicted_pod_saves_and_its_job_goes_on_to_the_undisturbed_end(
    submit, recipe, undisturbed, require_same
):
    job = submit(recipe)
    run = job.claim / "runs" / "run"
    evicted = []

    def evict_once(job: IndexedJob) -> None:
        if not evicted and len(events(run, "checkpoint")) > 1:
            job.evict(1)
            evicted.append(1)

    job.run(600, evict_once)
    assert job.failed is None, job.story()
    assert evicted
    # No pod says 0 before the run is finished: its index would count as done.
    assert sorted(job.codes[:2]) == [(0, 75), (1, 75)], job.story()
    assert sorted(job.codes[2:]) == [(0, 0), (1, 0)], job.story()
    assert job.counted == 0
    attempts = [json.loads(x) for x in (run / "launch" / "attempts.jsonl").read_text().splitlines()]
    judged = [x["outcome"] for x in attempts if x["event"] == "judged"]
    assert judged == ["again", "finished"]
    require_same(run, undisturbed)


def test_bad_rows_fail_the_job_at_once(submit, recipe, tmp_path):
    content = json.loads(recipe.read_text())
    content["tasks"][0]["files"]["train"] = str(tmp_path / "nothing.jsonl")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(json.dumps(content))
    job = submit(wrong)
    job.run(200)
    assert job.failed == "pod 0 ended with 1: FailJob", job.story()
    assert "nothing.jsonl" in (job.folder / "pod-0.log").read_text()
