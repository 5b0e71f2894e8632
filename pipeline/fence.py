"""The guard against a second writer: a token in the run folder that only one attempt holds.

A scheduler can lose sight of a node whose processes live on, and start the run anew elsewhere.
Whoever starts last puts a token of its own into the file; the old processes see that it is no
longer theirs and leave without writing. Unlike a lock this needs nothing of the file system but
that a renamed file becomes visible, in the end as a whole.
"""

from __future__ import annotations

import time
from pathlib import Path

from accrete.pipeline.errors import AccreteError
from accrete.pipeline.run_dir import write_text

SECONDS_BETWEEN = 2.0
"""A check that may be skipped is made this often."""
WHOLE_S = 30.0
"""Seconds within which a token that was replaced elsewhere can be read to its end."""


class FencedError(AccreteError):
    """Another attempt has taken the run over; nothing more may be written to its folder."""


class Fence:
    """A run folder's token, as this process knows it."""

    def __init__(self, file: Path, token: str | None) -> None:
        """Hold `token`.

        Args:
            file: The file with the token of the attempt that may write.
            token: This attempt's; None: no launcher fences this run.
        """
        self._file = file
        self._token = token
        self._checked = 0.0

    def check(self, *, always: bool = True) -> None:
        """Make sure that this attempt still owns the run.

        Args:
            always: False: pass if the last check is a moment ago.

        Raises:
            FencedError: It does not.
        """
        if self._token is None:
            return
        now = time.monotonic()
        if not always and now - self._checked < SECONDS_BETWEEN:
            return
        self._checked = now
        owner = read_owner(self._file)
        if owner != self._token:
            raise FencedError(
                f"{self._file}: the run was taken over by attempt {owner or '(none)'}; this one "
                f"({self._token}) leaves without writing anything."
            )


def take(file: Path, token: str) -> None:
    """Make `token` the owner from now on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, token + "\n")


def read_owner(file: Path, patience: float = WHOLE_S) -> str | None:
    """The owner's token, if there is one.

    Some shared file systems show the new content of a replaced file cut to the size of the old one,
    for as long as they remember that size. A whole token ends with a line break.

    Args:
        file: The file with the token.
        patience: Seconds until a token without a line break is taken as it stands.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        if text.endswith("\n") or time.monotonic() > deadline:
            return text.strip() or None
        time.sleep(0.1)
