"""A wish to stop, from a signal: the run saves at the end of the step, and leaves in good order.

While a task is trained, a signal is only noted; the ranks tell each other in the collective that
every step has anyway, and all save after the same step. Elsewhere (loading, scoring) nothing is
lost that a resume does not do again from the last checkpoint, so the process leaves at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from accrete.pipeline.errors import AccreteError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What schedulers send before they end a job: warning of a time limit, preemption."""


class InterruptionError(AccreteError):
    """The run was asked to stop and has left in good order; `accrete resume` goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StopSignal:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that asked."""
        self.leaving = False
        """Whether the signal ended what the process was doing at once."""
        self._deferred = 0

    def listen(self) -> None:
        """Handle `SIGNALS` from now on; call it in the main thread, as early as possible."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The launcher and the scheduler often both send one: only the first counts.
        first = self.received is None
        self.received = self.received or signal.Signals(number)
        if first and not self._deferred:
            self.leaving = True
            raise InterruptionError(self.reason)

    @property
    def reason(self) -> str:
        """Why the run leaves, for messages."""
        name = "another rank's signal" if self.received is None else self.received.name
        return f"interrupted by {name}"

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted; who runs the code looks at `received` when it may."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
