"""What the processes of a launch try together: find each other, then add numbers up.

Everything is told through PyTorch's own key-value store, which rank 0 serves: so that whoever does
not answer, or hangs in the all-reduce, can be named.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from accrete.launch.cluster.contract import Place
from accrete.pipeline.errors import DistributedError

PAUSE_S = 0.05
GIVING_UP_S = 5.0
"""Between the first rank that gives an all-reduce up and the last."""
LATENCY_CALLS = 20
BANDWIDTH_CALLS = 5
BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of the large tensor, by kind of device."""


class Board:
    """The launch's notice board: JSON values by key, and waiting for them."""

    def __init__(self, place: Place, rank: int, limit: float) -> None:
        """Open the store; rank 0 serves it.

        Args:
            place: Where this node stands.
            rank: This process.
            limit: Seconds to wait for rank 0's answer.

        Raises:
            DistributedError: Rank 0 does not answer, or its port is taken.
        """
        self.rank, self.world = rank, place.world
        address = f"{place.master_addr}:{place.master_port}"
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]
                place.master_addr,
                place.master_port,
                is_master=rank == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=limit),
            )
        except Exception as error:  # refused, unknown name, taken port: RuntimeError's children
            first = str(error).strip().partition("\n")[0]
            what = "cannot be served" if rank == 0 else f"did not answer within {limit:.0f} s"
            raise DistributedError(f"rank 0 at {address} {what}: {first}") from error

    def post(self, key: str, value: Any) -> None:
        """Put up a value for all to read."""
        self.store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """A value that is there."""
        return json.loads(self.store.get(key))

    def await_key(self, key: str, limit: float) -> Any:
        """A value, as soon as it is there.

        Raises:
            DistributedError: It never came.
        """
        if self.await_all([key], limit):
            raise DistributedError(f"rank 0 has not said `{key}` within {limit:.0f} s")
        return self.read(key)

    def await_all(
        self,
        keys: Iterable[str],
        limit: float,
        hopeless: Callable[[], Iterable[str]] = tuple,
    ) -> list[str]:
        """Wait until all keys are there; returns those that are not after `limit` seconds.

        Args:
            keys: What to wait for.
            limit: Seconds.
            hopeless: Gives keys that will never come, when asked.
        """
        deadline = time.monotonic() + limit
        missing = list(keys)
        while True:
            missing = [key for key in missing if not self.store.check([key])]
            lost = set(hopeless()) if missing else set()
            if lost.issuperset(missing) or time.monotonic() > deadline:
                return missing
            time.sleep(PAUSE_S)


def ranks_of(keys: Iterable[str]) -> list[int]:
    """The ranks that keys such as `here/3` end in."""
    return [int(key.rpartition("/")[2]) for key in keys]


def meet(board: Board, limit: float, gone: Callable[[], Iterable[int]]) -> list[int]:
    """Wait until every rank of the launch is there; the ranks that are not.

    Args:
        board: The notice board.
        limit: Seconds that rank 0 waits for the others.
        gone: Ranks of this node whose process has ended (asked on rank 0).

    Raises:
        DistributedError: Rank 0 went away meanwhile.

    Collective: yes.
    """
    board.post(f"here/{board.rank}", True)
    if board.rank == 0:
        keys = [f"here/{rank}" for rank in range(board.world)]
        absent = board.await_all(keys, limit, lambda: (f"here/{rank}" for rank in gone()))
        board.post("absent", ranks_of(absent))
    found: list[int] = board.await_key("absent", limit + 30)
    return found


def try_all_reduce(board: Board, device: torch.device, limit: float) -> dict[str, Any]:
    """Sum numbers over all ranks and time it; never raises.

    Returns:
        On rank 0 the outcome of all: `errors` (rank -> message), `silent` (ranks that did not come
        back in time) and, where it worked, `latency_us` and `gb_per_s`. Elsewhere this rank's part.

    Collective: yes.
    """
    began = time.monotonic()
    try:
        mine = _all_reduce(board, device, limit)
    except Exception as error:  # gloo, NCCL and the store raise RuntimeError's children
        mine = {"error": str(error).strip().partition("\n")[0]}
    board.post(f"reduced/{board.rank}", mine)
    if board.rank != 0:
        return mine
    keys = [f"reduced/{rank}" for rank in range(board.world)]
    # Whoever hangs has kept the others waiting: they give up when this rank does.
    left = max(GIVING_UP_S, limit - (time.monotonic() - began))
    silent = ranks_of(board.await_all(keys, left))
    answers = {
        rank: board.read(f"reduced/{rank}") for rank in range(board.world) if rank not in silent
    }
    errors = {rank: answer["error"] for rank, answer in answers.items() if "error" in answer}
    return {**mine, "silent": silent, "errors": errors}


def _all_reduce(board: Board, device: torch.device, limit: float) -> dict[str, Any]:
    """The all-reduce itself: once for its result, then for its time."""
    deadline = time.monotonic() + limit
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("all_reduce", board.store),  # type: ignore[attr-defined]
        rank=board.rank,
        world_size=board.world,
        # Longer than ours: NCCL's own watchdog would end the process without a word.
        timeout=timedelta(seconds=limit + (60 if device.type == "cuda" else 0)),
    )
    one = torch.full((1,), board.rank + 1.0, device=device)
    _reduce(one, deadline)
    expected = board.world * (board.world + 1) / 2
    if one.item() != expected:
        raise DistributedError(f"the sum over ranks is {one.item():g}, not {expected:g}")
    times = [_reduce(one, deadline) for _ in range(LATENCY_CALLS)]
    large = torch.ones(BYTES[device.type] // 4, device=device)
    _reduce(large, deadline)
    seconds = statistics.median(_reduce(large, deadline) for _ in range(BANDWIDTH_CALLS))
    # What crosses a link: a ring sends 2 (n - 1) / n of the bytes.
    crossed = 2 * (board.world - 1) / board.world * BYTES[device.type]
    return {
        "latency_us": round(statistics.median(times) * 1e6),
        "gb_per_s": round(crossed / seconds / 1e9, 2),
        "backend": dist.get_backend(),
    }


def _reduce(tensor: torch.Tensor, deadline: float) -> float:
    """Seconds of one all-reduce.

    Raises:
        DistributedError: It did not end in time.
    """
    began = time.perf_counter()
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    if tensor.device.type == "cpu":
        work.wait()
        return time.perf_counter() - began
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise DistributedError("the all-reduce did not end in time")
        time.sleep(0)
    torch.cuda.synchronize()
    return time.perf_counter() - began
