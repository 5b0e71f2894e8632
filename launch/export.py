"""Hand a finished stage over: an ordinary model folder, or one peft adapter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.run_dir import RunDir

if TYPE_CHECKING:
    from accrete.pipeline.models.lora import Factors
    from accrete.pipeline.stage_runner import StageRunner


def export_stage(
    run_dir: Path,
    out: Path,
    stage: int | None = None,
    form: Literal["merged", "adapter"] = "merged",
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> Path:
    """Write the model as it stood after `stage`.

    Args:
        run_dir: A run folder.
        out: Folder to make; it must not exist.
        stage: Stage number from 0; None: the last finished one.
        form: `merged`: an ordinary Hugging Face model folder with its tokenizer. `adapter`: one
            peft adapter over the untouched base, with the ranks of all finished tasks side by side.
        dtype: Precision of a merged model; bf16 rounds once, from the exact fp32 sum.

    Returns:
        `out`.

    Raises:
        RunFolderError: `out` exists, or the run has no such stage, or no adapter.
    """
    from accrete.launch.rebuild import rebuild
    from accrete.pipeline.config.load import load_recipe
    from accrete.pipeline.methods.registry import method_class

    if out.exists():
        raise RunFolderError(f"{out}: exists already; give another --out.")
    run = RunDir(run_dir)
    run.require_run()
    kind = load_recipe(run.recipe).config.method.kind
    if form == "adapter" and method_class(kind).trains == "weights":
        raise RunFolderError(
            f"{run_dir}: method {kind} trains the model's own weights, so there is no adapter to "
            "export. Take --form merged."
        )
    # The base is opened in fp32 and the past folded into it, whatever the run trained in.
    runner = rebuild(run_dir, stage, ("model.dtype=fp32", "adapter.past=fold"))
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if form == "merged":
            _write_merged(runner, aside, dtype)
        else:
            _write_adapter(runner, aside)
        os.replace(aside, out)
    except BaseException:  # such as a full disk, which half a model would keep full
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def _write_merged(runner: StageRunner, folder: Path, dtype: str) -> None:
    import torch

    from accrete.launch.prepare import open_tokenizer

    model: Any = runner.parts.adapted.merged()
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(folder)
    open_tokenizer(runner.parts.run, runner.parts.config).save_pretrained(folder)
    _require_same(folder, model)


def _require_same(folder: Path, model: object) -> None:
    """Reopen the folder and compare every weight."""
    import torch

    again = type(model).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
    written = model.state_dict()  # type: ignore[attr-defined]
    for name, value in again.state_dict().items():
        if not torch.equal(value, written[name].cpu()):
            raise RunFolderError(f"{folder}: {name} was not written as it is; check the disk.")


def _write_adapter(runner: StageRunner, folder: Path) -> None:
    import torch

    from accrete.pipeline.models.lora import save_adapter

    adapted, past = runner.parts.adapted, runner.parts.past
    live = runner.live.factors()
    combined: Factors = {}
    for layer in adapted.layers.values():
        a, b = live[layer.name]
        pairs = [(a, layer.scale * b)] if runner.carried or not past.stages else []
        if past.stages:
            pairs.insert(0, past.combined(layer))
        combined[layer.name] = (
            torch.cat([a.cpu() for a, _ in pairs]),
            torch.cat([b.cpu() for _, b in pairs], dim=1),
        )
    rank = next(iter(combined.values()))[0].shape[0]
    adapted.peft_config.r = rank
    adapted.peft_config.lora_alpha = rank  # the scale is inside B
    adapted.peft_config.alpha_pattern = {}
    save_adapter(adapted, combined, runner.parts.model_path, folder)
