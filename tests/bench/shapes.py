"""Every method for a few steps on models of real size with random weights, in the real engine.

    make bench-shapes                                   CPU: T5-large and LLaMA-3.2-1B, 2 processes
    make bench-shapes SHAPES='--methods ewc_lora --zero 2 --shapes t5_large_few'
    python tests/bench/shapes.py --device cuda --out runs/shapes-gpu

Two tasks: the first is simulated (random factors), the second one's start, steps and end are real.
Before anything is started, the forecast says what all processes will need; what does not fit into
--limit-gib is left out, and the table says so. Methods that train all weights take SGD where AdamW
does not fit, and fewer blocks where that does not help. A second call with the same options goes on
where the first was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_parts import SHAPES, make_config, model_settings
from bench_team import Team, TeamError
from methods import machine

CPU_SHAPES = ("t5_large_few", "llama32_1b_few")
GPU_SHAPES = ("t5_large", "llama32_1b")
SHORTER = {"t5_large_few": "t5_large_6_blocks", "llama32_1b_few": "llama32_1b_2_blocks"}
"""What methods that train all weights take where the whole model does not fit."""
PROGRAM_GIB = 0.7
"""Resident size of a process before it holds a model."""
GIB = 2**30


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    from accrete.pipeline.methods.registry import METHODS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--shapes", nargs="+", choices=tuple(SHAPES))
    add("--methods", nargs="+", metavar="KIND[:KEY=VALUE,...]", default=list(METHODS))
    add("--zero", nargs="+", type=int, default=[2, 3], choices=(0, 1, 2, 3))
    add("--procs", type=int, help="default: 2 on a CPU, all GPUs otherwise")
    add("--steps", type=int, default=3)
    add("--rows", type=int, default=8, help="training rows of the second task, for its passes")
    add("--targets", default="qv", choices=("qv", "all_linear"))
    add("--limit-gib", type=float, help="of all processes; default: 20, or the GPUs' memory")
    add("--timeout", type=float, default=1800, help="seconds that one answer may take")
    add("--out", type=Path, default=Path("runs/bench-shapes"))
    chosen = parser.parse_args(arguments)
    cuda = chosen.device == "cuda"
    chosen.shapes = chosen.shapes or list(GPU_SHAPES if cuda else CPU_SHAPES)
    if cuda:
        import torch

        chosen.procs = chosen.procs or torch.cuda.device_count()
        one = torch.cuda.get_device_properties(0).total_memory / GIB
        chosen.limit_gib = chosen.limit_gib or 0.95 * one * chosen.procs
    chosen.procs = chosen.procs or 2
    chosen.limit_gib = chosen.limit_gib or 20.0
    chosen.threads = max(1, len(os.sched_getaffinity(0)) // chosen.procs)
    return chosen


def spec_of(chosen: argparse.Namespace, method: str, shape: str, zero: int) -> dict[str, Any]:
    """What a worker has to know."""
    return {
        "method": method,
        "shape": shape,
        "procs": chosen.procs,
        "threads": chosen.threads,
        "engine": "deepspeed",
        "measured": [1],
        "tasks": 2,
        "rows": chosen.rows,
        "simulated_rows": 2,
        "targets": chosen.targets,
        "past": "auto",
        "zero": zero,
        "device": chosen.device,
        "clock": "wall",
    }


def needs(spec: dict[str, Any]) -> tuple[float, float]:
    """GiB of all processes, and the matrix products and attention of a step of all ranks."""
    from accrete.launch.forecast.rows import TaskRows
    from accrete.launch.forecast.run import Forecaster
    from accrete.launch.forecast.shapes import ModelPlan

    shape, config = SHAPES[spec["shape"]], make_config(spec, spec["procs"])
    rows = TaskRows(
        name="task",
        train=spec["rows"],
        scored=1,
        prompt=shape.prompt,
        answer=shape.answer,
        longest_prompt=shape.prompt,
        longest_answer=shape.answer,
        padded_prompt=shape.prompt,
        padded_answer=shape.answer,
        classes=4,
    )
    plan = ModelPlan(config, model_settings(shape), spec["device"])
    forecaster = Forecaster(plan, [rows, rows], spec["procs"])
    cost = forecaster.cost(1)
    memory = forecaster.memory(1, cost)[spec["zero"]]
    whole = memory.peak + (0.0 if spec["device"] == "cuda" else cost.host_bytes)
    # At ZeRO 3 every process builds the whole model before it is divided.
    size = 2 if plan.dtype.itemsize == 2 else 4
    whole = max(whole, float(size * plan.base_parameters))
    own = PROGRAM_GIB if spec["device"] == "cpu" else 0.0
    trace = forecaster.tracer.trace(forecaster.typical(rows))
    flops = (trace.forward_flops + trace.backward_flops) * forecaster.accumulation
    return spec["procs"] * (whole / GIB + own), flops * spec["procs"]


def choose(chosen: argparse.Namespace, method: str, shape: str, zero: int) -> dict[str, Any]:
    """A case with the optimizer and the blocks that fit, and what it is forecast to need."""
    from accrete.pipeline.methods.registry import method_class

    spec = spec_of(chosen, method, shape, zero)
    ways = [spec]
    if method_class(method.partition(":")[0]).trains == "weights":
        shorter = [{**spec, "shape": SHORTER[shape]}] if shape in SHORTER else []
        ways = [way for one in (spec, *shorter) for way in (one, {**one, "optimizer": "sgd"})]
    found = []
    for way in ways:
        gib, flops = needs(way)
        found.append({"spec": way, "gib_forecast": gib, "flops": flops})
        if gib <= chosen.limit_gib:
            return found[-1]
    return found[0]


def run_case(chosen: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Start, steps and end of the second task, on every rank."""
    spec = case["spec"]
    began = time.perf_counter()
    with Team(spec, chosen.timeout) as team:
        team.answers()
        starts = team.ask(do="go")
        steps = [
            max(one["seconds"] for one in team.ask(do="step")) for _ in range(chosen.steps + 1)
        ]
        steps_end = team.ask(do="end")
        ends = team.ask(do="go")
    seconds = statistics.median(steps[1:])
    peaks = [
        max(step["step_peak"], end["end_peak"]) for step, end in zip(steps_end, ends, strict=True)
    ]
    return {
        "step_seconds": seconds,
        "start_seconds": max(start["start_seconds"] for start in starts),
        "end_seconds": max(end["end_seconds"] for end in ends),
        "tokens_per_s": SHAPES[spec["shape"]].tokens / seconds,
        "gib": sum(peaks) / GIB,
        "flops_per_s": case["flops"] / seconds,
        "wall_seconds": time.perf_counter() - began,
    }


def peak_of(chosen: argparse.Namespace) -> float | None:
    """Dense bf16 FLOP/s of all GPUs, if they are known."""
    if chosen.device != "cuda":
        return None
    from accrete.launch.forecast.speed import gpu_here

    gpu = gpu_here()
    return None if gpu is None else gpu.bf16 * chosen.procs


HEADING = (
    "model | method | ZeRO | optimizer | GiB in all (forecast) | s/step | tokens/s | start s | "
    "end s | TFLOP/s | MFU"
)


def line(row: dict[str, Any], peak: float | None) -> str:
    """A row of the table."""
    spec = row["spec"]
    head = [spec["shape"], spec["method"], str(spec["zero"]), spec.get("optimizer", "adamw")]
    forecast = f"({row['gib_forecast']:.1f})"
    if "measured" not in row:
        return " | ".join([*head, f"{row['why']} {forecast}", *[""] * 6])
    found = row["measured"]
    mfu = "" if peak is None else f"{100 * found['flops_per_s'] / peak:.1f} %"
    return " | ".join(
        [
            *head,
            f"{found['gib']:.1f} {forecast}",
            f"{found['step_seconds']:.3g}",
            f"{found['tokens_per_s']:.4g}",
            f"{found['start_seconds']:.3g}",
            f"{found['end_seconds']:.3g}",
            f"{found['flops_per_s'] / 1e12:.3g}",
            mfu,
        ]
    )


def markdown(rows: list[dict[str, Any]], peak: float | None) -> str:
    """The table."""
    rule = "|".join("---" for _ in HEADING.split("|"))
    return "\n".join([f"| {HEADING} |", f"|{rule}|", *(f"| {line(row, peak)} |" for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    """Run what is not yet in the results; 1 if a case failed."""
    chosen = options(arguments)
    path = chosen.out / "shapes.json"
    peak = peak_of(chosen)
    rows: list[dict[str, Any]] = []
    if path.exists():
        rows = json.loads(path.read_text())["rows"]
    done = [row["spec"] for row in rows if "measured" in row]
    rows = [row for row in rows if "measured" in row]
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    print(HEADING, flush=True)
    for shape in chosen.shapes:
        for zero in chosen.zero:
            for method in chosen.methods:
                row = choose(chosen, method, shape, zero)
                if row["spec"] in done:
                    continue
                if row["gib_forecast"] > chosen.limit_gib:
                    row["why"] = "does not fit"
                else:
                    try:
                        row["measured"] = run_case(chosen, row)
                    except TeamError as error:
                        failed += 1
                        row["why"] = "failed"
                        print(error, flush=True)
                print(line(row, peak), flush=True)
                rows.append(row)
                content = {"machine": machine(chosen), "peak": peak, "rows": rows}
                aside = path.with_suffix(".tmp")
                aside.write_text(json.dumps(content, indent=1))
                aside.replace(path)
    (chosen.out / "shapes.md").write_text(markdown(rows, peak) + "\n")
    print(f"\n{path}\n{chosen.out / 'shapes.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
