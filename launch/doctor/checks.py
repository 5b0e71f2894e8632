"""One thing looked at, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """The run will work, but something is odd or slow."""
    FAILURE = "failure"
    """The run would not start, or would not be right."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    found: str
    allowed: str = ""
    """What it should be; empty where all is well."""
    action: str = ""
    """What to do about it; empty where all is well."""

    def to_json(self) -> dict[str, str]:
        """A JSON-able dict."""
        return {key: str(value) for key, value in asdict(self).items()}


def ok(name: str, found: str) -> Check:
    """All is well."""
    return Check(name=name, status=Status.OK, found=found)


def warning(name: str, found: str, allowed: str, action: str) -> Check:
    """Something to know about."""
    return Check(name=name, status=Status.WARNING, found=found, allowed=allowed, action=action)


def failure(name: str, found: str, allowed: str, action: str) -> Check:
    """Something that would stop the run."""
    return Check(name=name, status=Status.FAILURE, found=found, allowed=allowed, action=action)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that the doctor has to say on one node."""

    checks: Sequence[Check]
    nodes: int = 1
    node_rank: int = 0
    procs_per_node: int = 1

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return self.count(Status.FAILURE) > 0

    def count(self, status: Status) -> int:
        """Checks that ended so."""
        return sum(check.status is status for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "ok": not self.failed,
            "nodes": self.nodes,
            "node_rank": self.node_rank,
            "procs_per_node": self.procs_per_node,
            **{
                f"{status}s" if status is not Status.OK else "passed": self.count(status)
                for status in Status
            },
            "checks": [check.to_json() for check in self.checks],
        }
