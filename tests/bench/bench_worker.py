"""One rank of a benchmark: real stages around simulated training, measured on command.

Commands and answers are lines of JSON on stdin and on what was stdout; see `bench_team.py`. The
stages are those of `StageRunner`; only its training is replaced: a task that is not measured gets
random factors, a measured one makes the steps that the driver asks for, one at a time. Nothing is
written to disk but an empty run folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from accrete.pipeline import stage_runner
from accrete.pipeline.distributed import comm
from accrete.pipeline.stage import Stage, row_losses
from accrete.pipeline.train_task import train_task

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed")]


class Peak:
    """The largest memory that this process held since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError, AttributeError):  # only glibc gives back what is free
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Worker:
    """Runs stages; stops wherever the driver has to say how to go on."""

    def __init__(self, spec: dict[str, Any], ranks: comm.Ranks, channel: Any) -> None:
        from bench_parts import make_parts

        self.spec, self.ranks, self.channel = spec, ranks, channel
        self.peak = Peak(ranks.device)
        folder = Path(tempfile.mkdtemp(prefix="accrete-bench-"))
        self.parts = make_parts(spec, ranks, folder)
        self.seconds: dict[str, float] = {}
        stage_runner.train_task = self.train  # type: ignore[assignment]
        stage_runner.save_adapter = lambda *arguments: None  # type: ignore[assignment]
        self.runner = stage_runner.StageRunner(self.parts)
        self.runner._save = lambda *arguments: None  # type: ignore[method-assign]
        for name in ("on_sequence_start", "on_task_start", "on_task_end", "after_consolidation"):
            setattr(self.parts.method, name, self.timed(name, getattr(self.parts.method, name)))

    def say(self, **values: Any) -> None:
        self.channel.write(json.dumps(values) + "\n")
        self.channel.flush()

    def hear(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        found: dict[str, Any] = json.loads(line)
        return found

    def clock(self) -> float:
        if self.spec["clock"] == "processor":
            return time.process_time()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, hook: Callable[[Stage], None]) -> Callable[[Stage], None]:
        def call(stage: Stage) -> None:
            if name == "on_task_end" and stage.index in self.spec["measured"]:
                self.seconds["plain_pass"] = self.plain_pass(stage)
                self.peak.reset()
            began = self.clock()
            hook(stage)
            self.seconds[name] = self.clock() - began

        return call

    def plain_pass(self, stage: Stage) -> float:
        """Seconds of forward and backward over the task's own rows, as training makes them."""
        if self.ranks.world > 1 or self.parts.config.engine.kind == "deepspeed":
            return 0.0
        own = stage.rows_of(stage.index)
        module = stage.engine.module
        began = self.clock()
        for step in range(own.steps_per_epoch):
            for batch in stage.micro_batches(own.rows(step, 0, 1)):
                row_losses(stage.logits(batch), batch.labels).sum().backward()
        spent = self.clock() - began
        module.zero_grad()
        return spent

    def run(self) -> None:
        """All tasks, in turn."""
        self.hear()
        self.parts.method.on_sequence_start(self.runner._stage(0))
        for index in range(self.spec["tasks"]):
            self.runner._learn(index, None)
            if index in self.spec["measured"]:
                self.say(
                    end_seconds=self.seconds["on_task_end"] + self.seconds["after_consolidation"],
                    plain_pass_seconds=self.seconds["plain_pass"],
                    end_peak=self.peak.bytes(),
                )
                self.hear()

    def train(self, stage: Stage, method: Any, recorder: Any, **more: Any) -> None:
        """Stands in for `train_task`."""
        if stage.index in self.spec["measured"]:
            self.serve(stage)
        if method.trains == "factors":
            for number, layer in enumerate(stage.adapted.layers.values()):
                generator = torch.Generator().manual_seed(1000 * stage.index + number)
                if layer.b in stage.engine.parameters:
                    value = torch.randn(stage.read(layer.b).shape, generator=generator)
                    stage.write(layer.b, 1e-3 * value)

    def serve(self, stage: Stage) -> None:
        """Steps and counts of a measured task, until the driver says `end`."""
        self.say(
            sequence_seconds=self.seconds["on_sequence_start"],
            start_seconds=self.seconds["on_task_start"],
            state_bytes=self.parts.method.state_bytes(),
        )
        made = 0
        self.peak.reset()
        while (asked := self.hear())["do"] != "end":
            if asked["do"] == "step":
                self.say(seconds=self.steps(stage, made, 1))
                made += 1
            else:
                from counting import counted

                count = asked["count"]
                self.steps(stage, made, 2)
                with counted() as counts:
                    self.steps(stage, made + 2, count)
                made += 2 + count
                calls = sum(n for name, n in counts.items() if name.endswith(" calls"))
                total = sum(n for name, n in counts.items() if name.endswith(" bytes"))
                self.say(calls=calls / count, bytes=total / count)
        self.say(step_peak=self.peak.bytes())
        self.hear()

    def steps(self, stage: Stage, made: int, count: int) -> float:
        """Make steps of the real loop; seconds of all.

        Each is on the first batch of an epoch: the last one of mixed rows may be a short one,
        whose seconds would say nothing beside the reference's full batches.
        """
        planned, epoch = stage.steps, stage.rows.steps_per_epoch
        began = self.clock()
        for number in range(made, made + count):
            stage.steps = number * epoch + 1
            train_task(stage, self.parts.method, self.parts.recorder, start=number * epoch)
        spent = self.clock() - began
        stage.steps = planned
        return spent


def main() -> None:
    warnings.filterwarnings("ignore")
    # Libraries print to stdout; the channel is for answers alone.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if spec["procs"] > 1 or spec.get("engine") == "deepspeed":
        ranks = comm.start(spec["device"], timeout_s=600)
    else:
        ranks = comm.Ranks(0, 1, torch.device(spec["device"]))
    worker = Worker(spec, ranks, channel)
    worker.say(ready=True)
    worker.run()
    channel.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
