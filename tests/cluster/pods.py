"""Pods of a rendered Indexed Job as processes: what kubelet and the Job controller do, and no more.

A pod has a process tree whose first process is its command, a name and an address, the manifest's
environment and nothing else, and its volumes: the claim is a folder of this machine, ConfigMaps and
emptyDirs are made for each pod. The controller replaces pods by the manifest's podFailurePolicy.
"""

from __future__ import annotations

import shlex
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtual import VirtualCluster

PATH = "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"


@dataclass
class Pod:
    index: int
    node: str
    process: subprocess.Popen
    command: str
    evicted: bool = False


class IndexedJob:
    """A Job with its Service and ConfigMap on the nodes of a virtual cluster, one pod on each."""

    def __init__(
        self, cluster: VirtualCluster, manifest: list[dict[str, Any]], claim: Path, folder: Path
    ) -> None:
        kinds = {item["kind"]: item for item in manifest}
        self.cluster, self.claim, self.folder = cluster, claim, folder
        self.config, self.service = kinds["ConfigMap"], kinds["Service"]
        self.job = kinds["Job"]["spec"]
        self.name = kinds["Job"]["metadata"]["name"]
        self.template = self.job["template"]["spec"]
        self.pods: dict[int, Pod] = {}
        self.codes: list[tuple[int, int]] = []
        """(index, exit code) of every pod that has ended, in order."""
        self.done: set[int] = set()
        self.counted = 0
        self.failed: str | None = None
        self.hosts = folder / "hosts"
        self.folder.mkdir(parents=True)
        self.hosts.write_text("127.0.0.1 localhost\n")
        assert self.service["spec"]["clusterIP"] == "None"
        chosen = self.service["spec"]["selector"].items()
        assert chosen <= self.job["template"]["metadata"]["labels"].items()
        assert self.template["subdomain"] == self.service["metadata"]["name"]

    def start(self, index: int) -> None:
        """What kubelet does for one pod."""
        node = self.cluster.nodes[index]
        hostname = f"{self.name}-{index}"
        container = self.template["containers"][0]
        uid = str(uuid.uuid4())
        home = self.folder / uid
        home.mkdir()
        variables = {"PATH": PATH, "HOME": "/root", "JOB_COMPLETION_INDEX": str(index)}
        for entry in container["env"]:
            source = entry.get("valueFrom")
            if source is not None:
                assert source == {"fieldRef": {"fieldPath": "metadata.uid"}}
            variables[entry["name"]] = uid if source is not None else entry["value"]
        init = home / "init.sh"
        lines = [f"hostname {hostname}", f"mount --bind {self.hosts} /etc/hosts"]
        lines += ["mount -t tmpfs tmpfs /run", "mount -t tmpfs tmpfs /mnt"]
        lines += [self._mount(mount, home) for mount in container["volumeMounts"]]
        command = shlex.join(container["command"])
        init.write_text("\n".join(["set -e", *lines, f"exec {command}", ""]))
        words = ["env", "-i", *(f"{k}={v}" for k, v in variables.items())]
        words += ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        log = (self.folder / f"pod-{index}.log").open("a")
        # In DNS from the moment it has an address (publishNotReadyAddresses).
        with self.hosts.open("a") as dns:
            dns.write(f"{self.cluster.address(node)} {hostname}.{self.template['subdomain']}\n")
        process = self.cluster.popen(
            node, [*words, "bash", init], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        self.pods[index] = Pod(index, node, process, command)

    def _mount(self, mount: dict[str, Any], home: Path) -> str:
        volume = next(v for v in self.template["volumes"] if v["name"] == mount["name"])
        where = shlex.quote(mount["mountPath"])
        if "persistentVolumeClaim" in volume:
            return f"mkdir -p {where}; mount --bind {self.claim} {where}"
        if "configMap" in volume:
            assert volume["configMap"]["name"] == self.config["metadata"]["name"]
            files = home / mount["name"]
            files.mkdir()
            for name, content in self.config["data"].items():
                (files / name).write_text(content)
            return f"mkdir -p {where}; mount --bind -o ro {files} {where}"
        assert "emptyDir" in volume
        return f"mkdir -p {where}; mount -t tmpfs tmpfs {where}"

    def evict(self, index: int) -> None:
        """SIGTERM to the pod's first process; it has its grace period."""
        pod = self.pods[index]
        pod.evicted = True
        self.cluster.run(pod.node, ["pkill", "-TERM", "-o", "-f", "-x", pod.command])

    def reconcile(self) -> None:
        """What the Job controller does when pods have ended."""
        for index, pod in list(self.pods.items()):
            code = pod.process.poll()
            if code is None:
                continue
            del self.pods[index]
            self._forget_name(index)
            self.codes.append((index, code))
            if code == 0:
                self.done.add(index)
                continue
            action = self._action(pod, code)
            self.counted += action == "Count"
            if action == "FailJob" or self.counted > self.job["backoffLimit"]:
                self.failed = f"pod {index} ended with {code}: {action}"
            else:
                self.start(index)

    def _forget_name(self, index: int) -> None:
        mark = f" {self.name}-{index}."
        kept = [x for x in self.hosts.read_text().splitlines(True) if mark not in x]
        self.hosts.write_text("".join(kept))

    def _action(self, pod: Pod, code: int) -> str:
        for rule in self.job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes is not None and codes["operator"] == "In" and code in codes["values"]:
                return rule["action"]
            conditions = [c["type"] for c in rule.get("onPodConditions", [])]
            if pod.evicted and "DisruptionTarget" in conditions:
                return rule["action"]
        return "Count"

    def run(self, seconds: float, disturb: Callable[[IndexedJob], None] | None = None) -> None:
        """From start to end; `disturb` is called every now and then."""
        deadline = time.monotonic() + seconds
        try:
            for index in range(self.job["parallelism"]):
                self.start(index)
            while len(self.done) < self.job["completions"] and self.failed is None:
                assert time.monotonic() < deadline, self.story()
                if disturb is not None:
                    disturb(self)
                self.reconcile()
                time.sleep(0.3)
        finally:
            for pod in self.pods.values():
                self.cluster.run(pod.node, ["pkill", "-KILL", "-f", "-x", pod.command], check=False)

    def story(self) -> str:
        logs = sorted(self.folder.glob("pod-*.log"))
        texts = [f"--- {path.name}\n{path.read_text()[-4000:]}" for path in logs]
        return f"exit codes {self.codes}, failed: {self.failed}\n" + "\n".join(texts)
