"""The real rows of all 35 tasks, where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from accrete.pipeline.data.batches import padding_ratio, score_batches
from accrete.pipeline.data.config import DataConfig, TaskConfig, Template
from accrete.pipeline.data.encode import load_tokenizer
from accrete.pipeline.data.order import epoch_order
from accrete.pipeline.data.prepare import prepare_sequence
from accrete.pipeline.data.prompts import frame_for
from accrete.pipeline.data.sources import describe_task, read_examples
from accrete.pipeline.data.store import open_eval, open_train

BENCHMARKS = ("standard", "long", "superni")


def names(compact: Path, benchmark: str) -> list[str]:
    manifest = json.loads((compact / "MANIFEST.json").read_text())
    return [t["task"] for t in manifest["tasks"] if t["benchmark"] == benchmark]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_row_of_every_task_is_read(compact: Path, benchmark: str) -> None:
    manifest = json.loads((compact / "MANIFEST.json").read_text())
    data = DataConfig(root=str(compact), benchmark=benchmark)
    entries = [t for t in manifest["tasks"] if t["benchmark"] == benchmark]
    assert len(entries) == {"standard": 5, "long": 15, "superni": 15}[benchmark]
    for entry in entries:
        task = TaskConfig(name=entry["task"])
        info = describe_task(task, data)
        assert info.labels == (tuple(entry["labels"]) if entry["labels"] else None)
        assert info.metric == ("rouge_l" if benchmark == "superni" else "exact_match")
        for split, said in entry["splits"].items():
            rows = list(read_examples(task, data, split))
            assert len(rows) == said["count"]
            assert len({row.id for row in rows}) == len(rows)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_task_is_prepared(
    compact: Path, tmp_path: Path, t5_folder: str, benchmark: str
) -> None:
    data = DataConfig(
        root=str(compact),
        benchmark=benchmark,
        max_source_tokens=1024,  # the test's vocabulary is small, its token sequences long
        max_train_examples=40,
        max_eval_examples=10,
    )
    tasks = [TaskConfig(name=name) for name in names(compact, benchmark)]
    handles = prepare_sequence(tasks, data, t5_folder, True, tmp_path, 0)
    assert [handle.name for handle in handles] == [task.name for task in tasks]
    for handle in handles:
        assert (handle.num_train, handle.num_eval) == (40, 10)
        assert len(open_train(handle, 0, 0, 8, 50).rows(0, 0, 1)) == 8
        assert all(open_eval(handle).references(0))


STYLES: list[tuple[str, str, Template, str]] = [
    ("standard", "dbpedia", "plain", "Answer:"),
    ("standard", "yahoo", "olora", "Answer:"),
    ("long", "multirc", "sapt", "Output:"),
    ("superni", "task511", "superni", "Output:"),
]


@pytest.mark.parametrize(("benchmark", "name", "template", "cue"), STYLES)
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_truncation_keeps_options_and_cue(
    compact: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: str,
    benchmark: str,
    name: str,
    template: Template,
    cue: str,
) -> None:
    folder = request.getfixturevalue(f"{model}_folder")
    data = DataConfig(
        root=str(compact),
        benchmark=benchmark,
        template=template,
        max_source_tokens=420,
        max_train_examples=60,
        max_eval_examples=5,
    )
    task = TaskConfig(name=name)
    (handle,) = prepare_sequence([task], data, folder, model == "t5", tmp_path, 0)
    tokenizer = load_tokenizer(folder)
    info = describe_task(task, data)
    rows = open_train(handle, 0, 0, 60, 1).rows(0, 0, 1)
    assert handle.stats.train.max_prompt_tokens <= 420
    if name != "dbpedia":
        assert handle.stats.train.truncated_pct > 10
    unknown = tokenizer.unk_token_id
    for row in rows:
        known = [i for i in row.prompt if i != unknown]
        text = tokenizer.decode(known, skip_special_tokens=True).replace("\n", " ")
        assert text.rstrip().endswith(cue)
        if info.labels and template in ("plain", "olora") and model == "llama":
            assert ", ".join(info.labels) in text


@pytest.mark.parametrize("template", ["plain", "olora", "sapt"])
def test_every_style_applies_to_the_long_sequence(
    compact: Path, tmp_path: Path, t5_folder: str, template: Template
) -> None:
    data = DataConfig(
        root=str(compact),
        benchmark="long",
        template=template,
        max_train_examples=4,
        max_eval_examples=4,
    )
    tasks = [TaskConfig(name=name) for name in names(compact, "long")]
    assert len(prepare_sequence(tasks, data, t5_folder, True, tmp_path, 0)) == 15


def test_olora_prompts_are_the_published_ones(compact: Path) -> None:
    """Written out from the published code's parts; the instruction has one line of its own."""
    data = DataConfig(root=str(compact), benchmark="long", template="olora")
    for name in names(compact, "long"):
        info = describe_task(TaskConfig(name=name), data)
        row = next(read_examples(TaskConfig(name=name), data, "test"))
        asked = f"{info.instruction}\nOption: {', '.join(info.labels or ())} \n"
        expected = f"Task:{info.family}\nDataset:{name}\n{'' if name == 'copa' else asked}"
        rendered = str(frame_for("olora", info).render(row.input))
        assert rendered == f"{expected}{row.input}\nAnswer:"


def test_plain_prompts_of_real_rows(compact: Path) -> None:
    """Published scores were made with these prompts: they must not change."""
    data = DataConfig(root=str(compact), benchmark="standard")
    for name in names(compact, "standard"):
        info = describe_task(TaskConfig(name=name), data)
        rendered = str(frame_for("plain", info).render("TEXT"))
        options = ", ".join(info.labels or ())
        assert rendered == f"{info.instruction}\nOption: {options}\nTEXT\nAnswer:"


def lengths_of(compact: Path, benchmark: str) -> list[int]:
    """Words and signs of every training prompt, a stand-in for tokens that needs no vocabulary."""
    data = DataConfig(root=str(compact), benchmark=benchmark)
    found = []
    for name in names(compact, benchmark):
        info = describe_task(TaskConfig(name=name), data)
        fixed = len(str(info.instruction)) + len(", ".join(info.labels or ()))
        rows = read_examples(TaskConfig(name=name), data, "train")
        # 3.8 characters a token
        found += [round((fixed + 18 + len(row.input)) / 3.8) for row in rows]
    return found


def random_ratio(lengths: Sequence[int], window: int) -> float:
    order = epoch_order(np.asarray(lengths), 0, 0, 0, 32, window).tolist()
    return padding_ratio(lengths, [order[i : i + 32] for i in range(0, len(order), 32)])


@pytest.mark.parametrize(
    ("benchmark", "cap", "at_random", "in_windows", "by_budget"),
    [
        ("standard", None, 3.49, 1.12, 1.004),
        ("standard", 512, 2.70, 1.03, 1.004),
        ("long", 512, 2.98, 1.03, 1.002),
        ("superni", None, 5.17, 1.30, 1.006),
    ],
)
def test_padding_is_what_it_was_measured_to_be(
    compact: Path,
    benchmark: str,
    cap: int | None,
    at_random: float,
    in_windows: float,
    by_budget: float,
) -> None:
    """Padded tokens per real token: random batches of 32, windows of 50 batches, token budget."""
    lengths = [min(n, cap or n) for n in lengths_of(compact, benchmark)]
    budget = 32 * int(np.median(lengths))
    assert random_ratio(lengths, 1) == pytest.approx(at_random, rel=0.15)
    assert random_ratio(lengths, 50) == pytest.approx(in_windows, rel=0.06)
    assert padding_ratio(lengths, score_batches(lengths, budget)) == pytest.approx(
        by_budget, abs=0.006
    )
