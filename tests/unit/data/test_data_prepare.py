"""Preparation: all problems at once, one tokenisation, a cache that is never stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_samples import Prepare, WriteRows, rows_of, task

from accrete.pipeline.data import preflight
from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.handle import TaskHandle
from accrete.pipeline.data.prepare import prepare_sequence
from accrete.pipeline.data.store import StreamedRows, open_eval, open_train
from accrete.pipeline.errors import DataError


def test_handle_says_what_was_found(prepare: Prepare) -> None:
    (handle,) = prepare(task())
    assert (handle.name, handle.metric, handle.labels) == ("t", "exact_match", ("good", "bad"))
    assert (handle.num_train, handle.num_eval, handle.streamed) == (20, 8, False)
    assert handle.stats.train.label_counts == {"good": 10, "bad": 10}
    assert handle.stats.train.truncated_pct == 0
    assert handle.stats.warnings == ()
    rows = open_train(handle, 0, 0, 4, 5)
    seen = [row for step in range(rows.steps_per_epoch) for row in rows.rows(step, 0, 1)]
    assert sorted(row.id for row in seen) == sorted(f"r{i}" for i in range(20))
    assert max(len(r.prompt) for r in seen) == handle.stats.train.max_prompt_tokens
    mean = sum(len(r.prompt) for r in seen) / 20
    assert handle.stats.train.mean_prompt_tokens == pytest.approx(mean)
    scored = open_eval(handle)
    assert [r.id for r in scored] == [f"r{i}" for i in range(100, 108)]
    assert scored.references(1) == ("bad",)


def test_handle_json_round_trip(prepare: Prepare) -> None:
    (handle,) = prepare(task(labels=["good", "bad", "ugly"]))
    assert TaskHandle.from_json(json.loads(json.dumps(handle.to_json()))) == handle
    assert handle.stats.warnings == (
        "train: labels that no row has: ugly",
        "test: labels that no row has: ugly",
    )


def test_limits_take_the_first_rows(prepare: Prepare) -> None:
    (handle,) = prepare(task(), max_train_examples=6, max_eval_examples=3)
    assert (handle.num_train, handle.num_eval) == (6, 3)
    assert [r.id for r in open_eval(handle)] == ["r100", "r101", "r102"]


def test_limits_leave_labels_balanced_in_rows_sorted_by_label(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = sorted(rows_of(40), key=lambda row: str(row["output"]))
    for split in ("train", "test"):
        write_rows(tmp_path / "t" / f"{split}.jsonl", rows)
    limits = {"max_train_examples": 11, "max_eval_examples": 6}
    (handle,) = prepare(task(per_label={"train": 10, "test": 10}), **limits)
    assert (handle.num_train, handle.num_eval) == (11, 6)
    assert handle.stats.train.label_counts == {"good": 5, "bad": 6}
    assert handle.stats.eval.label_counts == {"good": 3, "bad": 3}
    assert handle.stats.warnings == ()
    (whole,) = prepare(task(per_label={"train": 10}), max_eval_examples=6)
    assert whole.stats.train.label_counts == {"good": 10, "bad": 10}
    assert whole.stats.eval.label_counts == {"good": 0, "bad": 6}


def test_half_characters_are_named_with_the_other_problems(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = rows_of(6)
    rows[2]["input"] = "sad \ud83d face"
    rows[3]["input"] = "glad \U0001f600 face"
    rows[4]["output"] = "goo\udc00d"
    rows[5]["id"] = "\ud800"
    write_rows(tmp_path / "t" / "train.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(task(labels=None))
    said, file = str(caught.value), tmp_path / "t" / "train.jsonl"
    said.encode()  # can be printed
    assert "3 problems" in said
    for line, words in (
        (3, r"field 'input' has half a character, '\ud83d' at position 4"),
        (5, r"field 'output' has half a character, '\udc00' at position 3"),
        (6, r"field 'id' has half a character, '\ud800' at position 0"),
    ):
        assert f"t, train: {file}:{line}: {words}" in said


def test_answers_that_the_tokenizer_cannot_tell_apart_give_a_warning(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows
) -> None:
    """T5 has no Chinese: one token stands for every label, and a score says that all is right."""
    labels = ("\u597d", "\u574f")
    write_rows(tmp_path / "t" / "train.jsonl", rows_of(20, labels))
    (handle,) = prepare(task(labels=[*labels, "good", "bad"]))
    answers = {tuple(row.answer) for row in open_train(handle, 0, 0, 20, 1).rows(0, 0, 1)}
    assert len(answers) == 1
    (said,) = (w for w in handle.stats.warnings if "no token" in w)
    assert said.endswith(f"20 rows, first at {tmp_path}/t/train.jsonl:1")


def test_streaming_and_its_threshold(prepare: Prepare) -> None:
    assert prepare(task(), streaming=True)[0].streamed
    assert prepare(task(), stream_above_rows=19)[0].streamed
    (handle,) = prepare(task(), stream_above_rows=20)
    assert not handle.streamed
    (handle,) = prepare(task(), streaming=True)
    rows = open_train(handle, 0, 0, 3, 2)
    assert isinstance(rows, StreamedRows)
    seen = sorted(row.id for s in range(rows.steps_per_epoch) for row in rows.rows(s, 0, 1))
    assert seen == sorted(f"r{i}" for i in range(20))


def test_all_problems_of_all_tasks_at_once(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = rows_of(6)
    rows[2]["output"] = "goood"
    rows[3] = {"id": "r3", "input": "x"}
    rows[4]["id"] = "r1"
    write_rows(tmp_path / "a" / "train.jsonl", rows)
    write_rows(tmp_path / "b" / "test.jsonl", [{"id": "x", "input": "y", "output": "word " * 60}])
    write_rows(tmp_path / "e" / "train.jsonl", [])
    tasks = [
        task("a"),
        task("b", labels=None),
        task("d", files={"train": "a/train.jsonl"}),
        task("e"),
    ]
    with pytest.raises(DataError) as caught:
        prepare(*tasks, TaskConfig(name="b", files={"train": "a/train.jsonl"}))
    said = str(caught.value)
    a, b = tmp_path / "a" / "train.jsonl", tmp_path / "b" / "test.jsonl"
    for words in (
        "8 problems. Nothing was started.",
        f"a, train: {a}:3: answer 'goood' is not one of the labels: good, bad",
        "did you mean 'good'?",
        f"a, train: {a}:4: field 'output' is missing",
        f"a, train: {a}:5: id 'r1' was already used at {a}:2; ids must be unique",
        f"b, test: {b}:1: the answer has",
        "data.max_target_tokens is 50",
        "Task 'd' has no split 'test'. There: train.",
        f"e, train: {tmp_path}/e/train.jsonl: the file is empty",
        "task name 'b' is used twice",
        "Task 'b' has no split 'test'",
    ):
        assert words in said


def test_many_problems_are_counted(prepare: Prepare, tmp_path: Path, write_rows: WriteRows) -> None:
    bad = [{"id": f"{i}", "input": "x", "output": "?"} for i in range(30)]
    for name in "abcdef":
        write_rows(tmp_path / name / "train.jsonl", bad)
    with pytest.raises(DataError) as caught:
        prepare(*(task(name) for name in "abcdef"))
    lines = str(caught.value).splitlines()
    assert "180 problems" in lines[0]
    assert len(lines) == 1 + preflight.SHOWN + 1
    assert lines[-1] == "  and 160 more"
    assert not list((tmp_path / "cache").glob("a-*"))
    assert not list((tmp_path / "cache").glob(".writing-*"))


def test_blank_answers_and_unlabelled_test_rows(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = [*rows_of(3), {"id": "z", "input": "x", "output": " "}]
    write_rows(tmp_path / "t" / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl:4: the answer is blank"):
        prepare(task(labels=None))
    (handle,) = prepare(task(labels=None, metric="rouge_l"))
    assert handle.num_train == 4
    (warning,) = handle.stats.warnings
    assert warning == (f"train: the answer is blank: 1 rows, first at {tmp_path}/t/train.jsonl:4")


def test_olora_rows_without_a_gold_label_are_kept_for_scoring_only(
    tmp_path: Path, t5_folder: str
) -> None:
    folder = tmp_path / "data" / "NLI" / "MNLI"
    folder.mkdir(parents=True)
    rows = [{"sentence": f"s{i}", "label": "neutral"} for i in range(3)]
    for split in ("train", "dev", "test"):
        extra = [] if split == "train" else [{"sentence": "s", "label": "-"}]
        (folder / f"{split}.json").write_text(json.dumps(rows + extra))
    (folder / "labels.json").write_text('["neutral"]')
    data = DataConfig(root=str(tmp_path / "data"), eval_split="dev", template="olora")
    one = [TaskConfig(name="mnli")]
    (handle,) = prepare_sequence(one, data, t5_folder, True, tmp_path / "cache", 0)
    assert handle.num_eval == 4
    assert any("'-' (no gold label)" in said for said in handle.stats.warnings)
    assert "the dev split is a copy of the test split: a search on it selects on test" in (
        handle.stats.warnings
    )
    (folder / "train.json").write_text(json.dumps([{"sentence": "s", "label": "-"}]))
    with pytest.raises(DataError, match="answer '-' is not one of the labels"):
        prepare_sequence(one, data, t5_folder, True, tmp_path / "cache", 0)


def test_long_answers_are_cut_for_rouge_and_an_error_for_exact_match(prepare: Prepare) -> None:
    with pytest.raises(DataError, match=r"data\.max_target_tokens is 3"):
        prepare(task(), max_target_tokens=3)
    (handle,) = prepare(task(metric="rouge_l"), max_target_tokens=3)
    assert handle.stats.train.cut_answers_pct > 0
    assert handle.stats.train.max_answer_tokens == 3


def test_frame_that_leaves_no_room(prepare: Prepare) -> None:
    with pytest.raises(DataError, match=r"Task 't': instruction, options and answer cue alone"):
        prepare(task(instruction="fox " * 20), max_source_tokens=20)


def test_truncation_is_counted(prepare: Prepare) -> None:
    (handle,) = prepare(task(), max_source_tokens=45)
    rows = open_train(handle, 0, 0, 20, 1).rows(0, 0, 1)
    at_cap = sum(len(r.prompt) == 45 for r in rows)
    assert 0 < handle.stats.train.truncated_pct <= 100 * at_cap / 20
    assert handle.stats.train.max_prompt_tokens == 45


def test_superni_trains_on_the_first_reference_and_keeps_all(
    tmp_path: Path, t5_folder: str
) -> None:
    folder = tmp_path / "SuperNI" / "task002_x"
    folder.mkdir(parents=True)
    rows = [{"input": "why", "output": ["fox", "dog"]}, {"input": "who", "output": "bank"}]
    for split in ("train", "test"):
        content = {"Definition": ["Answer."], "Instances": rows}
        (folder / f"{split}.json").write_text(json.dumps(content))
    data = DataConfig(root=str(tmp_path), template="superni")
    (handle,) = prepare_sequence(
        [TaskConfig(name="task002")], data, t5_folder, True, tmp_path / "c", 0
    )
    assert handle.metric == "rouge_l"
    scored = open_eval(handle)
    assert [scored.references(i) for i in (0, 1)] == [("fox", "dog"), ("bank",)]
    from accrete.pipeline.data.encode import load_tokenizer

    tokenizer = load_tokenizer(t5_folder)
    assert tokenizer.decode(scored[0].answer, skip_special_tokens=True) == "fox"


def test_generated_rows_depend_on_the_seed(tmp_path: Path, t5_folder: str) -> None:
    from accrete.pipeline.data import generated

    tasks = [TaskConfig(name=name) for name in generated.names()[:2]]
    data = DataConfig(format="generated", max_train_examples=12, max_eval_examples=5)
    made = [prepare_sequence(tasks, data, t5_folder, True, tmp_path, seed) for seed in (0, 1, 0)]
    assert made[0] == made[2]
    assert made[0][0].fingerprint != made[1][0].fingerprint
    assert [h.num_train for h in made[0]] == [12, 12]


def test_progress_is_told(prepare: Prepare) -> None:
    lines: list[str] = []
    prepare(task(), progress=lines.append)
    prepare(task(), progress=lines.append)
    assert lines == ["t, train: 20 rows", "t, test: 8 rows", "t: prepared before"]
