"""The invented language: balanced, disjoint, repeatable, and colliding."""

from __future__ import annotations

from collections import Counter

import pytest

from accrete.pipeline.data import generated
from accrete.pipeline.data.generated import SIZES, WORDS, classes, describe, generate, names
from accrete.pipeline.errors import DataError


@pytest.mark.parametrize("name", names())
def test_sizes_labels_and_balance(name):
    labels = describe(name)["labels"]
    for split, size in SIZES.items():
        rows = generate(name, split, 0)
        assert len(rows) == size
        assert len({row["id"] for row in rows}) == size
        if labels is not None:
            counts = Counter(row["output"] for row in rows)
            assert set(counts) == set(labels)
            assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", names())
def test_no_input_stands_in_two_splits(name):
    inputs = [row["input"] for split in SIZES for row in generate(name, split, 3)]
    assert len(set(inputs)) == len(inputs) == sum(SIZES.values())


@pytest.mark.parametrize("name", names())
def test_rows_are_a_function_of_name_split_and_seed(name):
    assert generate(name, "train", 1) == generate(name, "train", 1)
    assert generate(name, "train", 1) != generate(name, "train", 2)


def test_there_are_several_families_and_enough_tasks():
    assert len(names()) >= 5
    assert len({describe(name)["family"] for name in names()}) >= 4


def test_the_same_word_means_different_things():
    """`mood` and `taste` ask for good or bad by sortings of the same words that disagree."""
    mood, taste = classes("mood", 2), classes("taste", 2)
    differing = sum(mood[word] != taste[word] for word in WORDS)
    assert len(WORDS) / 4 < differing < 3 * len(WORDS) / 4
    assert describe("mood")["labels"] == describe("taste")["labels"]


def test_what_decides_a_mood_is_the_majority_of_its_words():
    sorting, labels = classes("mood", 2), describe("mood")["labels"]
    for row in generate("mood", "test", 0):
        votes = [sorting[word] for word in row["input"].split() if word in sorting]
        (winner, _), *_ = Counter(votes).most_common()
        assert row["output"] == labels[winner]


def test_one_word_has_other_answers_in_other_tasks():
    answers: dict[str, set[str]] = {}
    for name in names():
        for row in generate(name, "train", 0):
            for word in WORDS:
                if word in row["input"].split():
                    answers.setdefault(word, set()).add(f"{name}:{row['output']}")
    assert set(answers) == set(WORDS)
    for word, seen in answers.items():
        assert len({item.split(":")[0] for item in seen}) == len(names()), word


def test_unknown_names_and_splits():
    with pytest.raises(DataError, match="mood"):
        generate("moood", "train", 0)
    with pytest.raises(DataError, match="dev"):
        generate("mood", "valid", 0)
    assert generated.names() == names()
