"""One launch per world size and session; every test reads its case from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Launch
from plan import WORLDS

SECONDS = {1: 600.0, 2: 1500.0, 4: 900.0}


@pytest.fixture(scope="session")
def launches(tmp_path_factory):
    """World size -> Launch, each started when it is first asked for (4 reads what 2 wrote)."""
    root = tmp_path_factory.mktemp("distributed")
    made: dict[int, Launch] = {}

    def launch(world: int) -> Launch:
        if world == 4:
            launch(2)
        if world not in made:
            made[world] = Launch(world, WORLDS[world], root / f"world{world}", SECONDS[world])
        return made[world]

    return launch
