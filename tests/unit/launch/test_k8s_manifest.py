"""The Kubernetes manifest: strictly valid, what it says, and what kubectl is told."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from accrete.launch.cluster import k8s
from accrete.launch.cluster.request import LaunchRequest, make_request, read_request, write_files
from accrete.launch.cluster.settings import ClusterConfig, K8sConfig
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import ConfigError

VERSIONS = ("1.29", "1.31", kubernetes_validate.latest_version())
"""Before 1.29 the schema wants `onPodConditions` even in a rule on exit codes."""
SMALL = ClusterConfig(
    nodes=2, procs_per_node=8, device="cuda", k8s=K8sConfig(image="accrete:1", claim="runs")
)
FULL = replace(
    SMALL,
    time="12:00:00",
    grace_s=600,
    setup=["export NCCL_IB_HCA='mlx5'"],
    k8s=K8sConfig(
        image="registry.example:5000/team/accrete@sha256:0a",
        namespace="research",
        claim="runs",
        mount="/data",
        cpu="96",
        memory="1800Gi",
        node_selector={"gpu.type": "h100", "zone": "true"},
        tolerations=[{"key": "gpu", "effect": "NoExecute", "value": "7", "tolerationSeconds": 60}],
        resources={"rdma/hca": "1"},
        labels={"kueue.x-k8s.io/queue-name": "team"},
        priority_class="low",
        pull_secrets=["registry"],
        user=1000,
        group=2000,
        capabilities=["IPC_LOCK"],
    ),
)


def request_for(cluster: ClusterConfig, run_dir: str = "/home/me/runs/My run") -> LaunchRequest:
    return make_request("quickstart", [], Path(run_dir), cluster, own_caches=False)


def manifest(cluster: ClusterConfig, run_dir: str = "/home/me/runs/My run") -> dict[str, Any]:
    text = k8s.render(request_for(cluster, run_dir))["k8s.yaml"]
    return {item["kind"]: item for item in YAML(typ="safe").load_all(text)}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster", [SMALL, FULL], ids=["small", "full"])
def test_strictly_valid(cluster: ClusterConfig, version: str) -> None:
    found = manifest(cluster)
    assert set(found) == {"ConfigMap", "Service", "Job"}
    for item in found.values():
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("completion",), 2), (("backoffLimit",), "3"), (("template", "spec", "subDomain"), "x")],
)
def test_the_schema_catches_mistakes(path: tuple[str, ...], value: object) -> None:
    job = manifest(SMALL)["Job"]
    *sections, last = path
    section = job["spec"]
    for name in sections:
        section = section[name]
    section[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_the_pods_find_each_other() -> None:
    found = manifest(SMALL)
    job, service = found["Job"], found["Service"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == name
    variables = {e["name"]: e.get("value") for e in pod["spec"]["containers"][0]["env"]}
    assert variables["MASTER_ADDR"] == f"{name}-0.{name}"
    assert (variables["NNODES"], variables["NPROC_PER_NODE"]) == ("2", "8")
    # A pod's name is a DNS label, whatever the run folder is called.
    assert name.startswith("accrete-my-run-")
    assert len(f"{name}-999") <= 63
    # One Job for each folder of the claim: two would take the run from each other.
    assert manifest(SMALL, "/other/My run")["Job"]["metadata"]["name"] == name
    assert manifest(SMALL, "/other/my run")["Job"]["metadata"]["name"] != name
    other = replace(SMALL, k8s=replace(SMALL.k8s, claim="other"))
    assert manifest(other)["Job"]["metadata"]["name"] != name


def test_failures_and_evictions() -> None:
    spec = manifest(FULL)["Job"]["spec"]
    evicted, again, failed = spec["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Ignore"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (again["action"], again["onExitCodes"]["values"]) == ("Ignore", [75])
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailJob", [1])
    pod = spec["template"]["spec"]
    assert again["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 600
    # At the deadline the pods still have their grace period to save.
    assert spec["activeDeadlineSeconds"] == 12 * 3600 - 600
    assert "activeDeadlineSeconds" not in manifest(SMALL)["Job"]["spec"]


def test_resources() -> None:
    def limits(cluster: ClusterConfig) -> dict[str, str]:
        container = manifest(cluster)["Job"]["spec"]["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        return container["resources"]["limits"]

    assert limits(SMALL) == {"nvidia.com/gpu": "8"}
    assert limits(FULL) == {
        "cpu": "96",
        "memory": "1800Gi",
        "nvidia.com/gpu": "8",
        "rdma/hca": "1",
    }
    plain = replace(SMALL, device="cpu", k8s=replace(SMALL.k8s, cpu="2"))
    assert limits(plain) == {"cpu": "2"}


def test_rights_are_those_of_the_image_or_what_the_restricted_standard_allows() -> None:
    def pod(**settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        chosen = replace(SMALL, k8s=replace(SMALL.k8s, **settings))
        spec = manifest(chosen)["Job"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        env = {item["name"]: item.get("value", "") for item in container["env"]}
        return spec.get("securityContext", {}), container.get("securityContext", {}), env

    whole, own, env = pod()
    assert (whole, own) == ({}, {})
    assert "HOME" not in env
    whole, own, env = pod(user=1000)
    assert whole == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert own == {"capabilities": {"drop": ["ALL"]}, "allowPrivilegeEscalation": False}
    assert (env["HOME"], env["USER"]) == ("/local", "accrete")
    whole, own, _ = pod(group=2000, capabilities=["IPC_LOCK"])
    assert (whole["runAsGroup"], whole["fsGroup"]) == (2000, 2000)
    assert own == {"capabilities": {"add": ["IPC_LOCK"]}}


def test_the_run_folder_is_on_the_claim() -> None:
    on_claim = request_for(FULL, "/data/me/one")
    assert str(k8s.pod_run_dir(on_claim)) == "/data/me/one"
    assert k8s.on_cluster(FULL, Path("/data/me/one")).prepare == "submit"
    elsewhere = request_for(FULL, "/home/me/one")
    assert str(k8s.pod_run_dir(elsewhere)) == "/data/runs/one"
    assert k8s.on_cluster(FULL, Path("/home/me/one")).prepare == "node"


def test_the_request_travels_in_the_config_map(tmp_path: Path) -> None:
    request = request_for(replace(FULL, prepare="node"), str(tmp_path / "run"))
    text = k8s.render(request)["k8s.yaml"]
    files = next(iter(YAML(typ="safe").load_all(text)))["data"]
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    kept = read_request(folder)
    assert kept.cluster == request.cluster
    assert load_recipe(kept.recipe).resolved() == request.recipe.resolved()
    subprocess.run(["bash", "-n", str(folder / "node.sh")], check=True)
    assert "export NCCL_IB_HCA='mlx5'" in files["node.sh"]
    assert "--request /run/accrete --wait 7200 &" in files["node.sh"]


def run_pod(tmp_path: Path, index: int, **settings: Any) -> tuple[int, str]:
    """What a pod of two does where all names are known; its status and what it prints."""
    cluster = replace(SMALL, prepare="node", k8s=replace(SMALL.k8s, mount=str(tmp_path)))
    text = k8s.render(request_for(replace(cluster, **settings)))["k8s.yaml"]
    script = next(iter(YAML(typ="safe").load_all(text)))["data"]["node.sh"]
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "getent").write_text("#!/bin/bash\n")
    (tools / "getent").chmod(0o755)
    done = subprocess.run(
        ["bash"],
        input=script,
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "NNODES": "2",
            "JOB_COMPLETION_INDEX": str(index),
            "ACCRETE_ATTEMPT": "uid",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("index", [0, 1])
def test_an_image_without_python_fails_the_job(tmp_path: Path, index: int) -> None:
    """Any other status than 1 has the Job replace the pods, which wait for each other on GPUs."""
    status, said = run_pod(tmp_path, index, python="python9")
    assert status == 1
    assert "there is no python9 in this image; set `python:`" in said


@pytest.mark.parametrize(("index", "code", "ends"), [(0, 3, 1), (1, 3, 1), (0, 2, 75), (1, 2, 1)])
def test_a_folder_of_another_run_is_not_judged(
    tmp_path: Path, index: int, code: int, ends: int
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\ncase "$*" in *verdict*) exit 75;; *) exit {code};; esac\n')
    python.chmod(0o755)
    assert run_pod(tmp_path, index, python=str(python))[0] == ends


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    """The claim may hold a run of the same name that somebody else has launched."""
    (tmp_path / "runs" / "My run" / "launch").mkdir(parents=True)
    (tmp_path / "runs" / "My run" / "launch" / "finished.json").touch()
    status, said = run_pod(tmp_path, 0, python="python9")
    assert (status, "My run: this run is finished" in said) == (0, True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (K8sConfig(), "k8s.image and k8s.claim"),
        (K8sConfig(image="x"), "k8s.claim"),
        (K8sConfig(image="x", claim="y", mount="data"), "absolute path"),
    ],
)
def test_missing_settings(settings: K8sConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        k8s.render(request_for(replace(SMALL, k8s=settings)))


def test_a_dry_run_makes_image_and_claim_up() -> None:
    filled, missing = k8s.with_placeholders(replace(SMALL, k8s=K8sConfig(claim="mine")))
    assert (filled.k8s.image, filled.k8s.claim) == (f"accrete:{version('accrete')}", "mine")
    assert missing is not None
    assert "k8s.image not set" in missing
    assert k8s.with_placeholders(SMALL) == (SMALL, None)


KUBECTL = """#!/bin/bash
echo "$*" >>"{folder}/calls"
case $1 in
  get) cat "{folder}/job.json" 2>/dev/null ;;
  apply) echo "job.batch/x created" ;;
esac
if [ -e "{folder}/refuse" ]; then
  echo 'E1121 18:28:06.737368    4305 memcache.go:265] "Unhandled Error"' >&2
  echo "no rights" >&2
  exit 1
fi
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(KUBECTL.format(folder=folder))
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def submitted(tmp_path: Path) -> LaunchRequest:
    request = request_for(FULL, str(tmp_path / "run"))
    write_files(request, k8s.render(request))
    return request


def condition(kind: str) -> str:
    return json.dumps({"status": {"conditions": [{"type": kind, "status": "True"}]}})


def test_apply(kubectl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = submitted(tmp_path)
    assert k8s.start(request) == 0
    got, applied = (kubectl / "calls").read_text().splitlines()
    assert got.startswith(f"get job {k8s.job_name(request)} ")
    assert "--namespace=research" in got
    assert applied == f"apply --filename {request.launch_dir / 'k8s.yaml'}"
    said = capsys.readouterr().out
    assert "/data/runs/run on the claim" in said
    assert "kubectl logs --follow --namespace=research" in said


def test_a_failed_job_is_replaced_a_running_one_and_a_finished_one_are_left_alone(
    kubectl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = submitted(tmp_path)
    (kubectl / "job.json").write_text(condition("Failed"))
    assert k8s.start(request) == 0
    verbs = [line.split()[0] for line in (kubectl / "calls").read_text().splitlines()]
    assert verbs == ["get", "delete", "apply"]
    (kubectl / "calls").unlink()
    (kubectl / "job.json").write_text('{"status": {"active": 2}}')
    with pytest.raises(k8s.KubernetesError, match=r"at work already.*--namespace=research"):
        k8s.start(request)
    (kubectl / "job.json").write_text(condition("Complete"))
    assert k8s.start(request) == 0
    assert "finished" in capsys.readouterr().out
    assert {line.split()[0] for line in (kubectl / "calls").read_text().splitlines()} == {"get"}


def test_kubectl_refuses_or_is_missing(
    kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = submitted(tmp_path)
    (kubectl / "refuse").touch()
    with pytest.raises(k8s.KubernetesError, match=r"get failed: no rights$"):
        k8s.start(request)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(k8s.KubernetesError, match="kubectl apply -f") as caught:
        k8s.start(request)
    assert caught.value.exit_code == 2
