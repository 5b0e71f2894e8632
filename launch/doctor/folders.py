"""Whether all processes of a launch see the same folders, and what these folders can do.

Rank 0 writes a token into a folder of its own inside each; all others read it, read what replaces
it, and try to take a lock that rank 0 holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accrete.launch.doctor.exchange import Board, ranks_of
from accrete.pipeline.errors import DistributedError
from accrete.pipeline.run_dir import write_text

TOKEN = "token"
LOCK = "lock"
PREFIX = ".accrete-doctor-"


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def host_folder(
    board: Board, name: str, path: Path, present: Sequence[int], limit: float
) -> dict[str, Any]:
    """Rank 0's part for one folder: write, replace, lock, ask the others.

    Args:
        board: The notice board.
        name: What the folder is for; the others use the same word.
        path: The folder, or where it will be made.
        present: Ranks that take part, without 0.
        limit: Seconds to wait for each answer.

    Returns:
        `base` (the folder looked at), `free` and `total` bytes, `error` if rank 0 itself fails,
        `lock` (what its own second try to lock said), `others` (rank -> their answer), `silent`.

    Collective: yes, with `visit_folder` on the ranks of `present`.
    """
    base = existing_parent(path)
    found: dict[str, Any] = {"path": str(path), "base": str(base), "others": {}, "silent": []}
    token = secrets.token_hex(16)
    try:
        usage = shutil.disk_usage(base)
        found.update(free=usage.free, total=usage.total)
        with _trial_folder(base) as trial, _held(trial / LOCK):
            write_text(trial / TOKEN, token)
            found["lock"] = _try_lock(trial / LOCK)
            board.post(f"{name}/first", {"trial": str(trial), "token": token})
            silent = board.await_all([f"{name}/read/{rank}" for rank in present], limit)
            # Longer than what it replaces: some file systems cut the new text to the old length.
            write_text(trial / TOKEN, token * 3)
            if (trial / TOKEN).read_text("utf-8") != token * 3:
                found["error"] = "a file that was renamed over another one kept the old content"
            board.post(f"{name}/second", token * 3)
            silent += board.await_all([f"{name}/done/{rank}" for rank in present], limit)
            found["silent"] = sorted(set(ranks_of(silent)))
            found["others"] = {
                rank: board.read(f"{name}/done/{rank}")
                for rank in present
                if rank not in found["silent"]
            }
    except OSError as error:
        found["error"] = f"{error.strerror or error} ({error.filename or base})"
        board.post(f"{name}/first", {"error": found["error"]})
    return found


def visit_folder(board: Board, name: str, limit: float, visible_s: float) -> None:
    """The other ranks' part: read what rank 0 wrote, and report.

    Args:
        board: The notice board.
        name: As in `host_folder`.
        limit: Seconds to wait for rank 0.
        visible_s: Seconds that a new file may take to show up here.

    Collective: yes, with `host_folder` on rank 0.
    """
    said = board.await_key(f"{name}/first", limit)
    if "error" in said:
        return
    trial = Path(said["trial"])
    answer: dict[str, Any] = {"seen_s": _await_text(trial / TOKEN, said["token"], visible_s)}
    if answer["seen_s"] is not None:
        answer["lock"] = _try_lock(trial / LOCK)
        answer["write"] = _try_write(trial / f"rank-{board.rank}")
    board.post(f"{name}/read/{board.rank}", True)
    if answer["seen_s"] is not None:
        with suppress(DistributedError):
            second = board.await_key(f"{name}/second", limit)
            answer["replaced_s"] = _await_text(trial / TOKEN, second, visible_s)
    board.post(f"{name}/done/{board.rank}", answer)


@contextmanager
def _trial_folder(base: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards."""
    trial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        trial.chmod(0o755)
        yield trial
    finally:
        shutil.rmtree(trial, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock file, where the file system has locks."""
    with path.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _try_lock(path: Path) -> str:
    """`held` as it should be, `free` (somebody else's lock does not hold here), or why not."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "free"


def _try_write(path: Path) -> str | None:
    """Why a file cannot be written here; None if it can."""
    try:
        write_text(path, "here\n")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _await_text(path: Path, text: str, limit: float) -> float | None:
    """Seconds until a file holds exactly `text`; None if it never does."""
    began = time.monotonic()
    while True:
        with suppress(OSError, UnicodeDecodeError):
            # A new listing makes some network file systems ask the server again.
            os.scandir(path.parent).close()
            if path.read_text("utf-8") == text:
                return round(time.monotonic() - began, 2)
        if time.monotonic() - began > limit:
            return None
        time.sleep(0.05)
