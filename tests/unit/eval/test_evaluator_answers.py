"""What single answers are worth: a view that says the same to every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import EOS, WORDS, ListedRows, collator, handle, until_end, word_tokenizer

from accrete.eval.evaluator import SequenceEvaluator
from accrete.eval.simplification import sari
from accrete.pipeline.config.run import EvalConfig
from accrete.pipeline.data.collate import Batch
from accrete.pipeline.data.encode import EncodedRow

MAX_NEW = 6


class Scripted:
    """A view on a model that answers every prompt with the same tokens."""

    rank, world, seq2seq, device = 0, 1, True, torch.device("cpu")

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def logits(self, batch: Batch) -> torch.Tensor:
        logits = torch.zeros(*batch.labels.shape, len(WORDS) + 3)
        for k in range(batch.labels.shape[1]):
            logits[:, k, self._tokens[min(k, len(self._tokens) - 1)]] = 1.0
        return logits

    def generate(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        return [until_end(self._tokens)[:max_new_tokens]] * batch.labels.shape[0]

    def gather(self, value: Any) -> list[Any]:
        return [value]


def scripted_task(
    said: str,
    references: tuple[str, ...],
    metric: str = "exact_match",
    labels: tuple[str, ...] | None = None,
    **config: Any,
) -> Any:
    tokenizer = word_tokenizer()
    texts = (said, references[0], "world news sports")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = ListedRows([EncodedRow("x", [*ids[2], EOS], [*ids[1], EOS], 0)], [references])
    evaluator = SequenceEvaluator(
        EvalConfig(**config), collator("t5"), tokenizer, MAX_NEW, open_rows=lambda _: rows
    )
    task = replace(handle("x", metric), labels=labels)
    (score,) = evaluator(Scripted([*ids[0], EOS]), [task])
    assert score.score == pytest.approx(100 * score.rows[0].score)
    return score


def scripted_score(said: str, references: tuple[str, ...], *more: Any, **config: Any) -> Any:
    return scripted_task(said, references, *more, **config).rows[0]


@pytest.mark.parametrize(
    ("metric", "said", "score", "correct"),
    [
        ("raw_match", "yes", 1.0, True),
        ("raw_match", "Yes", 0.0, False),
        ("first_letter", "yes no news w1 w2", 1.0, True),
        ("first_letter", "Yes", 0.0, False),
        ("edit_similarity", "yes", 1.0, True),
        ("edit_similarity", "Yes", 2 / 3, True),
        ("sari", "yes", 1.0, True),
    ],
)
def test_every_metric_is_scored_in_its_own_way(
    metric: str, said: str, score: float, correct: bool
) -> None:
    for mode in ("auto", "generate"):
        row = scripted_score(said, ("yes",), metric, mode=mode)
        assert row.score == pytest.approx(score)
        assert row.correct is correct


def test_sari_reads_the_prompt() -> None:
    """The prompt is "world news sports": saying it again keeps what should be left out."""
    again = scripted_score("world news sports", ("world",), "sari")
    assert again.score == pytest.approx(sari("world news sports", "world news sports", ["world"]))
    assert again.score < scripted_score("world", ("world",), "sari").score == 1.0


def test_one_letter_needs_few_tokens() -> None:
    row = scripted_score("yes no news w1 w2", ("yes",), "first_letter")
    assert row.prediction == "yes no news w1"
    assert scripted_score("yes no news w1 w2", ("yes",), "rouge_l").prediction.endswith("w2")


def test_the_end_token_must_be_right_too() -> None:
    assert scripted_score("world news", ("world news",)).correct
    assert not scripted_score("world news sports", ("world news",)).correct
    assert not scripted_score("world", ("world news",)).correct


def test_forward_is_a_lower_bound_of_normalised_match() -> None:
    assert not scripted_score("Yes", ("yes",)).correct
    missed = scripted_score("Yes", ("yes",), decode_misses=True)
    assert missed.correct
    assert missed.prediction == "Yes"
    assert scripted_score("Yes", ("yes",), mode="generate").correct
    assert not scripted_score("no", ("yes",), decode_misses=True).correct


def test_an_answer_that_cannot_be_spelled_back_still_counts() -> None:
    """The tokenizer knows no `{`: the gold is the unknown token, and decoding gives no text."""
    for mode in ("forward", "generate"):
        assert scripted_score("{", ("{",), mode=mode).correct
    assert not scripted_score("yes", ("{",), mode="generate").correct


@pytest.mark.parametrize("config", [{"mode": "generate"}, {"decode_misses": True}])
@pytest.mark.parametrize(
    ("said", "labels", "outside"),
    [
        ("no", ("yes", "no"), 0.0),
        ("Yes", ("yes", "no"), 0.0),
        ("world news", ("yes", "no"), 100.0),
        ("world news", None, None),
    ],
)
def test_answers_that_are_no_label_are_counted(
    said: str, labels: tuple[str, ...] | None, outside: float | None, config: dict[str, Any]
) -> None:
    assert scripted_task(said, ("no",), labels=labels, **config).outside == outside


def test_answers_that_nobody_decoded_are_not_counted() -> None:
    labels = ("yes", "no")
    assert scripted_task("world", ("yes",), labels=labels).outside is None
    assert scripted_task("yes", ("yes",), labels=labels).outside == 0
    # Right by its tokens, though its text is empty.
    assert scripted_task("{", ("{",), labels=("{",), mode="generate").outside == 0
    # The metric says what a label is.
    assert scripted_task("yes no", ("no",), "first_letter", labels).outside == 0
    assert scripted_task("yes no", ("no",), "exact_match", labels, mode="generate").outside == 100


def test_a_reference_too_long_to_decode_cannot_be_hit() -> None:
    long = " ".join(["world"] * MAX_NEW)
    assert not scripted_score(long, ("yes", long)).correct
    short = " ".join(["world"] * (MAX_NEW - 1))
    assert scripted_score(short, ("yes", short)).correct
    assert not scripted_score(long, (long,)).correct
    assert scripted_score(short, (short,)).correct
    # Cut to what fits, the long reference would be met by an answer that is not it.
    assert not scripted_score(short, ("yes", long)).correct
