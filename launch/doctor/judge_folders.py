"""From what the probes found in the shared folders to checks."""

from __future__ import annotations

from typing import Any

from accrete.launch.cluster.contract import Place
from accrete.launch.doctor.checks import Check, failure, ok, warning
from accrete.launch.doctor.judge import name_ranks

GIB = 2**30
SHARED = "a folder on a file system that all nodes share"
CHANGE = {
    "run folder": "take another --run-dir",
    "cache": "set ACCRETE_CACHE to another folder (storage.cache in a cluster's settings)",
}
UNKNOWN_NEED = GIB
"""Free bytes asked for where no recipe says what a run will write."""


def judge_folder(name: str, found: dict[str, Any], place: Place, need: int | None) -> list[Check]:
    """Whether a folder works for all ranks, and has space.

    Args:
        name: `run folder` or `cache`.
        found: What rank 0 reported of it, see `folders.host_folder`.
        place: The launch.
        need: Bytes that the run will write there, about; None: unknown.
    """
    checks = [_works(name, found, place)]
    if "error" not in found:
        checks += [_space(name, found, need), *_locks(name, found, place)]
    return checks


def _works(name: str, found: dict[str, Any], place: Place) -> Check:
    path, action = found["path"], CHANGE[name]
    others = {int(rank): answer for rank, answer in found["others"].items()}
    if "error" in found:
        return failure(name, f"{path}: {found['error']}", "a folder that can be written to", action)
    if found["silent"]:
        return failure(
            name,
            f"{path}: no answer from {name_ranks(found['silent'], place)}",
            "all ranks read what rank 0 writes",
            "look whether the file system hangs there (`ls` on that node)",
        )
    blind = [rank for rank, answer in others.items() if answer["seen_s"] is None]
    if blind:
        return failure(
            name,
            f"{path}: what rank 0 writes is not visible to {name_ranks(blind, place)}",
            SHARED,
            action,
        )
    stale = [rank for rank, answer in others.items() if answer.get("replaced_s") is None]
    if stale:
        return failure(
            name,
            f"{path}: {name_ranks(stale, place)} never saw the new content of a renamed file",
            "a renamed file replaces the old one whole, on every node",
            f"{action}; some FUSE file systems cache too much",
        )
    shut = {rank: answer["write"] for rank, answer in others.items() if answer["write"]}
    if shut:
        _, why = min(shut.items())
        return failure(
            name,
            f"{path}: {name_ranks(list(shut), place)} cannot write: {why}",
            "every rank can write",
            action,
        )
    return ok(name, f"{path}: {_seen(others)}")


def _seen(others: dict[int, dict[str, Any]]) -> str:
    if not others:
        return "written, renamed and read back"
    slowest = max(max(a["seen_s"], a["replaced_s"]) for a in others.values())
    ranks = f"{len(others)} other rank{'s' if len(others) > 1 else ''}"
    return f"written, renamed and read by {ranks} within {slowest:.1f} s"


def _space(name: str, found: dict[str, Any], need: int | None) -> Check:
    free, wanted = found["free"], UNKNOWN_NEED if need is None else need
    text = f"{free / GIB:.1f} GiB free in {found['base']}"
    if free < wanted:
        return failure(
            f"space for {name}",
            text,
            f"at least {wanted / GIB:.1f} GiB" + ("" if need is None else ", by estimate"),
            f"free some space, or {CHANGE[name]}",
        )
    known = "" if need is None else f", about {need / GIB:.2f} GiB needed"
    return ok(f"space for {name}", text + known)


def _locks(name: str, found: dict[str, Any], place: Place) -> list[Check]:
    """File locks guard against mistakes; the run itself is guarded by its fencing token."""
    others = {int(rank): answer.get("lock", "held") for rank, answer in found["others"].items()}
    loose = {rank: said for rank, said in others.items() if said != "held"}
    if found["lock"] != "held":
        loose[0] = found["lock"]
    if not loose:
        return []
    said = ", ".join(sorted(set(loose.values())))
    return [
        warning(
            f"locks in {name}",
            f"do not hold for {name_ranks(sorted(loose), place)} ({said})",
            "flock keeps a second process away, on every node",
            "mount the file system with flock, or never start two commands in this folder at once",
        )
    ]
