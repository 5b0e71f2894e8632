from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    EOS,
    CountingView,
    ListedRows,
    Ranks,
    collator,
    handle,
    learn,
    tiny_model,
    until_end,
    word_tokenizer,
)

from accrete.eval.evaluator import SequenceEvaluator, require_scorable
from accrete.eval.text import rouge_l
from accrete.pipeline.config.run import EvalConfig
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.handle import TaskHandle
from accrete.pipeline.data.shards import Layout, RowWriter
from accrete.pipeline.errors import ConfigError, DataError
from accrete.pipeline.scoring import TaskScore

MAX_NEW = 6
ANSWERS = ("yes", "no", "world sports", "news", "business world news")


@dataclass
class Case:
    """A model that has learned half of its rows, and two tasks made of all of them."""

    kind: str
    model: Any
    rows: dict[str, ListedRows]
    handles: list[TaskHandle]
    alone: dict[str, list[int]] = field(default_factory=dict)

    def evaluator(self, **config: Any) -> SequenceEvaluator:
        return SequenceEvaluator(
            EvalConfig(**{"batch_tokens": 64, **config}),
            collator(self.kind),
            word_tokenizer(),
            MAX_NEW,
            open_rows=lambda handle: self.rows[handle.name],
        )

    def view(self) -> CountingView:
        return CountingView(self.model, self.kind == "t5")

    def generated_alone(self, row: EncodedRow) -> list[int]:
        """The oracle: greedy decoding of one prompt, with no collator, batch or padding."""
        if row.id in self.alone:
            return self.alone[row.id]
        prompt = torch.tensor([row.prompt])
        found = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW,
            do_sample=False,
        )
        new = found[0, 1 if self.kind == "t5" else prompt.shape[1] :].tolist()
        return self.alone.setdefault(row.id, until_end(new))


def make_rows(name: str, kind: str, number: int) -> ListedRows:
    tokenizer, draw = word_tokenizer(), random.Random(name)
    rows, references = [], []
    for i in range(number):
        words = [f"w{draw.randrange(24)}" for _ in range(draw.randint(2, 12))]
        answer = draw.choice(ANSWERS)
        prompt = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = [EOS] if kind == "t5" else []
        rows.append(EncodedRow(f"{name}-{i}", [*prompt, *end], [*ids, EOS], i))
        references.append((answer,))
    return ListedRows(rows, references)


@pytest.fixture(scope="module", params=["t5", "llama"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    kind: str = request.param
    rows = {"a": make_rows("a", kind, 30), "b": make_rows("b", kind, 17)}
    model = tiny_model(kind)
    learn(model, rows["a"].take(range(15)) + rows["b"].take(range(8)), collator(kind), 50)
    return Case(kind, model, rows, [handle("a", num_rows=30), handle("b", num_rows=17)])


def correct(score: TaskScore) -> list[bool]:
    return [row.correct for row in score.rows]


def test_forward_equals_decoding_each_row_alone(case: Case) -> None:
    scores = case.evaluator()(case.view(), case.handles)
    hits = misses = 0
    for score in scores:
        rows = case.rows[score.task]
        for i, (row, scored) in enumerate(
            zip(rows.take(range(len(rows))), score.rows, strict=True)
        ):
            wanted = case.generated_alone(row) == row.answer[:-1]
            assert scored.correct is wanted, (score.task, i)
            assert scored.score == float(wanted)
            assert scored.prediction == (rows.references(i)[0] if wanted else None)
            hits, misses = hits + wanted, misses + (not wanted)
    # Both kinds must occur, or the test would show nothing.
    assert hits >= 10
    assert misses >= 5


def test_forward_equals_generate_mode(case: Case) -> None:
    forward = case.evaluator(mode="forward")(case.view(), case.handles)
    decoded = case.evaluator(mode="generate")(case.view(), case.handles)
    assert [correct(score) for score in forward] == [correct(score) for score in decoded]
    assert all(row.prediction is not None for score in decoded for row in score.rows)


def test_scores_are_means_in_file_order(case: Case) -> None:
    scores = case.evaluator()(case.view(), case.handles)
    assert [score.task for score in scores] == ["a", "b"]
    for score in scores:
        assert [row.id for row in score.rows] == [
            f"{score.task}-{i}" for i in range(len(score.rows))
        ]
        assert score.score == pytest.approx(100 * sum(correct(score)) / len(score.rows))
        assert score.seconds > 0


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("mode", ["auto", "generate"])
def test_ranks_make_equal_calls_and_get_equal_results(case: Case, world: int, mode: str) -> None:
    handles = [case.handles[0], replace(case.handles[1], metric="rouge_l")]
    options = {"mode": mode, "decode_misses": mode == "auto", "batch_tokens": 100}
    alone = case.evaluator(**options)(case.view(), handles)
    ranks = Ranks(world)
    views = [CountingView(case.model, case.kind == "t5", r, world, ranks) for r in range(world)]

    def work(rank: int) -> list[TaskScore]:
        return case.evaluator(**options)(views[rank], handles)

    results = ranks.run(work)
    assert all(result == results[0] for result in results)
    assert [score.rows for score in results[0]] == [score.rows for score in alone]
    kinds = [[call[0] for call in view.calls] for view in views]
    assert all(found == kinds[0] for found in kinds)
    assert ("logits" in kinds[0]) is (mode == "auto")
    # Work is shared out: no rank does it all, and every row is done once.
    real = [sum(rows for _, rows, _ in view.calls) for view in views]
    assert max(real) < sum(real)


def test_an_idle_rank_still_calls(case: Case) -> None:
    """One batch, three ranks: two of them forward a padding row."""
    ranks = Ranks(3)
    views = [CountingView(case.model, case.kind == "t5", r, 3, ranks) for r in range(3)]
    evaluator = [case.evaluator(batch_tokens=8192) for _ in range(3)]
    ranks.run(lambda rank: evaluator[rank](views[rank], case.handles[:1]))
    assert [view.calls[0][1] for view in views] == [30, 0, 0]
    assert [len(view.calls) for view in views] == [1, 1, 1]


def test_batches_pool_tasks_and_keep_the_budget(case: Case) -> None:
    view = case.view()
    case.evaluator(batch_tokens=64)(view, case.handles)
    for _, rows, tokens in view.calls:
        assert rows == 1 or tokens <= 64 + rows * MAX_NEW  # encoder and decoder pad apart
    alone = 0
    for task in case.handles:
        single = case.view()
        case.evaluator(batch_tokens=64)(single, [task])
        alone += len(single.calls)
    assert len(view.calls) <= alone


def test_forward_only_never_decodes(case: Case) -> None:
    view = case.view()
    case.evaluator()(view, case.handles)
    assert {call[0] for call in view.calls} == {"logits"}


def test_decode_misses_adds_text_and_decodes_nothing_else(case: Case) -> None:
    plain = case.evaluator()(case.view(), case.handles)
    view = case.view()
    full = case.evaluator(decode_misses=True)(view, case.handles)
    missed = sum(not row.correct for score in plain for row in score.rows)
    assert sum(rows for kind, rows, _ in view.calls if kind == "generate") == missed
    assert all(row.prediction is not None for score in full for row in score.rows)
    assert [correct(score) for score in full] == [correct(score) for score in plain]


def test_rouge_tasks_are_decoded_and_scored_by_rouge(case: Case) -> None:
    task = replace(case.handles[0], metric="rouge_l")
    (score,) = case.evaluator()(case.view(), [task])
    tokenizer, rows = word_tokenizer(), case.rows["a"]
    for i, (row, scored) in enumerate(zip(rows.take(range(30)), score.rows, strict=True)):
        text = tokenizer.decode(case.generated_alone(row), skip_special_tokens=True)
        assert scored.prediction == text
        assert scored.score == pytest.approx(rouge_l(text, rows.references(i)))
        assert scored.correct is (text == rows.references(i)[0])
    assert score.score == pytest.approx(sum(100 * row.score for row in score.rows) / 30)


def test_any_reference_counts(case: Case) -> None:
    """What the model says stands as a further reference of every row, among wrong ones."""
    tokenizer, rows = word_tokenizer(), case.rows["a"]
    said = [
        tokenizer.decode(case.generated_alone(row), skip_special_tokens=True)
        for row in rows.take(range(30))
    ]
    references = [(rows.references(i)[0], "w1 w2", said[i], "w3") for i in range(30)]
    listed = {"a": ListedRows(rows.take(range(30)), references)}
    many = Case(case.kind, case.model, listed, [])
    (score,) = many.evaluator()(many.view(), case.handles[:1])
    by_oracle = [
        case.generated_alone(row) == row.answer[:-1] or len(case.generated_alone(row)) < MAX_NEW
        for row in rows.take(range(30))
    ]
    assert correct(score) == by_oracle
    (single,) = case.evaluator()(case.view(), case.handles[:1])
    assert sum(correct(score)) > sum(correct(single))
    for i, row in enumerate(score.rows):
        if row.correct:
            assert row.prediction == said[i]


def test_a_mode_that_cannot_score_is_refused() -> None:
    handles = [handle("a"), handle("open", "rouge_l")]
    with pytest.raises(ConfigError, match=r"open .*rouge_l.*eval\.mode=auto"):
        require_scorable(EvalConfig(mode="forward"), handles)
    require_scorable(EvalConfig(mode="auto"), handles)
    require_scorable(EvalConfig(mode="generate"), handles)


def test_a_task_without_rows_is_refused(case: Case) -> None:
    empty = Case(case.kind, case.model, {"a": ListedRows([], [])}, [])
    with pytest.raises(DataError, match="no rows"):
        empty.evaluator()(empty.view(), case.handles[:1])


def test_prepared_folders_score_like_rows_in_memory(case: Case, tmp_path: Path) -> None:
    handles = []
    for task in case.handles:
        folder = tmp_path / task.name
        rows = case.rows[task.name]
        writer = RowWriter(folder, Layout(), None)
        numbers = range(len(rows))
        writer.add(rows.take(numbers), [rows.references(i) for i in numbers])
        writer.close().write(folder)
        handles.append(replace(task, eval_dir=str(folder)))
    config = EvalConfig(batch_tokens=64, decode_misses=True)
    evaluator = SequenceEvaluator(config, collator(case.kind), word_tokenizer(), MAX_NEW)
    wanted = case.evaluator(decode_misses=True)(case.view(), case.handles)
    for _ in range(2):  # the second time from the open tasks
        found = evaluator(case.view(), handles)
        assert [score.rows for score in found] == [score.rows for score in wanted]
