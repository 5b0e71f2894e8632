"""Every `plan`, `methods`, `run`, `resume`, `branch` and `compare` of README and docs is run.

Page by page, in the order of the page, through the real command line, on a toy model and generated
rows; the run itself is one plain process inside this one (`tests/runs` has real launches).
"""

from __future__ import annotations

import json
from pathlib import Path

import author_folders as made
import pytest
from documented import accrete_commands, write_files
from inprocess import PLAIN, stay_here
from toy_sequence import write_rows
from typer.testing import CliRunner

from accrete.launch import api
from accrete.launch.cli import app

CARRIED_OUT = ("plan", "methods", "run", "resume", "branch", "compare")
PAGES = sorted({page for page, words in accrete_commands() if words[0] in CARRIED_OUT})
SHORT = (
    "data.max_train_examples=16",
    "data.max_eval_examples=2",
    "train.max_steps=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "eval.forward_transfer=false",
    *PLAIN,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages tell to have at hand, and runs that stay in this process."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, task in zip(("reviews", "intents", "topics"), write_rows(rows), strict=True):
        for split, path in task["files"].items():
            target = tmp_path / "data" / name / f"{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(path).rename(target)
    monkeypatch.setattr(api, "_launch", stay_here)
    return tmp_path


def root_of(words: list[str], folder: Path) -> Path:
    """Rows in the layout of the authors, for the recipe that a command names."""
    root = folder / words[1].split("/")[0]
    if not root.exists():
        sapt = words[1].startswith(("superni/", "long_sequence_sapt/"))
        (made.make_sapt if sapt else made.make_olora)(root)
        root = root / "CL_Benchmark" if sapt else root
    return root


def shortened(words: list[str], folder: Path, model: Path) -> list[str]:
    """A command as the page has it, with the rows that it names and less to do."""
    words = [
        f"data.root={root_of(words, folder)}" if word.startswith("data.root=") else word
        for word in words
    ]
    own = words[1] in ("quickstart", "mine.yaml")
    if "--calibrate" in words:
        words += PLAIN
    if words[0] == "run" or own:
        words += [f"model.path={model}", "model.builder=null"]
    if words[0] == "run":
        words += [*SHORT, *([] if own else ["data.benchmark=null"])]
        if "--run-dir" not in words:
            words += ["--run-dir", f"runs/unnamed-{len(list(folder.glob('runs/*')))}"]
    return words


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_carried_out(page: str, folder: Path, tiny_t5: Path) -> None:
    for where, words in accrete_commands():
        if where != page or words[0] not in CARRIED_OUT:
            continue
        short = shortened(words, folder, tiny_t5)
        done = CliRunner().invoke(app, short)
        assert done.exit_code == 0, (short, done.output, done.exception)
        if words[0] in ("run", "branch"):
            run = folder / short[short.index("--run-dir") + 1]
            found = json.loads((run / "matrix.json").read_text())
            sizes = list(range(1, len(found["tasks"]) + 1))
            assert [len(row) for row in found["matrix"]] == sizes
        elif words[0] == "compare":
            assert "sequential" in done.output
            assert "ewc_lora" in done.output
        else:
            assert done.output.strip()


def test_a_branch_over_more_tasks_is_the_run_over_all_of_them(folder: Path, tiny_t5: Path) -> None:
    """What the FAQ promises for a task that comes later, to the bit."""

    def call(*words: str) -> Path:
        short = shortened(list(words), folder, tiny_t5)
        done = CliRunner().invoke(app, short)
        assert done.exit_code == 0, (short, done.output, done.exception)
        return folder / short[short.index("--run-dir") + 1]

    def run(name: str, tasks: str) -> Path:
        words = ("run", "standard_cl/order1", "method=ewc_lora", "data.root=FOLDER", tasks)
        return call(*words, "--run-dir", name)

    run("two", "tasks=[dbpedia, amazon]")
    longer = "tasks=[dbpedia, amazon, yahoo]"
    branch = call("branch", "two", "--from-stage", "1", longer, "--run-dir", "branch")
    whole = run("whole", longer)
    for name in ("stages/2/adapter/adapter_model.safetensors", "stages/2/predictions.jsonl"):
        assert (branch / name).read_bytes() == (whole / name).read_bytes(), name
    matrices = [json.loads((path / "matrix.json").read_text()) for path in (branch, whole)]
    assert matrices[0]["matrix"] == matrices[1]["matrix"]
    other = folder / "two" / "stages/1/adapter/adapter_model.safetensors"
    assert other.read_bytes() != (whole / "stages/2/adapter/adapter_model.safetensors").read_bytes()
