"""Content keys of prepared tasks.

A key names everything the token ids depend on, so that a cache entry is never stale: it is either
the right one or another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
"""Raise it when what preparation writes changes."""

FRESH_SECONDS = 2.0
"""A file changed so recently may change again without a new time stamp."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file aside and rename it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as text:
        json.dump(value, text, ensure_ascii=False, indent=1)
    os.replace(name, path)


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change.

    The memory only saves time: an entry that is lost or overwritten by another process is hashed
    again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}

    def __call__(self, path: Path) -> str:
        """Hash one file."""
        stat = path.stat()
        key, mark = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        entry = self._known.get(key)
        if isinstance(entry, list) and len(entry) == 3 and entry[:2] == mark:
            return str(entry[2])
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time() - stat.st_mtime > FRESH_SECONDS:
            self._known[key] = [*mark, found]
            self._changed = True
        return found

    def save(self) -> None:
        """Keep what was learned."""
        if self._changed:
            write_json(self._path, self._known)
            self._changed = False
