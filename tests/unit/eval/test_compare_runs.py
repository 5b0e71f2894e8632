from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from run_folders import write_run

from accrete.eval.compare import compare_runs
from accrete.eval.compare_output import FORMATS, to_csv, to_json, to_markdown, to_text
from accrete.eval.stats import mcnemar_exact
from accrete.pipeline.errors import RunFolderError

FIRST = [1] * 18 + [0] * 2
GOOD = [FIRST], [[1] * 15 + [0] * 5, [1] * 16 + [0] * 4]
BAD = [FIRST], [[0] * 12 + [1] * 5 + [0] * 3, [1] * 16 + [0] * 4]
TASKS = ("a", "b")


def test_means_over_seeds_and_ranks(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "g0", GOOD, method="ewc_lora", seed=0),
        write_run(tmp_path / "g1", BAD, method="ewc_lora", seed=1),
        write_run(tmp_path / "b0", BAD, seed=0),
        write_run(tmp_path / "b1", BAD, seed=1),
    ]
    (setting,) = compare_runs(runs[::-1]).settings
    assert setting.ranked
    assert [line.method for line in setting.lines] == ["ewc_lora", "sequential"]
    best = setting.lines[0].metrics["average_performance"]
    # The macro averages of the two seeds are 77.5 and 52.5.
    assert best.mean == pytest.approx(65.0)
    assert best.sd == pytest.approx(abs(77.5 - 52.5) / 2**0.5)
    assert best.num == 2
    assert setting.lines[1].metrics["average_performance"].sd == 0.0
    assert setting.lines[0].metrics["forward_transfer"].mean is None


def test_one_seed_is_mcnemars_test(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "good", GOOD, method="ewc_lora"),
        write_run(tmp_path / "bad", BAD),
    ]
    ((test,),) = [setting.tests for setting in compare_runs(runs).settings]
    rows = list(zip(GOOD[1][0] + GOOD[1][1], BAD[1][0] + BAD[1][1], strict=True))
    only_good = sum(g > b for g, b in rows)
    only_bad = sum(b > g for g, b in rows)
    assert test.exact
    assert test.p_value == pytest.approx(mcnemar_exact(only_good, only_bad))
    assert test.p_holm == test.p_value  # one pair only
    assert test.difference == pytest.approx(25.0)
    assert test.interval is not None
    assert test.interval.low < 25.0 < test.interval.high
    assert (test.a, test.b) == ("ewc_lora", "sequential")


def test_intransigence_against_tasks_trained_alone(tmp_path: Path) -> None:
    alone = [[1] * 19 + [0]], [[0] * 20, [1] * 18 + [0] * 2]
    runs = [
        write_run(tmp_path / "good", GOOD, method="ewc_lora"),
        write_run(tmp_path / "alone", alone, method="per_task"),
    ]
    (setting,) = compare_runs(runs).settings
    # Diagonals: 95 and 90 alone, 90 and 80 in the sequence.
    numbers, warning = setting.notes
    assert numbers.endswith("minus the line's own): ewc_lora +7.5.")
    assert "newest task's adapter" in warning
    (setting,) = compare_runs(runs[:1]).settings
    assert setting.notes == []


def test_holm_over_all_pairs(tmp_path: Path) -> None:
    middle = [FIRST], [[0] * 8 + [1] * 8 + [0] * 4, [1] * 16 + [0] * 4]
    runs = [
        write_run(tmp_path / "good", GOOD, method="ewc_lora"),
        write_run(tmp_path / "middle", middle, method="o_lora"),
        write_run(tmp_path / "bad", BAD),
    ]
    (setting,) = compare_runs(runs).settings
    assert len(setting.tests) == 3
    smallest = min(setting.tests, key=lambda test: test.p_value)
    assert smallest.p_holm == pytest.approx(3 * smallest.p_value)


def test_other_rows_are_not_ranked(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", BAD, ids=[f"other-{k}" for k in range(20)]),
    ]
    (setting,) = compare_runs(runs).settings
    assert not setting.ranked
    assert setting.tests == []
    (note,) = setting.notes
    assert "different rows of a (20 rows against 20 rows)" in note
    assert "rank" not in to_text(compare_runs(runs)).splitlines()[2]


def test_fewer_rows_are_not_ranked(tmp_path: Path) -> None:
    few = [[FIRST[:10]], [[1] * 10, [1] * 10]]
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", few),
    ]
    (setting,) = compare_runs(runs).settings
    assert not setting.ranked
    assert "20 rows against 10 rows" in setting.notes[0]


def test_another_prompt_is_not_ranked(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", BAD, data={"template": "olora"}),
    ]
    (setting,) = compare_runs(runs).settings
    assert not setting.ranked
    assert "data.template differs" in setting.notes[0]
    assert "olora" in setting.notes[0]


def test_another_order_or_model_is_another_setting(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "ab", GOOD),
        write_run(tmp_path / "ba", GOOD, tasks=("b", "a")),
        write_run(tmp_path / "llama", GOOD, model="tiny_llama"),
    ]
    comparison = compare_runs(runs)
    assert len(comparison.settings) == 3
    assert not any(setting.ranked for setting in comparison.settings)
    assert "3 settings" in comparison.notes[0]


def test_unfinished_and_repeated_runs_are_left_out(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", GOOD)
    again = write_run(tmp_path / "again", GOOD)
    part = write_run(tmp_path / "part", GOOD[:1], seed=1)
    (setting,) = compare_runs([whole, again, part, tmp_path / "part" / ".." / "whole"]).settings
    assert [line.runs for line in setting.lines] == [[str(tmp_path / "part" / ".." / "whole")]] or [
        line.runs for line in setting.lines
    ] == [[str(whole)]]
    notes = "\n".join(setting.notes)
    assert "1 of its 2 stages" in notes
    assert f"accrete resume {part}" in notes
    assert "repeats recipe demo, method sequential and seed 0" in notes


def test_no_common_seed_is_no_test(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora", seed=0),
        write_run(tmp_path / "two", BAD, seed=1),
    ]
    (setting,) = compare_runs(runs).settings
    assert setting.ranked
    assert setting.tests == []
    assert "no seed in common" in setting.notes[0]


def test_two_recipes_of_one_method_are_two_lines(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, name="r8"),
        write_run(tmp_path / "two", BAD, name="r4"),
    ]
    comparison = compare_runs(runs)
    (setting,) = comparison.settings
    assert [line.recipe for line in setting.lines] == ["r8", "r4"]
    assert setting.tests[0].a == "sequential (r8)"
    assert "recipe" in to_markdown(comparison).splitlines()[2]


def test_without_predictions_there_are_no_tests(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", BAD),
    ]
    for run in runs:
        (run / "stages/1/predictions.jsonl").unlink()
    (setting,) = compare_runs(runs).settings
    assert setting.tests == []
    assert "No paired tests" in setting.notes[0]


def test_predictions_that_one_run_lost_are_named(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", BAD),
    ]
    (runs[1] / "stages/1/predictions.jsonl").unlink()
    for run in runs:
        matrix = json.loads((run / "matrix.json").read_text())
        (run / "matrix.json").write_text(json.dumps({**matrix, "counts": [20, 20]}))
    (setting,) = compare_runs(runs).settings
    assert "(20 rows against 20 rows, which ones is not recorded)" in setting.notes[0]


def test_a_branch_under_way_is_not_finished(tmp_path: Path) -> None:
    """Its events begin with the plan of its parent, which had fewer tasks and is finished."""
    events = [{"event": "run_started", "plan": [{"task": "a"}, {"task": "b"}]}]
    events += [
        {"event": "scored", "stage": stage, "task": task, "score": 50.0, "rows": 20}
        for stage, task in ((0, "a"), (1, "a"), (1, "b"))
    ]
    run = write_run(tmp_path / "run", GOOD, tasks=("a", "b", "c"), events=events)
    (run / "matrix.json").unlink()
    (setting,) = compare_runs([run]).settings
    assert (setting.tasks, setting.lines) == (("a", "b", "c"), [])
    assert "2 of its 3 stages are scored" in setting.notes[0]


def test_every_format(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", GOOD, method="ewc_lora"),
        write_run(tmp_path / "two", BAD, method="[bold]se|q"),
    ]
    comparison = compare_runs(runs)
    assert set(FORMATS) == {"text", "markdown", "csv", "json"}
    assert "[bold]se|q" in to_text(comparison)
    assert "se\\|q" in to_markdown(comparison)
    table = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [row["method"] for row in table] == ["ewc_lora", "[bold]se|q"]
    assert float(table[0]["average_performance_mean"]) == 77.5
    assert table[0]["average_performance_sd"] == ""
    content = json.loads(to_json(comparison))
    assert content["settings"][0]["tests"][0]["difference"] == pytest.approx(25.0)
    assert content["settings"][0]["lines"][0]["metrics"]["backward_transfer"]["mean"] == -15.0


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        compare_runs([tmp_path])
