"""A second device without a GPU: tensors that PyTorch keeps apart from the CPU's.

`second_device.cpp` has it; here it takes the place of the engine's device in a launch. A tensor
that a method forgets on the CPU fails there as it would on a GPU, and what would make the host wait
for a GPU is counted. `second_ranks.py` has its collectives and DeepSpeed's face of it.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent
NAME = "second"


def missing() -> str | None:
    """What the device cannot be built without here."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no headers of Python"
    return None


def install() -> None:
    """Build the device and run every case of this process on it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    build()
    import second_ranks
    import toys

    second_ranks.join()
    toys.base_model = moved(toys.base_model)
    import cases

    from accrete.pipeline.distributed import comm
    from accrete.pipeline.distributed.plain import PlainEngine

    comm._device = only_device
    cases.CASES["clumsy"] = clumsy
    step, sequence = PlainEngine.step, cases.CASES["sequence"]
    waits = [0, 0]

    def counted_step(engine: PlainEngine, learning_rate: float) -> float:
        norm = step(engine, learning_rate)
        waits.append(torch.ops.second_device.waits())
        return norm

    def counted_sequence(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
        """The case, and how often the host waits in the plain engine's last step."""
        return {**sequence(ranks, folder, **params), "waits": waits[-1] - waits[-2]}

    PlainEngine.step = counted_step  # type: ignore[method-assign]
    cases.CASES["sequence"] = counted_sequence


def only_device(asked: str, local_rank: int) -> torch.device:
    """Stands in for `comm._device`: a rank sees one device, as where a launcher hides others."""
    os.environ["LOCAL_RANK"] = "0"
    return torch.device(NAME, 0)


def moved(base_model: Any) -> Any:
    """Make toys on the device: PyTorch would give a module other parameters when it moves there."""

    def make(kind: str) -> torch.nn.Module:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return base_model(kind).to(torch.device(NAME, 0))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return make


def build() -> None:
    """Compile the device (some ten seconds) and make it known to PyTorch."""
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend(NAME)
    # The ninja that DeepSpeed brings, where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        load(
            "second_device",
            [str(HERE / "second_device.cpp")],
            build_directory=folder,
            extra_cflags=["-O1"],
            is_python_module=False,
        )
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)


def clumsy(ranks: Any, folder: Path, how: str, **params: Any) -> dict[str, Any]:
    """A method that in every step reads a number from the device, or mixes in a CPU's tensor."""
    import cases
    from cases import make_parts

    def read(stage: Any) -> None:
        for name in stage.engine.parameters:
            float(stage.engine.gradient(name).sum())

    def mix(stage: Any) -> None:
        for name in stage.engine.parameters:
            gradient = stage.engine.gradient(name)
            stage.engine.write_gradient(name, gradient + torch.zeros(gradient.shape))

    def with_edit(*arguments: Any, **named: Any) -> Any:
        parts = make_parts(*arguments, **named)
        parts.method.after_backward = {"reads": read, "mixes": mix}[how]  # type: ignore[method-assign]
        return parts

    cases.make_parts = with_edit
    try:
        return cases.CASES["sequence"](ranks, folder, **params)
    finally:
        cases.make_parts = make_parts
