"""Each folder layout, made small, found by name and read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_samples import WriteRows, rows_of

from accrete.pipeline.data.config import ColumnsConfig, DataConfig, TaskConfig
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


def test_tasl(tmp_path: Path) -> None:
    make_tasl(tmp_path)
    assert detect(tmp_path) == "tasl"
    data = DataConfig(root=str(tmp_path))
    info = describe_task(TaskConfig(name="yahoo"), data)
    assert info.raw
    assert info.splits == ("train", "dev", "test")
    assert [r.id for r in read_examples(TaskConfig(name="yahoo"), data, "dev")] == ["y_0", "y_1"]


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


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.mark.usefixtures("hub_cache")
def test_hub_layout_folder(tmp_path: Path, write_rows: WriteRows) -> None:
    """A local folder is opened by the same calls as a hub id."""
    folder = tmp_path / "somebody"
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:2])
    task = TaskConfig(
        name="hubby",
        dataset=str(folder),
        columns=ColumnsConfig(input="text", output="label"),
        label_names=["no", "yes"],
    )
    data = DataConfig(format="hub")
    assert set(describe_task(task, data).splits) == {"train", "test"}
    found = list(read_examples(task, data, "train"))
    assert [f.references[0] for f in found] == ["no", "yes"] * 3
    assert found[4].where.endswith("[train]:row 5")
    wrong = TaskConfig(name="hubby", dataset=str(folder), splits={"test": "validation"})
    with pytest.raises(
        DataError, match=r"no split 'validation' \(for 'test'\). There: test, train"
    ):
        describe_task(wrong, data)


@pytest.mark.usefixtures("hub_cache")
def test_hub_names_its_own_classes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["down", "up"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    task = TaskConfig(
        name="h", dataset=str(tmp_path / "set"), columns=ColumnsConfig(input="text", output="label")
    )
    data = DataConfig(format="hub")
    (first, _) = read_examples(task, data, "train")
    assert first.references == ("up",)
    assert describe_task(task, data).labels == ("down", "up")


@pytest.mark.usefixtures("hub_cache")
def test_hub_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = TaskConfig(name="h", dataset="nobody/nothing-here", config="small")
    with pytest.raises(DataError) as caught:
        describe_task(task, DataConfig(format="hub"))
    said = str(caught.value)
    assert "hub data set 'nobody/nothing-here' cannot be opened" in said
    assert "load_dataset('nobody/nothing-here', 'small')" in said
    assert "HF_HOME" in said


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
    for layout in ("compact", "olora", "sapt", "superni", "tasl", "trace"):
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
