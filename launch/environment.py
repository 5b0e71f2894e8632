"""What a run stands on: versions, hardware, the processes that fit it, the state of the sources."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from accrete.pipeline.distributed.config import EngineConfig

PACKAGES = (
    *("accrete", "torch", "transformers", "peft", "deepspeed", "accelerate", "datasets"),
    *("tokenizers", "sentencepiece", "safetensors", "numpy"),
)
CPU_PROCESSES = 2
"""Processes on a machine without a GPU, unless the recipe says otherwise."""


def choose_device(engine: EngineConfig) -> str:
    """`cpu` or `cuda`.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    gpus = 0 if engine.device == "cpu" else count_gpus()
    if engine.device == "cuda" and gpus == 0:
        raise ConfigError(
            "engine.device is cuda, but PyTorch sees no CUDA GPU on this machine. "
            "Use engine.device=auto or cpu, or install a CUDA build of torch."
        )
    return "cuda" if gpus else "cpu"


def choose_procs(engine: EngineConfig, device: str) -> int:
    """Processes to start on this machine: what is asked for, or all GPUs, or 2 on a CPU.

    Raises:
        ConfigError: More processes are asked for than the engine or the GPUs allow.
    """
    if engine.kind == "plain":
        if engine.procs not in (None, 1):
            raise ConfigError(
                f"engine.kind plain is one process, engine.procs is {engine.procs}. "
                "Use engine.kind=deepspeed, or engine.procs=1."
            )
        return 1
    if device == "cpu":
        return engine.procs or CPU_PROCESSES
    gpus = count_gpus()
    if engine.procs is not None and engine.procs > gpus:
        raise ConfigError(
            f"engine.procs is {engine.procs}, but this machine has {gpus} GPUs and every process "
            f"needs one. Allowed: 1 to {gpus}; or engine.device=cpu."
        )
    return engine.procs or gpus


def count_gpus() -> int:
    """CUDA GPUs that PyTorch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPUs where they are used."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device == "cuda":
        import torch

        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count_gpus())]
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def git_state() -> dict[str, Any] | None:
    """Commit of accrete's own sources; None if it does not run from its repository."""
    root = Path(__file__).resolve().parent.parent
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def command_line() -> list[str]:
    """How this process was started."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
