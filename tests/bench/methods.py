"""What every method costs beside `sequential`, on the same layers in the same run.

    make bench-methods                                    CPU shapes, or GPU shapes with CUDA
    make bench-methods BENCH='--tiny'                     seconds; says only that it runs
    make bench-methods BENCH='--methods ewc_lora o_lora:lambda_1=0.1 --shapes llama_like'

Each method is measured in a process of its own with a second one of `sequential` beside it; they
take turns step by step, so that whatever else the machine does hits both, and the ratio is the
median over pairs of steps. Earlier tasks are simulated: random factors join the past and the
method's real passes run over a few rows, without training. Traffic is counted in a launch of two
processes (ZeRO, --zero). Results are saved after every method; a second call with the same options
goes on where the first was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_tables import markdown, print_rows
from bench_team import Team, TeamError

CPU_SHAPES = ("t5_base_like", "llama_like")
GPU_SHAPES = ("t5_large", "llama32_1b")
TINY_SHAPES = ("tiny_t5", "tiny_llama")
REFERENCE = "sequential"
VARIANTS = ("lora_subtraction:triplet=0",)
"""Measured by default beside every method's own defaults."""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    from accrete.pipeline.methods.registry import METHODS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="KIND[:KEY=VALUE,...]", help="default: all there are")
    add("--shapes", nargs="+", choices=(*CPU_SHAPES, *GPU_SHAPES, *TINY_SHAPES))
    add("--tasks", nargs="+", type=int, default=[2, 15], help="numbers of the measured tasks")
    add("--rounds", type=int, default=7, help="measured pairs of steps (one more warms up)")
    add("--rows", type=int, default=16, help="training rows of a measured task, for its passes")
    add("--simulated-rows", type=int, default=2, help="training rows of the tasks between")
    add("--targets", default="qv", choices=("qv", "all_linear"), help="adapted layers")
    add("--past", default="auto", choices=("auto", "fold", "branch"))
    add("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage for the traffic")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, default=None, help="of one process; default: all cores")
    add(
        "--clock",
        default="wall",
        choices=("wall", "processor"),
        help="processor: seconds of work, with one CPU thread; other load hardly counts",
    )
    add("--timeout", type=float, default=1800, help="seconds that one answer may take")
    add("--out", type=Path, default=Path("runs/bench-methods"), help="folder of the results")
    add("--tiny", action="store_true", help="tiny models, few steps: a test of this program")
    chosen = parser.parse_args(arguments)
    if chosen.device == "auto":
        import torch

        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.tiny:
        chosen.tasks, chosen.rounds, chosen.rows, chosen.simulated_rows = [2, 3], 2, 4, 2
    chosen.tasks = sorted(set(chosen.tasks))
    if chosen.tasks[0] < 2:
        parser.error("--tasks: the first task has no past; give numbers from 2 on")
    if chosen.shapes is None:
        real = CPU_SHAPES if chosen.device == "cpu" else GPU_SHAPES
        chosen.shapes = list(TINY_SHAPES if chosen.tiny else real)
    if chosen.methods is None:
        chosen.methods = [*METHODS, *VARIANTS]
    if chosen.clock == "processor":
        if chosen.device != "cpu" or chosen.threads not in (None, 1):
            parser.error("--clock processor: only with --device cpu and --threads 1")
        chosen.threads = 1
    chosen.threads = chosen.threads or os.cpu_count() or 1
    return chosen


def spec_of(chosen: argparse.Namespace, method: str, shape: str, procs: int) -> dict[str, Any]:
    """What a worker has to know."""
    return {
        "method": method,
        "shape": shape,
        "procs": procs,
        "threads": max(1, chosen.threads // procs),
        "measured": [task - 1 for task in chosen.tasks],
        "tasks": chosen.tasks[-1],
        "rows": chosen.rows,
        "simulated_rows": chosen.simulated_rows,
        "targets": chosen.targets,
        "past": chosen.past,
        "zero": chosen.zero,
        "device": chosen.device,
        "clock": chosen.clock,
    }


def timings(chosen: argparse.Namespace, method: str, shape: str) -> dict[str, dict[str, Any]]:
    """Seconds and memory of a method and of the reference, task by task, in turns."""
    found: dict[str, dict[str, Any]] = {}
    with (
        Team(spec_of(chosen, method, shape, 1), chosen.timeout) as own,
        Team(spec_of(chosen, REFERENCE, shape, 1), chosen.timeout) as reference,
    ):
        teams = (own, reference)
        for team in teams:
            team.answers()
        for task in chosen.tasks:
            values, plain = ({} for _ in teams)
            for team, into in zip(teams, (values, plain), strict=True):
                into.update(team.ask(do="go")[0])
            steps: list[list[float]] = [[], []]
            for turn in range(chosen.rounds + 1):
                order = (0, 1) if turn % 2 else (1, 0)
                for number in order:
                    steps[number].append(teams[number].ask(do="step")[0]["seconds"])
            for team, into in zip(teams, (values, plain), strict=True):
                into.update(team.ask(do="end")[0])
                into.update(team.ask(do="go")[0])
            pairs = list(zip(*(times[1:] for times in steps), strict=True))
            values["step_seconds"] = statistics.median(mine for mine, _ in pairs)
            values["step_ratio"] = statistics.median(mine / other for mine, other in pairs)
            # Of both teams: the same pass over the same rows.
            passes = values.pop("plain_pass_seconds"), plain["plain_pass_seconds"]
            values["plain_pass_seconds"] = statistics.mean(passes)
            values["reference_step_seconds"] = statistics.median(other for _, other in pairs)
            values["reference_step_peak"] = plain["step_peak"]
            found[str(task)] = values
    return found


def traffic(chosen: argparse.Namespace, method: str, shape: str) -> dict[str, dict[str, Any]]:
    """Collectives and bytes per step on each of two ranks, and the state that a rank keeps."""
    found: dict[str, dict[str, Any]] = {}
    with Team(spec_of(chosen, method, shape, 2), chosen.timeout) as team:
        team.answers()
        for task in chosen.tasks:
            arrived = team.ask(do="go")
            counts = team.ask(do="traffic", count=2)
            team.ask(do="end")
            team.ask(do="go")
            found[str(task)] = {
                "calls": max(count["calls"] for count in counts),
                "bytes": max(count["bytes"] for count in counts),
                "rank_state_bytes": max(start["state_bytes"] for start in arrived),
            }
    return found


def measure(chosen: argparse.Namespace, method: str, shape: str) -> dict[str, Any]:
    """Everything about one method on one shape."""
    tasks = timings(chosen, method, shape)
    if two_processes(chosen.device):
        for task, values in traffic(chosen, method, shape).items():
            tasks[task].update(values)
    return {"method": method, "shape": shape, "tasks": tasks}


def two_processes(device: str) -> bool:
    """NCCL wants a GPU for each rank."""
    if device == "cpu":
        return True
    import torch

    return torch.cuda.device_count() >= 2


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    name = platform.processor() or platform.machine()
    if chosen.device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), name)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "processor": name,
        "threads": chosen.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not yet in the results; 1 if a method could not be measured."""
    chosen = options(arguments)
    path = chosen.out / "methods.json"
    kept = (
        "tasks",
        "rounds",
        "rows",
        "simulated_rows",
        "targets",
        "past",
        "zero",
        "device",
        "clock",
    )
    settings = {key: getattr(chosen, key) for key in (*kept, "device", "clock")}
    result: dict[str, Any] = {"settings": settings, "rows": []}
    if path.exists():
        before = json.loads(path.read_text())
        if before["settings"] != settings:
            print(f"{path} holds other settings: {before['settings']}; name another --out folder")
            return 2
        result["rows"] = before["rows"]
    result["machine"] = machine(chosen)
    words = " ".join(arguments if arguments is not None else sys.argv[1:])
    result["command"] = f"make bench-methods BENCH='{words}'" if words else "make bench-methods"
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for shape in chosen.shapes:
        done = {row["method"] for row in result["rows"] if row["shape"] == shape}
        for method in chosen.methods:
            if method in done:
                continue
            print(f"{shape}: {method} ...", flush=True)
            try:
                result["rows"].append(measure(chosen, method, shape))
            except TeamError as error:
                failed += 1
                print(f"could not be measured: {error}", flush=True)
                continue
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(result, indent=1))
            aside.replace(path)
    print_rows(result)
    (chosen.out / "methods.md").write_text(markdown(result))
    print(f"\n{path}\n{chosen.out / 'methods.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
