"""A cluster's settings, a Slurm of paper, and a reader of scripts, for the tests of Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from accrete.launch.cluster.settings import ClusterConfig, SlurmConfig

CLUSTER = ClusterConfig(
    nodes=2,
    procs_per_node=8,
    device="cuda",
    time="12:00:00",
    python="/opt/venv/bin/python",
    setup=["module load cuda"],
    slurm=SlurmConfig(
        partition="long",
        account="me",
        cpus_per_proc=4,
        memory="0",
        exclusive=True,
        array_limit=3,
        options=["--mail-type=END"],
    ),
)


def check_shell(script: str) -> None:
    """bash reads it; shellcheck, where it is installed, finds nothing."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        # Functions that only a trap calls; `$` that a node's own shell expands.
        words = ["shellcheck", "--exclude=SC2317,SC2016", "-"]
        done = subprocess.run(words, input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


class PaperSlurm:
    """Commands of Slurm that only write down what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "log"
        self.variables: dict[str, str] = {}
        self.bin.mkdir()
        self.job("RUNNING", restarts=1)
        for name in ("sbatch", "scancel", "sinfo", "squeue", "srun"):
            self.write(name, "")

    def job(self, state: str, restarts: int) -> None:
        """What `scontrol` says of the job."""
        known = f"JobId=7 JobState={state} Requeue=1 Restarts={restarts} BatchFlag=1"
        self.write(
            "scontrol",
            f'[ "$2" = hostnames ] && printf "n1\\nn2\\n"\n[ "$2" = show ] && echo "{known}"',
        )

    def write(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.log}\n{body}\nexit 0\n')
        path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **self.variables,
        }

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []
