"""The metrics of generated answers, each against an oracle that shares no code with it."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrete.eval.measures import MEASURES
from accrete.eval.simplification import sari
from accrete.eval.text import edit_similarity, first_letter, raw_match, spell_literals
from accrete.pipeline.data.config import WHOLE_ANSWER, Metric

STEADY = settings(deadline=None, derandomize=True)
"""No time limit for one example: test machines are shared."""
SENTENCE = st.lists(st.sampled_from(["ein", "mann", "geht", "nach", "haus"]), max_size=7)


def test_every_metric_has_a_measure() -> None:
    assert set(MEASURES) == set(get_args(Metric))
    assert {name for name, one in MEASURES.items() if one.reads_source} == {"sari"}
    decided = {name for name, one in MEASURES.items() if one.all_or_nothing}
    assert decided >= WHOLE_ANSWER


@STEADY
@pytest.mark.parametrize("metric", list(MEASURES))
@given(said=st.text(max_size=20), right=st.text(min_size=1, max_size=20), source=st.text())
def test_every_score_lies_between_0_and_1(metric: Metric, said: str, right: str, source: str):
    assert 0.0 <= MEASURES[metric].score(said, [right], source) <= 1.0


@pytest.mark.parametrize("metric", list(MEASURES))
@pytest.mark.parametrize("answer", ["B", "12", "支持", "x = <NUM_LIT:2>", "Der Mann kommt frei."])
def test_the_reference_itself_scores_1(metric: Metric, answer: str) -> None:
    source = "Ein Mann kam gestern frei. 支 x"
    assert MEASURES[metric].score(answer, [answer], source) == pytest.approx(1.0)


def test_a_blank_answer_scores_nothing() -> None:
    for metric in ("exact_match", "raw_match", "first_letter", "rouge_l", "edit_similarity"):
        assert MEASURES[metric].score(" ", ["A"], "source") == 0.0


def test_raw_match_by_hand() -> None:
    assert raw_match("A", ["A"])
    assert raw_match(" A\n", ["A"])
    assert raw_match("b", ["a", "b"])
    for said in ("a", "A.", "A B", "", " "):
        assert not raw_match(said, ["A"])
    # Where exact_match forgives case and punctuation, raw_match does not.
    assert MEASURES["exact_match"].score("a.", ["A"], "") == 1.0
    assert MEASURES["raw_match"].score("a.", ["A"], "") == 0.0


def test_first_letter_by_hand() -> None:
    right = ["B\nBecause ice melts."]
    assert first_letter("B", right)
    assert first_letter(" B\nBecause it is warm.", right)
    assert first_letter("Both", right)  # one character decides, as in TRACE
    for said in ("b", "A\nBecause ice melts.", "", "\n"):
        assert not first_letter(said, right)


def common(a: str, b: str) -> int:
    """Longest common subsequence, row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = row
        row = [0]
        for j, y in enumerate(b, 1):
            row.append(last[j - 1] + 1 if x == y else max(last[j], row[-1]))
    return row[-1]


@STEADY
@given(st.text("ab =", min_size=1, max_size=12), st.text("ab =", min_size=1, max_size=12))
def test_edit_similarity_equals_the_definition(said: str, right: str) -> None:
    """2 M / T with M common characters of T in all: what `fuzz.ratio` is defined as."""
    one, other = said.strip(), right.strip()
    wanted = 2 * common(one, other) / (len(one) + len(other)) if one else 0.0
    assert edit_similarity(said, [right]) == pytest.approx(wanted)


def test_edit_similarity_by_hand() -> None:
    # "x = 2" and "x = 3": 4 of 5 characters in order on either side.
    assert edit_similarity("x = <NUM_LIT:2>", ["x = <NUM_LIT:3>"]) == pytest.approx(0.8)
    assert edit_similarity("x = 2", ["nothing", "x = <NUM_LIT:2>"]) == 1.0
    with pytest.raises(ValueError, match="reference"):
        edit_similarity("a", [])


@pytest.mark.parametrize(
    ("code", "spelled"),
    [
        ("f ( <STR_LIT:a b> , <NUM_LIT:1> )", "f ( a b , 1 )"),
        ("<NUM_LIT> <STR_LIT> <CHAR_LIT> .", "0   ."),
        ("<STR_LIT:U+002C>", "U+002C"),
        ("<EOL> <s> x < y > z", "<EOL> <s> x < y > z"),
    ],
)
def test_literals_of_code_by_hand(code: str, spelled: str) -> None:
    assert spell_literals(code) == spelled


def test_sari_of_the_published_example() -> None:
    """The example of the metric's card; the third digit already depends on every detail."""
    found = sari(
        "About 95 species are currently accepted.",
        "About 95 you now get in.",
        [
            "About 95 species are currently known.",
            "About 95 species are now accepted.",
            "95 species are now accepted.",
        ],
    )
    assert 100 * found == pytest.approx(26.953601953601954, abs=1e-9)


def test_sari_by_hand() -> None:
    assert sari("a b", "a", ["a"]) == 1.0
    # Unchanged: of words, P 1/2 and R 1 of keeping; of pairs, the kept one is wrong; the rest is 1.
    assert sari("a b", "a b", ["a"]) == pytest.approx(((2 / 3 + 2) + (0 + 2) + 3 + 3) / 12)
    # Nothing said: that empty word was added, though nothing was to be.
    assert sari("a b", " ", ["a"]) == pytest.approx((1 / 2 + 3 + 3 + 3) / 12)
    # Punctuation is a word of its own, case does not count.
    assert sari("A b.", "a B .", ["A B ."]) == 1.0
    with pytest.raises(ValueError, match="reference"):
        sari("a", "b", [])


def sari_by_lists(source: list[str], said: list[str], right: list[str]) -> float:
    """One reference, from the definition: for each n the mean of keep F1, delete P and add F1."""

    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def share(hits: float, of: int) -> float:
        return hits / of if of else 1.0

    def f1(p: float, r: float) -> float:
        return 2 * p * r / (p + r) if p + r else 0.0

    total = 0.0
    for n in (1, 2, 3, 4):
        a, b, c = (Counter(grams(words or [""], n)) for words in (source, said, right))
        kinds = set(a) | set(b) | set(c)
        kept = {g: min(a[g], b[g]) for g in kinds if min(a[g], b[g])}
        good = {g: min(a[g], c[g]) for g in kinds if min(a[g], c[g])}
        precision = share(math.fsum(min(k, c[g]) / k for g, k in kept.items()), len(kept))
        recall = share(sum(min(k, c[g]) for g, k in kept.items()), sum(good.values()))
        gone = {g: a[g] - b[g] for g in kinds if a[g] > b[g]}
        right_gone = math.fsum(max(k - c[g], 0) / k for g, k in gone.items())
        new, wanted = set(b) - set(a), set(c) - set(a)
        add = f1(share(len(new & wanted), len(new)), share(len(new & wanted), len(wanted)))
        total += f1(precision, recall) + share(right_gone, len(gone)) + add
    return total / 12


@STEADY
@given(SENTENCE, SENTENCE, SENTENCE)
def test_sari_equals_the_definition(source: list[str], said: list[str], right: list[str]) -> None:
    found = sari(" ".join(source), " ".join(said), [" ".join(right)])
    assert found == pytest.approx(sari_by_lists(source, said, right), abs=1e-12)
