"""Scripts for Slurm: rendered, read by bash and shellcheck, and run with a Slurm of paper."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accrete.launch.cli import main
from accrete.launch.cluster import slurm, slurm_sweep
from accrete.launch.cluster.request import Branch, make_request, write_files
from accrete.launch.cluster.settings import ClusterConfig, SlurmConfig
from accrete.launch.cluster.sweep import make_requests, parse_axes, point_name, shared_tasks
from accrete.pipeline.errors import ConfigError

CLUSTER = ClusterConfig(
    nodes=2,
    procs_per_node=8,
    device="cuda",
    time="12:00:00",
    python="/opt/venv/bin/python",
    setup=["module load cuda"],
    slurm=SlurmConfig(
        partition="long",
        account="me",
        cpus_per_proc=4,
        memory="0",
        exclusive=True,
        array_limit=3,
        options=["--mail-type=END"],
    ),
)


def check_shell(script: str) -> None:
    """bash reads it; shellcheck, where it is installed, finds nothing."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        # Functions that only a trap calls; `$` that a node's own shell expands.
        words = ["shellcheck", "--exclude=SC2317,SC2016", "-"]
        done = subprocess.run(words, input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["one", "with a blank", "it's"])
def test_the_script_is_sound(name: str, tmp_path: Path) -> None:
    request = make_request("quickstart", [], tmp_path / name, CLUSTER)
    check_shell(slurm.render(request)["job.sbatch"])


def test_the_script_says_what_the_cluster_says() -> None:
    request = make_request("quickstart", [], Path("/shared/runs/one"), CLUSTER)
    lines = slurm.render(request)["job.sbatch"].splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=accrete-one",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--gpus-per-node=8",
        "--mem=0",
        "--time=12:00:00",
        "--partition=long",
        "--account=me",
        "--exclusive",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=/shared/runs/one/launch/slurm-%j.out",
        "--mail-type=END",
    ]
    assert "module load cuda" in lines
    assert "$" not in "".join(options)  # Slurm expands nothing there


def test_without_gpus_none_are_asked_for() -> None:
    cluster = ClusterConfig(device="cpu")
    request = make_request("quickstart", [], Path("/shared/runs/one"), cluster)
    assert "gpus" not in slurm.render(request)["job.sbatch"]


class PaperSlurm:
    """Commands of Slurm that only write down what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        self.job("RUNNING", restarts=1)
        for name in ("sbatch", "scancel", "sinfo", "squeue", "srun"):
            self.write(name, "")

    def job(self, state: str, restarts: int) -> None:
        """What `scontrol` says of the job."""
        known = f"JobId=7 JobState={state} Requeue=1 Restarts={restarts} BatchFlag=1"
        self.write(
            "scontrol",
            f'[ "$2" = hostnames ] && printf "n1\\nn2\\n"\n[ "$2" = show ] && echo "{known}"',
        )

    def write(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.log}\n{body}\nexit 0\n')
        path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def paper(tmp_path: Path) -> PaperSlurm:
    return PaperSlurm(tmp_path)


def run_job(
    paper: PaperSlurm,
    tmp_path: Path,
    verdict: int,
    during: str = "",
    setup: tuple[str, ...] = (),
    parent: int | None = None,
) -> int:
    """Run the job's script; `verdict` is the status of its own judge, `parent` that of the
    question whether a branch can begin."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\necho "python $*" >>{paper.log}\n'
        f'case "$*" in *verdict*) exit {verdict};; *await*) exit {parent};; esac\n'
    )
    python.chmod(0o755)
    paper.write("srun", f'echo "$MASTER_ADDR $NNODES $ACCRETE_ATTEMPT" >>{paper.log}\n{during}')
    paper.write("sleep", "")  # after a requeue the script waits for its end
    cluster = ClusterConfig(
        nodes=2, device="cpu", time="1:00:00", python=str(python), setup=list(setup)
    )
    branch = None if parent is None else Branch(parent=tmp_path / "parent", stage=0)
    request = make_request("quickstart", [], tmp_path / "a run", cluster, branch)
    write_files(request, slurm.render(request))
    done = subprocess.run(
        ["bash", request.launch_dir / "job.sbatch"],
        env=paper.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.returncode


def test_a_finished_run_ends_the_job(paper: PaperSlurm, tmp_path: Path) -> None:
    assert run_job(paper, tmp_path, verdict=0) == 0
    assert "n1 2 slurm-7.1" in paper.calls()
    judge = next(line for line in paper.calls() if line.startswith("python"))
    assert f"--run-dir {tmp_path}/a run --attempt slurm-7.1" in judge
    assert judge.endswith("--ending none")
    assert "scontrol requeue 7" not in paper.calls()


def test_only_the_verdict_requeues(paper: PaperSlurm, tmp_path: Path) -> None:
    assert run_job(paper, tmp_path, verdict=1) == 1
    assert "scontrol requeue 7" not in paper.calls()


def test_the_job_queues_itself_again(paper: PaperSlurm, tmp_path: Path) -> None:
    assert run_job(paper, tmp_path, verdict=75) == 75
    assert paper.calls()[-2:] == ["scontrol requeue 7", "sleep 120"]


def test_where_requeueing_is_forbidden_a_new_job_goes_on(paper: PaperSlurm, tmp_path: Path) -> None:
    show = '[ "$2" = hostnames ] && echo n1; [ "$2" = show ] && echo "JobState=RUNNING Restarts=1"'
    paper.write("scontrol", f'[ "$1" != requeue ] || exit 1\n{show}')
    assert run_job(paper, tmp_path, verdict=75) == 0
    assert paper.calls()[-1].startswith("python -m accrete.launch.cluster.chain next --run-dir")


@pytest.mark.parametrize(("parent", "status", "starts"), [(0, 0, 1), (75, 0, 0), (1, 1, 0)])
def test_a_branch_asks_whether_it_can_begin(
    paper: PaperSlurm, tmp_path: Path, parent: int, status: int, starts: int
) -> None:
    assert run_job(paper, tmp_path, verdict=0, parent=parent) == status
    assert len([x for x in paper.calls() if x.startswith("srun")]) == starts


@pytest.mark.parametrize(("signal", "ending"), [("USR1", "limit"), ("TERM", "cancel")])
def test_a_signal_during_a_long_setup(
    paper: PaperSlurm, tmp_path: Path, signal: str, ending: str
) -> None:
    """It does not kill the shell, and nothing is started any more."""
    assert run_job(paper, tmp_path, verdict=1, setup=(f"kill -{signal} $$",)) == 1
    assert not [x for x in paper.calls() if x.startswith("srun")]
    assert paper.calls()[-1].endswith(f"--ending {ending}")


@pytest.mark.parametrize(("state", "restarts"), [("PENDING", 2), ("RUNNING", 2)])
def test_a_leftover_of_a_lost_node_queues_nothing(
    paper: PaperSlurm, tmp_path: Path, state: str, restarts: int
) -> None:
    """Slurm has queued the job again by itself; it may even be running elsewhere."""
    paper.job(state, restarts)
    assert run_job(paper, tmp_path, verdict=75) == 75
    assert not [call for call in paper.calls() if "requeue" in call or "sbatch" in call]


@pytest.mark.parametrize(("signal", "ending"), [("USR1", "limit"), ("TERM", "cancel")])
def test_signals_to_the_script(paper: PaperSlurm, tmp_path: Path, signal: str, ending: str) -> None:
    run_job(paper, tmp_path, verdict=1, during=f"kill -{signal} $PPID; command sleep 0.3")
    assert any(line.endswith(f"--ending {ending}") for line in paper.calls())
    passed_on = "scancel --signal=USR1 7" in paper.calls()
    assert passed_on == (signal == "USR1")


def test_a_finished_run_starts_nothing(paper: PaperSlurm, tmp_path: Path) -> None:
    (tmp_path / "a run" / "launch").mkdir(parents=True)
    (tmp_path / "a run" / "launch" / "finished.json").touch()
    assert run_job(paper, tmp_path, verdict=1) == 0
    assert paper.calls() == []


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


def test_a_sweep_is_submitted_as_an_array_and_a_chain(paper: PaperSlurm, tmp_path: Path) -> None:
    first, second, third = recipes(tmp_path)
    axes = parse_axes([f"recipe={first},{second},{third}"])
    folder = tmp_path / "sweep"
    requests = make_requests("quickstart", [], axes, folder, CLUSTER)
    rendered = slurm_sweep.render(requests, folder)
    for script in rendered.values():
        check_shell(script)
    assert "#SBATCH --array=0-1%3" in rendered["sweep.sbatch"]
    assert "#SBATCH --time=12:00:00" in rendered["sweep.sbatch"]
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


def test_an_element_of_the_array_is_the_run_of_its_number(tmp_path: Path) -> None:
    first, _, third = recipes(tmp_path)
    axes = parse_axes([f"recipe={first},{third}"])
    requests = make_requests("quickstart", [], axes, tmp_path / "sweep", CLUSTER)
    script = slurm_sweep.render(requests, tmp_path / "sweep")["sweep.sbatch"]
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

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["accrete", "launch", "slurm", *map(str, words)])
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
