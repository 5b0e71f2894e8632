"""The process group: start it, and the few collectives accrete needs beside DeepSpeed's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from accrete.pipeline.errors import DistributedError

AT_ONCE = 1 << 24
"""Elements of a matrix that are reduced at once: gloo holds them a second time."""
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Who this process is."""

    rank: int
    world: int
    device: torch.device


def start(device: str, timeout_s: int) -> Ranks:
    """Join the process group described by the environment and prepare DeepSpeed for it.

    Must run before the first import of deepspeed: it sets the accelerator and switches off the
    shared-memory operator, whose first use compiles for a minute and gains nothing here.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: Seconds after which a waiting collective fails.

    Raises:
        DistributedError: The rendezvous variables are missing, or CUDA was asked for in vain.

    Collective: yes.
    """
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing:
        raise DistributedError(
            f"This process lacks {', '.join(missing)}. Start accrete with `accrete run`, torchrun "
            "or srun, which set them; for one process by hand set RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 "
            "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500."
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    target = _device(device, int(os.environ["LOCAL_RANK"]))
    os.environ.setdefault("DS_ACCELERATOR", target.type)
    if not dist.is_initialized():
        backend = "nccl" if target.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
    return Ranks(rank, world, target)


def _device(asked: str, local_rank: int) -> torch.device:
    """The device of this process."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DistributedError(
            "engine.device is cuda but this machine shows no CUDA GPU to PyTorch "
            f"{torch.__version__}. Use engine.device=cpu, or install a CUDA build of torch."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any, world: int) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Collective: yes."""
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def gather_equal(tensor: torch.Tensor, world: int) -> list[torch.Tensor]:
    """`tensor` of every rank, in rank order; all pass the same shape and dtype. No gradient flows.

    Collective: yes (nothing is sent for one rank).
    """
    mine = tensor.detach().contiguous()
    if world == 1:
        return [mine]
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return parts


def sum_over_ranks(tensor: torch.Tensor, world: int) -> torch.Tensor:
    """Sum `tensor` over ranks, in place. Collective: yes (nothing is sent for one rank)."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def row_block(rows: int, rank: int, world: int) -> slice:
    """The rows of a [rows, ...] matrix that `rank` owns; blocks differ by one row at most."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


def in_parts(matrix: torch.Tensor, elements: int) -> tuple[torch.Tensor, ...]:
    """Views of whole rows, each of at most so many elements or of one row."""
    return torch.split(matrix, max(1, elements // max(1, matrix[:1].numel())))


def reduce_rows(matrix: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Sum a [rows, ...] matrix over ranks and keep this rank's row block.

    Args:
        matrix: [rows, ...], contiguous, this rank's own part; overwritten.
        rank: This rank.
        world: Ranks in all.

    Returns:
        [rows of this rank, ...], a tensor of its own.

    Collective: yes; every block goes to its owner once, so a rank receives 1/world of the bytes.
    """
    if world > 1:
        for owner in range(world):
            block = matrix[row_block(matrix.shape[0], owner, world)]
            for part in in_parts(block, AT_ONCE):
                if part.numel():
                    dist.reduce(part, dst=owner)
    return matrix[row_block(matrix.shape[0], rank, world)].clone()


def gather_rows(block: torch.Tensor, rows: int, rank: int, world: int) -> torch.Tensor | None:
    """Put row blocks together on rank 0.

    Args:
        block: [rows of this rank, ...].
        rows: Rows of the whole matrix.
        rank: This rank.
        world: Ranks in all.

    Returns:
        [rows, ...] on rank 0, None elsewhere.

    Collective: yes.
    """
    if world == 1:
        return block.clone()
    largest = -(-rows // world)
    padded = block.new_zeros((largest, *block.shape[1:]))
    padded[: block.shape[0]] = block
    parts = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, parts, dst=0)
    if parts is None:
        return None
    sizes = [row_block(rows, owner, world) for owner in range(world)]
    return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, sizes, strict=True)])


def owners_of(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank decomposes the [size, size] matrix of each name, all of which are needed by all.

    The largest go first, each to the rank with the least to do so far, as size cubed counts it:
    taken in turn, the wide inputs of every block's down-projection could fall to one rank.

    Args:
        sizes: Name -> size, in the same order on every rank.
        world: Ranks in all.

    Returns:
        Name -> rank, in the order of `sizes`.
    """
    return share_out({name: size**3 for name, size in sizes.items()}, world)


def share_out(costs: Mapping[str, int], world: int) -> dict[str, int]:
    """Name -> rank, in the order of `costs`; the dearest go first, to who has the least to do."""
    load = [0] * world
    owners: dict[str, int] = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def sum_to_owners(
    tensors: dict[str, torch.Tensor], owners: Mapping[str, int], rank: int, world: int
) -> None:
    """Sum every tensor over ranks; each rank keeps those that it owns and drops the others.

    Args:
        tensors: By name, in the same order on every rank.
        owners: Name -> rank.
        rank: This one.
        world: Ranks in all.

    Collective: yes (nothing is sent for one rank).
    """
    for name in list(tensors):
        if world > 1:
            dist.reduce(tensors[name], dst=owners[name])
        if owners[name] != rank:
            del tensors[name]


def broadcast(tensor: torch.Tensor, owner: int, world: int) -> torch.Tensor:
    """Overwrite `tensor` with `owner`'s copy, in place; all ranks pass the same shape and dtype.

    Decompositions differ in signs and near-equal directions between machines: one rank computes,
    the others take its result. Collective: yes (nothing is sent for one rank).
    """
    if world > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def broadcast_any(value: torch.Tensor | None, owner: int, world: int) -> torch.Tensor:
    """`owner`'s tensor on every rank, where only the owner knows its shape. Collective: yes."""
    if world == 1:
        assert value is not None
        return value
    mine = None if value is None else (tuple(value.shape), value.dtype, value.device.type)
    shape, dtype, kind = gather(mine, world)[owner]
    if value is None:
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind
        value = torch.empty(shape, dtype=dtype, device=device)
    value = value.contiguous()
    dist.broadcast(value, src=owner)
    return value
