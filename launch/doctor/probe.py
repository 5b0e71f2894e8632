"""One process of the doctor's launch: `python -m accrete.launch.doctor.probe --out DIR ...`.

Started by `team` with the variables that a worker of a run would have. It leaves what it found in
`DIR/rank-<r>.json`; rank 0 also gathers all ranks' answers into `DIR/all.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accrete.launch.cluster.contract import read_place
from accrete.launch.doctor.machine import describe_deepspeed, describe_gpus, describe_machine
from accrete.launch.worker import die_with_parent
from accrete.pipeline.errors import AccreteError
from accrete.pipeline.run_dir import write_json

VISIBLE_S = 30.0
"""Seconds that a new file may take to show up on another node."""
GATHER_S = 120.0
"""Seconds that rank 0 waits for the others' reports, once all that they do together is done."""


def main() -> None:
    """Probe, write, and end without a farewell, which could hang in a broken process group."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m accrete.launch.doctor.probe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--deepspeed", action="store_true")
    options = parser.parse_args()
    probe(options)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def probe(options: argparse.Namespace) -> None:
    """Everything that one process does."""
    place, rank = read_place(os.environ), int(os.environ["RANK"])
    local = int(os.environ["LOCAL_RANK"])
    report: dict[str, Any] = {"rank": rank, "node": place.node_rank}
    if local == 0:
        report["machine"] = describe_machine()
    os.environ.setdefault("DS_ACCELERATOR", options.device)
    board = None
    try:
        from accrete.launch.doctor.exchange import Board

        board = Board(place, rank, options.limit)
        report.update(_together(board, options, local))
    except AccreteError as error:
        report["error"] = str(error)
    if local == 0:
        report.update(_alone(options))
    _write(options.out, report)
    if board is not None:
        _gather(board, options.out, report)


def _together(board: Any, options: argparse.Namespace, local: int) -> dict[str, Any]:
    """What all ranks do: meet, sum, look at the folders. Collective: yes."""
    import torch

    from accrete.launch.doctor.exchange import meet, try_all_reduce
    from accrete.launch.doctor.folders import host_folder, visit_folder

    absent = meet(board, options.limit, lambda: _gone(options.out))
    found: dict[str, Any] = {"absent": absent}
    silent: list[int] = []
    if not absent:
        device = torch.device("cpu")
        if options.device == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        found["all_reduce"] = try_all_reduce(board, device, options.limit)
        silent = found["all_reduce"].get("silent", [])
    present = [rank for rank in range(1, board.world) if rank not in {*absent, *silent}]
    found["folders"] = {}
    # Rank 0 may still be waiting for somebody else: the others wait longer than it does.
    visible = min(VISIBLE_S, options.limit)
    patience = 2 * (options.limit + visible)
    for entry in options.folder:
        name, _, path = entry.partition("=")
        if board.rank == 0:
            answer = host_folder(board, name, Path(path), present, options.limit + visible)
            found["folders"][name] = answer
        else:
            visit_folder(board, name, patience, visible)
    return found


def _gone(out: Path) -> Iterator[int]:
    """Ranks of this node that `team` has seen end too early."""
    for path in out.glob("gone-*"):
        yield int(path.name.removeprefix("gone-"))


def _alone(options: argparse.Namespace) -> dict[str, Any]:
    """What one process of each node looks at by itself."""
    found: dict[str, Any] = {"devices": describe_gpus()}
    if options.deepspeed:
        found["deepspeed"] = describe_deepspeed()
    return found


def _write(out: Path, report: dict[str, Any]) -> None:
    write_json(out / f"rank-{report['rank']}.json", report)


def _gather(board: Any, out: Path, report: dict[str, Any]) -> None:
    """Hand this rank's report to rank 0, which writes all of them. Collective: yes."""
    board.post(f"report/{board.rank}", report)
    if board.rank != 0:
        return
    lost = {*report.get("absent", []), *report.get("all_reduce", {}).get("silent", [])}
    keys = [f"report/{rank}" for rank in range(board.world) if rank not in lost]
    board.await_all(keys, GATHER_S, lambda: (f"report/{rank}" for rank in _gone(out)))
    reports = [board.read(key) for key in keys if board.store.check([key])]
    write_json(out / "all.json", reports)


if __name__ == "__main__":
    main()
