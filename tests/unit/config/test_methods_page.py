"""docs/methods.md says of every method what its class says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.registry import METHODS, method_class

PAGE = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = {
    "what it does": "summary",
    "paper": "source",
    "kept across tasks": "kept",
    "cost": "cost",
    "guarantee": "guarantee",
    "deviations": "deviations",
}
"""Row of a card -> class attribute; all but the first are columns of the table of all methods."""


def overview(kind: str, method: type[Method]) -> str:
    """A method's row in the table of all methods: the paper, and the first sentence of the rest."""
    short = [getattr(method, name).split(". ")[0] for name in [*ROWS.values()][2:]]
    return "| " + " | ".join([f"[`{kind}`](#{kind})", method.source, *short]) + " |"


@pytest.mark.parametrize("kind", list(METHODS))
def test_the_card_is_the_class_s_own_text(kind: str) -> None:
    method = method_class(kind)
    [card] = re.findall(rf"^## `{kind}`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = card.splitlines()
    for label, name in ROWS.items():
        assert getattr(method, name), name
        assert f"| {label} | {getattr(method, name)} |" in lines


def test_the_table_has_every_method_once() -> None:
    table = PAGE[: PAGE.index("\n## ")].splitlines()
    assert "| " + " | ".join(["method", *[*ROWS][1:]]) + " |" in table
    found = [line for line in table if line.startswith("| [`")]
    assert sorted(found) == sorted(overview(kind, method_class(kind)) for kind in METHODS)
