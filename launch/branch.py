"""Start a new run from a finished stage of another, with other settings for what follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.pipeline.config.load import LoadedRecipe, load_recipe
from accrete.pipeline.errors import ConfigError, RunFolderError
from accrete.pipeline.run_dir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from accrete.launch.prepare import Prepared
    from accrete.pipeline.methods.base import MethodConfig

FIXED = ("model", "adapter", "data", "seed")
"""What the shared stages were made with; a branch cannot change it."""
SCORED = ("mode", "decode_misses")
"""What of `eval` the shared stages' scores depend on, which stand in one matrix with the new."""


def branch_recipe(parent: RunDir, stage: int, overrides: Sequence[str]) -> LoadedRecipe:
    """The branch's recipe: the parent's with overrides, checked against what is shared.

    Raises:
        ConfigError: An override changes what the shared stages depend on.
        RunFolderError: The parent has no such finished stage.
    """
    parent.require_run()
    new = load_recipe(parent.recipe, overrides)
    require_branchable(parent, stage, new)
    return new


def require_branchable(parent: RunDir, stage: int, new: LoadedRecipe) -> None:
    """Make sure that a recipe can go on from a stage of another run.

    Raises:
        ConfigError: It changes what the shared stages depend on.
        RunFolderError: The parent has no such finished stage.
    """
    parent.require_run()
    manifest = parent.checkpoints / f"stage-{stage}" / "checkpoint.json"
    if not manifest.is_file():
        raise RunFolderError(f"{parent.path}: stage {stage} is not finished (stages count from 0).")
    old = load_recipe(parent.recipe)
    before, after = old.resolved(), new.resolved()
    changed = [key for key in FIXED if before[key] != after[key]]
    changed += [f"eval.{key}" for key in SCORED if before["eval"][key] != after["eval"][key]]
    if before["tasks"][: stage + 1] != after["tasks"][: stage + 1]:
        changed.append(f"tasks 0 to {stage} (tasks.{len(before['tasks'])}=... adds one to them)")
    if changed:
        raise ConfigError(
            f"A branch of {parent.path} after stage {stage} shares what came before, so it cannot "
            f"change {', '.join(changed)}. Allowed: method.*, train.*, engine.*, log.*, "
            "checkpoint.*, eval.batch_tokens, eval.forward_transfer and later tasks. For the rest "
            "start a new run (`accrete score` scores a stage in another way)."
        )
    _require_same_kind(old.config.method.kind, new.config.method.kind)
    _require_same_past(parent, read_json(manifest), old.config.method, new.config.method)


def _require_same_past(
    parent: RunDir, manifest: dict[str, Any], before: MethodConfig, after: MethodConfig
) -> None:
    """The finished tasks' factors must mean the same to the new method."""
    from accrete.pipeline.methods.registry import method_class
    from accrete.pipeline.models.lora import ADAPTER_FILE

    joined = sum(name.endswith(ADAPTER_FILE) for name in manifest["past"])
    old, new = (method_class(config.kind)(config) for config in (before, after))
    if new.restarts and manifest["past"]:
        raise ConfigError(
            f"method {after.kind} starts every task from the untrained model, and the stages of "
            f"{parent.path} have changed it: {before.kind} put their factors into it. Start a new "
            "run, or branch from one whose method is sequential, joint or per_task."
        )
    if joined > 1 and old.merge != new.merge:
        raise ConfigError(
            f"{parent.path} put {joined} tasks together with method.merge="
            f"{old.merge}; a branch with {new.merge} would change the model they made. Keep "
            f"{old.merge}, branch from stage 0, or start a new run."
        )


def _require_same_kind(before: str, after: str) -> None:
    """Trained weights cannot become an adapter, nor an adapter trained weights."""
    from accrete.pipeline.methods.registry import method_class

    trained = {kind: method_class(kind).trains for kind in (before, after)}
    if trained[before] != trained[after]:
        what = {"factors": "an adapter", "weights": "the model's own weights"}
        raise ConfigError(
            f"A branch cannot go from method {before}, which trains {what[trained[before]]}, to "
            f"{after}, which trains {what[trained[after]]}. Take a method of the same sort, or "
            "start a new run (`accrete export` gives it the model to start from)."
        )


def start_branch(
    parent: RunDir, stage: int, child: RunDir, recipe: LoadedRecipe, prepared: Prepared
) -> None:
    """Make the folder of a branch: the shared stages, and the start of a run of its own.

    Args:
        parent: The run to branch from.
        stage: Last stage that is shared.
        child: The new run; its folder is free.
        recipe: The branch's recipe.
        prepared: Its model and rows.

    Raises:
        InputError: The stage is not finished, the recipe changes what is shared, or the rows of the
            shared tasks have changed; no folder is left behind.
    """
    from accrete.launch.folder import require_same_rows, write_start
    from accrete.pipeline.methods.registry import method_class

    require_branchable(parent, stage, recipe)
    require_same_rows(parent, prepared, stage + 1)
    method = recipe.config.method.kind
    child.create()
    try:
        same_method = method == load_recipe(parent.recipe).config.method.kind
        copy_stages(parent, child, stage, same_method)
        write_lineage(parent, child, stage)
        fit_forward_scores(child, stage, read_json(parent.prepared), prepared.to_json())
        adopt_adapter(child, stage, method_class(method).fresh_adapter)
        write_start(child, recipe, prepared)
    except BaseException:
        child.discard()
        raise


def copy_stages(parent: RunDir, child: RunDir, stage: int, same_method: bool) -> None:
    """Copy what stages 0 to `stage` left behind into a fresh run folder.

    The method's own state (such as EWC-LoRA's Fisher) goes along only if the method stays the same;
    another method starts with no memory of the shared tasks.
    """
    for index in range(stage + 1):
        shutil.copytree(parent.stage(index).path, child.stage(index).path)
        source = parent.checkpoints / f"stage-{index}"
        if source.is_dir():
            target = child.checkpoints / f"stage-{index}"
            shutil.copytree(source, target)
            if not same_method:
                _drop_method_state(target)
    if parent.untrained.is_file():
        shutil.copy2(parent.untrained, child.untrained)
    _copy_events(parent, child, stage)


def write_lineage(parent: RunDir, child: RunDir, stage: int) -> None:
    """Say where a branch comes from, and with which settings its shared stages were learned."""
    from accrete.eval.run_settings import branch_settings

    # The parent may be a branch itself, in a folder from before `learned` was written down.
    learned = read_json(parent.lineage).get("learned", []) if parent.lineage.is_file() else []
    own = {"stage": stage, "settings": branch_settings(load_recipe(parent.recipe).resolved())}
    last = next((entry for entry in learned if entry["stage"] >= stage), own)
    write_json(
        child.lineage,
        {
            "parent": str(parent.path.resolve()),
            "stage": stage,
            "learned": [
                *(entry for entry in learned if entry["stage"] < stage),
                {**last, "stage": stage},
            ],
        },
    )


def fit_forward_scores(
    child: RunDir, stage: int, before: dict[str, Any], now: dict[str, Any]
) -> None:
    """Keep of the parent's forward transfer what holds for the branch's own later tasks.

    Scores of the untrained model go with their task. The last shared stage also scored the task
    that came next; if another one comes next now, that stage is scored again.

    Args:
        child: The branch, with the parent's stages copied.
        stage: Last stage that is shared.
        before: The parent's prepared.json.
        now: The branch's.
    """
    old, new = ([_task_key(task) for task in side["tasks"]] for side in (before, now))
    if child.untrained.is_file():
        scores = read_json(child.untrained)["scores"]
        known = dict(zip(old, scores, strict=False))
        write_json(child.untrained, {"scores": [known.get(key) for key in new] if scores else []})
    if old[stage + 1 : stage + 2] == new[stage + 1 : stage + 2]:
        return
    child.stage(stage).score.unlink(missing_ok=True)
    scoring = ("scored", "stage_finished")
    events = child.events.read_text(encoding="utf-8").splitlines(keepends=True)
    child.events.write_text(
        "".join(
            line
            for line in events
            if (event := json.loads(line)).get("stage") != stage or event["event"] not in scoring
        ),
        encoding="utf-8",
    )


def _task_key(task: dict[str, Any]) -> tuple[str, str]:
    return task["name"], task["fingerprint"]


def adopt_adapter(child: RunDir, stage: int, fresh_adapter: bool) -> None:
    """Make the last shared checkpoint fit a method that treats the live adapter otherwise.

    From one adapter for all tasks to fresh ones: that adapter becomes the past. The other way round
    the past stays and a new adapter starts; nothing has to change.
    """
    path = child.checkpoints / f"stage-{stage}" / "checkpoint.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if fresh_adapter and manifest["live"]:
        from accrete.pipeline.checkpoint import digest
        from accrete.pipeline.models.lora import ADAPTER_FILE, SCALE_FILE

        for name in (ADAPTER_FILE, SCALE_FILE):
            file = child.stage(stage).adapter / name
            manifest["past"][str(file.relative_to(child.path))] = digest(file)
        manifest["live"] = False
        write_json(path, manifest)


def _drop_method_state(folder: Path) -> None:
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"].pop("method.safetensors", None)
    (folder / "method.safetensors").unlink(missing_ok=True)
    write_json(path, manifest)


def _copy_events(parent: RunDir, child: RunDir, stage: int) -> None:
    """The shared part of the event stream: everything up to the end of `stage`."""
    from accrete.pipeline.records import Event, read_events

    with child.events.open("w", encoding="utf-8") as file:
        for event in read_events(parent.events):
            if event.get("stage", -1) > stage or event["event"] == Event.RUN_FINISHED:
                continue
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
