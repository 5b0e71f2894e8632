"""How `pytest -n 2` divides the tests: what shares an expensive fixture stays on one worker.

The folders of `TOGETHER` go to a worker each, every other file by itself, the largest first.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# DeepSpeed wraps a function of an optimizer that nothing here uses in torch.compile, and loads the
# whole compiler for it: 1.5 seconds in every process that makes an engine.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Threads of several processes that wait for one another, spinning, on the same few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOGETHER = ("distributed", "runs", "gpu")
"""Folders whose tests share launches and models of a whole session."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    # Not `--dist loadgroup`: xdist 3.8 marks groups in a field that pytest 9.2 no longer reads.
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            folder = path.split("/")[1]
            return folder if folder in TOGETHER else path

    return ByFixtures(config, log)
