"""Real steps on a few blocks of the model, continued to all of them; kept in the cache.

Time is linear in the number of blocks, so two depths say what a step of the whole model takes on
this machine, with its engine, its collectives and its threads, without its memory or its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.environment import hardware, versions
from accrete.launch.forecast.shapes import ModelPlan, depth
from accrete.launch.forecast.speed import CalibratedSpeed, MeasuredPoint, Timing
from accrete.launch.forecast.trace import BatchShape, Tracer
from accrete.launch.local import worker_environment
from accrete.pipeline.errors import AccreteError
from accrete.pipeline.models.cache import cache_root, content_key
from accrete.pipeline.run_dir import read_json, write_json
from accrete.pipeline.stage import accumulation

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig

REPEATS = 5
ENOUGH_SECONDS = 8.0
"""A shape is not repeated further after so long."""
PATIENCE_SECONDS = 900


class CalibrationError(AccreteError):
    """The measured steps failed."""

    exit_code = 1


def calibrate(
    plan: ModelPlan,
    tracer: Tracer,
    procs: int,
    shapes: Sequence[BatchShape],
    say: Callable[[str], None],
    *,
    measure: bool = True,
) -> CalibratedSpeed | None:
    """Measure the steps of a recipe's model on this machine, or find what was measured before.

    Args:
        plan: The model.
        tracer: Of the same model.
        procs: Processes of the launch, all on this machine.
        shapes: Padded micro-batches, from little to much arithmetic; one or two.
        say: Told what takes time.
        measure: False: only look into the cache.

    Returns:
        None if nothing is known and nothing may be measured.

    Raises:
        CalibrationError: A process failed.
    """
    config = shortened(plan.config, procs)
    asked: dict[str, Any] = {
        "device": plan.device,
        "settings": {**plan.settings.to_dict(), "model_type": plan.settings.model_type},
        "blocks": [list(blocks) for blocks in probed_depths(depth(plan.settings))],
        "shapes": [list(astuple(shape)) for shape in shapes],
        "repeats": REPEATS,
        "seconds": ENOUGH_SECONDS,
    }
    key = content_key(
        {
            "asked": json.loads(json.dumps(asked, default=str)),
            "engine": asdict(config.engine),
            "train": asdict(config.train),
            "adapter": asdict(config.adapter),
            "model": asdict(config.model),
            "method": config.method.kind,
            "procs": procs,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "machine": hardware(plan.device),
            "versions": {k: v for k, v in versions().items() if k in ("torch", "deepspeed")},
        }
    )
    path = cache_root() / "forecast" / f"{key}.json"
    if not path.is_file():
        if not measure:
            return None
        say("Calibrating: a few steps with a few blocks of the model on this machine ...")
        write_json(path, _run(config, asked, procs, path))
    return continued(read_json(path), tracer, depth(plan.settings), shapes, procs)


def shortened(config: RunConfig, procs: int) -> RunConfig:
    """The recipe with at most two micro-batches a step, which is enough to tell them apart."""
    train = config.train
    micro = accumulation(train.global_batch_size, train.micro_batch_size, procs)
    share = -(-train.global_batch_size // procs)
    rows = min(train.micro_batch_size, share)
    changed = replace(train, global_batch_size=rows * procs * min(2, micro), micro_batch_size=rows)
    return replace(config, train=changed)


def probed_depths(whole: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One block in every stack, then two in each in turn."""
    start = tuple(min(1, size) for size in whole)
    longer = [
        tuple(size if i != place else min(whole[i], 2) for i, size in enumerate(start))
        for place in range(len(whole))
    ]
    return list(dict.fromkeys([start, *longer]))


def _run(config: RunConfig, asked: dict[str, Any], procs: int, path: Path) -> dict[str, Any]:
    """Start the processes of a calibration and read what they found."""
    from accrete.pipeline.config.load import LoadedRecipe

    with tempfile.TemporaryDirectory(prefix="accrete-forecast-") as name:
        folder = Path(name)
        recipe = LoadedRecipe(config=config, origins={}, file=folder / "recipe.json")
        write_json(folder / "recipe.json", recipe.resolved())
        write_json(folder / "probe.json", json.loads(json.dumps(asked, default=str)))
        shared = worker_environment(procs, asked["device"], os.environ)
        workers = []
        for rank in range(procs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"log-{rank}").open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "accrete.launch.forecast.probe", name],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            for worker in workers:
                worker.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if not (folder / "result.json").is_file():
            tail = (folder / "log-0").read_text(encoding="utf-8", errors="replace")[-1500:]
            raise CalibrationError(
                "the calibration failed; leave --calibrate out for a rough forecast. Its own "
                f"words:\n{tail}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = read_json(folder / "result.json")
        return result


def continued(
    result: dict[str, Any],
    tracer: Tracer,
    whole: tuple[int, ...],
    shapes: Sequence[BatchShape],
    procs: int,
) -> CalibratedSpeed:
    """From few blocks to all of them.

    Args:
        result: `points` of `probe.measure`, for all of `probed_depths(whole)` and `shapes`.
        tracer: Of the whole model.
        whole: Its blocks.
        shapes: What was measured.
        procs: Processes that measured.
    """
    times = {
        (tuple(point["blocks"]), tuple(point["shape"])): point["times"]
        for point in result["points"]
    }
    start, *longer = probed_depths(whole)
    points = []
    for shape in shapes:
        key = astuple(shape)
        total = list(times[start, key])
        for blocks in longer:
            place = next(i for i, size in enumerate(blocks) if size != start[i])
            for i, seconds in enumerate(times[blocks, key]):
                one = max(0.0, seconds - times[start, key][i])
                total[i] += (whole[place] - start[place]) * one
        trace = tracer.trace(shape)
        points.append(MeasuredPoint(trace.forward_flops + trace.backward_flops, Timing(*total)))
    points.sort(key=lambda point: point.flops)
    return CalibratedSpeed(
        f"measured here: real steps with {procs} process{'es' if procs > 1 else ''} on "
        f"{' and '.join(str(sum(b)) for b in probed_depths(whole)[:2])} blocks, continued to "
        f"{sum(whole)}",
        tuple(points),
    )
