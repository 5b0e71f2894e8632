"""`make results`: every run on its list can be read, and the table says what is finished."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import results

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.methods.registry import METHODS


def test_every_method_is_on_the_list():
    assert set(results.ORDER) == set(METHODS)
    assert len(results.ORDER) == len(METHODS)


@pytest.mark.parametrize("model", list(results.MODELS))
@pytest.mark.parametrize("kind", results.ORDER)
def test_every_run_can_be_read(kind, model, tmp_path):
    plan = results.Plan(tmp_path, tmp_path, model)
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
    (run.folder / "matrix.json").write_text(json.dumps({"metrics": metrics}))
    events = (
        {"event": "consolidated", "state_bytes": state},
        {"event": "run_finished", "seconds": seconds},
    )
    (run.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_the_best_trial_is_taken_and_the_table_follows(tmp_path, monkeypatch):
    plan = results.Plan(tmp_path, tmp_path, "smollm2_135m")
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
    # What is finished is not made again, what was begun is resumed.
    calls = []
    monkeypatch.setattr(
        results.subprocess, "run", lambda c, **_: calls.append(c[3:]) or Done(returncode=0)
    )
    results.perform(plan.main("sequential", 0))
    assert calls == []
    begun = plan.trials("inc_lora")[0]
    begun.folder.mkdir(parents=True)
    (begun.folder / "run.json").write_text("{}")
    results.perform(begun)
    results.perform(plan.trials("inc_lora")[1])
    assert calls[0] == ["resume", str(begun.folder)]
    assert calls[1][0] == "run"


def test_runs_are_made_in_order_once_and_only_when_settings_are_known(tmp_path, monkeypatch):
    plan = results.Plan(tmp_path, tmp_path, "smollm2_135m", ("engine.procs=1",))
    made = []

    def perform(run):
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


def test_a_method_that_does_not_beat_its_baseline_is_named(tmp_path, monkeypatch):
    plan = results.Plan(tmp_path, tmp_path, "smollm2_135m")
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
