"""What a node says of itself: versions, cores, memory, GPUs, DeepSpeed.

Runs in the probe of each node's first process; everything it gives is JSON-able.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

from accrete.launch.cluster.contract import usable_cores
from accrete.launch.environment import hardware, versions

GIB = 2**30
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def describe_machine() -> dict[str, Any]:
    """Host, versions, cores, memory; imports nothing heavy."""
    found, cores = hardware("cpu"), usable_cores()
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "cores": cores,
        "cpu": found["cpu"],
        "memory_gib": found["memory_gib"],
        "free_memory_gib": _free_memory(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores),
        "driver": _driver(),
    }


def _free_memory() -> float | None:
    """GiB of memory that programs can still get."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return round(int(line.split()[1]) / 2**20, 1)
    return None


def _driver() -> str | None:
    """Version of the NVIDIA driver; None if the kernel has none."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def describe_gpus() -> dict[str, Any]:
    """What PyTorch sees of CUDA; imports torch."""
    import torch

    found: dict[str, Any] = {
        "cuda_build": torch.version.cuda,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus": [],
    }
    if not torch.cuda.is_available():
        return found
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
        found["gpus"].append(
            {
                "name": torch.cuda.get_device_name(index),
                "memory_gib": round(total / GIB, 1),
                "free_gib": round(free / GIB, 1),
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    if torch.distributed.is_nccl_available():
        nccl: Any = torch.cuda.nccl
        found["nccl"] = ".".join(str(part) for part in nccl.version())
    return found


def describe_deepspeed() -> dict[str, Any]:
    """Whether DeepSpeed can be imported here, and the accelerator that it takes."""
    try:
        from deepspeed.accelerator import get_accelerator

        return {
            "version": metadata.version("deepspeed"),
            "accelerator": str(get_accelerator().device_name()),
        }
    except Exception as error:  # its import runs a lot of code, and compilers' version checks
        return {"error": f"{type(error).__name__}: {error}"}
