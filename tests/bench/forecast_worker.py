"""One rank of the forecast's check: real training steps, their memory and their seconds.

Takes a list of cases in `spec["cases"]`; answers one line for each. See `forecast.py`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from bench_parts import SHAPES, make_config, make_parts, model_settings
from bench_worker import Peak

from accrete.launch.forecast.calibrate import probed_depths, shortened
from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.launch.forecast.probe import clock
from accrete.launch.forecast.probe import measure as probe
from accrete.launch.forecast.shapes import ModelPlan, depth
from accrete.launch.forecast.trace import BatchShape
from accrete.pipeline.distributed import comm
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.models.lora import initial_factors
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.train_task import train_task

COUNTED_STEPS, TIMED_STEPS = 3, 5


def run_case(spec: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Steps of the first task, after one that allocates: seconds, peaks and the resident size."""
    cuda = ranks.device.type == "cuda"
    peak = Peak(ranks.device)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    peak.reset()
    start = peak.bytes()
    live = LiveBytes()
    with nullcontext() if cuda else live:
        parts = make_parts(spec, ranks, Path(tempfile.mkdtemp(prefix="accrete-bench-")))
        runner = StageRunner(parts)
        stage = runner._stage(0)
        if parts.method.trains == "factors":
            stage.write_factors(initial_factors(parts.adapted, 0, 0))
        stage.steps = 1
        train_task(stage, parts.method, parts.recorder)
        gc.collect()
        live.reset_peak()
        stage.steps = COUNTED_STEPS
        train_task(stage, parts.method, parts.recorder, start=1)
    counted = live.peak
    peak.reset()
    made, seconds = COUNTED_STEPS, []
    while len(seconds) < TIMED_STEPS:
        stage.steps = made + 1
        began = clock(ranks, spec)
        train_task(stage, parts.method, parts.recorder, start=made)
        seconds.append(clock(ranks, spec) - began)
        made += 1
    grown = peak.bytes() - start
    parts.engine.close()
    return {
        "seconds": statistics.median(seconds),
        "bytes": grown if cuda else counted,
        "resident": None if cuda else grown,
    }


def calibrate(spec: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """What `accrete plan --calibrate` measures, in this process."""
    shape = SHAPES[spec["shape"]]
    config = shortened(make_config(spec, ranks.world), ranks.world)
    plan = ModelPlan(config, model_settings(shape), ranks.device.type)
    batch = BatchShape(config.train.micro_batch_size, shape.prompt, shape.answer)
    asked: dict[str, Any] = {"shapes": [list(astuple(batch))], "repeats": 7, "seconds": 8.0}
    asked["clock"] = spec["clock"]
    points = []
    for blocks in probed_depths(depth(plan.settings)):
        points += probe(plan, ranks, blocks, asked)
        gc.collect()
    return points


def main() -> None:
    warnings.filterwarnings("ignore")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    ranks = comm.start(spec["device"], timeout_s=600)
    for case in spec["cases"]:
        answer: dict[str, Any] = {}
        try:
            answer = run_case(case, ranks)
            gc.collect()
            answer["points"] = calibrate(case, ranks) if case["speed"] else None
        except torch.cuda.OutOfMemoryError as error:
            answer = {"error": str(error).splitlines()[0]}
        found = comm.gather(answer, ranks.world)
        worst = max(found, key=lambda one: one.get("bytes", 0))
        resident = [one["resident"] for one in found if one.get("resident") is not None]
        channel.write(
            json.dumps({**worst, "points": answer.get("points"), "all_resident": sum(resident)})
            + "\n"
        )
        channel.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
