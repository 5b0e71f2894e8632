"""Prompt styles: structure, and what each needs."""

from __future__ import annotations

import dataclasses

import pytest

from accrete.pipeline.data.examples import TaskInfo
from accrete.pipeline.data.prompts import RAW_CUE, frame_for
from accrete.pipeline.errors import DataError

INFO = TaskInfo(
    dataset="yelp",
    instruction="Which mood?",
    labels=("good", "bad"),
    family="SC",
    metric="exact_match",
    splits=("train", "test"),
)


def render(template: str, text: str = "TEXT", **changes: object) -> str:
    info = dataclasses.replace(INFO, **changes)  # type: ignore[arg-type]
    return str(frame_for(template, info).render(text))  # type: ignore[arg-type]


def test_plain() -> None:
    assert render("plain") == "Which mood?\nOption: good, bad\nTEXT\nAnswer:"
    assert render("plain", labels=None) == "Which mood?\nTEXT\nAnswer:"
    assert render("plain", labels=None, instruction=None) == "TEXT\nAnswer:"


def test_olora() -> None:
    # As published: a space behind the options, none behind the instruction.
    expected = "Task:SC\nDataset:yelp\nWhich mood?\nOption: good, bad \nTEXT\nAnswer:"
    assert render("olora") == expected
    # a published instruction brings its own line end, and stays as it is
    assert render("olora", instruction="Which mood?\n") == expected
    assert "\nWhich mood? \nOption:" in render("olora", instruction="Which mood? \n")
    assert render("olora", family="COPA") == "Task:COPA\nDataset:yelp\nTEXT\nAnswer:"
    with pytest.raises(DataError, match=r"no family.*Set the task's `family` \(such as SC, TC"):
        render("olora", family=None)


def test_sapt_and_superni() -> None:
    assert render("sapt") == "Which mood?\nTEXT\nOutput:"
    assert render("sapt", instruction=None) == "TEXT\nOutput:"
    assert render("superni") == (
        "Definition: Which mood?\n\nNow complete the following example -\nInput: TEXT\nOutput:"
    )
    shown = (("in", "out"),)
    assert render("superni", examples=shown) == (
        "Definition: Which mood?\n\nPositive Example 1 -\nInput: in\nOutput: out\n\n"
        "Now complete the following example -\nInput: TEXT\nOutput:"
    )
    with pytest.raises(DataError, match="no definition"):
        render("superni", instruction=None)


@pytest.mark.parametrize("template", ["plain", "olora", "superni", "raw"])
def test_whole_prompts_stay_as_they_are_under_any_template(template: str) -> None:
    text = "Q? Option: a, b.\nlong text\n\nAnswer:"
    assert render(template, text, raw=True, family=None) == text


@pytest.mark.parametrize(
    ("text", "cue"),
    [
        ("Q?\nsome text\n\nAnswer:", "\nAnswer:"),
        ("Q?\nsome text\nAnswer: \n", "\nAnswer: \n"),
        ("one line", ""),
        ("word " * RAW_CUE + "Stance:", " Stance:"),
        ("x" * 3 * RAW_CUE, ""),
    ],
)
def test_the_last_line_of_a_whole_prompt_is_its_cue(text: str, cue: str) -> None:
    prompt = frame_for("raw", INFO).render(text)
    assert prompt.prefix + prompt.text + prompt.suffix == text
    assert prompt.text.strip()
    assert prompt.suffix.endswith(cue)
    assert len(prompt.suffix) <= RAW_CUE + 1
