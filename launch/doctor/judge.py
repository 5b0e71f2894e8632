"""From what the probes reported to checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accrete.launch.cluster.contract import Place
from accrete.launch.doctor.checks import Check, failure, ok, warning
from accrete.launch.doctor.team import TeamResult

BUSY = 0.1
"""Part of a GPU's memory that may be taken before a warning."""
RUN_FOLDER = "run folder"


def name_ranks(ranks: Sequence[int], place: Place) -> str:
    """Ranks in words: whole nodes where all their ranks are meant."""
    words = []
    for node in range(place.nodes):
        own = range(node * place.procs_per_node, (node + 1) * place.procs_per_node)
        here = [rank for rank in own if rank in ranks]
        if not here:
            continue
        listed = f"rank{'s' if len(here) > 1 else ''} {', '.join(map(str, here))}"
        if place.nodes == 1:
            words.append(listed)
        else:
            whole = len(here) == len(own)
            words.append(f"node {node}{f' ({listed})' if whole else f': {listed}'}")
    return "; ".join(words)


def judge_launch(result: TeamResult, place: Place, limit: float) -> list[Check]:
    """Whether all processes are there, and whether they can add numbers up."""
    checks = [_broken(rank, words) for rank, words in sorted(result.broken.items())]
    errors = {report["rank"]: report["error"] for report in result.reports if "error" in report}
    if errors:
        _, message = min(errors.items())
        checks.append(_lost(errors, message, place))
    chief = next((r for r in result.reports if r["rank"] == 0 and "absent" in r), None)
    if chief is None:
        return checks or [_no_answer(place, limit)] if place.is_first else checks
    absent = [rank for rank in chief["absent"] if rank not in result.broken]
    if absent:
        checks.append(_absent(absent, place, limit))
    if chief["absent"]:
        return checks
    return [*checks, _all_reduce(chief["all_reduce"], place, limit)]


def _broken(rank: int, words: str) -> Check:
    return failure(
        "launch",
        f"the process of rank {rank} ended early: {words}",
        "every process starts and reports",
        "mend what it says; `python -c 'import torch'` shows most of such errors",
    )


def _no_answer(place: Place, limit: float) -> Check:
    return failure(
        "launch",
        "rank 0 left no report",
        f"a report within {limit:.0f} s for each step",
        "raise --timeout if the machine is slow",
    )


def _lost(errors: dict[int, str], message: str, place: Place) -> Check:
    return failure(
        "launch",
        f"{name_ranks(list(errors), place)}: {message}",
        f"every rank reaches {place.master_addr}:{place.master_port}",
        "start the same command on all nodes at once; check MASTER_ADDR and that no firewall "
        "closes the port between nodes",
    )


def _absent(absent: Sequence[int], place: Place, limit: float) -> Check:
    return failure(
        "launch",
        f"did not answer within {limit:.0f} s: {name_ranks(absent, place)}",
        f"all {place.world} ranks on {place.nodes} node{'s' if place.nodes > 1 else ''}",
        "start the same command there, with the same MASTER_ADDR and MASTER_PORT; look at that "
        "node's output, and raise --timeout if its disk is slow",
    )


def _all_reduce(found: dict[str, Any], place: Place, limit: float) -> Check:
    """One check of the outcome on rank 0."""
    ranks = f"{place.world} rank{'s' if place.world > 1 else ''}"
    action = (
        "name the network interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or "
        "network.interface in the cluster's settings; let nodes reach each other on all ports; "
        "NCCL_DEBUG=INFO says more about GPUs"
    )
    if found["silent"]:
        return failure(
            "all-reduce",
            f"did not come back within {limit:.0f} s: {name_ranks(found['silent'], place)}",
            f"a sum over {ranks}",
            action,
        )
    if found["errors"]:
        bad = {int(rank): text for rank, text in found["errors"].items()}
        _, text = min(bad.items())
        return failure(
            "all-reduce",
            f"{name_ranks(list(bad), place)}: {text}",
            f"a sum over {ranks}",
            action,
        )
    speed = "" if place.world == 1 else f", {found['gb_per_s']} GB/s"
    return ok("all-reduce", f"{ranks} over {found['backend']}, {found['latency_us']} µs{speed}")


def judge_devices(
    report: dict[str, Any], device: str, procs: int, wants_bf16: bool, where: str
) -> list[Check]:
    """Devices, memory and threads of one node."""
    machine, found = report["machine"], report["devices"]
    gpus, name = found["gpus"], f"devices{where}"
    if device == "cuda":
        checks = [*_gpus(name, found, machine, procs, wants_bf16), _memory(machine, where)]
        return [*checks, *_cores(machine["cores"], procs, where)]
    threads = machine["threads"]
    text = (
        f"{machine['cores']} cores ({machine['cpu']}), {procs} process"
        f"{'es' if procs > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}"
    )
    checks = [_memory(machine, where)]
    if procs * threads > machine["cores"]:
        checks.insert(
            0,
            warning(
                name,
                text,
                "processes x threads at most the number of cores",
                f"set OMP_NUM_THREADS={max(1, machine['cores'] // procs)}, or use fewer --procs",
            ),
        )
    else:
        checks.insert(0, ok(name, text))
    if machine["driver"] and not gpus:
        build = f"for CUDA {found['cuda_build']}" if found["cuda_build"] else "without CUDA"
        hidden = found["visible"]
        checks.append(
            warning(
                f"gpu{where}",
                f"NVIDIA driver {machine['driver']}, but PyTorch (built {build}) sees no GPU"
                + (f"; CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""),
                "a GPU that is there can be used",
                "install a CUDA build of torch, newer drivers, or ask the scheduler for GPUs",
            )
        )
    return checks


def _gpus(
    name: str, found: dict[str, Any], machine: dict[str, Any], procs: int, wants_bf16: bool
) -> list[Check]:
    gpus = found["gpus"]
    if len(gpus) < procs:
        return [
            failure(
                name,
                f"{len(gpus)} GPUs for {procs} processes"
                + (f"; CUDA_VISIBLE_DEVICES={found['visible']!r}" if found["visible"] else ""),
                "a GPU for each process",
                "ask the scheduler for more GPUs, or use fewer processes",
            )
        ]
    kinds = sorted({f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in gpus})
    text = (
        f"{len(gpus)} x {'; '.join(kinds)}, driver {machine['driver']}, "
        f"CUDA {found['cuda_build']}, NCCL {found.get('nccl', 'absent')}"
    )
    checks = [ok(name, text)]
    if not all(gpu["bf16"] for gpu in gpus):
        tell = failure if wants_bf16 else warning
        checks.append(
            tell(f"bf16 on {name}", "not supported", "bf16 for the base", "set model.dtype=fp32")
        )
    taken = [i for i, gpu in enumerate(gpus) if gpu["free_gib"] < (1 - BUSY) * gpu["memory_gib"]]
    if taken:
        least = min(gpus[i]["free_gib"] for i in taken)
        checks.append(
            warning(
                f"gpu memory on {name}",
                f"other programs hold memory of GPU {', '.join(map(str, taken))}; least free: "
                f"{least} GiB",
                "GPUs to oneself",
                "end those programs (nvidia-smi lists them)",
            )
        )
    return checks


def _cores(cores: int, procs: int, where: str) -> list[Check]:
    """A word where GPUs would wait for processes that share a core."""
    if cores >= procs:
        return []
    return [
        warning(
            f"cores{where}",
            f"{cores} core{'s' if cores > 1 else ''} for {procs} processes",
            "a core for each process, better several",
            "ask the scheduler for more: slurm.cpus_per_proc or k8s.cpu in the cluster's settings, "
            "--cpus-per-task of sbatch",
        )
    ]


def _memory(machine: dict[str, Any], where: str) -> Check:
    free = machine["free_memory_gib"]
    return ok(f"memory{where}", f"{machine['memory_gib']} GiB, {free} GiB free")


def judge_deepspeed(report: dict[str, Any], device: str, where: str) -> list[Check]:
    """Whether DeepSpeed works on one node; compilers are not needed, for nothing is compiled."""
    found = report.get("deepspeed")
    if found is None:
        return []
    name = f"deepspeed{where}"
    if "error" in found:
        return [
            failure(
                name,
                f"cannot be imported: {found['error']}",
                "an import without errors",
                "mend what it says, or use engine.kind=plain for one process",
            )
        ]
    if found["accelerator"] != device:
        return [
            failure(
                name,
                f"accelerator {found['accelerator']}",
                device,
                f"unset DS_ACCELERATOR, or set it to {device}",
            )
        ]
    text = f"{found['version']}, accelerator {device}; none of its operators needs a compiler"
    return [ok(name, text)]


def judge_nodes(machines: dict[int, dict[str, Any]]) -> list[Check]:
    """Whether all nodes have the same versions and distinct names."""
    if len(machines) < 2:
        return []
    names = sorted({name for machine in machines.values() for name in machine["versions"]})
    differing = []
    for name in names:
        found = {node: m["versions"].get(name, "none") for node, m in machines.items()}
        if len(set(found.values())) > 1:
            differing.append(
                f"{name}: " + ", ".join(f"{v} on node {node}" for node, v in found.items())
            )
    hosts = ", ".join(machine["host"] for machine in machines.values())
    if differing:
        return [
            failure(
                "same versions",
                "; ".join(differing),
                "the same on all nodes",
                "let all nodes use one environment, on a shared file system or in one image",
            )
        ]
    return [ok("same versions", f"on {len(machines)} nodes: {hosts}")]
