"""`accrete launch slurm`: its sweeps, what it writes and what it refuses, on a Slurm of paper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_case import CLUSTER, PaperSlurm, check_shell

from accrete.launch.cli import main
from accrete.launch.cluster import attempts, slurm_sweep
from accrete.launch.cluster.request import LaunchRequest
from accrete.launch.cluster.sweep import make_requests, parse_axes, point_name, shared_tasks
from accrete.pipeline.errors import ConfigError, DataError
from accrete.pipeline.run_dir import RunDir


@pytest.fixture
def paper(tmp_path: Path) -> PaperSlurm:
    return PaperSlurm(tmp_path)


# -- sweeps ------------------------------------------------------------------------------------


def test_axes() -> None:
    axes = parse_axes(["seed=0,1", "adapter.targets=[q,v],all_linear"])
    assert [axis.values for axis in axes] == [("0", "1"), ("[q,v]", "all_linear")]
    assert point_name(axes, ("0", "[q,v]")) == "seed0-targets_q_v"
    for wrong in ("seed", "seed=", "=1", "seed=1,,2", "seed=1,1"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_axes([wrong])
    with pytest.raises(ConfigError, match="varied twice"):
        parse_axes(["seed=1", "seed=2"])


def recipes(folder: Path) -> list[Path]:
    """Three orders of three tasks: the first two begin with the same one."""
    files = []
    for name in ("mood topic guests", "mood guests topic", "guests mood topic"):
        path = folder / f"{name.replace(' ', '_')}.yaml"
        path.write_text(f"extends: quickstart\nmethod: sequential\ntasks: {name.split()}\n")
        files.append(path)
    return files


def test_common_first_tasks_are_learned_once(tmp_path: Path) -> None:
    first, second, third = recipes(tmp_path)
    axes = parse_axes([f"recipe={first},{second},{third}", "seed=0,1"])
    requests = make_requests("quickstart", [], axes, tmp_path / "sweep", CLUSTER)
    found = {x.run_dir.name: x.branch and (x.branch.parent.name, x.branch.stage) for x in requests}
    assert found == {
        "mood_topic_guests-seed0": None,
        "mood_topic_guests-seed1": None,
        "mood_guests_topic-seed0": ("mood_topic_guests-seed0", 0),
        "mood_guests_topic-seed1": ("mood_topic_guests-seed1", 0),
        "guests_mood_topic-seed0": None,
        "guests_mood_topic-seed1": None,
    }


def test_runs_with_other_settings_share_nothing(tmp_path: Path) -> None:
    first, *_ = recipes(tmp_path)
    for axis in ("method=sequential,inc_lora", "train.learning_rate=1e-3,2e-3"):
        axes = parse_axes([axis])
        requests = make_requests(str(first), [], axes, tmp_path / "sweep", CLUSTER)
        assert [x.branch for x in requests] == [None, None]
    axes = parse_axes(["log.every_steps=1,2"])
    with pytest.raises(ConfigError, match="is the same run as"):
        make_requests(str(first), [], axes, tmp_path / "sweep", CLUSTER)


def test_a_shorter_sequence_is_another_run() -> None:
    """A method may plan for the number of tasks."""
    one = {"seed": 0, "tasks": [{"name": "a"}, {"name": "b"}]}
    assert shared_tasks(one, {**one, "tasks": one["tasks"][:1]}) == 0
    assert shared_tasks(one, {**one, "tasks": [{"name": "a"}, {"name": "c"}]}) == 1


ODD = "my $odd `sweep`'s"
"""A folder's name that a shell and Slurm read otherwise, unless it is quoted."""


@pytest.mark.parametrize("name", ["sweep", ODD])
def test_a_sweep_is_submitted_as_an_array_and_a_chain(
    paper: PaperSlurm, tmp_path: Path, name: str
) -> None:
    first, second, third = recipes(tmp_path)
    axes = parse_axes([f"recipe={first},{second},{third}"])
    folder = tmp_path / name
    requests = make_requests("quickstart", [], axes, folder, CLUSTER)
    rendered = slurm_sweep.render(requests, folder)
    for script in rendered.values():
        check_shell(script)
    assert "#SBATCH --array=0-1%3" in rendered["sweep.sbatch"]
    assert "#SBATCH --time=12:00:00" in rendered["sweep.sbatch"]
    job = "accrete-sweep" if name == "sweep" else "accrete-my--odd--sweep--s"
    assert f"#SBATCH --job-name={job}\n" in rendered["sweep.sbatch"]
    paper.write("sbatch", f"echo $((40 + $(grep -c sbatch {paper.log})))';cluster'")
    done = subprocess.run(
        ["bash"],
        input=rendered["submit.sh"],
        env=paper.environment(),
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    names = ["mood_topic_guests", "guests_mood_topic", "mood_guests_topic"]
    assert done.stdout.splitlines() == [
        f"{job} {folder / name}" for job, name in zip(("41_0", "41_1", "42"), names, strict=True)
    ]
    assert "--dependency=afterok:41_0" in paper.calls()[1]


@pytest.mark.parametrize("name", ["sweep", ODD])
def test_an_element_of_the_array_is_the_run_of_its_number(tmp_path: Path, name: str) -> None:
    first, _, third = recipes(tmp_path)
    axes = parse_axes([f"recipe={first},{third}"])
    requests = make_requests("quickstart", [], axes, tmp_path / name, CLUSTER)
    script = slurm_sweep.render(requests, tmp_path / name)["sweep.sbatch"]
    for number, request in enumerate(requests):
        request.launch_dir.mkdir(parents=True)
        (request.launch_dir / "job.sbatch").write_text(f"echo run {number}\n")
        done = subprocess.run(
            ["bash"],
            input=script,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"run {number}\n"


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`accrete launch slurm` in this process: status, what it printed, what it complained of."""

    def call(*words: object, launcher: str = "slurm") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["accrete", "launch", launcher, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def test_a_dry_run_writes_and_prints_and_starts_nothing(
    launch, paper: PaperSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", paper.environment()["PATH"])
    run = tmp_path / "run"
    options = ("--nodes", 2, "--procs-per-node", 2, "--run-dir", run, "--dry-run")
    status, printed, _ = launch("quickstart", *options)
    assert status == 0
    assert sorted(p.name for p in run.iterdir()) == ["launch"]
    assert sorted(p.name for p in (run / "launch").iterdir()) == [
        "job.sbatch",
        "recipe.yaml",
        "request.json",
    ]
    assert (run / "launch" / "job.sbatch").read_text() in printed
    assert not [call for call in paper.calls() if not call.startswith("sinfo")]
    assert launch("quickstart", *options)[0] == 0  # and once more


def read_folder(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sweep", [[], ["--sweep", "seed=0,1"]], ids=["one", "sweep"])
def test_the_files_of_a_run_that_is_queued_stay_as_they_are(
    launch, paper: PaperSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[str]
) -> None:
    """Its job reads them at every attempt."""
    monkeypatch.setenv("PATH", paper.environment()["PATH"])
    run = tmp_path / "run"
    options = (*sweep, "--run-dir", run)
    assert launch("quickstart", *options, "--dry-run")[0] == 0
    attempts.note_queued(RunDir(run / "seed1" if sweep else run), "5")
    paper.write("squeue", "echo RUNNING")
    before = read_folder(run)
    other = ("quickstart", "train.learning_rate=0.5", *options)
    status, printed, complaint = launch(*other, "--dry-run")
    assert status == 0
    assert "#SBATCH" in printed
    assert "warning" in complaint
    assert "job 5 of this run is running" in complaint
    assert read_folder(run) == before
    status, _, complaint = launch(*other)
    assert status == 2
    assert "job 5 of this run is running" in complaint
    assert read_folder(run) == before


def test_a_sweep_with_a_wrong_run_leaves_nothing(
    launch, paper: PaperSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of those before it that are made ready on a node, as branches are."""
    monkeypatch.setenv("PATH", paper.environment()["PATH"])

    def prepare(request: LaunchRequest, say: object) -> bool:
        if request.recipe.config.seed == 1:
            raise DataError("its rows are wrong")
        return False

    monkeypatch.setattr("accrete.launch.cluster.request.prepare_run", prepare)
    options = ("--sweep", "seed=0,1", "--run-dir", tmp_path / "runs")
    status, _, complaint = launch("quickstart", *options)
    assert (status, "its rows are wrong" in complaint) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("launcher", ["slurm", "hosts"])
@pytest.mark.parametrize(
    ("squeue", "said"),
    [
        ("echo RUNNING", "job 5 of this run is running"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "whether job 5 is still there"),
    ],
)
def test_no_launcher_takes_a_queued_run_over(
    launch,
    paper: PaperSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    squeue: str,
    said: str,
) -> None:
    monkeypatch.setenv("PATH", paper.environment()["PATH"])
    run = tmp_path / "run"
    attempts.note_queued(RunDir(run), "5")
    paper.write("squeue", squeue)
    before = read_folder(run)
    hosts = ["--hosts", "one"] if launcher == "hosts" else []
    words = ("quickstart", *hosts, "--run-dir", run)
    for dry_run, status in (([], 2), (["--dry-run"], 0)):
        ended, _, complaint = launch(*words, *dry_run, launcher=launcher)
        assert ended == status
        assert said in complaint
        assert read_folder(run) == before


def test_without_slurm_nothing_is_left_behind(
    launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accrete.launch.cluster import request

    def prepare_nothing(asked: request.LaunchRequest, say: object) -> bool:
        asked.folder.create()
        return True

    monkeypatch.setattr(request, "prepare_run", prepare_nothing)
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, complaint = launch("quickstart", "--run-dir", tmp_path / "run")
    assert status == 2
    assert "sbatch is not on this machine" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstart", "train.learning_rat=1"], "did you mean `learning_rate`?"),
        (["quickstrt"], "did you mean `quickstart`?"),
        (["quickstart", "--cluster", "one_gpus"], "did you mean `one_gpu`?"),
        (["quickstart", "--time", "soon"], "allowed: minutes, HH:MM:SS or D-HH:MM:SS"),
        (["quickstart", "--sweep", "seed"], "write KEY=VALUE"),
    ],
)
def test_bad_input_leaves_no_folder(launch, words: list[str], said: str, tmp_path: Path) -> None:
    status, _, complaint = launch(*words, "--run-dir", tmp_path / "run", "--dry-run")
    assert status == 2
    assert said in complaint
    assert not (tmp_path / "run").exists()
