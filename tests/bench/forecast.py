"""What `accrete plan` says beside what happens: memory and seconds of training steps.

    make bench-forecast                               CPU: T5 and LLaMA, three sizes, ZeRO 0 to 3
    make bench-forecast FORECAST='--shapes t5_s'      one of them
    python tests/bench/forecast.py --device cuda --out runs/forecast-gpu
                                                      one GPU: T5-large and LLaMA-3.2-1B

Memory on a CPU is counted as bytes of live tensors, where the tensors are made, because that is
what a GPU's `max_memory_allocated` says; the growth of the resident set stands beside it. Seconds
are forecast from a calibration of the same processes on models of one and two blocks. Results are
written to --out as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_parts import SHAPES, make_config, model_settings
from bench_team import Team, TeamError
from methods import machine

CPU_SHAPES = ("t5_s", "t5_m", "t5_l", "llama_s", "llama_m", "llama_l")
GPU_SHAPES = ("t5_large", "llama32_1b")
GIB = 2**30


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--shapes", nargs="+", choices=tuple(SHAPES))
    add("--zero", nargs="+", type=int, choices=(0, 1, 2, 3))
    add("--methods", nargs="+", default=["sequential"])
    add("--procs", type=int, help="default: 2 on a CPU, 1 on a GPU")
    add("--micro", type=int, help="rows of a micro-batch; default: one micro-batch a step")
    add("--targets", default="qv", choices=("qv", "all_linear"))
    add("--memory-only", action="store_true", help="no seconds: for a machine that is busy")
    add(
        "--clock",
        default="wall",
        choices=("wall", "processor"),
        help="processor: time on the processor alone, for a CPU that others use as well",
    )
    add("--timeout", type=float, default=600, help="seconds that one case may take")
    add("--out", type=Path, default=Path("runs/bench-forecast"))
    chosen = parser.parse_args(arguments)
    cuda = chosen.device == "cuda"
    chosen.shapes = chosen.shapes or list(GPU_SHAPES if cuda else CPU_SHAPES)
    chosen.procs = chosen.procs or (1 if cuda else 2)
    # DeepSpeed does not let go of a model at ZeRO 3, so that comes last.
    chosen.zero = sorted(chosen.zero or (0, 1, 2, 3))
    chosen.threads = max(1, len(os.sched_getaffinity(0)) // chosen.procs)
    return chosen


def cases(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is to be measured."""
    found = []
    for zero in chosen.zero:
        for shape in chosen.shapes:
            for method in chosen.methods:
                case = {
                    "shape": shape,
                    "method": method,
                    "zero": zero,
                    "engine": "deepspeed",
                    "tasks": 2,
                    "measured": [],
                    "rows": SHAPES[shape].rows,
                    "simulated_rows": SHAPES[shape].rows,
                    "targets": chosen.targets,
                    "past": "auto",
                    "ragged": True,
                    "speed": not chosen.memory_only,
                    "clock": chosen.clock,
                }
                if chosen.micro:
                    case["micro"] = chosen.micro
                found.append(case)
    return found


def forecast(case: dict[str, Any], chosen: argparse.Namespace, points: Any) -> dict[str, Any]:
    """The plan's figures for a case, with the calibration that the workers made."""
    from accrete.launch.forecast.calibrate import continued
    from accrete.launch.forecast.rows import TaskRows
    from accrete.launch.forecast.run import Forecaster
    from accrete.launch.forecast.shapes import ModelPlan, depth

    shape = SHAPES[case["shape"]]
    config = make_config(case, chosen.procs)
    task = TaskRows(
        name="task0",
        train=shape.rows,
        scored=1,
        prompt=shape.prompt,
        answer=shape.answer,
        longest_prompt=shape.prompt,
        longest_answer=shape.answer,
        padded_prompt=shape.prompt,
        padded_answer=shape.answer,
    )
    plan = ModelPlan(config, model_settings(shape), chosen.device)
    forecaster = Forecaster(plan, [task], chosen.procs)
    memory = forecaster.memory(0, forecaster.cost(0))[case["zero"]]
    batch = forecaster.largest(task)
    trace = forecaster.tracer.trace(batch)
    seconds = None
    if points:
        whole = depth(plan.settings)
        speed = continued({"points": points}, forecaster.tracer, whole, [batch], chosen.procs)
        seconds = speed.timing(trace, 0.0).step(forecaster.accumulation)
    flops = (trace.forward_flops + trace.backward_flops) * forecaster.accumulation
    return {
        "bytes": memory.step,
        "weights": memory.weights,
        "activations": memory.activations,
        "seconds": seconds,
        "flops": flops,
        "parameters": plan.base_parameters,
    }


def measure(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases; on a CPU each in processes of its own, whose memory is then its own."""
    wanted = cases(chosen)
    groups = [wanted] if chosen.device == "cuda" else [[case] for case in wanted]
    for group in groups:
        spec = {
            "method": "forecast",
            "procs": chosen.procs,
            "threads": chosen.threads,
            "device": chosen.device,
            "cases": group,
        }
        measured = 0
        try:
            with Team(spec, chosen.timeout, "forecast_worker.py") as team:
                for case in group:
                    real = team.answers()[0]
                    points = real.pop("points")
                    row = {"case": case, "measured": real}
                    if "error" not in real:
                        row["forecast"] = forecast(case, chosen, points)
                    measured += 1
                    yield row
        except TeamError as error:
            print(error, flush=True)
            for case in group[measured:]:
                yield {"case": case, "measured": {"error": "failed"}}


HEADING = (
    "model | method | ZeRO | GiB forecast | measured | error | ms forecast | measured | error | "
)


def line(row: dict[str, Any], chosen: argparse.Namespace) -> str:
    """A row of the table."""
    case, real = row["case"], row["measured"]
    head = f"{case['shape']} | {case['method']} | {case['zero']} | "
    if "forecast" not in row:
        return head + f"{real.get('error', 'failed')} | | | | | | "
    said = row["forecast"]
    cells = [
        f"{said['bytes'] / GIB:.3f}",
        f"{real['bytes'] / GIB:.3f}",
        f"{100 * (said['bytes'] / real['bytes'] - 1):+.1f} %",
    ]
    if said["seconds"] is None:
        return head + " | ".join([*cells, "", "", "", ""])
    cells += [
        f"{1e3 * said['seconds']:.1f}",
        f"{1e3 * real['seconds']:.1f}",
        f"{100 * (said['seconds'] / real['seconds'] - 1):+.1f} %",
    ]
    if chosen.device == "cuda":
        cells.append(utilisation(said["flops"] / real["seconds"]))
    else:
        cells.append(f"{real['resident'] / GIB:.3f}")
    return head + " | ".join(cells)


def utilisation(flops_per_second: float) -> str:
    """Share of the GPU's dense bf16 peak, if it is known."""
    from accrete.launch.forecast.speed import gpu_here

    gpu = gpu_here()
    rate = f"{flops_per_second / 1e12:.0f} TFLOP/s"
    return rate if gpu is None else f"{rate}, {100 * flops_per_second / gpu.bf16:.1f} %"


def save(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    result = {
        "machine": machine(chosen),
        "device": chosen.device,
        "procs": chosen.procs,
        "clock": chosen.clock,
        "shapes": {name: astuple(SHAPES[name]) for name in chosen.shapes},
        "rows": rows,
    }
    (chosen.out / "forecast.json").write_text(json.dumps(result, indent=1))
    rule = "|".join("---" for _ in heading(chosen).split("|"))
    lines = [f"| {heading(chosen)} |", f"|{rule}|", *(f"| {line(row, chosen)} |" for row in rows)]
    (chosen.out / "forecast.md").write_text("\n".join(lines) + "\n")


def heading(chosen: argparse.Namespace) -> str:
    return HEADING + ("MFU" if chosen.device == "cuda" else "resident GiB")


def main(arguments: list[str] | None = None) -> int:
    """Measure everything; 1 if a case failed."""
    chosen = options(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(heading(chosen), flush=True)
    rows: list[dict[str, Any]] = []
    for row in measure(chosen):
        rows.append(row)
        print(line(row, chosen), flush=True)
        save(chosen, rows)
    print(f"\n{chosen.out / 'forecast.md'}")
    return 0 if all("forecast" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
