"""Rank 0 writes, the others read: with ranks as threads, and folders that misbehave."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from accrete.launch.doctor import folders
from accrete.launch.doctor.folders import host_folder, visit_folder
from accrete.pipeline.errors import DistributedError


class MemoryBoard:
    """The notice board without a network; `redirect` shows a rank another trial folder."""

    def __init__(self, values: dict[str, Any], rank: int, redirect: Path | None = None) -> None:
        self.values, self.rank, self._redirect = values, rank, redirect

    def post(self, key: str, value: Any) -> None:
        self.values[key] = value

    def read(self, key: str) -> Any:
        value = self.values[key]
        if self._redirect is not None and isinstance(value, dict) and "trial" in value:
            return value | {"trial": str(self._redirect)}
        return value

    def await_all(self, keys: Iterable[str], limit: float) -> list[str]:
        deadline, missing = time.monotonic() + limit, list(keys)
        while missing and time.monotonic() < deadline:
            missing = [key for key in missing if key not in self.values]
            time.sleep(0.002)
        return missing

    def await_key(self, key: str, limit: float) -> Any:
        if self.await_all([key], limit):
            raise DistributedError(key)
        return self.read(key)


def together(path: Path, redirect: Path | None = None, ranks: int = 3) -> dict[str, Any]:
    """Rank 0 and its visitors; the last visitor is the one that is redirected."""
    values: dict[str, Any] = {}

    def visit(rank: int) -> None:
        board: Any = MemoryBoard(values, rank, redirect if rank == ranks - 1 else None)
        visit_folder(board, "cache", 5, 0.3)

    threads = [threading.Thread(target=visit, args=(rank,)) for rank in range(1, ranks)]
    for thread in threads:
        thread.start()
    chief: Any = MemoryBoard(values, 0)
    found = host_folder(chief, "cache", path, range(1, ranks), 5)
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    return found


def test_all_see_and_lock_and_write(tmp_path: Path) -> None:
    found = together(tmp_path)
    assert found["silent"] == []
    assert "error" not in found
    for answer in found["others"].values():
        assert answer["seen_s"] < 1
        assert answer["replaced_s"] < 1
        assert (answer["lock"], answer["write"]) == ("held", None)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_file_system(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    found = together(shared, redirect=elsewhere)
    assert found["others"][1]["seen_s"] is not None
    assert found["others"][2] == {"seen_s": None}


def test_a_file_system_that_cuts_a_replaced_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sshfs was seen to do: the new text at the old length."""
    first = 32

    def cut(path: Path, encoding: str = "utf-8") -> str:
        return path.read_bytes()[:first].decode(encoding)

    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, encoding=None: (
            cut(self) if threading.current_thread() is not threading.main_thread() else real(self)
        ),
    )
    found = together(tmp_path)
    assert [answer["replaced_s"] for answer in found["others"].values()] == [None, None]


def test_locks_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    found = together(tmp_path)
    assert found["lock"] == "free"
    assert [answer["lock"] for answer in found["others"].values()] == ["free", "free"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # /sys takes no new folders, whoever asks.
    found = together(Path("/sys/accrete/cache"))
    assert found["base"] == "/sys"
    assert "/sys/" in found["error"]
    assert found["others"] == {}


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    board: Any = MemoryBoard(values, 0)
    found = host_folder(board, "cache", tmp_path, [1], 0.2)
    assert found["silent"] == [1]


def test_existing_parent(tmp_path: Path) -> None:
    assert folders.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert folders.existing_parent(tmp_path) == tmp_path
