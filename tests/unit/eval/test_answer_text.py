from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrete.eval.text import exact_match, normalize_answer, rouge_l

STEADY = settings(deadline=None, derandomize=True)
"""No time limit for one example: test machines are shared."""
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "dogs", "9"]), max_size=9)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By recursion over suffixes: slow, and nothing like the library's table."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common_subsequence(a[1:], b[1:])
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


def f_measure(prediction: list[str], reference: list[str]) -> float:
    common = longest_common_subsequence(prediction, reference)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  World  News ", "world news"),
        ("Yes.", "yes"),
        ("it's\ta-b\n(c)", "its ab c"),
        ("The answer", "the answer"),
        ("...", ""),
        ("ÄRGER!", "ärger"),
    ],
)
def test_normalize_by_hand(text: str, wanted: str) -> None:
    assert normalize_answer(text) == wanted


@STEADY
@given(st.text())
def test_normalize_is_idempotent_and_clean(text: str) -> None:
    once = normalize_answer(text)
    # Lower case is not idempotent for every letter of Unicode, so only its effects are checked.
    assert not set(once) & set(string.punctuation + string.ascii_uppercase)
    assert once == " ".join(once.split())


@STEADY
@given(st.text(alphabet=string.printable))
def test_normalize_is_idempotent_on_ascii(text: str) -> None:
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_exact_match_takes_any_reference() -> None:
    assert exact_match("YES.", ("no", "yes"))
    assert not exact_match("maybe", ("no", "yes"))
    assert not exact_match("", ("yes",))


def test_exact_match_tells_punctuation_answers_apart() -> None:
    assert exact_match(" + ", ("+",))
    assert not exact_match("-", ("+",))
    assert not exact_match("", ("+",))


@STEADY
@given(WORDS, WORDS)
def test_rouge_l_equals_the_definition(prediction: list[str], reference: list[str]) -> None:
    found = rouge_l(" ".join(prediction), [" ".join(reference)], stemmer=False)
    assert found == pytest.approx(f_measure(prediction, reference), abs=1e-12)


def test_rouge_l_by_hand() -> None:
    # Common subsequence "police the gunman": 3 of 4 words on either side.
    found = rouge_l("police end the gunman", ["police killed the gunman"], stemmer=False)
    assert found == pytest.approx(0.75)
    assert rouge_l("The cat.", ["the CAT"]) == 1.0
    assert rouge_l("", ["the cat"]) == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    references = ["nothing in common", "the cat sat"]
    assert rouge_l("the cat sat", references) == 1.0
    assert rouge_l("the cat sat", references[:1]) == 0.0
    with pytest.raises(ValueError, match="reference"):
        rouge_l("a", [])


def test_stemming_is_on_unless_switched_off() -> None:
    assert rouge_l("running dogs", ["runs dog"]) == pytest.approx(1.0)
    assert rouge_l("running dogs", ["runs dog"], stemmer=False) == 0.0


def test_references_in_other_scripts_can_be_met() -> None:
    assert rouge_l("да конечно", ["Да, конечно!"]) == 1.0
    assert rouge_l("да", ["нет"]) == 0.0
    assert rouge_l(":)", [":)"]) == 1.0


def test_normalisation_removes_exactly_ascii_punctuation() -> None:
    assert re.fullmatch(r"a+", normalize_answer("a".join(string.punctuation)))
    assert normalize_answer("„a“") == "„a“"
