"""Scripts for Slurm: rendered, read by bash and shellcheck, and run with a Slurm of paper."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from slurm_case import CLUSTER, PaperSlurm, check_shell

from accrete.launch.cluster import slurm
from accrete.launch.cluster.request import Branch, make_request, write_files
from accrete.launch.cluster.settings import ClusterConfig, SlurmConfig


@pytest.fixture
def paper(tmp_path: Path) -> PaperSlurm:
    return PaperSlurm(tmp_path)


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


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/shared/runs/one", "/shared/runs/one/launch/slurm-%j.out"),
        ("/shared/my runs", '"/shared/my runs/launch/slurm-%j.out"'),
        ("/shared/run#2", '"/shared/run#2/launch/slurm-%j.out"'),  # else a comment begins
        ("/shared/it's", '"/shared/it\'s/launch/slurm-%j.out"'),  # else sbatch misses its end
        ('/shared/a"b', '"/shared/a\\"b/launch/slurm-%j.out"'),
        ("/shared/50%j", "/shared/50%%j/launch/slurm-%j.out"),
    ],
)
def test_the_output_goes_into_the_run_folder(folder: str, said: str) -> None:
    """sbatch was asked with -vv what it makes of these quotes; `%%` is from its manual."""
    request = make_request("quickstart", [], Path(folder), ClusterConfig(device="cpu"))
    assert f"#SBATCH --output={said}\n" in slurm.render(request)["job.sbatch"]


def test_without_gpus_none_are_asked_for() -> None:
    cluster = ClusterConfig(device="cpu")
    request = make_request("quickstart", [], Path("/shared/runs/one"), cluster)
    assert "gpus" not in slurm.render(request)["job.sbatch"]


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        ("gpu:a100:8(S:0-1)", True),
        ("lscratch:800,gpu:a100:8(S:0,1)", True),
        ("gpu:8", True),
        ("gpu", True),
        ("gpumem:80,gpu-share:2", False),
        ("fpga:1,nogpu:1", False),
        ("(null)", False),
    ],
)
def test_gpus_are_asked_for_where_the_partition_has_them(
    paper: PaperSlurm, monkeypatch: pytest.MonkeyPatch, resources: str, asked: bool
) -> None:
    monkeypatch.setenv("PATH", paper.environment()["PATH"])
    paper.write("sinfo", f"echo 'long* {resources}'")
    request = make_request("quickstart", [], Path("/shared/runs/one"), ClusterConfig())
    assert ("--gpus-per-node=1" in slurm.render(request)["job.sbatch"]) == asked


@pytest.mark.parametrize(
    ("settings", "variable", "asked"),
    [
        ({}, None, False),  # the default partition has none
        ({"partition": "fat"}, None, True),
        ({"options": ["--partition=fat"]}, None, True),
        ({"options": ["--mail-type=END", "-p fat # mine"]}, None, True),
        ({"options": ["-pfat"], "partition": "thin"}, None, True),
        ({"options": ["--partition fat"]}, "thin", False),
        ({}, "fat", True),
    ],
)
def test_the_partition_in_force(
    paper: PaperSlurm,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict,
    variable: str | None,
    asked: bool,
) -> None:
    """Its nodes have the GPUs; those of another one tell nothing."""
    monkeypatch.setenv("PATH", paper.environment()["PATH"])
    if variable:
        monkeypatch.setenv("SBATCH_PARTITION", variable)
    else:
        monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    thin, fat = "echo 'thin* (null)'", "echo 'fat gpu:a100:8'"
    paper.write(
        "sinfo",
        f'case "$*" in *%D*) echo "thin* 1";; *" fat") {fat};; *" thin") {thin};; '
        f"*) {thin}; {fat};; esac",
    )
    cluster = ClusterConfig(nodes=2, slurm=SlurmConfig(**settings))
    request = make_request("quickstart", [], Path("/shared/runs/one"), cluster)
    assert ("--gpus-per-node=1" in slurm.render(request)["job.sbatch"]) == asked
    if variable or "options" in settings:
        slurm.require_enough_nodes(request)  # one node of another partition is no reason to refuse
    elif not settings:
        with pytest.raises(slurm.SlurmError, match="partition thin has 1"):
            slurm.require_enough_nodes(request)


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


@pytest.mark.parametrize("element", [0, 1])
def test_an_element_of_an_array_speaks_of_itself_alone(
    paper: PaperSlurm, tmp_path: Path, element: int
) -> None:
    """By its number alone Slurm takes one of the elements for the whole array."""
    paper.variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(element)}
    during = "kill -USR1 $PPID; command sleep 0.3"
    assert run_job(paper, tmp_path, verdict=75, during=during) == 75
    about = [x for x in paper.calls() if x.startswith(("scancel", "scontrol --one", "scontrol re"))]
    assert about == [
        f"scancel --signal=USR1 7_{element}",
        f"scontrol --oneliner show job 7_{element}",
        f"scontrol requeue 7_{element}",
    ]


def answer_late(paper: PaperSlurm, command: str, times: int) -> None:
    """Let `scontrol` or `scancel` fail at first, as they do where slurmctld is busy."""
    path, count = paper.bin / command, paper.bin.parent / "asked"
    known = path.read_text().partition("\n")[2]
    late = (
        f'if [[ "$*" = *"show job"* || "$0" = */scancel ]]; then echo >>{count}; '
        f"[ $(wc -l <{count}) -gt {times} ] || exit 1; fi"
    )
    path.write_text(f"#!/bin/bash\n{late}\n{known}")


@pytest.mark.parametrize("times", [2, 100])
def test_no_answer_is_not_taken_for_one(paper: PaperSlurm, tmp_path: Path, times: int) -> None:
    """A slurmctld that is busy at the end of an attempt does not end the run."""
    answer_late(paper, "scontrol", times)
    assert run_job(paper, tmp_path, verdict=75) == 75
    assert "scontrol requeue 7" in paper.calls()


def test_the_warning_is_passed_on_again(paper: PaperSlurm, tmp_path: Path) -> None:
    answer_late(paper, "scancel", 2)
    run_job(paper, tmp_path, verdict=1, during="/bin/sleep 0.3; kill -USR1 $PPID; /bin/sleep 1")
    assert "scancel --signal=USR1 7" in paper.calls()


def test_a_requeue_that_was_done_without_an_answer(paper: PaperSlurm, tmp_path: Path) -> None:
    state = f'$([ -e {tmp_path}/done ] && echo "PENDING Restarts=2" || echo "RUNNING Restarts=1")'
    paper.write(
        "scontrol",
        f'[ "$2" = hostnames ] && echo n1\n[ "$2" = show ] && echo "JobState={state}"\n'
        f'[ "$1" != requeue ] || {{ touch {tmp_path}/done; exit 1; }}',
    )
    assert run_job(paper, tmp_path, verdict=75) == 75
    assert not [call for call in paper.calls() if "chain next" in call]


def test_setup_runs_on_every_node_and_may_read_what_is_not_set(
    paper: PaperSlurm, tmp_path: Path
) -> None:
    line = f'echo "setup of ${{SLURM_NODEID:-the script}}$NOBODY_HAS_SET_THIS" >>{paper.log}'
    step = 'while [ "$1" != bash ]; do shift; done'
    nodes = 'for node in 0 1; do SLURM_NODEID=$node "$@"; done'
    assert run_job(paper, tmp_path, verdict=0, during=f"{step}\n{nodes}", setup=(line,)) == 0
    node = "python -m accrete.launch.cluster.node"
    said = [x for x in paper.calls() if x.startswith(("setup of", node))]
    words = [" ".join(line.split()[:3]) for line in said]
    assert words == ["setup of the", "setup of 0", node, "setup of 1", node]


def test_what_setup_sources_has_no_arguments(paper: PaperSlurm, tmp_path: Path) -> None:
    """`source miniconda3/bin/activate` takes its shell's arguments where it gets none."""
    (tmp_path / "activate").write_text(f'echo "activate $*" >>{paper.log}\n')
    step = 'while [ "$1" != bash ]; do shift; done\n"$@"'
    setup = (f". {tmp_path}/activate",)
    assert run_job(paper, tmp_path, verdict=0, during=step, setup=setup) == 0
    assert [x for x in paper.calls() if x.startswith("activate")] == ["activate "] * 2
    assert any(x.startswith("python -m accrete.launch.cluster.node") for x in paper.calls())


def test_the_nodes_get_all_variables(paper: PaperSlurm, tmp_path: Path) -> None:
    """Also where `--export=NONE` has left srun a SLURM_EXPORT_ENV that says otherwise."""
    run_job(paper, tmp_path, verdict=0)
    step = next(x for x in paper.calls() if x.startswith("srun"))
    assert "--export=ALL" in step.split()


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
