"""What the attempts at one run leave in `RUN/launch`: who owns it, how far it came, how it ended.

`attempts.jsonl` (append-only) has a line when an attempt begins and one when it was judged; `owner`
holds the token of the attempt that may write; `interrupted.json` and `finished.json` are markers of
the trainers. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accrete.pipeline import fence
from accrete.pipeline.run_dir import CHECKPOINT, RunDir, read_json, sync_folder, write_json

ATTEMPTS_FILE = "attempts.jsonl"
INTERRUPTED_FILE = "interrupted.json"
FINISHED_FILE = "finished.json"
TOKEN_VARIABLE = "ACCRETE_TOKEN"
"""The attempt's fencing token, in the environment of the first node's processes."""


@dataclass(frozen=True, order=True)
class Progress:
    """How far a run has come; a later one is larger."""

    scored: int
    """Stages that are scored."""
    stage: int
    """Stage of the newest checkpoint, -1 without any."""
    step: float
    """Steps of that stage which the checkpoint holds; infinite after its end."""
    groups: int = 0
    """Parts of a scoring under way that are done."""

    def __str__(self) -> str:
        if self.stage < 0:
            return "nothing saved yet"
        where = f"stage {self.stage}"
        what = where if self.step == float("inf") else f"{where}, step {self.step:.0f}"
        return f"saved up to {what}; {self.scored} stages scored"

    def to_list(self) -> list[float | int | None]:
        """As JSON holds it."""
        step = None if self.step == float("inf") else self.step
        return [self.scored, self.stage, step, self.groups]


def read_progress(folder: RunDir) -> Progress:
    """How far the run on disk has come."""
    saved = [(-1, 0.0)]
    for manifest in folder.checkpoints.glob("stage-*/checkpoint.json"):
        name = CHECKPOINT.fullmatch(manifest.parent.name)
        if name is not None:
            saved.append((int(name[1]), float(name[2] or "inf")))
    scored = sum(1 for _ in folder.stages.glob("*/score.json"))
    groups = sum(1 for _ in folder.partial.glob("*/*.json"))
    return Progress(scored, *max(saved), groups)


def begin_attempt(folder: RunDir, name: str, fields: Mapping[str, Any]) -> str:
    """Take the run over: from now on only this attempt may write to its folder.

    Args:
        folder: The run folder.
        name: The attempt's name, as the launcher gave it.
        fields: What else to note about it.

    Returns:
        The attempt's fencing token.
    """
    token = f"{name}-{secrets.token_hex(4)}"
    fence.take(folder.owner, token)
    (folder.launch / INTERRUPTED_FILE).unlink(missing_ok=True)
    for old in folder.logs.glob("error-*.json"):
        old.unlink(missing_ok=True)
    note(
        folder,
        {
            "event": "begun",
            "attempt": name,
            "token": token,
            "host": socket.gethostname(),
            "progress": read_progress(folder).to_list(),
            **fields,
        },
    )
    return token


def take_over(folder: RunDir) -> dict[str, str]:
    """Take a run that a cluster began, to go on with it on this machine.

    Returns:
        The variables that its processes need; none where no launcher ever had the run.
    """
    if not folder.owner.is_file():
        return {}
    return {TOKEN_VARIABLE: begin_attempt(folder, f"local-{os.getpid()}", {"nodes": 1})}


def note(folder: RunDir, record: Mapping[str, Any]) -> None:
    """Add a line to attempts.jsonl."""
    folder.launch.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), **record}, ensure_ascii=False) + "\n"
    path = folder.launch / ATTEMPTS_FILE
    # A machine that died may have left a part of a line, which must not take this one along.
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(line if whole else "\n" + line)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder.launch)


def note_submitted(folder: RunDir) -> None:
    """Add that a person has launched the run: attempts that stand still are counted from here."""
    note(folder, {"event": "submitted"})


def note_queued(folder: RunDir, job: str) -> None:
    """Add the number of the scheduler's job."""
    note(folder, {"event": "queued", "job": job})


def queued_job(folder: RunDir) -> str | None:
    """The number of the scheduler's newest job for this run, if it ever had one."""
    jobs = [line["job"] for line in read_attempts(folder) if line["event"] == "queued"]
    return str(jobs[-1]) if jobs else None


def note_judged(folder: RunDir, name: str, outcome: str, reason: str) -> None:
    """Add how an attempt ended to attempts.jsonl."""
    progress = read_progress(folder).to_list()
    note(
        folder,
        {
            "event": "judged",
            "attempt": name,
            "outcome": outcome,
            "reason": reason,
            "progress": progress,
        },
    )


def read_attempts(folder: RunDir) -> list[dict[str, Any]]:
    """All lines of attempts.jsonl; a last one that was cut off is passed over."""
    path = folder.launch / ATTEMPTS_FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def begun(folder: RunDir, name: str) -> dict[str, Any] | None:
    """The newest beginning of an attempt of this name, if its first node ever got that far."""
    lines = [x for x in read_attempts(folder) if x["event"] == "begun" and x["attempt"] == name]
    return lines[-1] if lines else None


def standstill(folder: RunDir) -> set[str]:
    """The latest attempts that have left the run where it is now.

    A new submission, and an attempt after which nothing was to be started again, end the row.
    """
    now, names = read_progress(folder).to_list(), set[str]()
    for line in reversed(read_attempts(folder)):
        ended = line["event"] == "judged" and line["outcome"] != "again"
        if line["event"] == "submitted" or ended or line.get("progress", now) != now:
            break
        if "attempt" in line:
            names.add(line["attempt"])
    return names


def mark_interrupted(folder: RunDir, token: str | None, reason: str) -> None:
    """Say that the run left in good order, because it was asked to."""
    folder.launch.mkdir(parents=True, exist_ok=True)
    content = {"token": token, "reason": reason, "time": time.time()}
    write_json(folder.launch / INTERRUPTED_FILE, content)


def was_interrupted(folder: RunDir, token: str) -> str | None:
    """Why the attempt with this token left in good order, if it did."""
    path = folder.launch / INTERRUPTED_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    return str(content["reason"]) if content["token"] == token else None


def mark_finished(folder: RunDir) -> None:
    """Say that every stage is trained and scored; written last of all."""
    folder.launch.mkdir(parents=True, exist_ok=True)
    write_json(folder.launch / FINISHED_FILE, {"time": time.time()})


def has_finished(folder: RunDir) -> bool:
    """Whether the run has reached its end."""
    return (folder.launch / FINISHED_FILE).is_file()
