"""Each folder layout, made small, found by name and read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_samples import WriteRows, rows_of

from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.folders import detect
from accrete.pipeline.data.names import canonical, matching, nearest
from accrete.pipeline.data.sources import describe_task, read_examples
from accrete.pipeline.errors import DataError


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_olora(root: Path) -> None:
    for family, task, labels in (
        ("SC", "SST-2", ["Good", "Bad"]),
        ("BoolQA", "BoolQA", ["True", "False"]),
        ("NLI", "MNLI", ["neutral", "entailment"]),
    ):
        for split in ("train", "dev", "test"):
            rows = [{"label": label, "sentence": f"Text: {split} {label}"} for label in labels]
            put(root / "CL_Benchmark" / family / task / f"{split}.json", rows)
        put(root / "CL_Benchmark" / family / task / "labels.json", labels)


def make_sapt(root: Path) -> None:
    def content(definition: Any, outputs: list[Any]) -> dict[str, Any]:
        rows = [{"input": f"in {i}", "output": out} for i, out in enumerate(outputs)]
        return {
            "Definition": definition,
            "Positive Examples": [],
            "Negative Examples": [],
            "Instances": rows,
        }

    long, superni = root / "Long_Sequence", root / "SuperNI"
    name = "task002_quoref_answer_generation"
    for split in ("train", "dev", "test"):
        put(long / "agnews" / f"{split}.json", content(["Name the topic."], ["World", "Sports"]))
        put(superni / name / f"{split}.json", content(["Answer it."], [["a", "b"], "c"]))
    put(long / "agnews" / "labels.json", ["World", "Sports"])


def make_tasl(root: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = [
            {"id": f"y_{i}", "input": f"Q? Option: a, b.\n{i}\n\nAnswer:", "output": "a"}
            for i in (0, 1)
        ]
        put(root / split / "yahoo_T5.json", rows)


def make_trace(root: Path) -> None:
    for task in ("C-STANCE", "NumGLUE-cm"):
        for split in ("train", "eval", "test"):
            put(root / task / f"{split}.json", [{"prompt": f"{task}\nAnswer:", "answer": "A"}])


def make_compact(root: Path, write_rows: WriteRows) -> None:
    entries = []
    for benchmark in ("standard", "long"):
        for task in ("yelp", "mnli")[: 1 if benchmark == "standard" else 2]:
            for split in ("train", "dev", "test"):
                write_rows(root / benchmark / task / f"{split}.jsonl.gz", rows_of(3))
            entries.append(
                {
                    "benchmark": benchmark,
                    "task": task,
                    "family": "SC",
                    "labels": ["good", "bad"],
                    "instruction": "Decide.",
                    "metric": "exact match",
                    "splits": {"train": {}, "dev": {}, "test": {}},
                }
            )
    put(root / "MANIFEST.json", {"tasks": entries})


def test_olora(tmp_path: Path) -> None:
    make_olora(tmp_path)
    assert detect(tmp_path) == "olora"
    assert detect(tmp_path / "CL_Benchmark") == "olora"
    for root in (tmp_path, tmp_path / "CL_Benchmark"):
        data = DataConfig(root=str(root))
        info = describe_task(TaskConfig(name="sst2"), data)
        assert (info.dataset, info.family, info.labels) == ("SST-2", "SC", ("Good", "Bad"))
        assert info.metric == "exact_match"
        assert info.splits == ("train", "dev", "test")
        assert "sentiment" in str(info.instruction)
    (first, _) = read_examples(TaskConfig(name="boolq"), data, "test")
    assert (first.id, first.input, first.references) == (
        "boolq-test-0",
        "Text: test True",
        ("True",),
    )
    assert first.where.endswith("CL_Benchmark/BoolQA/BoolQA/test.json:1")


def test_sapt_and_superni(tmp_path: Path) -> None:
    make_sapt(tmp_path)
    assert detect(tmp_path) == "sapt"
    data = DataConfig(root=str(tmp_path))
    info = describe_task(TaskConfig(name="agnews"), data)
    assert (info.instruction, info.labels) == ("Name the topic.", ("World", "Sports"))
    assert info.metric == "exact_match"
    info = describe_task(TaskConfig(name="task002"), data)
    assert (info.instruction, info.metric, info.family) == ("Answer it.", "rouge_l", "SuperNI")
    rows = list(read_examples(TaskConfig(name="task002"), data, "train"))
    assert [r.references for r in rows] == [("a", "b"), ("c",)]  # text and list may alternate here
    assert [r.id for r in rows] == ["task002-train-0", "task002-train-1"]
    only = DataConfig(root=str(tmp_path), format="superni", benchmark="superni")
    assert describe_task(TaskConfig(name="task002"), only).dataset.startswith("task002_")
    with pytest.raises(DataError, match="no task 'agnews'"):
        describe_task(TaskConfig(name="agnews"), only)


def test_parts_of_a_collection(tmp_path: Path) -> None:
    """`long` is SAPT's Long_Sequence, also given alone, and all of O-LoRA's folder."""
    make_sapt(tmp_path / "sapt")
    make_olora(tmp_path / "olora")
    for root in ("sapt", "sapt/Long_Sequence", "olora", "olora/CL_Benchmark"):
        name = "mnli" if root.startswith("olora") else "agnews"
        data = DataConfig(root=str(tmp_path / root), benchmark="long")
        assert canonical(describe_task(TaskConfig(name=name), data).dataset) == name
    for root in ("sapt", "olora"):
        with pytest.raises(DataError, match="there is no 'lnog'"):
            describe_task(
                TaskConfig(name="agnews"), DataConfig(root=str(tmp_path / root), benchmark="lnog")
            )


def test_definitions_for_rows_of_another_layout(tmp_path: Path) -> None:
    make_olora(tmp_path / "olora")
    make_sapt(tmp_path / "sapt")
    task = TaskConfig(name="mnli")
    data = DataConfig(root=str(tmp_path / "olora"), template="sapt")
    assert "contradiction, entailment or neutral" in str(describe_task(task, data).instruction)
    own = TaskConfig(name="mnli", instruction="Mine.")
    assert describe_task(own, data).instruction == "Mine."
    # SAPT's own folder says what SAPT asks.
    data = DataConfig(root=str(tmp_path / "sapt"), template="sapt", benchmark="long")
    assert describe_task(TaskConfig(name="agnews"), data).instruction == "Name the topic."


def test_natural_instructions(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "input": f"in {i}", "output": [f"out {i}"]} for i in range(103)]
    shown = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    content = {"Definition": ["Do it. "], "Positive Examples": shown, "Instances": rows}
    put(tmp_path / "tasks" / "task073_commonsense.json", content)
    put(tmp_path / "tasks" / "README.json", {"no": "task"})
    for root in (tmp_path, tmp_path / "tasks"):
        assert detect(root) == "natural_instructions"
        data = DataConfig(root=str(root), template="superni", examples=1)
        info = describe_task(TaskConfig(name="task073"), data)
        assert (info.dataset, info.metric) == ("task073_commonsense", "rouge_l")
        assert (info.instruction, info.examples) == ("Do it.", (("a", "b"),))
        found = {
            split: [row.id for row in read_examples(TaskConfig(name="task073"), data, split)]
            for split in ("test", "dev", "train")
        }
        assert found["test"] == [f"r{i}" for i in range(50)]
        assert found["dev"] == [f"r{i}" for i in range(50, 100)]
        assert found["train"] == ["r100", "r101", "r102"]
    empty = DataConfig(root=str(tmp_path / ".."), format="natural_instructions")
    with pytest.raises(DataError, match="not in the layout natural_instructions"):
        describe_task(TaskConfig(name="x"), empty)


def test_as_many_worked_examples_as_asked_for_or_an_error(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    shown = [{"input": "a", "output": "b"}]
    content = {"Definition": ["Do it."], "Positive Examples": shown, "Instances": []}
    put(tmp_path / "ni" / "task073_commonsense.json", content)
    make_compact(tmp_path / "compact", write_rows)
    for folder, name, there in (("ni", "task073", 1), ("compact", "mnli", 0)):
        data = DataConfig(root=str(tmp_path / folder), template="superni", examples=there)
        assert len(describe_task(TaskConfig(name=name), data).examples) == there
        said = (
            rf"Task '{name}': data\.examples is 2, but the task has {there} .*Allowed: 0 to {there}"
        )
        with pytest.raises(DataError, match=said):
            describe_task(TaskConfig(name=name), dataclasses.replace(data, examples=2))
    with pytest.raises(ValueError, match="template `plain` shows no worked examples; allowed: 0"):
        DataConfig(examples=2)


def test_tasl(tmp_path: Path) -> None:
    make_tasl(tmp_path)
    assert detect(tmp_path) == "tasl"
    data = DataConfig(root=str(tmp_path))
    info = describe_task(TaskConfig(name="yahoo"), data)
    assert info.raw
    assert info.splits == ("train", "dev", "test")
    assert [r.id for r in read_examples(TaskConfig(name="yahoo"), data, "dev")] == ["y_0", "y_1"]
    assert info.metric == "exact_match"


def test_superni_tasks_in_the_layout_of_tasl_are_scored_by_rouge(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = [{"id": "task363-a", "input": "[INS] Q? [IN] x [OUT] ", "output": "P"}]
        put(tmp_path / split / "task363_T5.json", rows)
    data = DataConfig(root=str(tmp_path))
    info = describe_task(TaskConfig(name="task363"), data)
    assert (info.metric, info.raw) == ("rouge_l", True)
    own = describe_task(TaskConfig(name="task363", metric="exact_match"), data)
    assert own.metric == "exact_match"
    closed = describe_task(TaskConfig(name="task363", labels=["P", "N"]), data)
    assert closed.metric == "exact_match"


def test_trace(tmp_path: Path) -> None:
    make_trace(tmp_path)
    assert detect(tmp_path) == "trace"
    data = DataConfig(root=str(tmp_path))
    info = describe_task(TaskConfig(name="cstance"), data)
    assert info.raw
    assert info.splits == ("train", "dev", "test")
    (row,) = read_examples(TaskConfig(name="numglue_cm"), data, "dev")
    assert row.input == "NumGLUE-cm\nAnswer:"


def test_compact(tmp_path: Path, write_rows: WriteRows) -> None:
    make_compact(tmp_path, write_rows)
    assert detect(tmp_path) == "compact"
    data = DataConfig(root=str(tmp_path), benchmark="long")
    assert describe_task(TaskConfig(name="Yelp"), data).instruction == "Decide."
    assert len(list(read_examples(TaskConfig(name="mnli"), data, "dev"))) == 3
    assert describe_task(TaskConfig(name="mnli"), DataConfig(root=str(tmp_path))).dataset == "mnli"
    with pytest.raises(DataError, match=r"several benchmarks .*long, standard.*data\.benchmark"):
        describe_task(TaskConfig(name="yelp"), DataConfig(root=str(tmp_path)))
    with pytest.raises(DataError, match="no 'lnog'"):
        describe_task(TaskConfig(name="yelp"), DataConfig(root=str(tmp_path), benchmark="lnog"))
    (tmp_path / "MANIFEST.json").write_text('{"tasks": [{"task": "x"}]}')
    with pytest.raises(DataError, match=r"tasks\[0\] lacks benchmark, family"):
        describe_task(TaskConfig(name="yelp"), data)


def test_generated() -> None:
    from accrete.pipeline.data import generated

    name = generated.names()[0]
    data = DataConfig(format="generated")
    info = describe_task(TaskConfig(name="mine", dataset=name), data)
    assert info.instruction
    assert info.splits == ("train", "dev", "test")
    task = TaskConfig(name="mine", dataset=name)
    rows = list(read_examples(task, data, "test", seed=3))
    assert [r.id for r in rows] == [r["id"] for r in generated.generate(name, "test", 3)]
    assert rows[0].where == f"generated:{name}/test:1"
    assert rows != list(read_examples(task, data, "test", seed=4))


def test_unknown_layout_lists_what_is_recognised_and_what_was_found(tmp_path: Path) -> None:
    put(tmp_path / "stuff" / "things.json", [1])
    with pytest.raises(DataError) as caught:
        describe_task(TaskConfig(name="x"), DataConfig(root=str(tmp_path)))
    said = str(caught.value)
    assert "Found in it: stuff/" in said
    for layout in ("compact", "olora", "sapt", "superni", "natural_instructions", "tasl", "trace"):
        assert f"  {layout} " in said
    make_olora(tmp_path)
    make_trace(tmp_path)
    with pytest.raises(DataError, match=r"several layouts \(olora, trace\)"):
        detect(tmp_path)


def test_no_root_and_a_missing_root() -> None:
    with pytest.raises(DataError, match=r"Set data\.root"):
        describe_task(TaskConfig(name="x"), DataConfig())
    with pytest.raises(DataError, match="no folder nowhere"):
        describe_task(TaskConfig(name="x"), DataConfig(root="nowhere"))


def test_unknown_task_and_split(tmp_path: Path) -> None:
    make_olora(tmp_path)
    data = DataConfig(root=str(tmp_path))
    with pytest.raises(DataError, match=r"Did you mean 'MNLI'\? There: BoolQA, MNLI, SST-2"):
        describe_task(TaskConfig(name="mnil"), data)
    (tmp_path / "CL_Benchmark" / "NLI" / "MNLI" / "dev.json").unlink()
    with pytest.raises(DataError, match=r"no split 'dev'. There: test, train"):
        next(read_examples(TaskConfig(name="mnli"), data, "dev"))


def test_same_name_in_two_groups(tmp_path: Path) -> None:
    make_olora(tmp_path)
    shutil.copytree(tmp_path / "CL_Benchmark" / "SC", tmp_path / "CL_Benchmark" / "More")
    data = DataConfig(root=str(tmp_path))
    with pytest.raises(DataError, match=r"several folders: .*More/SST-2.*data\.benchmark"):
        describe_task(TaskConfig(name="sst2"), data)
    assert describe_task(TaskConfig(name="sst2", family="SC"), data).family == "SC"
    more = DataConfig(root=str(tmp_path), benchmark="more")
    assert describe_task(TaskConfig(name="sst2"), more).family == "More"


def test_explicit_fields_and_published_instructions(tmp_path: Path) -> None:
    make_olora(tmp_path)
    config = tmp_path / "instructions.json"
    put(
        config,
        {
            "SC": [
                {"instruction_type": "few-shot", "instruction": "few"},
                {"instruction_type": "zero-shot", "instruction": "What mood? \n"},
            ],
            "NLI": "How do they relate?",
            "BoolQA": [],
        },
    )
    data = DataConfig(root=str(tmp_path), instructions=str(config))
    assert describe_task(TaskConfig(name="sst2"), data).instruction == "What mood? \n"
    assert describe_task(TaskConfig(name="mnli"), data).instruction == "How do they relate?"
    own = TaskConfig(name="mnli", instruction="Mine.", labels=["x"], family="F", metric="rouge_l")
    info = describe_task(own, data)
    assert (info.instruction, info.labels, info.family, info.metric) == (
        "Mine.",
        ("x",),
        "F",
        "rouge_l",
    )
    with pytest.raises(DataError, match=r"'BoolQA' must be a text or a list"):
        describe_task(TaskConfig(name="boolq"), data)
    with pytest.raises(DataError, match=r"data\.instructions: there is no file"):
        describe_task(
            TaskConfig(name="mnli"), DataConfig(root=str(tmp_path), instructions="no.json")
        )


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnli", "MNLI"),
        ("sst2", "SST-2"),
        ("boolq", "BoolQA"),
        ("BoolQA", "boolq"),
        ("wic", "WiC"),
        ("multirc", "MultiRC"),
        ("c-stance", "C-STANCE"),
        ("task1590", "task1590_diplomacy_text_generation"),
        ("task1590_diplomacy_text_generation", "task1590"),
        ("yelp", "yelp_T5"),
    ],
)
def test_names_match(name: str, folder: str) -> None:
    others = ["agnews", "MultiRC_2000", "task159", "task15901_x", "amazon_T5", "IMDB"]
    assert matching(name, [*others, folder]) == [folder]


def test_names_that_do_not_match() -> None:
    assert matching("task15", ["task159_x", "task1510"]) == []
    assert nearest("dbpeda", ["agnews", "dbpedia"]) == "dbpedia"
    assert nearest("zzz", ["agnews"]) is None
    assert canonical("SST-2") == canonical("sst2")
