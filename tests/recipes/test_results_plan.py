"""`make results`: every run on its list can be read, and the table says what is finished."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import results
import results_figures

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.methods.registry import METHODS


@pytest.fixture
def plan(tmp_path):
    return results.Plan(tmp_path, tmp_path, "smollm2_135m", tmp_path / "figures.json")


def test_every_method_is_on_the_list():
    assert set(results.ORDER) == set(METHODS)
    assert len(results.ORDER) == len(METHODS)


@pytest.mark.parametrize("model", list(results.MODELS))
@pytest.mark.parametrize("kind", results.ORDER)
def test_every_run_can_be_read(kind, model, tmp_path):
    plan = results.Plan(tmp_path, tmp_path, model, tmp_path / "figures.json")
    trials = plan.trials(kind)
    assert len(trials) == results.TRIALS
    assert len({run.overrides for run in trials}) == results.TRIALS
    for run in trials:
        config = load_recipe(run.recipe, run.overrides).config
        assert config.method.kind == kind
        assert [task.name for task in config.tasks] == ["dbpedia", "amazon"]
        assert config.data.eval_split == "dev"


def finish(run, score, seconds=10.0, state=7):
    run.folder.mkdir(parents=True)
    metrics = dict.fromkeys(("average_performance", "backward_transfer", "plasticity"), score)
    matrix = {"metrics": metrics, "matrix": [[score]]}
    (run.folder / "matrix.json").write_text(json.dumps(matrix))
    about = {
        "overrides": run.overrides,
        "started": "2026-01-01",
        "hardware": {"cpu": "abacus"},
        "versions": {"torch": "2"},
    }
    (run.folder / "run.json").write_text(json.dumps(about))
    events = (
        {"event": "run_started", "time": 0.0},
        {"event": "consolidated", "time": 1.0, "state_bytes": state},
        {"event": "resumed", "time": 100.0},
        {"event": "run_finished", "time": 100.0 + seconds - 1.0},
    )
    (run.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_the_best_trial_is_taken_and_the_table_follows(plan, monkeypatch):
    assert plan.main("sequential", 0) is None
    for run, score in zip(plan.trials("sequential")[:3], (10.0, 30.0, 30.0), strict=True):
        finish(run, score)
    assert plan.chosen("sequential") is None
    assert "3 of 4 trials" in results.table(plan, ["sequential"])
    finish(plan.trials("sequential")[3], 20.0)
    assert plan.chosen("sequential") == ("train.learning_rate=5e-4",)
    for seed, score in ((0, 40.0), (1, 50.0), (2, 60.0)):
        finish(plan.main("sequential", seed), score)
    row = results.table(plan, ["sequential"]).splitlines()[-1]
    assert row.startswith("| `sequential` | 3 | 50.0 ± 10.0 |")
    assert "| 10 | 7 | `train.learning_rate=5e-4` |" in row  # what both attempts took
    # What was begun is resumed; runs beside one another share the cores.
    calls = []
    threads = []

    def start(command, env, **_):
        calls.append(command[3:])
        threads.append(env.get("OMP_NUM_THREADS"))
        return Done(returncode=0)

    monkeypatch.setattr(results.subprocess, "run", start)
    monkeypatch.setattr(results.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    begun = plan.trials("inc_lora")[0]
    begun.folder.mkdir(parents=True)
    (begun.folder / "run.json").write_text("{}")
    results.perform(begun)
    results.perform(plan.trials("inc_lora")[1], jobs=4)
    assert calls[0] == ["resume", str(begun.folder)]
    assert calls[1][0] == "run"
    assert threads == [None, "2"]


def test_figures_outlive_the_folders_of_their_runs(plan, tmp_path):
    for run in (*plan.trials("joint"), *plan.trials("lwf")[:1]):
        finish(run, 20.0)
    assert plan.chosen("joint") is not None
    finish(plan.main("joint", 0), 30.0)
    page = results.table(plan, ["joint", "lwf"])
    moved = results.Plan(tmp_path / "new", tmp_path, "smollm2_135m", tmp_path / "figures.json")
    assert results.table(moved, ["joint", "lwf"]) == page
    assert [run.folder.name for run in results.possible(moved, ["joint", "lwf"])] == [
        "trial-1",
        "trial-2",
        "trial-3",
    ]
    # Not those of other settings, nor those of another model.
    other = results.Plan(tmp_path / "new", tmp_path, "small_t5", tmp_path / "figures.json")
    assert other.chosen("joint") is None
    settings = ("train.learning_rate=7",)
    assert moved.record(replace(moved.trials("joint")[0], settings=settings)) is None
    with pytest.raises(SystemExit, match=r"was not made with train.learning_rate=7"):
        plan.record(replace(plan.trials("joint")[0], settings=settings))


def test_a_run_is_a_line_of_the_file(tmp_path):
    figures = results_figures.Figures(tmp_path / "figures.json", "b")
    figures.put("full", "seed-0", {"settings": ["x"]})
    before = figures.path.read_text().splitlines()
    figures.put("full", "seed-1", {"settings": ["y"]})
    after = figures.path.read_text().splitlines()
    assert len(after) == len(before) + 1
    assert json.loads(figures.path.read_text())["b"]["full"]["seed-1"] == {"settings": ["y"]}


def test_the_figures_that_are_kept_belong_to_runs_of_the_list(tmp_path):
    for model, kinds in json.loads(results.FIGURES.read_text()).items():
        plan = results.Plan(tmp_path, tmp_path, model, results.FIGURES)
        for kind, runs in kinds.items():
            found = {run.folder.name for run in plan.runs(kind) if plan.record(run)}
            assert found == set(runs)


def test_runs_are_made_in_order_once_and_only_when_settings_are_known(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    plan = results.Plan(tmp_path, tmp_path, "smollm2_135m", figures, ("engine.procs=1",))
    made = []

    def perform(run, jobs):
        assert run.overrides[-1] == "engine.procs=1"
        made.append(f"{run.folder.parent.name}/{run.folder.name}")
        if made[-1] != "joint/trial-1":  # which fails
            finish(run, 10.0)

    monkeypatch.setattr(results, "perform", perform)
    monkeypatch.setattr(results, "write_page", lambda *_: None)
    results.work(plan, ["sequential", "joint"])
    trials = [f"trial-{number}" for number in range(4)]
    assert made == [
        *(f"sequential/{name}" for name in (*trials, "seed-0")),
        *(f"joint/{name}" for name in trials),
        *(f"sequential/seed-{seed}" for seed in (1, 2)),
    ]
    made.clear()
    results.work(plan, ["sequential", "joint"], jobs=3)
    assert made == ["joint/trial-1"]


def test_a_method_that_does_not_beat_its_baseline_is_named(plan, tmp_path, monkeypatch):
    found = {
        "sequential": (40.0, 50.0, 60.0),
        "ewc_lora": (41.0, 51.0, 61.0),  # better at every seed: nothing is said
        "o_lora": (30.0, 50.0),  # one seed is still to come
        "replay": (39.0, 60.0, 70.0),
        "joint": (0.0,),  # a bound
        "full": (20.0,),
        "gpm": (30.0,),
        "ewc": (20.0,),
    }
    for kind, values in found.items():
        for run in plan.trials(kind):
            finish(run, 1.0)
        for seed, value in enumerate(values):
            finish(plan.main(kind, seed), value)
    said = results.shortfalls(plan, list(results.ORDER))
    assert said == [
        "`o_lora` does not beat `sequential`: -5.0 points over 2 seeds.",
        "`replay` beats `sequential` by 6.3 points over 3 seeds, but not at every one.",
        "`ewc` does not beat `full`: +0.0 points over 1 seed.",
    ]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin smollm2_135m -->\nstale\n<!-- end smollm2_135m -->\nz\n")
    monkeypatch.setattr(results, "PAGE", page)
    for _ in range(2):
        results.write_page(plan, list(results.ORDER))
    text = page.read_text()
    assert text.startswith("a\n<!-- begin")
    assert text.endswith(f"\n\n{' '.join(said)}\n<!-- end smollm2_135m -->\nz\n")
    assert "stale" not in text


class Done:
    def __init__(self, returncode):
        self.returncode = returncode
