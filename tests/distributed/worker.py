"""A test launch: ranks that run many cases, one after another, and write what each returns.

The libraries are loaded once and every rank is a fork of that process: loading them takes as long
as twenty cases.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")


def main(out: Path, device: str, world: int) -> None:
    if device == "second":
        from second_device import install

        install()
    load_libraries()
    if world == 1:
        be_rank(0, out, device)
    children = [fork(rank, out, device) for rank in range(world)]
    for child in children:
        os.waitpid(child, 0)


def load_libraries() -> None:
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from cases import CASES  # noqa: F401
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401


def fork(rank: int, out: Path, device: str) -> int:
    """Process id of a new rank."""
    child = os.fork()
    if child == 0:
        be_rank(rank, out, device)
    return child


def be_rank(rank: int, out: Path, device: str) -> None:
    """Run the cases and end the process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # of somebody's shell: to no effect
    os.fsync = lambda descriptor: None  # nothing here has to outlive the machine
    log = os.open(out / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run_cases(out, device)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaked ZeRO-3 engines make the interpreter's own shutdown slow.
    os._exit(0)


def run_cases(out: Path, device: str) -> None:
    from cases import CASES
    from safetensors.torch import save_file

    from accrete.pipeline.distributed import comm

    ranks = comm.start(device, timeout_s=60)
    linear = torch.nn.functional.linear
    for case in json.loads((out / "cases.json").read_text()):
        if case["kind"] != "held":  # which counts what the collector leaves
            # DeepSpeed collects garbage for every engine that it makes, and old engines live on in
            # its hooks: what is here already need not be looked at again.
            gc.freeze()
        # A ZeRO-3 engine replaces it for the whole process, whose next case would round otherwise.
        torch.nn.functional.linear = linear
        folder = out / case["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (out / f"current-{ranks.rank}").write_text(case["name"])
        try:
            values = CASES[case["kind"]](ranks, folder, **case["params"])
            tensors = {
                k: v.cpu().contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)
            }
            rest = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            save_file(tensors, folder / f"tensors-{ranks.rank}.safetensors")
            (folder / f"values-{ranks.rank}.json").write_text(json.dumps(rest))
        except Exception:
            (folder / f"error-{ranks.rank}.txt").write_text(traceback.format_exc())
    (out / f"current-{ranks.rank}").write_text("")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), sys.argv[2], int(os.environ["WORLD_SIZE"]))
