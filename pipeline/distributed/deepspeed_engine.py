"""A DeepSpeed engine built through Accelerate, with settings that leave the step to accrete."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from accrete.pipeline.errors import DistributedError


def deepspeed_config(
    stage: int,
    world: int,
    accumulation: int,
    micro_batch: int,
    bucket_elements: int,
    max_grad_norm: float | None,
    whole_below: int | None = None,
    most_live: int | None = None,
) -> dict[str, Any]:
    """The DeepSpeed settings of a run: its own precision modes off, torch's optimizer as given."""
    wanted = {
        "stage3_param_persistence_threshold": whole_below,
        "stage3_max_live_parameters": most_live,
        "stage3_max_reuse_distance": most_live,
    }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            "overlap_comm": False,
            **{key: value for key, value in wanted.items() if value is not None},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def prepare(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Let Accelerate build the DeepSpeed engine, and make sure that it really is one."""
    # Any sign of a CPU run makes Accelerate hand back the bare module without a word.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.nvtx
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    # Its first use compiles for a minute and needs a compiler; gloo and NCCL do without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Marks for a GPU's profiler, around every hook of every module. On a CPU nobody sees them, and
    # they take a seventh of a small model's time at ZeRO 3.
    on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    deepspeed.utils.nvtx.enable_nvtx = not on_cpu
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        # Or ACCELERATE_MIXED_PRECISION of the environment would train the factors in bf16.
        mixed_precision="no",
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
    )
    engine, _ = accelerator.prepare(module, optimizer)
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise DistributedError(
            f"Accelerate returned a {type(engine).__name__}, not a DeepSpeed engine. Unset "
            "ACCELERATE_* variables in the environment, or use engine.kind=plain."
        )
    return engine
