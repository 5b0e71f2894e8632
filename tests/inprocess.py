"""The command line and a run's one rank in the test's own process: no libraries to load anew."""

from __future__ import annotations

import io
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from typing import Any

import pytest

from accrete.launch import api, cli
from accrete.launch.execute import execute

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
PLAIN = ("engine.kind=plain", "engine.procs=1", "engine.device=cpu")
"""What a run must be set to."""


def stay_here(run: Any, overrides: Any, procs: int, device: str, lock: int) -> None:
    """In the place of `api._launch`."""
    assert (procs, device) == (1, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ALONE, "MASTER_PORT": str(free_port())}.items():
            patch.setenv(name, value)
        execute(run.path, tuple(overrides))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def call(*arguments: object, **environment: str) -> CompletedProcess[str]:
    """`accrete` with these arguments; its exit status and what it wrote."""
    command = ["accrete", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(api, "_launch", stay_here)
        patch.setattr(sys, "argv", command)
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(command, status, out.getvalue(), err.getvalue())
