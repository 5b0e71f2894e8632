"""The generated language: balance, separate splits, collisions, determinism."""

from collections import Counter
from itertools import islice

import pytest

from accrete.pipeline.data.generated import SIZES, WORDS, describe, generate, members, names
from accrete.pipeline.data.pretraining import CODES, pretraining_examples
from accrete.pipeline.errors import DataError

TASKS = names()


def words_of(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split() if word in WORDS)


@pytest.mark.parametrize("name", TASKS)
def test_splits_have_their_sizes_balanced_labels_and_no_input_twice(name):
    labels = describe(name)["labels"]
    inputs = []
    for split, size in SIZES.items():
        rows = generate(name, split, 0)
        assert len(rows) == size == len({row["id"] for row in rows})
        inputs += [row["input"] for row in rows]
        if labels:
            assert Counter(row["output"] for row in rows) == dict.fromkeys(
                labels, size // len(labels)
            )
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", TASKS)
def test_rows_follow_from_the_seed_alone(name):
    assert generate(name, "train", 3) == generate(name, "train", 3)
    assert generate(name, "train", 3) != generate(name, "train", 4)


def test_answers_are_right_by_an_independent_rule():
    for name, labels in (("mood", ("good", "bad")), ("taste", ("good", "bad"))):
        good = set(members(name, 2)[0])
        for row in generate(name, "test", 1):
            votes = sum(word in good for word in words_of(row["input"]))
            assert row["output"] == labels[votes < 2]
    thieves = set(members("guests", 4)[0])
    for row in generate("guests", "test", 1):
        assert row["output"] == ("yes" if thieves & set(words_of(row["input"])) else "no")
    high = set(members("trade", 2)[1])
    for row in generate("trade", "test", 1):
        assert row["output"] == ("yes" if words_of(row["input"])[0] in high else "no")
    for row in generate("turn", "test", 1):
        assert row["output"].split() == list(words_of(row["input"]))[::-1]


def test_the_same_words_get_other_answers_in_other_tasks():
    mood, taste = set(members("mood", 2)[0]), set(members("taste", 2)[0])
    flipped = sum((word in mood) != (word in taste) for word in WORDS)
    assert len(WORDS) // 4 <= flipped <= 3 * len(WORDS) // 4
    asked = Counter(label for name in TASKS for label in describe(name)["labels"] or [])
    assert all(asked[label] == 2 for label in ("good", "bad", "yes", "no"))
    pairs = {row["input"]: row["output"] for row in generate("trade", "train", 0)}
    shared = [row for row in generate("turn", "train", 0) if row["input"] in pairs]
    assert shared
    assert all(pairs[row["input"]] != row["output"] for row in shared)


def test_pretraining_shows_no_task():
    instructions = {describe(name)["instruction"] for name in TASKS}
    examples = list(islice(pretraining_examples(0), 3000))
    assert examples == list(islice(pretraining_examples(0), 3000))
    assert not instructions & {example.instruction for example in examples}
    assert not set(CODES) & set(TASKS)
    assert all(e.output in e.labels for e in examples if e.labels)


def test_unknown_names_say_what_is_allowed():
    with pytest.raises(DataError, match="mood"):
        generate("moods", "train", 0)
    with pytest.raises(DataError, match="train, dev, test"):
        generate("mood", "valid", 0)
