"""Which runs make up a line, which lines are ranked, and what they are called."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from accrete.eval.compare import Setting, compare_runs
from accrete.eval.compare_output import to_csv, to_text
from accrete.eval.run_record import RunRecord
from accrete.eval.run_settings import branch_settings, telling

CELLS = [[[1, 1, 1, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]]
WORSE = [[[1, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]]


def only(runs: list[Path]) -> Setting:
    (setting,) = compare_runs(runs).settings
    return setting


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        ("method", {"lambda": 1e3}, "lambda=1000"),
        ("train", {"learning_rate": 1e-3, "global_batch_size": 64}, "global_batch_size=64"),
        ("adapter", {"rank": 16}, "rank=16"),
        ("data", {"max_train_examples": 50}, "max_train_examples=50"),
        ("data", {"streaming": True}, "streaming=true"),
        ("model", {"dropout": 0.1}, "model.dropout=0.1"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_other_settings_of_training_are_another_line(
    tmp_path: Path, section: str, settings: dict[str, Any], said: str, seed: int
) -> None:
    """Neither averaged over seeds nor dropped as a repetition."""
    runs = [
        write_run(tmp_path / "one", CELLS, method="ewc_lora"),
        write_run(
            tmp_path / "two", WORSE, method="ewc_lora", seed=seed, sections={section: settings}
        ),
    ]
    setting = only(runs)
    assert setting.ranked
    assert [len(line.runs) for line in setting.lines] == [1, 1]
    assert [line.metrics["average_performance"].mean for line in setting.lines] == [75.0, 25.0]
    label = setting.lines[1].label
    assert label.startswith("ewc_lora (")
    assert said in label
    assert not any("left out" in note for note in setting.notes)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("train", {"micro_batch_size": 2}),
        ("engine", {"kind": "deepspeed", "zero_stage": 3}),
        ("log", {"every_steps": 1}),
        ("checkpoint", {"every_steps": 7}),
        ("eval", {"batch_tokens": 100}),
        ("train", {"weight_decay": 0, "learning_rate": 0.001}),  # the defaults, spelt out
    ],
)
def test_settings_that_do_not_count_join_seeds(
    tmp_path: Path, section: str, settings: dict[str, Any]
) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS),
        write_run(tmp_path / "two", WORSE, seed=1, sections={section: settings}),
    ]
    (line,) = only(runs).lines
    assert (line.seeds, line.label, line.settings) == ([0, 1], "sequential", {})
    assert line.metrics["average_performance"].mean == 50.0


def test_a_tasks_own_length_is_another_line(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS, of_tasks={"a": {"epochs": 2.0}}),
        write_run(tmp_path / "two", CELLS, seed=1, of_tasks={"a": {"epochs": 2}}),
        write_run(tmp_path / "three", WORSE),
    ]
    lines = only(runs).lines
    assert [line.label for line in lines] == [
        "sequential (tasks.epochs=2/null)",
        "sequential (tasks.epochs=null)",
    ]
    assert [line.seeds for line in lines] == [[0, 1], [0]]


@pytest.mark.parametrize("settings", [{"per_label": {"train": 2}}, {"splits": {"train": "big"}}])
def test_other_training_rows_are_another_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS),
        write_run(tmp_path / "two", WORSE, of_tasks={"a": settings}),
    ]
    setting = only(runs)
    assert setting.ranked
    ((key, chosen),) = settings.items()
    said = f"tasks.a.{key}.train"
    assert [line.settings for line in setting.lines] == [
        {said: "null"},
        {said: str(chosen["train"])},
    ]


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ({"method.kind": "sequential"}, "sequential@stage-0"),
        ({"train.learning_rate": "0.01"}, "learning_rate=0.01@stage-0"),
    ],
)
def test_a_branch_from_other_settings_is_another_line(
    tmp_path: Path, shared: dict[str, str], said: str
) -> None:
    """Its recipe is that of a straight run; what it learned first is not."""

    def run(name: str, seed: int, shared: dict[str, str] | None = None) -> Path:
        folder = write_run(tmp_path / name, CELLS, method="ewc_lora", seed=seed)
        if shared is not None:
            own = branch_settings({"method": {"kind": "ewc_lora"}})
            learned = [{"stage": 0, "settings": own | shared}]
            (folder / "lineage.json").write_text(json.dumps({"learned": learned}))
        return folder

    alike = [run("one", 0), run("two", 1), run("three", 2, {})]
    branch = run("four", 0, shared)
    assert {line.label: line.seeds for line in only([*alike, branch]).lines} == {
        "ewc_lora (branch=none)": [0, 1, 2],
        f"ewc_lora (branch={said})": [0],
    }
    (line,) = only(alike).lines
    assert line.label == "ewc_lora"


def test_branches_with_other_histories_are_other_lines(tmp_path: Path) -> None:
    def settings(kind: str, **more: float) -> dict[str, str]:
        return branch_settings({"method": {"kind": kind, **more}})

    def run(name: str, *learned: dict[str, str]) -> Path:
        folder = write_run(tmp_path / name, CELLS, method="ewc_lora")
        entries = [{"stage": stage, "settings": said} for stage, said in enumerate(learned)]
        (folder / "lineage.json").write_text(json.dumps({"learned": entries}))
        return folder

    own, other = settings("ewc_lora"), settings("sequential")
    weak, strong = settings("lwf", weight=1.0), settings("lwf", weight=9.0)
    histories = [(other, other), (own, other), (other, own), (weak, weak), (strong, strong)]
    runs = [run(str(number), *learned) for number, learned in enumerate(histories)]
    said = [RunRecord(folder).branched for folder in runs]
    # Stages that two branches in a row left as they were are no other history.
    assert said[:3] == [
        "sequential@stage-1",
        "own@stage-0, sequential@stage-1",
        "sequential@stage-0",
    ]
    assert all(re.fullmatch(r"lwf#[0-9a-f]{4}@stage-1", str(text)) for text in said[3:])
    assert len(only(runs).lines) == len(histories)
    assert RunRecord(run("straight", own, own)).branched is None


def test_labels_say_what_differs_and_no_more(tmp_path: Path) -> None:
    def run(name: str, kind: str, **settings: dict[str, Any]) -> Path:
        return write_run(tmp_path / name, CELLS, method=kind, sections=settings)

    common = {"optimizer": "sgd"}
    runs = [
        run("one", "ewc_lora", method={"lambda": 1e3}, train={"learning_rate": 1e-3, **common}),
        run("two", "ewc_lora", method={"lambda": 1e4}, train={"learning_rate": 5e-4, **common}),
        run("three", "sequential", train={"learning_rate": 5e-4, **common}),
    ]
    setting = only(runs)
    assert {line.label for line in setting.lines} == {
        "ewc_lora (lambda=1000, learning_rate=0.001)",
        "ewc_lora (lambda=10000, learning_rate=0.0005)",
        "sequential",
    }
    assert {line.label for line in only(runs[::-1]).lines} == {line.label for line in setting.lines}
    assert {test.a for test in setting.tests} <= {line.label for line in setting.lines}
    assert "lambda=10000, learning_rate=0.0005" in to_text(compare_runs(runs), width=250)
    table = list(csv.DictReader(io.StringIO(to_csv(compare_runs(runs)))))
    assert {row["settings"] for row in table} == {
        "lambda=1000, learning_rate=0.001",
        "lambda=10000, learning_rate=0.0005",
        "",
    }


def test_long_values_are_cut_and_stay_apart() -> None:
    first, second = telling([{"a.x": "y" * 100}, {"a.x": "y" * 99 + "z"}])
    assert first != second
    assert len(first["x"]) < 40
    assert telling([{"a.x": "1", "b.x": "2"}, {"a.x": "1", "b.x": "3"}])[0] == {"b.x": "2"}


def test_a_run_without_a_recipe_is_a_line_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, CELLS, method="joint") for name in ("one", "two")]
    (runs[1] / "recipe.yaml").unlink()
    (runs[1] / "run.json").write_text('{"name": "demo", "method": "joint", "model": "tiny_t5"}')
    assert sorted(line.label for line in only(runs).lines) == [
        "joint",
        "joint (settings=not recorded)",
    ]


@pytest.mark.parametrize(
    ("data", "of_tasks", "said"),
    [
        ({"examples": 2}, {}, "data.examples differs"),
        ({"cut": "start"}, {}, "data.cut differs"),
        ({"format": "superni"}, {}, "data.format differs"),
        ({"max_eval_examples": 9}, {}, "data.max_eval_examples differs"),
        ({}, {"instruction": "Say."}, "tasks.b.instruction differs"),
        ({}, {"labels": ["x", "y"]}, "tasks.b.labels differs"),
        ({}, {"label_names": ["x", "y"]}, "tasks.b.label_names differs"),
        ({}, {"family": "NLI"}, "tasks.b.family differs"),
        ({}, {"dataset": "other"}, "tasks.b.dataset differs"),
        ({}, {"per_label": {"test": 3}}, "tasks.b.per_label.test differs"),
        ({}, {"splits": {"test": "validation"}}, "tasks.b.splits.test differs"),
    ],
)
def test_other_prompts_or_rows_are_not_ranked(
    tmp_path: Path, data: dict[str, Any], of_tasks: dict[str, Any], said: str
) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS, method="ewc_lora"),
        write_run(tmp_path / "two", WORSE, data=data, of_tasks={"b": of_tasks}),
    ]
    setting = only(runs)
    assert not setting.ranked
    assert setting.tests == []
    assert any(said in note for note in setting.notes)


def test_training_rows_alone_may_differ(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS, method="ewc_lora"),
        write_run(
            tmp_path / "two",
            WORSE,
            data={"max_train_examples": 5},
            of_tasks={"a": {"per_label": {"train": 2}, "splits": {"train": "big"}}},
        ),
    ]
    assert only(runs).ranked


PREPARED = {
    task: {
        "fingerprint": f"f-{task}",
        "stats": {"eval": {"rows": 4, "mean_prompt_tokens": 100.5}, "train": {"rows": 9}},
    }
    for task in ("a", "b")
}


def prepared(fingerprint: str, **counts: Any) -> dict[str, dict[str, Any]]:
    """What was prepared, with another task b."""
    found = copy.deepcopy(PREPARED)
    found["b"]["fingerprint"] = fingerprint
    stats: Any = found["b"]["stats"]
    stats["eval"].update(counts)
    return found


def test_rows_that_were_prepared_otherwise_are_not_ranked(tmp_path: Path) -> None:
    """The recipe says the same, a file below `data.root` does not."""
    one = write_run(tmp_path / "one", CELLS, method="ewc_lora", prepared=PREPARED)
    other = prepared("other", mean_prompt_tokens=101.25)
    two = write_run(tmp_path / "two", WORSE, prepared=other)
    (note,) = only([one, two]).notes
    assert "rows or prompts of b (mean prompt tokens 100.5 against 101.25)" in note
    # Training rows are in the fingerprint as well: it alone is no reason.
    three = write_run(tmp_path / "three", WORSE, prepared=prepared("more training rows"))
    assert only([one, three]).ranked


def test_the_first_count_that_differs_is_named(tmp_path: Path) -> None:
    """Not any of them: the same runs give the same notes."""
    names = ("rows", "mean_prompt_tokens", "max_prompt_tokens", "mean_answer_tokens")
    runs = [
        write_run(
            tmp_path / str(value),
            CELLS,
            method=f"m{value}",
            prepared=prepared(f"f{value}", **dict.fromkeys(names, value)),
        )
        for value in (4, 5)
    ]
    (note,) = only(runs).notes
    assert "prompts of b (rows 4 against 5)" in note


def test_other_metrics_are_not_ranked_though_no_recipe_names_one(tmp_path: Path) -> None:
    """A layout says its metric, and may say another one in a later accrete."""
    found = copy.deepcopy(PREPARED)
    found["b"]["metric"] = "rouge_l"
    known = {task: {"metric": "exact_match", **said} for task, said in PREPARED.items()}
    runs = [
        write_run(tmp_path / "one", CELLS, method="ewc_lora", prepared=known),
        write_run(tmp_path / "two", WORSE, prepared={**known, "b": found["b"]}),
    ]
    setting = only(runs)
    assert not setting.ranked
    assert any("score some task by different metrics" in note for note in setting.notes)


def test_the_same_prepared_rows_need_no_same_words(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS, prepared=PREPARED),
        write_run(tmp_path / "two", WORSE, seed=1, data={"format": "compact"}, prepared=PREPARED),
    ]
    setting = only(runs)
    assert [line.seeds for line in setting.lines] == [[0, 1]]
    assert setting.notes == []


def test_made_up_rows_follow_the_seed(tmp_path: Path) -> None:
    data = {"format": "generated"}
    other = prepared("other", mean_prompt_tokens=101.25)
    runs = [
        write_run(tmp_path / "one", CELLS, data=data, prepared=PREPARED),
        write_run(tmp_path / "two", WORSE, data=data, prepared=other, seed=1),
    ]
    setting = only(runs)
    assert [line.seeds for line in setting.lines] == [[0, 1]]
    assert setting.notes == []


def test_a_run_on_other_prompts_is_no_repetition(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", CELLS),
        write_run(tmp_path / "two", WORSE, data={"template": "olora"}),
    ]
    setting = only(runs)
    assert [line.label for line in setting.lines] == [
        "sequential (template=olora)",
        "sequential (template=plain)",
    ]
    assert not setting.ranked


def test_models_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    def run(name: str, **model: Any) -> Path:
        return write_run(tmp_path / name, CELLS, model=model, method=name)

    comparison = compare_runs([run("one", path="/x/merged"), run("two", path="/y/merged")])
    assert [setting.model for setting in comparison.settings] == ["/x/merged", "/y/merged"]
    assert not any(setting.ranked for setting in comparison.settings)
    short = compare_runs([run("three", path="/x/merged"), run("four", path="/x/merged")])
    assert [(setting.model, setting.ranked) for setting in short.settings] == [("merged", True)]
    hub = compare_runs([run("five", path="org/model"), run("six", path="org/model")])
    assert [setting.model for setting in hub.settings] == ["org/model"]


def test_revisions_of_a_hub_model_are_models(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, CELLS, model={"path": "org/model", "revision": name})
        for name in ("v1", "v2")
    ]
    names = [setting.model for setting in compare_runs(runs).settings]
    assert names == ["org/model@v1", "org/model@v2"]
