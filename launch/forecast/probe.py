"""One rank of a calibration: real steps of the real engine on a model with few blocks.

Started by `calibrate`, one process per rank: `python -m accrete.launch.forecast.probe FOLDER`. The
folder holds `recipe.json` and `probe.json`; rank 0 writes `result.json`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.distributed import comm
from accrete.pipeline.run_dir import read_json, write_json

FIRST = 3
"""Smallest token id of the random rows; those below may be special."""


def main(folder: Path) -> None:
    """Measure every number of blocks and every batch shape that the folder asks for."""
    import torch
    from transformers import AutoConfig

    from accrete.launch.forecast.shapes import ModelPlan

    asked = read_json(folder / "probe.json")
    config = load_recipe(folder / "recipe.json").config
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ranks = comm.start(asked["device"], 600)
    raw = dict(asked["settings"])
    settings = AutoConfig.for_model(raw.pop("model_type"), **raw)
    plan = ModelPlan(config, settings, asked["device"])
    found = []
    for blocks in asked["blocks"]:
        torch.manual_seed(0)
        found += measure(plan, ranks, tuple(blocks), asked)
    if ranks.rank == 0:
        write_json(folder / "result.json", {"points": found})
    comm.stop()


def measure(
    plan: Any, ranks: comm.Ranks, blocks: tuple[int, ...], asked: dict[str, Any]
) -> list[dict[str, Any]]:
    """Median seconds of every batch shape at one depth. Collective: yes.

    Args:
        plan: The model; its configuration says how many micro-batches a step has.
        ranks: Who this process is.
        blocks: Blocks of every stack.
        asked: `shapes` as [rows, prompt, answer], `repeats`, `seconds` that are enough, and
            `clock`: `wall`, or `processor` for a check on a busy machine.

    Returns:
        Of each shape `blocks`, `shape` and `times` as `Timing` lists them.
    """
    from accrete.launch.execute import build_engine
    from accrete.pipeline.models.load import unknown_inputs
    from accrete.pipeline.stage import aligned_logits, row_losses

    adapted = plan.build(str(ranks.device), blocks)
    engine = build_engine(plan.config, ranks, adapted, plan.method)
    engine.module.train()
    unknown = unknown_inputs(adapted.base)
    points = []
    for rows, prompt, answer in asked["shapes"]:
        batch = random_batch(plan, rows, prompt, answer).to(ranks.device)
        seconds: list[list[float]] = []
        began = time.perf_counter()
        for attempt in range(asked["repeats"] + 1):
            forward, micro, last = 0.0, 0.0, 0.0
            for number in range(1, engine.accumulation + 1):
                start = clock(ranks, asked)
                logits = aligned_logits(engine.forward, batch, plan.seq2seq, unknown)
                loss = row_losses(logits, batch.labels).sum() / (rows * answer)
                del logits
                middle = clock(ranks, asked)
                engine.backward(loss, number == engine.accumulation)
                del loss
                end = clock(ranks, asked)
                forward = middle - start
                if number == engine.accumulation:
                    last = end - start
                else:
                    micro = end - start
            start = clock(ranks, asked)
            engine.step(1e-4)
            update = clock(ranks, asked) - start
            if attempt:  # the first pays for allocations
                seconds.append([forward, micro or last, last, update])
            enough = attempt >= 2 and time.perf_counter() - began > asked["seconds"]
            if any(comm.gather(enough, ranks.world)):
                break
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        points.append({"blocks": list(blocks), "shape": [rows, prompt, answer], "times": medians})
    engine.close()
    return points


def random_batch(plan: Any, rows: int, prompt: int, answer: int) -> Any:
    """A batch of random tokens; the first row is one token shorter, so that there is padding."""
    from accrete.pipeline.data.collate import Collator
    from accrete.pipeline.data.encode import EncodedRow

    pick = random.Random(0)
    start = getattr(plan.settings, "decoder_start_token_id", None) or 0
    collator = Collator(plan.seq2seq, 0, start, 1)

    def tokens(count: int) -> list[int]:
        return [pick.randrange(FIRST, plan.vocabulary) for _ in range(count)]

    return collator.train(
        [
            EncodedRow(str(i), tokens(max(1, prompt - (i == 0))), tokens(answer), i)
            for i in range(rows)
        ]
    )


def clock(ranks: comm.Ranks, asked: dict[str, Any]) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if asked.get("clock") == "processor":
        return time.process_time()
    if ranks.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=sys.stderr)
        raise
