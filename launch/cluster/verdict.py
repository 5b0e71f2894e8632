"""How an attempt has ended, told from what lies on disk.

`python -m accrete.launch.cluster.verdict` says it to scripts. Exit codes do not tell: torchrun,
srun and ssh each replace them. Status 0: the run is finished; 75: start it again; 1: it failed or
was cancelled. One line on stdout says why.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal

from accrete.launch.cluster import attempts
from accrete.launch.failures import Failure, read_failure
from accrete.pipeline.fence import read_owner
from accrete.pipeline.run_dir import RunDir

Ending = Literal["none", "limit", "cancel"]
"""What the launcher itself noticed: nothing, an approaching time limit, a wish to stop."""

_PEER_KINDS = {
    *("RuntimeError", "OSError", "TimeoutError", "EOFError", "BrokenPipeError"),
    *("ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"),
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"),
}
"""Errors with which a rank ends whose peers have gone; any other one is its own."""
_LOST_PEER = re.compile(
    r"\b(connection (was |likely )*(closed|reset|refused)|broken pipe|timed out|timeout|heartbeat"
    r"|sockets?|(tcp|dist|prefix)?store|nccl|gloo)\b",
    re.IGNORECASE,
)
"""Words in what such a rank says."""
_OWN = re.compile(
    r"unable to find (address|interface)|no (socket )?(interface|device) found"
    r"|nccl\b.* invalid (usage|argument)|cuda (error|failure)|out of memory"
    r"|no such file|no space left|permission denied|read-only file system",
    re.IGNORECASE,
)
"""What is no peer's fault, though the network's libraries may say it: so would the next attempt."""


class Outcome(IntEnum):
    """What follows from an attempt; the value is the command's exit status."""

    FINISHED = 0
    FAILED = 1
    AGAIN = 75


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do, and why."""

    outcome: Outcome
    reason: str


def judge(
    folder: RunDir, attempt: str, *, retries: int, ending: Ending = "none", lost: str = ""
) -> Verdict:
    """Decide what follows an attempt.

    - finished: nothing to do;
    - cancelled by a person: no further start;
    - a rank failed for a reason of its own: no further start;
    - the run left in good order (time limit, preemption), a node or a rank vanished, or no process
      ever began: start again, unless the last `retries` + 1 attempts have all stood still.

    Args:
        folder: The run folder.
        attempt: The attempt's name (`ACCRETE_ATTEMPT`).
        retries: Attempts in a row that may stand still.
        ending: What the launcher noticed.
        lost: Nodes that the launcher knows to be gone.
    """
    if attempts.has_finished(folder):
        return Verdict(outcome=Outcome.FINISHED, reason="every stage is trained and scored")
    if ending == "cancel":
        return Verdict(outcome=Outcome.FAILED, reason="cancelled; checkpoints are kept")
    start = attempts.begun(folder, attempt)
    if start is None:
        return _again(folder, attempt, retries, "no process of this attempt ever began")
    owner = read_owner(folder.owner)
    if owner != start["token"]:
        return Verdict(outcome=Outcome.FAILED, reason=f"attempt {owner} has taken the run over")
    failures = _failures(folder, start["time"])
    # A rank that only missed its peers is no cause.
    own = [failure for failure in failures if not _is_lost_peer(failure)]
    left = attempts.was_interrupted(folder, start["token"])
    if own and not lost:
        return Verdict(outcome=Outcome.FAILED, reason=_first_words(own))
    if left is not None:
        return _again(folder, attempt, retries, left)
    if ending == "limit":
        reason = "the time limit came before the run could say goodbye"
    else:
        reason = f"lost {lost}" if lost else "a process vanished without a word"
    said = f" ({_first_words(failures)})" if failures else ""
    return _again(folder, attempt, retries, reason + said)


def _first_words(failures: Sequence[Failure]) -> str:
    first = min(failures, key=lambda failure: failure.time)
    return f"rank {first.rank} failed: {first.message}"


def _again(folder: RunDir, attempt: str, retries: int, reason: str) -> Verdict:
    began = attempts.begun(folder, attempt)
    progress = attempts.read_progress(folder)
    moved = began is not None and began["progress"] != progress.to_list()
    still = set() if moved else attempts.standstill(folder) | {attempt}
    if len(still) > retries:
        return Verdict(
            outcome=Outcome.FAILED,
            reason=f"{reason}; {len(still)} attempts in a row have brought nothing ({progress}). "
            "Give a longer time limit, or look into the logs",
        )
    return Verdict(outcome=Outcome.AGAIN, reason=f"{reason} ({progress})")


def _failures(folder: RunDir, since: float) -> list[Failure]:
    found = []
    for path in sorted(folder.logs.glob("error-*.json")):
        failure = read_failure(folder, int(path.stem.removeprefix("error-")), 1, since)
        # Nodes' clocks differ by a little; leftovers of earlier attempts were deleted anyhow.
        if failure.kind not in ("InterruptionError", "FencedError"):
            found.append(failure)
    return found


def _is_lost_peer(failure: Failure) -> bool:
    if failure.expected or failure.kind not in _PEER_KINDS or _OWN.search(failure.message):
        return False
    return _LOST_PEER.search(failure.message) is not None


def conclude(
    folder: RunDir, attempt: str, *, retries: int, ending: Ending = "none", lost: str = ""
) -> Verdict:
    """`judge`, noted in attempts.jsonl."""
    verdict = judge(folder, attempt, retries=retries, ending=ending, lost=lost)
    attempts.note_judged(folder, attempt, verdict.outcome.name.lower(), verdict.reason)
    return verdict


def main() -> None:
    """Judge an attempt for a script."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--retries", type=int, default=2)
    parser.add_argument("--ending", choices=("none", "limit", "cancel"), default="none")
    parser.add_argument("--lost", default="", help="nodes that are gone")
    options = parser.parse_args()
    verdict = conclude(
        RunDir(options.run_dir),
        options.attempt,
        retries=options.retries,
        ending=options.ending,
        lost=options.lost,
    )
    print(f"accrete: {verdict.outcome.name.lower()}: {verdict.reason}", flush=True)
    sys.exit(verdict.outcome)


if __name__ == "__main__":
    main()
