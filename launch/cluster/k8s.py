"""`accrete launch k8s`: the run as a native Indexed Job with a headless Service, no operator.

One manifest, one pod for each node. The pods share a claim with the run folder; the recipe travels
in a ConfigMap, so that the submitting machine needs nothing of the claim.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from accrete.launch.cluster.node import NOT_OURS
from accrete.launch.cluster.rendering import render_template
from accrete.launch.cluster.request import (
    NODE_MODULE,
    RECIPE_FILE,
    REQUEST_FILE,
    VERDICT_MODULE,
    LaunchRequest,
)
from accrete.launch.cluster.settings import ClusterConfig, K8sConfig
from accrete.pipeline.errors import ConfigError, InputError

MANIFEST = "k8s.yaml"
FILES = "/run/accrete"
"""Where a pod finds node.sh, the request and the recipe."""
LOCAL = "/local"
"""A pod's own disk, unless `storage.local` says otherwise."""
PORT = 29500
"""Every pod has an address of its own, so any port is free there."""
FIRST_POD_S = 7200
"""Seconds that the other pods wait for the first one: its node may still pull the image."""
PATIENCE_S = 60.0
"""For kubectl, except when it waits for pods to end."""
_LOG_LINE = re.compile(r"[EWI]\d{4} ")
"""What kubectl's libraries print before kubectl itself says what is wrong."""


class KubernetesError(InputError):
    """kubectl is missing, or the cluster refused the job."""


def on_cluster(cluster: ClusterConfig, run_dir: Path) -> ClusterConfig:
    """The settings with `prepare: node` unless the submitting machine sees the claim as well.

    Args:
        cluster: Settings of `--cluster`.
        run_dir: `--run-dir`.
    """
    if _on_claim(cluster, run_dir.expanduser().absolute()):
        return cluster
    return replace(cluster, prepare="node")


def _on_claim(cluster: ClusterConfig, run_dir: Path) -> bool:
    return run_dir.is_relative_to(cluster.k8s.mount)


def pod_run_dir(request: LaunchRequest) -> PurePosixPath:
    """The run folder as the pods see it: `--run-dir` itself if that is on the claim already."""
    if _on_claim(request.cluster, request.run_dir):
        return PurePosixPath(request.run_dir)
    return PurePosixPath(request.cluster.k8s.mount) / "runs" / request.run_dir.name


def job_name(request: LaunchRequest) -> str:
    """Name of the Job, its Service and its ConfigMap: a DNS label, one for each folder of a claim.

    From wherever it is launched: two Jobs in one folder would take the run from each other.
    """
    folder = f"{request.cluster.k8s.claim}:{pod_run_dir(request)}"
    digest = hashlib.sha256(folder.encode()).hexdigest()[:6]
    return f"{request.job_name}-{digest}"


def render(request: LaunchRequest) -> dict[str, str]:
    """The manifest: ConfigMap, Service, Job.

    Raises:
        ConfigError: The image or the claim is not said, or the mount is no absolute path.
    """
    _check(request.cluster)
    return {MANIFEST: _manifest(request)}


def with_placeholders(cluster: ClusterConfig) -> tuple[ClusterConfig, str | None]:
    """The settings for a look at the manifest: image and claim made up where they are not said.

    Returns:
        The settings, and what to set before a start, if anything.
    """
    made_up = {"image": f"accrete:{metadata.version('accrete')}", "claim": "accrete"}
    missing: dict[str, Any] = {name: made_up[name] for name in _missing(cluster)}
    if not missing:
        return cluster, None
    return replace(cluster, k8s=replace(cluster.k8s, **missing)), (
        f"{' and '.join(f'k8s.{name}' for name in missing)} not set, so the manifest says "
        f"{' and '.join(missing.values())}. Before a start write `k8s: {{image: ..., claim: ...}}` "
        "into a file and give it by --cluster."
    )


def _missing(cluster: ClusterConfig) -> list[str]:
    return [name for name in ("image", "claim") if not getattr(cluster.k8s, name)]


def _check(cluster: ClusterConfig) -> None:
    missing = _missing(cluster)
    if missing:
        raise ConfigError(
            f"accrete launch k8s needs {' and '.join(f'k8s.{name}' for name in missing)}: a "
            "container image with accrete in it, and a ReadWriteMany PersistentVolumeClaim for the "
            "run. Write `k8s: {image: ..., claim: ...}` into a file and give it by --cluster."
        )
    if not cluster.k8s.mount.startswith("/"):
        raise ConfigError(
            f"k8s.mount: given: {cluster.k8s.mount!r}; allowed: an absolute path, such as "
            "/mnt/accrete."
        )


def _manifest(request: LaunchRequest) -> str:
    cluster, k8s, name = request.cluster, request.cluster.k8s, job_name(request)
    labels = {"app.kubernetes.io/name": "accrete", "app.kubernetes.io/instance": name}
    return render_template(
        MANIFEST,
        title=request.recipe.name,
        job=name,
        namespace=k8s.namespace,
        labels=labels,
        job_labels={**labels, **k8s.labels},
        follow=_follow(request),
        nodes=request.nodes,
        procs_per_node=request.procs_per_node,
        run_dir=pod_run_dir(request),
        active_s=None if request.time_s is None else request.time_s - cluster.grace_s,
        backoff_limit=k8s.backoff_limit,
        grace_s=cluster.grace_s,
        priority_class=k8s.priority_class,
        node_selector=k8s.node_selector,
        tolerations=k8s.tolerations,
        pull_secrets=k8s.pull_secrets,
        image=k8s.image,
        claim=k8s.claim,
        mount=k8s.mount,
        files=FILES,
        local=cluster.storage.local or LOCAL,
        env=_environment(request, name),
        resources=_resources(request),
        pod_security=_pod_security(k8s),
        container_security=_container_security(k8s),
        file_contents={
            "node.sh": _node_script(request, name),
            REQUEST_FILE: json.dumps(request.to_json(), ensure_ascii=False, indent=2),
            RECIPE_FILE: request.recipe.to_yaml(),
        },
    )


def _environment(request: LaunchRequest, name: str) -> dict[str, str]:
    """The contract's variables, and folders on the claim that have no use on the submitter."""
    mount = PurePosixPath(request.cluster.k8s.mount)
    storage = request.cluster.storage
    # A user whom the image does not know has no home, and libraries ask for both.
    unknown = {"HOME": storage.local or LOCAL, "USER": "accrete"}
    return {
        **(unknown if request.cluster.k8s.user is not None else {}),
        "NNODES": str(request.nodes),
        "NPROC_PER_NODE": str(request.procs_per_node),
        "MASTER_ADDR": f"{name}-0.{name}",
        "MASTER_PORT": str(request.cluster.network.port or PORT),
        "ACCRETE_CACHE": storage.cache or str(mount / "cache"),
        "HF_HOME": storage.hf_home or str(mount / "huggingface"),
        "TMPDIR": storage.local or LOCAL,
    }


def _resources(request: LaunchRequest) -> dict[str, str]:
    k8s = request.cluster.k8s
    found = {"cpu": k8s.cpu, "memory": k8s.memory}
    if request.recipe.config.engine.device != "cpu":
        found[k8s.gpu_resource] = str(request.procs_per_node)
    return {name: value for name, value in {**found, **k8s.resources}.items() if value}


def _pod_security(k8s: K8sConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if k8s.user is not None:
        found = {
            "runAsNonRoot": True,
            "runAsUser": k8s.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    if k8s.group is not None:
        # Of a large claim only the top folder is looked at.
        owner = {"fsGroup": k8s.group, "fsGroupChangePolicy": "OnRootMismatch"}
        found |= {"runAsGroup": k8s.group, **owner}
    return found


def _container_security(k8s: K8sConfig) -> dict[str, Any]:
    capabilities: dict[str, list[str]] = {}
    if k8s.user is not None:
        capabilities["drop"] = ["ALL"]
    if k8s.capabilities:
        capabilities["add"] = k8s.capabilities
    found: dict[str, Any] = {"capabilities": capabilities} if capabilities else {}
    if k8s.user is not None:
        found["allowPrivilegeEscalation"] = False
    return found


def _node_script(request: LaunchRequest, name: str) -> str:
    return render_template(
        "k8s_node.sh",
        job=name,
        run_dir=pod_run_dir(request),
        python=request.cluster.python or "python",
        setup=request.cluster.setup,
        files=FILES,
        node_module=NODE_MODULE,
        not_ours=NOT_OURS,
        verdict_module=VERDICT_MODULE,
        first_pod_s=FIRST_POD_S,
        retries=request.cluster.retries,
    )


def _where(request: LaunchRequest) -> list[str]:
    namespace = request.cluster.k8s.namespace
    return [] if namespace is None else [f"--namespace={namespace}"]


def _follow(request: LaunchRequest) -> str:
    """The command that shows what the first pod prints."""
    job = f"batch.kubernetes.io/job-name={job_name(request)}"
    pod = f"{job},batch.kubernetes.io/job-completion-index=0"
    return " ".join(["kubectl logs --follow", *_where(request), "--selector", pod])


def start(request: LaunchRequest) -> int:
    """Apply the manifest; an ended job of the same run is replaced, and goes on.

    Raises:
        KubernetesError: There is no kubectl, the cluster refuses, or the job runs already.
    """
    manifest, name = request.launch_dir / MANIFEST, job_name(request)
    if shutil.which("kubectl") is None:
        raise KubernetesError(
            "kubectl is not on this machine. Render the manifest with --dry-run, and apply it from "
            f"one that has kubectl: kubectl apply -f {manifest}"
        )
    where = _where(request)
    status = _job_status(name, where)
    if status is not None:
        if _has_ended(status, "Complete"):
            print(
                f"job {name}: finished; the run is in {pod_run_dir(request)} on the claim. For "
                "another one give another --run-dir."
            )
            return 0
        if not _has_ended(status, "Failed"):
            raise KubernetesError(
                f"job {name} of this run is at work already. Follow it with `{_follow(request)}`, "
                f"or end it with `kubectl delete -f {shlex.quote(str(manifest))}`."
            )
        _kubectl("delete", "job", name, "--cascade=foreground", *where, patience=None)
    print(_kubectl("apply", "--filename", str(manifest)).strip())
    print(f"run: {pod_run_dir(request)} on the claim")
    print(f"follow it: {_follow(request)}")
    return 0


def _job_status(name: str, where: list[str]) -> dict[str, Any] | None:
    """The job's status; None if there is no such job."""
    text = _kubectl("get", "job", name, "--ignore-not-found", "--output=json", *where)
    return json.loads(text).get("status", {}) if text.strip() else None


def _has_ended(status: dict[str, Any], how: str) -> bool:
    return any(
        condition["type"] == how and condition["status"] == "True"
        for condition in status.get("conditions", [])
    )


def _kubectl(*arguments: str, patience: float | None = PATIENCE_S) -> str:
    """What kubectl prints.

    Raises:
        KubernetesError: It fails, or does not answer.
    """
    try:
        done = subprocess.run(
            ["kubectl", *arguments], capture_output=True, text=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired:
        raise KubernetesError(
            f"kubectl {arguments[0]} has not answered within {patience:.0f} s; does `kubectl get "
            "nodes` work here?"
        ) from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if not _LOG_LINE.match(line)]
        raise KubernetesError(f"kubectl {arguments[0]} failed: " + "\n".join(said).strip())
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout
