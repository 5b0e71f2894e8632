"""The Python face and the run folder around the workers, which are small fakes here."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from accrete.eval.run_record import RunRecord
from accrete.launch import api, folder
from accrete.launch.api import branch, load_recipe, read_result, resume, run
from accrete.launch.failures import LaunchError
from accrete.launch.local import Patience, launch_local
from accrete.launch.prepare import Prepared
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.errors import ConfigError, DataError, RunFolderError

RECIPE = """\
name: small
model: tiny_t5
method: sequential
tasks: [alpha, beta]
data: {format: generated}
log: {console: quiet}
"""

WORKER = """
import json, os, sys
from pathlib import Path
from accrete.launch.failures import report_failure
from accrete.pipeline.errors import DataError, MethodError
from accrete.pipeline.records import Event, Recorder
from accrete.pipeline.run_dir import RunDir, read_json, write_json
run, rank = RunDir(sys.argv[sys.argv.index("--run-dir") + 1]), int(os.environ["RANK"])
def finish(rows):
    names = [task["name"] for task in read_json(run.prepared)["tasks"]]
    metrics = {"average_performance": 70.0, "forward_transfer": None}
    write_json(run.matrix, {"tasks": names, "matrix": rows, "metrics": metrics})
    with Recorder(run.events) as recorder:
        recorder.emit(Event.STAGE_STARTED, stage=0, task=names[0])
"""


class Stage:
    """Stands in for everything between a recipe and its workers."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path, self.monkeypatch = tmp_path, monkeypatch
        self.prepared = 0
        self.fingerprint = "f"
        self.run_dir = tmp_path / "run"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(api, "prepare", self.prepare)
        (tmp_path / "small.yaml").write_text(RECIPE)

    def prepare(self, config: Any, say: Any) -> Prepared:
        self.prepared += 1
        folder = self.tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        split = SplitStats(
            rows=8,
            truncated_pct=0.0,
            mean_prompt_tokens=10.0,
            max_prompt_tokens=12,
            mean_answer_tokens=2.0,
            max_answer_tokens=3,
        )
        tasks = [
            TaskHandle(
                name=task.name,
                metric="exact_match",
                labels=None,
                train_dir=str(folder),
                eval_dir=str(folder),
                num_train=8,
                num_eval=4,
                streamed=False,
                stats=TaskStats(train=split, eval=split),
                fingerprint=self.fingerprint,
            )
            for task in config.tasks
        ]
        return Prepared(
            device="cpu",
            procs=config.engine.procs or 2,
            model_path=str(folder),
            tokenizer_path=str(folder),
            seq2seq=True,
            tasks=tasks,
        )

    def workers(self, body: str) -> None:
        """What every rank does from now on."""
        script = self.tmp_path / "worker.py"
        script.write_text(WORKER + body)
        self.monkeypatch.setattr(
            api,
            "launch_local",
            functools.partial(
                launch_local,
                command=[sys.executable, str(script)],
                patience=Patience(after_failure=0.2, after_signal=0.3),
            ),
        )


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


FINISH = "if rank == 0: finish([[90.0], [60.0, 80.0]])\n"
HALF = "if rank == 0: finish([[90.0]])\n"


def test_three_lines(stage: Stage) -> None:
    stage.workers(FINISH)
    recipe = load_recipe("small.yaml", "seed=3")
    result = run(recipe, stage.run_dir)
    assert result.tasks == ["alpha", "beta"]
    assert result.matrix == [[90.0], [60.0, 80.0]]
    assert result.metrics == {"average_performance": 70.0, "forward_transfer": None}
    assert result.finished
    assert result.report.is_file()
    assert read_result(stage.run_dir) == result


def test_the_folder_says_what_ran(stage: Stage) -> None:
    stage.workers(FINISH)
    recipe = load_recipe("small.yaml", "seed=3", "adapter.rank=4")
    run(recipe, stage.run_dir, procs=1)
    written = json.loads((stage.run_dir / "run.json").read_text())
    assert (written["name"], written["method"], written["seed"]) == ("small", "sequential", 3)
    assert (written["procs"], written["device"], written["resumes"]) == (1, "cpu", [])
    assert written["origins"]["seed"] == "override"
    assert "recipes/methods/sequential.yaml:" in written["origins"]["method.kind"]
    assert written["origins"]["train.epochs"] == "default"
    assert set(written["versions"]) >= {"python", "torch", "deepspeed"}
    assert written["hardware"]["cores"] >= 1
    # The resolved recipe alone gives the same configuration.
    again = load_recipe(stage.run_dir / "recipe.yaml").config
    assert again == load_recipe(recipe.file, *recipe.overrides, "engine.procs=1").config
    prepared = json.loads((stage.run_dir / "prepared.json").read_text())
    assert [task["name"] for task in prepared["tasks"]] == ["alpha", "beta"]
    assert prepared["seq2seq"] is True


def test_a_worker_that_finds_bad_input_leaves_no_folder(stage: Stage) -> None:
    stage.workers("os._exit(report_failure(run, rank, DataError('row 3 is odd')))")
    with pytest.raises(LaunchError, match="row 3 is odd") as caught:
        run(load_recipe("small.yaml"), stage.run_dir)
    assert caught.value.exit_code == 2
    assert not stage.run_dir.exists()


def test_a_run_that_fails_later_stays_and_goes_on(stage: Stage) -> None:
    stage.workers(HALF + "os._exit(report_failure(run, rank, MethodError('no')))")
    with pytest.raises(LaunchError) as caught:
        run(load_recipe("small.yaml"), stage.run_dir)
    assert caught.value.exit_code == 1
    assert not read_result(stage.run_dir).finished
    with pytest.raises(RunFolderError, match="accrete resume"):
        run(load_recipe("small.yaml"), stage.run_dir)

    stage.workers("(run.path / f'got-{rank}').write_text(' '.join(sys.argv))\n" + FINISH)
    stage.prepared = 0
    result = resume(stage.run_dir, "engine.zero_stage=3", procs=1)
    assert result.finished
    assert stage.prepared == 0  # what the run was prepared with is still there
    assert [path.name for path in stage.run_dir.glob("got-*")] == ["got-0"]
    arguments = (stage.run_dir / "got-0").read_text().split()
    assert arguments[-2:] == ["engine.zero_stage=3", "engine.procs=1"]
    [entry] = json.loads((stage.run_dir / "run.json").read_text())["resumes"]
    assert entry["overrides"] == ["engine.zero_stage=3", "engine.procs=1"]


def test_a_finished_run_is_only_read(stage: Stage) -> None:
    stage.workers(FINISH)
    first = run(load_recipe("small.yaml"), stage.run_dir)
    stage.workers("os._exit(1)")
    assert resume(stage.run_dir) == first


def test_a_lost_cache_is_made_anew_if_it_is_the_same(stage: Stage) -> None:
    stage.workers(HALF)
    run(load_recipe("small.yaml"), stage.run_dir)
    stage.prepared = 0
    (stage.tmp_path / "cache").rmdir()
    resume(stage.run_dir)
    assert stage.prepared == 1
    (stage.tmp_path / "cache").rmdir()
    stage.fingerprint = "g"
    with pytest.raises(DataError, match="alpha, beta are not those"):
        resume(stage.run_dir)


def test_resume_leaves_alone_what_is_learned(stage: Stage) -> None:
    stage.workers(HALF)
    run(load_recipe("small.yaml"), stage.run_dir)
    with pytest.raises(ConfigError, match="seed=1"):
        resume(stage.run_dir, "log.every_steps=5", "seed=1")


def test_reading_before_the_first_score(stage: Stage) -> None:
    stage.workers("os._exit(1)")
    with pytest.raises(LaunchError):
        run(load_recipe("small.yaml"), stage.run_dir)
    with pytest.raises(RunFolderError, match="no stage has been scored yet"):
        read_result(stage.run_dir)


def test_an_interrupted_start_leaves_no_half_folder(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> dict[str, str]:
        raise KeyboardInterrupt

    stage.workers(FINISH)
    monkeypatch.setattr(folder, "versions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe("small.yaml"), stage.run_dir)
    assert not stage.run_dir.exists()


@pytest.fixture
def parent(stage: Stage) -> Path:
    """A run whose first stage is finished."""
    stage.workers(HALF)
    run(load_recipe("small.yaml"), stage.run_dir)
    (stage.run_dir / "stages" / "0").mkdir()
    (stage.run_dir / "stages" / "0" / "score.json").write_text("{}")
    checkpoint = stage.run_dir / "checkpoints" / "stage-0"
    checkpoint.mkdir()
    (checkpoint / "method.safetensors").touch()
    manifest = {"files": {"method.safetensors": "x"}, "past": {}, "live": False}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    return stage.run_dir


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_branch_shares_what_came_before(stage: Stage, parent: Path) -> None:
    before = files_of(parent)
    stage.workers(FINISH)
    result = branch(parent, 0, stage.tmp_path / "new", "method=inc_lora", procs=1)
    assert result.finished
    assert files_of(parent) == before
    child = files_of(stage.tmp_path / "new")
    assert "stages/0/score.json" in child
    # Another method knows nothing of what this one kept.
    assert "checkpoints/stage-0/checkpoint.json" in child
    assert "checkpoints/stage-0/method.safetensors" not in child
    assert json.loads(child["run.json"])["method"] == "inc_lora"
    assert json.loads(child["lineage.json"])["parent"] == str(parent)


def test_a_branch_knows_what_its_shared_stages_were_learned_with(
    stage: Stage, parent: Path
) -> None:
    """By stages, through branches of branches; not where the settings came back."""
    stage.workers(FINISH)

    def learned_otherwise(source: Path, last: int, name: str, *overrides: str) -> str | None:
        folder = stage.tmp_path / name
        branch(source, last, folder, *overrides, procs=1)
        if last == 0:  # as if the next stage were finished
            shutil.copytree(folder / "stages" / "0", folder / "stages" / "1")
            shutil.copytree(folder / "checkpoints" / "stage-0", folder / "checkpoints" / "stage-1")
        return RunRecord(folder).branched

    assert learned_otherwise(parent, 0, "same", "engine.zero_stage=1") is None
    slow = learned_otherwise(parent, 0, "slow", "train.learning_rate=1e-5")
    assert slow == "learning_rate=0.001@stage-0"
    assert learned_otherwise(stage.tmp_path / "slow", 0, "back", "train.learning_rate=1e-3") is None
    other = learned_otherwise(
        stage.tmp_path / "slow", 1, "other", "train.learning_rate=2e-5", "method=inc_lora"
    )
    assert other == (
        "sequential learning_rate=0.001@stage-0, sequential learning_rate=1e-05@stage-1"
    )


def test_a_branch_cannot_change_what_it_shares(stage: Stage, parent: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        branch(parent, 0, stage.tmp_path / "new", "seed=5")
    for setting in ("eval.mode=generate", "eval.decode_misses=true"):
        with pytest.raises(ConfigError, match=f"cannot change {setting.partition('=')[0]}"):
            branch(parent, 0, stage.tmp_path / "new", setting)
    with pytest.raises(RunFolderError, match="stage 1 is not finished"):
        branch(parent, 1, stage.tmp_path / "new")
    stage.fingerprint = "other"
    with pytest.raises(DataError, match="alpha are not those"):
        branch(parent, 0, stage.tmp_path / "new")
    assert not (stage.tmp_path / "new").exists()


def put_together(parent: Path, stages: int) -> None:
    """Let the parent's checkpoint say that so many tasks' factors joined its past."""
    file = parent / "checkpoints" / "stage-0" / "checkpoint.json"
    manifest = json.loads(file.read_text())
    names = {f"stages/{i}/adapter/adapter_model.safetensors": "x" for i in range(stages)}
    file.write_text(json.dumps({**manifest, "past": names}))


@pytest.mark.parametrize("kind", ["joint", "per_task"])
def test_a_branch_that_starts_over_needs_an_untrained_model(
    stage: Stage, parent: Path, kind: str
) -> None:
    stage.workers(FINISH)
    branch(parent, 0, stage.tmp_path / "new", f"method={kind}")  # nothing has joined the model
    put_together(parent, 1)
    with pytest.raises(ConfigError, match=f"method {kind} starts every task from the untrained"):
        branch(parent, 0, stage.tmp_path / "other", f"method={kind}")
    assert not (stage.tmp_path / "other").exists()


def test_a_branch_puts_finished_tasks_together_as_they_were(stage: Stage, parent: Path) -> None:
    stage.workers(FINISH)
    put_together(parent, 1)  # one task is the same either way
    summed = ("method=ewc_lora", "method.merge=factor_sum")
    branch(parent, 0, stage.tmp_path / "new", *summed)
    put_together(parent, 2)
    with pytest.raises(ConfigError, match="Keep exact, branch from stage 0"):
        branch(parent, 0, stage.tmp_path / "other", *summed)
    branch(parent, 0, stage.tmp_path / "third", "method=ewc_lora")


def test_a_branch_that_cannot_start_leaves_no_folder(stage: Stage, parent: Path) -> None:
    stage.workers("os._exit(report_failure(run, rank, DataError('odd')))")
    with pytest.raises(LaunchError, match="odd"):
        branch(parent, 0, stage.tmp_path / "new")
    assert not (stage.tmp_path / "new").exists()
