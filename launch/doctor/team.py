"""Starts this node's probes, waits for them, and never longer than the time limit allows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accrete.launch.cluster.contract import Place
from accrete.pipeline.run_dir import read_json

PROBE = (sys.executable, "-m", "accrete.launch.doctor.probe")
ROUNDS = 4
"""Waits that may follow one another in a probe, each within the limit."""
SLACK_S = 240.0
"""Seconds for what is not under the limit: imports, DeepSpeed's among them, and gathering."""


@dataclass(frozen=True, kw_only=True)
class TeamResult:
    """What this node's probes left."""

    reports: list[dict[str, Any]]
    """On the first node those of all ranks that answered, elsewhere those of this node's."""
    broken: dict[int, str] = field(default_factory=dict)
    """Ranks of this node that ended without a report -> their last words."""


def run_team(
    place: Place,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    limit: float,
    command: Sequence[str] = PROBE,
) -> TeamResult:
    """Run one probe for each process that a run would have on this node.

    Args:
        place: Where this node stands.
        arguments: Further arguments of every probe.
        environment: Variables that all share.
        folder: An empty folder for reports and logs.
        limit: Seconds for each wait of a probe.
        command: What to start.
    """
    first = place.node_rank * place.procs_per_node
    ranks = range(first, first + place.procs_per_node)
    words = [*command, "--out", str(folder), "--limit", str(limit), *arguments]
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in ranks:
            started[rank] = _start(rank, rank - first, place, words, environment, folder)
        _wait(started, folder, time.monotonic() + ROUNDS * limit + SLACK_S)
    finally:
        _kill(started.values())
    return _collect(folder, ranks)


def _start(
    rank: int,
    local: int,
    place: Place,
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
) -> subprocess.Popen[bytes]:
    own = {
        **environment,
        **place.to_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.procs_per_node),
    }
    with (folder / f"log-{rank}").open("wb") as log:
        return subprocess.Popen(
            words, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )


def _wait(started: Mapping[int, subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    """Until all have ended; leaves word of those that end without a report, for rank 0 to see."""
    running = dict(started)
    while running and time.monotonic() < deadline:
        for rank, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[rank]
            if not (folder / f"rank-{rank}.json").exists():
                (folder / f"gone-{rank}").touch()
        time.sleep(0.05)


def _kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _collect(folder: Path, ranks: Sequence[int]) -> TeamResult:
    gathered = folder / "all.json"
    reports = read_json(gathered) if gathered.is_file() else []
    known = {report["rank"] for report in reports}
    broken = {}
    for rank in ranks:
        own = folder / f"rank-{rank}.json"
        if rank in known:
            continue
        if own.is_file():
            reports.append(read_json(own))
        else:
            broken[rank] = _last_words(folder / f"log-{rank}")
    return TeamResult(reports=sorted(reports, key=lambda r: int(r["rank"])), broken=broken)


def _last_words(log: Path) -> str:
    """The last line of a log, which in a traceback names the error."""
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1].strip()[:300] if lines else "it said nothing and did not end in time"
