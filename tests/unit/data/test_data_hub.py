"""Data sets of the Hugging Face hub, as local folders in its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import WriteRows

from accrete.pipeline.data.config import ColumnsConfig, DataConfig, TaskConfig
from accrete.pipeline.data.prepare import prepare_sequence
from accrete.pipeline.data.sources import describe_task, read_examples
from accrete.pipeline.data.store import open_eval
from accrete.pipeline.errors import DataError


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
    assert "hub data set 'nobody/nothing-here' (small) cannot be opened" in said
    assert "accrete fetch RECIPE" in said
    assert "HF_HOME" in said


@pytest.mark.usefixtures("hub_cache")
def test_new_rows_of_a_cloned_data_set_are_not_taken_for_the_old(
    tmp_path: Path, write_rows: WriteRows, t5_folder: str
) -> None:
    """The key that `datasets` gives a folder whose README lists its files says nothing of them."""
    folder = tmp_path / "set"
    folder.mkdir()
    listed = "".join(f"\n  - split: {s}\n    path: data/{s}.jsonl" for s in ("train", "test"))
    head = f"configs:\n- config_name: default\n  data_files:{listed}"
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    task = TaskConfig(name="h", dataset=str(folder))
    found = []
    for answer in ("good", "bad", "good"):
        for split in ("train", "test"):
            write_rows(folder / "data" / f"{split}.jsonl", [{"input": "x", "output": answer}])
        (handle,) = prepare_sequence(
            [task], DataConfig(format="hub"), t5_folder, True, tmp_path / "cache", 0
        )
        found.append(handle)
        assert open_eval(handle).references(0) == (answer,)
    assert found[0] == found[2]


@pytest.mark.usefixtures("hub_cache")
def test_a_data_set_that_needs_a_config_names_those_there_are(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    configs = ""
    for name in ("copa", "rte"):
        write_rows(tmp_path / "set" / name / "train.jsonl", [{"input": "x", "output": "y"}])
        configs += f"- config_name: {name}\n  data_files: {name}/*.jsonl\n"
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    task = TaskConfig(name="h", dataset=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"available configs: \['copa', 'rte'\]"):
        describe_task(task, DataConfig(format="hub"))
