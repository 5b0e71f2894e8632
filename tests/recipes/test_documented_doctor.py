"""Every `doctor` and `fetch` of the docs is run, in the order of its page, as a user would.

The hub is a server on this machine that has a tiny T5 under the published name. Only the numbers of
processes and the addresses of nodes are others. `tests/cluster` runs the lines for several nodes on
several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import author_folders as made
from documented import lines
from fake_hub import fake_hub
from inprocess import free_port

ACCRETE = Path(sys.executable).with_name("accrete")
ASKED = [words for _, words in lines() if "doctor" in words or "fetch" in words]
OF_A_NODE = ["NNODES=2", "NODE_RANK=0", "NPROC_PER_NODE=8", "MASTER_ADDR=node1"]
BY_SLURM = ["srun", "--ntasks-per-node=1"]


def start(words: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.Popen(
        [ACCRETE, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=250)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def test_no_line_is_left_out() -> None:
    plain = [words for words in ASKED if words[0] == "accrete"]
    assert [words[1] for words in plain] == ["doctor", "doctor", "doctor", "fetch", "doctor"]
    others = [words for words in ASKED if words[0] != "accrete"]
    assert [words[: words.index("accrete")] for words in others] == [
        BY_SLURM,
        [*OF_A_NODE, "MASTER_PORT=29500"],
    ]


def test_one_machine_before_and_after_fetch(tiny_t5: Path, tmp_path: Path) -> None:
    made.make_olora(tmp_path / "data")
    hub_folder, here = tmp_path / "hub", tmp_path / "here"
    here.mkdir()
    (hub_folder / "models" / "google-t5").mkdir(parents=True)
    (hub_folder / "models" / "google-t5" / "t5-large").symlink_to(tiny_t5)
    said = []
    with fake_hub(hub_folder) as hub:
        caches = {"HF_HOME": str(tmp_path / "home"), "ACCRETE_CACHE": str(tmp_path / "cache")}
        for words in ASKED:
            if words[0] == "accrete":
                # The authors' own folder has no parts, which is what the recipes' notes say.
                more = ["data.benchmark=null"] if len(words) > 2 else []
                process = start([*words[1:], *more], here, {**caches, "HF_ENDPOINT": hub.url})
                said.append(end(process))
    machine, recipe, too_early, fetched, complete = said
    assert [status for status, _ in said] == [0, 0, 1, 0, 0], said
    assert " ranks over " in machine[1]
    assert "ok       deepspeed" in machine[1]
    assert "warning  model" in recipe[1]
    assert "failure  model" in too_early[1]
    assert "accrete fetch standard_cl/order1 model=t5_large data.root=../data" in too_early[1]
    assert "accrete doctor standard_cl/order1" in fetched[1]
    assert "ok       model" in complete[1]
    assert "4 of 4 tokenised" in complete[1]
    assert not list(here.iterdir()), "doctor left something behind"


def test_two_nodes_by_variables(tmp_path: Path) -> None:
    [words] = [words for words in ASKED if words[0] == OF_A_NODE[0]]
    [*given, program, command] = words
    assert (program, command) == ("accrete", "doctor")
    variables = dict(word.split("=") for word in given)
    here = {"NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    cache = {"ACCRETE_CACHE": str(tmp_path / "cache")}
    nodes = [
        start([command], tmp_path, {**variables, **here, **cache, "NODE_RANK": rank})
        for rank in ("0", "1")
    ]
    first, second = (end(node) for node in nodes)
    assert "2 ranks over gloo" in first[1], first
    assert "2 ranks over gloo" not in second[1]
    assert first[0] == 0
    # The one thing that is wrong here is that both nodes are this machine.
    assert second[0] == 1
    assert second[1].count("failure  ") == 1
    assert "MASTER_ADDR=127.0.0.1 is 127.0.0.1, this node itself" in second[1]
