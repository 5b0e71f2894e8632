"""Several machines on one: each node is a set of namespaces with an address, sshd and slurmd.

Node `ctl` is where a person logs in, and where slurmctld runs; `node1`, `node2`, ... compute. All
share the host's files, as a cluster shares its file system; /dev/shm and `local` are each node's
own. A node whose first process is killed loses all its processes at once, as when power fails.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

COMMANDS = (
    *("slurmctld", "slurmd", "sbatch", "srun", "munged", "munge"),
    *("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv"),
)
PACKAGES = "slurmctld slurmd slurm-client munge openssh-server openssh-client iproute2"
SLOTS = 8
"""Virtual clusters that this machine can hold at once."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str | None:
    """Why this machine cannot hold a virtual cluster; None if it can."""
    if os.geteuid() != 0:
        return "a virtual cluster needs root"
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {PACKAGES}"
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
        return "the kernel or the container does not allow network namespaces"
    return None


def wait_until(
    condition: Callable[[], object], seconds: float, what: Callable[[], str] | str
) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(0.1)


class VirtualCluster:
    """Nodes with sshd and Slurm; `ctl` is number 0."""

    def __init__(self, folder: Path, slot: int, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.names = ["ctl", *self.nodes]
        self.local = folder / "local"
        """A folder that is each node's own."""
        self.ssh_config = folder / "etc" / "ssh_config"
        """For `ssh -F` from any node."""
        self.slurm_conf = folder / "etc" / "slurm.conf"
        self._slot = slot
        self._bridge = f"avc{slot}br"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}
        self._munged: subprocess.Popen[bytes] | None = None

    def address(self, node: str) -> str:
        return f"10.77.{self._slot}.{10 + self.names.index(node)}"

    # -- life ---------------------------------------------------------------------------------

    def up(self) -> None:
        for name in ("etc", "log", "state", "spool", "local", "run"):
            (self.folder / name).mkdir(parents=True)
        self._write_configuration()
        self._start_munge()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for node in self.names:
            self.boot(node)
        self.wait_idle(len(self.nodes))

    def down(self) -> None:
        for node in list(self._inits):
            self.kill(node)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait(timeout=10)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def boot(self, node: str) -> None:
        """Switch a node on."""
        script = self.folder / "etc" / "node-init.sh"
        # The outer unshare waits for its child; --kill-child ties their lives together.
        init = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", str(script), node],
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "log" / f"init-{node}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._inits[node] = init
        children = Path(f"/proc/{init.pid}/task/{init.pid}/children")
        wait_until(lambda: children.read_text().split(), 10, f"{node} did not start")
        pid = self._pids[node] = int(children.read_text().split()[0])
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{pid}/ns/net") != own, 10, "no network namespace")
        link = self._link(node)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", link, "master", self._bridge, "up")
        for words in (
            "link set lo up",
            f"addr add {self.address(node)}/24 dev eth0",
            "link set eth0 up",
        ):
            subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words.split()], check=True)
        (self.folder / "run" / f"{node}.linked").touch()

    def kill(self, node: str) -> None:
        """Power loss: no process of the node says goodbye to anybody."""
        subprocess.run(["ip", "link", "del", self._link(node)], capture_output=True, check=False)
        init = self._inits.pop(node)
        os.kill(self._pids.pop(node), signal.SIGKILL)
        init.wait(timeout=10)
        (self.folder / "run" / f"{node}.linked").unlink(missing_ok=True)

    def cut(self, node: str) -> None:
        """Take the node's network away; its processes live on."""
        _ip("link", "set", self._link(node), "down")

    def heal(self, node: str) -> None:
        """Give the network back."""
        _ip("link", "set", self._link(node), "up")

    def _link(self, node: str) -> str:
        return f"avc{self._slot}n{self.names.index(node)}"

    # -- commands -----------------------------------------------------------------------------

    def command(
        self, node: str, words: Sequence[object], env: Mapping[str, str] | None = None
    ) -> list[str]:
        """The host's command that runs `words` on a node, in the present folder."""
        variables = {"SLURM_CONF": str(self.slurm_conf), **(env or {})}
        return [
            *(
                "nsenter",
                "-t",
                str(self._pids[node]),
                "-n",
                "-u",
                "-m",
                "-p",
                f"--wd={os.getcwd()}",
            ),
            *("--", "env", *(f"{k}={v}" for k, v in variables.items())),
            *map(str, words),
        ]

    def run(
        self,
        node: str,
        words: Sequence[object],
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        done = subprocess.run(
            self.command(node, words, env), capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def popen(
        self,
        node: str,
        words: Sequence[object],
        env: Mapping[str, str] | None = None,
        **options: object,
    ) -> subprocess.Popen[str]:
        """Start a command on a node."""
        return subprocess.Popen(self.command(node, words, env), text=True, **options)  # type: ignore[call-overload]

    def processes(self, node: str, pattern: str) -> list[str]:
        """Command lines on a node that contain `pattern`."""
        lines = self.run(node, ["ps", "-eo", "args"]).stdout.splitlines()
        return [line for line in lines if pattern in line]

    # -- Slurm --------------------------------------------------------------------------------

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job."""
        done = self.run("ctl", ["scontrol", "-o", "show", "job", number], check=False)
        pairs = (word.partition("=") for word in done.stdout.split())
        return {key: value for key, _, value in pairs}

    def wait_idle(self, count: int, seconds: float = 60) -> None:
        """Wait until `count` nodes are free."""

        def idle() -> bool:
            listing = ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"]
            return len(self.run("ctl", listing, check=False).stdout.split()) >= count

        wait_until(idle, seconds, lambda: self._logs())

    def _logs(self) -> str:
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            tails.append(f"--- {path.name}\n" + path.read_text(errors="replace")[-1500:])
        return "the nodes are not idle\n" + "\n".join(tails)

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.chown(folder, "munge", "munge")
        self._munged = subprocess.Popen(
            ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(
            lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0,
            15,
            "munged does not answer",
        )

    def _write_configuration(self) -> None:
        etc, log = self.folder / "etc", self.folder / "log"
        lines = [f"{self.address(name)} {name}" for name in self.names]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        switch = Path("/etc/nsswitch.conf").read_text().splitlines()
        kept = [line for line in switch if not line.startswith("hosts")]
        (etc / "nsswitch.conf").write_text("\n".join([*kept, "hosts: files"]) + "\n")
        for name in ("id", "host"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / name)]
            subprocess.run(key, check=True)
        (etc / "sshd_config").write_text(SSHD.format(etc=etc))
        self.ssh_config.write_text(SSH.format(etc=etc))
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "slurm.conf").write_text(
            SLURM.format(base=self.folder, log=log, last=len(self.nodes))
        )
        (etc / "node-init.sh").write_text(
            INIT.format(
                base=shlex.quote(str(self.folder)),
                folder="/run/sshd",
            )
        )


@contextmanager
def virtual_cluster(folder: Path, nodes: int = 3) -> Iterator[VirtualCluster]:
    """A cluster for the time of the context; several can live beside each other."""
    for slot in range(SLOTS):
        lock = os.open(f"/run/accrete-virtual-cluster-{slot}.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        cluster = VirtualCluster(folder, slot, nodes)
        subprocess.run(["ip", "link", "del", f"avc{slot}br"], capture_output=True, check=False)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
            os.close(lock)
        return
    raise AssertionError(f"all {SLOTS} places for virtual clusters are taken")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


SSHD = """\
Port 22
HostKey {etc}/host
AuthorizedKeysFile {etc}/id.pub
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
AcceptEnv *
MaxStartups 100
"""

SSH = """\
Host *
  IdentityFile {etc}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
"""

SLURM = """\
ClusterName=virtual
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials of a requeued job's first life are waited for; 120 s by default.
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmdSpoolDir={base}/spool/%n
StateSaveLocation={base}/state
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/slurmd-%n.log
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{last}] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=node[1-{last}] Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=20
PartitionName=urgent Nodes=node[1-{last}] MaxTime=INFINITE PriorityTier=100
"""

INIT = """\
node=$1
base={base}
mount --make-rprivate /
hostname "$node"
mount --bind "$base/etc/hosts" /etc/hosts
mount --bind "$base/etc/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$base/local"
mkdir -p {folder}
mount -t tmpfs tmpfs {folder}
chmod 755 {folder}
until [ -e "$base/run/$node.linked" ]; do sleep 0.02; done
export SLURM_CONF=$base/etc/slurm.conf
"$(command -v sshd || echo /usr/sbin/sshd)" -f "$base/etc/sshd_config" -E "$base/log/sshd-$node.log"
if [ "$node" = ctl ]; then
  /usr/sbin/slurmctld
else
  mkdir -p "$base/spool/$node"
  /usr/sbin/slurmd -N "$node"
fi
# The first process of a node buries what its parents left behind.
while :; do
  sleep 3600 &
  wait $!
done
"""
