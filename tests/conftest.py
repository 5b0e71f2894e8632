"""Which tests share a worker of pytest-xdist, so that an expensive launch or model is made once.

`make test` runs `pytest -n 2 --dist loadgroup`: the launches of several processes on one worker,
whole runs on another when it is free, every other file by itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOGETHER = ("distributed", "runs", "gpu")
"""Folders whose tests share fixtures of a whole session."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        where = item.path.relative_to(HERE)
        group = where.parts[0] if where.parts[0] in TOGETHER else where.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
