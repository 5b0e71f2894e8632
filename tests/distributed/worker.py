"""One rank of a test launch: runs many cases, one after another, and writes what each returns."""

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


def main() -> None:
    out = Path(sys.argv[1])
    cases = json.loads((out / "cases.json").read_text())
    from accrete.pipeline.distributed import comm

    ranks = comm.start(sys.argv[2], timeout_s=60)
    from cases import CASES
    from safetensors.torch import save_file

    linear = torch.nn.functional.linear
    for case in cases:
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
    sys.stdout.flush()
    # Leaked ZeRO-3 engines make the interpreter's own shutdown slow.
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
